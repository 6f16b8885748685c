//! What is built on a block device: a mount, swap space, or another block
//! device that is used in turn.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use super::mounts::Mount;
use super::{Host, Kind, UsedBy, directories, name, node_of, partitions};
use crate::host::read_if_there;

/// The most block devices that are followed from one to the next.
const MAX_LAYERS: usize = 8;

/// The kernel's tables about all block devices.
#[derive(Debug, Default)]
pub(super) struct Tables {
    mounts: Vec<Mount>,
    /// The nodes of swap space.
    swaps: Vec<String>,
    loops: Vec<Loop>,
    /// The names of the members of each btrfs that is mounted.
    btrfs: Vec<Vec<String>>,
    /// How many parts of device-mapper's devices and of arrays are not there
    /// any more.
    lost: usize,
}

#[derive(Debug)]
struct Loop {
    directory: PathBuf,
    file: String,
    autoclear: bool,
}

impl Tables {
    pub fn read(host: &Host) -> Self {
        let text = |path: &Path| read_if_there(path).ok().flatten().unwrap_or_default();
        // Another mount namespace may have mounts that ours does not have.
        let mut mounts = host.mounts("1");
        mounts.extend(host.mounts("self"));
        // proc(5), `/proc/swaps`.
        let swaps = text(&host.path("/proc/swaps"));
        let swaps = swaps.lines().skip(1).filter_map(|line| line.split_whitespace().next());
        // Linux, drivers/block/loop.c, `loop_attribute_group`.
        let blocks = || fs::read_dir(host.path("/sys/block")).into_iter().flatten().flatten();
        let loops =
            blocks().filter(|entry| entry.file_name().to_string_lossy().starts_with("loop"));
        let a_loop = |entry: fs::DirEntry| {
            let directory = entry.path();
            let file = read_if_there(&directory.join("loop/backing_file")).ok()??;
            let autoclear = text(&directory.join("loop/autoclear")).trim_end() == "1";
            Some(Loop { directory, file: file.trim_end_matches('\n').to_owned(), autoclear })
        };
        // There is a directory for each filesystem, named by its UUID (Linux,
        // fs/btrfs/sysfs.c).
        let filesystems = directories(&host.path("/sys/fs/btrfs"));
        let members = |filesystem: PathBuf| {
            let links = fs::read_dir(filesystem.join("devices")).into_iter().flatten().flatten();
            links.map(|link| link.file_name().to_string_lossy().into_owned()).collect()
        };
        Tables {
            mounts,
            swaps: swaps.map(str::to_owned).collect(),
            loops: loops.filter_map(a_loop).collect(),
            btrfs: filesystems.map(members).collect(),
            lost: blocks().map(|entry| lost_parts(&entry.path())).sum(),
        }
    }

    /// The mount points of a block device, the last mount first.
    fn places<'a>(&'a self, number: &'a str, node: &'a str) -> impl Iterator<Item = &'a str> {
        let mounts = self.mounts.iter().rev().filter(move |mount| mount.is_of(number, node));
        mounts.map(|mount| mount.place.as_str())
    }

    /// How many block devices are in use and not there any more. The kernel
    /// keeps a disk that was pulled for as long as something uses it.
    pub fn pulled(&self, host: &Host) -> usize {
        let is_there = |number: &str| host.path(format!("/sys/dev/block/{number}")).exists();
        // A filesystem with a number of its own has 0 before the colon (Linux,
        // include/linux/kdev_t.h, `UNNAMED_MAJOR`).
        let numbers = self.mounts.iter().map(|mount| mount.number.as_str());
        let mounted = numbers.filter(|number| !number.starts_with("0:") && !is_there(number));
        let swaps = self.swaps.iter().filter(|node| !host.path(node).exists());
        // Linux, fs/d_path.c, `path_with_deleted`
        let loops = self.loops.iter().filter(|found| found.file.ends_with(" (deleted)"));
        mounted.collect::<BTreeSet<_>>().len() + swaps.count() + loops.count() + self.lost
    }

    /// The nodes of all members of the btrfs that a block device belongs to.
    fn members(&self, part: &Path) -> Option<impl Iterator<Item = String>> {
        let its_name = name(part);
        let members = self.btrfs.iter().find(|members| members.contains(&its_name))?;
        Some(members.iter().map(|member| node_of(Path::new(member))))
    }
}

