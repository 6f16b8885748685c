//! Decides what to do so that a VM has the devices that belong to it. `sync`
//! and the daemon use the same decision, and [`port`] carries it out for both.
//! `sync` does this for every port when a user calls it. The daemon does it for
//! one port when something happens there.

mod perform;

use std::collections::{BTreeMap, BTreeSet};

use crate::host::Life;
use crate::policy::{HostDevice, Table};
use crate::presence::Leftover;
use crate::usb::{Address, Port};

pub use perform::{Done, Known, Vms, connect_for, look, port, unmount};

/// The devices that were handled at these ports since the VM started. If a
/// device was attached once and is not in the VM now, a person detached it.
/// That is respected until the next plug.
pub type Handled = BTreeMap<Port, Address>;

/// A port of the host, as one VM sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AtPort {
    /// No device is there.
    Empty,
    /// The device belongs to the VM.
    Ours(Address),
    /// The device does not belong to the VM.
    Other(Address),
    /// It cannot be known yet where the device belongs.
    Unclear(Address),
}

impl AtPort {
    /// The state of a port according to the table.
    pub fn of(seen: Option<&HostDevice>, vm: &str) -> Self {
        let Some(seen) = seen else { return AtPort::Empty };
        match &seen.assignment {
            Some(assignment) if assignment.vm == vm => AtPort::Ours(seen.device.address),
            None if !seen.is_clear => AtPort::Unclear(seen.device.address),
            _ => AtPort::Other(seen.device.address),
        }
    }
}

/// The VM's device that has the id of a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InVm {
    /// Its address on the host. This tool always gives an address to QEMU. A
    /// device without one was attached by somebody else.
    pub address: Option<Address>,
    /// Whether it still works.
    pub life: Life,
}

/// What to do at a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Nothing.
    Nothing,
    /// Attach the device at the port. An attach replaces the object that has
    /// the id.
    Attach,
    /// Detach the leftover of an earlier device.
    Detach(Leftover),
}

/// Decides what to do at one port. What is not known leads to no change.
pub fn decide(at_port: AtPort, in_vm: Option<InVm>, is_handled: bool) -> Step {
    let Some(InVm { address, life }) = in_vm else {
        let is_missing = matches!(at_port, AtPort::Ours(_)) && !is_handled;
        return if is_missing { Step::Attach } else { Step::Nothing };
    };
    match (at_port, address) {
        (AtPort::Ours(there), Some(address)) if there == address && life != Life::Dead => {
            Step::Nothing
        }
        (AtPort::Ours(_), _) => Step::Attach,
        (AtPort::Empty, Some(_)) => Step::Detach(Leftover::Gone),
        (AtPort::Other(there) | AtPort::Unclear(there), Some(address)) if there != address => {
            Step::Detach(Leftover::Replaced)
        }
        (AtPort::Other(_), Some(_)) if life == Life::Dead => Step::Detach(Leftover::Dead),
        (AtPort::Other(_) | AtPort::Unclear(_) | AtPort::Empty, _) => Step::Nothing,
    }
}

