//! The stable names of buses and ports.

use std::fmt;
use std::str::FromStr;

use serde::{Serialize, Serializer};

use super::place::Chain;
use super::{ParseError, Port, wrong};

/// The longest name of a controller, in bytes.
const MAX_CONTROLLER: usize = 128;

/// The format to use instead of an `ID_PATH` of udev. Both halves of a
/// controller have the same `ID_PATH`, so it does not name one port.
pub const NO_REVISION: &str = "the name of one port: write `-usbv2-0:` in place of `-usb-0:` for \
     the USB 2 half of a socket, `-usbv3-0:` for the USB 3 half";

/// A bus, named by the place of its controller and not by the number that the
/// kernel gave it: `pci-0000:00:14.0-usbv2`. A USB 3 controller has two buses,
/// one for each half of its sockets.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BusPath {
    controller: String,
    revision: u8,
}

impl BusPath {
    /// The bus of a USB revision (1 to 3) at a controller. `None` if the text
    /// cannot be a name: it must be ASCII without blanks and without the
    /// special characters of globs, rules and paths.
    pub fn new(controller: &str, revision: u8) -> Option<Self> {
        let plain = |c: char| c.is_ascii_graphic() && !"*?[]|/\\\"'$%".contains(c);
        let legal = controller.starts_with(|c: char| c.is_ascii_alphabetic())
            && controller.len() <= MAX_CONTROLLER
            && controller.chars().all(plain)
            && (1..=3).contains(&revision);
        legal.then(|| BusPath { controller: controller.to_owned(), revision })
    }

    /// The USB revision of the root hub: 1, 2 or 3.
    pub fn revision(&self) -> u8 {
        self.revision
    }
}

impl fmt::Display for BusPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-usbv{}", self.controller, self.revision)
    }
}

impl Serialize for BusPath {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// The stable name of a port: the place of the bus's controller, and the port
/// numbers from the root hub down, `pci-0000:00:14.0-usbv2-0:1.2`. udev names
/// it `ID_PATH_WITH_USB_REVISION` (systemd 254,
/// src/udev/udev-builtin-path_id.c).
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortPath {
    bus: BusPath,
    chain: Chain,
}

impl PortPath {
    const EXPECTED: &'static str = "a port like `pci-0000:00:14.0-usbv2-0:1.2`";

    /// The name of a port on this bus.
    pub fn new(bus: BusPath, port: &Port) -> Self {
        PortPath { bus, chain: port.chain().clone() }
    }

    /// The bus it is on.
    pub fn bus(&self) -> &BusPath {
        &self.bus
    }

    /// The port numbers from the root hub down.
    pub fn chain(&self) -> &Chain {
        &self.chain
    }
}

impl fmt::Display for PortPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-0:{}", self.bus, self.chain)
    }
}

impl FromStr for PortPath {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let parse = || {
            let (bus, chain) = text.rsplit_once("-0:")?;
            let (controller, revision) = bus.rsplit_once("-usbv")?;
            // The number has no sign and no leading zero.
            let revision = (revision.len() == 1).then(|| revision.parse().ok())??;
            Some(PortPath { bus: BusPath::new(controller, revision)?, chain: Chain::read(chain)? })
        };
        let expected = if text.contains("-usb-0:") { NO_REVISION } else { Self::EXPECTED };
        parse().ok_or_else(|| wrong(text, expected))
    }
}

impl Serialize for PortPath {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_has_the_name_that_udev_gives_it() {
        let bus = BusPath::new("pci-0000:00:14.0", 2).unwrap();
        let path = PortPath::new(bus, &"7-1.2".parse().unwrap());
        assert_eq!(path.to_string(), "pci-0000:00:14.0-usbv2-0:1.2");
        assert_eq!(path.to_string().parse(), Ok(path));
    }

    #[test]
    fn every_kind_of_controller_can_be_named() {
        for text in [
            "platform-vhci_hcd.0-usbv2-0:1",
            "platform-fd500000.pcie-pci-0000:01:00.0-usbv3-0:1.1.4",
            "acpi-PNP0D10:00-usbv1-0:2",
            "x-usbv2-0:1-usbv3-0:2",
        ] {
            assert_eq!(text.parse::<PortPath>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn what_is_no_name_of_a_port_is_refused() {
        for text in [
            "1-1.2",
            "pci-0000:00:14.0",
            "pci-0000:00:14.0-usbv2",
            "pci-0000:00:14.0-usbv2-0:",
            "pci-0000:00:14.0-usbv2-0:1:1.0",
            "pci-0000:00:14.0-usbv2-1:1",
            "pci-0000:00:14.0-usbv4-0:1",
            "pci-0000:00:14.0-usbv+2-0:1",
            "-usbv2-0:1",
            "pci-*-usbv2-0:1",
            "pci 0-usbv2-0:1",
        ] {
            assert!(text.parse::<PortPath>().is_err(), "{text}");
        }
        let error = "pci-0000:00:14.0-usb-0:1.2".parse::<PortPath>().unwrap_err().to_string();
        assert!(error.contains("`-usbv2-0:`") && error.contains("`-usbv3-0:`"), "{error}");
    }
}
