//! Detaches a device from the VM that has it, whichever VM that is. `attach
//! --take` and `release` use it.

use std::time::Duration;

use tokio::task::JoinSet;
use tracing::debug;

use super::Context;
use super::running::Running;
use crate::error::Error;
use crate::host::{self, Host, Qemu};
use crate::passed::{self, Passed};
use crate::qemu::{Vm, VmAddress};
use crate::text::{chain, escape};
use crate::usb::{Device, Selector};

/// How long to wait for the answer of a VM that may not have the device.
const PATIENCE: Duration = Duration::from_secs(2);

/// What was detached from a VM. In a dry run, what would be.
#[derive(Debug)]
pub struct Taken {
    /// The VM, as text for messages.
    pub vm: String,
    /// Its names in the VM: ids, or paths in QEMU's object tree.
    pub names: Vec<String>,
}

impl Taken {
    /// The names, for messages.
    pub fn names(&self) -> String {
        let names: Vec<_> = self.names.iter().map(|name| escape(name)).collect();
        names.join(", ")
    }
}

/// Detaches a device from the VM that has it. Returns `None` if no VM is known
/// to have it. The caller can name a QEMU that is left alone.
///
/// # Errors
///
/// [`Error::OutOfReach`] if the VM cannot be asked, [`Error::WouldReturn`] if
/// it would take the device again, [`Error::Unclear`], and the errors of the
/// conversation.
pub async fn take(
    context: &Context,
    device: &Device,
    except: Option<i32>,
    dry_run: bool,
) -> Result<Option<Taken>, Error> {
    let host = &context.host;
    let mut qemus = host.qemus();
    qemus.retain(|qemu| Some(qemu.pid) != except);
    let holds = |qemu: &Qemu| host.holds(qemu.pid, device.address);
    let holder = qemus.iter().find(|qemu| holds(qemu) == Some(true)).cloned();
    if let Some(holder) = &holder {
        qemus = vec![holder.clone()];
    }
    let holders = holder.as_ref().and_then(|qemu| Running::of(qemu.clone()).address(host));
    // Another QEMU may listen now at the socket of an earlier one. A listener
    // that is not a QEMU created the socket for one, as libvirt does.
    let is_asked = |vm: &Vm| match vm.pid() {
        Some(pid) if host.qemu(pid).is_some() => match &holder {
            Some(holder) => holder.pid == pid,
            None => except != Some(pid),
        },
        _ => true,
    };
    for address in addresses(context, qemus) {
        let is_holders = holders.as_ref() == Some(&address);
        let time = if is_holders { context.timeout } else { PATIENCE.min(context.timeout) };
        let what = || format!("asking {address} for its devices");
        let in_vm = match context.during(what, look(host, &address, time, is_asked)).await {
            Ok(Some(in_vm)) => in_vm,
            Ok(None) => continue,
            Err(error) => {
                debug!("passed over {address}: {}", chain(&error));
                continue;
            }
        };
        let names = passed::find(&in_vm, device)?;
        may_go(&in_vm, device, &names)?;
        if !names.is_empty() {
            return remove(context, &address, names, dry_run).await.map(Some);
        }
    }
    match holder {
        Some(holder) => {
            let vm = host.holder(holder.pid).to_string();
            Err(Error::OutOfReach { device: device.clone(), vm })
        }
        None => Ok(None),
    }
}

