//! `udev VM`: handles one event. The event comes from the environment that udev
//! gives to a program (udev(7), `RUN`), or a person typed it.

use std::pin::pin;
use std::time::{Duration, Instant};

use tracing::{debug, info, warn};

use super::{Context, options};
use crate::attach::{self, Attached, Detached, Early, Options};
use crate::cli::Udev;
use crate::error::Error;
use crate::host::{self, Look};
use crate::qemu::{Vm, VmAddress};
use crate::text::{chain, escape, udev_word};
use crate::usb::{Action, Device, DeviceId, HotplugEvent};

/// How long to wait until the monitor is free. If many devices are plugged in
/// at once, each event has its own process, and QEMU serves one process after
/// the other. udev kills a program after three minutes (udev(7), `RUN`).
const TURN: Duration = Duration::from_secs(60);

/// Handles the event, and logs the result in one line.
pub async fn run(context: &Context, arguments: &Udev) -> Result<(), Error> {
    let variable = |name: &str| Some(std::env::var_os(name)?.to_string_lossy().into_owned());
    let start = Instant::now();
    let event = HotplugEvent::from_variables(|name| as_of_device(variable, name))?;
    let Some(event) = event.filter(|event| event.action != Action::Bind) else {
        debug!("not an event of ours");
        return Ok(());
    };
    match act(context, arguments, &event, start).await {
        Err(Error::Qmp(error)) if error.is_other_user() => {
            let vm = escape(&arguments.vm);
            warn!(%vm, "nothing to do, the VM counts as not running: {}", chain(&error));
            Ok(())
        }
        Err(Error::Qmp(error)) if error.is_not_running() => {
            let vm = escape(&arguments.vm);
            info!(%vm, "nothing to do, the VM is not running: {}", chain(&error));
            Ok(())
        }
        Err(Error::Host(host::Error::NotAuthorized(device))) => {
            warn!(port = %device.port, "{}", after_authorizing(&device));
            Err(host::Error::NotAuthorized(device).into())
        }
        done => done,
    }
}

/// A variable of an event. If a device is authorized later, the kernel adds its
/// interfaces, but it sends no event for the device itself (Linux,
/// drivers/usb/core/hub.c, `usb_authorize_device`). If a rule matches the `add`
/// event of an interface, that event is treated as the `add` event of its
/// device.
fn as_of_device(get: impl Fn(&str) -> Option<String>, name: &str) -> Option<String> {
    let is = |name, value| get(name).as_deref() == Some(value);
    if !is("DEVTYPE", "usb_interface") || !is("ACTION", "add") {
        return get(name);
    }
    match name {
        "DEVTYPE" => Some("usb_device".to_owned()),
        "DEVPATH" => Some(get(name)?.rsplit_once('/')?.0.to_owned()),
        "PRODUCT" | "TYPE" => None,
        name => get(name),
    }
}

/// What the user can add to a rule that was called before the device was
/// authorized. The command is the one that the rule called, with its options.
fn after_authorizing(device: &Device) -> String {
    let program = std::env::current_exe().unwrap_or_else(|_| env!("CARGO_PKG_NAME").into());
    let words = std::iter::once(program.into_os_string()).chain(std::env::args_os().skip(1));
    let words: Option<Vec<String>> = words.map(|word| udev_word(word.to_str()?)).collect();
    let command = words.map_or("(the command of this rule)".to_owned(), |words| words.join(" "));
    format!(
        "to attach {device} once it is authorized, add a rule: SUBSYSTEM==\"usb\", \
         ENV{{DEVTYPE}}==\"usb_interface\", ACTION==\"add\", DEVPATH==\"*/{}/*\", RUN+=\"{}\"",
        device.port,
        escape(&command)
    )
}

async fn act(
    context: &Context,
    arguments: &Udev,
    event: &HotplugEvent,
    start: Instant,
) -> Result<(), Error> {
    let address = context.vm(&arguments.vm)?;
    let options = options::options(&arguments.how, false, Look::Quick)?;
    match event.action {
        Action::Add => {
            add(context, &address, &context.host.device_of(event)?, &options, start).await
        }
        Action::Remove => remove(context, &address, event, start).await,
        Action::Bind => Ok(()),
    }
}

