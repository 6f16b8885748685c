//! Unmounts everything that is mounted from a device. It unmounts cleanly, or
//! it fails.

use std::fs;
use std::io;
use std::process::{Command, Stdio};

use rustix::mount::{UnmountFlags, unmount};
use tracing::info;

use super::{Host, Use};
use crate::host::{Error, read_if_there};
use crate::text::escape;
use crate::usb::Port;

/// The capability to unmount (capabilities(7); Linux,
/// include/uapi/linux/capability.h, `CAP_SYS_ADMIN`).
const CAP_SYS_ADMIN: u32 = 21;

/// How this process can unmount.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Means {
    /// By itself: it has the permission, and it is in the host's mount
    /// namespace.
    Itself,
    /// Through systemd, which has a unit for every mount and stops it when root
    /// asks (systemd.mount(5)).
    Systemd,
    /// It cannot.
    Nothing,
}

impl Host {
    /// Unmounts everything that is mounted from the disks of the device at a
    /// port, and returns the mount points. It unmounts nothing if that would
    /// not free the device, for example because it is used as swap space. This
    /// may take long, because unwritten data is written first.
    ///
    /// # Errors
    ///
    /// [`Error::InUse`] if it is used by something else than mounts, and
    /// [`Error::Unmount`].
    pub fn unmount(&self, port: &Port) -> Result<Vec<String>, Error> {
        let means = self.means();
        let mut unmounted: Vec<String> = Vec::new();
        loop {
            let places = self.mounted(port)?;
            let count = unmounted.len();
            let mut failed = None;
            for place in places {
                match self.unmount_by(means, &place) {
                    Ok(()) => {
                        info!(%port, "unmounted {}", escape(&place));
                        unmounted.push(place);
                    }
                    Err(source) => {
                        failed = Some(Error::Unmount { port: port.clone(), place, source });
                    }
                }
            }
            match failed {
                // It may have been busy because of another mount of the list.
                Some(_) if unmounted.len() > count => {}
                Some(error) => return Err(error),
                None if unmounted.len() > count => {}
                None => return Ok(unmounted),
            }
        }
    }

    /// The mount points of the disks of the device at a port.
    ///
    /// # Errors
    ///
    /// [`Error::InUse`] if it is used by something else than mounts.
    pub fn mounted(&self, port: &Port) -> Result<Vec<String>, Error> {
        let uses = self.uses(port);
        if let Some(used) = uses.iter().find(|used| used.by.mount().is_none()) {
            return Err(Error::InUse(Box::new(used.clone())));
        }
        Ok(uses.iter().filter_map(|Use { by, .. }| by.mount().map(str::to_owned)).collect())
    }

    /// Whether this process is able to unmount the host's mounts.
    pub fn can_unmount(&self) -> bool {
        self.means() != Means::Nothing
    }

    fn means(&self) -> Means {
        let status = read_if_there(&self.path("/proc/self/status")).ok().flatten();
        let namespace = |pid: &str| fs::read_link(self.path(format!("/proc/{pid}/ns/mnt"))).ok();
        let is_hosts = namespace("1").is_some_and(|hosts| namespace("self") == Some(hosts));
        if is_hosts && has_capability(&status.unwrap_or_default(), CAP_SYS_ADMIN) {
            Means::Itself
        } else if rustix::process::geteuid().is_root() && self.path("/run/systemd/system").is_dir()
        {
            // sd_booted(3)
            Means::Systemd
        } else {
            Means::Nothing
        }
    }

    fn unmount_by(&self, means: Means, place: &str) -> io::Result<()> {
        match means {
            // Not a lazy unmount, and symbolic links are not followed
            // (umount2(2)).
            Means::Itself => Ok(unmount(self.path(place), UnmountFlags::NOFOLLOW)?),
            Means::Systemd => {
                let mut command = Command::new("systemctl");
                command.args(["stop", "--no-ask-password", "--", place]).stdin(Stdio::null());
                let output = command.output()?;
                let said = String::from_utf8_lossy(&output.stderr);
                let said = said.lines().next().unwrap_or("systemctl failed").to_owned();
                if output.status.success() { Ok(()) } else { Err(io::Error::other(said)) }
            }
            Means::Nothing => Err(rustix::io::Errno::PERM.into()),
        }
    }
}

/// Whether a process has a capability (proc(5), `/proc/pid/status`, `CapEff`).
fn has_capability(status: &str, number: u32) -> bool {
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let effective = effective.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok());
    effective.is_some_and(|set| (set >> number) & 1 == 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_units_capability_is_not_the_one_to_unmount() {
        assert!(has_capability("CapPrm:\t0\nCapEff:\t000001ffffffffff\n", CAP_SYS_ADMIN));
        assert!(!has_capability("CapEff:\t0000000000000002\n", CAP_SYS_ADMIN));
        assert!(!has_capability("", CAP_SYS_ADMIN));
    }
}
