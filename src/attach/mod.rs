//! The two operations: attach a host device to a VM, and detach it. Both are
//! safe to repeat, and every command leads to one of them.

mod claim;
mod detach;
mod early;

use serde_json::{Map, Value};
use tracing::{debug, info, warn};

use self::claim::{Opened, may_pass};
use crate::error::Error;
use crate::host::uses::listed;
use crate::host::{self, Claim, Host, Look, Node, OtherUse};
use crate::passed;
use crate::presence::presence;
use crate::qemu::qmp::Version;
use crate::qemu::{
    Access, Attachment, Given, GuestPort, NoGuestPort, Placement, Probe, Status, Vm, is_misplaced,
};
use crate::text::escape;
use crate::usb::{Device, DeviceId};

pub use self::detach::{Detached, detach_if_gone, detach_if_left_over, detach_leftover};
pub use self::early::{Early, while_connecting};

/// The first QEMU whose `hostdevice` works (QEMU, hw/usb/host-libusb.c). QEMU
/// 5.1 has the property, but it treats every device as a slow one.
const HOSTDEVICE_SINCE: Version = Version { major: 5, minor: 2, micro: 0 };

/// How QEMU opens a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Open {
    /// Pass an open descriptor to QEMU. If this process may not open the node,
    /// QEMU opens it.
    #[default]
    Descriptor,
    /// QEMU looks for the device by its bus and address.
    Address,
}

/// How to attach.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// The bus and the port in the guest.
    pub placement: Placement,
    /// More properties of usb-host.
    pub properties: Map<String, Value>,
    /// How QEMU opens the device.
    pub open: Open,
    /// Give the VM a controller if it has no port for the device.
    pub add_controller: bool,
    /// Attach it even if it is in use, or not authorized.
    pub force: bool,
    /// How thoroughly to look for another owner of the device.
    pub look: Look,
    /// Check everything, but change, claim and lock nothing.
    pub dry_run: bool,
    /// Open the device on its own thread, whether it has a disk or not. Then
    /// the deadline holds even if drivers start for the device or it does not
    /// answer.
    pub blocking: bool,
}

/// The result of an attach.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Attached {
    /// It was attached at this port.
    There(GuestPort),
    /// The VM has had it already.
    Already,
    /// The VM has had it already, under this name: an id, or a path in QEMU's
    /// object tree.
    Otherwise(String),
}

/// Logs what the host used a device for that a VM has now. A user whose host
/// lost its network because of a rule can find the reason there.
pub fn tell_uses(vm: &str, device: &Device, uses: &[OtherUse]) {
    let Some(shown) = listed(uses) else { return };
    let (vm, port) = (escape(vm), &device.port);
    if uses.iter().any(|used| matches!(used, OtherUse::DefaultRoute(_))) {
        warn!(%vm, %port, "{device} was in use on this host when {vm} got it: {shown}");
    } else {
        info!(%vm, %port, "{device} was in use on this host when {vm} got it: {shown}");
    }
}

/// Attaches a device to a VM, with the id of its port. If the VM's layout is
/// known from an earlier conversation, the device is sent to QEMU without a
/// question before it. QEMU is asked only if it refuses the device at the port
/// that should be free.
///
/// # Errors
///
/// A device that must not leave the host is refused. There is also an error if
/// the VM has no port, does not answer, or refuses.
pub async fn attach(
    host: &Host,
    vm: &mut Vm,
    device: &Device,
    options: &Options,
) -> Result<Attached, Error> {
    attach_opened(host, vm, device, options, None).await
}

/// Like [`attach`], for a device that may be open already.
///
/// # Errors
///
/// The same errors as [`attach`].
pub async fn attach_opened(
    host: &Host,
    vm: &mut Vm,
    device: &Device,
    options: &Options,
    early: Option<Early>,
) -> Result<Attached, Error> {
    if device.is_hub() {
        return Err(Error::Hub(device.clone()));
    }
    let early = match early {
        // No time is left to ask the VM, and it is not the VM that was too
        // slow.
        Some(Early { opened: Err(silent @ Error::Silent(_)), .. }) => return Err(silent),
        early => early,
    };
    if !options.force && !host.is_authorized(&device.port) {
        return Err(host::Error::NotAuthorized(device.clone()).into());
    }
    let id = DeviceId::for_port(&device.port);
    Attach { host, vm, device, id, options, early }.run().await
}

