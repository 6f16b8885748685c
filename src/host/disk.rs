//! The disks of a device, and whether the host uses them. A guest that writes
//! to a mounted disk destroys its filesystem, and so does the host.

use std::fmt;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;

use super::{Error, Host, read_if_there};
use crate::text::escape;
use crate::usb::Port;

/// How deep a disk's directory lies below its device's, at most. A stick's is
/// at 6: interface, host, target, LUN, `block`, disk.
const MAX_DEPTH: usize = 12;

/// A disk, or a partition of it, in use by the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Use {
    /// The device's port.
    pub port: Port,
    /// The disk's or partition's name, `sda1`.
    pub disk: String,
    /// By what.
    pub by: UsedBy,
}

/// What a disk is used by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum UsedBy {
    /// Mounted there.
    Mount(String),
    /// The host swaps to it.
    Swap,
    /// Part of this block device of device-mapper (LVM, LUKS), md or such.
    Holder(String),
    /// Claimed by something that has no name here, a mount in another mount
    /// namespace for instance.
    Unknown,
}

impl fmt::Display for Use {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: the host uses its disk: {} is {}", self.port, escape(&self.disk), self.by)
    }
}

impl fmt::Display for UsedBy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            UsedBy::Mount(place) => write!(f, "mounted on {}", escape(place)),
            UsedBy::Swap => write!(f, "swap space"),
            UsedBy::Holder(holder) => write!(f, "part of {}", escape(holder)),
            UsedBy::Unknown => {
                write!(f, "claimed, perhaps by a mount in a container (another mount namespace)")
            }
        }
    }
}

/// The disks of a device, opened for exclusive use: while this lives, nothing
/// on the host can mount them.
#[derive(Debug, Default)]
pub struct Claims(#[expect(dead_code, reason = "held open, never read")] Vec<OwnedFd>);

/// A whole disk and its partitions, as directories of sysfs.
struct Disk {
    directory: PathBuf,
    partitions: Vec<PathBuf>,
}

impl Host {
    /// Claims the disks of the device at a port for the moment of its attach.
    ///
    /// # Errors
    ///
    /// [`Error::InUse`] when the host uses one of them.
    pub fn claim_disks(&self, port: &Port) -> Result<Claims, Error> {
        let mut claims = Vec::new();
        for disk in self.disks(port) {
            let parts = std::iter::once(&disk.directory).chain(&disk.partitions);
            if let Some((part, by)) =
                parts.filter_map(|part| Some((part, self.used_by(part)?))).next()
            {
                return Err(Error::InUse(Use { port: port.clone(), disk: name(part), by }));
            }
            // The kernel's own answer, for every mount namespace and every
            // kind of holder: an exclusive open of the whole disk fails with
            // EBUSY while it or a partition is in use, and keeps others out
            // afterwards (open(2), O_EXCL; Linux, block/bdev.c, bd_may_claim).
            let flags = OFlags::EXCL | OFlags::NONBLOCK | OFlags::CLOEXEC;
            let flags = i32::try_from(flags.bits()).unwrap_or_default();
            let node = self.path(format!("/dev/{}", name(&disk.directory).replace('!', "/")));
            match fs::OpenOptions::new().read(true).custom_flags(flags).open(node) {
                Ok(file) => claims.push(file.into()),
                Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
                    let disk = name(&disk.directory);
                    return Err(Error::InUse(Use {
                        port: port.clone(),
                        disk,
                        by: UsedBy::Unknown,
                    }));
                }
                // No medium, no right to open it, no node: what the tables
                // above said must do.
                Err(_) => {}
            }
        }
        Ok(Claims(claims))
    }

    /// What the host uses of the disks of the device at a port, as far as the
    /// tables of mounts, swap space and holders say. Opens no disk.
    pub fn uses(&self, port: &Port) -> Vec<Use> {
        let disks = self.disks(port).into_iter();
        let parts = disks.flat_map(|disk| std::iter::once(disk.directory).chain(disk.partitions));
        let in_use = |part: PathBuf| {
            let by = self.used_by(&part)?;
            Some(Use { port: port.clone(), disk: name(&part), by })
        };
        let mut uses: Vec<Use> = parts.filter_map(in_use).collect();
        uses.sort_by(|a, b| a.disk.cmp(&b.disk));
        uses
    }

    /// Whether the device at a port has disks, as far as the kernel has found
    /// them yet.
    pub fn has_disk(&self, port: &Port) -> bool {
        !self.disks(port).is_empty()
    }

    /// The disks of the device at a port.
    fn disks(&self, port: &Port) -> Vec<Disk> {
        let mut disks = Vec::new();
        let mut todo = vec![(self.directory(port), 0)];
        while let Some((directory, depth)) = todo.pop() {
            for child in directories(&directory) {
                let its_name = name(&child);
                if directory.ends_with("block") {
                    let partitions = directories(&child)
                        .filter(|part| part.join("partition").exists())
                        .collect();
                    disks.push(Disk { directory: child, partitions });
                } else if depth < MAX_DEPTH
                    && its_name.parse::<Port>().is_err()
                    && !its_name.starts_with("ep_")
                    && its_name != "power"
                {
                    todo.push((child, depth + 1));
                }
            }
        }
        disks
    }

    fn used_by(&self, part: &Path) -> Option<UsedBy> {
        let mut holders = fs::read_dir(part.join("holders")).into_iter().flatten().flatten();
        if let Some(holder) = holders.next() {
            let label = read_if_there(&holder.path().join("dm/name")).ok().flatten();
            let holder = holder.file_name().to_string_lossy().into_owned();
            return Some(UsedBy::Holder(match label {
                Some(label) => format!("{holder} ({})", label.trim_end()),
                None => holder,
            }));
        }
        let number = read_if_there(&part.join("dev")).ok()??;
        let node = format!("/dev/{}", name(part).replace('!', "/"));
        // A container's view may lack what the host's has, and the reverse.
        let tables = ["/proc/self/mountinfo", "/proc/1/mountinfo"];
        let mounts = tables.iter().filter_map(|table| read_if_there(&self.path(table)).ok()?);
        let place = mounts.filter_map(|table| mount_point(&table, number.trim_end(), &node)).next();
        if let Some(place) = place {
            return Some(UsedBy::Mount(place));
        }
        let swaps = read_if_there(&self.path("/proc/swaps")).ok()??;
        let swapped = swaps.lines().any(|line| line.split_whitespace().next() == Some(&node));
        swapped.then_some(UsedBy::Swap)
    }
}

