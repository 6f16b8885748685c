//! Where a VM's monitor is.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::{Serialize, Serializer};

/// Where a VM's monitor is, and so which VM it is. As text it is what a user
/// writes; that is not escaped.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum VmAddress {
    /// The path of a QMP socket.
    Socket(PathBuf),
}

impl VmAddress {
    /// The path of the QMP socket, if it is one.
    pub fn socket(&self) -> Option<&Path> {
        match self {
            VmAddress::Socket(path) => Some(path),
        }
    }
}

impl From<PathBuf> for VmAddress {
    fn from(socket: PathBuf) -> Self {
        VmAddress::Socket(socket)
    }
}

impl From<&Path> for VmAddress {
    fn from(socket: &Path) -> Self {
        VmAddress::Socket(socket.to_owned())
    }
}

impl fmt::Display for VmAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            VmAddress::Socket(path) => write!(f, "{}", path.display()),
        }
    }
}

impl Serialize for VmAddress {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}
