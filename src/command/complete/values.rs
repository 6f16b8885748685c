//! What can be named: VMs, the host's devices, and what is in a VM.

use super::Candidate;
use crate::command::Context;
use crate::host::proc::cmdline::Endpoint;
use crate::host::{Reach, Strings};
use crate::qemu::Vm;
use crate::text::escape;
use crate::usb::Device;

/// The VMs of the configuration, by name; and the monitors of the QEMUs that
/// run, by path, that have no name.
pub fn vms(context: &Context) -> Vec<Candidate> {
    let config = context.config().unwrap_or_default();
    let names = config.vms.iter();
    let mut candidates: Vec<Candidate> =
        names.map(|vm| Candidate::new(vm.name.clone(), vm.address.to_string())).collect();
    for qemu in context.host.qemus() {
        for monitor in &qemu.command_line.monitors {
            let Endpoint::Unix(path) = monitor else { continue };
            let Reach::Here(socket) = context.host.reach(qemu.pid, path) else { continue };
            if config.vms.iter().all(|vm| vm.address.socket() != Some(&socket)) {
                let name = qemu.command_line.name.as_deref().unwrap_or(&qemu.program);
                candidates.push(Candidate::new(socket.to_string_lossy(), name));
            }
        }
    }
    candidates
}

/// The host's devices, by port; once something was typed, also by their other
/// names.
pub fn devices(context: &Context, typed: &str, hubs: bool) -> Vec<Candidate> {
    let mut devices = context.host.devices().unwrap_or_default();
    devices.retain(|device| hubs || !device.is_hub());
    let mut candidates: Vec<Candidate> = devices
        .iter()
        .map(|device| Candidate::new(device.port.to_string(), name(context, device)))
        .collect();
    if typed.is_empty() {
        return candidates;
    }
    for device in &devices {
        let name = format!("{} {}", device.port, name(context, device));
        if let Some(path) = context.host.port_path(&device.port) {
            candidates.push(Candidate::new(path.to_string(), name.as_str()));
        }
        candidates.push(Candidate::new(device.address.to_string(), name.as_str()));
        // Of several alike, neither is meant.
        if devices.iter().filter(|other| other.id == device.id).count() == 1 {
            candidates.push(Candidate::new(device.id.to_string(), name.as_str()));
        }
        if let Some(serial) = context.host.strings(&device.port).serial {
            candidates.push(Candidate::new(format!("serial={}", escape(&serial)), name));
        }
    }
    candidates
}

/// The host devices in a VM, by id; once something was typed, also by either
/// name of their port. A VM that does not say so soon has none.
pub async fn in_vm(context: &Context, vm: &str, typed: &str) -> Vec<Candidate> {
    let ids = async {
        let address = context.vm(vm).ok()?;
        let mut vm = Vm::connect(&address, context.timeout).await.ok()?;
        vm.host_devices().await.ok()
    };
    let mut candidates = Vec::new();
    for (id, _) in ids.await.unwrap_or_default() {
        let port = id.port();
        let device = port.as_ref().and_then(|port| context.host.device(port).ok()?);
        let name = device.map_or_else(|| "gone".to_owned(), |device| name(context, &device));
        candidates.push(Candidate::new(id.to_string(), name.as_str()));
        if let Some(port) = port.filter(|_| !typed.is_empty()) {
            candidates.push(Candidate::new(port.to_string(), name.as_str()));
            let path = context.host.port_path(&port);
            candidates.extend(path.map(|path| Candidate::new(path.to_string(), name)));
        }
    }
    candidates
}

/// What a device calls itself, and its ids.
fn name(context: &Context, device: &Device) -> String {
    let Strings { manufacturer, product, .. } = context.host.strings(&device.port);
    let kind = if device.is_hub() { "hub, " } else { "" };
    let name = product.or(manufacturer).unwrap_or_default();
    format!("{kind}{} {}", device.id, name.trim())
}
