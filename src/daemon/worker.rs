//! The worker of one VM attaches and detaches its devices. It does the work in
//! its queue in order. A worker that waits for its VM does not delay the
//! others.

use std::collections::BTreeMap;
use std::future::poll_fn;
use std::rc::Rc;
use std::task::Poll;
use std::time::Duration;

use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender};
use tokio::time::sleep;
use tracing::field::display;
use tracing::{debug, info, warn};

use super::give_back::give_back;
use super::qemu::Qemu;
use super::queue::{Queue, Work};
use super::shared::Shared;
use super::waiting::Waiting;
use crate::error::{Error, Until};
use crate::host;
use crate::qemu::VmAddress;
use crate::qemu::qmp::ErrorKind;
use crate::text::chain;
use crate::usb::{DeviceId, Port};

/// How long to wait before work is tried again when the VM did not answer: the
/// first time, and at most.
const PAUSE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));

/// The worker of one VM.
pub struct Worker {
    pub(super) vm: String,
    pub(super) address: VmAddress,
    pub(super) shared: Rc<Shared>,
    /// The QEMU that answered last and has not ended.
    pub(super) qemu: Option<Qemu>,
    /// Earlier QEMUs that have not ended, although another QEMU has their
    /// socket now.
    earlier: Vec<Qemu>,
    /// The devices that wait until they can be attached.
    pub(super) waiting: Waiting,
    /// The sender of its own queue.
    again: UnboundedSender<Work>,
    /// The last failure at each port, so that the same failure is logged only
    /// once.
    failures: BTreeMap<Option<Port>, String>,
}

/// The result of the work that was tried.
enum Outcome {
    /// The work is done, and this work follows from it.
    Done(Vec<Work>),
    /// It failed, and another try would fail, too.
    Failed,
    /// The VM does not run.
    NoVm,
    /// The VM did not answer in time, or the connection broke.
    Later,
}

impl Worker {
    /// A worker for a VM.
    pub fn new(
        vm: String,
        address: VmAddress,
        shared: Rc<Shared>,
        again: UnboundedSender<Work>,
    ) -> Self {
        shared.set(&vm, |_| {});
        let (earlier, waiting, failures) = (Vec::new(), Waiting::default(), BTreeMap::new());
        Worker { vm, address, shared, qemu: None, earlier, waiting, again, failures }
    }

    /// Does the work that arrives. It never returns.
    pub async fn run(mut self, mut inbox: UnboundedReceiver<Work>) {
        let mut queue = Queue::default();
        let mut pause = PAUSE.0;
        loop {
            let Some(work) = queue.next() else {
                tokio::select! {
                    () = queue.hear(&mut inbox) => {}
                    qemu = self.end() => self.ended(qemu, &mut queue).await,
                }
                continue;
            };
            let outcome = tokio::select! {
                // The future is in a box, so that an idle worker needs little
                // memory.
                outcome = Box::pin(self.step(&work)) => outcome,
                // If the VM starts again, there is no reason to wait for the
                // old QEMU.
                () = queue.hear_until_start(&mut inbox) => continue,
            };
            match outcome {
                Outcome::Done(more) => {
                    more.into_iter().for_each(|work| queue.add(work));
                    pause = PAUSE.0;
                }
                Outcome::Failed => pause = PAUSE.0,
                Outcome::NoVm => {
                    queue.drop_all();
                    self.waiting = Waiting::default();
                    self.publish();
                    self.lost_sight().await;
                }
                Outcome::Later => {
                    queue.put_back(work);
                    self.synced();
                    tokio::select! {
                        () = sleep(pause) => {}
                        () = queue.hear(&mut inbox) => {}
                        qemu = self.end() => self.ended(qemu, &mut queue).await,
                    }
                    pause = PAUSE.1.min(pause * 2);
                }
            }
            if queue.is_empty() {
                self.synced();
            }
        }
    }

    /// Records that the first sync has ended, successfully or not.
    pub(super) fn synced(&self) {
        self.shared.set(&self.vm, |status| status.synced = true);
    }

    async fn step(&mut self, work: &Work) -> Outcome {
        let (port, done) = match work {
            Work::Started => (None, self.start().await),
            Work::Sync => (None, self.sync().await),
            Work::Plugged(port) | Work::Port(port) => {
                if let (Work::Plugged(port), Some(qemu)) = (work, &mut self.qemu) {
                    // What was done for the earlier device does not count any
                    // more.
                    qemu.handled.remove(port);
                }
                (Some(port), self.port(port).await.map(|()| Vec::new()))
            }
        };
        let error = match done {
            Ok(more) => {
                self.failures.remove(&port.cloned());
                if let Some(port) = port {
                    self.waiting.remove(port);
                    self.publish();
                }
                return Outcome::Done(more);
            }
            Err(error) => error,
        };
        let outcome = match &error {
            Error::Qmp(error) if error.is_not_running() && !error.is_other_user() => {
                return Outcome::NoVm;
            }
            Error::Qmp(error) if error.is_other_user() => Outcome::NoVm,
            Error::Qmp(error) => match error.kind {
                ErrorKind::NoReply { .. } => Outcome::Later,
                // QEMU ended during the conversation. If its process does not
                // tell so, the next try does.
                ErrorKind::Lost(_) => {
                    debug!(vm = self.vm, "{}: {}", self.vm, chain(error));
                    return Outcome::Later;
                }
                // libvirt restarts, or it is busy with the domain.
                ErrorKind::Libvirt(ref error) if error.can_pass() => Outcome::Later,
                _ => Outcome::Failed,
            },
            _ => Outcome::Failed,
        };
        self.tell(port, &error);
        match (outcome, port, error.until()) {
            (Outcome::Failed, Some(port), until) => {
                self.wait(port, until);
                Outcome::Failed
            }
            (Outcome::Failed, None, Some(_)) => Outcome::Later,
            (outcome, ..) => outcome,
        }
    }

