//! Carries out the decisions. Each port has its own conversation with the VM.

use std::collections::BTreeMap;
use std::time::Duration;

use super::{AtPort, InVm, Step, decide};
use crate::attach::{self, Attached, Detached, Early, Options};
use crate::error::{Error, Until};
use crate::host::{Host, Life, Look, blocking};
use crate::policy::{Assignment, HostDevice, Policy};
use crate::presence::{Leftover, Presence, presence};
use crate::qemu::{Given, Placement, Vm};
use crate::usb::{Device, DeviceId, Port};

/// The settings that are the same for all VMs.
#[derive(Debug, Clone, Copy)]
pub struct Vms<'a> {
    /// The host.
    pub host: &'a Host,
    /// The rules.
    pub policy: &'a Policy,
    /// Change nothing.
    pub dry_run: bool,
    /// How thoroughly to look for another owner of a device.
    pub look: Look,
}

/// What was done at a port. In a dry run, what would be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Done {
    /// There was nothing to do.
    Nothing(Option<InVm>),
    /// The device is in the VM.
    Attached(Device, Attached),
    /// A leftover was detached.
    Detached(Leftover),
}

/// The VM's devices that have the id of a port.
///
/// # Errors
///
/// The same errors as [`Vm::host_devices`].
pub async fn look(vms: Vms<'_>, vm: &mut Vm) -> Result<BTreeMap<Port, InVm>, Error> {
    if !vms.dry_run {
        vm.drop_descriptors().await?;
    }
    let mut found = BTreeMap::new();
    for (id, given) in vm.host_devices().await? {
        if let Some(port) = id.port() {
            found.insert(port, in_vm(vms.host, vm, &id, &given));
        }
    }
    Ok(found)
}

fn in_vm(host: &Host, vm: &Vm, id: &DeviceId, given: &Given) -> InVm {
    let life = match presence(host, vm.pid(), Some(id), given).0 {
        Presence::Alive => Life::Alive,
        Presence::Lost(Leftover::Dead) => Life::Dead,
        // If the device is not at its port any more, the table shows that.
        Presence::Lost(_) | Presence::Unknown => Life::Unknown,
    };
    InVm { address: given.address, life }
}

/// What is known of a port before the VM is asked.
#[derive(Debug, Default)]
pub struct Known<'a> {
    /// The device at the port.
    pub seen: Option<&'a HostDevice>,
    /// The device at the port was handled before.
    pub is_handled: bool,
    /// The device that was at the port last was attached to this QEMU by this
    /// process.
    pub is_given: bool,
    /// The device at the port, if it was opened while the VM was being
    /// connected.
    pub early: Option<Early>,
}

/// Connects to a VM. If the device at a port is to be attached to it, the
/// device is opened meanwhile.
pub async fn connect_for<T>(
    vms: Vms<'_>,
    name: &str,
    seen: Option<&HostDevice>,
    limit: Duration,
    connecting: impl Future<Output = T> + Unpin,
) -> (T, Option<Early>) {
    match seen.map(|seen| (&seen.device, &seen.assignment)) {
        Some((device, Some(assignment))) if assignment.vm == name => {
            let options = options(vms, assignment);
            attach::while_connecting(vms.host, device, &options, limit, connecting).await
        }
        _ => (connecting.await, None),
    }
}

