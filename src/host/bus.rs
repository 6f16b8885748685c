//! The host's USB buses and their root hubs. Root hubs are never attached.

use super::{Host, read_if_there};
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
    /// The buses of these numbers, as far as sysfs describes them.
    pub fn described(&self, numbers: &[u16]) -> Vec<Bus> {
        let host = self.clone();
        // A hub is locked while drivers start for a device behind it.
        let controllers = self.in_haste_or_default(numbers.to_vec(), move |number| {
            let read = |name| host.of_root_hub(number, name);
            let words: Vec<String> = ["product", "serial"].into_iter().filter_map(read).collect();
            words.join(" ")
        });
        let bus = |(number, controller): (&u16, String)| self.bus(*number, controller);
        numbers.iter().zip(controllers).map(bus).collect()
    }

    fn bus(&self, number: u16, controller: String) -> Bus {
        let read = |name| self.of_root_hub(number, name);
        Bus {
            number,
            path: self.bus_path(number),
            speed: read("speed").and_then(|speed| speed.parse().ok()),
            ports: read("maxchild").and_then(|count| count.parse().ok()),
            controller,
        }
    }

    /// An attribute of a bus's root hub.
    fn of_root_hub(&self, number: u16, name: &str) -> Option<String> {
        let attribute = self.path(format!("/sys/bus/usb/devices/usb{number}")).join(name);
        Some(read_if_there(&attribute).ok()??.trim().to_owned())
    }
}
