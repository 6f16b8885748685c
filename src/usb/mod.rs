//! The names of USB things: ports, addresses, vendor and product ids, QEMU ids.
//! There is no I/O here.

mod descriptors;
mod event;
mod name;
mod path;
mod place;
mod speed;

use std::fmt;
use std::str::FromStr;

pub use descriptors::{classes, is_hub, is_keyboard};
pub use event::{Action, EventError, HotplugEvent};
pub use name::{DeviceId, Selector};
pub use path::{BusPath, NO_REVISION, PortPath};
pub use place::{Address, Chain, Port};
pub use speed::Speed;

/// The class code of hubs (USB 2.0 specification, section 11.23.1).
pub const CLASS_HUB: u8 = 0x09;

/// The error for a text that does not have the expected format.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{}` is not {expected}", crate::text::escape(.text))]
pub struct ParseError {
    /// The text as it was given.
    pub text: String,
    /// The expected format, with an example.
    pub expected: &'static str,
}

fn wrong(text: &str, expected: &'static str) -> ParseError {
    // A message shows only the beginning of a long text.
    let text = text.chars().take(200).collect();
    ParseError { text, expected }
}

/// A decimal number without sign or leading zero.
fn number<T: FromStr>(text: &str) -> Option<T> {
    let plain = text.bytes().all(|b| b.is_ascii_digit()) && !text.starts_with('0');
    if plain { text.parse().ok() } else { None }
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

/// A device of the host, as its attributes or its `uevent` describe it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// The port that it is plugged into.
    pub port: Port,
    /// Its present address on its bus.
    pub address: Address,
    /// Its vendor id and product id.
    pub id: VendorProduct,
    /// Whether it is a hub: by its own class or by that of an interface, as the
    /// kernel tells them (Linux, drivers/usb/core/hub.c, `hub_id_table`).
    pub hub: bool,
}

impl Device {
    /// Whether it is a hub. Hubs stay with the host, because every device
    /// behind a hub would leave the host with it.
    pub fn is_hub(&self) -> bool {
        self.hub
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

/// The class code in `bDeviceClass`, two hexadecimal digits (Linux,
/// drivers/usb/core/sysfs.c, `usb_descriptor_attr`).
pub fn class_from_sysfs(class: &str) -> Result<u8, ParseError> {
    let code = hex(class).and_then(|code| u8::try_from(code).ok());
    code.ok_or_else(|| wrong(class, "a class code like `09`"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

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
        assert_eq!([class_from_sysfs("09"), class_from_sysfs("ef")], [Ok(9), Ok(0xef)]);
        assert!(class_from_sysfs("100").is_err());
        assert!(class_from_udev("256/0/0").is_err());
    }

    proptest! {
        #[test]
        fn no_text_panics_and_what_parses_prints_back(text in "\\PC{0,40}|[0-9a-f:/.-]{0,20}|[a-z0-9:.-]{1,9}-usbv[0-4]-0:[0-9.]{0,9}") {
            if let Ok(port) = text.parse::<Port>() {
                prop_assert_eq!(port.to_string(), &text[..]);
                prop_assert_eq!(DeviceId::for_port(&port).port(), Some(port));
            }
            if let Ok(path) = text.parse::<PortPath>() {
                prop_assert_eq!(path.to_string(), &text[..]);
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
