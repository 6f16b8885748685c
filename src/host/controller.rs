//! The host's USB controllers. The place of its controller gives a bus or a
//! port its stable name.

use std::fs;
use std::path::{Path, PathBuf};

use super::{Host, read_if_there};
use crate::usb::{BusPath, Port, PortPath};

/// The kernel's buses that udev writes into a path, and their names in it
/// (systemd, src/udev/udev-builtin-path_id.c, `builtin_path_id`).
const NAMED: [&str; 9] =
    ["pci", "platform", "amba", "acpi", "xen", "scm", "ccw", "ccwgroup", "iucv"];

impl Host {
    /// The numbers of all buses, sorted.
    pub fn buses(&self) -> Vec<u16> {
        let entries = fs::read_dir(self.path("/sys/bus/usb/devices")).into_iter().flatten();
        let number = |entry: fs::DirEntry| -> Option<u16> {
            entry.file_name().to_str()?.strip_prefix("usb")?.parse().ok()
        };
        let mut buses: Vec<u16> = entries.flatten().filter_map(number).collect();
        buses.sort_unstable();
        buses
    }

    /// The stable name of a bus. `None` if there is no such bus, or if its
    /// controller has no place that can be named.
    pub fn bus_path(&self, bus: u16) -> Option<BusPath> {
        let root_hub = self.root_hub(bus);
        let revision = revision(&root_hub)?;
        BusPath::new(&self.controller_name(root_hub.canonicalize().ok()?.parent()?)?, revision)
    }

    /// The stable name of a port.
    pub fn port_path(&self, port: &Port) -> Option<PortPath> {
        Some(PortPath::new(self.bus_path(port.bus())?, port))
    }

    /// The port that has this stable name now. `None` if its controller is not
    /// there.
    pub fn port_of(&self, path: &PortPath) -> Option<Port> {
        let is_it = |bus: &u16| self.bus_path(*bus).as_ref() == Some(path.bus());
        let bus = self.buses().into_iter().find(is_it)?;
        Some(Port::new(bus, path.chain().clone()))
    }

    /// The directory of a bus's controller as events name it, in `DEVPATH`:
    /// `/devices/pci0000:00/0000:00:14.0`.
    pub fn controller(&self, bus: u16) -> Option<PathBuf> {
        let root_hub = self.root_hub(bus).canonicalize().ok()?;
        let sys = self.path("/sys").canonicalize().ok()?;
        Some(Path::new("/").join(root_hub.parent()?.strip_prefix(sys).ok()?))
    }

    fn root_hub(&self, bus: u16) -> PathBuf {
        self.path(format!("/sys/bus/usb/devices/usb{bus}"))
    }

    /// udev's name for a controller: the last directory of each kind of bus on
    /// the way up, the uppermost first.
    fn controller_name(&self, directory: &Path) -> Option<String> {
        let devices = self.path("/sys/devices").canonicalize().ok()?;
        let mut parts = Vec::new();
        let mut below = None;
        for directory in directory.ancestors().take_while(|directory| **directory != devices) {
            let kind = kind(directory);
            let named = kind.as_deref().filter(|kind| NAMED.contains(kind));
            if let Some(name) = named.filter(|_| kind != below) {
                parts.push(format!("{name}-{}", directory.file_name()?.to_str()?));
            }
            below = kind;
        }
        parts.reverse();
        (!parts.is_empty()).then(|| parts.join("-"))
    }
}

/// The kernel's bus that a device is on (Linux,
/// Documentation/ABI/stable/sysfs-devices, `subsystem`).
fn kind(directory: &Path) -> Option<String> {
    let link = fs::read_link(directory.join("subsystem")).ok()?;
    Some(link.file_name()?.to_str()?.to_owned())
}

