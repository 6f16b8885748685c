//! `watch` is the daemon. It receives the events of USB devices that are
//! plugged in and unplugged. It notices when VMs start and end, and it gives
//! work to the worker of each VM. Between events it has no monitor open and
//! does nothing.
//!
//! # The states of a port in a VM
//!
//! ```text
//!                     plug, and a rule gives it to this VM
//!        +---------+ ------------------------------------> +----------+
//!        |  empty  | <------------------------------------ | missing  |
//!        +---------+                 pull                  +----------+
//!          ^  ^  ^                                          |  ^    |
//!          |  |  |                                  refused |  |    | attached
//!          |  |  |                     pull       for a     v  |    |
//!          |  |  +---------------------------- +---------+ reason   |
//!          |  |                                | waiting | that     |
//!          |  |                                +---------+ passes   |
//!          |  |    pull: detached                                   v
//!          |  +-------------------------------------------- +----------+
//!          |                                                | attached | <--+
//!          |                                                +----------+    |
//!          |                           a person detaches it     |    |      |
//!          |           pull        +----------+ <---------------+    |      | replaced
//!          +---------------------- | released |                      v      |
//!                                  +----------+                  +------+   |
//!                                                                | dead | --+
//!                                                                +------+
//! ```
//!
//! - **empty**: no device is at the port, or the device does not belong to the
//!   VM. If the VM has a device with the port's id, that device is a leftover
//!   and is detached. A device that a person attached is not detached as long
//!   as the hardware is there.
//! - **unclear** (not drawn; between empty and missing): a rule asks for
//!   something that cannot be read yet, because drivers are starting for the
//!   device. A thread reads it (`devices.rs`).
//! - **missing**: the device belongs to the VM and is not in it. The worker
//!   attaches it as soon as the VM's monitor is free.
//! - **waiting**: the attach was refused for a reason that can pass. The device
//!   is missing again when the reason has passed (`waiting.rs`). A refusal for
//!   another reason is logged, and the port stays as it is until the next plug,
//!   reload or start of the VM.
//! - **attached**: the device is in the VM, whoever attached it. The port is
//!   `handled`.
//! - **dead**: QEMU has lost the device, but the device is still at its port.
//!   It is attached again. If no rule gives it to the VM, it is detached.
//! - **released**: the device was attached once and is not in the VM now. A
//!   person detached it, and the daemon respects that until the next plug or
//!   the VM's next start.
//!
//! When the VM ends, all its ports are forgotten, and its devices go back to
//! the host's drivers. When it starts, each device that belongs to it is
//! missing. [`crate::reconcile::decide`] says what to do in each state.

mod devices;
mod give_back;
mod qemu;
mod queue;
mod reconcile;
mod shared;
mod sockets;
mod stop;
mod waiting;
mod worker;

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::PathBuf;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use sd_notify::NotifyState;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio::task::{JoinHandle, LocalSet, spawn_local};
use tokio::time::{Interval, sleep, timeout};
use tracing::{debug, error, info, warn};

use crate::error::Error;
use crate::host::events::{Batch, Events, Source};
use crate::host::{Host, blocking};
use crate::policy::config::{self, Config};
use crate::policy::rule::{Effect, Rule};
use crate::policy::{self, HostDevice, Policy};
use crate::qemu::VmAddress;
use crate::text::{chain, escape};
use crate::usb::{Action, HotplugEvent, Port};
use queue::Work;
use shared::{Shared, Status};
use sockets::Sockets;
use worker::Worker;

/// When the daemon is ready at the latest. A VM that keeps it busy must not make
/// systemd give it up (systemd-system.conf(5), `DefaultTimeoutStartSec`, 45 s or
/// more).
const READY_AT_LATEST: Duration = Duration::from_secs(30);

/// The settings that the daemon starts with.
#[derive(Debug)]
pub struct Settings {
    /// The host.
    pub host: Host,
    /// The time for one conversation with a VM.
    pub timeout: Duration,
    /// The path of the configuration.
    pub config: PathBuf,
}

impl Settings {
    fn config(&self) -> Result<Config, Error> {
        Ok(Config::read(&self.config)?)
    }
}

/// The daemon.
struct Watch<'a> {
    settings: &'a Settings,
    events: Events,
    shared: Rc<Shared>,
    /// The workers, by VM.
    workers: BTreeMap<String, WorkerHandle>,
    sockets: Sockets,
    /// Whether the configuration that was read last was refused and is not in
    /// force.
    is_outdated: bool,
    /// The configuration that a thread is reading now. A thread reads it,
    /// because its disk may not answer.
    reading: Option<Reading>,
}

/// A configuration that is being read.
type Reading = Pin<Box<dyn Future<Output = Result<Config, Error>>>>;

