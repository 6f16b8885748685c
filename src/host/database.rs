//! udev's database: a file for each device, which udev writes when its rules
//! are done (systemd, src/libsystemd/sd-device/device-private.c,
//! `device_update_db`). udev's own events say the same, but they stay within
//! its network namespace.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;

use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use tokio::io::unix::AsyncFd;

use super::readable::readable;
use super::{Host, USB_DEVICE_MAJOR};
use crate::usb::Address;

/// The directory of the database (systemd,
/// src/libsystemd/sd-device/device-private.c).
const DATABASE: &str = "/run/udev/data";

/// A file that exists as long as udev has events to deal with.
const QUEUE: &str = "/run/udev/queue";

/// Reports the devices that udev has written about.
#[derive(Debug)]
pub struct Database(AsyncFd<OwnedFd>);

/// What udev wrote.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Written {
    /// The USB devices that it wrote about.
    pub devices: Vec<Address>,
    /// Whether more was written than the kernel has kept.
    pub lost: bool,
}

impl Database {
    /// Watches the database. Everything that is written from now on is
    /// reported.
    ///
    /// # Errors
    ///
    /// When there is no database.
    pub fn watch(host: &Host) -> io::Result<Self> {
        let inotify = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        // udev writes a file under another name first.
        let flags = WatchFlags::MOVED_TO | WatchFlags::ONLYDIR;
        inotify::add_watch(&inotify, host.path(DATABASE), flags)?;
        Ok(Database(readable(inotify)?))
    }

    /// Waits for what udev writes. It may be about no USB device.
    ///
    /// # Errors
    ///
    /// When the kernel cannot tell.
    pub async fn next(&self) -> io::Result<Written> {
        let mut ready = self.0.readable().await?;
        let mut written = Written::default();
        let mut space = [MaybeUninit::uninit(); 4096];
        let mut reader = inotify::Reader::new(self.0.get_ref(), &mut space);
        while let Ok(event) = reader.next() {
            written.lost |= event.events().contains(ReadFlags::QUEUE_OVERFLOW);
            let name = event.file_name().and_then(|name| name.to_str().ok());
            written.devices.extend(name.and_then(address));
        }
        ready.clear_ready();
        Ok(written)
    }
}

impl Host {
    /// Whether udev has events to deal with (systemd, src/udev/udevd.c,
    /// `event_queue_insert`).
    pub(super) fn udev_is_busy(&self) -> bool {
        self.path(QUEUE).exists()
    }

    /// Whether udev has looked at the block device of this number (`8:0`), or
    /// keeps no database here.
    pub(super) fn udev_knows_block(&self, number: &str) -> bool {
        let directory = self.path(DATABASE);
        directory.join(format!("b{number}")).exists() || !directory.exists()
    }
}

/// The device that a file is about. Its name is the number of the device's
/// node: `c189:5`.
fn address(name: &str) -> Option<Address> {
    let (major, minor) = name.strip_prefix('c')?.split_once(':')?;
    let is_usb = major.parse() == Ok(USB_DEVICE_MAJOR);
    if is_usb { Address::from_minor(minor.parse().ok()?) } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::time::Duration;
    use tokio::time::timeout;

    #[tokio::test]
    async fn what_udev_writes_is_reported() {
        let root = tempfile::tempdir().unwrap();
        let host = Host::at(root.path());
        assert!(Database::watch(&host).is_err());
        let directory = root.path().join("run/udev/data");
        fs::create_dir_all(&directory).unwrap();
        let database = Database::watch(&host).unwrap();
        for name in ["c189:5", "c189:130", "b8:0", "n2", "+usb:1-1:1.0", "c1:5"] {
            let part = directory.join(".#part");
            fs::write(&part, "").unwrap();
            fs::rename(part, directory.join(name)).unwrap();
        }
        let written = database.next().await.unwrap();
        let devices: Vec<String> = written.devices.iter().map(ToString::to_string).collect();
        assert_eq!((devices, written.lost), (vec!["1:6".into(), "2:3".into()], false));
        assert!(timeout(Duration::from_millis(50), database.next()).await.is_err());
    }
}
