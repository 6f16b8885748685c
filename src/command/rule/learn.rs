//! `--learn`: the device that is plugged in next.

use std::io::{IsTerminal, Write};
use std::time::Duration;

use tokio::time::{Instant, MissedTickBehavior, interval, timeout_at};
use tracing::{debug, info};

use super::Context;
use crate::command::watch::events::{Events, Source};
use crate::error::{Error, chain};
use crate::event::Action;
use crate::host::Strings;
use crate::text::escape;
use crate::usb::Device;

/// Waits for a device, at most for this time.
pub async fn plugged(context: &Context, wait: Duration) -> Result<Device, Error> {
    let failed = |source| Error::Setup { what: "hear udev", source };
    // First hear, then ask: who is quick is heard, too.
    let events = Events::listen(Source::Udev).map_err(failed)?;
    let end = Instant::now() + wait;
    let mut prompt = Prompt::new(context.quiet, wait);
    let mut tick = interval(Duration::from_secs(1));
    tick.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let device = async {
        loop {
            let batch = tokio::select! {
                batch = events.next() => batch.map_err(failed)?,
                _ = tick.tick() => {
                    prompt.show(end.saturating_duration_since(Instant::now()));
                    continue;
                }
            };
            for event in batch.events.iter().filter(|event| event.action == Action::Add) {
                match event.device(&context.host) {
                    Ok(device) => return Ok::<_, Error>(device),
                    // It may be gone again.
                    Err(error) => debug!("passed over an event of udev: {}", chain(&error)),
                }
            }
        }
    };
    let came = timeout_at(end, device).await;
    prompt.clear();
    let device = came.map_err(|_| Error::NothingCame(wait.as_secs()))??;
    let Strings { manufacturer, product, serial } = context.host.strings(&device.port);
    let mut names: Vec<String> = [manufacturer, product].into_iter().flatten().collect();
    names.extend(serial.map(|serial| format!("serial {serial}")));
    info!("plugged in: {device} {}", escape(names.join(" ").trim()));
    Ok(device)
}

/// What is asked of the person, on standard error: on a terminal with the time
/// that is left, counting down in place.
struct Prompt {
    quiet: bool,
    terminal: bool,
}

impl Prompt {
    const TEXT: &str = "Plug the device into the port (pull it out first if it is in)";

    fn new(quiet: bool, wait: Duration) -> Self {
        let terminal = std::io::stderr().is_terminal();
        if !quiet && !terminal {
            info!("{}; waiting {} s", Self::TEXT, wait.as_secs());
        }
        Prompt { quiet, terminal }
    }

    fn show(&mut self, left: Duration) {
        let seconds = left.as_millis().div_ceil(1000);
        self.write(format_args!("\r\x1b[K{}: {seconds} s ", Self::TEXT));
    }

    fn clear(&mut self) {
        self.write(format_args!("\r\x1b[K"));
    }

    fn write(&self, text: std::fmt::Arguments<'_>) {
        if self.terminal && !self.quiet {
            // Nobody is left to tell if this fails.
            let mut error = std::io::stderr().lock();
            let _ = error.write_fmt(text).and_then(|()| error.flush());
        }
    }
}
