//! `vms`: the QEMU processes of this host, and whether their monitors are free.

mod advice;
mod probe;
mod show;

use std::path::PathBuf;
use std::sync::Arc;

use serde::Serialize;
use tokio::task::JoinSet;
use tracing::{info, warn};

use super::screen::Screen;
use super::{Context, json, print};
use crate::cli::Vms;
use crate::error::Error;
use crate::host::{Holder, Qemu};
use advice::Advice;
use probe::{Probe, Prober, State};

/// The JSON document.
#[derive(Debug, Serialize)]
struct Report {
    vms: Vec<VmReport>,
}

#[derive(Debug, Serialize)]
struct VmReport {
    pid: i32,
    name: Option<String>,
    user: Option<String>,
    program: String,
    /// QEMU's version, if a monitor told.
    qemu: Option<String>,
    /// `running`, `paused` and so on, if a monitor told.
    status: Option<String>,
    libvirt: bool,
    /// Whether more options come from a file, which is not read.
    reads_config: bool,
    monitors: Vec<MonitorReport>,
    /// `null` if no monitor told.
    controllers: Option<Vec<ControllerReport>>,
    /// What gives the VM a monitor that this tool can use, if it has none.
    to_add: Option<Advice>,
}

#[derive(Debug, Serialize)]
struct MonitorReport {
    /// What to give to the other commands; `null` if that is not known.
    socket: Option<PathBuf>,
    /// Where QEMU has it, in QEMU's words.
    asked: String,
    /// The VM's name in the configuration.
    configured_as: Option<String>,
    state: State,
    held_by: Vec<HolderReport>,
    /// What else there is to say.
    note: Option<String>,
}

#[derive(Debug, Serialize)]
struct HolderReport {
    pid: i32,
    program: String,
}

#[derive(Debug, Serialize)]
struct ControllerReport {
    bus: String,
    ports: u32,
    free: u32,
}

/// Shows every VM; all of them are asked at the same time.
pub async fn run(context: &Context, arguments: &Vms) -> Result<(), Error> {
    let config = Arc::new(context.config_or_none());
    let host = context.host.clone();
    if host.hides_processes() {
        warn!("this user sees only its own processes here (/proc is mounted with hidepid)");
    }
    let prober = Arc::new(Prober { host: host.clone(), time: context.timeout });
    let mut running = JoinSet::new();
    for (order, qemu) in host.qemus().into_iter().enumerate() {
        let (prober, config) = (prober.clone(), config.clone());
        running.spawn(async move {
            let probes = prober.vm(&qemu).await;
            let name = |socket: &PathBuf| {
                let vm = config.vms.iter().find(|vm| vm.socket == *socket)?;
                Some(vm.name.clone())
            };
            (order, report(qemu, probes, &name))
        });
    }
    let mut vms = running.join_all().await;
    vms.sort_by_key(|(order, _)| *order);
    let report = Report { vms: vms.into_iter().map(|(_, vm)| vm).collect() };
    if arguments.json {
        return print(&json(&report)?);
    }
    if report.vms.is_empty() {
        info!("no QEMU runs on this host");
    }
    print(&show::shown(&report.vms, Screen::of_stdout()))
}

fn report(
    qemu: Qemu,
    probes: Vec<Probe>,
    configured: &dyn Fn(&PathBuf) -> Option<String>,
) -> VmReport {
    let Qemu { pid, program, user, command_line, .. } = qemu;
    let has_free = probes.iter().any(|probe| probe.state == State::Free);
    let to_add = (!has_free).then(|| Advice::new(&command_line));
    let mut vm = VmReport {
        pid,
        name: command_line.name,
        user,
        program,
        qemu: None,
        status: None,
        libvirt: command_line.is_libvirt,
        reads_config: command_line.reads_config,
        monitors: Vec::new(),
        controllers: None,
        to_add,
    };
    for probe in probes {
        if let Some(told) = probe.told {
            vm.qemu = Some(told.version.to_string());
            vm.status = told.status.clone();
            vm.name = vm.name.or_else(|| told.name.clone());
            let controller = |c: &crate::guest::Controller| ControllerReport {
                bus: c.bus.clone(),
                ports: c.ports(),
                free: told.free_ports(c),
            };
            vm.controllers = Some(told.controllers.iter().map(controller).collect());
        }
        let holder = |Holder { pid, program, .. }| HolderReport { pid, program };
        vm.monitors.push(MonitorReport {
            configured_as: probe.socket.as_ref().and_then(configured),
            socket: probe.socket,
            asked: probe.asked,
            state: probe.state,
            held_by: probe.clients.into_iter().map(holder).collect(),
            note: probe.note,
        });
    }
    vm
}