/// Detaches the leftover of a device that is gone, from whichever VM has it.
/// `missing` is the host's error for the device.
///
/// # Errors
///
/// `missing` if no VM has a leftover, [`Error::UnknownLeftover`] if a VM that
/// may have one did not answer, and the errors of the conversation with the VM
/// that has it.
pub async fn take_leftover(
    context: &Context,
    selector: &Selector,
    missing: host::Error,
    dry_run: bool,
) -> Result<Taken, Error> {
    let mut asked = JoinSet::new();
    for address in addresses(context, context.host.qemus()) {
        let (host, time) = (context.host.clone(), context.timeout);
        asked.spawn(async move {
            let in_vm = look(&host, &address, time, |_| true).await;
            (address, in_vm.map(Option::unwrap_or_default))
        });
    }
    let what = || "asking the VMs for their devices".to_owned();
    let mut silent = None;
    while let Some(Ok((address, in_vm))) = context.during(what, asked.join_next()).await {
        match in_vm {
            Ok(in_vm) => {
                // If the leftover is not in this VM, it may be in another one.
                let names = passed::choose(&context.host, selector, &in_vm).unwrap_or_default();
                if !names.is_empty() {
                    return remove(context, &address, names, dry_run).await;
                }
            }
            Err(Error::Qmp(error)) if error.is_not_running() => {}
            Err(error) => silent = Some((address.to_string(), Box::new(error))),
        }
    }
    Err(match silent {
        Some((vm, source)) => Error::UnknownLeftover { missing, vm, source },
        None => missing.into(),
    })
}

/// Reads what a VM was given. Returns `None` if it is not a VM that `is_asked`
/// accepts.
async fn look(
    host: &Host,
    address: &VmAddress,
    time: Duration,
    is_asked: impl Fn(&Vm) -> bool,
) -> Result<Option<Vec<Passed>>, Error> {
    let mut vm = Vm::connect(address, time).await?;
    match is_asked(&vm) {
        true => passed::look(host, &mut vm).await.map(Some),
        false => Ok(None),
    }
}

/// Removes these objects from a VM. A dry run leaves them.
async fn remove(
    context: &Context,
    address: &VmAddress,
    names: Vec<String>,
    dry_run: bool,
) -> Result<Taken, Error> {
    let shown = address.to_string();
    if !dry_run {
        let mut vm = context.connect(address).await?;
        for name in &names {
            let what = || format!("detaching {} from {}", escape(name), escape(&shown));
            context.during(what, vm.remove(name)).await?;
        }
    }
    Ok(Taken { vm: shown, names })
}

/// Refuses to detach a device that the VM's QEMU would take again: another of
/// its objects is looking for such a device and has not found one yet.
fn may_go(in_vm: &[Passed], device: &Device, names: &[String]) -> Result<(), Error> {
    let waits = |passed: &&Passed| {
        let object = &passed.object;
        !names.is_empty()
            && !names.contains(&object.name)
            && object.is_attached != Some(true)
            && object.wanted.is_search()
            && object.wanted.fits(device)
    };
    match in_vm.iter().find(waits) {
        Some(passed) => {
            let by = passed.object.name.clone();
            Err(Error::WouldReturn { device: device.clone(), by })
        }
        None => Ok(()),
    }
}

/// The addresses of the monitors of these QEMUs and of the configured VMs.
fn addresses(context: &Context, qemus: Vec<Qemu>) -> Vec<VmAddress> {
    let running = qemus.into_iter().filter_map(|qemu| Running::of(qemu).address(&context.host));
    let mut found: Vec<VmAddress> = running.collect();
    for vm in context.config_or_none().vms {
        if !found.contains(&vm.address) {
            found.push(vm.address);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qemu::{UsbHost, Wanted};

    #[test]
    fn what_the_vm_would_take_back_stays() {
        let device = Device {
            port: "1-1".parse().unwrap(),
            address: "1:2".parse().unwrap(),
            id: "46f4:0001".parse().unwrap(),
            hub: false,
        };
        let passed = |name: &str, vendor, is_attached| {
            let wanted = Wanted { vendor, ..Wanted::default() };
            let object = UsbHost { name: name.into(), wanted, is_attached: Some(is_attached) };
            let devices = if is_attached { vec![device.clone()] } else { Vec::new() };
            Passed { object, devices }
        };
        let has = passed("has", Some(0x46f4), true);
        let may = |other: Passed| may_go(&[has.clone(), other], &device, &["has".to_owned()]);
        assert!(may(passed("other", Some(0x46f5), false)).is_ok());
        let refused = may(passed("waits", Some(0x46f4), false)).unwrap_err();
        assert!(refused.to_string().contains("its waits looks for such a device"), "{refused}");
    }
}
