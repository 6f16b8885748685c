//! The place of a device: its port and its address.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Serialize, Serializer};

use super::{ParseError, number, wrong};

/// The longest chain of port numbers from a root hub to a device: seven tiers
/// with the root hub as the first (USB 2.0 specification, section 4.1.1).
const MAX_CHAIN: usize = 6;

/// Bus numbers have three digits in a node's name (`/dev/bus/usb/001/037`).
const MAX_BUS: u16 = 999;

/// Device addresses have seven bits (USB 2.0 specification, section 8.3.2.1).
const MAX_DEVICE: u8 = 127;

/// The port numbers from a root hub down to a port: `1.2`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Chain(Vec<u8>);

impl Chain {
    /// Reads `1.2`; `None` for anything else.
    pub(super) fn read(text: &str) -> Option<Self> {
        let numbers: Vec<u8> = text.split('.').map(number).collect::<Option<_>>()?;
        (numbers.len() <= MAX_CHAIN).then_some(Chain(numbers))
    }
}

impl fmt::Display for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, number) in self.0.iter().enumerate() {
            let dot = if i == 0 { "" } else { "." };
            write!(f, "{dot}{number}")?;
        }
        Ok(())
    }
}

/// A port as the kernel names it: the bus number, and the port numbers from
/// the root hub down, `1-1.2`. It is the name of the device's directory under
/// `/sys/bus/usb/devices` (Linux, drivers/usb/core/usb.c, `usb_alloc_dev`).
///
/// A bus may have another number after the next boot.
/// [`PortPath`](super::PortPath) is the name that does not change.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Port {
    bus: u16,
    chain: Chain,
}

impl Port {
    const EXPECTED: &'static str = "a port like `1-1.2`";

    /// The port at the end of a chain on the bus of this number (1 to 999).
    pub fn new(bus: u16, chain: Chain) -> Self {
        Port { bus, chain }
    }

    /// The port numbers from the root hub down.
    pub fn chain(&self) -> &Chain {
        &self.chain
    }

    /// The number of the bus the port is on.
    pub fn bus(&self) -> u16 {
        self.bus
    }

    /// The port's own number on its hub.
    pub fn last(&self) -> u8 {
        self.chain.0.last().copied().unwrap_or_default()
    }

    /// Whether this port is behind the hub at another port.
    pub fn is_behind(&self, hub: &Port) -> bool {
        let (way, to_hub) = (&self.chain.0, &hub.chain.0);
        self.bus == hub.bus && way.len() > to_hub.len() && way.starts_with(to_hub)
    }

    /// The port of the hub that this port belongs to. `None` on a root hub.
    pub fn hub(&self) -> Option<Port> {
        let (_, hub) = self.chain.0.split_last()?;
        (!hub.is_empty()).then(|| Port { bus: self.bus, chain: Chain(hub.to_vec()) })
    }
}

impl fmt::Display for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.bus, self.chain)
    }
}

impl FromStr for Port {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let parse = || {
            let (bus, chain) = text.split_once('-')?;
            let bus = number(bus).filter(|bus| *bus <= MAX_BUS)?;
            Some(Port { bus, chain: Chain::read(chain)? })
        };
        parse().ok_or_else(|| wrong(text, Self::EXPECTED))
    }
}

impl Serialize for Port {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// The present address of a device: bus number (1 to 999) and device address (1
/// to 127). The kernel gives a new address at every plug.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Address {
    /// The bus number, as in `BUSNUM`.
    pub bus: u16,
    /// The device address, as in `DEVNUM`.
    pub device: u8,
}

impl Address {
    const EXPECTED: &'static str = "a bus and device like `1:37` or `001:037`";

