//! The configuration: VMs by name, and rules that say which device belongs to
//! which VM. A file is used only if all of it is correct. Otherwise all
//! mistakes are reported, each with its line and column.

mod check;
mod complaint;
mod section;
mod value;

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use self::complaint::Sink;
pub use self::complaint::{Complaint, Complaints};
use crate::policy::rule::Rule;
use crate::qemu::VmAddress;

/// The path of the configuration if the user gives no other.
pub const DEFAULT_PATH: &str = "/etc/usb-qmp-hotplug.toml";

/// The largest file that is read, in bytes.
const MAX_FILE: usize = 1 << 20;

/// A configuration without mistakes.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Config {
    /// The VMs, in the order of the file. Each name and each address occurs
    /// once.
    pub vms: Vec<VmEntry>,
    /// The rules, in the order of the file. The first rule that matches
    /// decides. A rule that attaches names a VM of `vms`.
    pub rules: Vec<Rule>,
    /// Whether the daemon detaches its devices from the VMs when it ends.
    pub detach_at_stop: bool,
}

/// A VM that has a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmEntry {
    /// Its name: letters, digits, `.`, `_` and `-`, so that it is never a path.
    pub name: String,
    /// Its address. A socket's path is absolute.
    pub address: VmAddress,
}

/// Why the configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file could not be read.
    #[error("cannot read the configuration {}", crate::text::escape(&.path.to_string_lossy()))]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// The file was read, but it has mistakes.
    #[error(transparent)]
    Complaints(#[from] Complaints),
}

impl Config {
    /// Reads a file, which may be a pipe.
    ///
    /// # Errors
    ///
    /// The file cannot be read, has more than 1 MiB, is not UTF-8, or is
    /// refused by [`Config::parse`].
    pub fn read(path: &Path) -> Result<Self, Error> {
        let mut bytes = Vec::new();
        // One byte more than the limit is read, so that a file that is too long
        // is noticed.
        File::open(path)
            .and_then(|file| file.take(MAX_FILE as u64 + 1).read_to_end(&mut bytes))
            .map_err(|source| Error::Io { path: path.to_owned(), source })?;
        let text = String::from_utf8_lossy(&bytes);
        match std::str::from_utf8(&bytes) {
            Err(error) if bytes.len() <= MAX_FILE => {
                let mut sink = Sink::new(&text);
                sink.add(error.valid_up_to(), "not UTF-8; save the file in that encoding".into());
                sink.finish(path)?;
            }
            _ => {}
        }
        Config::parse(path, &text)
    }

    /// Reads a file's text. The path is used only in complaints.
    ///
    /// # Errors
    ///
    /// All mistakes ([`Complaints`]). If the text is not TOML, only that is
    /// reported, because its content can be checked only after that is
    /// corrected.
    pub fn parse(path: &Path, text: &str) -> Result<Self, Error> {
        let mut sink = Sink::new(text);
        let config = if text.len() > MAX_FILE {
            sink.add(0, format!("the file has more than {} MiB", MAX_FILE >> 20));
            Config::default()
        } else {
            check::document(text, &mut sink)
        };
        sink.finish(path)?;
        Ok(config)
    }

    /// The address of the VM of that name.
    pub fn address(&self, name: &str) -> Option<&VmAddress> {
        self.vms.iter().find(|vm| vm.name == name).map(|vm| &vm.address)
    }
}

#[cfg(test)]
mod tests;
