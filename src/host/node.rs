//! Opens, checks and locks a device's node. The open descriptor allows QEMU to
//! use the device, and the lock on it is the claim. The lock belongs to the
//! open file, so it lasts as long as QEMU keeps its copy (flock(2)).

use std::fs::OpenOptions;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;

use rustix::fs::{FileType, FlockOperation, OFlags, flock, fstat, major, minor};

use super::{Error, Holder, Host, USB_DEVICE_MAJOR};
use crate::usb::Address;

/// The result of opening a node.
#[derive(Debug)]
pub enum Node {
    /// Open for reading and writing, and locked.
    Ours(Claim),
    /// Another process has the lock.
    Held,
    /// This process may not open it. QEMU may still be able to.
    NotPermitted,
}

/// An open node and the lock on it. When it is dropped, the lock is released
/// for every copy of the descriptor, also for copies in other processes.
#[derive(Debug)]
pub struct Claim {
    node: OwnedFd,
    is_handed_over: bool,
    strangers: Vec<Holder>,
}

impl Claim {
    /// The open node.
    pub fn node(&self) -> &OwnedFd {
        &self.node
    }

    /// The processes that have locked the node although they have no right to
    /// the device. If there are any, this claim is only the open node, without
    /// a lock.
    pub fn strangers(&self) -> &[Holder] {
        &self.strangers
    }

    /// Whether the device is gone: the kernel has removed its node (Linux,
    /// drivers/base/core.c, `device_del`).
    pub fn is_gone(&self) -> bool {
        fstat(&self.node).is_ok_and(|stat| stat.st_nlink == 0)
    }

    /// Releases the lock for every copy of the descriptor.
    pub fn unlock(&self) {
        // An unlock does not fail. If it did, nothing could be done about it.
        let _ = flock(&self.node, FlockOperation::Unlock);
    }

    /// Leaves the lock to the processes that have copies of the descriptor.
    pub fn hand_over(mut self) {
        self.is_handed_over = true;
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if !self.is_handed_over {
            self.unlock();
        }
    }
}

impl Host {
    /// Opens the node of the device at an address, and locks it.
    ///
    /// # Errors
    ///
    /// [`Error::Gone`] if there is no such node, [`Error::NotTheNode`] if the
    /// path belongs to something else.
    pub fn open(&self, address: Address) -> Result<Node, Error> {
        let path = self.path(address.node());
        let flags = OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
        let flags = i32::try_from(flags.bits()).unwrap_or_default();
        let opened = OpenOptions::new().read(true).write(true).custom_flags(flags).open(&path);
        let node: OwnedFd = match opened {
            Ok(file) => file.into(),
            Err(error) => {
                let gone = [rustix::io::Errno::NODEV, rustix::io::Errno::NXIO];
                return match error.kind() {
                    io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
                        Ok(Node::NotPermitted)
                    }
                    io::ErrorKind::NotFound => Err(Error::Gone(address)),
                    _ if gone.iter().any(|e| error.raw_os_error() == Some(e.raw_os_error())) => {
                        Err(Error::Gone(address))
                    }
                    _ => Err(Error::Read { path, source: error }),
                };
            }
        };
        let stat = fstat(&node)
            .map_err(|error| Error::Read { path: path.clone(), source: error.into() })?;
        let device = (major(stat.st_rdev), minor(stat.st_rdev));
        if FileType::from_raw_mode(stat.st_mode) != FileType::CharacterDevice
            || device != (USB_DEVICE_MAJOR, address.minor())
        {
            return Err(Error::NotTheNode { path, address });
        }
        match flock(&node, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Node::Ours(Claim { node, is_handed_over: false, strangers: Vec::new() })),
            // The node is opened for writing before the other processes are
            // checked. If two processes do this at the same time, at least one
            // sees the other.
            Err(rustix::io::Errno::WOULDBLOCK) => match self.strangers(address) {
                Some(strangers) => Ok(Node::Ours(Claim { node, is_handed_over: false, strangers })),
                None => Ok(Node::Held),
            },
            Err(error) => Err(Error::Read { path, source: error.into() }),
        }
    }
}
