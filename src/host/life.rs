//! Whether a VM still has the device that was attached to it. QEMU does not
//! tell when the hardware is gone, and the kernel uses addresses again. The
//! lock on the node, the drivers of the interfaces and QEMU's open descriptors
//! show it.

use std::fs;
use std::os::unix::fs::MetadataExt;

use super::{CLAIMED, Host, read_if_there};
use crate::usb::{Address, Device};

/// The initial PID namespace, as `/proc/self/ns/pid` names it (Linux,
/// include/linux/proc_ns.h, `PROC_PID_INIT_INO`).
const FIRST_PID_NAMESPACE: &str = "pid:[4026531836]";

/// How QEMU got the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Opened {
    /// This tool opened its node, locked it, and passed the descriptor.
    ByUs,
    /// QEMU opened it by itself.
    ByQemu,
}

/// Whether a VM still has the device at the address that it was given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Life {
    /// The VM has it.
    Alive,
    /// The VM has an object that is not connected to the device any more.
    Dead,
    /// It cannot be known.
    Unknown,
}

impl Host {
    /// Whether QEMU, whose process is `pid`, still has a device that was given
    /// to it by its address.
    pub fn life(&self, device: &Device, pid: Option<i32>, opened: Opened) -> Life {
        let locked = match opened {
            Opened::ByUs => self.is_locked(device.address),
            Opened::ByQemu => None,
        };
        self.life_if(device, pid, opened, locked)
    }

    /// Like [`Host::life`], for a caller that knows whether the node is locked.
    pub fn life_if(
        &self,
        device: &Device,
        pid: Option<i32>,
        opened: Opened,
        locked: Option<bool>,
    ) -> Life {
        let holds = pid.and_then(|pid| self.holds(pid, device.address));
        if holds == Some(false) {
            return Life::Dead;
        }
        match (opened, locked) {
            (Opened::ByUs, Some(true)) => Life::Alive,
            // Our lock is gone. Either the object has closed its copy, or an
            // attach was cancelled and QEMU did it later.
            (Opened::ByUs, Some(false)) => match (self.is_claimed(device), holds) {
                (Some(true), Some(true)) => Life::Alive,
                (Some(true), _) => Life::Unknown,
                _ => Life::Dead,
            },
            _ if holds == Some(true) => Life::Alive,
            (Opened::ByUs, None) => Life::Unknown,
            // QEMU takes all interfaces from the host's drivers, and claims
            // them when the guest configures the device (QEMU,
            // hw/usb/host-libusb.c, `usb_host_open` and
            // `usb_host_claim_interfaces`).
            (Opened::ByQemu, _) => match self.is_claimed(device) {
                Some(true) => Life::Alive,
                Some(false) => Life::Dead,
                None => Life::Unknown,
            },
        }
    }

    /// Whether a program has claimed an interface of a device. `None` if no
    /// interface has a driver at all.
    fn is_claimed(&self, device: &Device) -> Option<bool> {
        let drivers = self.drivers(&device.port);
        (!drivers.is_empty()).then(|| drivers.iter().any(|driver| driver == CLAIMED))
    }

    /// Whether the node of the device at an address is locked. It is locked
    /// while a VM has the device. Every user can read the kernel's list of
    /// locks (proc(5), `/proc/locks`). The lock of a process that has ended is
    /// listed only in the initial PID namespace (Linux, fs/locks.c,
    /// `locks_translate_pid`). `None` if this process is in another namespace
    /// and sees no lock, or if there is no node.
    pub fn is_locked(&self, address: Address) -> Option<bool> {
        let is_listed = !self.locks(address)?.is_empty();
        if is_listed || is_first_pid_namespace(self) { Some(is_listed) } else { None }
    }

    /// The process ids of all locks on the node of the device at an address.
    /// Each is the process that took the lock, as the kernel's list has it.
    /// `None` if there is no such list or no node.
    pub(super) fn locks(&self, address: Address) -> Option<Vec<String>> {
        let node = fs::metadata(self.path(address.node())).ok()?;
        let locks = read_if_there(&self.path("/proc/locks")).ok()??;
        let (major, minor) = (rustix::fs::major(node.dev()), rustix::fs::minor(node.dev()));
        let file = format!("{major:02x}:{minor:02x}:{}", node.ino());
        let taker = |line: &str| {
            let mut fields = line.split_whitespace();
            let is_lock = fields.nth(1) == Some("FLOCK");
            let pid = fields.nth(2)?;
            (is_lock && fields.next() == Some(file.as_str())).then(|| pid.to_owned())
        };
        Some(locks.lines().filter_map(taker).collect())
    }
}

