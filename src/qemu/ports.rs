//! The USB controllers of a VM, and the choice of a free port. There is no I/O
//! here.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fmt;

use super::NoGuestPort;
use crate::text::{escape, fit};
use crate::usb::{DeviceId, Speed};

/// The kinds of USB controllers in QEMU, by their interface to the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ControllerKind {
    /// Takes devices of every speed.
    Xhci,
    /// Takes high-speed devices. Slower devices work only through companions.
    Ehci,
    /// Takes full-speed and low-speed devices.
    Ohci,
    /// Takes full-speed and low-speed devices.
    Uhci,
}

impl ControllerKind {
    /// The kind of a QOM type, if it is a controller: `qemu-xhci`,
    /// `ich9-usb-ehci1`, `piix3-usb-uhci`, `pci-ohci` (QEMU, hw/usb/hcd-*.c).
    pub fn of_driver(driver: &str) -> Option<Self> {
        let kinds = [
            ("xhci", ControllerKind::Xhci),
            ("ehci", ControllerKind::Ehci),
            ("ohci", ControllerKind::Ohci),
            ("uhci", ControllerKind::Uhci),
        ];
        kinds.into_iter().find_map(|(word, kind)| driver.contains(word).then_some(kind))
    }
}

/// A USB controller with a bus of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Controller {
    /// The name of its bus, as in `bus=`: `xhci.0`.
    pub bus: String,
    /// The bus's QOM path.
    pub bus_path: String,
    /// Its kind.
    pub kind: ControllerKind,
    /// Ports `1` to this one take devices up to high speed.
    pub usb2_ports: u32,
    /// Ports `1` to this one take SuperSpeed devices (xHCI only).
    pub usb3_ports: u32,
    /// The ports that a companion, a slower controller, serves for slower
    /// devices (EHCI only).
    pub companion_ports: BTreeSet<u32>,
}

impl Controller {
    /// How many ports there are.
    pub fn ports(&self) -> u32 {
        self.usb2_ports.max(self.usb3_ports)
    }

    /// The ports that a device of this speed can use, the best first. QEMU lets
    /// most fast devices run slower at a slow port (QEMU, hw/usb/host-libusb.c,
    /// `usb_host_speed_compat`), never the reverse. The highest port comes
    /// first. Other programs count from 1 when they add devices, so the ports
    /// that they choose stay free (libvirt, src/conf/domain_addr.c,
    /// `virDomainUSBAddressFindFreePort`).
    fn fitting(&self, speed: Option<Speed>) -> Vec<u32> {
        let all = (1..=self.ports()).rev();
        let slow = speed.is_some_and(|speed| speed <= Speed::FULL);
        let fast = speed.is_some_and(|speed| speed >= Speed::SUPER);
        match self.kind {
            ControllerKind::Xhci if fast => {
                let (best, rest): (Vec<u32>, Vec<u32>) = all.partition(|p| *p <= self.usb3_ports);
                best.into_iter().chain(rest).collect()
            }
            ControllerKind::Xhci => all.filter(|port| *port <= self.usb2_ports).collect(),
            ControllerKind::Ehci if slow => {
                all.filter(|port| self.companion_ports.contains(port)).collect()
            }
            _ => all.collect(),
        }
    }

    /// The order of preference for a device of this speed, the best first.
    fn rank(&self, speed: Option<Speed>) -> u8 {
        let slow = speed.is_some_and(|speed| speed <= Speed::FULL);
        match self.kind {
            ControllerKind::Xhci => 0,
            ControllerKind::Ehci if slow => 3,
            ControllerKind::Ehci => 1,
            ControllerKind::Ohci | ControllerKind::Uhci => 2,
        }
    }
}

/// The most bus names in a message, and the most columns of each name. A peer
/// may have many buses with long names.
const MOST_NAMES: usize = 8;
const WIDEST_NAME: usize = 40;

/// A bus of the guest and a port on it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestPort {
    /// The bus, `xhci.0`.
    pub bus: String,
    /// The port: `3`, or `2.1` behind a hub.
    pub port: String,
}

impl fmt::Display for GuestPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} port {}",
            escape(&fit(&self.bus, WIDEST_NAME)),
            escape(&fit(&self.port, WIDEST_NAME))
        )
    }
}

/// The bus and the port of the guest that the user asked for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Placement {
    /// The bus, if the user named one.
    pub bus: Option<String>,
    /// The port, if the user named one.
    pub port: Option<String>,
}

/// The controllers of a VM and the devices at their ports, which show where a
/// device can be attached. It may be out of date, because a VM has other
/// clients.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// The controllers.
    pub controllers: Vec<Controller>,
    /// The ports that are known to be in use.
    pub taken: Vec<GuestPort>,
    /// The ports that this process used for its own devices, by the device's
    /// id.
    pub by_id: BTreeMap<DeviceId, GuestPort>,
}

