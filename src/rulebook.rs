//! The configuration, applied to the host's devices.

use std::borrow::Cow;
use std::cell::Cell;

use crate::config::Config;
use crate::guest::Wish;
use crate::host::{self, Host};
use crate::plan::{Home, Seen, Table};
use crate::plug::Options;
use crate::rule::{self, Action, Facts, Needs, Rule};
use crate::usb::Device;

/// A configuration that is asked often.
#[derive(Debug, Clone, Default)]
pub struct Rulebook {
    config: Config,
    needs: Needs,
}

impl Rulebook {
    /// Takes a configuration.
    pub fn new(config: Config) -> Self {
        let needs = Needs::of(&config.rules);
        Rulebook { config, needs }
    }

    /// The configuration.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Whether a rule asks what only udev knows.
    pub fn needs_udev(&self) -> bool {
        self.needs.properties
    }

    /// The first rule that matches a device, and its place among the rules.
    /// What no rule asks is not read. None decides about a device that udev is
    /// to tell of and has not got to yet: its event is still to come.
    pub fn decision(&self, host: &Host, device: &Device) -> Option<(usize, &Rule)> {
        let port = &device.port;
        let twin = host.twin(port);
        let serial = if self.needs.serial { host.strings(port).serial } else { None };
        let classes = if self.needs.classes { host.classes(port) } else { Vec::new() };
        let is_clear = Cell::new(true);
        let property = |name: &str| {
            let value = host.property(port, name);
            if value.is_none() && !host.is_known_to_udev(port) {
                is_clear.set(false);
            }
            value.map(Cow::Owned)
        };
        let facts = Facts::new(port, twin.as_ref(), device.id)
            .with_serial(serial.as_deref())
            .with_classes(&classes)
            .with_properties(&property);
        rule::first_match(&self.config.rules, &facts).filter(|_| is_clear.get())
    }

    /// A device, and where it belongs. A hub belongs to the host, whatever a
    /// rule says: rules for all that is behind a hub match the hubs there, too.
    pub fn seen(&self, host: &Host, device: Device) -> Seen {
        let home = match self.decision(host, &device) {
            Some((rule, Rule { action: Action::Attach(target), .. })) if !device.is_hub() => {
                Some(Home { vm: target.vm.clone(), rule })
            }
            _ => None,
        };
        Seen { device, home }
    }

    /// All devices of the host, and where they belong.
    ///
    /// # Errors
    ///
    /// As for [`Host::devices`].
    pub fn table(&self, host: &Host) -> Result<Table, host::Error> {
        let devices = host.devices()?.into_iter();
        Ok(devices.map(|device| (device.port.clone(), self.seen(host, device))).collect())
    }

    /// How the rule wants a device attached.
    pub fn options(&self, home: &Home) -> Options {
        match self.config.rules.get(home.rule).map(|rule| &rule.action) {
            Some(Action::Attach(target)) => {
                let wish = Wish { bus: target.guest_bus.clone(), port: target.guest_port.clone() };
                Options {
                    wish,
                    properties: target.options.clone(),
                    apart: true,
                    ..Options::default()
                }
            }
            _ => Options::default(),
        }
    }

    /// The line of the configuration that the rule begins on.
    pub fn line(&self, home: &Home) -> usize {
        self.config.rules.get(home.rule).map_or(0, |rule| rule.line)
    }
}
