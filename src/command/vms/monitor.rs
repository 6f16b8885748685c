//! Finds out whether a monitor is free, without disturbing anybody. The
//! kernel's tables show who is connected. Only if nobody is, this tool connects
//! and closes the connection at once.

use std::time::Duration;

use serde::Serialize;
use tokio::time::timeout;

use crate::command::running::Running;
use crate::host::proc::cmdline::Endpoint;
use crate::host::{Holder, Host, Qemu, Reach};
use crate::qemu::qmp::{self, Domain, ErrorKind, LibvirtError};
use crate::qemu::{Inventory, Vm, VmAddress};
use crate::text::{chain, escape};

/// The state of a monitor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// It answers and accepts commands.
    Free,
    /// Another client uses it.
    Held,
    /// It does not answer.
    Silent,
    /// QEMU's process is stopped.
    Stopped,
    /// The socket was removed, or nobody listens on it.
    Gone,
    /// Another process listens on its path now.
    Taken,
    /// This user may not connect to it, or not see where it is.
    Forbidden,
    /// This tool cannot use its kind.
    Unusable,
    /// It sent something that is not QMP.
    Broken,
}

impl State {
    /// The name of the state in the JSON document.
    pub fn word(self) -> &'static str {
        match self {
            State::Free => "free",
            State::Held => "held",
            State::Silent => "silent",
            State::Stopped => "stopped",
            State::Gone => "gone",
            State::Taken => "taken",
            State::Forbidden => "forbidden",
            State::Unusable => "unusable",
            State::Broken => "broken",
        }
    }
}

/// The result of checking a monitor.
#[derive(Debug)]
pub struct Monitor {
    /// The address to use with the other commands.
    pub address: Option<VmAddress>,
    pub asked: String,
    pub state: State,
    /// The clients that use it, as far as they can be seen.
    pub clients: Vec<Holder>,
    pub note: Option<String>,
    /// The facts about the VM, if it answered.
    pub told: Option<Inventory>,
}

impl Monitor {
    fn at(address: VmAddress) -> Self {
        Monitor { address: Some(address.clone()), ..Monitor::of(address.to_string()) }
    }

    fn of(asked: String) -> Self {
        let (clients, state) = (Vec::new(), State::Free);
        Monitor { address: None, asked, state, clients, note: None, told: None }
    }
}

/// The facts that the check of monitors needs.
#[derive(Debug)]
pub struct Monitors {
    pub host: Host,
    pub time: Duration,
}

impl Monitors {
    /// Checks the monitors of a VM one after the other, so that QEMU has at
    /// most one client of this tool. The time limit is for all of them
    /// together.
    pub async fn vm(&self, Running { qemu, domain }: &Running) -> Vec<Monitor> {
        let deadline = tokio::time::Instant::now() + self.time;
        let mut monitors: Vec<Monitor> = Vec::new();
        let libvirts = match domain {
            Some(domain) => Some(Monitor::at(domain.clone().into())),
            None => qemu.command_line.libvirts.as_ref().map(|monitor| self.look(qemu, monitor)),
        };
        let others = self.host.monitors(qemu);
        let looked = others.iter().map(|endpoint| (self.look(qemu, endpoint), Some(endpoint)));
        for (mut monitor, endpoint) in
            libvirts.map(|monitor| (monitor, None)).into_iter().chain(looked)
        {
            if monitor.state == State::Free {
                let is_first = monitors.iter().all(|monitor| monitor.told.is_none());
                let left = deadline.saturating_duration_since(tokio::time::Instant::now());
                self.ask(Some(qemu), &mut monitor, left, is_first).await;
            }
            let is_unknown = matches!(endpoint, Some(Endpoint::Listening(_)));
            if is_unknown && monitor.state != State::Free {
                continue;
            }
            monitors.push(monitor);
        }
        monitors
    }

    /// Checks a VM whose QEMU is not known.
    pub async fn address(&self, address: &VmAddress) -> Monitor {
        let mut monitor = Monitor::at(address.clone());
        self.ask(None, &mut monitor, self.time, true).await;
        monitor
    }

