//! The host's plugs and pulls, as the kernel or udev tells them.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use tokio::io::unix::AsyncFd;
use tracing::warn;
use udev::{MonitorBuilder, MonitorSocket};

use super::readable::readable;
use crate::text::chain;
use crate::usb::HotplugEvent;

/// Who tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// The kernel: at once, before udev has done anything for the device.
    Kernel,
    /// udev: when its rules are done, so that what they say of the device and
    /// who may open its node is known.
    Udev,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Source::Kernel => "the kernel",
            Source::Udev => "udev",
        })
    }
}

/// What the socket had.
#[derive(Debug, Default)]
pub struct Batch {
    /// Events, in order.
    pub events: Vec<HotplugEvent>,
    /// Whether anything else happened to a device or an interface: a driver
    /// came or went, a program claimed it or let go of it.
    pub others: bool,
    /// Whether some of them got lost, because the socket was full.
    pub lost: bool,
}

/// The socket that events arrive on.
pub struct Events {
    /// Who tells.
    pub source: Source,
    socket: MonitorSocket,
    /// A duplicate of the socket's descriptor, to wait for.
    ready: AsyncFd<OwnedFd>,
}

impl Events {
    /// Listens to events of USB devices and their interfaces. What happens from here on is
    /// heard.
    ///
    /// # Errors
    ///
    /// When there is no such socket.
    pub fn listen(source: Source) -> io::Result<Self> {
        let builder = match source {
            Source::Kernel => MonitorBuilder::new_kernel()?,
            Source::Udev => MonitorBuilder::new()?,
        };
        let socket = builder.match_subsystem("usb")?.listen()?;
        let ready = readable(socket.as_fd().try_clone_to_owned()?)?;
        Ok(Events { source, socket, ready })
    }

    /// The next events.
    ///
    /// # Errors
    ///
    /// When the socket cannot be waited for.
    pub async fn next(&self) -> io::Result<Batch> {
        loop {
            let mut ready = self.ready.readable().await?;
            let batch = self.read();
            ready.clear_ready();
            if batch.lost || batch.others || !batch.events.is_empty() {
                return Ok(batch);
            }
        }
    }

    /// Reads all there is to read.
    fn read(&self) -> Batch {
        let mut batch = Batch::default();
        let mut received = self.socket.iter();
        loop {
            match received.next() {
                Some(event) => match self.event(&event) {
                    Some(event) => batch.events.push(event),
                    None => batch.others = true,
                },
                // The kernel tells once that it had no room (netlink(7),
                // ENOBUFS), and libudev tells it like any other error.
                None if is_no_room(&io::Error::last_os_error()) => batch.lost = true,
                None => return batch,
            }
        }
    }

    fn event(&self, event: &udev::Event) -> Option<HotplugEvent> {
        let value = |name: &str| Some(event.property_value(name)?.to_string_lossy().into_owned());
        match HotplugEvent::from_variables(value) {
            Ok(event) => event,
            Err(error) => {
                warn!("passed over an event of {}: {}", self.source, chain(&error));
                None
            }
        }
    }
}

fn is_no_room(error: &io::Error) -> bool {
    rustix::io::Errno::from_io_error(error) == Some(rustix::io::Errno::NOBUFS)
}
