//! A session, and the thread at the other end of it.

use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;
use std::time::Duration;

use usb_qmp_hotplug::Error as ToolError;
use usb_qmp_hotplug::qemu::VmAddress;
use usb_qmp_hotplug::qemu::qmp::{Error, Session};
use usb_qmp_hotplug::text::chain;

/// Time enough for everything that does happen.
pub const ENOUGH: Duration = Duration::from_secs(10);

/// A session with a peer that follows a script. The address decides what is spoken.
pub async fn with_peer<T: Send + 'static>(
    address: &VmAddress,
    time: Duration,
    script: impl FnOnce(UnixStream) -> T + Send + 'static,
) -> (Result<Session, Error>, JoinHandle<T>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    let ours = tokio::net::UnixStream::from_std(ours).unwrap();
    let peer = std::thread::spawn(move || script(theirs));
    (Session::on_stream(ours, address, time).await, peer)
}

/// What a user and a script get of an error: the message, and the exit code.
pub fn outcome(error: Error) -> (String, u8) {
    let error = ToolError::from(error);
    (chain(&error), error.exit_code())
}