/// Whether this process sees all other processes.
pub(super) fn is_first_pid_namespace(host: &Host) -> bool {
    let name = fs::read_link(host.path("/proc/self/ns/pid"));
    name.is_ok_and(|name| name.as_os_str() == FIRST_PID_NAMESPACE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;
    use std::path::Path;

    const QEMU: i32 = 7;

    /// A host with a device at 1-1, whose node is a file.
    struct Tree(tempfile::TempDir);

    impl Tree {
        fn new() -> Self {
            let tree = Tree(tempfile::tempdir().unwrap());
            tree.write("dev/bus/usb/001/002", "");
            tree.write("proc/locks", "1: POSIX  ADVISORY  WRITE 1 00:05:1 0 EOF\n");
            tree.link("proc/self/ns/pid", FIRST_PID_NAMESPACE);
            tree
        }

        fn write(&self, path: &str, text: &str) {
            let path = self.0.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }

        fn link(&self, path: &str, target: impl AsRef<Path>) {
            let path = self.0.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            symlink(target, path).unwrap();
        }

        fn lock(&self) {
            let node = fs::metadata(self.0.path().join("dev/bus/usb/001/002")).unwrap();
            let (major, minor) = (rustix::fs::major(node.dev()), rustix::fs::minor(node.dev()));
            let line = format!(
                "1: FLOCK  ADVISORY  WRITE 9 {major:02x}:{minor:02x}:{} 0 EOF\n",
                node.ino()
            );
            self.write("proc/locks", &line);
        }

        fn driver(&self, name: &str) {
            self.link("sys/bus/usb/devices/1-1/1-1:1.0/driver", format!("../drivers/{name}"));
        }

        /// QEMU's descriptors can be seen, and the device is not among them.
        fn qemu_without(&self) {
            self.link(&format!("proc/{QEMU}/fd/0"), "/dev/null");
        }

        /// QEMU has a descriptor that this process may not look at.
        fn qemu_unseen(&self) {
            self.link(&format!("proc/{QEMU}/fd/0"), "loop");
            self.link(&format!("proc/{QEMU}/fd/loop"), "loop");
        }

        fn life(&self, opened: Opened) -> Life {
            let device = Device {
                port: "1-1".parse().unwrap(),
                address: "1:2".parse().unwrap(),
                id: "152d:2338".parse().unwrap(),
                hub: false,
            };
            Host::at(self.0.path()).life(&device, Some(QEMU), opened)
        }
    }

    #[test]
    fn what_we_gave_is_alive_while_it_is_locked() {
        let tree = Tree::new();
        assert_eq!(tree.life(Opened::ByUs), Life::Dead);
        tree.driver("usb-storage");
        assert_eq!(tree.life(Opened::ByUs), Life::Dead);
        tree.lock();
        assert_eq!(tree.life(Opened::ByUs), Life::Alive);
    }

    #[test]
    fn a_lock_of_another_vm_is_no_life_of_this_one() {
        let tree = Tree::new();
        tree.lock();
        tree.qemu_without();
        assert_eq!(tree.life(Opened::ByUs), Life::Dead);
    }

    #[test]
    fn what_this_process_may_not_see_is_not_missing() {
        let tree = Tree::new();
        tree.lock();
        tree.qemu_unseen();
        assert_eq!(tree.life(Opened::ByUs), Life::Alive);
    }

    #[test]
    fn a_claim_without_our_lock_is_not_called_dead() {
        let tree = Tree::new();
        tree.driver(CLAIMED);
        assert_eq!(tree.life(Opened::ByUs), Life::Unknown);
    }

    #[test]
    fn a_list_that_leaves_locks_out_tells_of_none() {
        let tree = Tree::new();
        let namespace = tree.0.path().join("proc/self/ns/pid");
        fs::remove_file(&namespace).unwrap();
        symlink("pid:[4026532201]", &namespace).unwrap();
        assert_eq!(tree.life(Opened::ByUs), Life::Unknown);
        tree.lock();
        assert_eq!(tree.life(Opened::ByUs), Life::Alive);
    }

    #[test]
    fn what_qemu_opened_itself_lives_while_its_interfaces_are_claimed() {
        let tree = Tree::new();
        assert_eq!(tree.life(Opened::ByQemu), Life::Unknown);
        tree.driver(CLAIMED);
        assert_eq!(tree.life(Opened::ByQemu), Life::Alive);
        let tree = Tree::new();
        tree.driver("usb-storage");
        assert_eq!(tree.life(Opened::ByQemu), Life::Dead);
    }
}