/// A worker at work.
struct WorkerHandle {
    address: VmAddress,
    queue: UnboundedSender<Work>,
    task: JoinHandle<()>,
}

impl Drop for WorkerHandle {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Runs until it is told to end.
pub async fn run(settings: &Settings) -> Result<(), Error> {
    let mut reload = on(SignalKind::hangup())?;
    let mut terminate = on(SignalKind::terminate())?;
    let mut interrupt = on(SignalKind::interrupt())?;
    let policy = Policy::new(settings.config()?);
    if let Some(told) = policy.by_number(&settings.host) {
        warn!("{}: {told}", escape(&settings.config.to_string_lossy()));
    }
    let run = async {
        let mut watch = Watch::start(settings, policy)?;
        let limit = sd_notify::watchdog_enabled().filter(|limit| !limit.is_zero());
        let mut watchdog = limit.map(|limit| tokio::time::interval(limit / 3));
        let mut patience = pin!(sleep(READY_AT_LATEST));
        let (mut is_ready, mut is_late) = (false, false);
        loop {
            if !is_ready && (is_late || watch.shared.is_synced()) {
                is_ready = true;
                notify(&[NotifyState::Ready, NotifyState::Status(&watch.status())]);
                info!("ready: {}", watch.status());
            }
            let shared = watch.shared.clone();
            tokio::select! {
                batch = watch.events.next() => watch.heard(batch.map_err(failed("hear of plugs"))?),
                vms = watch.sockets.appeared() => {
                    for vm in vms.map_err(failed("watch for sockets"))? {
                        watch.give(&vm, Work::Started);
                    }
                }
                () = shared.changed.notified() => {
                    watch.placed();
                    watch.look_for_orphans();
                    notify(&[NotifyState::Status(&watch.status())]);
                }
                () = &mut patience, if !is_ready => is_late = true,
                () = tick(watchdog.as_mut()) => notify(&[NotifyState::Watchdog]),
                _ = reload.recv() => watch.reload(),
                config = read(&mut watch.reading) => watch.reloaded(config),
                _ = terminate.recv() => break,
                _ = interrupt.recv() => break,
            }
        }
        notify(&[NotifyState::Stopping]);
        if watch.shared.policy().config().detach_at_stop {
            let vms: Vec<(String, VmAddress)> = watch
                .workers
                .iter()
                .map(|(vm, handle)| (vm.clone(), handle.address.clone()))
                .collect();
            // The workers are gone: from here on nothing is attached.
            watch.workers.clear();
            info!("ending, and detaching what is attached");
            stop::detach_all(vms, watch.shared.timeout).await;
        } else {
            info!("ending; what is attached stays attached");
        }
        Ok(())
    };
    LocalSet::new().run_until(run).await
}

fn failed(what: &'static str) -> impl FnOnce(std::io::Error) -> Error {
    move |source| Error::Setup { what, source }
}

/// Chooses who reports the events. The kernel reports first, and that is enough
/// if the daemon runs as root: the node exists, and root may open it (Linux,
/// drivers/base/core.c, `device_add`). Properties come from udev. Other users
/// may open the node only when udev's rules allow it, and udev reports that.
fn source(policy: &Policy) -> Source {
    match rustix::process::geteuid().is_root() {
        true if policy.needs_udev() => Source::Database,
        true => Source::Kernel,
        false => Source::Udev,
    }
}

fn listen(source: Source, host: &Host) -> Result<Events, Error> {
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

fn on(kind: SignalKind) -> Result<Signal, Error> {
    signal(kind).map_err(failed("handle signals"))
}

/// Warns if rules want something unmounted that this process may not unmount.
fn warn_of_unmount(policy: &Policy, host: &Host) {
    let wants = |rule: &&Rule| matches!(&rule.effect, Effect::Attach(to) if to.unmount);
    if let (Some(rule), false) = (policy.config().rules.iter().find(wants), host.can_unmount()) {
        warn!(
            rule = rule.line,
            "the rule at line {} has `unmount`, and this process may not unmount: it is not root in \
             the host's own mount namespace, and there is no systemd to do it; `usb-qmp-hotplug \
             sync`, run by root, does",
            rule.line
        );
    }
}

/// Sends states to systemd, if systemd started this process (sd_notify(3)).
fn notify(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        warn!("cannot tell systemd: {error}");
    }
}

/// Waits until a configuration has been read. If none is being read, it waits
/// for ever.
async fn read(reading: &mut Option<Reading>) -> Result<Config, Error> {
    match reading {
        Some(reading) => reading.await,
        None => std::future::pending().await,
    }
}

/// Waits until it is time to tell the watchdog. If there is none, it waits for
/// ever.
async fn tick(watchdog: Option<&mut Interval>) {
    match watchdog {
        Some(interval) => {
            interval.tick().await;
        }
        None => std::future::pending().await,
    }
}

impl<'a> Watch<'a> {
    fn start(settings: &'a Settings, policy: Policy) -> Result<Self, Error> {
        let shared = Rc::new(Shared::new(settings.host.clone(), settings.timeout));
        let sockets = Sockets::new().map_err(failed("watch for sockets"))?;
        let workers = BTreeMap::new();
        let events = listen(source(&policy), &settings.host)?;
        let mut watch =
            Watch { settings, events, shared, workers, sockets, is_outdated: false, reading: None };
        watch.apply(policy)?;
        Ok(watch)
    }

