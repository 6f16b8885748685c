//! The host's USB buses and their root hubs. Root hubs are never attached.

use super::{Host, in_haste, read_if_there};
use crate::usb::{BusPath, Speed};

/// A bus, as its root hub describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bus {
    /// Its number, the first part of its ports' names.
    pub number: u16,
    /// Its stable name, if its controller has a place that can be named.
    pub path: Option<BusPath>,
    /// The highest speed of its devices.
    pub speed: Option<Speed>,
    /// How many ports its root hub has (`maxchild`).
    pub ports: Option<u32>,
    /// The controller: the kernel's name for its kind, and where it is
    /// (Linux, drivers/usb/core/hcd.c, `rh_string`).
    pub controller: String,
}

impl Host {
    /// The bus of a number, as far as sysfs describes it.
    pub fn bus(&self, number: u16) -> Bus {
        let directory = self.path(format!("/sys/bus/usb/devices/usb{number}"));
        let read = |name| {
            let text = read_if_there(&directory.join(name)).ok()??;
            Some(text.trim().to_owned())
        };
        // A hub is locked while drivers start for a device behind it.
        let strings = in_haste(["product", "serial"].map(|name| directory.join(name)), |path| {
            read_if_there(&path).ok().flatten().map(|text| text.trim().to_owned())
        });
        let words: Vec<String> = strings.into_iter().flatten().flatten().collect();
        Bus {
            number,
            path: self.bus_path(number),
            speed: read("speed").and_then(|speed| speed.parse().ok()),
            ports: read("maxchild").and_then(|count| count.parse().ok()),
            controller: words.join(" "),
        }
    }
}
