//! `sync [VM...]`: attaches and detaches devices so that the VMs match the
//! configuration.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Weak};

use serde::Serialize;
use tokio::task::JoinSet;
use tracing::{debug, info, warn};

use super::Context;
use crate::attach::Attached;
use crate::cli::Sync;
use crate::error::Error;
use crate::host::{Host, Look};
use crate::policy::{Policy, Table};
use crate::qemu::{Vm, VmAddress};
use crate::reconcile::{self, Done, Handled, InVm, Known, Step, Vms};
use crate::text::{chain, escape};
use crate::ui::output::{json, print, together};
use crate::ui::progress;
use crate::usb::{DeviceId, Port};

/// The JSON document.
#[derive(Debug, Serialize)]
struct Report {
    vms: Vec<VmReport>,
}

#[derive(Debug, Serialize)]
struct VmReport {
    vm: String,
    socket: VmAddress,
    running: bool,
    actions: Vec<ActionReport>,
    error: Option<String>,
}

#[derive(Debug, Serialize)]
struct ActionReport {
    action: &'static str,
    id: DeviceId,
    port: Option<Port>,
    /// The line of the rule in the configuration.
    rule_line: Option<usize>,
    why: String,
    done: bool,
    error: Option<String>,
}

/// The facts that one VM's sync needs.
struct Job {
    host: Host,
    policy: Arc<Policy>,
    table: Table,
    timeout: std::time::Duration,
    dry_run: bool,
}

/// Syncs every VM that it can, all at the same time, and then reports the
/// failures.
pub async fn run(context: &Context, arguments: &Sync) -> Result<(), Error> {
    let policy = Arc::new(Policy::new(context.config()?));
    policy.warn_of_exposed(&context.host, &context.config);
    if let Some(told) = policy.by_number(&context.host).filter(|_| arguments.dry_run) {
        warn!("{}: {told}", escape(&context.config.to_string_lossy()));
    }
    let what = || "waiting for the drivers of devices that are starting".to_owned();
    let table = policy.table_within(&context.host, context.timeout);
    let table = context.during(what, table).await?;
    let unclear = table.values().filter(|seen| !seen.is_clear);
    let unclear: Vec<Error> = unclear.map(|seen| Error::Silent(seen.device.clone())).collect();
    let vms = vms(context, &policy, &arguments.vms)?;
    let (host, timeout, dry_run) = (context.host.clone(), context.timeout, arguments.dry_run);
    let job = Arc::new(Job { host, policy, table, timeout, dry_run });
    let (mut running, mut names) = (JoinSet::new(), Vec::new());
    for (order, (name, address)) in vms.into_iter().enumerate() {
        let (job, named) = (job.clone(), !arguments.vms.is_empty());
        // Each job keeps its VM's name until it is done.
        let name: Arc<str> = name.into();
        names.push(Arc::downgrade(&name));
        running.spawn(async move { (order, job.vm(name.to_string(), address, named).await) });
    }
    let waiting = || {
        let names = names.iter().filter_map(Weak::upgrade);
        let names: Vec<String> = names.map(|name| escape(&name).into_owned()).collect();
        format!("waiting for {}", names.join(", "))
    };
    let mut done = progress::during(context.quiet, waiting, running.join_all()).await;
    done.sort_by_key(|(order, _)| *order);
    let (mut reports, mut errors) = (Vec::new(), unclear);
    for (_, (report, failed)) in done {
        reports.push(report);
        errors.extend(failed);
    }
    let actions = reports.iter().map(|report| report.actions.len().max(1));
    let count = errors.len().max(actions.sum());
    if arguments.json {
        print(&json(&Report { vms: reports })?)?;
    } else if !context.quiet {
        print(&shown(&reports, dry_run))?;
    }
    together(errors, count)
}

/// The VMs that the user named, or all of them.
fn vms(
    context: &Context,
    policy: &Policy,
    named: &[String],
) -> Result<Vec<(String, VmAddress)>, Error> {
    let all = policy.config().vms.iter();
    if named.is_empty() {
        return Ok(all.map(|vm| (vm.name.clone(), vm.address.clone())).collect());
    }
    let one = |named: &String| {
        let address = context.vm(named)?;
        let known = policy.config().vms.iter().find(|vm| vm.address == address);
        let known = known.ok_or_else(|| {
            let named = escape(named);
            Error::Usage(format!("{named} is no VM of the configuration; add a [vm.NAME] for it"))
        })?;
        Ok((known.name.clone(), address))
    };
    let mut vms: Vec<_> = named.iter().map(one).collect::<Result<_, Error>>()?;
    // Two syncs of one VM at the same time would disturb each other.
    let mut seen = BTreeSet::new();
    vms.retain(|(name, _)| seen.insert(name.clone()));
    Ok(vms)
}

