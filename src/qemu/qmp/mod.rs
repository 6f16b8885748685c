//! One conversation with a QMP socket (QEMU, docs/interop/qmp-spec.rst).
//!
//! A [`Session`] connects and waits for the greeting. It sends nothing before
//! that. [`Session::send`] queues a command and returns a [`Ticket`].
//! [`Session::reply`] takes the ticket, sends everything that is queued, and
//! returns the reply, so many commands cost only one round trip. One deadline
//! is valid for the whole conversation. After an error of the connection, the
//! session is unusable. A command that QEMU refuses does not change the
//! session.

mod address;
mod domain;
mod error;
mod frame;
mod libvirt;
mod libvirt_error;
mod rpc;

use std::collections::{BTreeMap, VecDeque};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::{self, IoSlice};
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use qapi::qmp::{QmpCommand, qmp_capabilities};
use rustix::buffer::spare_capacity;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use serde::Deserialize;
use serde::de::{DeserializeOwned, Error as _};
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::time::{Instant, sleep, sleep_until, timeout_at};

use crate::text::words;
pub use address::{Socket, VmAddress};
use domain::users;
pub use domain::{Domain, NotADomain, user_id};
pub use error::{Error, ErrorKind, LibvirtError, Refusal};
use frame::{Frames, Message, Reply};
use libvirt::Libvirt;

/// The most events that are kept of the kind that was asked for. Later ones are
/// dropped, and so are all other events.
const MAX_EVENTS: usize = 256;

/// The most messages that may come before the greeting.
const MAX_BEFORE_GREETING: usize = 256;

/// The most bytes that are sent in one conversation. The limit is needed
/// because the peer's answers decide how many questions follow.
const MAX_SENT: usize = 2 << 20;

/// How long to wait before connecting again while the socket's queue is full:
/// the first time, and at most. The kernel reports no event for that.
const RETRY: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(16));

/// A time longer than any machine runs, but short enough to be added to the
/// current time.
const FOREVER: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

/// QEMU's version, from its greeting.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
pub struct Version {
    /// The major version: 10 in 10.0.2.
    pub major: u32,
    /// The minor version: 0 in 10.0.2.
    pub minor: u32,
    /// The micro version: 2 in 10.0.2.
    pub micro: u32,
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

/// Stands for the reply to a command. Each ticket is used once.
#[must_use = "a command is sent when its reply, or a later one, is asked for"]
#[derive(Debug)]
pub struct Ticket<C> {
    id: u64,
    command: PhantomData<fn() -> C>,
}

/// The connection to the monitor.
#[derive(Debug)]
enum Wire {
    /// The monitor's socket.
    Socket(UnixStream),
    /// libvirt, and the commands that are queued for it: each with its id, its
    /// text and its descriptor.
    Libvirt(Libvirt, VecDeque<(u64, String, Option<OwnedFd>)>),
}

/// A connection to a monitor that has sent its greeting.
#[derive(Debug)]
pub struct Session {
    address: VmAddress,
    wire: Wire,
    started: Instant,
    deadline: Instant,
    version: Version,
    frames: Frames,
    outbox: Vec<u8>,
    descriptor: Option<OwnedFd>,
    /// The ids of this conversation. They matter because QEMU may still send
    /// replies for an earlier client.
    ids: Range<u64>,
    negotiation: Option<Ticket<qmp_capabilities>>,
    replies: BTreeMap<u64, Reply>,
    /// The name of the events that are kept.
    wanted: Option<&'static str>,
    /// Their data, as JSON.
    events: VecDeque<String>,
    sent: usize,
    usable: bool,
}

impl Session {
    /// Connects to the VM's monitor and waits for its greeting. `time` is the
    /// limit for this and for every command after it.
    ///
    /// # Errors
    ///
    /// Every [`ErrorKind`] up to [`ErrorKind::Lost`]. A monitor serves one
    /// client at a time. While another client uses it, the connection succeeds
    /// but the greeting does not arrive ([`ErrorKind::NoGreeting`]).
    pub async fn connect(address: &VmAddress, time: Duration) -> Result<Session, Error> {
        let started = Instant::now();
        let deadline = started + time;
        let fail = |kind| Error::new(address, kind);
        match address {
            VmAddress::Socket(socket) => {
                let connected = timeout_at(deadline, connect_when_possible(socket)).await;
                let stream = connected
                    .map_err(|_| fail(ErrorKind::NoGreeting { waited: time }))?
                    .map_err(|e| fail(ErrorKind::from_connect(e, socket)))?;
                if let Some(wanted) = socket.user {
                    // This is the user of the process at the time when it began
                    // to listen (unix(7), `SO_PEERCRED`).
                    let found = stream.peer_cred().map_err(|e| fail(ErrorKind::Connect(e)))?.uid();
                    if found != wanted {
                        return Err(fail(ErrorKind::OtherUser { wanted, found }));
                    }
                }
                Session::greeted(stream, address, started, deadline).await
            }
            VmAddress::Libvirt(domain) => {
                Session::through(Libvirt::connect(domain), address, started, deadline).await
            }
        }
    }

