//! Finds the processes that have a device's node open.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};

use super::cmdline::CommandLine;
use crate::host::{Host, USB_DEVICE_MAJOR, read_if_there};
use crate::text::escape;
use crate::usb::Address;

/// A process that has a device's node open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    /// The process id.
    pub pid: i32,
    /// The VM's name, if the process is a QEMU that was given one (`-name`).
    pub vm: Option<String>,
    /// The program's name (proc(5), `/proc/PID/comm`).
    pub program: String,
}

impl Holder {
    /// Whether the process is this tool. This tool gives a device back soon.
    pub fn is_this_tool(&self) -> bool {
        self.program == env!("CARGO_PKG_NAME")
    }
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(vm) = &self.vm {
            write!(f, "VM {} (process {})", escape(vm), self.pid)
        } else {
            write!(f, "process {} ({})", self.pid, escape(&self.program))
        }
    }
}

impl Host {
    /// The processes that have the node of the device at an address open, as
    /// far as this process may see them.
    pub fn holders(&self, address: Address) -> Vec<Holder> {
        let mut pids = self.processes();
        pids.retain(|pid| self.holds(*pid, address) == Some(true));
        pids.into_iter().map(|pid| self.holder(pid)).collect()
    }

    /// The processes that have USB nodes open, by the device's address, as far
    /// as this process may see them. It reads `/proc` once for all devices.
    pub fn all_holders(&self) -> BTreeMap<Address, Vec<Holder>> {
        let mut holders: BTreeMap<Address, Vec<Holder>> = BTreeMap::new();
        for pid in self.processes() {
            let nodes = self.open_nodes(pid).unwrap_or_default().into_iter();
            let mut held: Vec<Address> = nodes.map(|(_, address)| address).collect();
            held.sort_unstable();
            held.dedup();
            for address in held {
                holders.entry(address).or_default().push(self.holder(pid));
            }
        }
        holders
    }

    /// The USB nodes that a process has open: its descriptors and the addresses
    /// of the devices. `None` if this process may not see them.
    pub(in crate::host) fn open_nodes(&self, pid: i32) -> Option<Vec<(u32, Address)>> {
        let descriptors = fs::read_dir(self.path(format!("/proc/{pid}/fd"))).ok()?;
        let node = |descriptor: fs::DirEntry| {
            let number = descriptor.file_name().to_str()?.parse().ok()?;
            let file = fs::metadata(descriptor.path()).ok()?;
            Some((number, address_of(&file)?))
        };
        Some(descriptors.flatten().filter_map(node).collect())
    }

    /// The ids of all processes that this process may see.
    pub(in crate::host) fn processes(&self) -> Vec<i32> {
        let entries = fs::read_dir(self.path("/proc")).into_iter().flatten().flatten();
        let mut pids: Vec<i32> =
            entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
        pids.sort_unstable();
        pids
    }

    /// Whether a process has the node of the device at an address open. `None`
    /// if this process may not see everything that the other has open. The
    /// right to list the descriptors of a process is not enough to read them
    /// (proc(5), `/proc/PID/fd`).
    pub fn holds(&self, pid: i32, address: Address) -> Option<bool> {
        let mut sees_all = true;
        for descriptor in fs::read_dir(self.path(format!("/proc/{pid}/fd"))).ok()? {
            // The link is followed to the open file itself, in whatever mount
            // namespace it was opened.
            match descriptor.and_then(|descriptor| fs::metadata(descriptor.path())) {
                Ok(file) if address_of(&file) == Some(address) => return Some(true),
                // The descriptor may have been closed in the meantime.
                Err(error) if error.kind() != io::ErrorKind::NotFound => sees_all = false,
                _ => {}
            }
        }
        sees_all.then_some(false)
    }

    /// The facts about a process that messages show.
    pub fn holder(&self, pid: i32) -> Holder {
        let read = |name| {
            let text = read_if_there(&self.path(format!("/proc/{pid}/{name}")));
            text.ok().flatten().unwrap_or_default()
        };
        let vm = CommandLine::parse(read("cmdline").split('\0'), |_| None).name;
        Holder { pid, vm, program: read("comm").trim_end().to_owned() }
    }
}

/// The address of the device that a node belongs to. A node that has been
/// removed belongs to an earlier device, which may have had the same address.
pub(in crate::host) fn address_of(file: &fs::Metadata) -> Option<Address> {
    let (major, minor) = (rustix::fs::major(file.rdev()), rustix::fs::minor(file.rdev()));
    let is_node =
        file.file_type().is_char_device() && file.nlink() > 0 && major == USB_DEVICE_MAJOR;
    if is_node { Address::from_minor(minor) } else { None }
}