/// An attach of one device.
struct Attach<'a> {
    host: &'a Host,
    vm: &'a mut Vm,
    device: &'a Device,
    id: DeviceId,
    options: &'a Options,
    /// The device, if it is open already.
    early: Option<Early>,
}

impl Attach<'_> {
    async fn run(&mut self) -> Result<Attached, Error> {
        let Attach { host, device, options, .. } = *self;
        let speed = host.speed(&device.port);
        if !options.dry_run {
            if let Some(guest_port) = self.as_known().await? {
                return Ok(Attached::There(guest_port));
            }
        }
        let mut probe = self.vm.probe(&self.id, speed, &options.placement).await?;
        if probe.status == Status::Incoming {
            return Err(Error::Incoming { vm: self.vm.name(), device: device.clone() });
        }
        if probe.present.is_none_or(|given| given.address != Some(device.address)) {
            let others = std::mem::take(&mut probe.others);
            if let Some(name) = passed::name_of(host, self.vm.pid(), others, device)? {
                return Ok(Attached::Otherwise(name));
            }
        }
        if let (None, Err(lacks), false) = (&probe.present, &probe.guest_ports, self.may_add()) {
            return Err(self.no_guest_port(lacks.clone()));
        }
        if options.dry_run {
            return self.rehearse(probe).await;
        }
        let Some(opened) = self.open(&probe).await? else { return Ok(Attached::Already) };
        let is_its = probe.present.is_some_and(|given| given.address == Some(device.address));
        let own = self.vm.pid().filter(|_| is_its);
        self.refuse_owned(own)?;
        if probe.present.is_some() {
            // The caller may have read the device's address some time ago.
            let now = host.device(&device.port)?;
            if now.is_none_or(|now| now.address != device.address) {
                return Err(host::Error::Gone(device.address).into());
            }
            debug!(id = %self.id, "detaching what an earlier device left behind");
            self.vm.detach(&self.id).await?;
        }
        let guest_ports = match probe.guest_ports {
            Err(lacks) if self.may_add() => {
                self.vm.add_controller(lacks, speed, &options.placement, false).await?
            }
            guest_ports => guest_ports,
        };
        let guest_ports = guest_ports.map_err(|why| self.no_guest_port(why))?;
        let guest_port = self.plug_in(opened, &guest_ports).await?;
        let full = || self.no_guest_port(NoGuestPort::Full(Vec::new()));
        let guest_port = guest_port.ok_or_else(full)?;
        Ok(Attached::There(guest_port))
    }

    /// Attaches the device at the port that should be free according to the
    /// known layout. Returns `None` if the layout is wrong, or if somebody has
    /// the device.
    async fn as_known(&mut self) -> Result<Option<GuestPort>, Error> {
        let Attach { host, device, options, .. } = *self;
        let Some(layout) = &self.vm.layout else { return Ok(None) };
        let guest_ports = layout.guest_ports(host.speed(&device.port), &options.placement);
        let Some(best) = guest_ports.ok().and_then(|ports| ports.into_iter().next()) else {
            return Ok(None);
        };
        let opened = match self.claimed().await {
            Ok(opened) if matches!(opened.node, Node::Held) => return Ok(None),
            Ok(opened) => opened,
            // The full way tries again.
            Err(error) if may_pass(&error) => return Ok(None),
            Err(error) => return Err(error),
        };
        // This VM may have the device under another id. The full probe finds
        // that out.
        if self.refuse_owned(None).is_err() {
            return Ok(None);
        }
        match self.plug_in(opened, &[best]).await {
            Err(Error::Qmp(error)) if is_misplaced(&error) => {
                debug!("the VM is not as it was known, asking it: {error}");
                Ok(None)
            }
            done => done,
        }
    }

    /// Makes QEMU take the device, which is open and claimed, at the first free
    /// port of these. Returns `None` if there was no port to try.
    async fn plug_in(
        &mut self,
        mut opened: Opened,
        guest_ports: &[GuestPort],
    ) -> Result<Option<GuestPort>, Error> {
        let Attach { device, options, .. } = *self;
        let by_address =
            options.open == Open::Address || self.vm.session().version() < HOSTDEVICE_SINCE;
        let access = match opened.claim() {
            // QEMU looks for the device by itself.
            _ if by_address => Access::Address,
            Some(claim) => {
                // If the device is gone, QEMU would keep its node open for ever
                // (QEMU, hw/usb/host-libusb.c, `usb_host_realize`).
                if claim.is_gone() {
                    return Err(host::Error::Gone(device.address).into());
                }
                if let Some(stranger) = claim.strangers().first() {
                    warn!(%device, "{stranger} has locked the node of {device} and may only read it, which \
                           keeps nobody from the device; README, Security, says how to keep it from the \
                           node");
                }
                Access::Descriptor(claim.node())
            }
            None => {
                debug!(%device, "this user may not open the node, QEMU is to open it itself");
                Access::Node(device.address.node())
            }
        };
        let (id, properties) = (&self.id, &options.properties);
        let attachment = Attachment { id, address: device.address, options: properties };
        // Until QEMU has said yes, any early end of this function releases the
        // lock. QEMU may keep a copy of the descriptor that it could not use or
        // has not used yet, and that copy must claim nothing. If QEMU attaches
        // the device later all the same, the next attach replaces it, because
        // it is not locked.
        let attached = self.vm.attach(&attachment, &access, guest_ports).await;
        opened.free_disks();
        let Some(guest_port) = attached? else { return Ok(None) };
        if self.has_left(opened.claim()) {
            // The event of its removal may have been handled before it was in
            // the VM.
            self.vm.detach(&self.id).await?;
            return Err(host::Error::Gone(device.address).into());
        }
        if !by_address {
            opened.hand_over();
        }
        Ok(Some(guest_port))
    }

    /// Whether the device has left its port.
    fn has_left(&self, claim: Option<&Claim>) -> bool {
        let is_there = || match self.host.device(&self.device.port) {
            Ok(now) => now.is_some_and(|now| now.address == self.device.address),
            // If this process cannot read the device, it does not know whether
            // the device has left.
            Err(_) => true,
        };
        claim.map_or_else(|| !is_there(), Claim::is_gone)
    }

    /// Finds out the result of an attach. It claims, locks and changes nothing.
    async fn rehearse(&mut self, probe: Probe) -> Result<Attached, Error> {
        let Attach { host, device, options, .. } = *self;
        let is_same = |given: &Given| given.address == Some(device.address);
        let present = probe.present.filter(is_same);
        let presence = present.map(|given| presence(host, self.vm.pid(), Some(&self.id), &given).0);
        if presence.is_some_and(|presence| presence.leftover().is_none()) {
            return Ok(Attached::Already);
        }
        if let (false, Some(used)) = (options.force, host.uses(&device.port).into_iter().next()) {
            return Err(host::Error::InUse(Box::new(used)).into());
        }
        let is_locked = host.is_locked(device.address) == Some(true);
        if is_locked && host.strangers(device.address).is_none() {
            return Err(self.held());
        }
        let own = self.vm.pid().filter(|_| present.is_some());
        self.refuse_owned(own)?;
        let guest_ports = match probe.guest_ports {
            Err(lacks) if self.may_add() => {
                let speed = host.speed(&device.port);
                self.vm.add_controller(lacks, speed, &options.placement, true).await?
            }
            guest_ports => guest_ports,
        };
        let guest_ports = guest_ports.map_err(|why| self.no_guest_port(why))?;
        let full = || self.no_guest_port(NoGuestPort::Full(Vec::new()));
        let guest_port = guest_ports.into_iter().next().ok_or_else(full)?;
        Ok(Attached::There(guest_port))
    }

    /// Whether a controller may be added to the VM. If the user named a bus,
    /// the user has to create that bus.
    fn may_add(&self) -> bool {
        self.options.add_controller && self.options.placement.bus.is_none()
    }

    fn no_guest_port(&mut self, why: NoGuestPort) -> Error {
        Error::NoGuestPort { vm: self.vm.session().address().clone(), why }
    }
}
