//! The end of the daemon when the devices are to be detached with it. This is
//! for guests that are saved: a guest that was saved with a device in it cannot
//! be restored.

use std::time::Duration;

use tokio::task::JoinSet;
use tracing::{info, warn};

use crate::error::Error;
use crate::qemu::{Vm, VmAddress};
use crate::text::chain;

/// The least time that each VM gets. A machine that shuts down is busy, and
/// there is no later try. systemd waits for longer (systemd-system.conf(5),
/// `DefaultTimeoutStopSec`, 45 s or more).
const LEAST_TIME: Duration = Duration::from_secs(30);

/// Detaches all devices that have an id of this tool, from all VMs at the same
/// time. `timeout` is the time for one conversation at any other moment.
pub async fn detach_all(vms: Vec<(String, VmAddress)>, timeout: Duration) {
    let time = timeout.max(LEAST_TIME);
    let mut running = JoinSet::new();
    for (name, address) in vms {
        running.spawn(async move {
            match detach(&name, &address, time).await {
                Err(Error::Qmp(error)) if error.is_not_running() && !error.is_other_user() => {}
                Err(error) => warn!(vm = name, "{name}: not detached: {}", chain(&error)),
                Ok(()) => {}
            }
        });
    }
    while running.join_next().await.is_some() {}
}

async fn detach(name: &str, address: &VmAddress, time: Duration) -> Result<(), Error> {
    let mut vm = Vm::connect(address, time).await?;
    for (id, _) in vm.host_devices().await? {
        if id.port().is_some() && vm.detach(&id).await? {
            info!(vm = name, %id, "detached {id} from {name}");
        }
    }
    Ok(())
}
