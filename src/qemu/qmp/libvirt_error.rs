//! The errors of libvirt, and what they mean (libvirt,
//! include/libvirt/virterror.h).

use std::io;
use std::path::PathBuf;

use super::error::ErrorKind;
use crate::text::escape;

/// Why a domain's monitor cannot be reached through libvirt.
#[derive(Debug, thiserror::Error)]
pub enum LibvirtError {
    /// libvirt does not run.
    #[error(
        "libvirt does not listen at {}; start virtqemud or libvirtd",
        escape(&.socket.to_string_lossy())
    )]
    NotThere {
        /// The last socket that was tried.
        socket: PathBuf,
        /// Whether the domain runs all the same.
        runs: bool,
        /// The system's error.
        source: io::Error,
    },
    /// The user does not exist.
    #[error(
        "there is no such user in /etc/passwd; give the user's number, `libvirt:1000@session/NAME`"
    )]
    NoUser,
    /// libvirt has no such domain.
    #[error("libvirt has no such domain; `virsh list --all` shows what it has")]
    NoDomain,
    /// The domain does not run.
    #[error("the domain is not running; start it with `virsh start`")]
    NotRunning,
    /// This user is not allowed to use it.
    #[error("libvirt does not allow it: {}; do it as root, or join the group libvirt", escape(.0))]
    Forbidden(String),
    /// Another job holds the domain.
    #[error(
        "another job holds the domain (`virsh domjobinfo` says which), or its QEMU is stopped; try again later"
    )]
    Busy,
    /// libvirt cannot pass descriptors.
    #[error(
        "this libvirt cannot pass a device to QEMU: that needs libvirt 8.2; give the domain a second \
         monitor, as the README shows under libvirt"
    )]
    TooOld,
    /// Another process listens where libvirt should.
    #[error("not libvirt but user {uid} listens on its socket; look for what was started there")]
    Stranger {
        /// The user of that process.
        uid: u32,
    },
    /// It failed for another reason.
    #[error("libvirt says: {} (error {code})", escape(.message))]
    Failed {
        /// The error's number.
        code: u32,
        /// libvirt's words.
        message: String,
    },
}

impl LibvirtError {
    /// The meaning of the error that a call returned. The call may have passed
    /// a descriptor, and the domain may be running or not.
    pub(super) fn from_code(
        code: u32,
        message: String,
        passes_descriptor: bool,
        runs: bool,
    ) -> Self {
        match code {
            // VIR_ERR_NO_SUPPORT, VIR_ERR_RPC: there is no such procedure.
            3 | 39 if passes_descriptor => LibvirtError::TooOld,
            42 => LibvirtError::NoDomain,
            // VIR_ERR_OPERATION_INVALID has several causes, and this is one of
            // them.
            55 if !runs || message.contains("not running") => LibvirtError::NotRunning,
            68 => LibvirtError::Busy,
            // VIR_ERR_RPC, VIR_ERR_AUTH_FAILED, VIR_ERR_ACCESS_DENIED,
            // VIR_ERR_AUTH_UNAVAILABLE.
            39 | 45 | 88 | 94 => LibvirtError::Forbidden(message),
            _ => LibvirtError::Failed { code, message },
        }
    }

    /// Whether the error means that the VM does not run.
    pub fn is_not_running(&self) -> bool {
        match self {
            LibvirtError::NotThere { runs, .. } => !runs,
            LibvirtError::NoDomain | LibvirtError::NotRunning => true,
            _ => false,
        }
    }

    /// Whether the reason may pass soon while the domain runs.
    pub fn can_pass(&self) -> bool {
        matches!(self, LibvirtError::NotThere { runs: true, .. } | LibvirtError::Busy)
    }

    /// Whether the VM cannot be reached because it, or libvirt, does not run.
    pub fn is_no_vm(&self) -> bool {
        let no_way = matches!(self, LibvirtError::NotThere { .. } | LibvirtError::NoUser);
        no_way || self.is_not_running()
    }
}

impl From<LibvirtError> for ErrorKind {
    fn from(error: LibvirtError) -> Self {
        ErrorKind::Libvirt(error)
    }
}
