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
mod events;
mod give_back;
mod qemu;
mod queue;
mod reconcile;
mod reload;
mod shared;
mod sockets;
mod stop;
mod systemd;
mod waiting;
mod worker;

use std::collections::BTreeMap;
use std::future::pending;
use std::path::PathBuf;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio::task::{JoinHandle, LocalSet, spawn_local};
use tokio::time::{Sleep, sleep};
use tracing::{error, info, warn};

use crate::error::Error;
use crate::host::Host;
use crate::host::events::Events;
use crate::policy::Policy;
use crate::policy::config::Config;
use crate::policy::rule::{Effect, Rule};
use crate::qemu::VmAddress;
use crate::text::{chain, escape};
use events::{listen, source};
use queue::Work;
use reload::Reload;
use shared::Shared;
use sockets::Sockets;
use systemd::Watchdog;
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
    reload: Reload,
}

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

/// Waits until the time is over. Without a limit, it waits for ever.
async fn elapsed(patience: &mut Option<Pin<Box<Sleep>>>) {
    match patience {
        Some(patience) => patience.await,
        None => pending().await,
    }
}

/// Runs until it is told to end.
pub async fn run(settings: &Settings) -> Result<(), Error> {
    let mut hangup = on(SignalKind::hangup())?;
    let mut terminate = on(SignalKind::terminate())?;
    let mut interrupt = on(SignalKind::interrupt())?;
    let policy = Policy::new(settings.config()?);
    if let Some(told) = policy.by_number(&settings.host) {
        warn!("{}: {told}", escape(&settings.config.to_string_lossy()));
    }
    let run = async {
        let mut watch = Watch::start(settings, policy)?;
        let mut watchdog = Watchdog::new();
        // This timer is dropped when the daemon is ready. If it stayed, it would
        // wake an idle daemon.
        let mut patience = Some(Box::pin(sleep(READY_AT_LATEST)));
        loop {
            let is_late = patience.as_ref().is_some_and(|patience| patience.is_elapsed());
            if is_late || patience.is_some() && watch.shared.is_synced() {
                patience = None;
                systemd::ready(&watch.status());
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
                    systemd::status(&watch.status());
                }
                () = elapsed(&mut patience) => {}
                () = watchdog.due() => watchdog.report(),
                _ = hangup.recv() => {
                    systemd::reloading();
                    watch.reload.begin(settings);
                }
                config = watch.reload.end() => watch.reloaded(config),
                () = told_to_end(&mut terminate, &mut interrupt) => break,
            }
        }
        systemd::stopping();
        if watch.shared.policy().config().detach_at_stop {
            let vms: Vec<(String, VmAddress)> = watch
                .workers
                .iter()
                .map(|(vm, handle)| (vm.clone(), handle.address.clone()))
                .collect();
            // The workers are gone: from here on nothing is attached.
            watch.workers.clear();
            info!("ending, and detaching what is attached");
            tokio::select! {
                () = stop::detach_all(vms, watch.shared.timeout) => {}
                () = told_to_end(&mut terminate, &mut interrupt) => {
                    warn!("told to end a second time: what is not detached yet stays attached");
                }
            }
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

fn on(kind: SignalKind) -> Result<Signal, Error> {
    signal(kind).map_err(failed("handle signals"))
}

async fn told_to_end(terminate: &mut Signal, interrupt: &mut Signal) {
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
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

impl<'a> Watch<'a> {
    fn start(settings: &'a Settings, policy: Policy) -> Result<Self, Error> {
        let shared = Rc::new(Shared::new(settings.host.clone(), settings.timeout));
        let sockets = Sockets::new().map_err(failed("watch for sockets"))?;
        let (workers, reload) = (BTreeMap::new(), Reload::default());
        let events = listen(source(&policy), &settings.host)?;
        let mut watch =
            Watch { settings, events, shared, workers, sockets, is_outdated: false, reload };
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

    /// Puts the configuration that was read in force. A bad one changes
    /// nothing.
    fn reloaded(&mut self, config: Result<Config, Error>) {
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
        systemd::ready(&self.status());
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
