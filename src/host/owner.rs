//! Whether somebody else uses a device: a program that has claimed an interface
//! of it, or a VM that got it without this tool. Neither takes our lock, so the
//! kernel's state is read: if the driver of an interface is `usbfs`, a process
//! has claimed it (Linux, drivers/usb/core/devio.c, `claimintf`).

use std::fmt;
use std::fs;

use super::{Holder, Host, read_if_there};
use crate::usb::{Address, Device, Port};

/// The driver of an interface that a process has claimed (Linux,
/// drivers/usb/core/devio.c, `usbfs_driver`).
pub const CLAIMED: &str = "usbfs";

/// The user of a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Owner {
    /// A VM uses it.
    Vm(Holder),
    /// A program uses it.
    Program(Holder),
    /// One of these processes uses it.
    OneOf(Vec<Holder>),
    /// A process uses it that this process cannot see.
    Unseen,
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Owner::Vm(holder) | Owner::Program(holder) => holder.fmt(f),
            Owner::OneOf(holders) => {
                let shown: Vec<String> = holders.iter().map(ToString::to_string).collect();
                f.write_str(&shown.join(" or "))
            }
            Owner::Unseen => f.write_str("a program or a VM that cannot be seen from here"),
        }
    }
}

impl Owner {
    /// What the user can do to free the device.
    pub fn advice(&self) -> &'static str {
        match self {
            Owner::Vm(_) => "detach it there first, or use `attach --take`",
            Owner::Program(_) | Owner::OneOf(_) => "have it let go of the device, or end it",
            Owner::Unseen => "as root, `usb-qmp-hotplug list` shows who that is",
        }
    }
}

/// How thoroughly to look for an owner.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Look {
    /// Read only what the kernel says about the device: a few links in sysfs.
    #[default]
    Quick,
    /// Check all processes, too. A QEMU whose guest has not configured the
    /// device yet has it open, but has claimed nothing.
    Thorough,
}

impl Host {
    /// The owner of the device, if somebody uses it without our lock. Call it
    /// only while nobody else has the lock.
    pub fn owner(&self, device: &Device, look: Look) -> Option<Owner> {
        let drivers = self.drivers_of(&device.port);
        if drivers.iter().flatten().any(|driver| driver == CLAIMED) {
            return Some(self.claimer(device.address));
        }
        // QEMU unbinds the kernel's drivers before it claims anything (QEMU,
        // hw/usb/host-libusb.c, `usb_host_detach_kernel`).
        let is_bare = drivers.iter().any(Option::is_none);
        if look == Look::Quick || !is_bare {
            return None;
        }
        let mut vms = self.writers(device.address).into_iter();
        vms.find(|pid| self.qemu(*pid).is_some()).map(|pid| Owner::Vm(self.holder(pid)))
    }

    /// Whether no driver of the host is bound to the device at a port. QEMU
    /// unbinds all of them and claims some interfaces for itself.
    pub fn has_no_driver(&self, port: &Port) -> bool {
        self.drivers_of(port).iter().flatten().all(|driver| driver == CLAIMED)
    }

    /// The driver of each interface of the device at a port.
    fn drivers_of(&self, port: &Port) -> Vec<Option<String>> {
        let driver = |interface: std::path::PathBuf| {
            let driver = fs::read_link(interface.join("driver")).ok()?;
            Some(driver.file_name()?.to_string_lossy().into_owned())
        };
        self.interfaces(port).into_iter().map(driver).collect()
    }

    /// Whether the device at a port is authorized (Linux,
    /// Documentation/usb/authorization.rst). If the kernel does not tell, it
    /// is.
    pub fn is_authorized(&self, port: &Port) -> bool {
        self.attribute(port, "authorized").is_none_or(|text| text != "0")
    }

    /// The process that has claimed an interface. It is one of those that have
    /// the node open for writing.
    fn claimer(&self, address: Address) -> Owner {
        let mut pids = self.writers(address);
        let is_vm = |pid: &i32| self.qemu(*pid).is_some();
        if pids.iter().any(is_vm) {
            pids.retain(is_vm);
        }
        let mut holders: Vec<Holder> = pids.iter().map(|pid| self.holder(*pid)).collect();
        match (holders.len(), pids.first()) {
            (1, Some(pid)) if is_vm(pid) => Owner::Vm(holders.remove(0)),
            (1, _) => Owner::Program(holders.remove(0)),
            (0, _) => Owner::Unseen,
            _ => Owner::OneOf(holders),
        }
    }

    /// The other processes that have the node of the device at an address open
    /// for reading and writing. A process with read access only cannot claim
    /// anything (Linux, drivers/usb/core/devio.c, `usbdev_do_ioctl`).
    fn writers(&self, address: Address) -> Vec<i32> {
        let this = i32::try_from(std::process::id()).ok();
        let mut pids = self.processes();
        pids.retain(|pid| Some(*pid) != this && self.writes(*pid, address));
        pids
    }

    fn writes(&self, pid: i32, address: Address) -> bool {
        let nodes = self.open_nodes(pid).unwrap_or_default().into_iter();
        let mut its = nodes.filter(|(_, known)| *known == address);
        its.any(|(descriptor, _)| {
            let info = read_if_there(&self.path(format!("/proc/{pid}/fdinfo/{descriptor}")));
            is_foreign_writer(&info.ok().flatten().unwrap_or_default())
        })
    }
}

/// Whether a descriptor is open for reading and writing and was not passed on
/// by this tool (proc(5), `/proc/pid/fdinfo`). QEMU may keep a descriptor of
/// this tool that it could not use. Only this tool opens nodes with O_NONBLOCK.
fn is_foreign_writer(info: &str) -> bool {
    use rustix::fs::OFlags;
    let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
    let flags = flags.and_then(|octal| u32::from_str_radix(octal.trim(), 8).ok());
    flags
        .map(OFlags::from_bits_retain)
        .is_some_and(|flags| flags.contains(OFlags::RDWR) && !flags.contains(OFlags::NONBLOCK))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_only_reads_and_what_we_left_is_no_owner() {
        let info = |flags: &str| format!("pos:\t0\nflags:\t{flags}\nmnt_id:\t24\n");
        // libusb: O_RDWR | O_CLOEXEC; this tool: O_NONBLOCK and O_NOFOLLOW, too.
        assert!(is_foreign_writer(&info("02100002")));
        assert!(!is_foreign_writer(&info("02100000")));
        assert!(!is_foreign_writer(&info("02504002")));
        assert!(!is_foreign_writer(""));
    }
}