    /// Makes the device at a port wait until the reason for its refusal has
    /// passed.
    fn wait(&mut self, port: &Port, until: Option<Until>) {
        let device = self.shared.table.borrow().get(port).map(|seen| seen.device.clone());
        match (device, until) {
            (Some(device), Some(until)) => {
                self.waiting.add(&self.shared, device, until, self.again.clone());
            }
            _ => self.waiting.remove(port),
        }
        self.publish();
    }

    /// Logs a failure. The same failure is logged again only after another
    /// result at the same port.
    fn tell(&mut self, port: Option<&Port>, error: &Error) {
        let vm = &self.vm;
        let text = match error {
            // The daemon has no option `--force`, so the advice does not name
            // it.
            Error::Host(host::Error::InUse(by)) => format!("{by}; {}", by.advice()),
            Error::Host(host::Error::NotAuthorized(device)) => format!(
                "{device} is not authorized on this host; write 1 to \
                 /sys/bus/usb/devices/{}/authorized, or have USBGuard do it",
                device.port
            ),
            error => chain(error),
        };
        let text = match (port, error.until()) {
            (Some(_), Some(_)) => format!("{text}; it is attached as soon as that is over"),
            _ => text,
        };
        if self.failures.get(&port.cloned()) == Some(&text) {
            debug!(vm, port = port.map(display), "{vm}, again: {text}");
            return;
        }
        let assignment = port
            .and_then(|port| self.shared.assignment(port))
            .filter(|assignment| assignment.vm == *vm);
        let rule = assignment.map(|assignment| self.shared.policy().line(&assignment));
        let id = port.map(DeviceId::for_port).map(display);
        warn!(vm, port = port.map(display), id, rule, "{vm}: {text}");
        self.failures.insert(port.cloned(), text);
    }

    /// Waits until one of the VM's QEMUs ends, and returns it.
    async fn end(&mut self) -> Qemu {
        poll_fn(|context| {
            if self.qemu.as_ref().is_some_and(|qemu| qemu.poll_end(context).is_ready()) {
                return self.qemu.take().map_or(Poll::Pending, Poll::Ready);
            }
            let mut earlier = self.earlier.iter();
            match earlier.position(|qemu| qemu.poll_end(context).is_ready()) {
                Some(index) => Poll::Ready(self.earlier.swap_remove(index)),
                None => Poll::Pending,
            }
        })
        .await
    }

    /// A QEMU ended, so its devices return to the host.
    async fn ended(&mut self, qemu: Qemu, queue: &mut Queue) {
        info!(vm = self.vm, "{} has ended", self.vm);
        match self.qemu {
            // An earlier QEMU of this VM ended. It may have held devices that
            // the current one needs.
            Some(_) => queue.add(Work::Sync),
            None => {
                queue.drop_all();
                self.waiting = Waiting::default();
            }
        }
        self.publish();
        self.give_back(qemu).await;
    }

    /// No QEMU answers at the socket. A watched process may still live without
    /// its socket.
    pub(super) async fn lost_sight(&mut self) {
        if let Some(qemu) = self.qemu.take_if(|qemu| !qemu.is_watched()) {
            info!(vm = self.vm, "{} has ended", self.vm);
            self.waiting = Waiting::default();
            self.publish();
            self.give_back(qemu).await;
        }
    }

    /// Returns a QEMU's devices to the host: those that this daemon attached,
    /// and those that belong to its VM. A person may have attached the latter,
    /// or QEMU's end may have interrupted their attach. Other devices that QEMU
    /// said it had are left alone, because they may belong to somebody else.
    async fn give_back(&self, mut qemu: Qemu) {
        for (port, seen) in self.shared.table.borrow().iter() {
            if seen.assignment.as_ref().is_some_and(|assignment| assignment.vm == self.vm) {
                qemu.given.insert(port.clone(), seen.device.address);
            }
        }
        give_back(&self.shared, qemu.given).await;
    }

    /// Records that another QEMU than before answers.
    pub(super) async fn begins(&mut self, qemu: Qemu) {
        self.failures.clear();
        self.waiting = Waiting::default();
        let before = self.qemu.replace(qemu);
        self.publish();
        match before {
            Some(before) if before.is_watched() && !before.has_ended() => {
                self.earlier.push(before);
            }
            Some(before) => self.give_back(before).await,
            None => {}
        }
    }

    /// Publishes the state of the VM for the other parts of the daemon.
    pub(super) fn publish(&self) {
        let attached = self.qemu.as_ref().map(|qemu| qemu.attached.clone());
        self.shared.set(&self.vm, |status| {
            status.running = attached.is_some();
            status.attached = attached.unwrap_or_default();
            status.waiting = self.waiting.ports().cloned().collect();
        });
    }
}
