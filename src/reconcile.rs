//! What is to be done so that a VM has the devices that are its own. Pure.

use std::collections::BTreeMap;

use crate::attach::Options;
use crate::policy::{Assignment, HostDevice, Policy, Table};
use crate::qemu::Placement;
use crate::usb::{Address, DeviceId, Port};

/// What was done for the devices at these ports already, since the VM
/// started: who is not in the VM in spite of it was detached by a person.
pub type Handled = BTreeMap<Port, Address>;

/// Something to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Attach the device at this port.
    Attach(Port),
    /// Detach what an earlier device left behind.
    Detach(DeviceId, Leftover),
}

/// Why a VM's device is a leftover.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Leftover {
    /// Nothing is at its port any more.
    Gone,
    /// Another device is at its port.
    Replaced,
}

impl std::fmt::Display for Leftover {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Leftover::Gone => "its device is gone",
            Leftover::Replaced => "another device is at its port",
        })
    }
}

/// How the rule of a device wants it attached.
pub fn options(policy: &Policy, assignment: &Assignment) -> Options {
    let Some(target) = policy.target(assignment) else { return Options::default() };
    Options {
        placement: Placement { bus: target.guest_bus.clone(), port: target.guest_port.clone() },
        properties: target.options.clone(),
        blocking: true,
        ..Options::default()
    }
}

/// What to do in a VM that has these devices: leftovers out, what belongs
/// there in. Ids that are not ours are nobody's business.
pub fn reconcile(
    vm: &str,
    table: &Table,
    in_vm: &[(DeviceId, Option<Address>)],
    handled: &Handled,
) -> Vec<Step> {
    let belongs =
        |seen: &&HostDevice| seen.assignment.as_ref().is_some_and(|assignment| assignment.vm == vm);
    let mut steps = Vec::new();
    let mut present = Handled::new();
    for (id, address) in in_vm {
        // This tool always says where a device is.
        let (Some(port), Some(address)) = (id.port(), address) else { continue };
        match table.get(&port) {
            Some(seen) if *address == seen.device.address => {
                present.insert(port, *address);
            }
            // Its attach replaces it.
            Some(seen) if belongs(&seen) => {}
            Some(_) => steps.push(Step::Detach(id.clone(), Leftover::Replaced)),
            None => steps.push(Step::Detach(id.clone(), Leftover::Gone)),
        }
    }
    let wanted = table.values().filter(belongs).map(|seen| &seen.device);
    let missing = wanted.filter(|device| {
        let is_there = |known: &Handled| known.get(&device.port) == Some(&device.address);
        !is_there(&present) && !is_there(handled)
    });
    steps.extend(missing.map(|device| Step::Attach(device.port.clone())));
    steps
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::usb::Device;

    fn table(devices: &[(&str, &str, Option<&str>)]) -> Table {
        let seen = |(port, address, vm): &(&str, &str, Option<&str>)| {
            let port: Port = port.parse().unwrap();
            let device = Device {
                port: port.clone(),
                address: address.parse().unwrap(),
                id: "152d:2338".parse().unwrap(),
                class: 0,
            };
            let assignment = vm.map(|vm| Assignment { vm: vm.into(), rule: 0 });
            (port, HostDevice { device, assignment })
        };
        devices.iter().map(seen).collect()
    }

    fn in_vm(ids: &[(&str, &str)]) -> Vec<(DeviceId, Option<Address>)> {
        ids.iter().map(|(id, at)| (id.parse().unwrap(), at.parse().ok())).collect()
    }

    fn attach(port: &str) -> Step {
        Step::Attach(port.parse().unwrap())
    }

    fn detach(id: &str, why: Leftover) -> Step {
        Step::Detach(id.parse().unwrap(), why)
    }

    #[test]
    fn what_belongs_to_the_vm_comes_in_and_nothing_else() {
        let table =
            table(&[("1-1", "1:2", Some("a")), ("1-2", "1:3", Some("b")), ("1-3", "1:4", None)]);
        assert_eq!(reconcile("a", &table, &[], &Handled::new()), [attach("1-1")]);
        let there = in_vm(&[("usb-host-1-1", "1:2")]);
        assert_eq!(reconcile("a", &table, &there, &Handled::new()), []);
    }

    #[test]
    fn leftovers_go_and_foreign_ids_stay() {
        let table = table(&[("1-1", "1:9", None)]);
        let there = in_vm(&[
            ("usb-host-1-1", "1:2"),
            ("usb-host-1-2", "1:3"),
            ("hostdev0", "1:3"),
            ("usb-host-nonsense", "1:3"),
            ("usb-host-1-3", "by its vendor and product"),
        ]);
        let expected =
            [detach("usb-host-1-1", Leftover::Replaced), detach("usb-host-1-2", Leftover::Gone)];
        assert_eq!(reconcile("a", &table, &there, &Handled::new()), expected);
    }

    #[test]
    fn a_device_that_came_back_at_its_port_replaces_itself() {
        let table = table(&[("1-1", "1:9", Some("a"))]);
        let there = in_vm(&[("usb-host-1-1", "1:2")]);
        assert_eq!(reconcile("a", &table, &there, &Handled::new()), [attach("1-1")]);
    }

    #[test]
    fn a_device_attached_by_hand_stays() {
        let table = table(&[("1-1", "1:2", None)]);
        let there = in_vm(&[("usb-host-1-1", "1:2")]);
        assert_eq!(reconcile("a", &table, &there, &Handled::new()), []);
    }

    #[test]
    fn a_detach_by_hand_stands_until_the_next_plug() {
        let handled = Handled::from([("1-1".parse().unwrap(), "1:2".parse().unwrap())]);
        let before = table(&[("1-1", "1:2", Some("a"))]);
        assert_eq!(reconcile("a", &before, &[], &handled), []);
        let plugged_again = table(&[("1-1", "1:3", Some("a"))]);
        assert_eq!(reconcile("a", &plugged_again, &[], &handled), [attach("1-1")]);
    }
}
