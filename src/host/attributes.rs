//! The attributes of a device that a rule may name, besides its ids.

use std::fs;
use std::path::PathBuf;

use super::disk::{directories, name};
use super::{Host, read_bytes, read_if_there};
use crate::usb::{self, Port};

impl Host {
    /// The other half of a physical USB 3 socket: the kernel has one port on a
    /// USB 2 bus and one on a USB 3 bus, and a link between the two (Linux,
    /// drivers/usb/core/port.c, `link_peers`).
    pub fn twin(&self, port: &Port) -> Option<Port> {
        let target = fs::read_link(self.socket(port).join("peer")).ok()?;
        let (hub, last) = target.file_name()?.to_str()?.split_once("-port")?;
        match hub.strip_prefix("usb") {
            Some(bus) => format!("{bus}-{last}").parse().ok(),
            None => format!("{hub}.{last}").parse().ok(),
        }
    }

    /// Whether this port exists, empty or not. `None` if its hub is not there,
    /// or if the kernel does not tell.
    pub fn has_port(&self, port: &Port) -> Option<bool> {
        let socket = self.socket(port);
        socket.parent()?.is_dir().then(|| socket.is_dir())
    }

    /// The directory of a port itself, which exists without a device, too. The
    /// ports of a hub are below its only interface.
    fn socket(&self, port: &Port) -> PathBuf {
        let last = port.last();
        match port.hub() {
            Some(hub) => self.directory(&hub).join(format!("{hub}:1.0/{hub}-port{last}")),
            None => {
                let bus = port.bus();
                let root = format!("/sys/bus/usb/devices/usb{bus}/{bus}-0:1.0");
                self.path(root).join(format!("usb{bus}-port{last}"))
            }
        }
    }

    /// The class codes of the device at a port and of its interfaces.
    pub fn classes(&self, port: &Port) -> Vec<u8> {
        usb::classes(&self.descriptors(port))
    }

    /// Whether the device at a port is a keyboard or contains one.
    pub fn is_keyboard(&self, port: &Port) -> bool {
        usb::is_keyboard(&self.descriptors(port))
    }

    /// The descriptors of the device at a port. They can be read before its
    /// interfaces exist (Linux, drivers/usb/core/sysfs.c, `descriptors_read`).
    pub(super) fn descriptors(&self, port: &Port) -> Vec<u8> {
        let descriptors = read_bytes(&self.directory(port).join("descriptors"));
        descriptors.ok().flatten().unwrap_or_default()
    }

    /// The drivers of the interfaces of the device at a port, each named once.
    /// `usbfs` means that a program has claimed an interface, for example a
    /// QEMU.
    pub fn drivers(&self, port: &Port) -> Vec<String> {
        let mut interfaces = self.interfaces(port);
        interfaces.sort();
        let mut drivers: Vec<String> = Vec::new();
        for interface in interfaces {
            let Ok(link) = fs::read_link(interface.join("driver")) else { continue };
            let driver = link.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if !drivers.contains(&driver) {
                drivers.push(driver);
            }
        }
        drivers
    }

    /// Whether drivers may be starting for the device at a port. As long as they
    /// do, the kernel makes a process wait that opens the node. Only what is
    /// there is looked at, as that never waits. A driver that a person binds by
    /// hand is not noticed.
    pub fn may_be_starting(&self, port: &Port) -> bool {
        // The kernel adds the endpoints of the device when the first drivers
        // have started (Linux, drivers/usb/core/hub.c, `usb_new_device`), and
        // those of an interface when its driver has (drivers/usb/core/message.c,
        // `usb_set_configuration`).
        if !self.directory(port).join("ep_00").exists() {
            return true;
        }
        self.interfaces(port).iter().any(|interface| {
            // A driver that is loaded now starts for all devices that fit, before
            // it gets its own attributes (Linux, drivers/base/bus.c,
            // `bus_add_driver`).
            let driver = interface.join("driver");
            let is_loading = driver.exists() && !driver.join("uevent").exists();
            let endpoints = read_if_there(&interface.join("bNumEndpoints")).ok().flatten();
            let lacks_endpoints = endpoints.is_some_and(|count| count.trim_end() != "00")
                && !directories(interface).any(|child| name(&child).starts_with("ep_"));
            is_loading || lacks_endpoints
        })
    }

    /// A property of the device at a port in udev's database.
    pub fn property(&self, port: &Port, name: &str) -> Option<String> {
        let device = udev::Device::from_syspath(&self.directory(port).canonicalize().ok()?).ok()?;
        Some(device.property_value(name)?.to_string_lossy().into_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn of_a_file_of_any_length_only_so_much_is_read() {
        let root = tempfile::tempdir().unwrap();
        let device = root.path().join("sys/bus/usb/devices/1-1");
        fs::create_dir_all(&device).unwrap();
        // Without data, it takes no space.
        fs::File::create(device.join("descriptors")).unwrap().set_len(1 << 30).unwrap();
        let read = Host::at(root.path()).descriptors(&"1-1".parse().unwrap());
        assert_eq!(read.len(), usize::try_from(crate::host::MAX_FILE).unwrap());
    }

    #[test]
    fn the_two_halves_of_a_socket_know_each_other() {
        let root = tempfile::tempdir().unwrap();
        let devices = root.path().join("sys/bus/usb/devices");
        let peer = |ports: &str, other: &str| {
            let directory = devices.join(ports);
            fs::create_dir_all(&directory).unwrap();
            symlink(other, directory.join("peer")).unwrap();
        };
        peer("usb1/1-0:1.0/usb1-port3", "../../../usb2/2-0:1.0/usb2-port1");
        peer("1-1/1-1:1.0/1-1-port2", "../../../../usb2/2-4/2-4:1.0/2-4-port2");
        let host = Host::at(root.path());
        let twin = |port: &str| host.twin(&port.parse().unwrap()).map(|twin| twin.to_string());
        assert_eq!(twin("1-3").as_deref(), Some("2-1"));
        assert_eq!(twin("1-1.2").as_deref(), Some("2-4.2"));
        assert_eq!(twin("1-2"), None);
        let has = |port: &str| host.has_port(&port.parse().unwrap());
        assert_eq!([has("1-3"), has("1-4"), has("1-2.1")], [Some(true), Some(false), None]);
    }
}
