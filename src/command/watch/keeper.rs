//! Keeps one VM's devices: its queue of work, in order, and its end. A keeper
//! that waits for its VM delays no other.

use std::collections::{BTreeMap, VecDeque};
use std::future::pending;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::pin::pin;
use std::rc::Rc;
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, pidfd_open};
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::time::{Instant, sleep, timeout};
use tracing::{debug, info, warn};

use super::readable::readable;
use super::shared::Shared;
use crate::error::{Error, chain};
use crate::plan::{Action, Settled, plan};
use crate::plug::{self, Attached};
use crate::qmp::ErrorKind;
use crate::usb::{Address, DeviceId, Port};
use crate::vm::Vm;

/// How long to wait before trying again what a VM did not answer, at first
/// and at most.
const PAUSE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));

/// How long to wait before connecting again to a socket that appeared but is
/// not listened on yet, at first.
const NOT_YET: Duration = Duration::from_millis(5);

/// Something for a keeper to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Work {
    /// The VM's socket appeared: this may be a new VM.
    Started,
    /// Look at everything.
    Sync,
    /// Something happened at this port.
    Port(Port),
}

/// The keeper of one VM.
pub struct Keeper {
    vm: String,
    socket: PathBuf,
    shared: Rc<Shared>,
    todo: VecDeque<Work>,
    /// QEMU's process, and the descriptor that tells of its end (pidfd_open(2)).
    process: Option<(i32, Option<AsyncFd<OwnedFd>>)>,
    /// What was attached since this QEMU started.
    settled: Settled,
    /// What the VM has of ours.
    attached: BTreeMap<Port, Address>,
    /// What failed last at each port, so that it is told once.
    failures: BTreeMap<Option<Port>, String>,
}

/// What is to become of the work that was tried.
enum Outcome {
    /// It is done, or will not get better by trying again.
    Done,
    /// The VM is not there; what is to do is done at its start.
    NoVm,
    /// The VM did not answer in time.
    Later,
}

impl Keeper {
    /// A keeper for a VM.
    pub fn new(vm: String, socket: PathBuf, shared: Rc<Shared>) -> Self {
        shared.set(&vm, |_| {});
        Keeper {
            vm,
            socket,
            shared,
            todo: VecDeque::new(),
            process: None,
            settled: Settled::new(),
            attached: BTreeMap::new(),
            failures: BTreeMap::new(),
        }
    }

    /// Does what comes in, until nothing more can.
    pub async fn run(mut self, mut inbox: UnboundedReceiver<Work>) {
        loop {
            tokio::select! {
                work = inbox.recv() => match work {
                    Some(work) => self.add(work),
                    None => return,
                },
                () = ended(&self.process) => self.ended(),
            }
            while let Ok(work) = inbox.try_recv() {
                self.add(work);
            }
            self.work(&mut inbox).await;
            self.shared.set(&self.vm, |status| status.settled = true);
        }
    }

    /// Adds work that is not in the queue yet. A sync looks at every port.
    fn add(&mut self, work: Work) {
        if work == Work::Started {
            self.todo.clear();
        }
        if !self.todo.contains(&work) && !self.todo.contains(&Work::Started) {
            self.todo.push_back(work);
        }
    }

    /// Works the queue off. What comes in meanwhile joins it; a VM that starts
    /// anew ends the wait for the old one.
    async fn work(&mut self, inbox: &mut UnboundedReceiver<Work>) {
        let (mut pause, longest) = PAUSE;
        while let Some(work) = self.todo.pop_front() {
            let mut came = Vec::new();
            let outcome = {
                let mut step = pin!(self.step(&work));
                loop {
                    tokio::select! {
                        outcome = &mut step => break Some(outcome),
                        more = inbox.recv() => match more {
                            Some(Work::Started) => break None,
                            Some(more) => came.push(more),
                            None => return,
                        },
                    }
                }
            };
            match outcome {
                Some(Outcome::Done) => pause = PAUSE.0,
                Some(Outcome::NoVm) => {
                    self.todo.clear();
                    self.lost();
                }
                Some(Outcome::Later) => {
                    self.todo.push_front(work);
                    self.shared.set(&self.vm, |status| status.settled = true);
                    tokio::select! {
                        () = sleep(pause) => {}
                        more = inbox.recv() => match more {
                            Some(more) => came.push(more),
                            None => return,
                        },
                    }
                    pause = longest.min(pause * 2);
                }
                None => came.push(Work::Started),
            }
            for work in came {
                self.add(work);
            }
        }
    }

