//! Waits until a descriptor is readable or has a priority event.

use std::io;
use std::os::fd::OwnedFd;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Makes the runtime report when a descriptor is readable.
///
/// # Errors
///
/// When the kernel cannot poll it.
pub fn readable(descriptor: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    registered(descriptor, Interest::READABLE)
}

/// Makes the runtime report when a descriptor has a priority event.
///
/// # Errors
///
/// When the kernel cannot poll it.
pub fn urgent(descriptor: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    registered(descriptor, Interest::PRIORITY)
}

fn registered(descriptor: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    #[expect(unsafe_code, reason = "tokio has no safe way in for descriptors of other crates")]
    // SAFETY: an OwnedFd is open until it is dropped, and always the same.
    let registered = unsafe { AsyncFd::register_with_interest(descriptor, interest) };
    Ok(registered?)
}