async fn connect(context: &Context, address: &VmAddress) -> Result<Vm, Error> {
    // In a box, or each of the futures around it would have room for it.
    let turn = Box::pin(Vm::connect_in_turn(address, TURN.max(context.timeout), context.timeout));
    let shown = address.to_string();
    let what = || format!("waiting for a turn at the monitor at {}", escape(&shown));
    Ok(context.during(what, turn).await?)
}

async fn add(
    context: &Context,
    address: &VmAddress,
    device: &Device,
    options: &Options,
    start: Instant,
) -> Result<(), Error> {
    if device.is_hub() {
        return Err(Error::Hub(device.clone()));
    }
    let (host, limit) = (&context.host, context.timeout);
    // A thread costs more than a look at what is there.
    let options = &Options { blocking: host.may_be_starting(&device.port), ..options.clone() };
    let connecting = pin!(connect(context, address));
    let (vm, mut early) = attach::while_connecting(host, device, options, limit, connecting).await;
    let mut vm = vm?;
    let uses = Early::uses(&mut early, host, device, options);
    let attached = attach::attach_opened(host, &mut vm, device, options, early).await?;
    let (name, id, ms) = (vm.name(), DeviceId::for_port(&device.port), start.elapsed().as_millis());
    let vm = escape(&name);
    match attached {
        Attached::There(guest_port) => {
            info!(%vm, port = %device.port, %id, ms, "attached {device} to {vm} at {guest_port} in {ms} ms");
            attach::tell_uses(&name, device, &uses);
        }
        Attached::Otherwise(other) => {
            let other = escape(&other);
            info!(%vm, port = %device.port, "{device} is in {vm} already, as {other}");
        }
        Attached::Already => info!(%vm, port = %device.port, %id, "{device} is in {vm} already"),
    }
    Ok(())
}

async fn remove(
    context: &Context,
    address: &VmAddress,
    event: &HotplugEvent,
    start: Instant,
) -> Result<(), Error> {
    let mut vm = connect(context, address).await?;
    let (host, address) = (&context.host, event.address);
    let (id, is_detached) = match &event.port {
        Some(port) => {
            let id = DeviceId::for_port(port);
            match attach::detach_leftover(host, &mut vm, &id, address).await? {
                Detached::Leftover(_) => (Some(id), true),
                Detached::NotThere => (None, false),
                // A person created the event with `udevadm trigger`.
                Detached::Stays => (Some(id), false),
            }
        }
        // A person typed the command, and means it. The hardware may be gone,
        // but the VM knows the id.
        None => {
            let in_vm = vm.host_devices().await?.into_iter();
            match in_vm.filter(|(_, given)| given.address == address).map(|(id, _)| id).next() {
                Some(id) if vm.detach(&id).await? => (Some(id), true),
                _ => (None, false),
            }
        }
    };
    let (name, ms) = (vm.name(), start.elapsed().as_millis());
    let vm = escape(&name);
    let what = match (&event.port, event.address) {
        (Some(port), _) => port.to_string(),
        (None, address) => address.map(|address| address.to_string()).unwrap_or_default(),
    };
    match id {
        Some(id) if is_detached => {
            info!(%vm, port = %what, %id, ms, "detached {what} from {vm} in {ms} ms")
        }
        Some(id) => info!(
            %vm, port = %what, %id,
            "nothing to do, {what} is still plugged in; `usb-qmp-hotplug detach` detaches it"
        ),
        None => info!(%vm, port = %what, "nothing to do, {what} is not in {vm}"),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interface_that_is_added_stands_for_its_device() {
        let event = |action: &'static str| {
            let get = move |name: &str| {
                let value = match name {
                    "ACTION" => action,
                    "SUBSYSTEM" => "usb",
                    "DEVTYPE" => "usb_interface",
                    "DEVPATH" => "/devices/pci0000:00/0000:00:04.0/usb1/1-1/1-1.2/1-1.2:1.0",
                    "PRODUCT" => "152d/2338/100",
                    "TYPE" => "0/0/0",
                    _ => return None,
                };
                Some(value.to_owned())
            };
            HotplugEvent::from_variables(|name| as_of_device(get, name)).unwrap()
        };
        let added = event("add").unwrap();
        assert!(added.device().is_none());
        assert_eq!((added.action, added.port), (Action::Add, Some("1-1.2".parse().unwrap())));
        for action in ["remove", "bind", "unbind", "change"] {
            assert_eq!(event(action), None, "{action}");
        }
    }
}
