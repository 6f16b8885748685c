//! Says whether a host device that was given to a VM is really there.

use std::fmt;

use crate::host::{Host, Life, Opened};
use crate::qemu::Given;
use crate::usb::{Device, DeviceId};

/// The state of a host device that was given to a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Presence {
    /// The device is there, and the VM has it.
    Alive,
    /// The VM's object cannot work any more. This is certain.
    Lost(Leftover),
    /// It cannot be known now, or not by this process.
    Unknown,
}

/// Why a VM's object is a leftover.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Leftover {
    /// No device is at its port any more.
    Gone,
    /// Another device is at its port.
    Replaced,
    /// Its device is still there, but the object is not connected to it any
    /// more.
    Dead,
}

impl Presence {
    /// Why the VM's object is a leftover. `None` if that is not certain.
    pub fn leftover(self) -> Option<Leftover> {
        match self {
            Presence::Lost(leftover) => Some(leftover),
            Presence::Alive | Presence::Unknown => None,
        }
    }
}

impl fmt::Display for Leftover {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Leftover::Gone => "its device is gone",
            Leftover::Replaced => "another device is at its port",
            Leftover::Dead => "QEMU has lost its device",
        })
    }
}

/// Who opened a device for QEMU. Only this tool locks what it passes.
pub fn opened(id: Option<&DeviceId>, given: &Given) -> Opened {
    let is_ours = id.is_some_and(|id| id.port().is_some());
    if is_ours && given.by_descriptor { Opened::ByUs } else { Opened::ByQemu }
}

/// The state of a device that was given to QEMU, whose process is `pid`, and
/// the device that is at its place now. The host is read now. Nothing is opened
/// or locked.
pub fn presence(
    host: &Host,
    pid: Option<i32>,
    id: Option<&DeviceId>,
    given: &Given,
) -> (Presence, Option<Device>) {
    // If the id is not one of this tool's, only the address is known.
    let found = match (id.and_then(DeviceId::port), given.address) {
        (Some(port), _) => host.device(&port),
        (None, Some(address)) => host.device_at(address),
        (None, None) => return (Presence::Unknown, None),
    };
    let Ok(found) = found else { return (Presence::Unknown, None) };
    let presence = match (&found, given.address) {
        (None, _) if host.has_usb() => Presence::Lost(Leftover::Gone),
        (None, _) | (Some(_), None) => Presence::Unknown,
        (Some(device), Some(address)) if device.address != address => {
            Presence::Lost(Leftover::Replaced)
        }
        (Some(device), _) => match host.life(device, pid, opened(id, given)) {
            Life::Alive => Presence::Alive,
            Life::Dead => Presence::Lost(Leftover::Dead),
            Life::Unknown => Presence::Unknown,
        },
    };
    (presence, found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn only_what_is_certain_makes_a_leftover() {
        let root = tempfile::tempdir().unwrap();
        let host = Host::at(root.path());
        let directory = root.path().join("sys/bus/usb/devices/1-1");
        let id: DeviceId = "usb-host-1-1".parse().unwrap();
        let address = "1:2".parse().unwrap();
        let given = Given { address: Some(address), by_descriptor: true };
        let now = |given| presence(&host, None, Some(&id), &given).0;
        // There is no list of devices at all.
        assert_eq!(now(given), Presence::Unknown);
        fs::create_dir_all(&directory).unwrap();
        assert_eq!(now(given), Presence::Lost(Leftover::Gone));
        let attributes =
            [("busnum", "1"), ("idVendor", "1209"), ("idProduct", "0001"), ("bDeviceClass", "00")];
        for (name, value) in attributes {
            fs::write(directory.join(name), value).unwrap();
        }
        // A reset is in progress (Linux, drivers/usb/core/hub.c, `hub_port_reset`).
        fs::write(directory.join("devnum"), "0").unwrap();
        assert_eq!(now(given), Presence::Unknown);
        fs::write(directory.join("devnum"), "3").unwrap();
        assert_eq!(now(given), Presence::Lost(Leftover::Replaced));
        assert_eq!(now(Given { address: None, ..given }), Presence::Unknown);
    }
}
