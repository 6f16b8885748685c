//! What a connection to QEMU and one to libvirt have in common: how they are
//! made, and how bytes are sent with a descriptor.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::time::{Instant, sleep};

use super::ErrorKind;

/// How long to wait before connecting again while the socket's queue is full:
/// the first time, and at most. The kernel reports no event for that.
const RETRY: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(16));

/// Connects, and tries again while the socket's queue is full. A non-blocking
/// connect returns EAGAIN then (connect(2)).
pub async fn connect(socket: &Path) -> io::Result<UnixStream> {
    let (mut pause, longest) = RETRY;
    let started = Instant::now();
    loop {
        match UnixStream::connect(socket).await {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                sleep(pause).await;
                // After a long wait, a longer pause makes no difference.
                pause = longest.max(started.elapsed() / 64).min(pause * 2);
            }
            done => return done,
        }
    }
}

/// Sends all bytes, and the descriptor with the first of them (unix(7),
/// `SCM_RIGHTS`).
pub async fn send(
    stream: &UnixStream,
    mut bytes: &[u8],
    mut descriptor: Option<&OwnedFd>,
) -> Result<(), ErrorKind> {
    while !bytes.is_empty() {
        let sent = stream.async_io(Interest::WRITABLE, || send_once(stream, bytes, descriptor));
        let sent = sent.await.map_err(|error| ErrorKind::Lost(Some(error)))?;
        bytes = bytes.get(sent..).unwrap_or_default();
        descriptor = None;
    }
    Ok(())
}

/// Sends bytes with one `sendmsg`, without SIGPIPE.
fn send_once(stream: &UnixStream, bytes: &[u8], descriptor: Option<&OwnedFd>) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let rights = descriptor.map(|descriptor| [descriptor.as_fd()]);
    if let Some(rights) = &rights {
        control.push(SendAncillaryMessage::ScmRights(rights));
    }
    let sent =
        rustix::net::sendmsg(stream, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?;
    Ok(sent)
}