    async fn step(&mut self, work: &Work) -> Outcome {
        let port = match work {
            Work::Port(port) => Some(port.clone()),
            Work::Started | Work::Sync => None,
        };
        let done = match &port {
            Some(port) => self.port(port).await,
            None => self.sync(*work == Work::Started).await,
        };
        let error = match done {
            Ok(()) => {
                self.failures.remove(&port);
                return Outcome::Done;
            }
            Err(error) => error,
        };
        let outcome = match &error {
            Error::Qmp(error) if error.is_not_running() => return Outcome::NoVm,
            Error::Qmp(error) => match error.kind {
                ErrorKind::NoReply { .. } => Outcome::Later,
                // QEMU ended in the middle of the conversation.
                ErrorKind::Lost(_) => return Outcome::NoVm,
                _ => Outcome::Done,
            },
            _ => Outcome::Done,
        };
        self.tell(port, &chain(&error));
        outcome
    }

    /// Logs a failure, once until something else happens there.
    fn tell(&mut self, port: Option<Port>, text: &str) {
        let shown = port.as_ref().map(ToString::to_string).unwrap_or_default();
        if self.failures.get(&port).is_some_and(|before| before == text) {
            debug!(vm = self.vm, port = shown, "again: {text}");
        } else {
            warn!(vm = self.vm, port = shown, "{}: {text}", self.vm);
            self.failures.insert(port, text.to_owned());
        }
    }

    /// A conversation with the VM, as soon as its monitor is free. Notices
    /// when it is another QEMU than before.
    async fn connect(&mut self) -> Result<Vm, Error> {
        let limit = self.shared.timeout;
        let mut vm = {
            let mut connecting = pin!(Vm::connect_when_free(&self.socket, limit));
            match timeout(limit, &mut connecting).await {
                Ok(vm) => vm?,
                Err(_) => {
                    info!(
                        vm = self.vm,
                        "{} does not answer: another client holds its monitor, or it is stopped; \
                         waiting",
                        self.vm
                    );
                    self.shared.set(&self.vm, |status| status.settled = true);
                    connecting.await?
                }
            }
        };
        let pid = vm.pid();
        if self.process.as_ref().map(|(pid, _)| *pid) != pid {
            self.lost();
            self.process = pid.map(|pid| (pid, watch_end(pid)));
        }
        if !self.shared.is_running(&self.vm) {
            let version = vm.session().version();
            info!(vm = self.vm, pid, "{} is running: QEMU {version}", self.vm);
            self.shared.set(&self.vm, |status| status.running = true);
        }
        Ok(vm)
    }

    /// Connects to a VM that has just made its socket, and may not listen yet.
    async fn connect_to_new(&mut self) -> Result<Vm, Error> {
        let give_up = Instant::now() + self.shared.timeout;
        let mut pause = NOT_YET;
        loop {
            match self.connect().await {
                Err(Error::Qmp(error)) if error.is_not_running() && Instant::now() < give_up => {
                    sleep(pause).await;
                    pause *= 2;
                }
                done => return done,
            }
        }
    }

    /// Looks at everything: queues what is missing, detaches what is left over.
    async fn sync(&mut self, is_new: bool) -> Result<(), Error> {
        let mut vm = match is_new {
            true => self.connect_to_new().await?,
            false => self.connect().await?,
        };
        let in_vm = vm.host_devices().await?;
        let ours = in_vm.iter().filter_map(|(id, address)| id.port().zip(*address));
        self.attached = ours.collect();
        self.publish();
        let actions = plan(&self.vm, &self.shared.table.borrow(), &in_vm, &self.settled);
        for action in actions {
            match action {
                Action::Attach(port) => self.add(Work::Port(port)),
                Action::Detach(id, why) => {
                    let start = Instant::now();
                    vm.detach(&id).await?;
                    self.detached(&id, start, &why.to_string());
                }
            }
        }
        Ok(())
    }

