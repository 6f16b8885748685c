//! Opens, locks and claims a device and its disks for an attach. If a lock or a
//! claim will end soon, the attach waits for it.

use std::time::Duration;

use tokio::time::{Instant, sleep, timeout_at};

use super::{Attach, Options};
use crate::error::Error;
use crate::host::{
    self, Claim, Claims, Holder, Host, Life, Node, Owner, UsedBy, blocking, blocking_drop,
};
use crate::presence::opened;
use crate::qemu::{Given, Probe, Status};
use crate::usb::Device;

/// How long to wait for a lock or a claim that will end soon: one of an attach
/// through another monitor, or of a device that returns to the host's drivers.
const PASSING: Duration = Duration::from_millis(500);

/// How long to wait before such a lock is tried again. Nothing reports its end.
const PAUSE: Duration = Duration::from_millis(10);

/// What was opened for an attach.
#[derive(Debug)]
pub(super) struct Opened {
    /// Nobody can mount the device's disks while this exists.
    claims: Claims,
    /// The device's node.
    pub node: Node,
    /// Whether it is closed on its own thread.
    is_blocking: bool,
}

impl Opened {
    /// The open node. `None` if only QEMU may open it.
    pub fn claim(&self) -> Option<&Claim> {
        match &self.node {
            Node::Ours(claim) => Some(claim),
            Node::Held | Node::NotPermitted => None,
        }
    }

    /// Releases the claims on the disks.
    pub fn free_disks(&mut self) {
        let claims = std::mem::take(&mut self.claims);
        if self.is_blocking && !claims.is_empty() {
            blocking_drop(claims);
        }
    }

    /// Leaves the lock to QEMU, which has a copy of the descriptor.
    pub fn hand_over(mut self) {
        if let Node::Ours(claim) = std::mem::replace(&mut self.node, Node::Held) {
            claim.hand_over();
        }
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        self.free_disks();
        if let Node::Ours(claim) = std::mem::replace(&mut self.node, Node::Held) {
            if self.is_blocking {
                // Another process may wait for the lock. It does not have to
                // wait for the thread.
                claim.unlock();
                blocking_drop(claim);
            }
        }
    }
}