/// Does what is needed at one port for the VM of that name. It attaches the
/// device that is there, or detaches what an earlier device left behind, or
/// does nothing.
///
/// # Errors
///
/// The errors of the attach, of the detach, and of reading the host.
pub async fn port(
    vms: Vms<'_>,
    vm: &mut Vm,
    name: &str,
    port: &Port,
    known: Known<'_>,
) -> Result<Done, Error> {
    let Known { seen, is_handled, is_given, early } = known;
    let at_port = AtPort::of(seen, name);
    let assigned = seen.and_then(|seen| Some((&seen.device, seen.assignment.as_ref()?)));
    // An attach checks for itself which object has the id, and does nothing if
    // it is this device. A question before it would cost a round trip.
    if let (AtPort::Ours(_), Some((device, assignment)), false) = (at_port, assigned, is_handled) {
        return attach(vms, vm, device, assignment, early).await;
    }
    let id = DeviceId::for_port(port);
    if is_given && at_port == AtPort::Empty && !vms.dry_run {
        match attach::detach_if_gone(vms.host, vm, &id).await? {
            Some(Detached::Leftover(why)) => return Ok(Done::Detached(why)),
            Some(_) => return Ok(Done::Nothing(None)),
            None => {}
        }
    }
    let given = vm.given(&id).await?;
    let in_vm = given.map(|given| in_vm(vms.host, vm, &id, &given));
    // The table may be older than the conversation, and an old table must not
    // cause a detach. So the host is read again.
    let leftover = |given: Given| presence(vms.host, vm.pid(), Some(&id), &given).0.leftover();
    match (decide(at_port, in_vm, is_handled), assigned) {
        (Step::Attach, Some((device, assignment))) => {
            attach(vms, vm, device, assignment, early).await
        }
        (Step::Detach(_), _) if vms.dry_run => {
            Ok(given.and_then(leftover).map_or(Done::Nothing(in_vm), Done::Detached))
        }
        (Step::Detach(_), _) => {
            let Some(given) = given else { return Ok(Done::Nothing(None)) };
            match attach::detach_if_left_over(vms.host, vm, &id, &given).await? {
                Detached::Leftover(why) => Ok(Done::Detached(why)),
                Detached::NotThere => Ok(Done::Nothing(None)),
                Detached::Stays => Ok(Done::Nothing(in_vm)),
            }
        }
        (Step::Attach | Step::Nothing, _) => Ok(Done::Nothing(in_vm)),
    }
}

async fn attach(
    vms: Vms<'_>,
    vm: &mut Vm,
    device: &Device,
    assignment: &Assignment,
    mut early: Option<Early>,
) -> Result<Done, Error> {
    let options = options(vms, assignment);
    let uses = Early::uses(&mut early, vms.host, device, &options);
    let attached = attach::attach_opened(vms.host, vm, device, &options, early).await?;
    if matches!(attached, Attached::There(_)) && !options.dry_run {
        attach::tell_uses(&assignment.vm, device, &uses);
    }
    Ok(Done::Attached(device.clone(), attached))
}

/// Unmounts the filesystems of a device if its rule allows it. Returns true if
/// the attach is to be tried again. Call it without a conversation with the VM,
/// because it may take long.
/// # Errors
///
/// The same errors as [`Host::unmount`].
pub async fn unmount(
    vms: Vms<'_>,
    seen: Option<&HostDevice>,
    error: &Error,
) -> Result<bool, Error> {
    let assignment = seen.and_then(|seen| seen.assignment.as_ref());
    let target = assignment.and_then(|assignment| vms.policy.target(assignment));
    let (Some(seen), Some(true)) = (seen, target.map(|target| target.unmount)) else {
        return Ok(false);
    };
    if vms.dry_run || !matches!(error.until(), Some(Until::DisksFree(_))) {
        return Ok(false);
    }
    let (host, port) = (vms.host.clone(), seen.device.port.clone());
    let failed = |source| Error::Setup { what: "unmount on a thread of its own", source };
    let unmounted = blocking(move || host.unmount(&port)).await.map_err(failed)??;
    Ok(!unmounted.is_empty())
}

/// The options of the rule that a device is attached by.
fn options(vms: Vms<'_>, assignment: &Assignment) -> Options {
    let Vms { dry_run, look, policy, .. } = vms;
    let Some(target) = policy.target(assignment) else {
        return Options { dry_run, look, ..Options::default() };
    };
    Options {
        dry_run,
        look,
        placement: Placement { bus: target.guest_bus.clone(), port: target.guest_port.clone() },
        properties: target.options.clone(),
        add_controller: target.add_controller,
        blocking: true,
        ..Options::default()
    }
}