impl Job {
    /// Syncs one VM. If it does not run, there is nothing to do, but that is an
    /// error if the user named it.
    async fn vm(&self, vm: String, address: VmAddress, named: bool) -> (VmReport, Vec<Error>) {
        let mut report = VmReport {
            vm,
            socket: address.clone(),
            running: true,
            actions: Vec::new(),
            error: None,
        };
        let in_vm = match self.look(&address).await {
            Ok(in_vm) => in_vm,
            Err(Error::Qmp(error)) if error.is_not_running() && !named => {
                if error.is_other_user() {
                    warn!(vm = report.vm, "{}: {}", report.vm, chain(&error));
                } else {
                    info!(vm = report.vm, "nothing to do, VM {} is not running", report.vm);
                }
                report.running = false;
                return (report, Vec::new());
            }
            Err(error) => {
                report.running = false;
                report.error = Some(chain(&error));
                return (report, vec![error]);
            }
        };
        let present: Vec<String> = in_vm.keys().map(Port::to_string).collect();
        debug!(
            "VM {} has {}",
            report.vm,
            match present.as_slice() {
                [] => "no devices of this host".to_owned(),
                ports => format!("the devices of {}", ports.join(", ")),
            }
        );
        let mut errors = Vec::new();
        for (port, step) in reconcile::steps(&report.vm, &self.table, &in_vm, &Handled::new()) {
            let done = self.port(&report.vm, &address, &port).await;
            let Some(action) = self.action(port, step, &done) else { continue };
            report.actions.push(action);
            errors.extend(done.err());
        }
        (report, errors)
    }

    fn vms(&self) -> Vms<'_> {
        let (host, policy, dry_run) = (&self.host, &self.policy, self.dry_run);
        Vms { host, policy, dry_run, look: Look::Thorough }
    }

    async fn look(&self, address: &VmAddress) -> Result<BTreeMap<Port, InVm>, Error> {
        let mut vm = Vm::connect(address, self.timeout).await?;
        reconcile::look(self.vms(), &mut vm).await
    }

    /// Attaches or detaches at one port, as the rules say, in its own
    /// conversation.
    async fn port(&self, name: &str, address: &VmAddress, port: &Port) -> Result<Done, Error> {
        let seen = self.table.get(port);
        let once = async || {
            let mut vm = Vm::connect(address, self.timeout).await?;
            let known = Known { seen, ..Known::default() };
            reconcile::port(self.vms(), &mut vm, name, port, known).await
        };
        match once().await {
            Err(error) if reconcile::unmount(self.vms(), seen, &error).await? => once().await,
            done => done,
        }
    }

    /// The report about a step. `None` if the step was not needed any more.
    fn action(&self, port: Port, step: Step, done: &Result<Done, Error>) -> Option<ActionReport> {
        let assignment = self.table.get(&port).and_then(|seen| seen.assignment.as_ref());
        let line = assignment.map(|assignment| self.policy.line(assignment));
        let (action, rule_line, why) = match (step, done) {
            (_, Ok(Done::Nothing(_))) | (Step::Nothing, _) => return None,
            (_, Ok(Done::Attached(device, Attached::Otherwise(name)))) => {
                debug!("{device} is in the VM already, as {}", escape(name));
                return None;
            }
            (_, Ok(Done::Detached(why))) => ("detach", None, why.to_string()),
            (Step::Detach(why), Err(_)) => ("detach", None, why.to_string()),
            (_, Ok(Done::Attached(..))) | (Step::Attach, Err(_)) => {
                let why = line.map(|line| format!("the rule at line {line}"));
                ("attach", line, why.unwrap_or_default())
            }
        };
        Some(ActionReport {
            action,
            id: DeviceId::for_port(&port),
            port: Some(port),
            rule_line,
            why,
            done: done.is_ok() && !self.dry_run,
            error: done.as_ref().err().map(|error| chain(error)),
        })
    }
}

fn shown(reports: &[VmReport], dry_run: bool) -> String {
    let mut text = String::new();
    for VmReport { vm, running, actions, .. } in reports {
        if *running && actions.is_empty() {
            text += &format!("{vm}: nothing to do\n");
        }
        for ActionReport { action, id, why, error, .. } in actions {
            let did = match (dry_run, error) {
                (_, Some(_)) => format!("could not {action}"),
                (true, None) => format!("would {action}"),
                (false, None) => format!("{action}ed"),
            };
            let error = error.as_ref().map(|error| format!(": {error}")).unwrap_or_default();
            text += &format!("{vm}: {did} {id} ({why}){error}\n");
        }
    }
    text
}
