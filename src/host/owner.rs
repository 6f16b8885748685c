//! Whether a device is somebody else's: a program's that has claimed an
//! interface of it, or a VM's that got it without this tool. Neither takes our
//! lock, so the kernel is asked: an interface whose driver is `usbfs` is
//! claimed by a process (Linux, drivers/usb/core/devio.c, `claimintf`).

use std::fmt;
use std::fs;

use super::{Holder, Host, read_if_there};
use crate::usb::{Address, Device, Port};

/// The driver of an interface that a process has claimed (Linux,
/// drivers/usb/core/devio.c, `usbfs_driver`).
pub const CLAIMED: &str = "usbfs";

/// Whose a device is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Owner {
    /// A VM's.
    Vm(Holder),
    /// A program's.
    Program(Holder),
    /// That of one of these processes.
    OneOf(Vec<Holder>),
    /// That of a process which cannot be seen from here.
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
    /// What to do so that the device is free.
    pub fn advice(&self) -> &'static str {
        match self {
            Owner::Vm(_) => "detach it there first, or use `attach --take`",
            Owner::Program(_) | Owner::OneOf(_) => "have it let go of the device, or end it",
            Owner::Unseen => "as root, `usb-qmp-hotplug list` shows who that is",
        }
    }
}

/// How well to look for an owner.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Look {
    /// At what the kernel says of the device: a few links in sysfs.
    #[default]
    Quick,
    /// At all processes, too: a QEMU whose guest has not got to the device yet
    /// has it open, and has claimed nothing.
    Thorough,
}

impl Host {
    /// Who has the device, if somebody has that our lock does not tell of.
    /// To be asked while nobody else has the lock.
    pub fn owner(&self, device: &Device, look: Look) -> Option<Owner> {
        let drivers = self.drivers_of(&device.port);
        if drivers.iter().flatten().any(|driver| driver == CLAIMED) {
            return Some(self.claimer(device.address));
        }
        // QEMU takes the kernel's drivers off before it claims anything (QEMU,
        // hw/usb/host-libusb.c, `usb_host_detach_kernel`).
        let is_bare = drivers.iter().any(Option::is_none);
        if look == Look::Quick || !is_bare {
            return None;
        }
        let mut vms = self.writers(device.address).into_iter();
        vms.find(|pid| self.qemu(*pid).is_some()).map(|pid| Owner::Vm(self.holder(pid)))
    }

    /// Whether no driver of the host has the device at a port: QEMU takes them
    /// all off, and claims some interfaces for itself.
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

    /// Whether the kernel lets anybody use the device at a port (Linux,
    /// Documentation/usb/authorization.rst). Where it does not say, it does.
    pub fn is_authorized(&self, port: &Port) -> bool {
        self.attribute(port, "authorized").is_none_or(|text| text != "0")
    }

    /// The process that has claimed an interface: one of those that have the
    /// node open for writing.
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

    /// The processes, apart from this one, that have the node of the device at
    /// an address open for reading and writing; who reads only can claim
    /// nothing (Linux, drivers/usb/core/devio.c, `usbdev_do_ioctl`).
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

/// Whether a descriptor is open for reading and writing, and not one that this
/// tool has passed on (proc(5), `/proc/pid/fdinfo`). QEMU may keep such a one
/// that it could not use; ours alone are opened with O_NONBLOCK.
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
