//! The names of a device: its id in QEMU, and the names that people use.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::Serialize;

use super::{Address, NO_REVISION, ParseError, Port, PortPath, VendorProduct, wrong};
use crate::text::escape;

/// A QEMU device id that can also be deleted again: a letter, then letters,
/// digits, `-`, `.`, `_` (QEMU, util/id.c, `id_wellformed`). QEMU's own check
/// is not enough: the `device_add` of QEMU 10 takes any text.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct DeviceId(String);

impl DeviceId {
    const PREFIX: &'static str = "usb-host-";

    /// The id of the device at this port, whichever device that is.
    pub fn for_port(port: &Port) -> Self {
        DeviceId(format!("{}{port}", Self::PREFIX))
    }

    /// The port, if the id was made by this tool.
    pub fn port(&self) -> Option<Port> {
        self.0.strip_prefix(Self::PREFIX)?.parse().ok()
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for DeviceId {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let tail = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
        let legal = text.starts_with(|c: char| c.is_ascii_alphabetic()) && text.chars().all(tail);
        if legal && text.len() <= 255 {
            Ok(DeviceId(text.to_owned()))
        } else {
            Err(wrong(text, "a QEMU device id like `usb-host-1-1.2`"))
        }
    }
}

/// How a person names a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Selector {
    /// Whichever device is at a port: `1-1.2`.
    Port(Port),
    /// Whichever device is at a port, by its stable name:
    /// `pci-0000:00:14.0-usbv2-0:1.2`.
    Path(PortPath),
    /// The device at an address: `1:37`, `001:037`, `/dev/bus/usb/001/037`.
    Address(Address),
    /// The one device of a vendor and product id: `152d:2338`.
    Product(VendorProduct),
    /// The device with a directory under `/sys`.
    Sysfs(PathBuf),
    /// The device with a serial number: `serial=XYZ`.
    Serial(String),
    /// The device with an id in the VM: `usb-host-1-1.2` (to detach only).
    Id(DeviceId),
}

impl FromStr for Selector {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        const EXPECTED: &str = "a device: a port `1-1.2` or `pci-0000:00:14.0-usbv2-0:1.2`, \
             bus:device `1:37`, vendor:product `152d:2338`, `serial=XYZ`, a /dev/bus/usb node, \
             a path under /sys, or an id";
        let expected = if text.contains("-usb-0:") { NO_REVISION } else { EXPECTED };
        let error = || wrong(text, expected);
        if let Some(serial) = text.strip_prefix("serial=") {
            return if serial.is_empty() {
                Err(error())
            } else {
                Ok(Selector::Serial(serial.into()))
            };
        }
        if let Some(node) = text.strip_prefix("/dev/bus/usb/") {
            let (bus, device) = node.split_once('/').ok_or_else(error)?;
            return Ok(Selector::Address(Address::from_numbers(bus, device)?));
        }
        if text.starts_with("/sys/") {
            return Ok(Selector::Sysfs(PathBuf::from(text)));
        }
        let port = text.parse().map(Selector::Port);
        port.or_else(|_| text.parse().map(Selector::Path))
            .or_else(|_| text.parse().map(Selector::Product))
            .or_else(|_| text.parse().map(Selector::Address))
            .or_else(|_| text.parse().map(Selector::Id))
            .map_err(|_| error())
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Selector::Port(port) => write!(f, "port {port}"),
            Selector::Path(path) => write!(f, "port {path}"),
            Selector::Address(address) => write!(f, "bus:device {address}"),
            Selector::Product(id) => write!(f, "vendor:product {id}"),
            Selector::Sysfs(path) => write!(f, "{}", escape(&path.to_string_lossy())),
            Selector::Serial(serial) => write!(f, "serial {}", escape(serial)),
            Selector::Id(id) => write!(f, "id {id}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_can_be_named_in_every_form() {
        let cases = [
            ("1-1.2", "port 1-1.2"),
            ("pci-0000:00:14.0-usbv2-0:1.2", "port pci-0000:00:14.0-usbv2-0:1.2"),
            ("1:37", "bus:device 1:37"),
            ("001:037", "bus:device 1:37"),
            ("152d:2338", "vendor:product 152d:2338"),
            ("0001:0002", "vendor:product 0001:0002"),
            ("/dev/bus/usb/001/037", "bus:device 1:37"),
            ("/sys/bus/usb/devices/1-1", "/sys/bus/usb/devices/1-1"),
            ("serial=X Y", "serial X Y"),
            ("usb-host-1-1.2", "id usb-host-1-1.2"),
        ];
        for (text, shown) in cases {
            assert_eq!(text.parse::<Selector>().unwrap().to_string(), shown, "{text}");
        }
        for text in ["", "serial=", "/dev/sda", "1:2:3", "a b", "usb-host-1/1"] {
            assert!(text.parse::<Selector>().is_err(), "{text}");
        }
    }

    #[test]
    fn an_id_of_ours_gives_its_port_back() {
        let port: Port = "3-1.4".parse().unwrap();
        let id = DeviceId::for_port(&port);
        assert_eq!(id.as_str(), "usb-host-3-1.4");
        assert_eq!(id.port(), Some(port));
        assert_eq!("hostdev0".parse::<DeviceId>().unwrap().port(), None);
    }
}
