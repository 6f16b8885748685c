//! What a worker does at its VM: one short conversation for each thing.

use std::pin::pin;
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};
use tracing::{debug, info};

use super::qemu::Qemu;
use super::queue::Work;
use super::worker::Worker;
use crate::attach::Attached;
use crate::error::Error;
use crate::host::{Host, Life, Look};
use crate::policy::{HostDevice, Policy};
use crate::qemu::qmp::ErrorKind;
use crate::qemu::{Vm, VmAddress};
use crate::reconcile::{self, Done, InVm, Known, Vms};
use crate::text::{chain, escape};
use crate::usb::{Address, Device, DeviceId, Port};

/// How long to wait before connecting again to a socket that appeared but is
/// not listening yet: the first time, and at most.
const NOT_YET: (Duration, Duration) = (Duration::from_millis(5), Duration::from_millis(160));

impl Worker {
    /// Connects to the VM as soon as its monitor is free. Notices if this is
    /// another QEMU than before.
    async fn connect(&mut self) -> Result<Vm, Error> {
        let (name, limit) = (&self.vm, self.shared.timeout);
        let mut vm = {
            let mut connecting = pin!(Vm::connect_when_free(&self.address, limit));
            match timeout(limit, &mut connecting).await {
                Ok(vm) => vm?,
                Err(_) => {
                    let why = match &self.address {
                        VmAddress::Socket(_) => "another client holds its monitor",
                        VmAddress::Libvirt(_) => "libvirt is stopped, or busy with it",
                    };
                    info!(vm = name, "{name} does not answer: {why}, or it is stopped; waiting");
                    self.synced();
                    connecting.await?
                }
            }
        };
        let pid = vm.pid();
        if !self.qemu.as_ref().is_some_and(|qemu| qemu.is_process(pid)) {
            info!(vm = name, pid, "{name} is running: QEMU {}", vm.session().version());
            self.begins(Qemu::new(pid)).await;
        }
        Ok(vm)
    }

    /// Checks a VM that has just created its socket and may not be listening
    /// yet.
    pub(super) async fn start(&mut self) -> Result<Vec<Work>, Error> {
        // If the process cannot be watched, the daemon cannot tell the new QEMU
        // from the old one.
        self.lost_sight().await;
        let give_up = Instant::now() + self.shared.timeout;
        let mut pause = NOT_YET.0;
        loop {
            let error = match self.connect().await {
                Ok(vm) => return self.look(vm).await,
                Err(error) => error,
            };
            let is_early = matches!(&error, Error::Qmp(error)
                if error.is_not_running() && !error.is_other_user()
                || matches!(error.kind, ErrorKind::Connect(_)));
            if !is_early || Instant::now() >= give_up {
                return Err(error);
            }
            sleep(pause).await;
            pause = NOT_YET.1.min(pause * 2);
        }
    }

    /// Checks all ports.
    pub(super) async fn sync(&mut self) -> Result<Vec<Work>, Error> {
        let vm = self.connect().await?;
        self.look(vm).await
    }

    /// Finds the ports where a device is missing or a leftover exists.
    async fn look(&mut self, mut vm: Vm) -> Result<Vec<Work>, Error> {
        let policy = self.shared.policy();
        let in_vm = reconcile::look(self.vms(&policy), &mut vm).await?;
        let Some(qemu) = &mut self.qemu else { return Ok(Vec::new()) };
        let works = |in_vm: &InVm| in_vm.life != Life::Dead;
        // A device that does not work does not count as handled.
        qemu.handled.retain(|port, _| in_vm.get(port).is_none_or(works));
        let working = in_vm.iter().filter(|(_, in_vm)| works(in_vm));
        let addresses = working.filter_map(|(port, in_vm)| Some((port, in_vm.address?)));
        qemu.attached = addresses.map(|(port, address)| (port.clone(), address)).collect();
        let table = self.shared.table.borrow();
        let is_there = |port: &Port, address: &Address| {
            table.get(port).is_some_and(|seen| seen.device.address == *address)
        };
        // If a person detaches what is in the VM now, it must not be attached
        // again.
        qemu.handled.extend(qemu.attached.iter().map(|(port, address)| (port.clone(), *address)));
        qemu.handled.retain(|port, address| is_there(port, address));
        let steps = reconcile::steps(&self.vm, &table, &in_vm, &qemu.handled);
        // A port for which there is nothing to do has nothing to wait for.
        self.waiting.retain(|port| steps.iter().any(|(step, _)| step == port));
        drop(table);
        self.publish();
        Ok(steps.into_iter().map(|(port, _)| Work::Port(port)).collect())
    }

    /// The facts that [`reconcile`] needs besides the VM.
    fn vms<'a>(&'a self, policy: &'a Policy) -> Vms<'a> {
        vms_of(&self.shared.host, policy)
    }

