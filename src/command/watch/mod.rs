//! `watch`: the daemon. It hears udev, notices VMs that start and end, and
//! gives each VM's keeper its work. Between events it holds no monitor and
//! does nothing at all.

pub(super) mod events;
mod keeper;
mod readable;
mod shared;
mod sockets;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::rc::Rc;

use sd_notify::NotifyState;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::Notify;
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio::task::LocalSet;
use tokio::time::Interval;
use tracing::{error, info, warn};

use super::Context;
use crate::error::{Error, chain};
use crate::event::{Action, Event};
use crate::rulebook::Rulebook;
use events::{Batch, Events};
use keeper::{Keeper, Work};
use shared::Shared;
use sockets::Sockets;

/// The daemon.
struct Watch<'a> {
    context: &'a Context,
    shared: Rc<Shared>,
    /// The keepers' sockets and queues, by VM.
    keepers: BTreeMap<String, (PathBuf, UnboundedSender<Work>)>,
    sockets: Sockets,
}

/// Runs until it is told to end.
pub async fn run(context: &Context) -> Result<(), Error> {
    let mut reload = on(SignalKind::hangup())?;
    let mut terminate = on(SignalKind::terminate())?;
    let mut interrupt = on(SignalKind::interrupt())?;
    let rulebook = Rulebook::new(context.config()?);
    // From here on nothing is missed: first hear, then look.
    let events = Events::listen().map_err(failed("listen to udev"))?;
    let run = async {
        let mut watch = Watch::start(context, rulebook)?;
        let mut watchdog =
            sd_notify::watchdog_enabled().map(|limit| tokio::time::interval(limit / 3));
        let mut is_ready = false;
        loop {
            if !is_ready && watch.shared.is_settled() {
                is_ready = true;
                notify(&[NotifyState::Ready, NotifyState::Status(&watch.shared.summary())]);
                info!("ready: {}", watch.shared.summary());
            }
            let shared = watch.shared.clone();
            tokio::select! {
                batch = events.next() => watch.heard(batch.map_err(failed("hear udev"))?),
                vms = watch.sockets.appeared() => {
                    for vm in vms.map_err(failed("watch for sockets"))? {
                        watch.give(&vm, Work::Started);
                    }
                }
                () = shared.changed.notified() => {
                    notify(&[NotifyState::Status(&watch.shared.summary())]);
                }
                () = tick(watchdog.as_mut()) => notify(&[NotifyState::Watchdog]),
                _ = reload.recv() => watch.reload(),
                _ = terminate.recv() => break,
                _ = interrupt.recv() => break,
            }
        }
        notify(&[NotifyState::Stopping]);
        info!("ending; what is attached stays attached");
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

/// Tells systemd, if it is there (sd_notify(3)).
fn notify(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        warn!("cannot tell systemd: {error}");
    }
}

/// Waits until the watchdog is to be told, for ever if there is none.
async fn tick(watchdog: Option<&mut Interval>) {
    match watchdog {
        Some(interval) => {
            interval.tick().await;
        }
        None => std::future::pending().await,
    }
}

impl<'a> Watch<'a> {
    fn start(context: &'a Context, rulebook: Rulebook) -> Result<Self, Error> {
        let shared = Rc::new(Shared {
            host: context.host.clone(),
            timeout: context.timeout,
            rulebook: RefCell::default(),
            table: RefCell::default(),
            homes: RefCell::default(),
            status: RefCell::default(),
            changed: Notify::new(),
        });
        let sockets = Sockets::watch(Vec::new()).map_err(failed("watch for sockets"))?;
        let mut watch = Watch { context, shared, keepers: BTreeMap::new(), sockets };
        watch.apply(rulebook)?;
        Ok(watch)
    }

    /// Puts a configuration in force: a keeper for each VM, and a sync.
    fn apply(&mut self, rulebook: Rulebook) -> Result<(), Error> {
        let vms: Vec<(String, PathBuf)> =
            rulebook.config().vms.iter().map(|vm| (vm.name.clone(), vm.socket.clone())).collect();
        self.sockets = Sockets::watch(vms.clone()).map_err(failed("watch for sockets"))?;
        *self.shared.rulebook.borrow_mut() = Rc::new(rulebook);
        self.look()?;
        // A keeper whose VM is gone, or elsewhere, ends with its queue.
        self.keepers.retain(|name, (socket, _)| vms.iter().any(|(n, s)| n == name && s == socket));
        self.shared.status.borrow_mut().retain(|name, _| self.keepers.contains_key(name));
        for (name, socket) in vms {
            if !self.keepers.contains_key(&name) {
                let (queue, inbox) = unbounded_channel();
                let keeper = Keeper::new(name.clone(), socket.clone(), self.shared.clone());
                tokio::task::spawn_local(keeper.run(inbox));
                self.keepers.insert(name.clone(), (socket, queue));
            }
            self.give(&name, Work::Sync);
        }
        Ok(())
    }

    /// Looks at all devices of the host.
    fn look(&self) -> Result<(), Error> {
        let table = self.shared.rulebook().table(&self.shared.host)?;
        *self.shared.table.borrow_mut() = table;
        Ok(())
    }

    fn give(&self, vm: &str, work: Work) {
        if let Some((_, queue)) = self.keepers.get(vm) {
            // A keeper lives as long as its queue.
            let _ = queue.send(work);
        }
    }

    fn heard(&self, batch: Batch) {
        if batch.lost {
            warn!("events of udev got lost; looking at everything");
            match self.look() {
                Ok(()) => self.keepers.keys().for_each(|vm| self.give(vm, Work::Sync)),
                Err(error) => error!("{}", chain(&error)),
            }
        }
        for event in batch.events {
            if let Err(error) = self.event(&event) {
                warn!("passed over an event of udev: {}", chain(&error));
            }
        }
    }

    /// Notes what happened to a device, and tells the keepers it concerns.
    fn event(&self, event: &Event) -> Result<(), Error> {
        let Some(port) = event.port.clone() else { return Ok(()) };
        // Who has what was at the port before is known, unless a person
        // attached it.
        let before = self.shared.homes.borrow().get(&port).cloned();
        match event.action {
            Action::Add => {
                let device = event.device(&self.shared.host)?;
                let seen = self.shared.rulebook().seen(&self.shared.host, device);
                let home = seen.home.as_ref().map(|home| home.vm.clone());
                self.shared.table.borrow_mut().insert(port.clone(), seen);
                for vm in before.iter().filter(|vm| Some(*vm) != home.as_ref()).chain(&home) {
                    self.give(vm, Work::Port(port.clone()));
                }
            }
            Action::Remove => {
                let mut table = self.shared.table.borrow_mut();
                let address = table.get(&port).map(|seen| seen.device.address);
                if event.address.is_none() || event.address == address {
                    table.remove(&port);
                }
                match before {
                    Some(vm) => self.give(&vm, Work::Port(port)),
                    None => {
                        let status = self.shared.status.borrow();
                        let running = status.iter().filter(|(_, status)| status.running);
                        running.for_each(|(vm, _)| self.give(vm, Work::Port(port.clone())));
                    }
                }
            }
        }
        Ok(())
    }

    /// Reads the configuration again. A bad one changes nothing.
    fn reload(&mut self) {
        let mut states = vec![NotifyState::Reloading];
        states.extend(NotifyState::monotonic_usec_now().ok());
        notify(&states);
        let done = self.context.config().map(Rulebook::new).and_then(|rules| self.apply(rules));
        match done {
            Ok(()) => info!("reloaded the configuration: {}", self.shared.summary()),
            Err(error) => error!("the old configuration stays in force: {}", chain(&error)),
        }
        notify(&[NotifyState::Ready, NotifyState::Status(&self.shared.summary())]);
    }
}
