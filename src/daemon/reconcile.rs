//! What a worker does at its VM: one short conversation for each thing.

use std::pin::pin;
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};
use tracing::{debug, info};

use super::qemu::Qemu;
use super::queue::Work;
use super::worker::Worker;
use crate::attach::{self, Attached};
use crate::error::Error;
use crate::policy::{Assignment, HostDevice};
use crate::qemu::Vm;
use crate::qemu::qmp::ErrorKind;
use crate::reconcile::{Leftover, Step, options, reconcile};
use crate::text::chain;
use crate::usb::{Address, Device, DeviceId, Port};

/// How long to wait before connecting again to a socket that appeared but is
/// not listened on yet, at first and at most.
const NOT_YET: (Duration, Duration) = (Duration::from_millis(5), Duration::from_millis(160));

impl Worker {
    /// A conversation with the VM, as soon as its monitor is free. Notices
    /// when it is another QEMU than before.
    async fn connect(&mut self) -> Result<Vm, Error> {
        let (name, limit) = (&self.vm, self.shared.timeout);
        let mut vm = {
            let mut connecting = pin!(Vm::connect_when_free(&self.address, limit));
            match timeout(limit, &mut connecting).await {
                Ok(vm) => vm?,
                Err(_) => {
                    info!(
                        vm = name,
                        "{name} does not answer: another client holds its monitor, or it is \
                         stopped; waiting"
                    );
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

    /// Looks at a VM that has just made its socket, and may not listen yet.
    pub(super) async fn start(&mut self) -> Result<Vec<Work>, Error> {
        // Without a process there is no telling two QEMUs apart.
        self.lost_sight().await;
        let give_up = Instant::now() + self.shared.timeout;
        let mut pause = NOT_YET.0;
        loop {
            let error = match self.connect().await {
                Ok(vm) => return self.look(vm).await,
                Err(error) => error,
            };
            let is_early = matches!(&error, Error::Qmp(error) if error.is_not_running()
                || matches!(error.kind, ErrorKind::Connect(_)));
            if !is_early || Instant::now() >= give_up {
                return Err(error);
            }
            sleep(pause).await;
            pause = NOT_YET.1.min(pause * 2);
        }
    }

    /// Looks at everything.
    pub(super) async fn sync(&mut self) -> Result<Vec<Work>, Error> {
        let vm = self.connect().await?;
        self.look(vm).await
    }

    /// Finds what is missing and what is left over.
    async fn look(&mut self, mut vm: Vm) -> Result<Vec<Work>, Error> {
        vm.drop_descriptors().await?;
        let in_vm = vm.host_devices().await?;
        let Some(qemu) = &mut self.qemu else { return Ok(Vec::new()) };
        let ours = in_vm.iter().filter_map(|(id, address)| id.port().zip(*address));
        qemu.attached = ours.collect();
        let table = self.shared.table.borrow();
        let is_there = |port: &Port, address: &Address| {
            table.get(port).is_some_and(|seen| seen.device.address == *address)
        };
        // What is in the VM now is not to come back when a person detaches it.
        qemu.handled.extend(qemu.attached.iter().map(|(port, address)| (port.clone(), *address)));
        qemu.handled.retain(|port, address| is_there(port, address));
        let steps = reconcile(&self.vm, &table, &in_vm, &qemu.handled);
        drop(table);
        self.publish();
        let port = |step| match step {
            Step::Attach(port) => Some(port),
            Step::Detach(id, _) => id.port(),
        };
        Ok(steps.into_iter().filter_map(port).map(Work::Port).collect())
    }

    /// Makes one port right.
    pub(super) async fn port(&mut self, port: &Port) -> Result<(), Error> {
        let start = Instant::now();
        if self.is_handled(port) {
            return Ok(());
        }
        let vm = self.connect().await?;
        // Its monitor may have been held for long; what counts is what is at
        // the port now.
        let seen = self.shared.table.borrow().get(port).cloned();
        match seen {
            Some(HostDevice { device, assignment: Some(assignment) })
                if assignment.vm == self.vm =>
            {
                self.attach(vm, &device, &assignment, start).await
            }
            seen => self.clear(vm, port, seen.map(|seen| seen.device.address), start).await,
        }
    }

    /// Whether the device at a port was attached already. If it is not in the
    /// VM in spite of it, a person wanted that.
    fn is_handled(&self, port: &Port) -> bool {
        let table = self.shared.table.borrow();
        let Some(HostDevice { device, assignment: Some(assignment) }) = table.get(port) else {
            return false;
        };
        let handled = self.qemu.as_ref().and_then(|qemu| qemu.handled.get(port));
        assignment.vm == self.vm && handled == Some(&device.address)
    }

    async fn attach(
        &mut self,
        mut vm: Vm,
        device: &Device,
        assignment: &Assignment,
        start: Instant,
    ) -> Result<(), Error> {
        let (host, policy, name) = (&self.shared.host, self.shared.policy(), &self.vm);
        let attached = attach::attach(host, &mut vm, device, &options(&policy, assignment)).await;
        drop(vm);
        let attached = match attached {
            Ok(attached) => attached,
            // Its removal is yet to be heard.
            Err(error) if !matches!(host.device(&device.port), Ok(Some(now)) if now == *device) => {
                debug!(vm = name, port = %device.port, "{device} is gone: {}", chain(&error));
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        let (port, id) = (&device.port, DeviceId::for_port(&device.port));
        let (rule, ms) = (policy.line(assignment), start.elapsed().as_millis());
        match attached {
            Attached::There(guest_port) => info!(
                vm = name, %port, %id, rule, ms,
                "attached {device} to {name} at {guest_port} in {ms} ms (rule at line {rule})"
            ),
            Attached::Already => debug!(vm = name, %port, %id, rule, "{device} is in {name}"),
        }
        if let Some(qemu) = &mut self.qemu {
            qemu.handled.insert(port.clone(), device.address);
            qemu.attached.insert(port.clone(), device.address);
        }
        self.publish();
        Ok(())
    }

    /// Nothing of an earlier device may stay at a port that is empty, or no
    /// business of this VM.
    async fn clear(
        &mut self,
        mut vm: Vm,
        port: &Port,
        now: Option<Address>,
        start: Instant,
    ) -> Result<(), Error> {
        let id = DeviceId::for_port(port);
        let in_vm = vm.address_of(&id).await?;
        let is_left_over = in_vm.is_some() && in_vm != now;
        if is_left_over && vm.detach(&id).await? {
            let (name, ms) = (&self.vm, start.elapsed().as_millis());
            let why = if now.is_some() { Leftover::Replaced } else { Leftover::Gone };
            info!(vm = name, %port, %id, ms, "detached {id} from {name} in {ms} ms: {why}");
        }
        if let Some(qemu) = &mut self.qemu {
            qemu.handled.remove(port);
            if in_vm.is_none() || is_left_over {
                let known = qemu.attached.remove(port);
                if in_vm.is_none() && known.is_some() {
                    self.shared.orphan(port);
                }
            }
        }
        self.publish();
        Ok(())
    }
}
