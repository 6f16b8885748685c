//! QMP through libvirt. libvirt holds the monitor of its domains and passes
//! commands on. The domain needs no change for that.
//!
//! Only one call is made at a time, because libvirt's threads may reorder calls
//! that overlap. libvirt chooses the ids of the commands. If QEMU refuses a
//! command, that is an ordinary reply.

use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::SendFlags;
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::time::sleep;

use super::domain::Domain;
use super::error::{ErrorKind, LibvirtError};
use super::frame::{self, Bounds, Reply};
use super::rpc::{self, Call, Outcome, Program, Reader, Xdr};
use super::{Version, stream};

/// Procedures of [`Program::Remote`] (libvirt, src/remote/remote_protocol.x).
const CONNECT_OPEN: u32 = 1;
const CONNECT_CLOSE: u32 = 2;
const DOMAIN_LOOKUP_BY_NAME: u32 = 23;
const AUTH_LIST: u32 = 66;
const AUTH_POLKIT: u32 = 70;

/// Procedures of [`Program::Qemu`] (libvirt, src/remote/qemu_protocol.x). The
/// second one exists since libvirt 8.2.
const MONITOR_COMMAND: u32 = 1;
const MONITOR_COMMAND_WITH_FILES: u32 = 7;

/// Kinds of authentication (`remote_auth_type`).
const NO_AUTH: u32 = 0;
const POLKIT: u32 = 2;

/// How long to wait before asking again for a domain that another job holds.
/// libvirt itself has waited for 30 s then.
const PAUSE: Duration = Duration::from_millis(100);

/// How long libvirt may take to close a connection. Without this wait, it logs
/// an error.
const FAREWELL: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };

/// A connection to libvirt for one running domain.
#[derive(Debug)]
pub struct Libvirt {
    stream: UnixStream,
    domain: Domain,
    /// The domain as libvirt's protocol names it: name, UUID, and its id while
    /// it runs.
    named: Vec<u8>,
    pid: Option<i32>,
    serial: u32,
    /// Whether every call was answered.
    is_idle: bool,
    bounds: Bounds,
}

impl Libvirt {
    /// Connects to the libvirt that the domain belongs to, and asks the
    /// domain's QEMU for its version. Waits while another job holds the domain.
    pub async fn connect(domain: &Domain) -> Result<(Self, Version), ErrorKind> {
        if domain.uid().is_none() {
            return Err(LibvirtError::NoUser.into());
        }
        let mut nobody = None;
        for socket in domain.sockets() {
            match stream::connect(&socket).await {
                Ok(stream) => return Libvirt::on_stream(stream, domain).await,
                Err(source) => nobody = Some(not_reached(source, socket, domain)?),
            }
        }
        Err(nobody.unwrap_or_else(|| LibvirtError::NoUser.into()))
    }

    /// Does the same over a stream that is connected already. The process that
    /// listens must belong to the user whose libvirt it is, or be systemd
    /// acting for that user.
    pub async fn on_stream(
        stream: UnixStream,
        domain: &Domain,
    ) -> Result<(Self, Version), ErrorKind> {
        let peer = stream.peer_cred().map_err(ErrorKind::Connect)?.uid();
        if Some(peer) != domain.uid() {
            return Err(LibvirtError::Stranger { uid: peer }.into());
        }
        let mut libvirt = Libvirt {
            stream,
            domain: domain.clone(),
            named: Vec::new(),
            pid: None,
            serial: 0,
            is_idle: true,
            bounds: Bounds::default(),
        };
        libvirt.log_in().await?;
        libvirt.open().await?;
        libvirt.look_up().await?;
        let version = libvirt.version().await?;
        // The process id is read only now, because this QEMU has just answered.
        libvirt.pid = domain.pid();
        Ok((libvirt, version))
    }

    /// The process id of the domain's QEMU, if this user may see it.
    pub fn pid(&self) -> Option<i32> {
        self.pid
    }

    /// Makes the domain's QEMU execute a command, and returns the answer.
    pub async fn command(
        &mut self,
        command: &str,
        descriptor: Option<OwnedFd>,
    ) -> Result<Reply, ErrorKind> {
        let procedure = match descriptor {
            Some(_) => MONITOR_COMMAND_WITH_FILES,
            None => MONITOR_COMMAND,
        };
        let mut arguments = self.named.clone();
        arguments.extend(Xdr::default().string(command).number(0).bytes());
        let call = Call { program: Program::Qemu, procedure, arguments };
        let given = self.call(&call, descriptor).await?;
        let answer = Reader(&given).string().ok_or_else(|| not_libvirt("a reply without text"))?;
        self.bounds.add(answer.len())?;
        frame::reply(answer)
    }

    async fn log_in(&mut self) -> Result<(), ErrorKind> {
        let given = self.remote(AUTH_LIST, Xdr::default()).await?;
        let mut xdr = Reader(&given);
        let count = xdr.number().ok_or_else(|| not_libvirt("no list of ways to log in"))?;
        let kinds: Vec<u32> = (0..count).map_while(|_| xdr.number()).collect();
        if kinds.is_empty() || kinds.contains(&NO_AUTH) {
            return Ok(());
        }
        if !kinds.contains(&POLKIT) {
            return Err(LibvirtError::Forbidden("it asks for a password".into()).into());
        }
        match self.remote(AUTH_POLKIT, Xdr::default()).await {
            Err(ErrorKind::Libvirt(LibvirtError::Failed { message, .. })) => {
                Err(LibvirtError::Forbidden(message).into())
            }
            done => done.map(|_| ()),
        }
    }

