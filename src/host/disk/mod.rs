//! The disks of a device, and their users. If the guest and somebody else write
//! to the same disk, its filesystem is destroyed.

mod mounts;
mod opens;
mod programs;
mod stack;
mod unmount;
mod uses;

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;
use tracing::warn;

pub(super) use programs::number_of;
pub use uses::{Kind, Told, Use, UsedBy};

use self::opens::Opens;
use self::stack::Tables;
use super::{Error, Host};
use crate::usb::Port;

/// The most levels between the directory of a device and that of its disk. A
/// USB stick has 6: interface, host, target, LUN, `block`, disk.
const MAX_DEPTH: usize = 12;

/// The directories below a LUN with the character devices of a disk. The
/// drivers `sg`, `st` and `bsg` create them, and they reach the disk without
/// its block device (Linux, drivers/scsi/sg.c, drivers/scsi/st.c, block/bsg.c).
const CHARACTER: [&str; 3] = ["scsi_generic", "scsi_tape", "bsg"];

/// The disks of a device, opened for exclusive use. While this value exists,
/// nothing on the host can mount them.
#[derive(Debug, Default)]
pub struct Claims(Vec<OwnedFd>);

impl Claims {
    /// Whether there is no disk.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// The storage of a device, as directories of sysfs.
#[derive(Debug, Default)]
struct Storage {
    /// Whole disks.
    disks: Vec<PathBuf>,
    /// Their partitions.
    partitions: Vec<PathBuf>,
    /// Their character devices.
    characters: Vec<PathBuf>,
}

impl Storage {
    /// Everything that contains a filesystem or a part of one.
    fn blocks(&self) -> impl Iterator<Item = &PathBuf> {
        self.disks.iter().chain(&self.partitions)
    }

    fn is_empty(&self) -> bool {
        self.disks.is_empty() && self.characters.is_empty()
    }
}

/// How the disks of a device are used.
#[derive(Debug, Default)]
struct Found {
    uses: Vec<Use>,
    /// Whether they are open. It is checked if this process may not look into
    /// all others.
    opens: Opens,
    /// Whether this process could look into all others.
    sees_all: bool,
}

impl Host {
    /// Claims the disks of the device at a port while it is attached to a VM.
    ///
    /// # Errors
    ///
    /// [`Error::InUse`] when something uses one of them.
    pub fn claim_disks(&self, port: &Port) -> Result<Claims, Error> {
        let storage = self.storage(port);
        // Read all tables for all disks before anything else is tried.
        let Found { uses, opens, sees_all } = self.uses_of(port, &storage);
        if let Some(used) = uses.into_iter().next() {
            return Err(Error::InUse(Box::new(used)));
        }
        if opens == Opens::Perhaps {
            warn!(%port, "a program that this user may not see has a disk open: one of the device \
                          at {port}, or another with the same driver");
        }
        let mut claims = Vec::new();
        for disk in &storage.disks {
            // The kernel's own answer covers every mount namespace and every
            // kind of holder. An exclusive open of the whole disk fails with
            // EBUSY while the disk or a partition is in use. Afterwards it
            // keeps others out (open(2), O_EXCL; Linux, block/bdev.c,
            // bd_may_claim).
            let flags = OFlags::EXCL | OFlags::NONBLOCK | OFlags::CLOEXEC;
            let flags = i32::try_from(flags.bits()).unwrap_or_default();
            let node = self.path(node_of(disk));
            match fs::OpenOptions::new().read(true).custom_flags(flags).open(node) {
                Ok(file) => claims.push(file.into()),
                Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
                    // While the kernel reads the partitions, it claims the disk.
                    let unseen = || match self.is_new(&storage) {
                        true => UsedBy::Examined,
                        false => UsedBy::Unknown { sees_all },
                    };
                    let (disk, by) =
                        self.mounted_somewhere(&storage).unwrap_or_else(|| (name(disk), unseen()));
                    return Err(Error::InUse(Box::new(Use { port: port.clone(), disk, by })));
                }
                // There is no medium, no permission or no node. Then the tables
                // above are the only answer.
                Err(_) => {}
            }
        }
        Ok(Claims(claims))
    }

