//! Decides which device belongs to which VM. The configuration has the rules,
//! and they are applied to the host's devices.

mod by_number;
pub mod config;
pub mod exposed;
pub mod rule;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tracing::warn;

pub use self::by_number::ByNumber;
use self::config::Config;
use self::rule::{Decision, Effect, Fact, Facts, Needs, Rule, Target};
use crate::host::{self, Host, blocking_each};
use crate::usb::{Device, Port};

/// A device of the host and the VM that it belongs to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostDevice {
    /// The device.
    pub device: Device,
    /// The VM it belongs to, if it belongs to one.
    pub assignment: Option<Assignment>,
    /// Whether the assignment is certain. A rule may ask for something that the
    /// device or udev does not tell yet.
    pub is_clear: bool,
}

/// How to read the facts that a rule asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reading {
    /// Read only what can be read at once.
    AtOnce,
    /// Read everything. While drivers start, the kernel makes a reader of the
    /// serial number or of a property wait, which may take minutes.
    Patient,
}

/// The assignment of a device to a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Assignment {
    /// The VM's name.
    pub vm: String,
    /// The rule that decided: its index among the rules, from 0.
    pub rule: usize,
}

/// The host's devices, by port.
pub type Table = BTreeMap<Port, HostDevice>;

/// A configuration that is prepared for many questions.
#[derive(Debug, Clone, Default)]
pub struct Policy {
    config: Config,
    needs: Needs,
}

impl Policy {
    /// Prepares a configuration.
    pub fn new(config: Config) -> Self {
        let needs = Needs::of(&config.rules);
        Policy { config, needs }
    }

    /// The configuration.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The rules that name ports by bus number, so that the user can be told
    /// once.
    pub fn by_number(&self, host: &Host) -> Option<ByNumber> {
        ByNumber::of(&self.config.rules, host)
    }

    /// Warns of what other users may change: this program, if root runs it, the
    /// configuration, and the directories of the VMs' sockets.
    pub fn warn_of_exposed(&self, host: &Host, config: &Path) {
        let vms = self.config.vms.iter().map(|vm| (vm.name.as_str(), &vm.address));
        let program = exposed::roots_program();
        for told in exposed::exposed(host, program.as_deref(), Some(config), vms) {
            warn!("{told}");
        }
    }

    /// Whether a rule asks for something that only udev knows.
    pub fn needs_udev(&self) -> bool {
        self.needs.properties
    }