/// Where a block device is mounted, by its number, or where the filesystem
/// has a number of its own (btrfs), by its node (proc(5), mountinfo).
fn mount_point(mountinfo: &str, number: &str, node: &str) -> Option<String> {
    mountinfo.lines().find_map(|line| {
        let (mount, filesystem) = line.split_once(" - ")?;
        let mut fields = mount.split(' ').skip(2);
        let is_number = fields.next()? == number;
        let place = fields.nth(1)?;
        let is_node = filesystem.split(' ').nth(1) == Some(node);
        (is_number || is_node).then(|| unescape_octal(place))
    })
}

/// A path of a mount table, where blanks are written as `\040`.
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

/// The directories in a directory, links left out.
fn directories(path: &Path) -> impl Iterator<Item = PathBuf> {
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())).map(|e| e.path())
}

fn name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = "\
21 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
40 21 8:17 / /media/my\\040stick rw,nosuid shared:5 - vfat /dev/sdb1 rw
41 21 0:50 / /data rw - btrfs /dev/sdc rw
";

    #[test]
    fn a_mounted_partition_is_found_by_number_or_node() {
        assert_eq!(mount_point(TABLE, "8:17", "/dev/sdb1").as_deref(), Some("/media/my stick"));
        assert_eq!(mount_point(TABLE, "8:32", "/dev/sdc").as_deref(), Some("/data"));
        assert_eq!(mount_point(TABLE, "8:16", "/dev/sdb"), None);
        assert_eq!(mount_point("garbage\n - \n1 2 3 - x", "3", "y"), None);
    }

    /// A tree like the kernel's, with one stick at 1-1 that has one partition.
    fn tree() -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        let disk = root.path().join(
            "sys/bus/usb/devices/1-1/1-1:1.0/host2/target2:0:0/2:0:0:0/block/sdb/sdb1/holders",
        );
        fs::create_dir_all(&disk).unwrap();
        let part = disk.parent().unwrap();
        fs::write(part.join("partition"), "1\n").unwrap();
        fs::write(part.join("dev"), "8:17\n").unwrap();
        fs::write(part.parent().unwrap().join("dev"), "8:16\n").unwrap();
        fs::create_dir_all(root.path().join("proc/self")).unwrap();
        root
    }

    fn used(root: &Path) -> Option<UsedBy> {
        match Host::at(root).claim_disks(&"1-1".parse().unwrap()) {
            Ok(_) => None,
            Err(Error::InUse(used)) => Some(used.by),
            Err(error) => panic!("{error}"),
        }
    }

    #[test]
    fn a_disk_that_nothing_uses_may_go() {
        assert_eq!(used(tree().path()), None);
    }

    #[test]
    fn mounts_swap_and_holders_are_seen() {
        let root = tree();
        fs::write(root.path().join("proc/self/mountinfo"), TABLE).unwrap();
        assert_eq!(used(root.path()), Some(UsedBy::Mount("/media/my stick".into())));
        let uses = Host::at(root.path()).uses(&"1-1".parse().unwrap());
        assert_eq!(uses.len(), 1);
        assert_eq!(
            (&*uses[0].disk, &*uses[0].by.to_string()),
            ("sdb1", "mounted on /media/my stick")
        );

        let root = tree();
        let swaps =
            "Filename\t\t\t\tType\n/dev/sdb1                               partition\t1\t0\n";
        fs::write(root.path().join("proc/swaps"), swaps).unwrap();
        assert_eq!(used(root.path()), Some(UsedBy::Swap));

        let root = tree();
        let part = "sys/bus/usb/devices/1-1/1-1:1.0/host2/target2:0:0/2:0:0:0/block/sdb/sdb1";
        let dm = root.path().join(part).join("holders/dm-0/dm");
        fs::create_dir_all(&dm).unwrap();
        fs::write(dm.join("name"), "luks-1\n").unwrap();
        assert_eq!(used(root.path()), Some(UsedBy::Holder("dm-0 (luks-1)".into())));
    }
}
