//! `list`: shows the host's USB devices and who uses each.

mod entry;
mod follow;
mod tree;

use std::sync::Arc;

use serde::Serialize;

use super::Context;
use crate::cli::List;
use crate::error::Error;
use crate::host::Host;
use crate::policy::Policy;
use crate::text::escape;
use crate::ui::output::{json, print};
use crate::ui::screen::Screen;
use entry::{BusReport, Entry};

/// The JSON document.
#[derive(Debug, Serialize)]
struct Report {
    buses: Vec<BusReport>,
    devices: Vec<Entry>,
}

/// Shows the devices that are plugged in, and follows changes if the user asks
/// for it.
pub async fn run(context: &Context, arguments: &List) -> Result<(), Error> {
    let policy = Arc::new(Policy::new(context.config_or_none()));
    if arguments.watch {
        return follow::run(context, &policy, arguments.json).await;
    }
    let report = report(&context.host, &policy)?;
    if arguments.json {
        return print(&json(&report)?);
    }
    if report.devices.is_empty() {
        tracing::info!("no USB device is plugged in");
        return Ok(());
    }
    if arguments.flat {
        return print(&report.devices.iter().map(flat).collect::<String>());
    }
    print(&tree::shown(&report, Screen::of_stdout()))
}

fn report(host: &Host, policy: &Arc<Policy>) -> Result<Report, Error> {
    let mut holders = host.all_holders();
    let devices = host.devices()?.into_iter().map(|device| {
        let holders = holders.remove(&device.address).unwrap_or_default();
        (device, holders)
    });
    let devices = Entry::of_all(host, policy, devices.collect())?;
    let mut numbers: Vec<u16> = devices.iter().map(|entry| entry.bus).collect();
    numbers.dedup();
    let buses = host.described(&numbers).into_iter().map(Into::into).collect();
    Ok(Report { buses, devices })
}

/// A device as a line of fields with tabs between them. Scripts depend on the
/// order of the fields. New fields may be added at the end.
fn flat(entry: &Entry) -> String {
    let or_dash = |text: Option<String>| match text {
        Some(text) if !text.is_empty() => escape(&text).into_owned(),
        _ => "-".to_owned(),
    };
    let fields = [
        entry.port.to_string(),
        entry.at(),
        entry.id(),
        or_dash(entry.speed_mbps.map(|speed| speed.to_string())),
        or_dash(Some(entry.drivers.join(","))),
        or_dash(entry.name()),
        or_dash(entry.serial.clone()),
        or_dash(Some(entry.uses().join(", "))),
        or_dash(entry.held_text()),
        or_dash(entry.rule.as_ref().map(ToString::to_string)),
        or_dash(entry.twin.as_ref().map(ToString::to_string)),
        or_dash(entry.path.as_ref().map(ToString::to_string)),
        or_dash(entry.starting.then(|| "starting".to_owned())),
    ];
    fields.join("\t") + "\n"
}

#[cfg(test)]
mod tests;
