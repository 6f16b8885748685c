//! The events of USB devices that are plugged in and unplugged, from the kernel
//! or from udev.

use std::fmt;
use std::future::pending;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use tokio::io::unix::AsyncFd;
use tracing::warn;
use udev::{MonitorBuilder, MonitorSocket};

use super::Host;
use super::database::{Database, Written};
use super::readable::readable;
use crate::text::chain;
use crate::usb::{Action, Address, HotplugEvent};

/// The source of the events.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// The kernel reports at once, before udev has done anything for the
    /// device.
    Kernel,
    /// The kernel reports, and a plug counts once udev has written down what it
    /// knows of the device. This works in a network namespace of its own, which
    /// udev's events do not reach.
    Database,
    /// udev reports when its rules are done. Then the device's properties are
    /// known, and so are the users who may open its node.
    Udev,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Source::Kernel | Source::Database => "the kernel",
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
    /// Devices that udev has written down something about. Only
    /// [`Source::Database`] reports them.
    pub known: Vec<Address>,
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
    /// What udev writes down. Only [`Source::Database`] has it.
    database: Option<Database>,
    /// Plugs of devices that udev has not written about yet.
    held: Vec<HotplugEvent>,
}

impl Events {
    /// Listens for events of USB devices and their interfaces. All events from
    /// now on are received.
    ///
    /// # Errors
    ///
    /// When the socket cannot be opened, or udev has no database.
    pub fn listen(source: Source, host: &Host) -> io::Result<Self> {
        let builder = match source {
            Source::Kernel | Source::Database => MonitorBuilder::new_kernel()?,
            Source::Udev => MonitorBuilder::new()?,
        };
        let socket = builder.match_subsystem("usb")?.listen()?;
        let ready = readable(socket.as_fd().try_clone_to_owned()?)?;
        let database = match source {
            Source::Database => Some(Database::watch(host)?),
            Source::Kernel | Source::Udev => None,
        };
        Ok(Events { source, socket, ready, database, held: Vec::new() })
    }

    /// Waits for the next events.
    ///
    /// # Errors
    ///
    /// When the socket cannot be waited for.
    pub async fn next(&mut self) -> io::Result<Batch> {
        loop {
            let batch = tokio::select! {
                ready = self.ready.readable() => {
                    let mut ready = ready?;
                    let batch = self.read();
                    ready.clear_ready();
                    self.hold(batch)
                }
                written = written(self.database.as_ref()) => {
                    let written = written?;
                    // The kernel's event of a device was there before udev
                    // wrote.
                    let batch = self.read();
                    let mut batch = self.hold(batch);
                    self.release(&written, &mut batch);
                    batch
                }
            };
            let is_empty = batch.events.is_empty() && batch.known.is_empty();
            if batch.lost || batch.others || !is_empty {
                return Ok(batch);
            }
        }
    }

    /// Keeps the plugs back that udev has to write about.
    fn hold(&mut self, mut batch: Batch) -> Batch {
        if self.database.is_none() {
            return batch;
        }
        for event in std::mem::take(&mut batch.events) {
            if event.action != Action::Bind {
                self.held.retain(|held| held.port != event.port);
            }
            match event.action {
                Action::Add => self.held.push(event),
                Action::Remove | Action::Bind => batch.events.push(event),
            }
        }
        batch
    }

    /// Lets the plugs of devices go that udev has written about.
    fn release(&mut self, written: &Written, batch: &mut Batch) {
        let devices = &written.devices;
        let is_known = |held: &HotplugEvent| {
            written.lost || held.address.is_none_or(|address| devices.contains(&address))
        };
        let (events, held) = std::mem::take(&mut self.held).into_iter().partition(is_known);
        self.held = held;
        batch.events.extend::<Vec<_>>(events);
        batch.known.extend(devices);
        batch.lost |= written.lost;
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

/// Waits for what udev writes. Without a database, it waits for ever.
async fn written(database: Option<&Database>) -> io::Result<Written> {
    match database {
        Some(database) => database.next().await,
        None => pending().await,
    }
}

fn is_no_room(error: &io::Error) -> bool {
    rustix::io::Errno::from_io_error(error) == Some(rustix::io::Errno::NOBUFS)
}
