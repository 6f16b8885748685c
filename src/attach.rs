//! The two operations: a host device into a VM, and out again. Both are safe
//! to repeat, and every command is a trigger for one of them.

use serde_json::{Map, Value};
use tokio::time::{Instant, timeout_at};
use tracing::debug;

use crate::error::Error;
use crate::host::{self, Claims, Host, Look, Node, blocking};
use crate::qemu::qmp::Version;
use crate::qemu::{Access, Attachment, GuestPort, NoGuestPort, Placement, Vm};
use crate::usb::{Address, Device, DeviceId};

/// The first QEMU whose `hostdevice` works (QEMU, hw/usb/host-libusb.c; 5.1
/// has the property, but takes every device for a slow one).
const HOSTDEVICE_SINCE: Version = Version { major: 5, minor: 2, micro: 0 };

/// How QEMU gets at a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Open {
    /// Pass it an open descriptor; where this process may not open the node,
    /// let QEMU open it.
    #[default]
    Descriptor,
    /// Let QEMU look for it by bus and address.
    Address,
}

/// How to attach.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Where in the guest.
    pub placement: Placement,
    /// More properties of usb-host.
    pub properties: Map<String, Value>,
    /// How QEMU gets at the device.
    pub open: Open,
    /// Give the VM a controller if it has no port for the device.
    pub add_controller: bool,
    /// Attach it even if it is in use, or not authorized.
    pub force: bool,
    /// How well to look for somebody else who has it.
    pub look: Look,
    /// Do all but change something.
    pub dry_run: bool,
    /// Open the device on a thread of its own, disk or not: for who has other
    /// VMs to serve while the kernel waits for a device that does not answer.
    pub blocking: bool,
}

/// What came of an attach.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Attached {
    /// It is in the VM now, there.
    There(GuestPort),
    /// It was in the VM before.
    Already,
}

/// Attaches a device to a VM, as the id of its port.
///
/// # Errors
///
/// What must not leave the host is refused; a full VM, one that does not
/// answer and one that says no are errors, too.
pub async fn attach(
    host: &Host,
    vm: &mut Vm,
    device: &Device,
    options: &Options,
) -> Result<Attached, Error> {
    if device.is_hub() {
        return Err(Error::Hub(device.clone()));
    }
    if !options.force && !host.is_authorized(&device.port) {
        return Err(host::Error::NotAuthorized(device.clone()).into());
    }
    let id = DeviceId::for_port(&device.port);
    let speed = host.speed(&device.port);
    let probe = vm.probe(&id, speed, &options.placement).await?;

    // From here to the end of the attach, nobody mounts its disks.
    let (claims, mut node) = open(host, device, options, vm.session().deadline()).await?;
    // An id with the right address is not enough: addresses come round again,
    // and the device may be a new one. What cannot be seen is believed.
    let is_known = probe.present == Some(Some(device.address));
    let is_held = matches!(node, Node::Held);
    let holds = if is_known || is_held { holds(host, vm, device.address) } else { None };
    if is_known && holds.unwrap_or(true) {
        return Ok(Attached::Already);
    }
    if is_held && holds == Some(true) && !options.dry_run {
        // By what it had before, and should have closed.
        vm.drop_descriptors().await?;
        node = host.open(device.address)?;
    }
    let owner = if is_held || options.force { None } else { host.owner(device, options.look) };
    if let Some(owner) = owner {
        let (device, owner) = (device.clone(), Box::new(owner));
        return Err(host::Error::Claimed { device, owner }.into());
    }
    let access = access(host, vm, device, options.open, node)?;
    if probe.present.is_some() && !options.dry_run {
        debug!(%id, "detaching what an earlier device left behind");
        vm.detach(&id).await?;
    }
    let name = vm.name();
    let no_guest_port = |source| Error::NoGuestPort { vm: name.clone(), source };
    let guest_ports = match probe.guest_ports {
        // A bus that was asked for by its name is the user's to make.
        Err(lacks) if options.add_controller && options.placement.bus.is_none() => {
            vm.add_controller(lacks, speed, &options.placement, options.dry_run).await?
        }
        guest_ports => guest_ports,
    };
    let guest_ports = guest_ports.map_err(no_guest_port)?;
    if let (true, Some(guest_port)) = (options.dry_run, guest_ports.first()) {
        return Ok(Attached::There(guest_port.clone()));
    }
    let options = &options.properties;
    let attachment = Attachment { id: &id, address: device.address, options };
    let attached = vm.attach(&attachment, &access, &guest_ports).await;
    drop(claims);
    let refused = attached.as_ref().is_err_and(|error| error.refusal().is_some());
    if let (true, Access::Descriptor(node)) = (refused, &access) {
        // QEMU may keep a copy open that it could not use (QEMU,
        // hw/usb/host-libusb.c, `usb_host_realize`); that must claim nothing.
        host::unlock(node);
    }
    match attached? {
        Some(guest_port) => Ok(Attached::There(guest_port)),
        None => Err(no_guest_port(NoGuestPort::Full(Vec::new()))),
    }
}

/// Claims a device's disks and opens its node. Whoever opens a disk that does
/// not answer waits for it as long as the kernel does, so a thread does that.
async fn open(
    host: &Host,
    device: &Device,
    options: &Options,
    deadline: Instant,
) -> Result<(Claims, Node), Error> {
    let guard = !options.force && (options.blocking || host.has_disk(&device.port));
    let (host, device) = (host.clone(), device.clone());
    let silent = Error::Silent(device.clone());
    let open = move || -> Result<(Claims, Node), Error> {
        let claims = if guard { host.claim_disks(&device.port)? } else { Claims::default() };
        Ok((claims, host.open(device.address)?))
    };
    if !guard && !options.blocking {
        return open();
    }
    match timeout_at(deadline, blocking(open)).await {
        Ok(opened) => opened.map_err(|source| Error::Setup {
            what: "open the device on a thread of its own",
            source,
        })?,
        Err(_) => Err(silent),
    }
}

/// Whether the VM's QEMU holds the node; `None` if that cannot be seen.
fn holds(host: &Host, vm: &Vm, address: Address) -> Option<bool> {
    host.holds(vm.pid()?, address)
}

fn access(
    host: &Host,
    vm: &mut Vm,
    device: &Device,
    open: Open,
    node: Node,
) -> Result<Access, Error> {
    let address = device.address;
    let by_address = open == Open::Address || vm.session().version() < HOSTDEVICE_SINCE;
    match node {
        Node::Held => {
            let device = device.clone();
            if holds(host, vm, address) == Some(true) {
                return Err(Error::StillHeld { vm: vm.name(), device });
            }
            let holders = host.holders(address);
            Err(host::Error::Held { device, holders }.into())
        }
        _ if by_address => Ok(Access::Address),
        Node::Ours(descriptor) => Ok(Access::Descriptor(descriptor)),
        Node::NotPermitted => {
            debug!(%device, "this user may not open the node, QEMU is to open it itself");
            Ok(Access::Node(address.node()))
        }
    }
}

/// Detaches what came from a port, but only if it is the device that was at
/// this address: a newer one may have taken the id since. False if the VM
/// does not have it.
///
/// # Errors
///
/// As for [`Vm::detach`].
pub async fn detach_gone(vm: &mut Vm, id: &DeviceId, address: Address) -> Result<bool, Error> {
    match vm.address_of(id).await? {
        Some(present) if present == address => Ok(vm.detach(id).await?),
        Some(present) => {
            debug!(%id, %present, "a newer device has the id");
            Ok(false)
        }
        None => Ok(false),
    }
}
