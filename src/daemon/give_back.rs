//! Returns the devices of a QEMU that has ended to the host's drivers.
//!
//! A device can be in use for a moment longer than QEMU's process lives. A
//! newer QEMU waits for its descriptors with io_uring (QEMU,
//! util/fdmon-io_uring.c). Then the kernel closes them only when one of its own
//! threads has taken the ring apart, some time after the end of the process
//! (Linux, io_uring/io_uring.c, `io_ring_exit_work`). So a device that is in
//! use is tried again.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use tokio::task::spawn_local;
use tokio::time::{Instant, sleep};
use tracing::{debug, info, warn};

use super::shared::Shared;
use crate::host::{CLAIMED, Host, Node, blocking};
use crate::usb::{Address, Port};

/// How long to wait before a device that is in use is tried again: the first
/// time, and at most.
const PAUSE: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(2));

/// How long a device is tried. It takes milliseconds if the host is not very
/// busy. What is in use for longer belongs to another process.
const PATIENCE: Duration = Duration::from_secs(60);

/// Returns devices to the host's drivers. A device that another process has now
/// is left alone. This may wait for the hardware, but not for devices that are
/// in use: they are tried again while the caller goes on.
pub async fn give_back(shared: &Rc<Shared>, given: BTreeMap<Port, Address>) {
    let in_use = try_each(&shared.host, given).await;
    if !in_use.is_empty() {
        spawn_local(try_again(shared.clone(), in_use));
    }
}

async fn try_again(shared: Rc<Shared>, mut in_use: BTreeMap<Port, Address>) {
    let give_up = Instant::now() + PATIENCE;
    let mut pause = PAUSE.0;
    while Instant::now() < give_up {
        sleep(pause).await;
        pause = PAUSE.1.min(pause * 2);
        // A VM that runs gets its devices from its worker.
        in_use.retain(|port, _| !is_awaited(&shared, port));
        in_use = try_each(&shared.host, in_use).await;
        if in_use.is_empty() {
            return;
        }
    }
    for port in in_use.keys() {
        info!(%port, "{port} is still in use and does not go back to the host's drivers");
    }
}

/// Whether the device at a port belongs to a VM that runs.
fn is_awaited(shared: &Shared, port: &Port) -> bool {
    let assignment = shared.assignment(port);
    assignment.is_some_and(|to| shared.status.borrow().get(&to.vm).is_some_and(|vm| vm.running))
}

/// Returns these devices to the host's drivers, except those that are in use.
/// The result is the latter.
async fn try_each(host: &Host, mut given: BTreeMap<Port, Address>) -> BTreeMap<Port, Address> {
    if given.is_empty() {
        return given;
    }
    let host = host.clone();
    let work = move || {
        given.retain(|port, address| !try_one(&host, port, *address));
        given
    };
    blocking(work).await.unwrap_or_else(|error| {
        warn!("cannot give devices back to the host's drivers: {error}; plug them in again");
        BTreeMap::new()
    })
}

/// Returns a device to the host's drivers, unless it is in use. Whether there is
/// nothing more to do.
fn try_one(host: &Host, port: &Port, address: Address) -> bool {
    if !matches!(host.device(port), Ok(Some(device)) if device.address == address) {
        return true;
    }
    let is_free = match host.open(address) {
        // The lock ends before the kernel takes the interfaces from the process
        // (Linux, fs/file_table.c, `__fput`).
        Ok(Node::Ours(_)) => !host.drivers(port).iter().any(|driver| driver == CLAIMED),
        Ok(Node::Held) => false,
        Ok(Node::NotPermitted) | Err(_) => return true,
    };
    if is_free {
        host.probe_drivers(port);
    } else {
        debug!(%port, "{port} is in use still; it goes back to the host's drivers later");
    }
    is_free
}
