//! Signs that somebody may have released a device. The kernel reports mounts,
//! swap space and files that are closed, so no repeated check is needed. A sign
//! arrives a moment before the change itself.

use std::fs::File;
use std::future::{pending, poll_fn};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::pin::Pin;
use std::task::{Context, Poll};

use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::Host;
use super::readable::{readable, urgent};
use crate::usb::{Address, Port};

/// Tables of the kernel that report their changes as a priority event (proc(5),
/// `/proc/pid/mountinfo`; Linux, mm/swapfile.c, `swaps_poll`). Process 1 may
/// have other mounts than a service.
const TABLES: [&str; 3] = ["/proc/self/mountinfo", "/proc/1/mountinfo", "/proc/swaps"];

/// The sources of these signs.
#[derive(Debug, Default)]
pub struct Signs {
    tables: Vec<AsyncFd<OwnedFd>>,
    files: Option<AsyncFd<OwnedFd>>,
}

impl Signs {
    /// The signs for the disks of the device at a port.
    ///
    /// # Errors
    ///
    /// When the system has no free descriptor.
    pub fn of_disks(host: &Host, port: &Port) -> io::Result<Self> {
        let mut tables = Vec::new();
        for table in TABLES {
            // This user may not see all processes.
            if let Ok(table) = File::open(host.path(table)) {
                tables.push(urgent(table.into())?);
            }
        }
        Ok(Signs { tables, files: Some(closes(host.disk_nodes(port))?) })
    }

    /// The signs for the node of the device at an address.
    ///
    /// # Errors
    ///
    /// The same errors as [`Signs::of_disks`].
    pub fn of_node(host: &Host, address: Address) -> io::Result<Self> {
        let files = Some(closes(vec![host.path(address.node())])?);
        Ok(Signs { files, ..Signs::default() })
    }

    /// Waits for the next sign. If there is no source, it waits for ever.
    pub async fn next(&self) {
        let mut waits: Vec<Pin<Box<dyn Future<Output = ()> + '_>>> = Vec::new();
        for table in &self.tables {
            waits.push(Box::pin(table_changed(table)));
        }
        if let Some(files) = &self.files {
            waits.push(Box::pin(file_closed(files)));
        }
        let any = |context: &mut Context<'_>| {
            let is_seen = waits.iter_mut().any(|wait| wait.as_mut().poll(context).is_ready());
            if is_seen { Poll::Ready(()) } else { Poll::Pending }
        };
        poll_fn(any).await;
    }
}

async fn table_changed(table: &AsyncFd<OwnedFd>) {
    match table.ready(Interest::PRIORITY).await {
        Ok(mut ready) => ready.clear_ready(),
        Err(_) => pending().await,
    }
}

async fn file_closed(files: &AsyncFd<OwnedFd>) {
    match files.readable().await {
        Ok(mut ready) => {
            // The content does not matter: any event is a reason to look again.
            let mut space = [MaybeUninit::uninit(); 4096];
            let mut reader = inotify::Reader::new(files.get_ref(), &mut space);
            while reader.next().is_ok() {}
            ready.clear_ready();
        }
        Err(_) => pending().await,
    }
}

/// Reports when any process closes one of these files (inotify(7)).
fn closes(files: Vec<PathBuf>) -> io::Result<AsyncFd<OwnedFd>> {
    let inotify = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
    let flags = WatchFlags::CLOSE_WRITE | WatchFlags::CLOSE_NOWRITE;
    for file in files {
        // The file was closed in the meantime.
        let _ = inotify::add_watch(&inotify, file, flags);
    }
    readable(inotify)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::time::Duration;
    use tokio::time::timeout;

    #[tokio::test]
    async fn a_file_that_is_closed_gives_a_sign_and_others_give_none() {
        let root = tempfile::tempdir().unwrap();
        let node = root.path().join("dev/bus/usb/001/002");
        fs::create_dir_all(node.parent().unwrap()).unwrap();
        fs::write(&node, "").unwrap();
        let host = Host::at(root.path());
        let held = File::open(&node).unwrap();
        let signs = Signs::of_node(&host, "1:2".parse().unwrap()).unwrap();
        fs::write(root.path().join("dev/bus/usb/001/003"), "").unwrap();
        assert!(timeout(Duration::from_millis(50), signs.next()).await.is_err());
        drop(held);
        timeout(Duration::from_secs(10), signs.next()).await.unwrap();
        assert!(timeout(Duration::from_millis(50), signs.next()).await.is_err(), "only once");
    }
}