impl Layout {
    /// Records that a device uses a port.
    pub fn take(&mut self, id: &DeviceId, guest_port: &GuestPort) {
        self.taken.push(guest_port.clone());
        self.by_id.insert(id.clone(), guest_port.clone());
    }

    /// Records that a device was removed. If it was attached in another way,
    /// its port is still counted as in use. The only cost is that one port.
    pub fn free(&mut self, id: &DeviceId) {
        if let Some(free) = self.by_id.remove(id) {
            self.taken.retain(|taken| *taken != free);
        }
    }

    /// The ports for a device of this speed, the best first.
    ///
    /// # Errors
    ///
    /// The same errors as [`guest_ports`].
    pub fn guest_ports(
        &self,
        speed: Option<Speed>,
        placement: &Placement,
    ) -> Result<Vec<GuestPort>, NoGuestPort> {
        guest_ports(&self.controllers, &self.taken, speed, placement)
    }
}

/// The ports for a device of this speed, the best first. `taken` are the ports
/// that are known to be in use. Others may be in use, too, so try the next port
/// if QEMU says that one is in use.
///
/// # Errors
///
/// When there is no port. The error says what to do about it.
pub fn guest_ports(
    controllers: &[Controller],
    taken: &[GuestPort],
    speed: Option<Speed>,
    placement: &Placement,
) -> Result<Vec<GuestPort>, NoGuestPort> {
    if let Placement { bus: Some(bus), port: Some(port) } = placement {
        return Ok(vec![GuestPort { bus: bus.clone(), port: port.clone() }]);
    }
    let names = |of: &[&Controller]| -> Vec<String> {
        of.iter().take(MOST_NAMES).map(|c| escape(&fit(&c.bus, WIDEST_NAME)).into_owned()).collect()
    };
    let taken: HashSet<(&str, &str)> =
        taken.iter().map(|taken| (taken.bus.as_str(), taken.port.as_str())).collect();
    let all: Vec<&Controller> = controllers.iter().collect();
    if all.is_empty() {
        return Err(NoGuestPort::NoController);
    }
    let mut wanted = all.clone();
    wanted.retain(|c| placement.bus.as_ref().is_none_or(|bus| *bus == c.bus));
    if let (true, Some(bus)) = (wanted.is_empty(), &placement.bus) {
        return Err(NoGuestPort::UnknownBus(bus.clone(), names(&all)));
    }
    wanted.sort_by(|a, b| (a.rank(speed), &a.bus).cmp(&(b.rank(speed), &b.bus)));
    let fitting: Vec<GuestPort> = wanted
        .iter()
        .flat_map(|c| {
            let guest_port = |port| GuestPort { bus: c.bus.clone(), port };
            match &placement.port {
                // This tool does not know the ports of the guest's hubs, so it
                // uses the port that the user gave.
                Some(port) => vec![guest_port(port.clone())],
                None => {
                    c.fitting(speed).into_iter().map(|port| guest_port(port.to_string())).collect()
                }
            }
        })
        .collect();
    if let (true, Some(speed)) = (fitting.is_empty(), speed) {
        return Err(NoGuestPort::NoneFits { speed, buses: names(&wanted) });
    }
    let is_free = |place: &GuestPort| !taken.contains(&(place.bus.as_str(), place.port.as_str()));
    let free: Vec<GuestPort> = fitting.into_iter().filter(is_free).collect();
    if free.is_empty() { Err(NoGuestPort::Full(names(&wanted))) } else { Ok(free) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn controller(bus: &str, kind: ControllerKind, usb2: u32, usb3: u32) -> Controller {
        Controller {
            bus: bus.into(),
            bus_path: format!("/machine/peripheral/x/{bus}"),
            kind,
            usb2_ports: usb2,
            usb3_ports: usb3,
            companion_ports: BTreeSet::new(),
        }
    }

    fn speed(text: &str) -> Option<Speed> {
        Some(text.parse().unwrap())
    }

    fn guest_port(bus: &str, port: u32) -> GuestPort {
        GuestPort { bus: bus.into(), port: port.to_string() }
    }

    #[test]
    fn controllers_are_known_by_their_types() {
        let kind = ControllerKind::of_driver;
        assert_eq!(kind("qemu-xhci"), Some(ControllerKind::Xhci));
        assert_eq!(kind("nec-usb-xhci"), Some(ControllerKind::Xhci));
        assert_eq!(kind("ich9-usb-ehci1"), Some(ControllerKind::Ehci));
        assert_eq!(kind("piix3-usb-uhci"), Some(ControllerKind::Uhci));
        assert_eq!(kind("pci-ohci"), Some(ControllerKind::Ohci));
        assert_eq!(kind("usb-tablet"), None);
    }

    #[test]
    fn xhci_comes_first_and_the_highest_free_port() {
        let controllers = [
            controller("ehci.0", ControllerKind::Ehci, 6, 0),
            controller("xhci.0", ControllerKind::Xhci, 4, 4),
        ];
        let taken = [guest_port("xhci.0", 2), guest_port("xhci.0", 4)];
        let found = guest_ports(&controllers, &taken, speed("480"), &Placement::default()).unwrap();
        assert_eq!(
            found[..3],
            [guest_port("xhci.0", 3), guest_port("xhci.0", 1), guest_port("ehci.0", 6)]
        );
    }

    #[test]
    fn a_fast_device_prefers_fast_ports_and_a_slow_one_keeps_to_its_own() {
        let controllers = [controller("xhci.0", ControllerKind::Xhci, 2, 4)];
        let ports = |speed| -> Vec<String> {
            let found = guest_ports(&controllers, &[], speed, &Placement::default()).unwrap();
            found.into_iter().map(|guest_port| guest_port.port).collect()
        };
        assert_eq!(ports(speed("12")), ["2", "1"]);
        assert_eq!(ports(speed("5000")), ["4", "3", "2", "1"]);
        let controllers = [controller("xhci.0", ControllerKind::Xhci, 4, 2)];
        let taken = [guest_port("xhci.0", 1)];
        let found =
            guest_ports(&controllers, &taken, speed("5000"), &Placement::default()).unwrap();
        assert_eq!(
            found,
            [guest_port("xhci.0", 2), guest_port("xhci.0", 4), guest_port("xhci.0", 3)]
        );
    }

    #[test]
    fn without_xhci_the_controller_fits_the_speed() {
        let uhci = controller("usb-bus.0", ControllerKind::Uhci, 2, 0);
        let ehci = controller("ehci.0", ControllerKind::Ehci, 6, 0);
        let both = [uhci, ehci.clone()];
        let first =
            |speed| guest_ports(&both, &[], speed, &Placement::default()).unwrap()[0].bus.clone();
        assert_eq!(first(speed("480")), "ehci.0");
        assert_eq!(first(speed("1.5")), "usb-bus.0");
        let error =
            guest_ports(std::slice::from_ref(&ehci), &[], speed("12"), &Placement::default())
                .unwrap_err();
        assert!(matches!(error, NoGuestPort::NoneFits { .. }), "{error}");
        let companion_ports = BTreeSet::from([1, 2]);
        let with_companion = Controller { companion_ports, ..ehci };
        let found =
            guest_ports(&[with_companion], &[], speed("12"), &Placement::default()).unwrap();
        assert_eq!(found, [guest_port("ehci.0", 2), guest_port("ehci.0", 1)]);
    }

    #[test]
    fn a_full_controller_says_what_to_add() {
        let controllers = [controller("xhci.0", ControllerKind::Xhci, 1, 1)];
        let taken = [guest_port("xhci.0", 1)];
        let error =
            guest_ports(&controllers, &taken, speed("480"), &Placement::default()).unwrap_err();
        assert!(error.to_string().contains("xhci.0"), "{error}");
        assert!(error.to_string().contains("-device qemu-xhci,id=xhci2,p2=15,p3=15"), "{error}");
        let error = guest_ports(&[], &[], None, &Placement::default()).unwrap_err();
        assert!(error.to_string().contains("no USB controller"), "{error}");
        let xml =
            "no USB controller; add `<controller type='usb' model='qemu-xhci' ports='15'/>` to its";
        assert!(error.for_libvirt().to_string().contains(xml), "{}", error.for_libvirt());
    }

    #[test]
    fn a_wish_is_kept() {
        let controllers = [controller("xhci.0", ControllerKind::Xhci, 4, 4)];
        let placement = |bus: Option<&str>, port: Option<&str>| Placement {
            bus: bus.map(Into::into),
            port: port.map(Into::into),
        };
        let found = |placement| {
            guest_ports(&controllers, &[guest_port("xhci.0", 1)], speed("480"), &placement)
        };
        // Whether it is in use or not: QEMU decides about a port that was asked
        // for.
        assert_eq!(found(placement(Some("xhci.0"), Some("1"))), Ok(vec![guest_port("xhci.0", 1)]));
        assert_eq!(found(placement(None, Some("3"))), Ok(vec![guest_port("xhci.0", 3)]));
        assert_eq!(found(placement(Some("xhci.0"), None)).unwrap()[0], guest_port("xhci.0", 4));
        let error = found(placement(Some("nope.0"), None)).unwrap_err();
        assert!(error.to_string().contains("nope.0") && error.to_string().contains("xhci.0"));
    }
}