    /// What the rules say about a device. Only the facts that a rule asks for
    /// are read. If a rule needs udev and udev has not processed the device
    /// yet, no rule decides, because udev's event will still arrive. A hub
    /// stays with the host, whatever a rule says: rules for everything behind a
    /// hub match the hubs there, too.
    pub fn decision(&self, host: &Host, device: &Device, reading: Reading) -> Decision<'_> {
        if device.is_hub() {
            return Decision::NoRule;
        }
        let port = &device.port;
        let twin = host.twin(port);
        let classes = if self.needs.classes { host.classes(port) } else { Vec::new() };
        let path = |port: &Port| if self.needs.paths { host.port_path(port) } else { None };
        let serial = || match reading {
            _ if !host.has_serial(port) => Fact::Lacking,
            Reading::AtOnce => Fact::Unknown,
            Reading::Patient => host.serial(port).into(),
        };
        let property = |name: &str| match reading {
            Reading::AtOnce => Fact::Unknown,
            Reading::Patient => match host.property(port, name) {
                None if !host.is_known_to_udev(port) => Fact::Unknown,
                value => value.into(),
            },
        };
        let facts = Facts::new(port, twin.as_ref(), device.id)
            .with_paths(path(port).as_ref(), twin.as_ref().and_then(path).as_ref())
            .with_serial(&serial)
            .with_classes(&classes)
            .with_properties(&property);
        rule::first_match(&self.config.rules, &facts)
    }

    /// A device and the VM that it belongs to.
    pub fn seen(&self, host: &Host, device: Device, reading: Reading) -> HostDevice {
        let decision = self.decision(host, &device, reading);
        let assignment = match decision {
            Decision::Rule(rule, Rule { effect: Effect::Attach(target), .. }) => {
                Some(Assignment { vm: target.vm.clone(), rule })
            }
            _ => None,
        };
        HostDevice { device, assignment, is_clear: decision != Decision::Unknown }
    }

    /// All devices of the host and the VMs that they belong to. Facts that are
    /// not known at once are read on threads. If a read takes longer than the
    /// limit, the device's VM stays unclear.
    ///
    /// # Errors
    ///
    /// The same errors as [`Host::devices`], and [`host::Error::Thread`].
    pub async fn table_within(
        self: &Arc<Self>,
        host: &Host,
        limit: Duration,
    ) -> Result<Table, host::Error> {
        let mut table = self.table(host)?;
        let unclear: Vec<Device> =
            table.values().filter(|seen| !seen.is_clear).map(|seen| seen.device.clone()).collect();
        let (policy, host) = (self.clone(), host.clone());
        let read = move |device| policy.seen(&host, device, Reading::Patient);
        let read = blocking_each(unclear, limit, read).await.map_err(host::Error::Thread)?;
        for seen in read.into_iter().flatten() {
            table.insert(seen.device.port.clone(), seen);
        }
        Ok(table)
    }

    /// All devices of the host and the VMs that they belong to, as far as this
    /// is known at once.
    ///
    /// # Errors
    ///
    /// The same errors as [`Host::devices`].
    pub fn table(&self, host: &Host) -> Result<Table, host::Error> {
        let devices = host.devices()?.into_iter();
        let seen = |device| self.seen(host, device, Reading::AtOnce);
        Ok(devices.map(|device| (device.port.clone(), seen(device))).collect())
    }

    /// The VM that a device belongs to by its rule, and how it is attached
    /// there.
    pub fn target(&self, assignment: &Assignment) -> Option<&Target> {
        match &self.config.rules.get(assignment.rule)?.effect {
            Effect::Attach(target) => Some(target),
            Effect::Deny => None,
        }
    }

    /// The line of the configuration where the rule begins.
    pub fn line(&self, assignment: &Assignment) -> usize {
        self.config.rules.get(assignment.rule).map_or(0, |rule| rule.line)
    }
}

/// The devices behind both halves of a hub, and the VMs that they belonged to
/// when they were last read.
pub fn behind(host: &Host, hub: &Port, table: &Table) -> Vec<HostDevice> {
    if !table.get(hub).is_some_and(|seen| seen.device.is_hub()) {
        return Vec::new();
    }
    let twin = host.twin(hub);
    let is_behind =
        |port: &Port| port.is_behind(hub) || twin.as_ref().is_some_and(|twin| port.is_behind(twin));
    table.iter().filter(|(port, _)| is_behind(port)).map(|(_, seen)| seen.clone()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    #[test]
    fn what_is_behind_a_hub_is_behind_both_of_its_halves() {
        let root = tempfile::tempdir().unwrap();
        let ports = root.path().join("sys/bus/usb/devices/usb1/1-0:1.0/usb1-port1");
        fs::create_dir_all(&ports).unwrap();
        symlink("../../../usb2/2-0:1.0/usb2-port1", ports.join("peer")).unwrap();
        let device = |(port, hub): (&str, bool)| {
            let (port, address): (Port, _) = (port.parse().unwrap(), "2:3".parse().unwrap());
            let id = "0001:0002".parse().unwrap();
            let device = Device { port: port.clone(), address, id, hub };
            (port, HostDevice { device, assignment: None, is_clear: true })
        };
        let all =
            [("1-1", true), ("1-1.2", false), ("1-2", false), ("2-1.3.1", false), ("2-3", true)];
        let table: Table = all.into_iter().map(device).collect();
        let behind = |hub: &str| {
            let behind = behind(&Host::at(root.path()), &hub.parse().unwrap(), &table);
            behind.iter().map(|seen| seen.device.port.to_string()).collect::<Vec<_>>()
        };
        assert_eq!(behind("1-1"), ["1-1.2", "2-1.3.1"]);
        assert_eq!(behind("2-3"), [""; 0]);
        assert_eq!(behind("1-2"), [""; 0], "no hub");
    }
}