    /// How the disks of the device at a port are used, as far as the kernel's
    /// tables and the other processes show. No disk is opened.
    pub fn uses(&self, port: &Port) -> Vec<Use> {
        self.uses_of(port, &self.storage(port)).uses
    }

    /// The nodes of the disks of the device at a port, and of their partitions.
    pub fn disk_nodes(&self, port: &Port) -> Vec<PathBuf> {
        let storage = self.storage(port);
        storage.blocks().chain(&storage.characters).map(|part| self.path(node_of(part))).collect()
    }

    /// Whether the device at a port has disks, as far as the kernel has found
    /// them.
    pub fn has_disk(&self, port: &Port) -> bool {
        !self.storage(port).is_empty()
    }

    fn uses_of(&self, port: &Port, storage: &Storage) -> Found {
        if storage.is_empty() {
            return Found::default();
        }
        let tables = Tables::read(self);
        let found = |part: &PathBuf| Some((name(part), self.used_by(part, &tables, 0)?));
        let mut found: Vec<(String, UsedBy)> = storage.blocks().filter_map(found).collect();
        // A program that uses the disk through a mount is covered by the mount.
        let (programs, sees_all) = self.programs(storage);
        for (part, program) in programs {
            let is_told = |(told, _): &(String, UsedBy)| *told == part;
            if !found.iter().any(is_told) {
                found.push((part, UsedBy::Program(program)));
            }
        }
        let mut opens = Opens::None;
        if found.is_empty() && !sees_all {
            opens = self.opens(port, storage, &tables);
            let by = match opens {
                Opens::Some => Some(UsedBy::Unknown { sees_all }),
                Opens::Examined => Some(UsedBy::Examined),
                Opens::None | Opens::Perhaps => None,
            };
            if let Some(by) = by {
                let first = storage.disks.first().or_else(|| storage.characters.first());
                let unseen = || Some((name(first?), by));
                found.extend(self.mounted_somewhere(storage).or_else(unseen));
            }
        }
        found.sort_by(|(a, _), (b, _)| a.cmp(b));
        let used = |(disk, by)| Use { port: port.clone(), disk, by };
        Found { uses: found.into_iter().map(used).collect(), opens, sees_all }
    }

    /// The part of a storage that is mounted in another mount namespace, and
    /// where.
    fn mounted_somewhere(&self, storage: &Storage) -> Option<(String, UsedBy)> {
        storage.blocks().find_map(|part| Some((name(part), self.mounted_elsewhere(part)?)))
    }

    /// The storage of the device at a port.
    fn storage(&self, port: &Port) -> Storage {
        let mut storage = Storage::default();
        let mut todo = vec![(self.directory(port), 0)];
        while let Some((directory, depth)) = todo.pop() {
            for child in directories(&directory) {
                let its_name = name(&child);
                if directory.ends_with("block") {
                    storage.partitions.extend(partitions(&child));
                    storage.disks.push(child);
                } else if CHARACTER.iter().any(|kind| directory.ends_with(kind)) {
                    storage.characters.push(child);
                } else if depth < MAX_DEPTH
                    && its_name.parse::<Port>().is_err()
                    && !its_name.starts_with("ep_")
                    && its_name != "power"
                {
                    todo.push((child, depth + 1));
                }
            }
        }
        storage
    }
}

/// The partitions of a block device.
fn partitions(disk: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    directories(disk).filter(|part| part.join("partition").exists())
}

/// The node of a block device, found by its directory: `/dev/sda`. The kernel
/// writes `!` for a `/` in a name (Linux, drivers/base/core.c).
fn node_of(part: &Path) -> String {
    format!("/dev/{}", name(part).replace('!', "/"))
}

/// The directories in a directory. Links are left out.
pub(super) fn directories(path: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())).map(|e| e.path())
}

pub(super) fn name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests;
