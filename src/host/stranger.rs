//! Locks that are not claims. By default, any user may open a device's node for
//! reading (systemd, rules.d/50-udev-default.rules.in, mode 0664) and lock it.
//! Such a lock would keep a VM from its own device. But a process with read
//! access only cannot use the device (Linux, drivers/usb/core/devio.c,
//! `usbdev_do_ioctl`). A claim of this tool is always a descriptor that is open
//! for writing, too.

use std::fs;
use std::io;

use super::life::is_first_pid_namespace;
use super::{Holder, Host, read_if_there};
use crate::usb::Address;

/// How a process uses a node.
#[derive(Debug, PartialEq, Eq)]
enum Has {
    /// It does nothing that matters here.
    Nothing,
    /// It has the node open for reading, and has locked it.
    Lock,
    /// It has the node open for writing.
    Claim,
}

impl Host {
    /// The processes that have locked the node of the device at an address and
    /// have it open only for reading. This process itself may have it open
    /// once. `None` if any process may have a claim, or if this process may not
    /// see the open files of all others.
    pub fn strangers(&self, address: Address) -> Option<Vec<Holder>> {
        if !is_first_pid_namespace(self) {
            return None;
        }
        let this = i32::try_from(std::process::id()).ok()?;
        let mut strangers = Vec::new();
        for pid in self.processes() {
            let most = usize::from(pid == this);
            let mut claims = 0;
            let mut has_lock = false;
            for has in self.has(pid, address)? {
                match has {
                    Has::Nothing => {}
                    Has::Lock => has_lock = true,
                    Has::Claim => claims += 1,
                }
            }
            if claims > most {
                return None;
            }
            if has_lock {
                strangers.push(self.holder(pid));
            }
        }
        (!strangers.is_empty()).then_some(strangers)
    }

    /// The living processes that took the locks on the node of the device at an
    /// address, if the kernel tells. They may have passed the locks on
    /// (proc(5), `/proc/locks`).
    pub fn lockers(&self, address: Address) -> Vec<Holder> {
        let locks = self.locks(address).unwrap_or_default();
        let mut pids: Vec<i32> = locks.iter().filter_map(|pid| pid.parse().ok()).collect();
        pids.sort_unstable();
        pids.dedup();
        let holders = pids.into_iter().map(|pid| self.holder(pid));
        holders.filter(|holder| !holder.program.is_empty()).collect()
    }

    /// How a process uses a node. `None` if this process may not see that.
    fn has(&self, pid: i32, address: Address) -> Option<Vec<Has>> {
        let directory = self.path(format!("/proc/{pid}"));
        let descriptors = match fs::read_dir(directory.join("fd")) {
            Ok(descriptors) => descriptors,
            // The process has ended.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Some(Vec::new()),
            Err(_) => return None,
        };
        let mut all = Vec::new();
        for descriptor in descriptors.flatten() {
            let file = match fs::metadata(descriptor.path()) {
                Ok(file) => file,
                // It was closed in the meantime, or it is not a file with a
                // name.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(_) => return None,
            };
            if super::proc::address_of(&file) != Some(address) {
                continue;
            }
            let info = directory.join("fdinfo").join(descriptor.file_name());
            all.push(read_if_there(&info).ok()?.map_or(Has::Nothing, |info| has(&info)));
        }
        Some(all)
    }
}

/// What the lines of a descriptor in `/proc/PID/fdinfo` mean (proc(5)).
fn has(info: &str) -> Has {
    let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
    let mode = flags.and_then(|octal| u32::from_str_radix(octal.trim(), 8).ok()).map(|f| f & 0o3);
    let is_locked = info
        .lines()
        .filter_map(|line| line.strip_prefix("lock:"))
        .any(|lock| lock.split_whitespace().nth(1) == Some("FLOCK"));
    match mode {
        Some(0) if is_locked => Has::Lock,
        Some(0) => Has::Nothing,
        // If it cannot be read, it may be a claim of this tool.
        _ => Has::Claim,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_is_a_claim_only_where_the_node_is_open_for_writing() {
        let lock = "lock:\t1: FLOCK  ADVISORY  WRITE 9 00:06:151 0 EOF\n";
        let posix = "lock:\t1: POSIX  ADVISORY  READ 9 00:06:151 0 EOF\n";
        let info =
            |flags: &str, lock: &str| format!("pos:\t0\nflags:\t{flags}\nmnt_id:\t1\n{lock}");
        assert_eq!(has(&info("0100000", lock)), Has::Lock);
        assert_eq!(has(&info("0100000", posix)), Has::Nothing);
        assert_eq!(has(&info("0100000", "")), Has::Nothing);
        assert_eq!(has(&info("02504002", lock)), Has::Claim);
        assert_eq!(has(&info("0100001", "")), Has::Claim);
        assert_eq!(has("what is this"), Has::Claim);
    }
}
