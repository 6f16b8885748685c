//! Out of a VM with what a device has left there.

use tracing::debug;

use crate::error::Error;
use crate::host::Host;
use crate::presence::{Leftover, presence};
use crate::qemu::{Given, Vm};
use crate::usb::{Address, DeviceId};

/// What came of a detach.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Detached {
    /// It was a leftover, and is not in the VM any more.
    Leftover(Leftover),
    /// The VM does not have it.
    NotThere,
    /// The VM has it, and it is no leftover, as far as can be known.
    Stays,
}

/// Detaches what a device has left in a VM, and only that: the host is looked
/// at now, and what is doubtful stays. Where an address is given, it is only
/// about the device that was there: a newer one may have taken the id since.
///
/// # Errors
///
/// As for [`Vm::detach`].
pub async fn detach_leftover(
    host: &Host,
    vm: &mut Vm,
    id: &DeviceId,
    address: Option<Address>,
) -> Result<Detached, Error> {
    let Some(given) = vm.given(id).await? else {
        vm.drop_descriptors().await?;
        return Ok(Detached::NotThere);
    };
    if address.is_some() && given.address != address {
        debug!(%id, "a newer device has the id");
        return Ok(Detached::NotThere);
    }
    detach_if_left_over(host, vm, id, &given).await
}

/// As [`detach_leftover`], for who has just read what the VM was given.
///
/// # Errors
///
/// As for [`Vm::detach`].
pub async fn detach_if_left_over(
    host: &Host,
    vm: &mut Vm,
    id: &DeviceId,
    given: &Given,
) -> Result<Detached, Error> {
    let presence = presence(host, vm.pid(), Some(id), given).0;
    match presence.leftover() {
        Some(why) if vm.detach(id).await? => Ok(Detached::Leftover(why)),
        Some(_) => Ok(Detached::NotThere),
        None => {
            debug!(%id, ?presence, "it stays");
            Ok(Detached::Stays)
        }
    }
}