    /// The state that can be seen without connecting. If there is no sign of a
    /// problem, the monitor is free, as far as this is known.
    fn look(&self, qemu: &Qemu, endpoint: &Endpoint) -> Monitor {
        let mut monitor = Monitor::of(String::new());
        let mut is = |state, note: &str| {
            monitor.state = state;
            monitor.note = Some(note.to_owned());
        };
        let path = match endpoint {
            Endpoint::Unix(path) | Endpoint::Listening(path) => path.clone(),
            Endpoint::Descriptor(number) => match self.inherited(qemu.pid, *number) {
                Some(path) => path,
                None => {
                    is(State::Forbidden, "its path can be seen only by QEMU's user and by root");
                    monitor.asked = format!("fd={number}");
                    return monitor;
                }
            },
            Endpoint::Client(path) => {
                is(State::Unusable, "QEMU connects to it, and listens to nobody there");
                monitor.asked = path.clone();
                return monitor;
            }
            Endpoint::Other(words) => {
                is(State::Unusable, "not a Unix socket, so that no device can be passed to it");
                monitor.asked = words.clone();
                return monitor;
            }
        };
        match self.host.reach(qemu.pid, &path) {
            Reach::Here(socket) => monitor.address = Some(socket.into()),
            Reach::Elsewhere(socket) => {
                monitor.note =
                    Some("in a mount namespace of its own, a container's perhaps".into());
                monitor.address = Some(socket.into());
            }
            Reach::Hidden => {
                is(State::Forbidden, "relative to a directory that this user may not see");
            }
        }
        if let Some(clients) = self.host.clients(qemu.pid, &path) {
            monitor.state = State::Held;
            monitor.clients = clients;
        } else if qemu.is_stopped && monitor.state == State::Free {
            monitor.state = State::Stopped;
        }
        monitor.asked = path;
        monitor
    }

    /// The path of a socket that a process inherited as a descriptor.
    fn inherited(&self, pid: i32, descriptor: u32) -> Option<String> {
        let inode = *self.host.open_sockets(pid)?.get(&descriptor)?;
        self.host.unix_sockets(pid).path(inode).map(str::to_owned)
    }

    /// Connects, and asks which ports are free. Nothing is sent before the
    /// greeting, because a monitor that another client uses would execute it
    /// later.
    async fn ask(&self, qemu: Option<&Qemu>, monitor: &mut Monitor, left: Duration, inspect: bool) {
        let Some(address) = monitor.address.clone() else { return };
        if address.domain().is_some_and(Domain::asks_for_password) {
            monitor.state = State::Forbidden;
            monitor.note = Some(
                "libvirt would ask for a password; root and the group libvirt need none".into(),
            );
            return;
        }
        let mut vm = match connect(&address, left).await {
            Ok(Some(vm)) => vm,
            Ok(None) => {
                monitor.state = State::Silent;
                // A client may have connected in the meantime, or this user may
                // not see it.
                let clients = qemu.and_then(|qemu| self.host.clients(qemu.pid, &monitor.asked));
                if let Some(clients) = clients {
                    monitor.state = State::Held;
                    monitor.clients = clients;
                }
                return;
            }
            Err(error) => return failed(monitor, &error),
        };
        // It is the id of the process that called listen(2). For libvirt's
        // QEMUs, that is libvirt.
        let is_other =
            |pid: &i32| qemu.is_some_and(|q| q.pid != *pid) && self.host.qemu(*pid).is_some();
        if let Some(other) = vm.pid().filter(is_other) {
            monitor.state = State::Taken;
            monitor.note = Some(format!("process {other} listens there now"));
            return;
        }
        if inspect {
            match vm.inspect().await {
                Ok(inventory) => monitor.told = Some(inventory),
                Err(error) => failed(monitor, &error),
            }
        }
    }
}

/// Connects to the monitor. Returns `None` if there is no greeting in half of
/// the time, so that there is time for the VM's other monitors. QEMU sends it
/// when its main loop runs the next time.
async fn connect(address: &VmAddress, left: Duration) -> Result<Option<Vm>, qmp::Error> {
    match timeout(left / 2, Vm::connect(address, left)).await {
        Ok(Err(qmp::Error { kind: ErrorKind::NoGreeting { .. }, .. })) | Err(_) => Ok(None),
        Ok(connected) => connected.map(Some),
    }
}

/// The state of the monitor that an error of libvirt means.
fn of_libvirt(error: &LibvirtError) -> State {
    match error {
        LibvirtError::Forbidden(_) => State::Forbidden,
        LibvirtError::Busy => State::Silent,
        error if error.is_no_vm() => State::Gone,
        _ => State::Broken,
    }
}

fn failed(monitor: &mut Monitor, error: &qmp::Error) {
    let (state, note) = match &error.kind {
        ErrorKind::NoSocket(_) => (State::Gone, "there is no such socket".to_owned()),
        ErrorKind::NobodyListens(_) => (State::Gone, "nobody listens on the socket".to_owned()),
        ErrorKind::Connect(source) if source.kind() == std::io::ErrorKind::PermissionDenied => {
            (State::Forbidden, "this user may not connect to it; root may".to_owned())
        }
        ErrorKind::Connect(source) => (State::Broken, escape(&source.to_string()).into_owned()),
        ErrorKind::Libvirt(error) => (of_libvirt(error), error.to_string()),
        ErrorKind::NoReply { .. } => (State::Silent, "it greets, and answers nothing".to_owned()),
        _ => (State::Broken, chain(error)),
    };
    monitor.state = state;
    monitor.note = Some(note);
}
