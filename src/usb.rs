//! What USB things are called: ports, addresses, vendor and product ids,
//! QEMU ids. Pure: text in, text out.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Serialize, Serializer};

/// The class code of hubs (USB 2.0 specification, section 11.23.1).
pub const CLASS_HUB: u8 = 0x09;

/// The longest chain of port numbers from a root hub to a device: seven tiers
/// with the root hub as the first (USB 2.0 specification, section 4.1.1).
const MAX_CHAIN: usize = 6;

/// Bus numbers have three digits in a node's name (`/dev/bus/usb/001/037`).
const MAX_BUS: u16 = 999;

/// Device addresses have seven bits (USB 2.0 specification, section 8.3.2.1).
const MAX_DEVICE: u8 = 127;

/// Text that is not what it should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{}` is not {expected}", crate::text::escape(.text))]
pub struct ParseError {
    /// The text as it was given.
    pub text: String,
    /// What would be right, with an example.
    pub expected: &'static str,
}

fn wrong(text: &str, expected: &'static str) -> ParseError {
    // Whoever sends a megabyte sees its beginning.
    let text = text.chars().take(200).collect();
    ParseError { text, expected }
}

/// A decimal number without sign or leading zero.
fn number<T: FromStr>(text: &str) -> Option<T> {
    let plain = text.bytes().all(|b| b.is_ascii_digit()) && !text.starts_with('0');
    if plain { text.parse().ok() } else { None }
}

/// A port as the kernel names it: the bus number, and the port numbers from
/// the root hub down, `1-1.2`. It is the name of the device's directory under
/// `/sys/bus/usb/devices` (Linux, drivers/usb/core/usb.c, `usb_alloc_dev`).
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Port {
    bus: u16,
    chain: Vec<u8>,
}

impl Port {
    const EXPECTED: &'static str = "a port like `1-1.2`";

    /// The number of the bus the port is on.
    pub fn bus(&self) -> u16 {
        self.bus
    }

    /// The port's own number on its hub.
    pub fn last(&self) -> u8 {
        self.chain.last().copied().unwrap_or_default()
    }

    /// The port of the hub this port is on; `None` on a root hub.
    pub fn hub(&self) -> Option<Port> {
        let (_, hub) = self.chain.split_last()?;
        (!hub.is_empty()).then(|| Port { bus: self.bus, chain: hub.to_vec() })
    }
}

impl fmt::Display for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-", self.bus)?;
        for (i, number) in self.chain.iter().enumerate() {
            let dot = if i == 0 { "" } else { "." };
            write!(f, "{dot}{number}")?;
        }
        Ok(())
    }
}

impl FromStr for Port {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let parse = || {
            let (bus, chain) = text.split_once('-')?;
            let bus = number(bus).filter(|bus| *bus <= MAX_BUS)?;
            let chain: Vec<u8> = chain.split('.').map(number).collect::<Option<_>>()?;
            (chain.len() <= MAX_CHAIN).then_some(Port { bus, chain })
        };
        parse().ok_or_else(|| wrong(text, Self::EXPECTED))
    }
}

impl Serialize for Port {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// Where a device is right now: bus number (1 to 999) and device address (1 to
/// 127). The kernel gives a new address at every plug.
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

/// Vendor id and product id, `152d:2338`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VendorProduct {
    /// The vendor id (`idVendor`).
    pub vendor: u16,
    /// The product id (`idProduct`).
    pub product: u16,
}

impl VendorProduct {
    const EXPECTED: &'static str = "a vendor and product id like `152d:2338`";

    /// Reads the `PRODUCT` of a udev event: vendor, product and release in
    /// hexadecimal without padding, `627/1/0` (Linux, drivers/usb/core/driver.c,
    /// `usb_uevent`).
    pub fn from_udev(product: &str) -> Result<Self, ParseError> {
        let fields: Option<Vec<u16>> = product.split('/').map(hex).collect();
        match fields.as_deref() {
            Some(&[vendor, product, _release]) => Ok(VendorProduct { vendor, product }),
            _ => Err(wrong(product, "a udev PRODUCT like `152d/2338/100`")),
        }
    }
}

