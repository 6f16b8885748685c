//! The mount tables (proc(5), `/proc/pid/mountinfo`).

use std::path::Path;

use super::{Host, UsedBy, node_of};
use crate::host::read_if_there;

/// A line of a mount table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Mount {
    /// The number of its filesystem's block device, `8:17`, or the filesystem's
    /// own number.
    pub number: String,
    /// The mount point.
    pub place: String,
    /// The source of the mount, often a node.
    pub source: String,
}

impl Mount {
    /// Reads a mount table in its order. A mount on top of another comes later.
    pub fn table(text: &str) -> Vec<Mount> {
        let mount = |line: &str| {
            let (mount, filesystem) = line.split_once(" - ")?;
            let mut fields = mount.split(' ').skip(2);
            let number = fields.next()?.to_owned();
            let place = unescape_octal(fields.nth(1)?);
            let source = unescape_octal(filesystem.split(' ').nth(1)?);
            Some(Mount { number, place, source })
        };
        text.lines().filter_map(mount).collect()
    }

    /// Whether the mount belongs to a block device. The device number tells it.
    /// If the filesystem has its own number (btrfs), the node tells it.
    pub fn is_of(&self, number: &str, node: &str) -> bool {
        self.number == number || self.source == node
    }
}

impl Host {
    /// The mounts of a process. `self` is this process.
    pub(super) fn mounts(&self, process: &str) -> Vec<Mount> {
        let table = read_if_there(&self.path(format!("/proc/{process}/mountinfo")));
        Mount::table(&table.ok().flatten().unwrap_or_default())
    }

    /// The first process that has mounted a block device in its mount
    /// namespace, and the mount point. Every user may read the tables of all
    /// processes.
    pub(super) fn mounted_elsewhere(&self, part: &Path) -> Option<UsedBy> {
        let number = read_if_there(&part.join("dev")).ok()??;
        let (number, node) = (number.trim_end(), node_of(part));
        self.processes().into_iter().find_map(|pid| {
            let mounts = self.mounts(&pid.to_string());
            let mount = mounts.into_iter().find(|mount| mount.is_of(number, &node))?;
            Some(UsedBy::MountElsewhere(mount.place, self.holder(pid)))
        })
    }
}

/// Decodes a path of a mount table, where a blank is written as `\040`.
fn unescape_octal(path: &str) -> String {
    let mut bytes = Vec::with_capacity(path.len());
    let mut rest = path.as_bytes();
    while let Some((&byte, tail)) = rest.split_first() {
        let octal = tail.get(..3).and_then(|digits| std::str::from_utf8(digits).ok());
        let octal = octal.and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match octal {
            Some(value) if byte == b'\\' => {
                bytes.push(value);
                rest = tail.get(3..).unwrap_or_default();
            }
            _ => {
                bytes.push(byte);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_is_known_by_number_or_node() {
        let table = Mount::table(super::super::tests::MOUNTS);
        let place = |number, node| {
            table.iter().find(|mount| mount.is_of(number, node)).map(|mount| mount.place.as_str())
        };
        assert_eq!(place("8:17", "/dev/sdb1"), Some("/media/my stick"));
        assert_eq!(place("8:32", "/dev/sdc"), Some("/data"));
        assert_eq!(place("8:16", "/dev/sdb"), None);
        assert_eq!(Mount::table("garbage\n - \n1 2 3 - x"), []);
    }
}
