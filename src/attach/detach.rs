//! Detaches the leftovers that devices leave in a VM.

use tracing::debug;

use crate::error::Error;
use crate::host::Host;
use crate::presence::{Leftover, presence};
use crate::qemu::{Given, Vm};
use crate::usb::{Address, DeviceId, Port};

/// The result of a detach.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Detached {
    /// It was a leftover, and it was detached.
    Leftover(Leftover),
    /// The VM does not have it.
    NotThere,
    /// The VM has it. It is not a leftover, as far as this can be known.
    Stays,
}

/// Detaches a leftover of a device from a VM, and nothing else. It reads the
/// host's state now. If it is not certain that the object is a leftover, the
/// object stays. If an address is given, only an object for that address is
/// detached, because a newer device may have the same id now.
///
/// # Errors
///
/// The same errors as [`Vm::detach`].
pub async fn detach_leftover(
    host: &Host,
    vm: &mut Vm,
    id: &DeviceId,
    address: Option<Address>,
) -> Result<Detached, Error> {
    if let Some(detached) = detach_if_gone(host, vm, id).await? {
        return Ok(detached);
    }
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

/// Detaches the device of a port that is empty, without a question before it:
/// whatever the VM has for that port is a leftover. Returns `None`, and does
/// nothing, if a device is there or may be there.
///
/// # Errors
///
/// The same errors as [`Vm::detach`].
pub async fn detach_if_gone(
    host: &Host,
    vm: &mut Vm,
    id: &DeviceId,
) -> Result<Option<Detached>, Error> {
    let is_empty = |port: Port| host.has_usb() && matches!(host.device(&port), Ok(None));
    if !id.port().is_some_and(is_empty) {
        return Ok(None);
    }
    let is_detached = vm.detach(id).await?;
    let gone = Detached::Leftover(Leftover::Gone);
    Ok(Some(if is_detached { gone } else { Detached::NotThere }))
}

/// Like [`detach_leftover`], for a caller that has just read what the VM has.
///
/// # Errors
///
/// The same errors as [`Vm::detach`].
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
