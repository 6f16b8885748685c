//! The daemon's end, where the devices are to leave with it: a guest that is
//! saved with one inside cannot be restored.

use std::time::Duration;

use tokio::task::JoinSet;
use tracing::{info, warn};

use crate::error::Error;
use crate::qemu::{Vm, VmAddress};
use crate::text::chain;

/// Takes all devices out of the VMs that have an id of this tool's, out of all
/// VMs at the same time. Each VM has `time` for it.
pub async fn detach_all(vms: Vec<(String, VmAddress)>, time: Duration) {
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
