//! `attach VM DEVICE...`

use tracing::{debug, warn};

use super::{Context, options, take};
use crate::attach::{self, Attached, Options};
use crate::cli::Attach;
use crate::error::{Error, Until};
use crate::host::uses::listed;
use crate::host::{self, Look, OtherUse, blocking};
use crate::qemu::{Vm, VmAddress};
use crate::text::escape;
use crate::ui::output::together;
use crate::usb::{Device, DeviceId, Selector};

/// Attaches every device that it can, and then reports the failures.
pub async fn run(context: &Context, arguments: &Attach) -> Result<(), Error> {
    let address = context.typed_vm(&arguments.vm)?;
    let options = options::options(&arguments.how, arguments.dry_run, Look::Thorough)?;
    let options = Options { blocking: true, ..options };
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
        errors.extend(one(context, &address, &device, &options, arguments).await.err());
    }
    together(errors, selectors.len())
}

/// Attaches a device. If the user allows it, what prevents the attach is
/// removed first, and each thing is tried only once.
async fn one(
    context: &Context,
    address: &VmAddress,
    device: &Device,
    options: &Options,
    arguments: &Attach,
) -> Result<(), Error> {
    let (mut may_take, mut may_unmount) = (arguments.take, arguments.unmount);
    loop {
        // Each device has its own conversation, so each has the whole time
        // limit.
        let mut vm = context.connect(address).await?;
        let refused = match attach(context, &mut vm, device, options).await {
            Err(error) => error,
            Ok(()) => return Ok(()),
        };
        let pid = vm.pid();
        drop(vm);
        match refused.until() {
            Some(Until::LetGo) if may_take => {
                let taken = take::take(context, device, pid, options.dry_run).await?;
                let taken = taken.ok_or(refused)?;
                let (from, name) = (escape(&taken.vm), taken.names());
                let took = if options.dry_run { "would take" } else { "took" };
                context.say(format_args!("{took} {device} ({name}) from {from}"))?;
                may_take = false;
            }
            Some(Until::DisksFree(_)) if may_unmount => {
                unmount(context, device, options.dry_run).await?;
                may_unmount = false;
            }
            _ => return Err(refused),
        }
        if options.dry_run {
            let vm = escape(&arguments.vm);
            return context.say(format_args!("would then attach {device} to {vm}"));
        }
    }
}

async fn unmount(context: &Context, device: &Device, dry_run: bool) -> Result<(), Error> {
    let (host, port) = (context.host.clone(), device.port.clone());
    let work = move || if dry_run { host.mounted(&port) } else { host.unmount(&port) };
    let what = || format!("unmounting what is mounted from {device}");
    let failed = |source| Error::Setup { what: "unmount on a thread of its own", source };
    let places = context.during(what, blocking(work)).await.map_err(failed)??;
    for place in places {
        let unmounted = if dry_run { "would unmount" } else { "unmounted" };
        context.say(format_args!("{unmounted} {}", escape(&place)))?;
    }
    Ok(())
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
