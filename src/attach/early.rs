//! Opens a device while the VM's monitor is being connected. QEMU needs a
//! moment until it sends its greeting, and what an attach does on the host fits
//! into that moment.

use std::time::Duration;

use tokio::time::{Instant, timeout};

use super::Options;
use super::claim::{Opened, open_once};
use crate::error::Error;
use crate::host::{Host, OtherUse};
use crate::usb::Device;

/// How long a device stays claimed for a monitor that sends no greeting. The
/// client that has the monitor may want this very device, and it waits longer
/// than this for the lock.
const PATIENCE: Duration = Duration::from_millis(200);

/// A device that was opened before the VM's monitor answered.
#[derive(Debug)]
pub struct Early {
    pub(super) opened: Result<Opened, Error>,
    /// What the host uses it for.
    uses: Vec<OtherUse>,
}

impl Early {
    /// What the host uses a device for, as it was read already, or as it is read
    /// now. It is asked for once.
    pub fn uses(
        early: &mut Option<Early>,
        host: &Host,
        device: &Device,
        options: &Options,
    ) -> Vec<OtherUse> {
        match early {
            Some(early) => std::mem::take(&mut early.uses),
            None => host.other_uses(&device.port, options.look),
        }
    }
}

/// Connects to a VM, and opens and claims a device meanwhile. The device is
/// `None` if it must not leave the host, or if the monitor is busy. Then
/// [`super::attach`] opens it later, or refuses it.
pub async fn while_connecting<T>(
    host: &Host,
    device: &Device,
    options: &Options,
    limit: Duration,
    mut connecting: impl Future<Output = T> + Unpin,
) -> (T, Option<Early>) {
    let is_refused = || !options.force && !host.is_authorized(&device.port);
    if options.dry_run || device.is_hub() || is_refused() {
        return (connecting.await, None);
    }
    let opening = async {
        let uses = host.other_uses(&device.port, options.look);
        Early { opened: open_once(host, device, options, Instant::now() + limit).await, uses }
    };
    // The connection goes first, so that QEMU has work.
    let (connected, early) = tokio::join!(biased; timeout(PATIENCE, &mut connecting), opening);
    match connected {
        Ok(connected) => (connected, Some(early)),
        Err(_) => {
            drop(early);
            (connecting.await, None)
        }
    }
}
