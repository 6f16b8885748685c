//! The properties of a device: what udev's rules have found out, from its file
//! in udev's database (systemd, src/libsystemd/sd-device/device-private.c,
//! `device_read_db`), and what the kernel tells.

use std::path::Path;

use super::database::DATABASE;
use super::{Host, read_if_there};
use crate::usb::Port;

impl Host {
    /// A property of the device at a port. Those that the kernel itself gives
    /// may wait for the device's drivers.
    pub fn property(&self, port: &Port, name: &str) -> Option<String> {
        let directory = self.directory(port);
        let of_udev = || self.property_of_udev(&directory, 'c', name);
        match name {
            "SUBSYSTEM" => Some("usb".to_owned()),
            "DEVPATH" => {
                let (path, sys) = (directory.canonicalize().ok()?, self.path("/sys"));
                let path = path.strip_prefix(sys.canonicalize().ok()?).ok()?;
                Some(format!("/{}", path.to_str()?))
            }
            name => of_udev().or_else(|| value(&self.attribute(port, "uevent")?, name)),
        }
    }

    /// Whether udev has processed the device at a port. Before that, udev has
    /// no property of it.
    pub fn is_known_to_udev(&self, port: &Port) -> bool {
        self.database_entry(&self.directory(port), 'c').is_some()
    }

    /// A property that udev has found out about a device with a node. `kind` is
    /// that of the node, `b` for a block device and `c` for others.
    pub(super) fn property_of_udev(&self, sysfs: &Path, kind: char, name: &str) -> Option<String> {
        let entry = self.database_entry(sysfs, kind)?;
        // Links to the node, tags and priorities have lines of their own.
        let mut properties = entry.lines().filter_map(|line| line.strip_prefix("E:"));
        properties.find_map(|property| value(property, name))
    }

    fn database_entry(&self, sysfs: &Path, kind: char) -> Option<String> {
        let number = read_if_there(&sysfs.join("dev")).ok()??;
        let entry = format!("{DATABASE}/{kind}{}", number.trim_end());
        read_if_there(&self.path(entry)).ok()?
    }
}

/// The value of a name in lines like `NAME=value`.
fn value(text: &str, name: &str) -> Option<String> {
    let mut lines = text.lines();
    let value = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix('='))?;
    Some(value.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn properties_come_from_udev_and_from_the_kernel() {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write("sys/bus/usb/devices/1-1/dev", "189:4\n");
        write("sys/bus/usb/devices/1-1/uevent", "DEVTYPE=usb_device\nPRODUCT=627/1/0\n");
        write("sys/bus/usb/devices/1-2/dev", "189:5\n");
        write("run/udev/data/c189:4", "I:5\nE:ID_PATH=pci-0\nE:ID_PATH_TAG=x=y\nG:seat\nQ:E:A=1\n");
        let (host, port) = (Host::at(root.path()), "1-1".parse().unwrap());
        let property = |name| host.property(&port, name);
        assert_eq!(property("ID_PATH").as_deref(), Some("pci-0"));
        assert_eq!(property("ID_PATH_TAG").as_deref(), Some("x=y"));
        assert_eq!(property("PRODUCT").as_deref(), Some("627/1/0"));
        assert_eq!(property("DEVPATH").as_deref(), Some("/bus/usb/devices/1-1"));
        assert_eq!((property("ID"), property("A"), property("G")), (None, None, None));
        assert!(host.is_known_to_udev(&port));
        assert!(!host.is_known_to_udev(&"1-2".parse().unwrap()));
    }
}
