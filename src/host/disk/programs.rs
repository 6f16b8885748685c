//! The programs that have a disk open.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use super::{Host, Storage, name, node_of};
use crate::host::life::is_first_pid_namespace;
use crate::host::{Holder, read_if_there};

/// udev opens every new disk for a moment, and locks one whose partitions it has
/// the kernel read again. The programs that it starts do so, too, as ata_id
/// does. That does not count as a use. These are the names of its program and
/// its processes (systemd, src/udev/).
const UDEV: [&str; 3] = ["systemd-udevd", "(udev-worker)", "udevd"];

impl Host {
    /// The programs that have a part of the storage open, and the part: a disk,
    /// a partition or a character device. Only processes are found that this
    /// process may see. A lock on the node shows that there is another one. Also
    /// returns whether this process could look into all others.
    pub(super) fn programs(&self, storage: &Storage) -> (Vec<(String, Option<Holder>)>, bool) {
        let node = |is_block| {
            move |part: &std::path::PathBuf| Some((is_block, number_of(part)?, name(part)))
        };
        let blocks = storage.blocks().filter_map(node(true));
        let nodes: Vec<(bool, u64, String)> =
            blocks.chain(storage.characters.iter().filter_map(node(false))).collect();
        let (found, sees_all) = self.open_in(&nodes);
        let holders = found.into_iter().map(|(name, pid)| (name, self.holder(pid)));
        // A process without a name has ended in the meantime.
        let lives = |(_, holder): &(String, Holder)| !holder.program.is_empty();
        let holders = holders.filter(lives).map(|(name, holder)| (name, Some(holder)));
        let is_use = |(_, holder): &(String, Option<Holder>)| {
            holder.as_ref().is_none_or(|holder| !self.is_udevs(holder))
        };
        let mut programs: Vec<_> = holders.filter(is_use).collect();
        for part in storage.blocks() {
            let lock = self.lock_on(part).map(|pid| (name(part), pid.map(|pid| self.holder(pid))));
            let is_told = |(told, _): &(String, Option<Holder>)| *told == name(part);
            if !programs.iter().any(is_told) {
                programs.extend(lock.filter(is_use));
            }
        }
        (programs, sees_all)
    }

    /// Whether a process is udev's, or was started by udev to look at a disk. A
    /// rule starts this tool, too, which claims the disk.
    fn is_udevs(&self, holder: &Holder) -> bool {
        let is_udev = |holder: &Holder| UDEV.contains(&holder.program.as_str());
        let parent = || {
            let status =
                read_if_there(&self.path(format!("/proc/{}/status", holder.pid))).ok()??;
            status.lines().find_map(|line| line.strip_prefix("PPid:")?.trim().parse().ok())
        };
        is_udev(holder)
            || !holder.is_this_tool() && parent().is_some_and(|pid| is_udev(&self.holder(pid)))
    }

    /// The processes that have one of these nodes open, by the node's name. For
    /// each node, the input says whether it is a block device, its number and
    /// its name. Also returns whether this process could look into all others.
    pub(in crate::host) fn open_in(
        &self,
        nodes: &[(bool, u64, String)],
    ) -> (BTreeSet<(String, i32)>, bool) {
        let mut found = BTreeSet::new();
        let mut sees_all = is_first_pid_namespace(self) && !self.hides_processes();
        let this = i32::try_from(std::process::id()).ok();
        for pid in self.processes() {
            let descriptors = fs::read_dir(self.path(format!("/proc/{pid}/fd")));
            sees_all &= descriptors.as_ref().err().is_none_or(has_ended);
            for descriptor in descriptors.into_iter().flatten().flatten() {
                let Ok(file) = fs::metadata(descriptor.path()) else {
                    // A filesystem may hide its files from root, too, but they
                    // are no nodes.
                    sees_all &= fs::read_link(descriptor.path())
                        .err()
                        .is_none_or(|error| has_ended(&error));
                    continue;
                };
                let kind = file.file_type();
                if !(kind.is_block_device() || kind.is_char_device()) || Some(pid) == this {
                    continue;
                }
                let is_it = |(is_block, number, _): &&(bool, u64, String)| {
                    *is_block == kind.is_block_device() && *number == file.rdev()
                };
                found.extend(nodes.iter().find(is_it).map(|(_, _, name)| (name.clone(), pid)));
            }
        }
        (found, sees_all)
    }

    /// Whether a program has locked a disk's node, as QEMU does with its drives
    /// (QEMU, block/file-posix.c, `raw_apply_lock_bytes`). It also returns the
    /// process if the kernel tells it (proc(5), `/proc/locks`). A shared lock,
    /// as udev's workers take it, does not count.
    pub(super) fn lock_on(&self, part: &Path) -> Option<Option<i32>> {
        let counts = |(kind, access, _): &(String, String, Option<i32>)| {
            matches!((kind.as_str(), access.as_str()), ("POSIX" | "OFDLCK", _) | ("FLOCK", "WRITE"))
        };
        self.locks_on(part).into_iter().find(counts).map(|(_, _, pid)| pid)
    }

    /// Whether a disk's node is locked in any way.
    pub(super) fn is_locked_at_all(&self, part: &Path) -> bool {
        !self.locks_on(part).is_empty()
    }

    /// The locks on a disk's node: their kinds, their modes and the processes.
    fn locks_on(&self, part: &Path) -> Vec<(String, String, Option<i32>)> {
        let Ok(node) = fs::metadata(self.path(node_of(part))) else { return Vec::new() };
        let (major, minor) = (rustix::fs::major(node.dev()), rustix::fs::minor(node.dev()));
        let file = format!("{major:02x}:{minor:02x}:{}", node.ino());
        let locks = read_if_there(&self.path("/proc/locks")).ok().flatten().unwrap_or_default();
        let lock = |line: &str| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let [_, kind, _, access, pid, place, ..] = fields.as_slice() else { return None };
            let pid = pid.parse().ok().filter(|pid| *pid > 0);
            (*place == file).then(|| ((*kind).to_owned(), (*access).to_owned(), pid))
        };
        locks.lines().filter_map(lock).collect()
    }
}

/// Whether a process cannot be looked into because it has ended, or has closed
/// the file.
fn has_ended(error: &io::Error) -> bool {
    let gone = rustix::io::Errno::SRCH.raw_os_error();
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(gone)
}

/// The number of a block or character device, found by its directory.
pub(in crate::host) fn number_of(part: &Path) -> Option<u64> {
    let text = read_if_there(&part.join("dev")).ok()??;
    let (major, minor) = text.trim_end().split_once(':')?;
    Some(rustix::fs::makedev(major.parse().ok()?, minor.parse().ok()?))
}
