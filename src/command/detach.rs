//! `detach VM DEVICE...`

use tracing::debug;

use super::Context;
use crate::cli::Detach;
use crate::error::Error;
use crate::passed;
use crate::qemu::VmAddress;
use crate::text::escape;
use crate::ui::output::together;
use crate::usb::Selector;

/// Detaches every device that it can, and then reports the failures.
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
    let name = vm.name();
    let shown = escape(&name);
    let what = || format!("asking {shown} for its devices");
    let in_vm = context.during(what, passed::look(&context.host, &mut vm)).await?;
    if !dry_run {
        // An interrupted attach may have left descriptors. They keep other VMs
        // from the device, and no list shows them.
        vm.drop_descriptors().await?;
    }
    for passed in &in_vm {
        debug!("{shown} has {}", escape(&passed.object.name));
    }
    let missing = || Error::NotInVm { vm: name.clone(), what: selector.to_string() };
    let objects = passed::choose(&context.host, selector, &in_vm)?;
    let mut is_there = false;
    for object in &objects {
        let id = escape(object);
        if dry_run {
            context.say(format_args!("would detach {id} from {shown}"))?;
            is_there = true;
            continue;
        }
        let what = || format!("detaching {id} from {shown}");
        if context.during(what, vm.remove(object)).await? {
            context.say(format_args!("detached {id} from {shown}"))?;
            is_there = true;
        }
    }
    if is_there { Ok(()) } else { Err(missing()) }
}