    /// Makes one port right.
    async fn port(&mut self, port: &Port) -> Result<(), Error> {
        let start = Instant::now();
        let seen = self.shared.table.borrow().get(port).cloned();
        let home = seen.as_ref().and_then(|seen| seen.home.clone()).filter(|h| h.vm == self.vm);
        let id = DeviceId::for_port(port);
        let (Some(seen), Some(home)) = (&seen, home) else {
            // Gone, or no business of this VM: nothing of an earlier device
            // may stay.
            let mut vm = self.connect().await?;
            let address = vm.address_of(&id).await?;
            let now = seen.map(|seen| seen.device.address);
            if address.is_some() && address != now && vm.detach(&id).await? {
                self.detached(&id, start, "it was pulled");
            }
            self.settled.remove(port);
            return Ok(());
        };
        let device = &seen.device;
        if self.settled.get(port) == Some(&device.address) {
            return Ok(());
        }
        let rulebook = self.shared.rulebook();
        let (options, line) = (rulebook.options(&home), rulebook.line(&home));
        let mut vm = self.connect().await?;
        let attached = plug::attach(&self.shared.host, &mut vm, device, &options).await?;
        drop(vm);
        self.settled.insert(port.clone(), device.address);
        self.attached.insert(port.clone(), device.address);
        self.publish();
        let ms = start.elapsed().as_millis();
        let vm = &self.vm;
        match attached {
            Attached::There(spot) => info!(
                vm, %port, %id, rule = line, ms,
                "attached {device} to {vm} at {spot} in {ms} ms (rule at line {line})"
            ),
            Attached::Already => debug!(vm, %port, %id, rule = line, "{device} is in {vm} already"),
        }
        Ok(())
    }

    fn detached(&mut self, id: &DeviceId, start: Instant, why: &str) {
        let (vm, ms) = (&self.vm, start.elapsed().as_millis());
        let port = id.port();
        let shown = port.as_ref().map(ToString::to_string).unwrap_or_default();
        info!(vm, port = shown, %id, ms, "detached {id} from {vm} in {ms} ms: {why}");
        if let Some(port) = port {
            self.attached.remove(&port);
        }
        self.publish();
    }

    /// QEMU ended: its devices are the host's again.
    fn ended(&mut self) {
        info!(vm = self.vm, "{} has ended", self.vm);
        self.lost();
    }

    /// Forgets what belonged to a QEMU that is not there any more.
    fn lost(&mut self) {
        self.process = None;
        self.settled.clear();
        self.failures.clear();
        for port in std::mem::take(&mut self.attached).into_keys() {
            self.shared.host.probe_drivers(&port);
        }
        self.shared.set(&self.vm, |status| status.running = false);
        self.publish();
    }

    /// Tells the others what the VM has.
    fn publish(&self) {
        let mut homes = self.shared.homes.borrow_mut();
        homes.retain(|_, vm| *vm != self.vm);
        homes.extend(self.attached.keys().map(|port| (port.clone(), self.vm.clone())));
        self.shared.set(&self.vm, |status| status.attached = self.attached.len());
    }
}

fn watch_end(pid: i32) -> Option<AsyncFd<OwnedFd>> {
    let process = pidfd_open(Pid::from_raw(pid)?, PidfdFlags::NONBLOCK).ok()?;
    readable(process).ok()
}

/// Waits for the end of a process, for ever if there is none.
async fn ended(process: &Option<(i32, Option<AsyncFd<OwnedFd>>)>) {
    match process {
        // An error is no end.
        Some((_, Some(process))) if process.readable().await.is_ok() => {}
        _ => pending().await,
    }
}