    /// Puts a configuration in force: a worker for each VM, and a sync.
    fn apply(&mut self, policy: Policy) -> Result<(), Error> {
        policy.warn_of_exposed(&self.shared.host, &self.settings.config);
        // Listen to events first, then read the devices, so that no event is
        // missed.
        let source = source(&policy);
        if self.events.source != source {
            self.events = listen(source, &self.shared.host)?;
        }
        warn_of_unmount(&policy, &self.shared.host);
        let table = policy.table(&self.shared.host)?;
        let vms: BTreeMap<String, VmAddress> =
            policy.config().vms.iter().map(|vm| (vm.name.clone(), vm.address.clone())).collect();
        *self.shared.policy.borrow_mut() = Arc::new(policy);
        self.shared.replace_table(table);
        // The order is the same for sockets: watch first, then look for running
        // VMs.
        let start = |(vm, address): (&String, &VmAddress)| (vm.clone(), address.start());
        self.sockets.watch(vms.iter().map(start).collect());
        self.workers.retain(|vm, handle| {
            vms.get(vm).is_some_and(|address| address.is_as_before(&handle.address))
        });
        self.shared.status.borrow_mut().retain(|vm, _| self.workers.contains_key(vm));
        for (vm, address) in vms {
            self.workers.entry(vm.clone()).or_insert_with(|| {
                let (queue, inbox) = unbounded_channel();
                let worker = Worker::new(vm, address.clone(), self.shared.clone(), queue.clone());
                WorkerHandle { address, queue, task: spawn_local(worker.run(inbox)) }
            });
        }
        self.give_all(&Work::Sync);
        Ok(())
    }

    fn give(&self, vm: &str, work: Work) {
        if let Some(handle) = self.workers.get(vm) {
            // The queue is open as long as the handle exists.
            let _ = handle.queue.send(work);
        }
    }

    fn give_all(&self, work: &Work) {
        self.workers.keys().for_each(|vm| self.give(vm, work.clone()));
    }

    fn heard(&self, batch: Batch) {
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
    fn placed(&self) {
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
    fn look_for_orphans(&self) {
        for port in self.shared.orphans.take() {
            for vm in self.shared.vms(|status| status.running) {
                self.give(&vm, Work::Port(port.clone()));
            }
        }
    }

    /// Reads the configuration again.
    fn reload(&mut self) {
        let mut states = vec![NotifyState::Reloading];
        states.extend(NotifyState::monotonic_usec_now().ok());
        notify(&states);
        let (path, limit) = (self.settings.config.clone(), self.settings.timeout);
        self.reading = Some(Box::pin(async move {
            let failed = |source| config::Error::Io { path: path.clone(), source };
            let file = path.clone();
            // A pipe was read at the start and has no content any more.
            let read = move || match std::fs::metadata(&file) {
                Ok(found) if !found.is_file() => {
                    let source = std::io::Error::other("it is no regular file, as a reload needs");
                    Err(config::Error::Io { path: file, source })
                }
                _ => Config::read(&file),
            };
            match timeout(limit, blocking(read)).await {
                Ok(config) => Ok(config.map_err(failed)??),
                Err(_) => Err(failed(std::io::ErrorKind::TimedOut.into()).into()),
            }
        }));
    }

    /// Puts the configuration that was read in force. A bad one changes
    /// nothing.
    fn reloaded(&mut self, config: Result<Config, Error>) {
        self.reading = None;
        let done = config.map(Policy::new).and_then(|rules| self.apply(rules));
        self.is_outdated = done.is_err();
        match done {
            Ok(()) => info!("reloaded the configuration: {}", self.status()),
            Err(error) => {
                // The error of a bad configuration has one line per mistake.
                chain(&error).lines().for_each(|line| error!("{line}"));
                error!("the old configuration stays in force");
            }
        }
        notify(&[NotifyState::Ready, NotifyState::Status(&self.status())]);
    }

    /// What `systemctl status` shows.
    fn status(&self) -> String {
        let warning = match self.is_outdated {
            true => "; the configuration is bad, the one before it stays in force",
            false => "",
        };
        self.shared.summary() + warning
    }
}
