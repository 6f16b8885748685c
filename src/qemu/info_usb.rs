//! Reads the text of `info usb`.

use crate::usb::Speed;

/// The text between a product and an id.
const ID: &str = ", ID: ";

/// A line of `info usb`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InfoLine {
    /// The number of the bus, in the order of creation.
    pub bus: u32,
    /// The port, `2.1`.
    pub port: String,
    /// The speed. `None` if QEMU does not know it.
    pub speed: Option<Speed>,
    /// The product, and the id if the device has one: the rest of the line.
    rest: String,
}

impl InfoLine {
    /// The id at the end of the line, if there is one. A product's name may
    /// imitate an id.
    pub fn id(&self) -> Option<&str> {
        self.rest.rsplit_once(ID).map(|(_, id)| id)
    }

    /// The product's name, if the line belongs to the device with this id (or
    /// without an id). The name is the device's own string and may contain
    /// anything, so it is used only if it fits the other facts.
    pub fn product(&self, id: Option<&str>) -> Option<&str> {
        match id {
            Some(id) => self.rest.strip_suffix(id)?.strip_suffix(ID),
            None => Some(&self.rest),
        }
    }
}

/// Reads the text of `info usb` (QEMU, hw/usb/bus.c, `qmp_x_query_usb`). Lines
/// that do not describe a device are skipped. A device has a line like this:
/// `  Device 0.1, Port 2, Speed 480 Mb/s, Product QEMU USB Tablet, ID: tab0`.
pub fn parse_info_usb(text: &str) -> Vec<InfoLine> {
    let line = |line: &str| {
        let (place, rest) = line.strip_prefix("  Device ")?.split_once(", Port ")?;
        let (bus, _address) = place.split_once('.')?;
        let (port, rest) = rest.split_once(", Speed ")?;
        let (speed, rest) = rest.split_once(" Mb/s, Product ")?;
        let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        port.split('.').all(digits).then_some(InfoLine {
            bus: bus.parse().ok()?,
            port: port.to_owned(),
            speed: speed.parse().ok(),
            rest: rest.to_owned(),
        })
    };
    text.split(['\r', '\n']).filter_map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn speed(text: &str) -> Option<Speed> {
        Some(text.parse().unwrap())
    }

    #[test]
    fn info_usb_is_read_line_by_line() {
        let text = "  Device 0.0, Port 2.1, Speed 12 Mb/s, Product QEMU USB Tablet, ID: tab0\r\n  \
                      Device 1.3, Port 1, Speed 1.5 Mb/s, Product Mouse\r\n";
        let lines = parse_info_usb(text);
        assert_eq!(lines.len(), 2);
        assert_eq!((lines[0].bus, lines[0].port.as_str(), lines[0].speed), (0, "2.1", speed("12")));
        assert_eq!(lines[0].product(Some("tab0")), Some("QEMU USB Tablet"));
        assert_eq!(lines[0].product(Some("tab")), None);
        assert_eq!(lines[1].product(None), Some("Mouse"));
        assert_eq!(parse_info_usb("USB support not enabled\r\n"), []);
    }

    #[test]
    fn a_product_cannot_take_another_devices_id() {
        let forged = "  Device 0.0, Port 1, Speed 12 Mb/s, Product x, ID: tab0, ID: real\n";
        let lines = parse_info_usb(forged);
        assert_eq!(lines[0].product(Some("tab0")), None);
        assert_eq!(lines[0].product(Some("real")), Some("x, ID: tab0"));
        assert_eq!(lines[0].id(), Some("real"));
    }

    proptest! {
        #[test]
        fn no_text_panics(text in "(  Device |\\.|[0-9]|, Port |, Speed | Mb/s, Product |, ID: |\\PC|\n){0,60}") {
            for line in parse_info_usb(&text) {
                prop_assert!(!line.port.is_empty());
            }
        }

        #[test]
        fn a_line_is_read_back(bus in 0u32..9, port in "[1-9](\\.[1-9]){0,3}", product in "[^\r\n]{0,32}", id in "[a-z]{1,8}") {
            let text = format!("  Device {bus}.1, Port {port}, Speed 480 Mb/s, Product {product}, ID: {id}\r\n");
            let lines = parse_info_usb(&text);
            prop_assert_eq!(lines.len(), 1);
            prop_assert_eq!(lines[0].product(Some(&id)), Some(&product[..]));
            prop_assert_eq!(&lines[0].port, &port);
        }
    }
}