/// The ports where there is something to do. Leftovers come first, because they
/// may use the port that another device needs.
pub fn steps(
    vm: &str,
    table: &Table,
    in_vm: &BTreeMap<Port, InVm>,
    handled: &Handled,
) -> Vec<(Port, Step)> {
    let ports: BTreeSet<&Port> = table.keys().chain(in_vm.keys()).collect();
    let step = |port: &Port| {
        let seen = table.get(port);
        let is_handled = seen.is_some_and(|seen| handled.get(port) == Some(&seen.device.address));
        decide(AtPort::of(seen, vm), in_vm.get(port).copied(), is_handled)
    };
    let mut steps: Vec<(Port, Step)> =
        ports.into_iter().map(|port| (port.clone(), step(port))).collect();
    steps.retain(|(_, step)| *step != Step::Nothing);
    steps.sort_by_key(|(_, step)| *step == Step::Attach);
    steps
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::Assignment;
    use crate::usb::Device;

    fn at(text: &str) -> Address {
        text.parse().unwrap()
    }

    #[test]
    fn every_state_of_a_port_leads_to_one_step() {
        use AtPort::{Empty, Other, Ours, Unclear};
        use Leftover::{Dead, Gone, Replaced};
        use Step::{Attach, Detach, Nothing};
        let (old, new) = (at("1:2"), at("1:9"));
        let there = |address, life| Some(InVm { address, life });
        let alive = there(Some(new), Life::Alive);
        let unknown = there(Some(new), Life::Unknown);
        let dead = there(Some(new), Life::Dead);
        let earlier = there(Some(old), Life::Unknown);
        let foreign = there(None, Life::Unknown);
        // The object with the id in the VM, then the step for each state of the
        // port.
        let cases = [
            (None, [Nothing, Attach, Nothing, Nothing]),
            (alive, [Detach(Gone), Nothing, Nothing, Nothing]),
            (unknown, [Detach(Gone), Nothing, Nothing, Nothing]),
            (dead, [Detach(Gone), Attach, Detach(Dead), Nothing]),
            (earlier, [Detach(Gone), Attach, Detach(Replaced), Detach(Replaced)]),
            (foreign, [Nothing, Attach, Nothing, Nothing]),
        ];
        for (in_vm, expected) in cases {
            let steps =
                [Empty, Ours(new), Other(new), Unclear(new)].map(|at| decide(at, in_vm, false));
            assert_eq!(steps, expected, "{in_vm:?}");
            // A handled device is not attached a second time, but it is
            // replaced.
            let handled = decide(Ours(new), in_vm, true);
            assert_eq!(handled, if in_vm.is_none() { Nothing } else { expected[1] }, "{in_vm:?}");
        }
    }

    fn table(devices: &[(&str, &str, Option<&str>)]) -> Table {
        let seen = |(port, address, vm): &(&str, &str, Option<&str>)| {
            let port: Port = port.parse().unwrap();
            let device = Device {
                port: port.clone(),
                address: at(address),
                id: "152d:2338".parse().unwrap(),
                hub: false,
            };
            let assignment = vm.map(|vm| Assignment { vm: vm.into(), rule: 0 });
            (port, HostDevice { device, assignment, is_clear: true })
        };
        devices.iter().map(seen).collect()
    }

    fn in_vm(ports: &[(&str, &str)]) -> BTreeMap<Port, InVm> {
        let present = |(port, address): &(&str, &str)| {
            let in_vm = InVm { address: Some(at(address)), life: Life::Unknown };
            (port.parse().unwrap(), in_vm)
        };
        ports.iter().map(present).collect()
    }

    #[test]
    fn leftovers_go_before_what_is_missing_comes() {
        let table = table(&[
            ("1-1", "1:3", Some("a")),
            ("1-2", "1:9", None),
            ("1-4", "1:5", Some("b")),
            ("1-5", "1:6", Some("a")),
        ]);
        let there = in_vm(&[("1-2", "1:2"), ("1-3", "1:4"), ("1-5", "1:6")]);
        let port = |port: &str| port.parse().unwrap();
        let expected = [
            (port("1-2"), Step::Detach(Leftover::Replaced)),
            (port("1-3"), Step::Detach(Leftover::Gone)),
            (port("1-1"), Step::Attach),
        ];
        assert_eq!(steps("a", &table, &there, &Handled::new()), expected);
    }

    #[test]
    fn a_detach_by_hand_stands_until_the_next_plug() {
        let handled = Handled::from([("1-1".parse().unwrap(), at("1:2"))]);
        let steps = |table| steps("a", &table, &BTreeMap::new(), &handled);
        assert_eq!(steps(table(&[("1-1", "1:2", Some("a"))])), []);
        let plugged_again = steps(table(&[("1-1", "1:3", Some("a"))]));
        assert_eq!(plugged_again, [("1-1".parse().unwrap(), Step::Attach)]);
    }
}
