//! `list --watch`: shows devices as they are plugged in and unplugged.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::os::fd::AsFd;
use std::sync::Arc;

use serde::Serialize;
use tokio::io::Interest;
use tokio::net::unix::pipe;
use tokio::signal::unix::{SignalKind, signal};
use tracing::{info, warn};

use super::entry::Entry;
use crate::command::Context;
use crate::error::Error;
use crate::host::events::{Batch, Events, Source};
use crate::policy::Policy;
use crate::text::{chain, escape, escape_json};
use crate::ui::output::print_more;
use crate::ui::screen::{Line, Screen, Style};
use crate::usb::{Action, Device, HotplugEvent, Port};

/// One line of JSON.
#[derive(Debug, Serialize)]
#[serde(tag = "event", rename_all = "lowercase")]
enum Report<'a> {
    Plugged { device: &'a Entry },
    Pulled { device: &'a Entry },
}

/// Follows until the user interrupts it, or until nobody reads any more.
pub async fn run(context: &Context, policy: &Arc<Policy>, json: bool) -> Result<(), Error> {
    let setup = |what| move |source| Error::Setup { what, source };
    let on = |kind| signal(kind).map_err(setup("handle signals"));
    let (mut interrupt, mut terminate) =
        (on(SignalKind::interrupt())?, on(SignalKind::terminate())?);
    // Listen to events first, then read the devices, so that no event is
    // missed.
    let mut events =
        Events::listen(Source::Udev, &context.host).map_err(setup("listen to udev"))?;
    let mut follower = Follower { context, policy, json, present: BTreeMap::new() };
    follower.present = follower.look()?;
    if std::io::stdout().is_terminal() {
        info!("following plugs and pulls; Ctrl-C ends");
    }
    let closed = closed_stdout();
    tokio::pin!(closed);
    loop {
        tokio::select! {
            batch = events.next() => {
                if !follower.heard(batch.map_err(setup("hear udev"))?)? {
                    return Ok(());
                }
            }
            () = &mut closed => return Ok(()),
            _ = interrupt.recv() => return Ok(()),
            _ = terminate.recv() => return Ok(()),
        }
    }
}

/// Ends when nobody reads standard output any more. A write would notice that
/// only at the next event.
async fn closed_stdout() {
    let watched = async {
        let stdout = std::io::stdout().as_fd().try_clone_to_owned().ok()?;
        // The kernel cannot wait for a regular file. Nothing closes it either.
        let stdout = pipe::Sender::from_owned_fd_unchecked(stdout).ok()?;
        stdout.ready(Interest::ERROR).await.ok()
    };
    if watched.await.is_none() {
        std::future::pending::<()>().await;
    }
}

struct Follower<'a> {
    context: &'a Context,
    policy: &'a Arc<Policy>,
    json: bool,
    /// The devices that are plugged in. Sysfs does not describe a device that
    /// was unplugged, so its facts are kept here.
    present: BTreeMap<Port, Entry>,
}