    /// Like [`Session::connect`], but waits for the greeting without a limit,
    /// while another client uses the monitor or QEMU is stopped. `time` begins
    /// with the greeting. Drop the future to stop waiting.
    ///
    /// # Errors
    ///
    /// The same errors as [`Session::connect`].
    pub async fn connect_when_free(address: &VmAddress, time: Duration) -> Result<Session, Error> {
        Session::connect_in_turn(address, FOREVER, time).await
    }

    /// Like [`Session::connect_when_free`], but stops waiting if the monitor is
    /// not free within `turn`.
    ///
    /// # Errors
    ///
    /// The same errors as [`Session::connect`].
    pub async fn connect_in_turn(
        address: &VmAddress,
        turn: Duration,
        time: Duration,
    ) -> Result<Session, Error> {
        let mut session = Session::connect(address, turn).await?;
        session.started = Instant::now();
        session.deadline = session.started + time;
        Ok(session)
    }

    /// Creates a session over a stream that is connected already. `address` is
    /// used in errors.
    ///
    /// # Errors
    ///
    /// The same errors as [`Session::connect`].
    pub async fn on_stream(
        stream: UnixStream,
        address: &VmAddress,
        time: Duration,
    ) -> Result<Session, Error> {
        let started = Instant::now();
        let deadline = started + time;
        match address {
            VmAddress::Socket(_) => Session::greeted(stream, address, started, deadline).await,
            VmAddress::Libvirt(domain) => {
                let connecting = Libvirt::on_stream(stream, domain);
                Session::through(connecting, address, started, deadline).await
            }
        }
    }

    fn new(
        wire: Wire,
        address: &VmAddress,
        version: Version,
        started: Instant,
        deadline: Instant,
    ) -> Session {
        Session {
            address: address.clone(),
            wire,
            started,
            deadline,
            version,
            frames: Frames::default(),
            outbox: Vec::new(),
            descriptor: None,
            ids: first_id(),
            negotiation: None,
            replies: BTreeMap::new(),
            wanted: None,
            events: VecDeque::new(),
            sent: 0,
            usable: true,
        }
    }

    /// Creates a session through libvirt.
    async fn through(
        connecting: impl Future<Output = Result<(Libvirt, Version), ErrorKind>>,
        address: &VmAddress,
        started: Instant,
        deadline: Instant,
    ) -> Result<Session, Error> {
        let kind = match timeout_at(deadline, connecting).await {
            Ok(Ok((libvirt, version))) => {
                let wire = Wire::Libvirt(libvirt, VecDeque::new());
                return Ok(Session::new(wire, address, version, started, deadline));
            }
            Ok(Err(kind)) => kind,
            Err(_) => ErrorKind::NoGreeting { waited: deadline - started },
        };
        Err(Error::new(address, kind))
    }

