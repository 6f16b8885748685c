//! `attach VM DEVICE...`

use tracing::{debug, warn};

use super::{Context, options, take};
use crate::attach::{self, Attached, Options};
use crate::cli::Attach;
use crate::error::{Error, Until};
use crate::host::uses::listed;
use crate::host::{self, Look, OtherUse};
use crate::qemu::{Vm, VmAddress};
use crate::text::escape;
use crate::ui::output::together;
use crate::usb::{Device, DeviceId, Selector};

/// Attaches every device it can, then reports what failed.
pub async fn run(context: &Context, arguments: &Attach) -> Result<(), Error> {
    let address = context.typed_vm(&arguments.vm)?;
    let options = options::options(&arguments.how, arguments.dry_run, Look::Thorough)?;
    let selectors: Vec<Selector> =
        arguments.devices.iter().map(|text| text.parse()).collect::<Result<_, _>>()?;
    let mut errors = Vec::new();
    let mut devices = Vec::new();
    for selector in &selectors {
        match context.host.find(selector) {
            Ok(device) if device.is_hub() => errors.push(Error::Hub(device)),
            Ok(device) => devices.push(device),
            Err(error) => errors.push(error.into()),
        }
    }
    for device in devices {
        errors.extend(one(context, &address, &device, &options, arguments.take).await.err());
    }
    together(errors, selectors.len())
}

/// Attaches a device; if another VM has it and that is asked for, it is
/// detached there first.
async fn one(
    context: &Context,
    address: &VmAddress,
    device: &Device,
    options: &Options,
    takes: bool,
) -> Result<(), Error> {
    // A conversation each, so that one device has the whole time.
    let mut vm = context.connect(address).await?;
    let refused = match attach(context, &mut vm, device, options).await {
        Err(error) if takes && error.until() == Some(Until::LetGo) => error,
        done => return done,
    };
    let pid = vm.pid();
    drop(vm);
    let taken = take::take(context, device, pid, options.dry_run).await?.ok_or(refused)?;
    let (from, name) = (escape(&taken.vm), taken.names());
    if options.dry_run {
        let line = format_args!("would take {device} ({name}) from {from}, and attach it");
        return context.say(line);
    }
    context.say(format_args!("took {device} ({name}) from {from}"))?;
    let mut vm = context.connect(address).await?;
    attach(context, &mut vm, device, options).await
}

async fn attach(
    context: &Context,
    vm: &mut Vm,
    device: &Device,
    options: &Options,
) -> Result<(), Error> {
    let (id, name) = (DeviceId::for_port(&device.port), vm.name());
    let name = escape(&name);
    debug!(qemu = %vm.session().version(), "attaching {device} to {name}");
    let uses = context.host.other_uses(&device.port, Look::Thorough);
    let default_route = uses.iter().find_map(|used| match used {
        OtherUse::DefaultRoute(adapter) if !options.force => Some(adapter.clone()),
        _ => None,
    });
    if let Some(adapter) = default_route {
        return Err(host::Error::DefaultRoute { device: device.clone(), adapter }.into());
    }
    if let Some(uses) = listed(&uses) {
        warn!("{device} is in use on this host: {uses}");
    }
    let attached = attach::attach(&context.host, vm, device, options);
    let what = || format!("attaching {device} to {name}");
    let attached = context.during(what, attached).await?;
    let would = if options.dry_run { "would attach" } else { "attached" };
    match attached {
        Attached::There(guest_port) => {
            context.say(format_args!("{would} {device} to {name} as {id} at {guest_port}"))
        }
        Attached::Otherwise(other) => {
            let other = escape(&other);
            context.say(format_args!("{device} is in {name} already, as {other}"))
        }
        Attached::Already => context.say(format_args!("{device} is in {name} already, as {id}")),
    }
}
