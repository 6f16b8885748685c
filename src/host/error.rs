//! The errors of reading and using the host's devices.

use std::io;
use std::path::PathBuf;

use super::{Absent, Holder, Owner, Use};
use crate::text::escape;
use crate::usb::{Address, Device, ParseError, Port, Selector};

/// The errors of reading and using the host's devices.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file of sysfs or `/proc`, or a node, could not be read.
    #[error("cannot read {}", escape(&.path.to_string_lossy()))]
    Read {
        /// The file.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
    /// The content of a file is not what the kernel writes there.
    #[error("{}", escape(&.path.to_string_lossy()))]
    Attribute {
        /// The file.
        path: PathBuf,
        /// What it says.
        source: ParseError,
    },
    /// No thread could be started to read a device that may not answer.
    #[error("cannot read a device on a thread of its own")]
    Thread(#[source] io::Error),
    /// No device fits what the user named.
    #[error("no USB device for {0}")]
    NoDevice(Absent),
    /// The device was unplugged in the meantime.
    #[error("the device at {0} is gone; plug it in again")]
    Gone(Address),
    /// More than one device fits what the user named.
    #[error("{} devices are {selector}: {}; name one by its port", .devices.len(), listed(.devices))]
    Ambiguous {
        /// What was asked for.
        selector: Selector,
        /// The devices that fit.
        devices: Vec<Device>,
    },
    /// A device that cannot be read yet may be the one that the user named.
    #[error("no USB device that can be read is {selector}, but drivers are still starting for {}, or \
             it does not answer; try again, or name it by its port", listed(.devices))]
    Starting {
        /// What was asked for.
        selector: Selector,
        /// The devices that cannot be read yet.
        devices: Vec<Device>,
    },
    /// The user named a root hub.
    #[error("{0} is a root hub: hubs stay with the host; name a device behind it")]
    RootHub(Selector),
    /// The file at a node's path is not the node of the device.
    #[error("{} is not the node of the USB device {address}", escape(&.path.to_string_lossy()))]
    NotTheNode {
        /// The path of the node.
        path: PathBuf,
        /// The address of the device.
        address: Address,
    },
    /// Something uses a disk of the device.
    #[error("{0}; {advice} first, or use --force and lose what was not written", advice = .0.advice())]
    InUse(Box<Use>),
    /// What is mounted from a device could not be unmounted.
    #[error("{port}: cannot unmount {}{}", escape(.place), hint(.place, .source))]
    Unmount {
        /// The device's port.
        port: Port,
        /// Where it is mounted.
        place: String,
        /// The reason.
        source: io::Error,
    },
    /// A program, or a VM that got the device without this tool, uses it.
    #[error("{device} is in use by {owner}; {}", .owner.advice())]
    Claimed {
        /// The device.
        device: Device,
        /// Whose it is.
        owner: Box<Owner>,
    },
    /// The kernel does not authorize the device, so nobody can use it.
    #[error("{0} is not authorized on this host, so that no guest could use it; write 1 to \
             /sys/bus/usb/devices/{port}/authorized, or have USBGuard do it (or use --force)", port = .0.port)]
    NotAuthorized(Device),
    /// The host reaches the network through the device.
    #[error("{device}: {adapter} has the default route, and this host would lose its network; give it \
             another way out first, or use --force", adapter = escape(.adapter))]
    DefaultRoute {
        /// The device.
        device: Device,
        /// The name of its network adapter.
        adapter: String,
    },
    /// Another process holds the device.
    #[error("{device} is held by {}; detach it there first", held_by(.holders))]
    Held {
        /// The device.
        device: Device,
        /// The processes that hold it. Empty if they could not be seen.
        holders: Vec<Holder>,
    },
}

/// Advice that shows why a filesystem could not be unmounted.
fn hint(place: &str, source: &io::Error) -> String {
    match source.kind() {
        io::ErrorKind::PermissionDenied => String::new(),
        _ => format!(" (`fuser -vm {}` shows what uses it)", escape(place)),
    }
}

fn listed(devices: &[Device]) -> String {
    let shown: Vec<String> = devices.iter().map(ToString::to_string).collect();
    shown.join(", ")
}

fn held_by(holders: &[Holder]) -> String {
    if holders.is_empty() {
        return "a process that this user may not see".to_owned();
    }
    let shown: Vec<String> = holders.iter().map(ToString::to_string).collect();
    shown.join(" and ")
}