    /// Creates a session after the greeting on this stream.
    async fn greeted(
        stream: UnixStream,
        address: &VmAddress,
        started: Instant,
        deadline: Instant,
    ) -> Result<Session, Error> {
        let unknown = Version { major: 0, minor: 0, micro: 0 };
        let mut session = Session::new(Wire::Socket(stream), address, unknown, started, deadline);
        session.version = match session.greeting().await {
            Err(Error { kind: ErrorKind::NoReply { waited }, .. }) => {
                return Err(session.error(ErrorKind::NoGreeting { waited }));
            }
            version => version?,
        };
        session.negotiation = Some(session.send(&qmp_capabilities { enable: None })?);
        Ok(session)
    }

    /// Waits for the greeting. QEMU writes events from another thread than the
    /// greeting, so an event may arrive before it (QEMU, monitor/qmp.c,
    /// `monitor_qmp_event`). A reply to the client before this one may arrive
    /// first, too.
    async fn greeting(&mut self) -> Result<Version, Error> {
        for _ in 0..MAX_BEFORE_GREETING {
            match self.message().await? {
                Message::Greeting(version) => return Ok(version),
                Message::Event { .. } | Message::Reply { .. } | Message::Foreign => {}
                Message::Complaint(desc) => {
                    return Err(self.broken(ErrorKind::NotQmp { saw: desc }));
                }
            }
        }
        let saw = format!("{MAX_BEFORE_GREETING} messages without a greeting");
        Err(self.broken(ErrorKind::NotQmp { saw }))
    }

    /// The address of the monitor.
    pub fn address(&self) -> &VmAddress {
        &self.address
    }

    /// QEMU's version.
    pub fn version(&self) -> Version {
        self.version
    }

    /// The time when the conversation has to be over.
    pub fn deadline(&self) -> Instant {
        self.deadline
    }

    /// QEMU's process id, as this process sees it (unix(7), `SO_PEERCRED`).
    /// `None` if QEMU is outside this process's PID namespace.
    pub fn peer_pid(&self) -> Option<i32> {
        match &self.wire {
            Wire::Socket(stream) => stream.peer_cred().ok()?.pid().filter(|pid| *pid > 0),
            Wire::Libvirt(libvirt, _) => libvirt.pid(),
        }
    }

    /// Keeps the events of this name from now on, for [`Session::event`]. All
    /// other events are dropped.
    pub fn want_events(&mut self, name: &'static str) {
        self.wanted = Some(name);
    }

    /// Queues a command.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Unusable`] after an error of the connection.
    pub fn send<C: QmpCommand>(&mut self, command: &C) -> Result<Ticket<C>, Error> {
        if !self.usable {
            return Err(self.error(ErrorKind::Unusable));
        }
        let id = self.ids.end;
        self.ids.end += 1;
        let queued = match &mut self.wire {
            Wire::Socket(_) => {
                let execute = qapi::Execute::with_id(command, id);
                let before = self.outbox.len();
                let written = serde_json::to_writer(&mut self.outbox, &execute);
                self.outbox.extend_from_slice(b"\n");
                written.map(|()| self.outbox.len() - before)
            }
            Wire::Libvirt(_, queue) => {
                serde_json::to_string(&qapi::Execute::<_, u64>::new(command, None)).map(|text| {
                    let bytes = text.len();
                    queue.push_back((id, text, None));
                    bytes
                })
            }
        };
        match queued {
            Ok(bytes) => self.sent += bytes,
            Err(source) => {
                let command = C::NAME;
                return Err(self.error(ErrorKind::Unexpected { command, source }));
            }
        }
        if self.sent > MAX_SENT {
            return Err(self.broken(ErrorKind::TooMuch("so much that asking about it takes 2 MiB")));
        }
        Ok(Ticket { id, command: PhantomData })
    }

    /// Queues a command that takes a file descriptor, for example `add-fd`. The
    /// descriptor is sent with the next bytes (unix(7), `SCM_RIGHTS`). QEMU
    /// keeps only the last descriptor that it received, so queue only one per
    /// round trip.
    ///
    /// # Errors
    ///
    /// The same errors as [`Session::send`].
    pub fn send_with_descriptor<C: QmpCommand>(
        &mut self,
        command: &C,
        descriptor: OwnedFd,
    ) -> Result<Ticket<C>, Error> {
        let ticket = self.send(command)?;
        match &mut self.wire {
            Wire::Socket(_) => self.descriptor = Some(descriptor),
            Wire::Libvirt(_, queue) => {
                if let Some((.., its)) = queue.back_mut() {
                    *its = Some(descriptor);
                }
            }
        }
        Ok(ticket)
    }

