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
    /// The path of a QMP socket.
    Socket(PathBuf),
    /// A domain of libvirt, which passes on what is said to its monitor.
    Libvirt(Domain),
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
            None if text.contains('/') => Ok(Some(VmAddress::Socket(text.into()))),
            None => Ok(None),
        }
    }

    /// The path of the QMP socket, if it is one.
    pub fn socket(&self) -> Option<&Path> {
        match self {
            VmAddress::Socket(path) => Some(path),
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

    /// The file whose appearance tells that the VM starts.
    pub fn start(&self) -> PathBuf {
        match self {
            VmAddress::Socket(path) => path.clone(),
            VmAddress::Libvirt(domain) => domain.pid_file(),
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

impl From<Domain> for VmAddress {
    fn from(domain: Domain) -> Self {
        VmAddress::Libvirt(domain)
    }
}

impl fmt::Display for VmAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            VmAddress::Socket(path) => write!(f, "{}", path.display()),
            VmAddress::Libvirt(domain) => write!(f, "{LIBVIRT}{domain}"),
        }
    }
}

impl Serialize for VmAddress {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}
