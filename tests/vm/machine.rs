//! The host: a directory.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::PathBuf;

use tempfile::TempDir;
use usb_qmp_hotplug::host::Host;
use usb_qmp_hotplug::usb::Device;

pub struct Machine {
    pub root: TempDir,
}

impl Machine {
    /// With a stick at port 1-1.2, whose node nobody may open.
    pub fn new() -> Self {
        let machine = Machine { root: tempfile::tempdir().unwrap() };
        machine.stick_at("37");
        machine.write("sys/bus/usb/devices/1-1.2/speed", "480\n");
        let node = machine.write("dev/bus/usb/001/037", "");
        fs::set_permissions(node, fs::Permissions::from_mode(0o000)).unwrap();
        obey_permissions();
        machine
    }

    pub fn write(&self, path: &str, text: &str) -> PathBuf {
        let path = self.root.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
        path
    }

    pub fn stick_at(&self, address: &str) {
        let numbers =
            [("busnum", "1"), ("devnum", address), ("idVendor", "152d"), ("idProduct", "2338")];
        for (name, value) in numbers.into_iter().chain([("bDeviceClass", "00")]) {
            self.write(&format!("sys/bus/usb/devices/1-1.2/{name}"), &format!("{value}\n"));
        }
    }

    /// The kernel lists all locks, and they are these.
    pub fn locks(&self, locks: &str) {
        self.write("proc/locks", locks);
        let namespace = self.root.path().join("proc/self/ns/pid");
        fs::create_dir_all(namespace.parent().unwrap()).unwrap();
        std::os::unix::fs::symlink("pid:[4026531836]", namespace).unwrap();
    }

    /// The stick's node is locked.
    pub fn lock(&self) {
        let node = fs::metadata(self.root.path().join("dev/bus/usb/001/037")).unwrap();
        let (major, minor) = (rustix::fs::major(node.dev()), rustix::fs::minor(node.dev()));
        let file = format!("{major:02x}:{minor:02x}:{}", node.ino());
        self.locks(&format!("1: FLOCK  ADVISORY  WRITE 77 {file} 0 EOF\n"));
    }

    /// The stick's disk is mounted.
    pub fn mount(&self) {
        let disk = "sys/bus/usb/devices/1-1.2/1-1.2:1.0/host2/target2:0:0/2:0:0:0/block/sdb";
        self.write(&format!("{disk}/dev"), "8:16\n");
        self.write("proc/self/mountinfo", "40 21 8:16 / /media/stick rw - vfat /dev/sdb rw\n");
    }

    pub fn host(&self) -> Host {
        Host::at(self.root.path())
    }

    pub fn device(&self) -> Device {
        self.host().device(&"1-1.2".parse().unwrap()).unwrap().unwrap()
    }
}

/// Lets this thread open only what permissions say: root may open everything otherwise.
fn obey_permissions() {
    use rustix::thread::{CapabilitySet, capabilities, set_capabilities};
    let mut sets = capabilities(None).unwrap();
    sets.effective.remove(CapabilitySet::DAC_OVERRIDE);
    set_capabilities(None, sets).unwrap();
}