impl Follower<'_> {
    fn look(&self) -> Result<BTreeMap<Port, Entry>, Error> {
        let entries = self.entries(self.context.host.devices()?)?.into_iter();
        Ok(entries.map(|entry| (entry.port.clone(), entry)).collect())
    }

    fn entries(&self, devices: Vec<Device>) -> Result<Vec<Entry>, Error> {
        let devices = devices.into_iter().map(|device| (device, Vec::new())).collect();
        Ok(Entry::of_all(&self.context.host, self.policy, devices)?)
    }

    /// Prints what happened. Returns false if nobody reads any more.
    fn heard(&mut self, batch: Batch) -> Result<bool, Error> {
        let mut goes_on = true;
        if batch.lost {
            warn!("too much happened at once: what was pulled and plugged again since is not told");
            goes_on &= self.compare()?;
        }
        for event in batch.events {
            goes_on &= self.event(&event)?;
        }
        Ok(goes_on)
    }

    fn event(&mut self, event: &HotplugEvent) -> Result<bool, Error> {
        let Some(port) = &event.port else { return Ok(true) };
        match event.action {
            Action::Add => match self.context.host.device_of(event) {
                Ok(device) => self.plugged(&device),
                Err(error) => {
                    warn!("passed over an event of udev: {}", chain(&error));
                    Ok(true)
                }
            },
            Action::Remove => self.pulled(port),
            Action::Bind => Ok(true),
        }
    }

    fn plugged(&mut self, device: &Device) -> Result<bool, Error> {
        let Some(entry) = self.entries(vec![device.clone()])?.pop() else { return Ok(true) };
        // The event and the first look may both report the device.
        let known = self.present.insert(device.port.clone(), entry.clone());
        if known.is_some_and(|known| known.at() == entry.at()) {
            return Ok(true);
        }
        self.tell(&Report::Plugged { device: &entry })
    }

    fn pulled(&mut self, port: &Port) -> Result<bool, Error> {
        match self.present.remove(port) {
            Some(entry) => self.tell(&Report::Pulled { device: &entry }),
            None => Ok(true),
        }
    }

    /// Prints the differences between the earlier devices and the present ones.
    fn compare(&mut self) -> Result<bool, Error> {
        let mut goes_on = true;
        let now = self.look()?;
        let is_same = |old: &Entry, new: Option<&Entry>| new.is_some_and(|n| n.at() == old.at());
        let gone: Vec<Port> = self
            .present
            .iter()
            .filter(|(port, old)| !is_same(old, now.get(port)))
            .map(|(port, _)| port.clone())
            .collect();
        for port in gone {
            goes_on &= self.pulled(&port)?;
        }
        for (port, entry) in now {
            if self.present.insert(port, entry.clone()).is_none() {
                goes_on &= self.tell(&Report::Plugged { device: &entry })?;
            }
        }
        Ok(goes_on)
    }

    fn tell(&self, report: &Report) -> Result<bool, Error> {
        if self.json {
            let line = serde_json::to_string(report).map_err(|error| Error::Write {
                what: "the JSON document",
                source: error.into(),
            })?;
            return print_more(&(escape_json(line) + "\n"));
        }
        print_more(&line(report).shown(screen()))
    }
}

/// The screen for the lines. Output that is not on a terminal is never cut.
fn screen() -> Screen {
    let screen = Screen::of_stdout();
    let columns = if std::io::stdout().is_terminal() { screen.columns } else { usize::MAX };
    Screen { columns, ..screen }
}

/// `plugged  1-1.2     1:37   152d:2338  480 Mb/s   USB Bridge, serial 0123`
fn line(report: &Report) -> Line {
    let mut line = Line::default();
    let (Report::Plugged { device } | Report::Pulled { device }) = report;
    match report {
        Report::Plugged { .. } => line.add(Style::Good, "plugged"),
        Report::Pulled { .. } => line.add(Style::Busy, "pulled"),
    };
    line.pad_to(9).add(Style::Bold, device.port.to_string());
    line.pad_to(18).add(Style::Plain, " ").add(Style::Plain, device.at());
    line.pad_to(25).add(Style::Plain, " ").add(Style::Plain, device.id());
    let speed = device.speed_mbps.map(|speed| speed.to_string()).unwrap_or_default();
    line.add(Style::Dim, format!("  {speed:>5} Mb/s"));
    let hub = if device.hub { "hub " } else { "" };
    let name = device.shown_name();
    line.add(Style::Plain, format!("  {hub}{}", escape(&name)));
    if let Some(rule) = &device.rule {
        let style = if rule.deny { Style::Bad } else { Style::Rule };
        line.add(Style::Dim, ", ").add(style, rule.to_string());
    }
    if let Some(serial) = device.serial.as_ref().filter(|_| !device.hub) {
        line.add(Style::Dim, format!(", serial {}", escape(serial)));
    }
    line
}
