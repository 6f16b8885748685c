//! `--learn`: waits for the next device that is plugged in.

use std::time::Duration;

use tokio::time::{Instant, MissedTickBehavior, interval, timeout_at};
use tracing::{debug, info};

use super::Context;
use crate::error::Error;
use crate::host::events::{Events, Source};
use crate::text::{chain, escape};
use crate::ui::progress::Progress;
use crate::usb::{Action, Device};

/// The text that asks the user. On a terminal, it also shows the time that is
/// left.
const PROMPT: &str = "Plug the device into the port (pull it out first if it is in)";

/// Waits until a device is plugged in, at most for this time.
pub async fn plugged(context: &Context, wait: Duration) -> Result<Device, Error> {
    let failed = |source| Error::Setup { what: "hear udev", source };
    // Listen first, then ask, so that a fast user is not missed.
    let mut events = Events::listen(Source::Udev, &context.host).map_err(failed)?;
    let end = Instant::now() + wait;
    let prompt = Progress::new(context.quiet);
    if !prompt.is_seen() {
        info!("{PROMPT}; waiting {} s", wait.as_secs());
    }
    let mut tick = interval(Duration::from_secs(1));
    tick.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let device = async {
        loop {
            let batch = tokio::select! {
                batch = events.next() => batch.map_err(failed)?,
                _ = tick.tick() => {
                    let left = end.saturating_duration_since(Instant::now());
                    prompt.show(&format!("{PROMPT}: {} s ", left.as_millis().div_ceil(1000)));
                    continue;
                }
            };
            for event in batch.events.iter().filter(|event| event.action == Action::Add) {
                match context.host.device_of(event) {
                    Ok(device) => return Ok::<_, Error>(device),
                    // The device may have left again.
                    Err(error) => debug!("passed over an event of udev: {}", chain(&error)),
                }
            }
        }
    };
    let came = timeout_at(end, device).await;
    drop(prompt);
    let device = came.map_err(|_| Error::NothingCame(wait.as_secs()))??;
    let host = context.host.clone();
    let ports = vec![device.port.clone()];
    let strings = context.host.in_haste_or_default(ports, move |port| host.strings(&port));
    let strings = strings.into_iter().next().unwrap_or_default();
    let mut names = vec![device.to_string()];
    names.extend(strings.name());
    names.extend(strings.serial.map(|serial| format!("serial {serial}")));
    info!("plugged in: {}", escape(&names.join(", ")));
    Ok(device)
}