/// One to four hexadecimal digits.
fn hex(text: &str) -> Option<u16> {
    let digits = (1..=4).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_hexdigit());
    digits.then(|| u16::from_str_radix(text, 16).ok())?
}

impl fmt::Display for VendorProduct {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04x}:{:04x}", self.vendor, self.product)
    }
}

impl FromStr for VendorProduct {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let four = |text: &str| if text.len() == 4 { hex(text) } else { None };
        let parse = || {
            let (vendor, product) = text.split_once(':')?;
            Some(VendorProduct { vendor: four(vendor)?, product: four(product)? })
        };
        parse().ok_or_else(|| wrong(text, Self::EXPECTED))
    }
}

/// A speed in tenths of a megabit per second: the slowest devices run at 1.5.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Speed(u32);

impl Speed {
    /// Full speed, 12 Mb/s.
    pub const FULL: Speed = Speed(120);
    /// High speed, 480 Mb/s.
    pub const HIGH: Speed = Speed(4_800);
    /// SuperSpeed, 5 Gb/s.
    pub const SUPER: Speed = Speed(50_000);
}

impl fmt::Display for Speed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 % 10 {
            0 => write!(f, "{}", self.0 / 10),
            tenth => write!(f, "{}.{tenth}", self.0 / 10),
        }
    }
}

impl FromStr for Speed {
    type Err = ParseError;

    /// Reads megabits per second, as in the sysfs attribute `speed` and in
    /// QEMU's `info usb`: `1.5`, `12`, `480`, `5000`.
    fn from_str(text: &str) -> Result<Self, ParseError> {
        let parse = || {
            let (whole, tenth) = text.split_once('.').unwrap_or((text, "0"));
            let whole: u32 = number(whole)?;
            let tenth: u32 = if tenth == "0" { 0 } else { number(tenth).filter(|t| *t < 10)? };
            Some(Speed(whole.checked_mul(10)?.checked_add(tenth)?))
        };
        parse().ok_or_else(|| wrong(text, "a speed in Mb/s like `480` or `1.5`"))
    }
}

impl Serialize for Speed {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.0 % 10 {
            0 => serializer.serialize_u32(self.0 / 10),
            _ => serializer.serialize_f64(f64::from(self.0) / 10.0),
        }
    }
}

/// A QEMU device id that can also be deleted again: a letter, then letters,
/// digits, `-`, `.`, `_` (QEMU, util/id.c, `id_wellformed`). QEMU's own check
/// is not enough: the `device_add` of QEMU 10 takes any text.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct DeviceId(String);

impl DeviceId {
    const PREFIX: &'static str = "usb-host-";

    /// The id of whatever sits at this port.
    pub fn for_port(port: &Port) -> Self {
        DeviceId(format!("{}{port}", Self::PREFIX))
    }

    /// The port, if the id is one of ours.
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

/// A device of the host, as the kernel's `uevent` describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// Where it is plugged in.
    pub port: Port,
    /// Where it is on its bus right now.
    pub address: Address,
    /// Who made it and what it is.
    pub id: VendorProduct,
    /// The device's class code (`bDeviceClass`); 0 leaves it to the interfaces.
    pub class: u8,
}

impl Device {
    /// Whether it is a hub. Hubs stay with the host: everything behind one
    /// would leave with it.
    pub fn is_hub(&self) -> bool {
        self.class == CLASS_HUB
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({}, {})", self.port, self.id, self.address)
    }
}

/// The class code at the start of udev's `TYPE`, `9/0/1`: class, subclass,
/// protocol, in decimal (Linux, drivers/usb/core/driver.c, `usb_uevent`).
pub fn class_from_udev(kind: &str) -> Result<u8, ParseError> {
    let field = |text| if text == "0" { Some(0) } else { number::<u8>(text) };
    let fields: Option<Vec<u8>> = kind.split('/').map(field).collect();
    match fields.as_deref() {
        Some(&[class, _subclass, _protocol]) => Ok(class),
        _ => Err(wrong(kind, "a udev TYPE like `9/0/1`")),
    }
}

