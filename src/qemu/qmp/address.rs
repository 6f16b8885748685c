//! Where a VM is.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::{Serialize, Serializer};

use super::domain::{Domain, NotADomain};

/// What a domain's name begins with where a VM is written.
const LIBVIRT: &str = "libvirt:";

/// Where a VM's monitor is, and so which VM it is. As text it is what a user
/// writes; that is not escaped.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum VmAddress {
    /// A QMP socket.
    Socket(Socket),
    /// A domain of libvirt, which passes on what is said to its monitor.
    Libvirt(Domain),
}

/// A QMP socket, which is what its path says, whoever should listen there.
#[derive(Debug, Clone)]
pub struct Socket {
    /// Its path.
    pub path: PathBuf,
    /// The id of the user whose process must listen there; if not set, anybody's
    /// may.
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
    /// What a user wrote, if it says by itself where the VM is: `libvirt:NAME`,
    /// or the path of a socket, which has a `/`. Any other text is a name.
    ///
    /// # Errors
    ///
    /// [`NotADomain`] for what begins with `libvirt:` and names no domain.
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

    /// Whether it is the same VM, and the same user must listen there.
    pub fn is_as_before(&self, before: &VmAddress) -> bool {
        let user = |address: &VmAddress| match address {
            VmAddress::Socket(socket) => socket.user,
            VmAddress::Libvirt(_) => None,
        };
        self == before && user(self) == user(before)
    }

    /// The file whose appearance tells that the VM starts.
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