impl Attach<'_> {
    /// Opens and claims the device. Returns `None` if the VM has it already. If
    /// another process has it, this is tried again as long as that may end
    /// soon.
    pub(super) async fn open(&mut self, probe: &Probe) -> Result<Option<Opened>, Error> {
        let Attach { host, device, .. } = *self;
        let pid = self.vm.pid();
        let same = |given: &Given| given.address == Some(device.address);
        let mut present = probe.present.filter(same);
        if present.is_some() {
            // A descriptor of an interrupted attach may have the lock, without
            // a device in the VM.
            self.vm.drop_descriptors().await?;
        }
        let (start, deadline) = (Instant::now(), self.vm.session().deadline());
        let half = deadline.saturating_duration_since(start) / 2;
        let mut is_first = true;
        loop {
            let life = present.map(|given| host.life(device, pid, opened(Some(&self.id), &given)));
            if life == Some(Life::Alive) {
                return Ok(None);
            }
            let error = match self.claimed().await {
                Ok(open) => {
                    // Only the attempt to lock it tells for sure.
                    let locked = match &open.node {
                        // Other locks hide whether this one still exists.
                        Node::Ours(claim) if !claim.strangers().is_empty() => None,
                        Node::Ours(_) => Some(false),
                        Node::Held => Some(true),
                        Node::NotPermitted => None,
                    };
                    let life = match (life, present) {
                        (Some(Life::Unknown), Some(given)) => {
                            Some(host.life_if(device, pid, opened(Some(&self.id), &given), locked))
                        }
                        (life, _) => life,
                    };
                    match (life, &open.node) {
                        (Some(Life::Alive | Life::Unknown), _) => return Ok(None),
                        (_, Node::Ours(_) | Node::NotPermitted) => return Ok(Some(open)),
                        (_, Node::Held) => None,
                    }
                }
                Err(error) if may_pass(&error) => Some(error),
                Err(error) => return Err(error),
            };
            if error.is_none() && is_first {
                // The VM may have an earlier device, and descriptors of an
                // interrupted attach.
                self.vm.drop_descriptors().await?;
            } else {
                let holders = host.holders(device.address);
                // This tool or udev has the disk.
                let is_known = matches!(&error, Some(Error::Host(host::Error::InUse(used)))
                    if !matches!(used.by, UsedBy::Unknown { .. }));
                let is_short = is_known || holders.iter().any(Holder::is_this_tool);
                let patience = if is_short { half } else { half.min(PASSING) };
                let is_final =
                    holders.iter().any(|holder| Some(holder.pid) != pid && !holder.is_this_tool());
                if is_final || start.elapsed() >= patience {
                    return match error {
                        Some(error) => Err(error),
                        None => Err(self.refused(probe.status).await?),
                    };
                }
                sleep(PAUSE).await;
            }
            // Another process of this tool may just have attached it to this
            // VM.
            present = self.vm.given(&self.id).await?.filter(same);
            is_first = false;
        }
    }

    /// The device as it was opened already, or as it is opened now.
    pub(super) async fn claimed(&mut self) -> Result<Opened, Error> {
        match self.early.take() {
            Some(early) => early.opened,
            None => {
                let deadline = self.vm.session().deadline();
                open_once(self.host, self.device, self.options, deadline).await
            }
        }
    }

    /// Finds out who holds the device that stayed locked.
    async fn refused(&mut self, status: Status) -> Result<Error, Error> {
        let Attach { host, device, .. } = *self;
        let holds = match self.vm.pid().and_then(|pid| host.holds(pid, device.address)) {
            Some(holds) => holds,
            // If this user may not read /proc of that process, its monitor can
            // still tell.
            None => self.vm.keeps_descriptors().await?,
        };
        if holds {
            let is_paused = status == Status::Stopped;
            return Ok(Error::StillHeld { vm: self.vm.name(), device: device.clone(), is_paused });
        }
        Ok(self.held())
    }

    /// Refuses the device if somebody uses it without our lock. Call it only
    /// while nobody else has the lock. What the QEMU process `own` has open is
    /// its own leftover, so it is no reason to refuse.
    pub(super) fn refuse_owned(&self, own: Option<i32>) -> Result<(), Error> {
        match self.host.owner(self.device, self.options.look) {
            Some(Owner::Vm(holder)) if Some(holder.pid) == own => Ok(()),
            Some(owner) if !self.options.force => {
                let (device, owner) = (self.device.clone(), Box::new(owner));
                Err(host::Error::Claimed { device, owner }.into())
            }
            _ => Ok(()),
        }
    }

    /// The error that names who holds the device.
    pub(super) fn held(&self) -> Error {
        let Attach { host, device, .. } = *self;
        let mut holders = host.holders(device.address);
        if holders.is_empty() {
            holders = host.lockers(device.address);
        }
        host::Error::Held { device: device.clone(), holders }.into()
    }
}

/// Whether an attempt failed because of a disk that may be free again soon.
/// This tool claims disks for an attach, and a claim that cannot be explained
/// may be one of those. udev looks at new disks.
pub(super) fn may_pass(error: &Error) -> bool {
    let Error::Host(host::Error::InUse(used)) = error else { return false };
    match &used.by {
        UsedBy::Program(Some(program)) => program.is_this_tool(),
        by => matches!(by, UsedBy::Examined | UsedBy::Unknown { .. }),
    }
}

/// Claims a device's disks and opens its node. If a disk does not answer, the
/// kernel makes the open wait. So this runs on a thread.
pub(super) async fn open_once(
    host: &Host,
    device: &Device,
    options: &Options,
    deadline: Instant,
) -> Result<Opened, Error> {
    let guard = !options.force && (options.blocking || host.has_disk(&device.port));
    let (host, device) = (host.clone(), device.clone());
    let silent = Error::Silent(device.clone());
    let is_blocking = options.blocking;
    let open = move || -> Result<Opened, Error> {
        if is_blocking {
            // An open of the node would wait, too, but the process could not
            // end during that wait (Linux, drivers/usb/core/devio.c,
            // `usbdev_open`). A read of an attribute can be interrupted.
            host.wait_for_drivers(&device.port);
        }
        let claims = if guard { host.claim_disks(&device.port)? } else { Claims::default() };
        let node = host.open(device.address)?;
        Ok(Opened { claims, node, is_blocking })
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