/// How a person names a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Selector {
    /// Whatever sits at a port: `1-1.2`.
    Port(Port),
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
        const EXPECTED: &str = "a device: a port `1-1.2`, bus:device `1:37`, vendor:product \
             `152d:2338`, `serial=XYZ`, a /dev/bus/usb node, a path under /sys, or an id";
        let error = || wrong(text, EXPECTED);
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
        port.or_else(|_| text.parse().map(Selector::Product))
            .or_else(|_| text.parse().map(Selector::Address))
            .or_else(|_| text.parse().map(Selector::Id))
            .map_err(|_| error())
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Selector::Port(port) => write!(f, "port {port}"),
            Selector::Address(address) => write!(f, "bus:device {address}"),
            Selector::Product(id) => write!(f, "vendor:product {id}"),
            Selector::Sysfs(path) => write!(f, "{}", crate::text::escape(&path.to_string_lossy())),
            Selector::Serial(serial) => write!(f, "serial {}", crate::text::escape(serial)),
            Selector::Id(id) => write!(f, "id {id}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

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
    }

    #[test]
    fn an_address_is_read_padded_or_not_and_names_its_node() {
        let address: Address = "001:037".parse().unwrap();
        assert_eq!(address, "1:37".parse().unwrap());
        assert_eq!(address.node().to_str(), Some("/dev/bus/usb/001/037"));
        assert_eq!(address.minor(), 36);
        for text in ["0:1", "1:0", "1:128", "1:+5", "1:", ":1", "1:0001"] {
            assert!(text.parse::<Address>().is_err(), "{text}");
        }
    }

    #[test]
    fn udev_writes_a_product_without_padding() {
        let id = VendorProduct::from_udev("627/1/0").unwrap();
        assert_eq!(id.to_string(), "0627:0001");
        for text in ["627/1", "627/1/0/0", "x/1/0", "/1/0", "12345/1/0"] {
            assert!(VendorProduct::from_udev(text).is_err(), "{text}");
        }
    }

    #[test]
    fn udev_writes_the_class_first_in_type() {
        assert_eq!(class_from_udev("9/0/1"), Ok(9));
        assert_eq!(class_from_udev("0/0/0"), Ok(0));
        assert!(class_from_udev("9").is_err());
        assert!(class_from_udev("256/0/0").is_err());
    }

    #[test]
    fn a_device_can_be_named_in_every_form() {
        let cases = [
            ("1-1.2", "port 1-1.2"),
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

    #[test]
    fn speeds_print_as_the_kernel_writes_them() {
        for text in ["1.5", "12", "480", "5000", "10000", "20000"] {
            assert_eq!(text.parse::<Speed>().unwrap().to_string(), text);
        }
        assert!("480".parse::<Speed>().unwrap() == Speed::HIGH);
        for text in ["", "0", "unknown", "1.55", "-1", "99999999999"] {
            assert!(text.parse::<Speed>().is_err(), "{text}");
        }
        let json = |text: &str| serde_json::to_string(&text.parse::<Speed>().unwrap()).unwrap();
        assert_eq!((json("1.5"), json("480")), ("1.5".into(), "480".into()));
    }

    proptest! {
        #[test]
        fn no_text_panics_and_what_parses_prints_back(text in "\\PC{0,40}|[0-9a-f:/.-]{0,20}") {
            if let Ok(port) = text.parse::<Port>() {
                prop_assert_eq!(port.to_string(), &text[..]);
                prop_assert_eq!(DeviceId::for_port(&port).port(), Some(port));
            }
            if let Ok(address) = text.parse::<Address>() {
                prop_assert_eq!(address.to_string().parse(), Ok(address));
            }
            if let Ok(id) = text.parse::<VendorProduct>() {
                prop_assert_eq!(id.to_string(), text.to_lowercase());
            }
            if let Ok(speed) = text.parse::<Speed>() {
                prop_assert_eq!(speed.to_string().parse(), Ok(speed));
            }
            let _ = VendorProduct::from_udev(&text);
            let _ = class_from_udev(&text);
            let _ = text.parse::<Selector>();
        }
    }
}
