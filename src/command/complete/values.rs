//! The candidates for names: VMs, the host's devices, and the devices in a VM.

use std::collections::BTreeMap;

use super::Candidate;
use crate::command::Context;
use crate::command::running::Running;
use crate::host::proc::cmdline::Endpoint;
use crate::host::{Reach, Strings};
use crate::qemu::qmp::Domain;
use crate::qemu::{Vm, VmAddress};
use crate::usb::{Device, DeviceId, Port};

/// The VMs. A VM of the configuration has its name there. A running VM that is
/// not in the configuration has the prefix `libvirt:`, or the path of its
/// monitor. If the command also accepts a running VM's own name (`enough`),
/// that is a candidate, too.
pub fn vms(context: &Context, enough: bool) -> Vec<Candidate> {
    let config = context.config().unwrap_or_default();
    let mut candidates: Vec<Candidate> = Vec::new();
    for vm in &config.vms {
        candidates.push(Candidate::new(vm.name.clone(), vm.address.to_string()));
    }
    let running = context.running();
    let names: Vec<&str> =
        running.iter().filter(|vm| vm.is_trusted()).filter_map(Running::name).collect();
    for vm in &running {
        let name = vm.name().unwrap_or(&vm.qemu.program);
        // If several VMs have this name, it does not say which one is meant.
        let is_one = vm.is_trusted() && names.iter().filter(|other| **other == name).count() == 1;
        if enough && is_one && config.address(name).is_none() {
            let address = vm.address(&context.host).map(|address| address.to_string());
            candidates.extend(address.map(|address| Candidate::new(name, address)));
        }
        let socket = |monitor: &Endpoint| match monitor {
            Endpoint::Unix(path) => match context.host.reach(vm.qemu.pid, path) {
                Reach::Here(socket) => Some(socket.into()),
                Reach::Elsewhere(_) | Reach::Hidden => None,
            },
            _ => None,
        };
        let sockets = vm.qemu.command_line.monitors.iter().filter_map(socket);
        for address in vm.domain.clone().map(VmAddress::from).into_iter().chain(sockets) {
            if config.vms.iter().all(|vm| vm.address != address) {
                candidates.push(Candidate::new(address.to_string(), name));
            }
        }
    }
    candidates
}

/// The host's devices by port. When the user has typed something, their other
/// names are candidates, too.
pub fn devices(context: &Context, typed: &str, hubs: bool) -> Vec<Candidate> {
    let mut devices = context.host.devices().unwrap_or_default();
    devices.retain(|device| hubs || !device.is_hub());
    let named: Vec<(&Device, Strings)> = devices.iter().zip(strings(context, &devices)).collect();
    let candidate = |(device, strings): &(&Device, Strings)| {
        Candidate::new(device.port.to_string(), name(device, strings))
    };
    let mut candidates: Vec<Candidate> = named.iter().map(candidate).collect();
    if typed.is_empty() {
        return candidates;
    }
    for (device, strings) in named {
        let name = format!("{} {}", device.port, name(device, &strings));
        if let Some(path) = context.host.port_path(&device.port) {
            candidates.push(Candidate::new(path.to_string(), name.as_str()));
        }
        candidates.push(Candidate::new(device.address.to_string(), name.as_str()));
        // If several devices have this name, it does not say which one is
        // meant.
        if devices.iter().filter(|other| other.id == device.id).count() == 1 {
            candidates.push(Candidate::new(device.id.to_string(), name.as_str()));
        }
        if let Some(serial) = strings.serial {
            candidates.push(Candidate::new(format!("serial={serial}"), name));
        }
    }
    candidates
}

/// The host devices in a VM, by id. When the user has typed something, both
/// names of their ports are candidates, too. If the VM does not answer soon,
/// there are no candidates.
pub async fn in_vm(context: &Context, vm: &str, typed: &str) -> Vec<Candidate> {
    let ids = async {
        let address = context.typed_vm(vm).ok()?;
        if address.domain().is_some_and(Domain::asks_for_password) {
            return None;
        }
        let mut vm = Vm::connect(&address, context.timeout).await.ok()?;
        vm.host_devices().await.ok()
    };
    let ids: Vec<DeviceId> = ids.await.unwrap_or_default().into_iter().map(|(id, _)| id).collect();
    let device = |id: &DeviceId| id.port().and_then(|port| context.host.device(&port).ok()?);
    let devices: Vec<Device> = ids.iter().filter_map(device).collect();
    let names = devices.iter().zip(strings(context, &devices));
    let names: BTreeMap<&Port, String> =
        names.map(|(device, strings)| (&device.port, name(device, &strings))).collect();
    let mut candidates = Vec::new();
    for id in ids {
        let port = id.port();
        let name = port.as_ref().and_then(|port| names.get(port));
        let name = name.map_or_else(|| "gone".to_owned(), Clone::clone);
        candidates.push(Candidate::new(id.to_string(), name.as_str()));
        if let Some(port) = port.filter(|_| !typed.is_empty()) {
            candidates.push(Candidate::new(port.to_string(), name.as_str()));
            let path = context.host.port_path(&port);
            candidates.extend(path.map(|path| Candidate::new(path.to_string(), name)));
        }
    }
    candidates
}

/// The strings of devices. A device whose drivers are starting has none.
fn strings(context: &Context, devices: &[Device]) -> Vec<Strings> {
    let host = context.host.clone();
    let ports: Vec<Port> = devices.iter().map(|device| device.port.clone()).collect();
    context.host.in_haste_or_default(ports, move |port| host.strings(&port))
}

/// The name of a device, from its strings, and its ids.
fn name(device: &Device, strings: &Strings) -> String {
    let kind = if device.is_hub() { "hub, " } else { "" };
    let name = strings.product.as_ref().or(strings.manufacturer.as_ref());
    format!("{kind}{} {}", device.id, name.map_or("", |name| name.trim()))
}