    /// Sends what is queued and waits for the reply to one command.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Refused`] if QEMU refuses the command,
    /// [`ErrorKind::Unexpected`] if the reply does not have the command's
    /// format. Otherwise an error of the connection, after which the session is
    /// unusable.
    pub async fn reply<C: QmpCommand>(&mut self, ticket: Ticket<C>) -> Result<C::Ok, Error> {
        if let Some(negotiation) = self.negotiation.take() {
            self.reply_to(negotiation).await?;
        }
        self.reply_to(ticket).await
    }

    /// Sends one command and waits for its reply.
    ///
    /// # Errors
    ///
    /// The same errors as [`Session::reply`].
    pub async fn execute<C: QmpCommand>(&mut self, command: &C) -> Result<C::Ok, Error> {
        let ticket = self.send(command)?;
        self.reply(ticket).await
    }

    async fn reply_to<C: QmpCommand>(&mut self, ticket: Ticket<C>) -> Result<C::Ok, Error> {
        self.flush().await?;
        let reply = loop {
            if let Some(reply) = self.replies.remove(&ticket.id) {
                break reply;
            }
            self.hear().await?;
        };
        let command = C::NAME;
        match reply {
            Reply::Return(json) => serde_json::from_str(&json).map_err(|source| {
                // The error may repeat all fields that it did not expect, so it
                // is cut.
                let source = serde_json::Error::custom(words(&source.to_string()));
                self.error(ErrorKind::Unexpected { command, source })
            }),
            Reply::Error { class, desc } => {
                let refusal = Refusal { command, class, desc };
                Err(self.error(ErrorKind::Refused(refusal)))
            }
        }
    }

    /// Waits for one of the kept events whose data passes the test. It may have
    /// arrived already. Returns false if it does not arrive until the given
    /// time. The events before it are dropped. If no event can arrive on this
    /// connection, it waits and returns true, because the event may have
    /// happened.
    ///
    /// # Errors
    ///
    /// An error of the connection, after which the session is unusable.
    pub async fn event<T: DeserializeOwned>(
        &mut self,
        is_it: impl Fn(&T) -> bool,
        until: Instant,
    ) -> Result<bool, Error> {
        if let Wire::Libvirt(..) = self.wire {
            // libvirt does not pass QEMU's events on.
            sleep_until(until).await;
            return Ok(true);
        }
        loop {
            while let Some(data) = self.events.pop_front() {
                if serde_json::from_str(&data).is_ok_and(|data| is_it(&data)) {
                    return Ok(true);
                }
            }
            match timeout_at(until, self.hear()).await {
                Ok(heard) => heard?,
                Err(_) => return Ok(false),
            }
        }
    }

    /// Reads one message, and keeps it if it belongs to this session.
    async fn hear(&mut self) -> Result<(), Error> {
        match self.message().await? {
            // The reply to a command that this session sent.
            Message::Reply { id, reply } if self.ids.contains(&id) => {
                self.replies.insert(id, reply);
            }
            Message::Event { name, data } => {
                if self.wanted == Some(name.as_str()) && self.events.len() < MAX_EVENTS {
                    self.events.push_back(data);
                }
            }
            // The reply to an earlier client, which left before QEMU had
            // answered.
            Message::Reply { .. } | Message::Foreign => {}
            Message::Greeting(_) => {
                let saw = "a second greeting".to_owned();
                return Err(self.broken(ErrorKind::NotQmp { saw }));
            }
            Message::Complaint(desc) => {
                return Err(self.broken(ErrorKind::NotQmp { saw: desc }));
            }
        }
        Ok(())
    }

