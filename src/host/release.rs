//! Returns a device to the host. A QEMU that is killed leaves the interfaces of
//! its devices without a driver.

use std::fs;
use std::path::PathBuf;

use tracing::{debug, warn};

use super::Host;
use crate::text::escape;
use crate::usb::Port;

impl Host {
    /// Makes the kernel look for drivers for the interfaces of the device at a
    /// port that have none. The names of the interfaces are written to
    /// `drivers_probe` (Linux, Documentation/ABI/testing/sysfs-bus-usb and
    /// drivers/base/bus.c, `drivers_probe_store`).
    pub fn probe_drivers(&self, port: &Port) {
        for interface in self.interfaces(port) {
            if interface.join("driver").exists() {
                continue;
            }
            let name = interface.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let name = escape(&name);
            let probe = self.path("/sys/bus/usb/drivers_probe");
            match fs::write(probe, name.as_bytes()) {
                Ok(()) => debug!(%port, interface = %name, "looked for a driver"),
                // No driver fits it, so it had none before, either.
                Err(error)
                    if error.raw_os_error() == Some(rustix::io::Errno::INVAL.raw_os_error()) => {}
                Err(error) => {
                    warn!(%port, interface = %name, "cannot give it back to its driver: {error}")
                }
            }
        }
    }

    /// The directories of a device's interfaces, `1-1:1.0`.
    pub(super) fn interfaces(&self, port: &Port) -> Vec<PathBuf> {
        let prefix = format!("{port}:");
        let entries = fs::read_dir(self.directory(port)).into_iter().flatten().flatten();
        let of_device = |name: &std::ffi::OsStr| name.to_string_lossy().starts_with(&prefix);
        entries.filter(|entry| of_device(&entry.file_name())).map(|entry| entry.path()).collect()
    }
}