/// The USB revision of a root hub. Its protocol tells it (USB 3.2
/// specification, section 10.15.1; USB 2.0 specification, section 11.23.1).
/// Without a transaction translator, the speed tells it. udev does the same
/// (systemd, src/udev/udev-builtin-path_id.c, `get_usb_revision`).
fn revision(root_hub: &Path) -> Option<u8> {
    let read = |name| read_if_there(&root_hub.join(name)).ok()?;
    match read("bDeviceProtocol")?.trim_end() {
        "00" if read("speed")?.trim_end() == "480" => Some(2),
        "00" => Some(1),
        "01" | "02" => Some(2),
        "03" => Some(3),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    /// A controller: its directory below `/sys/devices`, the buses its parts
    /// are on, and each root hub's number, protocol and speed.
    type Controller<'a> = (&'a str, &'a [&'a str], &'a [(u16, &'a str, &'a str)]);

    fn host(controllers: &[Controller]) -> (tempfile::TempDir, Host) {
        let root = tempfile::tempdir().unwrap();
        let devices = root.path().join("sys/devices");
        let list = root.path().join("sys/bus/usb/devices");
        fs::create_dir_all(&list).unwrap();
        for (path, kinds, root_hubs) in controllers {
            let mut directory = devices.clone();
            for (part, kind) in path.split('/').zip(*kinds) {
                directory.push(part);
                fs::create_dir_all(&directory).unwrap();
                if !kind.is_empty() && !directory.join("subsystem").is_symlink() {
                    symlink(format!("/sys/bus/{kind}"), directory.join("subsystem")).unwrap();
                }
            }
            for (number, protocol, speed) in *root_hubs {
                let root_hub = directory.join(format!("usb{number}"));
                fs::create_dir(&root_hub).unwrap();
                symlink("/sys/bus/usb", root_hub.join("subsystem")).unwrap();
                fs::write(root_hub.join("bDeviceProtocol"), format!("{protocol}\n")).unwrap();
                fs::write(root_hub.join("speed"), format!("{speed}\n")).unwrap();
                symlink(&root_hub, list.join(format!("usb{number}"))).unwrap();
            }
        }
        let host = Host::at(root.path());
        (root, host)
    }

    #[test]
    fn each_bus_is_named_as_udev_names_it() {
        let (_root, host) = host(&[
            (
                "pci0000:00/0000:00:1c.0/0000:01:00.0",
                &["", "pci", "pci"],
                &[(3, "01", "480"), (4, "03", "10000")],
            ),
            ("pci0000:00/0000:00:1d.0", &["", "pci"], &[(5, "00", "12")]),
            ("platform/vhci_hcd.0", &["", "platform"], &[(6, "00", "480")]),
            (
                "platform/scb/fd500000.pcie/pci0001:00/0001:00:00.0/0001:01:00.0",
                &["", "platform", "platform", "", "pci", "pci"],
                &[(7, "02", "480")],
            ),
            (
                "pci0000:00/0000:00:15.0/dwc3.1.auto/xhci-hcd.2.auto",
                &["", "pci", "platform", "platform"],
                &[(8, "03", "5000")],
            ),
            ("somewhere/else", &["", "fancy"], &[(9, "01", "480")]),
        ]);
        let names = [
            (3, Some("pci-0000:01:00.0-usbv2-0:1.2")),
            (4, Some("pci-0000:01:00.0-usbv3-0:1.2")),
            (5, Some("pci-0000:00:1d.0-usbv1-0:1.2")),
            (6, Some("platform-vhci_hcd.0-usbv2-0:1.2")),
            (7, Some("platform-fd500000.pcie-pci-0001:01:00.0-usbv2-0:1.2")),
            (8, Some("pci-0000:00:15.0-platform-xhci-hcd.2.auto-usbv3-0:1.2")),
            (9, None),
            (10, None),
        ];
        for (bus, name) in names {
            let port: Port = format!("{bus}-1.2").parse().unwrap();
            let path = host.port_path(&port);
            assert_eq!(path.as_ref().map(ToString::to_string).as_deref(), name, "{port}");
            if let Some(path) = path {
                assert_eq!(host.port_of(&path), Some(port));
            }
        }
        let controller = host.controller(4).unwrap();
        assert_eq!(controller.to_str(), Some("/devices/pci0000:00/0000:00:1c.0/0000:01:00.0"));
        assert_eq!(host.port_of(&"pci-0000:09:00.0-usbv2-0:1".parse().unwrap()), None);
    }
}
