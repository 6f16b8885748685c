//! `release DEVICE...`

use super::{Context, take};
use crate::cli::Release;
use crate::error::Error;
use crate::host::{self, Look};
use crate::text::escape;
use crate::ui::output::together;
use crate::usb::{Device, Selector};

/// Returns every device that it can to the host, and then reports the failures.
pub async fn run(context: &Context, arguments: &Release) -> Result<(), Error> {
    let selectors: Vec<Selector> =
        arguments.devices.iter().map(|text| text.parse()).collect::<Result<_, _>>()?;
    let mut errors = Vec::new();
    for selector in &selectors {
        errors.extend(one(context, selector, arguments.dry_run).await.err());
    }
    together(errors, selectors.len())
}

async fn one(context: &Context, selector: &Selector, dry_run: bool) -> Result<(), Error> {
    let would = if dry_run { "would detach" } else { "detached" };
    let device = match context.host.find(selector) {
        Ok(device) if device.is_hub() => return Err(Error::Hub(device)),
        Ok(device) => device,
        Err(missing @ host::Error::NoDevice(_)) => {
            let taken = take::take_leftover(context, selector, missing, dry_run).await?;
            let (name, vm) = (taken.names(), escape(&taken.vm));
            return context.say(format_args!("{would} {name} from {vm}; its device is gone"));
        }
        Err(error) => return Err(error.into()),
    };
    match take::take(context, &device, None, dry_run).await? {
        Some(taken) => {
            let (name, vm) = (taken.names(), escape(&taken.vm));
            let end = if dry_run { "" } else { "; the host has it" };
            context.say(format_args!("{would} {device} ({name}) from {vm}{end}"))
        }
        None => {
            must_be_free(context, &device)?;
            if !dry_run {
                context.host.probe_drivers(&device.port);
            }
            context.say(format_args!("no VM has {device}; the host has it"))
        }
    }
}

/// Refuses a device that is used by a program or by a VM that cannot be asked.
fn must_be_free(context: &Context, device: &Device) -> Result<(), Error> {
    let (host, device) = (&context.host, device.clone());
    if host.is_locked(device.address) == Some(true) {
        let holders = host.holders(device.address);
        return Err(host::Error::Held { device, holders }.into());
    }
    match host.owner(&device, Look::Thorough) {
        Some(owner) => Err(host::Error::Claimed { device, owner: Box::new(owner) }.into()),
        None => Ok(()),
    }
}
