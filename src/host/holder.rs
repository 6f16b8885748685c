//! Who holds a device: the processes that have its node open.

use std::fmt;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};

use super::{Host, USB_DEVICE_MAJOR, read_if_there};
use crate::text::escape;
use crate::usb::Address;

/// A process that has a device's node open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    /// The process id.
    pub pid: i32,
    /// The VM's name, if the process is a QEMU that was given one (`-name`).
    pub vm: Option<String>,
    /// The program's name (proc(5), `/proc/PID/comm`).
    pub program: String,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(vm) = &self.vm {
            write!(f, "VM {} (process {})", escape(vm), self.pid)
        } else {
            write!(f, "process {} ({})", self.pid, escape(&self.program))
        }
    }
}

impl Host {
    /// The processes that have the node of the device at an address open, as
    /// far as this process may see them.
    pub fn holders(&self, address: Address) -> Vec<Holder> {
        let Ok(processes) = fs::read_dir(self.path("/proc")) else { return Vec::new() };
        let mut holders: Vec<Holder> = processes
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
            .filter(|pid| self.holds(*pid, address) == Some(true))
            .map(|pid| self.holder(pid))
            .collect();
        holders.sort_by_key(|holder| holder.pid);
        holders
    }

    /// Whether a process has the node of the device at an address open;
    /// `None` if this process may not see that.
    pub fn holds(&self, pid: i32, address: Address) -> Option<bool> {
        let descriptors = fs::read_dir(self.path(format!("/proc/{pid}/fd"))).ok()?;
        let rdev = rustix::fs::makedev(USB_DEVICE_MAJOR, address.minor());
        // Following the link looks at the open file itself, in whatever mount
        // namespace it was opened. A node that has no name any more is that of
        // an earlier device, which had the same address.
        let found = descriptors
            .filter_map(|descriptor| fs::metadata(descriptor.ok()?.path()).ok())
            .filter(|file| file.file_type().is_char_device() && file.nlink() > 0)
            .any(|file| file.rdev() == rdev);
        Some(found)
    }

    fn holder(&self, pid: i32) -> Holder {
        let read = |name| {
            let text = read_if_there(&self.path(format!("/proc/{pid}/{name}")));
            text.ok().flatten().unwrap_or_default()
        };
        Holder { pid, vm: vm_name(&read("cmdline")), program: read("comm").trim_end().to_owned() }
    }
}

/// The name that a QEMU's command line gives it: `-name a`, or
/// `-name guest=a,debug-threads=on` (QEMU, qemu-options.hx); a comma in it is
/// doubled.
pub(super) fn vm_name(cmdline: &str) -> Option<String> {
    let mut arguments = cmdline.split('\0');
    arguments.find(|argument| matches!(*argument, "-name" | "--name"))?;
    let options = arguments.next()?.replace(",,", "\0");
    let mut options = options.split(',');
    let first = options.next()?;
    let name = if first.contains('=') { None } else { Some(first) };
    let named = || std::iter::once(first).chain(options).find_map(|o| o.strip_prefix("guest="));
    let name = name.or_else(named)?.replace('\0', ",");
    (!name.is_empty()).then_some(name)
}

#[cfg(test)]
mod tests {
    use super::vm_name;

    #[test]
    fn a_vm_is_known_by_its_name_on_the_command_line() {
        let name = |option: &str| vm_name(&format!("qemu-system-x86_64\0-name\0{option}\0-S\0"));
        assert_eq!(name("win11").as_deref(), Some("win11"));
        assert_eq!(name("win11,debug-threads=on").as_deref(), Some("win11"));
        assert_eq!(name("guest=win11,debug-threads=on").as_deref(), Some("win11"));
        assert_eq!(name("debug-threads=on,guest=a,,b").as_deref(), Some("a,b"));
        assert_eq!(name("debug-threads=on"), None);
        assert_eq!(vm_name("qemu-system-x86_64\0-name"), None);
        assert_eq!(vm_name(""), None);
    }
}