/// How many parts of a device of device-mapper or of an array are not there any
/// more (Linux, block/holder.c).
fn lost_parts(device: &Path) -> usize {
    let its_name = name(device);
    if !its_name.starts_with("dm-") && !its_name.starts_with("md") {
        return 0;
    }
    let parts = fs::read_dir(device.join("slaves")).into_iter().flatten().flatten();
    let parts: Vec<bool> = parts.map(|part| part.path().exists()).collect();
    if parts.is_empty() { 1 } else { parts.iter().filter(|is_there| !**is_there).count() }
}

impl Host {
    /// How a block device is used, found by its directory in sysfs.
    pub(super) fn used_by(&self, part: &Path, tables: &Tables, layer: usize) -> Option<UsedBy> {
        if layer > MAX_LAYERS {
            return None;
        }
        let node = node_of(part);
        let mut holders = fs::read_dir(part.join("holders")).into_iter().flatten().flatten();
        if let Some(holder) = holders.next() {
            let directory = holder.path();
            let text =
                |file| Some(read_if_there(&directory.join(file)).ok()??.trim_end().to_owned());
            let of = holder.file_name().to_string_lossy().into_owned();
            let kind = Kind::of(&of, text("dm/uuid").as_deref());
            let by = self.used_by(&directory, tables, layer + 1).map(Box::new);
            return Some(UsedBy::Part { of, kind, label: text("dm/name"), by });
        }
        if let Some(found) = tables.loops.iter().find(|found| found.file == node) {
            let Loop { directory, autoclear, .. } = found;
            let parts = std::iter::once(directory.clone()).chain(partitions(directory));
            let by = parts.filter_map(|part| self.used_by(&part, tables, layer + 1)).next();
            let kind = Kind::Loop { autoclear: *autoclear };
            return Some(UsedBy::Part {
                of: name(directory),
                kind,
                label: None,
                by: by.map(Box::new),
            });
        }
        let number = read_if_there(&part.join("dev")).ok()??;
        if let Some(place) = tables.places(number.trim_end(), &node).next() {
            return Some(UsedBy::Mount(place.to_owned()));
        }
        if let Some(mut members) = tables.members(part) {
            let place = members.find_map(|node| tables.places("", &node).next().map(str::to_owned));
            return Some(UsedBy::Btrfs(place));
        }
        if tables.swaps.contains(&node) {
            return Some(UsedBy::Swap);
        }
        // bcache has registered the device. What it makes of it has a link of
        // that name (Linux, drivers/md/bcache/super.c, `bch_cached_dev_run`).
        let registered = part.join("bcache");
        if fs::symlink_metadata(&registered).is_ok_and(|its| its.is_dir()) {
            return Some(UsedBy::Bcache { is_cache: registered.join("set").exists() });
        }
        self.zfs_pool(part).map(UsedBy::Zfs)
    }

    /// The imported ZFS pool that a block device belongs to. udev knows its
    /// name (libblkid, `zfs_member`), and ZFS lists the pools that are
    /// imported.
    fn zfs_pool(&self, part: &Path) -> Option<String> {
        let pools = self.path("/proc/spl/kstat/zfs");
        if !pools.exists() {
            return None;
        }
        let device = udev::Device::from_syspath(&part.canonicalize().ok()?).ok()?;
        let property = |name: &str| Some(device.property_value(name)?.to_str()?.to_owned());
        let is_member = property("ID_FS_TYPE")? == "zfs_member";
        let pool = property("ID_FS_LABEL")?;
        let is_name = !pool.contains('/') && !pool.starts_with('.');
        (is_member && is_name && pools.join(&pool).is_dir()).then_some(pool)
    }
}