    /// Sends everything that is queued, and the descriptor with the first
    /// bytes.
    async fn flush(&mut self) -> Result<(), Error> {
        if let Wire::Libvirt(libvirt, queue) = &mut self.wire {
            while let Some((id, command, descriptor)) = queue.pop_front() {
                let answer = libvirt.command(&command, descriptor);
                match timeout_at(self.deadline, answer).await {
                    Ok(Ok(reply)) => self.replies.insert(id, reply),
                    Ok(Err(kind)) => return Err(self.broken(kind)),
                    Err(_) => return Err(self.late()),
                };
            }
            return Ok(());
        }
        let outbox = std::mem::take(&mut self.outbox);
        let mut descriptor = self.descriptor.take();
        let mut rest = outbox.as_slice();
        while !rest.is_empty() {
            let Wire::Socket(stream) = &self.wire else { break };
            let write = stream
                .async_io(Interest::WRITABLE, || send_bytes(stream, rest, descriptor.as_ref()));
            match timeout_at(self.deadline, write).await {
                Ok(Ok(written)) => {
                    rest = rest.get(written..).unwrap_or_default();
                    descriptor = None;
                }
                Ok(Err(error)) => return Err(self.broken(ErrorKind::Lost(Some(error)))),
                Err(_) => return Err(self.late()),
            }
        }
        Ok(())
    }

    /// Returns the next message. It reads as much as it needs.
    async fn message(&mut self) -> Result<Message, Error> {
        if !self.usable {
            return Err(self.error(ErrorKind::Unusable));
        }
        loop {
            match self.frames.next() {
                Ok(Some(message)) => return Ok(message),
                Ok(None) => {}
                Err(kind) => return Err(self.broken(kind)),
            }
            // libvirt's answers are read when the command is sent.
            let Wire::Socket(stream) = &self.wire else {
                return Err(self.broken(ErrorKind::Unusable));
            };
            // The bytes are read directly into the buffer. A local array would
            // be part of every task that talks to a VM, even while the task
            // waits.
            let frames = &mut self.frames;
            let read = stream.async_io(Interest::READABLE, || {
                Ok(rustix::io::read(stream, spare_capacity(frames.space()))?)
            });
            match timeout_at(self.deadline, read).await {
                Ok(Ok(0)) => return Err(self.broken(ErrorKind::Lost(None))),
                Ok(Ok(_)) => {}
                Ok(Err(error)) => return Err(self.broken(ErrorKind::Lost(Some(error)))),
                Err(_) => return Err(self.late()),
            }
        }
    }

    fn late(&mut self) -> Error {
        let waited = self.deadline - self.started;
        self.broken(ErrorKind::NoReply { waited })
    }

    fn broken(&mut self, kind: ErrorKind) -> Error {
        self.usable = false;
        self.error(kind)
    }

    fn error(&self, kind: ErrorKind) -> Error {
        Error::new(&self.address, kind)
    }
}

/// Chooses where the ids of a conversation begin. The number is random, so the
/// ids differ from those of an earlier conversation. It is below 2^52, because
/// every JSON reader can represent such a number exactly.
fn first_id() -> Range<u64> {
    // The standard library takes the keys of its hashes from the system's
    // random numbers.
    let random = RandomState::new().build_hasher().finish();
    let first = random >> 12;
    first..first
}

/// Connects, and tries again while the socket's queue is full. A non-blocking
/// connect returns EAGAIN then (connect(2)).
async fn connect_when_possible(socket: &Path) -> io::Result<UnixStream> {
    let (mut pause, longest) = RETRY;
    let started = Instant::now();
    loop {
        match UnixStream::connect(socket).await {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                sleep(pause).await;
                // After a long wait, a longer pause makes no difference.
                pause = longest.max(started.elapsed() / 64).min(pause * 2);
            }
            done => return done,
        }
    }
}

/// Sends bytes with one `sendmsg`, without SIGPIPE.
fn send_bytes(
    stream: &UnixStream,
    bytes: &[u8],
    descriptor: Option<&OwnedFd>,
) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let rights = descriptor.map(|descriptor| [descriptor.as_fd()]);
    if let Some(rights) = &rights {
        control.push(SendAncillaryMessage::ScmRights(rights));
    }
    let sent =
        rustix::net::sendmsg(stream, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?;
    Ok(sent)
}
