//! Which device belongs where: the configuration, its rules, and both applied
//! to the host's devices.

mod by_number;
pub mod config;
pub mod rule;

use std::borrow::Cow;
use std::cell::Cell;
use std::collections::BTreeMap;

pub use self::by_number::ByNumber;
use self::config::Config;
use self::rule::{Effect, Facts, Needs, Rule, Target};
use crate::host::{self, Host};
use crate::usb::{Device, Port};

/// A device of the host, and where it belongs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostDevice {
    /// The device.
    pub device: Device,
    /// The VM it belongs to, if it belongs to one.
    pub assignment: Option<Assignment>,
}

/// Where a device belongs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Assignment {
    /// The VM's name.
    pub vm: String,
    /// Which rule says so: its place among the rules, from 0.
    pub rule: usize,
}

/// The host's devices, by port.
pub type Table = BTreeMap<Port, HostDevice>;

/// A configuration that is asked often.
#[derive(Debug, Clone, Default)]
pub struct Policy {
    config: Config,
    needs: Needs,
}

impl Policy {
    /// Takes a configuration.
    pub fn new(config: Config) -> Self {
        let needs = Needs::of(&config.rules);
        Policy { config, needs }
    }

    /// The configuration.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The rules that name ports by bus number, to be told once.
    pub fn by_number(&self, host: &Host) -> Option<ByNumber> {
        ByNumber::of(&self.config.rules, host)
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
        let path = |port: &Port| if self.needs.paths { host.port_path(port) } else { None };
        let is_clear = Cell::new(true);
        let property = |name: &str| {
            let value = host.property(port, name);
            if value.is_none() && !host.is_known_to_udev(port) {
                is_clear.set(false);
            }
            value.map(Cow::Owned)
        };
        let facts = Facts::new(port, twin.as_ref(), device.id)
            .with_paths(path(port).as_ref(), twin.as_ref().and_then(path).as_ref())
            .with_serial(serial.as_deref())
            .with_classes(&classes)
            .with_properties(&property);
        rule::first_match(&self.config.rules, &facts).filter(|_| is_clear.get())
    }

    /// A device, and where it belongs. A hub belongs to the host, whatever a
    /// rule says: rules for all that is behind a hub match the hubs there, too.
    pub fn seen(&self, host: &Host, device: Device) -> HostDevice {
        let assignment = match self.decision(host, &device) {
            Some((rule, Rule { effect: Effect::Attach(target), .. })) if !device.is_hub() => {
                Some(Assignment { vm: target.vm.clone(), rule })
            }
            _ => None,
        };
        HostDevice { device, assignment }
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

    /// The VM that a device goes to by its rule, and how it is attached there.
    pub fn target(&self, assignment: &Assignment) -> Option<&Target> {
        match &self.config.rules.get(assignment.rule)?.effect {
            Effect::Attach(target) => Some(target),
            Effect::Deny => None,
        }
    }

    /// The line of the configuration that the rule begins on.
    pub fn line(&self, assignment: &Assignment) -> usize {
        self.config.rules.get(assignment.rule).map_or(0, |rule| rule.line)
    }
}
