//! The connection to a monitor: QEMU's socket, or libvirt. It takes commands
//! and returns messages. [`super::Session`] knows which of them belong
//! together, and how long everything may take.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;

use qapi::Execute;
use qapi::qmp::QmpCommand;
use rustix::buffer::spare_capacity;
use tokio::io::Interest;
use tokio::net::UnixStream;

use super::frame::{Frames, Message, Reply};
use super::libvirt::Libvirt;
use super::{ErrorKind, Version, VmAddress, stream};

/// The connection to a monitor.
#[derive(Debug)]
pub enum Wire {
    /// The monitor's socket.
    Socket {
        /// The connection.
        stream: UnixStream,
        /// What has been read.
        frames: Frames,
        /// The commands that are queued.
        outbox: Vec<u8>,
        /// The descriptor that is sent with them.
        descriptor: Option<OwnedFd>,
    },
    /// libvirt, and the commands that are queued for it: each with its id, its
    /// text and its descriptor.
    Libvirt(Libvirt, Vec<(u64, String, Option<OwnedFd>)>),
}

impl Wire {
    /// Connects to a monitor. QEMU's version is known if libvirt has told it. A
    /// socket's greeting comes later.
    pub async fn connect(address: &VmAddress) -> Result<(Wire, Option<Version>), ErrorKind> {
        match address {
            VmAddress::Socket(socket) => {
                let connected = stream::connect(socket).await;
                let stream = connected.map_err(|error| ErrorKind::from_connect(error, socket))?;
                if let Some(wanted) = socket.user {
                    // This is the user of the process at the time when it began
                    // to listen (unix(7), `SO_PEERCRED`).
                    let found = stream.peer_cred().map_err(ErrorKind::Connect)?.uid();
                    if found != wanted {
                        return Err(ErrorKind::OtherUser { wanted, found });
                    }
                }
                Ok(Wire::to_qemu(stream))
            }
            VmAddress::Libvirt(domain) => Ok(Wire::to_libvirt(Libvirt::connect(domain).await?)),
        }
    }

    /// Does the same over a stream that is connected already.
    pub async fn on_stream(
        stream: UnixStream,
        address: &VmAddress,
    ) -> Result<(Wire, Option<Version>), ErrorKind> {
        match address {
            VmAddress::Socket(_) => Ok(Wire::to_qemu(stream)),
            VmAddress::Libvirt(domain) => {
                Ok(Wire::to_libvirt(Libvirt::on_stream(stream, domain).await?))
            }
        }
    }

    fn to_qemu(stream: UnixStream) -> (Wire, Option<Version>) {
        let (frames, outbox, descriptor) = (Frames::default(), Vec::new(), None);
        (Wire::Socket { stream, frames, outbox, descriptor }, None)
    }

    fn to_libvirt((libvirt, version): (Libvirt, Version)) -> (Wire, Option<Version>) {
        (Wire::Libvirt(libvirt, Vec::new()), Some(version))
    }

    /// QEMU's process id, if it can be seen.
    pub fn pid(&self) -> Option<i32> {
        match self {
            Wire::Socket { stream, .. } => stream.peer_cred().ok()?.pid().filter(|pid| *pid > 0),
            Wire::Libvirt(libvirt, _) => libvirt.pid(),
        }
    }

    /// Whether QEMU's events arrive here. libvirt does not pass them on.
    pub fn has_events(&self) -> bool {
        matches!(self, Wire::Socket { .. })
    }

    /// Queues a command. Returns how many bytes it has.
    pub fn queue<C: QmpCommand>(&mut self, id: u64, command: &C) -> serde_json::Result<usize> {
        match self {
            Wire::Socket { outbox, .. } => {
                let before = outbox.len();
                let written = serde_json::to_writer(&mut *outbox, &Execute::with_id(command, id));
                outbox.extend_from_slice(b"\n");
                written.map(|()| outbox.len() - before)
            }
            Wire::Libvirt(_, queue) => {
                let text = serde_json::to_string(&Execute::<_, u64>::new(command, None))?;
                let bytes = text.len();
                queue.push((id, text, None));
                Ok(bytes)
            }
        }
    }

    /// Adds a descriptor to the command that was queued last.
    pub fn add_descriptor(&mut self, added: OwnedFd) {
        match self {
            Wire::Socket { descriptor, .. } => *descriptor = Some(added),
            Wire::Libvirt(_, queue) => {
                if let Some((.., descriptor)) = queue.last_mut() {
                    *descriptor = Some(added);
                }
            }
        }
    }

    /// Sends everything that is queued. libvirt takes the next command after it
    /// has answered the one before, so its replies are complete then.
    pub async fn flush(&mut self, replies: &mut BTreeMap<u64, Reply>) -> Result<(), ErrorKind> {
        match self {
            Wire::Socket { stream, outbox, descriptor, .. } => {
                let (bytes, descriptor) = (std::mem::take(outbox), descriptor.take());
                stream::send(stream, &bytes, descriptor.as_ref()).await
            }
            Wire::Libvirt(libvirt, queue) => {
                // The whole queue is taken, as the bytes are above. Whatever
                // ends this, no descriptor stays open in the session.
                for (id, command, descriptor) in std::mem::take(queue) {
                    replies.insert(id, libvirt.command(&command, descriptor).await?);
                }
                Ok(())
            }
        }
    }

    /// Returns the next message from a socket. It reads as much as it needs.
    pub async fn message(&mut self) -> Result<Message, ErrorKind> {
        // libvirt's replies are read when the commands are sent.
        let Wire::Socket { stream, frames, .. } = self else { return Err(ErrorKind::Unusable) };
        loop {
            if let Some(message) = frames.next()? {
                return Ok(message);
            }
            // The bytes are read directly into the buffer. A local array would
            // be part of every task that talks to a VM, even while the task
            // waits.
            let read = stream.async_io(Interest::READABLE, || {
                Ok(rustix::io::read(&*stream, spare_capacity(frames.space()))?)
            });
            match read.await {
                Ok(0) => return Err(ErrorKind::Lost(None)),
                Ok(_) => {}
                Err(error) => return Err(ErrorKind::Lost(Some(error))),
            }
        }
    }
}
