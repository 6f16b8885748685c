//! The ways a disk can be used, their text for messages, and what to do about
//! each.

use std::fmt;

use crate::host::Holder;
use crate::text::escape;
use crate::usb::Port;

/// A disk, or a partition of it, in use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Use {
    /// The device's port.
    pub port: Port,
    /// The disk's or partition's name, `sda1`.
    pub disk: String,
    /// How it is used.
    pub by: UsedBy,
}

/// How a disk is used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum UsedBy {
    /// It is mounted at this mount point.
    Mount(String),
    /// It is mounted at this mount point, in the mount namespace of this
    /// process.
    MountElsewhere(String, Holder),
    /// It is a member of the btrfs that is mounted at this mount point, if that
    /// is known.
    Btrfs(Option<String>),
    /// The host uses it as swap space.
    Swap,
    /// It is a part of another block device.
    Part {
        /// The other block device's name, `dm-0`.
        of: String,
        /// Its kind.
        kind: Kind,
        /// The name that device-mapper has for it, `luks-1`.
        label: Option<String>,
        /// How that block device is used in turn.
        by: Option<Box<UsedBy>>,
    },
    /// It is the cache of a bcache, or the device that a bcache stores a cache
    /// of.
    Bcache {
        /// Whether it is the cache.
        is_cache: bool,
    },
    /// It is a part of the ZFS pool of this name.
    Zfs(String),
    /// This program has it open, if the program can be seen.
    Program(Option<Holder>),
    /// The kernel, udev, or another program that has it locked for a moment, may
    /// be looking at it. Whether others have it open is known only after that.
    Examined,
    /// Something has it open or has claimed it that cannot be found.
    Unknown {
        /// Whether this process could look into all others.
        sees_all: bool,
    },
}

/// Whether the kernel reports when a disk is not used any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Told {
    /// It always reports.
    Always,
    /// It reports in most cases.
    Mostly,
    /// It never reports.
    Never,
}

/// The kind of a block device that is built on others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A loop device (losetup(8)).
    Loop {
        /// Whether the kernel removes it when nothing uses it any more.
        autoclear: bool,
    },
    /// It was opened by cryptsetup(8).
    Crypt,
    /// A logical volume of LVM (lvm(8)).
    Lvm,
    /// Another device of device-mapper (dmsetup(8)).
    Mapper,
    /// An array (md(4)).
    Array,
    /// A bcache.
    Bcache,
    /// Something else.
    Other,
}

impl Kind {
    /// The kind, found by the device's name and by its UUID in device-mapper.
    /// The beginning of the UUID says which program created it (libdevmapper.h,
    /// `dm_tree_node`; Linux, drivers/md/dm-sysfs.c).
    pub(super) fn of(name: &str, uuid: Option<&str>) -> Self {
        match uuid {
            Some(uuid) if uuid.starts_with("CRYPT-") => Kind::Crypt,
            Some(uuid) if uuid.starts_with("LVM-") => Kind::Lvm,
            _ if name.starts_with("dm-") => Kind::Mapper,
            _ if name.starts_with("md") => Kind::Array,
            _ if name.starts_with("bcache") => Kind::Bcache,
            _ => Kind::Other,
        }
    }
}

impl fmt::Display for Use {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Use { port, disk, by } = self;
        let disk = escape(disk);
        match by {
            UsedBy::Program(_) | UsedBy::Examined | UsedBy::Unknown { .. } => {
                write!(f, "{port}: its disk is in use: {disk} is {by}")
            }
            _ => write!(f, "{port}: the host uses its disk: {disk} is {by}"),
        }
    }
}

impl fmt::Display for UsedBy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            UsedBy::Mount(place) => write!(f, "mounted on {}", escape(place)),
            UsedBy::MountElsewhere(place, process) => {
                let place = escape(place);
                write!(f, "mounted on {place} in the mount namespace of {process}")
            }
            UsedBy::Btrfs(Some(place)) => write!(f, "part of the btrfs on {}", escape(place)),
            UsedBy::Btrfs(None) => write!(f, "part of a btrfs that is mounted"),
            UsedBy::Swap => write!(f, "swap space"),
            UsedBy::Part { of, kind, label, by } => {
                match kind {
                    Kind::Loop { .. } => write!(f, "behind the loop device {}", escape(of))?,
                    _ => write!(f, "part of {}", escape(of))?,
                }
                if let Some(label) = label {
                    write!(f, " ({})", escape(label))?;
                }
                match by {
                    Some(by) => write!(f, ", which is {by}"),
                    None => Ok(()),
                }
            }
            UsedBy::Bcache { .. } => write!(f, "part of a bcache"),
            UsedBy::Zfs(pool) => write!(f, "part of the ZFS pool {}", escape(pool)),
            UsedBy::Program(Some(program)) => write!(f, "open in {program}"),
            UsedBy::Program(None) => write!(f, "open in a program that this user may not see"),
            UsedBy::Examined => {
                write!(
                    f,
                    "open, perhaps only for a look by the kernel, by udev, or by a program that has \
                     locked it"
                )
            }
            UsedBy::Unknown { sees_all: true } => {
                write!(f, "claimed, and nothing tells by what (perhaps by a mount in a container)")
            }
            UsedBy::Unknown { sees_all: false } => {
                write!(f, "in use by something that this user may not see")
            }
        }
    }
}

