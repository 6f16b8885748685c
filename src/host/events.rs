//! The events of USB devices that are plugged in and unplugged, from the kernel
//! or from udev.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use tokio::io::unix::AsyncFd;
use tracing::warn;
use udev::{MonitorBuilder, MonitorSocket};

use super::readable::readable;
use crate::text::chain;
use crate::usb::HotplugEvent;

/// The source of the events.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// The kernel reports at once, before udev has done anything for the
    /// device.
    Kernel,
    /// udev reports when its rules are done. Then the device's properties are
    /// known, and so are the users who may open its node.
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

/// The content of the socket.
#[derive(Debug, Default)]
pub struct Batch {
    /// Events, in order.
    pub events: Vec<HotplugEvent>,
    /// Whether anything else happened to a device or an interface: a driver was
    /// bound or unbound, or a program claimed or released an interface.
    pub others: bool,
    /// Whether events were lost because the socket was full.
    pub lost: bool,
}

/// The socket that receives events.
pub struct Events {
    /// The source of the events.
    pub source: Source,
    socket: MonitorSocket,
    /// A duplicate of the socket's descriptor that the runtime waits for.
    ready: AsyncFd<OwnedFd>,
}

impl Events {
    /// Listens for events of USB devices and their interfaces. All events from
    /// now on are received.
    ///
    /// # Errors
    ///
    /// When the socket cannot be opened.
    pub fn listen(source: Source) -> io::Result<Self> {
        let builder = match source {
            Source::Kernel => MonitorBuilder::new_kernel()?,
            Source::Udev => MonitorBuilder::new()?,
        };
        let socket = builder.match_subsystem("usb")?.listen()?;
        let ready = readable(socket.as_fd().try_clone_to_owned()?)?;
        Ok(Events { source, socket, ready })
    }

    /// Waits for the next events.
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

    /// Reads all events in the socket.
    fn read(&self) -> Batch {
        let mut batch = Batch::default();
        let mut received = self.socket.iter();
        loop {
            match received.next() {
                Some(event) => match self.event(&event) {
                    Some(event) => batch.events.push(event),
                    None => batch.others = true,
                },
                // The kernel reports once that the socket was full (netlink(7),
                // ENOBUFS). libudev returns that like any other error.
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