    /// Attaches or detaches at one port, as the rules say. If a rule wants
    /// something unmounted, this is done first.
    pub(super) async fn port(&mut self, port: &Port) -> Result<(), Error> {
        let error = match self.port_as_it_is(port).await {
            Ok(()) => return Ok(()),
            Err(error) => error,
        };
        let seen = self.shared.table.borrow().get(port).cloned();
        let policy = self.shared.policy();
        match reconcile::unmount(self.vms(&policy), seen.as_ref(), &error).await? {
            true => self.port_as_it_is(port).await,
            false => Err(error),
        }
    }

    async fn port_as_it_is(&mut self, port: &Port) -> Result<(), Error> {
        let start = Instant::now();
        if self.is_handled(port) {
            return Ok(());
        }
        let (shared, name) = (self.shared.clone(), self.vm.clone());
        let policy = shared.policy();
        let look = || shared.table.borrow().get(port).cloned();
        let before = look();
        let vms = vms_of(&shared.host, &policy);
        let connecting = Box::pin(self.connect());
        let (vm, early) =
            reconcile::connect_for(vms, &name, before.as_ref(), shared.timeout, connecting).await;
        let mut vm = vm?;
        // The monitor may have been busy for a long time. Only the device that
        // is at the port now counts.
        let seen = look();
        let early = early.filter(|_| seen == before);
        let policy = shared.policy();
        let vms = vms_of(&shared.host, &policy);
        let is_handled = self.is_handled(port);
        if let (Some(qemu), false) = (&mut self.qemu, is_handled) {
            qemu.handled.remove(port);
        }
        vm.layout = self.qemu.as_mut().and_then(|qemu| qemu.layout.take());
        let is_given = self.qemu.as_ref().is_some_and(|qemu| qemu.given.contains_key(port));
        let known = Known { seen: seen.as_ref(), is_handled, is_given, early };
        let done = reconcile::port(vms, &mut vm, &name, port, known).await;
        if let Some(qemu) = &mut self.qemu {
            qemu.layout = vm.layout.take();
        }
        drop(vm);
        match done {
            Ok(done) => {
                self.tell_done(port, &done, start);
                self.note(port, &done);
                Ok(())
            }
            // The device has left. The event that says so has not arrived yet.
            Err(error) if seen.is_some_and(|seen| self.has_left(&seen.device)) => {
                debug!(vm = name, %port, "its device is gone: {}", chain(&error));
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    fn has_left(&self, device: &Device) -> bool {
        // If this process cannot read the device, it does not know whether the
        // device has left.
        self.shared.host.device(&device.port).is_ok_and(|now| now.as_ref() != Some(device))
    }

    /// Whether the device at a port was attached already. If it is not in the
    /// VM now, a person detached it.
    fn is_handled(&self, port: &Port) -> bool {
        let table = self.shared.table.borrow();
        let Some(HostDevice { device, assignment: Some(assignment), .. }) = table.get(port) else {
            return false;
        };
        let handled = self.qemu.as_ref().and_then(|qemu| qemu.handled.get(port));
        assignment.vm == self.vm && handled == Some(&device.address)
    }

    /// Logs what was done.
    fn tell_done(&self, port: &Port, done: &Done, start: Instant) {
        let (name, id, ms) = (&self.vm, DeviceId::for_port(port), start.elapsed().as_millis());
        let assignment = self.shared.assignment(port);
        let rule = assignment.map(|assignment| self.shared.policy().line(&assignment));
        match done {
            Done::Attached(device, Attached::There(guest_port)) => {
                let rule = rule.unwrap_or_default();
                info!(
                    vm = name, %port, %id, rule, ms,
                    "attached {device} to {name} at {guest_port} in {ms} ms (rule at line {rule})"
                );
            }
            Done::Attached(device, Attached::Already) => {
                debug!(vm = name, %port, %id, rule, "{device} is in {name}");
            }
            Done::Attached(device, Attached::Otherwise(other)) => {
                let other = escape(other);
                debug!(vm = name, %port, rule, "{device} is in {name} already, as {other}");
            }
            Done::Detached(why) => {
                info!(vm = name, %port, %id, ms, "detached {id} from {name} in {ms} ms: {why}");
            }
            Done::Nothing(_) => {}
        }
    }

    /// Records what the VM has at a port now.
    fn note(&mut self, port: &Port, done: &Done) {
        let Some(qemu) = &mut self.qemu else { return };
        match done {
            Done::Attached(device, how) => {
                qemu.handled.insert(port.clone(), device.address);
                qemu.attached.insert(port.clone(), device.address);
                if let Attached::There(_) = how {
                    qemu.given.insert(port.clone(), device.address);
                }
            }
            Done::Detached(_) => {
                qemu.attached.remove(port);
                qemu.given.remove(port);
            }
            Done::Nothing(in_vm) => {
                if in_vm.is_none() && qemu.attached.remove(port).is_some() {
                    self.shared.orphan(port);
                }
            }
        }
        self.publish();
    }
}

fn vms_of<'a>(host: &'a Host, policy: &'a Policy) -> Vms<'a> {
    Vms { host, policy, dry_run: false, look: Look::Quick }
}
