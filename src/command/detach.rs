//! `detach VM DEVICE...`

use tracing::debug;

use super::Context;
use crate::cli::Detach;
use crate::error::Error;
use crate::host::{self, Host};
use crate::qemu::{Given, VmAddress};
use crate::text::escape;
use crate::ui::output::together;
use crate::usb::{Address, Device, DeviceId, Port, Selector};

/// Detaches every device it can, then reports what failed.
pub async fn run(context: &Context, arguments: &Detach) -> Result<(), Error> {
    let address = context.typed_vm(&arguments.vm)?;
    let selectors: Vec<Selector> =
        arguments.devices.iter().map(|text| text.parse()).collect::<Result<_, _>>()?;
    let mut errors = Vec::new();
    for selector in &selectors {
        errors.extend(one(context, &address, selector, arguments.dry_run).await.err());
    }
    together(errors, selectors.len())
}

async fn one(
    context: &Context,
    address: &VmAddress,
    selector: &Selector,
    dry_run: bool,
) -> Result<(), Error> {
    let mut vm = context.connect(address).await?;
    let shown = vm.name();
    let what = || format!("asking {} for its devices", escape(&shown));
    let in_vm = context.during(what, vm.host_devices()).await?;
    if !dry_run {
        // What an attach has left that was cut off keeps other VMs out, and
        // shows nowhere.
        vm.drop_descriptors().await?;
    }
    let name = vm.name();
    for (id, _) in &in_vm {
        debug!("{} has {id}", escape(&name));
    }
    let missing = || Error::NotInVm { vm: name.clone(), what: selector.to_string() };
    let id = choose(&context.host, selector, &in_vm)?.ok_or_else(missing)?;
    let name = escape(&name);
    if dry_run {
        return context.say(format_args!("would detach {id} from {name}"));
    }
    let what = || format!("detaching {id} from {name}");
    if !context.during(what, vm.detach(&id)).await? {
        return Err(missing());
    }
    context.say(format_args!("detached {id} from {name}"))
}

/// The id that a device has in a VM, if it is there. The hardware may be gone:
/// what the id and the VM itself know is enough for a port, an address and an
/// id.
fn choose(
    host: &Host,
    selector: &Selector,
    in_vm: &[(DeviceId, Given)],
) -> Result<Option<DeviceId>, Error> {
    let with_id = |wanted: &DeviceId| in_vm.iter().map(|(id, _)| id).find(|id| *id == wanted);
    let at_address = |wanted: Address| {
        in_vm.iter().find(|(_, given)| given.address == Some(wanted)).map(|(id, _)| id)
    };
    let of = |device: &Device| {
        at_address(device.address).or_else(|| with_id(&DeviceId::for_port(&device.port))).cloned()
    };
    let at_port = |port: &Port| -> Result<Option<DeviceId>, Error> {
        Ok(with_id(&DeviceId::for_port(port))
            .cloned()
            .or_else(|| of(&host.device(port).ok()??)))
    };
    match selector {
        Selector::Id(id) => Ok(with_id(id).cloned()),
        Selector::Address(address) => {
            Ok(at_address(*address).cloned().or_else(|| of(&host.find(selector).ok()?)))
        }
        Selector::Port(port) => at_port(port),
        // Of a controller that is gone, the bus number is not known.
        Selector::Path(path) => match host.port_of(path) {
            Some(port) => at_port(&port),
            None => Err(host::Error::NoDevice(host.absent(selector)).into()),
        },
        _ => match host.find(selector) {
            Ok(device) => Ok(of(&device)),
            // Of several that fit, the one in the VM is meant.
            Err(host::Error::Ambiguous { devices, selector }) => {
                let mut here: Vec<DeviceId> = devices.iter().filter_map(of).collect();
                match here.len() {
                    1 => Ok(here.pop()),
                    0 => Ok(None),
                    _ => Err(host::Error::Ambiguous { devices, selector }.into()),
                }
            }
            Err(error) => Err(error.into()),
        },
    }
}