    async fn open(&mut self) -> Result<(), ErrorKind> {
        // The arguments say that there is a URI and that no flags are set.
        let arguments = Xdr::default().number(1).string(self.domain.uri()).number(0);
        self.remote(CONNECT_OPEN, arguments).await.map(|_| ())
    }

    async fn look_up(&mut self) -> Result<(), ErrorKind> {
        let arguments = Xdr::default().string(self.domain.name());
        let given = self.remote(DOMAIN_LOOKUP_BY_NAME, arguments).await?;
        let mut xdr = Reader(&given);
        let (name, _uuid, id) = (xdr.string(), xdr.take(16), xdr.number());
        if name != Some(self.domain.name().as_bytes()) || id.is_none() || !xdr.0.is_empty() {
            return Err(not_libvirt("another domain than was asked for"));
        }
        if id == Some(u32::MAX) {
            return Err(LibvirtError::NotRunning.into());
        }
        self.named = given;
        Ok(())
    }

    async fn version(&mut self) -> Result<Version, ErrorKind> {
        loop {
            match self.command(r#"{"execute":"query-version"}"#, None).await {
                Err(ErrorKind::Libvirt(LibvirtError::Busy)) => sleep(PAUSE).await,
                Ok(Reply::Return(json)) => {
                    let info: frame::VersionInfo = serde_json::from_str(&json)
                        .map_err(|_| not_libvirt("no version of QEMU"))?;
                    return Ok(info.qemu);
                }
                Ok(Reply::Error { desc, .. }) => return Err(not_libvirt(&desc)),
                Err(error) => return Err(error),
            }
        }
    }

    async fn remote(&mut self, procedure: u32, arguments: Xdr) -> Result<Vec<u8>, ErrorKind> {
        let call = Call { program: Program::Remote, procedure, arguments: arguments.bytes() };
        self.call(&call, None).await
    }

    async fn call(
        &mut self,
        call: &Call,
        descriptor: Option<OwnedFd>,
    ) -> Result<Vec<u8>, ErrorKind> {
        self.is_idle = false;
        self.serial += 1;
        stream::send(&self.stream, &call.packet(self.serial, descriptor.is_some()), None).await?;
        if descriptor.is_some() {
            // The descriptor is sent with one extra byte that belongs to no
            // packet.
            stream::send(&self.stream, &[0], descriptor.as_ref()).await?;
        }
        let outcome = loop {
            let mut start = [0; 4];
            self.read(&mut start).await?;
            let length = rpc::length(start).ok_or_else(|| not_libvirt("no packet of libvirt's"))?;
            let mut packet = vec![0; length - start.len()];
            self.read(&mut packet).await?;
            let reply = rpc::reply(&packet, call, self.serial);
            if let Some(outcome) = reply.map_err(|()| not_libvirt("a packet that ends early"))? {
                break outcome;
            }
        };
        self.is_idle = true;
        match outcome {
            Outcome::Done(given) => Ok(given),
            Outcome::Failed { code, message } => {
                let passes_descriptor =
                    call.program == Program::Qemu && call.procedure == MONITOR_COMMAND_WITH_FILES;
                let runs = self.domain.runs();
                Err(LibvirtError::from_code(code, message, passes_descriptor, runs).into())
            }
        }
    }

    async fn read(&self, mut bytes: &mut [u8]) -> Result<(), ErrorKind> {
        let stream = &self.stream;
        while !bytes.is_empty() {
            let read = stream.async_io(Interest::READABLE, || stream.try_read(bytes));
            match read.await {
                Ok(0) => return Err(ErrorKind::Lost(None)),
                Ok(count) => bytes = bytes.get_mut(count..).unwrap_or_default(),
                Err(error) => return Err(ErrorKind::Lost(Some(error))),
            }
        }
        Ok(())
    }
}

/// libvirt logs an error for each client that does not close its connection
/// properly.
impl Drop for Libvirt {
    fn drop(&mut self) {
        if !self.is_idle {
            return;
        }
        let call =
            Call { program: Program::Remote, procedure: CONNECT_CLOSE, arguments: Vec::new() };
        let packet = call.packet(self.serial + 1, false);
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        if rustix::net::send(&self.stream, &packet, flags).is_ok() {
            // The content of the answer does not matter: libvirt has read the
            // request.
            let _ = poll(&mut [PollFd::new(&self.stream, PollFlags::IN)], Some(&FAREWELL));
        }
    }
}

/// Explains why libvirt could not be reached. `Ok` means only that it does not
/// listen there.
fn not_reached(
    source: io::Error,
    socket: PathBuf,
    domain: &Domain,
) -> Result<ErrorKind, ErrorKind> {
    match source.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
            let runs = domain.runs();
            Ok(LibvirtError::NotThere { socket, runs, source }.into())
        }
        io::ErrorKind::PermissionDenied => Err(LibvirtError::Forbidden(source.to_string()).into()),
        _ => Err(ErrorKind::Connect(source)),
    }
}

fn not_libvirt(saw: &str) -> ErrorKind {
    ErrorKind::NotQmp { saw: saw.to_owned() }
}
