//! The events of USB devices: who reports them, and which VMs each of them
//! concerns.

use std::io::ErrorKind;

use tracing::{debug, error, warn};

use super::queue::Work;
use super::shared::Status;
use super::{Watch, failed};
use crate::error::Error;
use crate::host::Host;
use crate::host::events::{Batch, Events, Source};
use crate::policy::{self, HostDevice, Policy};
use crate::text::chain;
use crate::usb::{Action, HotplugEvent, Port};

/// Chooses who reports the events. The kernel reports first, and that is enough
/// if the daemon runs as root: the node exists, and root may open it (Linux,
/// drivers/base/core.c, `device_add`). Properties come from udev. Other users
/// may open the node only when udev's rules allow it, and udev reports that.
pub fn source(policy: &Policy) -> Source {
    match rustix::process::geteuid().is_root() {
        true if policy.needs_udev() => Source::Database,
        true => Source::Kernel,
        false => Source::Udev,
    }
}

/// Listens to the events of that source.
pub fn listen(source: Source, host: &Host) -> Result<Events, Error> {
    debug!("listening to {source:?}");
    let events = match Events::listen(source, host) {
        // It is made with the first device that udev writes about.
        Err(error) if source == Source::Database && error.kind() == ErrorKind::NotFound => {
            Events::listen(Source::Udev, host)
        }
        events => events,
    };
    events.map_err(failed("listen to the kernel's and udev's events"))
}

impl Watch<'_> {
    /// Handles the events that have arrived.
    pub(super) fn heard(&self, batch: Batch) {
        self.shared.usb_changed.send_replace(());
        if batch.lost {
            // The full look also covers the events that did arrive.
            return self.look_again();
        }
        for event in batch.events {
            if let Err(error) = self.event(&event) {
                warn!("passed over an event of {}: {}", self.events.source, chain(&error));
            }
        }
        for address in batch.known {
            self.shared.ask_again(address);
        }
    }

    /// Looks at the host and at every VM.
    fn look_again(&self) {
        warn!("events of {} got lost; looking at everything", self.events.source);
        match self.shared.policy().table(&self.shared.host) {
            Ok(table) => {
                self.shared.replace_table(table);
                self.give_all(&Work::Sync);
            }
            Err(error) => error!("{}", chain(&error)),
        }
    }

    /// Records what happened to a device, and tells the workers that it
    /// concerns.
    fn event(&self, event: &HotplugEvent) -> Result<(), Error> {
        let Some(port) = &event.port else { return Ok(()) };
        let mut concerned = self.shared.vms(|status| status.attached.contains_key(port));
        // A new plug counts as one even if the device has the same address as
        // before.
        let is_plug = event.action == Action::Add && !event.is_synthetic;
        match event.action {
            // The device is still there: somebody sent this event by hand
            // (udevadm trigger).
            Action::Remove if event.is_synthetic && self.is_there(port) => return Ok(()),
            Action::Add => {
                let device = self.shared.host.device_of(event)?;
                let seen = self.shared.plugged(device);
                concerned.extend(seen.assignment.map(|assignment| assignment.vm));
            }
            Action::Bind => {
                self.look_behind(port);
                return Ok(());
            }
            Action::Remove => {
                let mut table = self.shared.table.borrow_mut();
                let seen = table.get(port).map(|seen| &seen.device);
                let is_hub = seen.is_some_and(|device| device.is_hub());
                if event.address.is_none() || event.address == seen.map(|device| device.address) {
                    table.remove(port);
                }
                let has_it = |status: &Status| {
                    let known = status.attached.get(port);
                    known.is_some_and(|known| event.address.is_none_or(|gone| gone == *known))
                };
                // A person may have attached the device to any VM, so all VMs
                // are checked.
                if self.shared.vms(has_it).is_empty() && !is_hub {
                    concerned = self.shared.vms(|status| status.running);
                }
                concerned.extend(self.shared.vms(|status| status.waiting.contains(port)));
            }
        }
        let work = if is_plug { Work::Plugged } else { Work::Port };
        concerned.iter().for_each(|vm| self.give(vm, work(port.clone())));
        Ok(())
    }

    /// Whether the device that is known to be at a port may be there still.
    fn is_there(&self, port: &Port) -> bool {
        let table = self.shared.table.borrow();
        let known = table.get(port).map(|seen| seen.device.address);
        match self.shared.host.device(port) {
            Ok(now) => now.is_some_and(|now| known.is_none_or(|known| now.address == known)),
            Err(_) => true,
        }
    }

    /// Tells the workers which devices have been read: their VM is known now.
    pub(super) fn placed(&self) {
        for port in self.shared.placed.take() {
            if let Some(assignment) = self.shared.assignment(&port) {
                self.give(&assignment.vm, Work::Port(port));
            }
        }
    }

    /// Checks the devices behind both halves of a hub again when the hub's
    /// driver has started. Only then the kernel links the ports of the two
    /// halves (Linux, drivers/usb/core/port.c, `find_and_link_peer`).
    fn look_behind(&self, hub: &Port) {
        let behind = policy::behind(&self.shared.host, hub, &self.shared.table.borrow());
        for HostDevice { device, assignment, .. } in behind {
            let port = device.port.clone();
            let now = self.shared.plugged(device).assignment;
            if now != assignment {
                let vms = [assignment, now].into_iter().flatten().map(|assignment| assignment.vm);
                vms.for_each(|vm| self.give(&vm, Work::Port(port.clone())));
            }
        }
    }

    /// Makes every VM check for devices that are unplugged. A person may have
    /// moved such a device from the VM that it belongs to into another VM.
    pub(super) fn look_for_orphans(&self) {
        for port in self.shared.orphans.take() {
            for vm in self.shared.vms(|status| status.running) {
                self.give(&vm, Work::Port(port.clone()));
            }
        }
    }
}
