//! `udev VM`: one event, from the environment that udev gives to a program it
//! runs (udev(7), `RUN`), or that a person typed.

use std::time::{Duration, Instant};

use tracing::{debug, info};

use super::{Context, options};
use crate::attach::{self, Attached, Detached, Options};
use crate::cli::Udev;
use crate::error::Error;
use crate::host::Look;
use crate::qemu::{Vm, VmAddress};
use crate::text::{chain, escape};
use crate::usb::{Action, Device, DeviceId, HotplugEvent};

/// How long to wait until the monitor is free. Of many devices that are
/// plugged in at once, each event has a process of its own, and QEMU serves one
/// after the other; udev ends what it runs after three minutes (udev(7), `RUN`).
const TURN: Duration = Duration::from_secs(60);

/// Acts on the event. What came of it is logged, in one line.
pub async fn run(context: &Context, arguments: &Udev) -> Result<(), Error> {
    let variable = |name: &str| Some(std::env::var_os(name)?.to_string_lossy().into_owned());
    let start = Instant::now();
    let event = HotplugEvent::from_variables(variable)?;
    let Some(event) = event.filter(|event| event.action != Action::Bind) else {
        debug!("not an event of ours");
        return Ok(());
    };
    match act(context, arguments, &event, start).await {
        Err(Error::Qmp(error)) if error.is_not_running() => {
            let vm = escape(&arguments.vm);
            info!(%vm, "nothing to do, the VM is not running: {}", chain(&error));
            Ok(())
        }
        done => done,
    }
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
    let turn = Vm::connect_in_turn(address, TURN.max(context.timeout), context.timeout);
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
    let uses = context.host.other_uses(&device.port, Look::Quick);
    let mut vm = connect(context, address).await?;
    let attached = attach::attach(&context.host, &mut vm, device, options).await?;
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
    let id = match &event.port {
        Some(port) => Some(DeviceId::for_port(port)),
        // Typed by hand, and the hardware may be gone: the VM knows the id.
        None => {
            let in_vm = vm.host_devices().await?.into_iter();
            in_vm.filter(|(_, given)| given.address == address).map(|(id, _)| id).next()
        }
    };
    let detached = match &id {
        Some(id) => attach::detach_leftover(host, &mut vm, id, address).await?,
        None => Detached::NotThere,
    };
    let (name, ms) = (vm.name(), start.elapsed().as_millis());
    let vm = escape(&name);
    let what = match (&event.port, event.address) {
        (Some(port), _) => port.to_string(),
        (None, address) => address.map(|address| address.to_string()).unwrap_or_default(),
    };
    match id {
        Some(id) if matches!(detached, Detached::Leftover(_)) => {
            info!(%vm, port = %what, %id, ms, "detached {what} from {vm} in {ms} ms")
        }
        Some(id) if detached == Detached::Stays => info!(
            %vm, port = %what, %id,
            "nothing to do, {what} is still plugged in; `usb-qmp-hotplug detach` detaches it"
        ),
        _ => info!(%vm, port = %what, "nothing to do, {what} is not in {vm}"),
    }
    Ok(())
}
