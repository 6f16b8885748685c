//! The state that the daemon's parts share. All parts run on one thread.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Notify, watch};

use super::devices::Asked;
use crate::host::Host;
use crate::policy::{Assignment, Policy, Table};
use crate::usb::{Address, Port};

/// The state of a VM.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Status {
    /// Its monitor answered, and its process has not ended since.
    pub running: bool,
    /// The devices that it has, as far as this is known. A person may have
    /// changed them.
    pub attached: BTreeMap<Port, Address>,
    /// The ports whose devices wait for it.
    pub waiting: BTreeSet<Port>,
    /// Whether its first sync has ended, successfully or not.
    pub synced: bool,
}

/// The state that all parts of the daemon see.
#[derive(Debug)]
pub struct Shared {
    /// The host.
    pub host: Host,
    /// The time for one conversation with a VM.
    pub timeout: Duration,
    /// The rules in force.
    pub policy: RefCell<Arc<Policy>>,
    /// The host's devices.
    pub table: RefCell<Table>,
    /// The devices that a thread reads, because a read may have to wait.
    pub asked: RefCell<Asked>,
    /// The ports whose devices a thread has read, so that their VM is known
    /// now.
    pub placed: RefCell<Vec<Port>>,
    /// The states of the VMs.
    pub status: RefCell<BTreeMap<String, Status>>,
    /// The ports of devices that were not in the VM that they belong to. A
    /// person may have moved them to another VM.
    pub orphans: RefCell<Vec<Port>>,
    /// Notified of every event of a USB device or an interface.
    pub usb_changed: watch::Sender<()>,
    /// Notified of every change of `status`, `asked`, `placed` and `orphans`.
    pub changed: Notify,
}

impl Shared {
    /// The state before anything has been read.
    pub fn new(host: Host, timeout: Duration) -> Self {
        Shared {
            host,
            timeout,
            policy: RefCell::default(),
            table: RefCell::default(),
            asked: RefCell::default(),
            placed: RefCell::default(),
            status: RefCell::default(),
            orphans: RefCell::default(),
            usb_changed: watch::Sender::new(()),
            changed: Notify::new(),
        }
    }

    /// The rules in force.
    pub fn policy(&self) -> Arc<Policy> {
        self.policy.borrow().clone()
    }

    /// Where the device at a port belongs.
    pub fn assignment(&self, port: &Port) -> Option<Assignment> {
        self.table.borrow().get(port)?.assignment.clone()
    }

    /// Receives the events of USB devices from now on.
    pub fn usb_changes(&self) -> watch::Receiver<()> {
        self.usb_changed.subscribe()
    }

    /// Changes the state of a VM.
    pub fn set(&self, vm: &str, change: impl FnOnce(&mut Status)) {
        let mut all = self.status.borrow_mut();
        let status = all.entry(vm.to_owned()).or_default();
        let before = status.clone();
        change(status);
        if *status != before {
            self.changed.notify_one();
        }
    }

    /// Records that an unplugged device was not in the VM that it belongs to.
    pub fn orphan(&self, port: &Port) {
        self.orphans.borrow_mut().push(port.clone());
        self.changed.notify_one();
    }

    /// The VMs whose state fulfils a condition.
    pub fn vms(&self, stand: impl Fn(&Status) -> bool) -> Vec<String> {
        let all = self.status.borrow();
        all.iter().filter(|(_, status)| stand(status)).map(|(vm, _)| vm.clone()).collect()
    }

    /// The line that `systemctl status` shows: `3 VMs, 2 running, 5 devices
    /// attached, 1 waiting`.
    pub fn summary(&self) -> String {
        let all = self.status.borrow();
        let running = all.values().filter(|status| status.running).count();
        let attached: usize = all.values().map(|status| status.attached.len()).sum();
        let waiting: usize = all.values().map(|status| status.waiting.len()).sum();
        let waiting = match waiting + self.late() {
            0 => String::new(),
            count => format!(", {count} waiting"),
        };
        let plural = |count| if count == 1 { "" } else { "s" };
        format!(
            "{} VM{}, {running} running, {attached} device{} attached{waiting}",
            all.len(),
            plural(all.len()),
            plural(attached)
        )
    }

    /// Whether every VM has had its first sync.
    pub fn is_synced(&self) -> bool {
        self.status.borrow().values().all(|status| status.synced)
    }
}
