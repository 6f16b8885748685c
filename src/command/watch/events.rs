//! The host's plugs and pulls, as udev tells them.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use tokio::io::unix::AsyncFd;
use tracing::warn;
use udev::{MonitorBuilder, MonitorSocket};

use super::readable::readable;
use crate::error::chain;
use crate::event::Event;

/// What the socket had.
#[derive(Debug, Default)]
pub struct Batch {
    /// Events, in order.
    pub events: Vec<Event>,
    /// Whether some of them got lost, because the socket was full.
    pub lost: bool,
}

/// The socket that udev's events arrive on.
pub struct Events {
    socket: MonitorSocket,
    /// A duplicate of the socket's descriptor, to wait for.
    ready: AsyncFd<OwnedFd>,
}

impl Events {
    /// Listens to events of whole USB devices; the kernel filters out all
    /// others. What happens from here on is heard.
    ///
    /// # Errors
    ///
    /// When there is no such socket.
    pub fn listen() -> io::Result<Self> {
        let socket =
            MonitorBuilder::new()?.match_subsystem_devtype("usb", "usb_device")?.listen()?;
        let ready = readable(socket.as_fd().try_clone_to_owned()?)?;
        Ok(Events { socket, ready })
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
            if batch.lost || !batch.events.is_empty() {
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
                Some(event) => batch.events.extend(read(&event)),
                // The kernel tells once that it had no room (netlink(7),
                // ENOBUFS), and libudev tells it like any other error.
                None if is_no_room(&io::Error::last_os_error()) => batch.lost = true,
                None => return batch,
            }
        }
    }
}

fn is_no_room(error: &io::Error) -> bool {
    rustix::io::Errno::from_io_error(error) == Some(rustix::io::Errno::NOBUFS)
}

fn read(event: &udev::Event) -> Option<Event> {
    let value = |name: &str| Some(event.property_value(name)?.to_string_lossy().into_owned());
    match Event::from_variables(value) {
        Ok(event) => event,
        Err(error) => {
            warn!("passed over an event of udev: {}", chain(&error));
            None
        }
    }
}
