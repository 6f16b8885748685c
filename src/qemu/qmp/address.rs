//! The address of a VM's monitor.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::{Serialize, Serializer};

use super::domain::{Domain, NotADomain};

/// The prefix of an address that names a domain of libvirt.
const LIBVIRT: &str = "libvirt:";

/// Where a VM's monitor is. The address also identifies the VM. Its text is
/// what a user writes, and it is not escaped.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum VmAddress {
    /// A QMP socket.
    Socket(Socket),
    /// A domain of libvirt. libvirt passes commands on to its monitor.
    Libvirt(Domain),
}

/// A QMP socket. Two sockets are equal if their paths are equal, whichever user
/// should listen there.
#[derive(Debug, Clone)]
pub struct Socket {
    /// Its path.
    pub path: PathBuf,
    /// The id of the user whose process has to listen there. If it is not set,
    /// any user's process may.
    pub user: Option<u32>,
}

impl std::ops::Deref for Socket {
    type Target = Path;

    fn deref(&self) -> &Path {
        &self.path
    }
}

impl PartialEq for Socket {
    fn eq(&self, other: &Self) -> bool {
        self.path == other.path
    }
}

impl Eq for Socket {}

impl PartialOrd for Socket {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Socket {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.path.cmp(&other.path)
    }
}

impl VmAddress {
    /// Reads an address that a user wrote: `libvirt:NAME`, or the path of a
    /// socket, which contains a `/`. Any other text is a VM's name, and the
    /// result is `None`.
    ///
    /// # Errors
    ///
    /// [`NotADomain`] if the text begins with `libvirt:` but names no domain.
    pub fn read(text: &str) -> Result<Option<Self>, NotADomain> {
        match text.strip_prefix(LIBVIRT) {
            Some(domain) => Ok(Some(VmAddress::Libvirt(domain.parse()?))),
            None if text.contains('/') => Ok(Some(Path::new(text).into())),
            None => Ok(None),
        }
    }

    /// The path of the QMP socket, if it is one.
    pub fn socket(&self) -> Option<&Path> {
        match self {
            VmAddress::Socket(socket) => Some(&socket.path),
            VmAddress::Libvirt(_) => None,
        }
    }

    /// The domain, if it is one of libvirt.
    pub fn domain(&self) -> Option<&Domain> {
        match self {
            VmAddress::Socket(_) => None,
            VmAddress::Libvirt(domain) => Some(domain),
        }
    }

    /// Whether both are the same VM, and the same user has to listen there.
    pub fn is_as_before(&self, before: &VmAddress) -> bool {
        let user = |address: &VmAddress| match address {
            VmAddress::Socket(socket) => socket.user,
            VmAddress::Libvirt(_) => None,
        };
        self == before && user(self) == user(before)
    }

    /// The file that appears when the VM starts.
    pub fn start(&self) -> PathBuf {
        match self {
            VmAddress::Socket(socket) => socket.path.clone(),
            VmAddress::Libvirt(domain) => domain.pid_file(),
        }
    }
}

impl From<PathBuf> for VmAddress {
    fn from(path: PathBuf) -> Self {
        VmAddress::Socket(Socket { path, user: None })
    }
}

impl From<&Path> for VmAddress {
    fn from(path: &Path) -> Self {
        path.to_owned().into()
    }
}

impl From<Domain> for VmAddress {
    fn from(domain: Domain) -> Self {
        VmAddress::Libvirt(domain)
    }
}

impl fmt::Display for VmAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            VmAddress::Socket(socket) => write!(f, "{}", socket.path.display()),
            VmAddress::Libvirt(domain) => write!(f, "{LIBVIRT}{domain}"),
        }
    }
}

impl Serialize for VmAddress {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}