impl Use {
    /// What to do to free the disk: `unmount it`. Without a full stop.
    pub fn advice(&self) -> String {
        self.by.advice(&self.disk).unwrap_or_else(|| "stop what uses it".to_owned())
    }
}

impl UsedBy {
    fn advice(&self, disk: &str) -> Option<String> {
        let disk = escape(disk);
        Some(match self {
            UsedBy::Mount(_) | UsedBy::MountElsewhere(..) | UsedBy::Btrfs(_) => {
                "unmount it".to_owned()
            }
            UsedBy::Swap => format!("`swapoff /dev/{disk}`"),
            UsedBy::Part { of, kind, label, by } => {
                let of = escape(of);
                let label = escape(label.as_deref().unwrap_or(&of)).into_owned();
                let end = match kind {
                    Kind::Loop { autoclear: true } if by.is_some() => None,
                    Kind::Loop { .. } => Some(format!("`losetup --detach /dev/{of}`")),
                    Kind::Crypt => Some(format!("`cryptsetup close {label}`")),
                    Kind::Lvm => Some(format!(
                        "deactivate its volume group (`lvchange -an /dev/mapper/{label}`)"
                    )),
                    Kind::Mapper => Some(format!("`dmsetup remove {label}`")),
                    Kind::Array => Some(format!("stop the array (`mdadm --stop /dev/{of}`)")),
                    Kind::Bcache => {
                        Some(format!("stop the bcache (write 1 to /sys/block/{of}/bcache/stop)"))
                    }
                    Kind::Other => Some(format!("stop what uses {of}")),
                };
                let first = by.as_ref().and_then(|by| by.advice(&of));
                let steps: Vec<String> = first.into_iter().chain(end).collect();
                return (!steps.is_empty()).then(|| steps.join(", then "));
            }
            // Linux, Documentation/admin-guide/bcache.rst
            UsedBy::Bcache { is_cache: true } => format!(
                "unregister the cache (write 1 to /sys/class/block/{disk}/bcache/set/unregister)"
            ),
            UsedBy::Bcache { is_cache: false } => {
                format!("stop the bcache (write 1 to /sys/class/block/{disk}/bcache/stop)")
            }
            UsedBy::Zfs(pool) => format!("`zpool export {}`", escape(pool)),
            UsedBy::Program(Some(program)) => format!("have {program} close it"),
            UsedBy::Program(None) => "close it there".to_owned(),
            UsedBy::Examined => "wait until that is over".to_owned(),
            UsedBy::Unknown { sees_all: true } => return None,
            UsedBy::Unknown { sees_all: false } => {
                "stop what uses it (as root, `usb-qmp-hotplug list` shows what)".to_owned()
            }
        })
    }

    /// Whether a sign of the kernel ([`Signs`]) reports the end of the use,
    /// always or in most cases. A program may have opened the disk through its
    /// own node, and that is not reported.
    ///
    /// [`Signs`]: crate::host::Signs
    pub fn told(&self) -> Told {
        match self {
            UsedBy::Mount(_) | UsedBy::Btrfs(Some(_)) | UsedBy::Swap => Told::Always,
            UsedBy::Program(_) | UsedBy::Unknown { sees_all: false } => Told::Mostly,
            UsedBy::Part { kind: Kind::Loop { .. }, by, .. } => {
                by.as_ref().map_or(Told::Mostly, |by| by.told())
            }
            _ => Told::Never,
        }
    }

    /// The name of the use in JSON documents.
    pub fn word(&self) -> &'static str {
        match self {
            UsedBy::Mount(_) | UsedBy::MountElsewhere(..) => "mount",
            UsedBy::Btrfs(_) => "btrfs",
            UsedBy::Swap => "swap",
            UsedBy::Part { kind: Kind::Loop { .. }, .. } => "loop",
            UsedBy::Part { .. } => "holder",
            UsedBy::Bcache { .. } => "bcache",
            UsedBy::Zfs(_) => "zfs",
            UsedBy::Program(_) => "program",
            UsedBy::Examined => "examined",
            UsedBy::Unknown { .. } => "unknown",
        }
    }

    /// The mount point, the block device that it is part of, or the program
    /// that has it open.
    pub fn what(&self) -> Option<String> {
        match self {
            UsedBy::Mount(place) | UsedBy::MountElsewhere(place, _) => Some(place.clone()),
            UsedBy::Btrfs(place) => place.clone(),
            UsedBy::Part { of, label: Some(label), .. } => Some(format!("{of} ({label})")),
            UsedBy::Part { of, .. } => Some(of.clone()),
            UsedBy::Zfs(pool) => Some(pool.clone()),
            UsedBy::Program(program) => program.as_ref().map(ToString::to_string),
            UsedBy::Swap | UsedBy::Bcache { .. } | UsedBy::Examined | UsedBy::Unknown { .. } => {
                None
            }
        }
    }

    /// The mount point, if the disk is free after it is unmounted.
    pub fn mount(&self) -> Option<&str> {
        match self {
            UsedBy::Mount(place) | UsedBy::Btrfs(Some(place)) => Some(place),
            UsedBy::Part { kind: Kind::Loop { autoclear: true }, by, .. } => by.as_ref()?.mount(),
            _ => None,
        }
    }
}
