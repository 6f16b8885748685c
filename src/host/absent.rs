//! A device that was asked for and is not plugged in, and the device that the
//! user may have meant.

use std::fmt;

use super::Host;
use crate::text::{escape, nearest};
use crate::usb::Selector;

/// A device that is not there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Absent {
    /// What was asked for.
    pub selector: Selector,
    /// The most similar name of a device that is plugged in.
    pub nearest: Option<String>,
}

impl Host {
    /// Describes a device that is not there, and looks for a device that the
    /// user may have meant.
    pub fn absent(&self, selector: &Selector) -> Absent {
        let devices = self.devices().unwrap_or_default().into_iter();
        let there: Vec<String> = match selector {
            Selector::Port(_) => devices.map(|device| device.port.to_string()).collect(),
            Selector::Path(_) => {
                let paths = devices.filter_map(|device| self.port_path(&device.port));
                paths.map(|path| path.to_string()).collect()
            }
            Selector::Address(_) => devices.map(|device| device.address.to_string()).collect(),
            Selector::Product(_) => devices.map(|device| device.id.to_string()).collect(),
            Selector::Serial(_) => {
                let serials = self.serials(devices.collect()).unwrap_or_default().into_iter();
                serials.filter_map(|(_, serial)| serial.flatten()).collect()
            }
            Selector::Sysfs(_) | Selector::Id(_) => Vec::new(),
        };
        let word = match selector {
            Selector::Port(port) => port.to_string(),
            Selector::Path(path) => path.to_string(),
            Selector::Address(address) => address.to_string(),
            Selector::Product(id) => id.to_string(),
            Selector::Serial(serial) => serial.clone(),
            Selector::Sysfs(_) | Selector::Id(_) => String::new(),
        };
        let nearest = nearest(&word, there.iter().map(String::as_str)).map(str::to_owned);
        Absent { selector: selector.clone(), nearest }
    }
}

impl fmt::Display for Absent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} on this host; ", self.selector)?;
        match &self.nearest {
            Some(nearest) => write!(f, "did you mean `{}`?", escape(nearest)),
            None => f.write_str("`usb-qmp-hotplug list` shows what is plugged in"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn a_mistyped_device_is_known_by_what_is_there() {
        let root = tempfile::tempdir().unwrap();
        let device = root.path().join("sys/bus/usb/devices/1-1.2");
        fs::create_dir_all(&device).unwrap();
        let attributes = [
            ("busnum", "1"),
            ("devnum", "37"),
            ("idVendor", "152d"),
            ("idProduct", "2338"),
            ("bDeviceClass", "00"),
            ("serial", "SN\u{1b}123"),
        ];
        for (name, value) in attributes {
            fs::write(device.join(name), format!("{value}\n")).unwrap();
        }
        let host = Host::at(root.path());
        let error = |text: &str| host.find(&text.parse().unwrap()).unwrap_err().to_string();
        assert!(error("1-1.3").ends_with("did you mean `1-1.2`?"), "{}", error("1-1.3"));
        assert!(error("152d:2339").contains("`152d:2338`"));
        assert!(error("serial=SN123").contains("`SN\\u{1b}123`"));
        assert!(error("4-2").ends_with("`usb-qmp-hotplug list` shows what is plugged in"));
    }
}
