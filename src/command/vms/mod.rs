//! `vms`: shows the QEMU processes of this host, and whether their monitors are
//! free.

mod advice;
mod monitor;
mod show;

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use serde::Serialize;
use tokio::task::JoinSet;
use tracing::{info, warn};

use super::Context;
use crate::cli::Vms;
use crate::error::Error;
use crate::host::{Holder, Qemu};
use crate::policy::config::{Config, VmEntry};
use crate::qemu::{Controller, VmAddress};
use crate::ui::output::{json, print};
use crate::ui::screen::Screen;
use advice::Advice;
use monitor::{Monitor, Monitors, State};

/// The JSON document.
#[derive(Debug, Serialize)]
struct Report {
    vms: Vec<VmReport>,
}

#[derive(Debug, Default, Serialize)]
struct VmReport {
    /// `null` for a configured VM whose process cannot be seen.
    pid: Option<i32>,
    name: Option<String>,
    user: Option<String>,
    program: Option<String>,
    /// QEMU's version, if a monitor answered.
    qemu: Option<String>,
    /// `running`, `paused` and so on, if a monitor answered.
    status: Option<String>,
    libvirt: bool,
    /// Whether QEMU reads more options from a file that could not be read here.
    reads_config: bool,
    monitors: Vec<MonitorReport>,
    /// `null` if no monitor answered.
    controllers: Option<Vec<ControllerReport>>,
    /// What adds a monitor for this tool at the VM's next start, if it has
    /// none.
    to_add: Option<Advice>,
    /// What adds a monitor while the VM runs.
    to_paste: Option<Advice>,
}

#[derive(Debug, Serialize)]
struct MonitorReport {
    /// The address to use with the other commands. `null` if it is not known.
    socket: Option<VmAddress>,
    /// The monitor's address in QEMU's words.
    asked: String,
    /// The VM's name in the configuration.
    configured_as: Option<String>,
    state: State,
    held_by: Vec<HolderReport>,
    /// A further remark.
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

/// Shows every VM. All VMs are asked at the same time.
pub async fn run(context: &Context, arguments: &Vms) -> Result<(), Error> {
    let config = Arc::new(context.config_or_none());
    let host = context.host.clone();
    if host.hides_processes() {
        warn!("this user sees only its own processes here (/proc is mounted with hidepid)");
    }
    let prober = Arc::new(Monitors { host: host.clone(), time: context.timeout });
    let probed = all(context.running().into_iter().map(|running| {
        let prober = prober.clone();
        async move { (prober.vm(&running).await, running.qemu) }
    }));
    let what = || "asking every VM's monitor".to_owned();
    let probed = context.during(what, probed).await;
    let vms = probed.into_iter().map(|(monitors, qemu)| VmReport::of(qemu, monitors, &config));
    let mut vms: Vec<VmReport> = vms.collect();

    // The configured VMs that are not among the running ones.
    let seen = |name: &String| {
        let monitors = vms.iter().flat_map(|vm| &vm.monitors);
        monitors.filter_map(|monitor| monitor.configured_as.as_ref()).any(|known| known == name)
    };
    let mut others = config.vms.clone();
    others.retain(|vm| !seen(&vm.name));
    let probed = all(others.into_iter().map(|vm| {
        let prober = prober.clone();
        async move { (prober.address(&vm.address).await, vm) }
    }));
    for (monitor, vm) in context.during(what, probed).await {
        let mut report = VmReport { name: Some(vm.name), ..VmReport::default() };
        report.add(monitor, &config);
        vms.push(report);
    }
    let report = Report { vms };
    if arguments.json {
        return print(&json(&report)?);
    }
    if report.vms.is_empty() {
        info!("no QEMU runs on this host");
    }
    print(&show::shown(&report.vms, Screen::of_stdout()))
}

/// Runs all tasks at the same time. The results are in the order of the tasks.
async fn all<T: Send + 'static>(
    tasks: impl Iterator<Item = impl Future<Output = T> + Send + 'static>,
) -> Vec<T> {
    let mut running = JoinSet::new();
    for (order, task) in tasks.enumerate() {
        running.spawn(async move { (order, task.await) });
    }
    let mut done = running.join_all().await;
    done.sort_by_key(|(order, _)| *order);
    done.into_iter().map(|(_, result)| result).collect()
}

impl VmReport {
    fn of(qemu: Qemu, monitors: Vec<Monitor>, config: &Config) -> Self {
        let Qemu { pid, program, user, command_line, .. } = qemu;
        let is = |states: &[State]| monitors.iter().any(|monitor| states.contains(&monitor.state));
        // A second monitor does not help if this one may become usable.
        let may_do = is(&[State::Forbidden, State::Silent, State::Stopped]);
        let is_libvirt = command_line.libvirts.is_some();
        let needs_one = !is(&[State::Free]) && !may_do && !is_libvirt;
        let version = monitors.iter().find_map(|m| m.told.as_ref()).map(|told| told.version);
        let mut vm = VmReport {
            pid: Some(pid),
            user,
            program: Some(program),
            libvirt: is_libvirt,
            reads_config: command_line.reads_config,
            to_add: needs_one.then(|| Advice::at_start(&command_line)),
            to_paste: needs_one.then(|| Advice::while_running(&command_line, version)).flatten(),
            name: command_line.name,
            ..VmReport::default()
        };
        monitors.into_iter().for_each(|monitor| vm.add(monitor, config));
        vm
    }

    fn add(&mut self, monitor: Monitor, config: &Config) {
        if let Some(told) = monitor.told {
            self.qemu = Some(told.version.to_string());
            self.status = told.status.clone();
            self.name = self.name.take().or_else(|| told.name.clone());
            let controller = |c: &Controller| ControllerReport {
                bus: c.bus.clone(),
                ports: c.ports(),
                free: told.free_ports(c),
            };
            self.controllers = Some(told.controllers.iter().map(controller).collect());
        }
        let configured = |address: &VmAddress| {
            let is_its = |vm: &&VmEntry| match (&vm.address, address) {
                (VmAddress::Socket(a), VmAddress::Socket(b)) => is_same(a, b),
                (a, b) => a == b,
            };
            Some(config.vms.iter().find(is_its)?.name.clone())
        };
        let holder = |Holder { pid, program, .. }| HolderReport { pid, program };
        self.monitors.push(MonitorReport {
            configured_as: monitor.address.as_ref().and_then(configured),
            socket: monitor.address,
            asked: monitor.asked,
            state: monitor.state,
            held_by: monitor.clients.into_iter().map(holder).collect(),
            note: monitor.note,
        });
    }
}

/// Whether two paths lead to the same file, for example `/run/a.qmp` and
/// `/var/run/a.qmp`.
fn is_same(a: &Path, b: &Path) -> bool {
    let file = |path| std::fs::metadata(path).map(|file| (file.dev(), file.ino())).ok();
    a == b || file(a).is_some_and(|one| file(b) == Some(one))
}
