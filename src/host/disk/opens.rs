//! Whether somebody has a disk open, for a process that may not look into the
//! others. The kernel counts the users of a driver's module, and each open disk
//! of any of its devices is one (Linux, drivers/scsi/scsi.c, `scsi_device_get`;
//! Documentation/ABI/testing/sysfs-module). It does not tell which disk that
//! is.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use super::stack::Tables;
use super::{Host, Storage};
use crate::host::read_if_there;
use crate::usb::Port;

/// The types of SCSI devices that the drivers `sd` and `sr` make block devices
/// for: disks, and discs of several kinds (Linux,
/// include/scsi/scsi_proto.h; `sd_probe` and `sr_probe` in drivers/scsi/).
const DISKS: [&str; 6] = ["0", "4", "5", "7", "14", "20"];

/// Whether somebody has a disk open that nothing else explains.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Opens {
    /// Nobody has, or it cannot be known.
    #[default]
    None,
    /// Somebody has one of this device, or of another with the same driver.
    Perhaps,
    /// Somebody has one of this device.
    Some,
    /// The kernel, or somebody else who only looks at a disk of this device, may
    /// have it open. Whether others have it is not known until that is over.
    Examined,
}

impl Host {
    /// Whether a disk of the device at a port is open, as far as the counts of
    /// its drivers show. Call it if the tables show no use of these disks.
    pub(super) fn opens(&self, port: &Port, storage: &Storage, tables: &Tables) -> Opens {
        let disks = || storage.disks.iter().chain(&storage.characters);
        let has_disk = |interface: &PathBuf| disks().any(|disk| disk.starts_with(interface));
        let interface = self.interfaces(port).into_iter().find(has_disk);
        let driver = interface.and_then(|interface| interface.join("driver").canonicalize().ok());
        let Some(driver) = driver else { return Opens::None };
        let Some(count) = users(&driver.join("module")).filter(|count| *count > 0) else {
            return Opens::None;
        };
        let others = others(&driver, port);
        let uses = |other: &Port| self.count_uses(&self.storage(other), tables);
        let of_others: usize = others.iter().map(uses).sum();
        // The disks that this process has claimed count, too, and so do those
        // that were pulled while they were mounted.
        let explained = of_others + self.own_disks() + tables.pulled(self);
        // udev opens a disk more than once, and keeps a lock on it meanwhile. It
        // does not lock a disk's character devices. So while it has any events to
        // deal with, it may have one of those open.
        let is_locked = || storage.disks.iter().any(|disk| self.is_locked_at_all(disk));
        match count > explained {
            false => Opens::None,
            true if is_locked() || self.is_new(storage) || self.udev_is_busy() => Opens::Examined,
            true if others.is_empty() => Opens::Some,
            true => Opens::Perhaps,
        }
    }

    /// Whether the kernel or udev has not looked at every disk yet. Both open it
    /// for that. The kernel adds the block device when it knows the disk, and
    /// tells udev when it has read the partitions (Linux, drivers/scsi/sd.c,
    /// `sd_probe`; block/genhd.c, `device_add_disk`).
    pub(super) fn is_new(&self, storage: &Storage) -> bool {
        let waits_for_udev = |disk: &PathBuf| {
            let number = read_if_there(&disk.join("dev")).ok().flatten();
            number.is_some_and(|number| !self.udev_knows_block(number.trim_end()))
        };
        storage.disks.iter().any(waits_for_udev)
            || storage.characters.iter().any(|character| has_no_block_device_yet(character))
    }

    /// How many of these disks and partitions are in use. The kernel opens each
    /// once.
    fn count_uses(&self, storage: &Storage, tables: &Tables) -> usize {
        let is_used = |part: &&PathBuf| {
            self.used_by(part, tables, 0).is_some() || self.lock_on(part).is_some()
        };
        storage.blocks().filter(is_used).count()
    }

    /// How many disks this process has open itself.
    fn own_disks(&self) -> usize {
        let descriptors = fs::read_dir(self.path("/proc/self/fd")).into_iter().flatten().flatten();
        let is_disk = |descriptor: &fs::DirEntry| {
            fs::metadata(descriptor.path()).is_ok_and(|file| file.file_type().is_block_device())
        };
        descriptors.filter(is_disk).count()
    }
}

/// Whether a SCSI device, found by the directory of its character device, is a
/// disk that the kernel has not made a block device for.
fn has_no_block_device_yet(character: &Path) -> bool {
    let Some(lun) = character.ancestors().nth(2) else { return false };
    let kind = read_if_there(&lun.join("type")).ok().flatten();
    let is_disk = kind.is_some_and(|kind| DISKS.contains(&kind.trim_end()));
    is_disk && !lun.join("block").exists()
}

/// How many users a module has besides other modules. `None` if the driver is
/// no module.
fn users(module: &Path) -> Option<usize> {
    let count = read_if_there(&module.join("refcnt")).ok()??;
    let modules = fs::read_dir(module.join("holders")).into_iter().flatten().count();
    Some(count.trim_end().parse::<usize>().ok()?.saturating_sub(modules))
}

/// The ports of the other devices that a driver drives.
fn others(driver: &Path, port: &Port) -> BTreeSet<Port> {
    let entries = fs::read_dir(driver).into_iter().flatten().flatten();
    let of_interface =
        |entry: fs::DirEntry| entry.file_name().to_str()?.split_once(':')?.0.parse::<Port>().ok();
    entries.filter_map(of_interface).filter(|other| other != port).collect()
}