    /// An address from its two numbers, decimal, padded or not, as in udev's
    /// `BUSNUM` and `DEVNUM`.
    pub fn from_numbers(bus: &str, device: &str) -> Result<Self, ParseError> {
        let parse = |text: &str, most: u16| {
            let digits = (1..=3).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_digit());
            let value: u16 = digits.then(|| text.parse().ok())??;
            (1..=most).contains(&value).then_some(value)
        };
        let address = || {
            let device = parse(device, u16::from(MAX_DEVICE))?;
            Some(Address { bus: parse(bus, MAX_BUS)?, device: u8::try_from(device).ok()? })
        };
        address().ok_or_else(|| wrong(&format!("{bus}:{device}"), Self::EXPECTED))
    }

    /// The address in the variables of an event or of a device's `uevent`.
    /// `None` if they have none. During a reset, `DEVNUM` is 0 (Linux,
    /// drivers/usb/core/hub.c, `hub_port_reset`). The number of the node is
    /// computed from the address, and it does not change then
    /// (`usb_new_device`).
    ///
    /// # Errors
    ///
    /// When they are not numbers, or are out of range.
    pub fn from_variables(
        get: impl Fn(&'static str) -> Option<String>,
    ) -> Result<Option<Self>, ParseError> {
        let (Some(bus), Some(device)) = (get("BUSNUM"), get("DEVNUM")) else { return Ok(None) };
        let is_resetting = !device.is_empty() && device.bytes().all(|b| b == b'0');
        if !is_resetting {
            return Address::from_numbers(&bus, &device).map(Some);
        }
        let minor = get("MINOR").and_then(|minor| minor.parse().ok());
        Ok(minor.and_then(Address::from_minor))
    }

    /// The address that belongs to a node's minor number.
    pub fn from_minor(minor: u32) -> Option<Self> {
        let bus = u16::try_from(minor / 128 + 1).ok().filter(|bus| *bus <= MAX_BUS)?;
        let device = u8::try_from(minor % 128 + 1).ok().filter(|device| *device <= MAX_DEVICE)?;
        Some(Address { bus, device })
    }

    /// The device node (Linux, drivers/usb/core/usb.c, `usb_devnode`).
    pub fn node(&self) -> PathBuf {
        PathBuf::from(format!("/dev/bus/usb/{:03}/{:03}", self.bus, self.device))
    }

    /// The node's minor number; the major one is 189 (Linux,
    /// include/linux/usb.h, `USB_DEVICE_MAJOR`, and
    /// drivers/usb/core/hub.c, `usb_new_device`).
    pub fn minor(&self) -> u32 {
        (u32::from(self.bus) - 1) * 128 + (u32::from(self.device) - 1)
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.bus, self.device)
    }
}

impl FromStr for Address {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let (bus, device) = text.split_once(':').ok_or_else(|| wrong(text, Self::EXPECTED))?;
        Address::from_numbers(bus, device)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_prints_as_it_was_written() {
        for text in ["1-1", "2-1.4", "64-31.1.2.3.4.5"] {
            assert_eq!(text.parse::<Port>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn what_is_not_a_port_is_refused() {
        for text in
            ["", "1", "1-", "-1", "0-1", "1-0", "1-01", "01-1", "1-1.", "1-1:1.0", "usb1", "1-256"]
        {
            assert!(text.parse::<Port>().is_err(), "{text}");
        }
        assert!("1-1.1.1.1.1.1.1".parse::<Port>().is_err(), "eight tiers");
    }

    #[test]
    fn a_port_knows_its_hub() {
        let port: Port = "1-1.2".parse().unwrap();
        assert_eq!(port.hub().unwrap().to_string(), "1-1");
        assert_eq!(port.hub().unwrap().hub(), None);
        let is_behind = |hub: &str| port.is_behind(&hub.parse().unwrap());
        assert!(is_behind("1-1"));
        assert!(["1-1.2", "1-2", "2-1", "1-1.2.3"].iter().all(|hub| !is_behind(hub)));
    }

    #[test]
    fn an_address_is_read_padded_or_not_and_names_its_node() {
        let address: Address = "001:037".parse().unwrap();
        assert_eq!(address, "1:37".parse().unwrap());
        assert_eq!(address.node().to_str(), Some("/dev/bus/usb/001/037"));
        assert_eq!(address.minor(), 36);
        assert_eq!(Address::from_minor(36), Some(address));
        assert_eq!(Address::from_minor(127), None);
        assert_eq!(Address::from_minor(u32::MAX), None);
        for text in ["0:1", "1:0", "1:128", "1:+5", "1:", ":1", "1:0001"] {
            assert!(text.parse::<Address>().is_err(), "{text}");
        }
    }
}
