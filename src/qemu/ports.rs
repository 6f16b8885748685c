//! A VM's USB controllers, and the choice of a free port. Pure.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fmt;

use crate::text::{escape, fit, words};
use crate::usb::{DeviceId, Speed};

/// The kinds of USB controllers that QEMU has, by the interface they give to
/// the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ControllerKind {
    /// Every speed.
    Xhci,
    /// High speed; slower devices only through companions.
    Ehci,
    /// Full and low speed.
    Ohci,
    /// Full and low speed.
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
    /// Its bus, as `bus=` takes it: `xhci.0`.
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

    /// The ports that a device of this speed can use, the best first. QEMU
    /// lets most fast devices run slower where the port is slow (QEMU,
    /// hw/usb/host-libusb.c, `usb_host_speed_compat`), never the reverse. The
    /// highest port comes first: whoever else plugs in devices counts from 1
    /// (libvirt, src/conf/domain_addr.c, `virDomainUSBAddressFindFreePort`),
    /// and finds those ports free.
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

    /// The order of preference for a device of this speed, smallest first.
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

/// The most buses that a message names, and how much of each, in columns: a
/// peer may have many, with long names.
const MOST_NAMES: usize = 8;
const WIDEST_NAME: usize = 40;

/// A place for a device: a bus and a port on it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestPort {
    /// The bus, `xhci.0`.
    pub bus: String,
    /// The port, `3`, or behind a hub `2.1`.
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

/// What the user wants of the guest's side.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Placement {
    /// The bus, if it matters.
    pub bus: Option<String>,
    /// The port, if it matters.
    pub port: Option<String>,
}

/// Why there is no place for a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NoGuestPort {
    /// The VM has no USB controller.
    NoController,
    /// The VM has no such bus.
    UnknownBus(String, Vec<String>),
    /// Nothing takes a device that slow.
    NoneFits {
        /// The device's speed.
        speed: Speed,
        /// The VM's buses.
        buses: Vec<String>,
    },
    /// Every port that would do is taken.
    Full(Vec<String>),
    /// A controller was to be added, and there is no slot for one.
    NoSlot {
        /// Why one was to be added.
        lacks: Box<NoGuestPort>,
        /// QEMU's words.
        said: String,
    },
}

impl NoGuestPort {
    /// The VM's buses, where a controller more would help.
    fn buses(&self) -> Option<&[String]> {
        match self {
            NoGuestPort::NoController => Some(&[]),
            NoGuestPort::UnknownBus(..) => None,
            NoGuestPort::NoneFits { buses, .. } | NoGuestPort::Full(buses) => Some(buses),
            NoGuestPort::NoSlot { lacks, .. } => lacks.buses(),
        }
    }

    /// The words for who has libvirt start QEMU.
    pub fn for_libvirt(&self) -> impl fmt::Display {
        ForLibvirt(self)
    }

    fn with_advice(
        &self,
        f: &mut fmt::Formatter<'_>,
        add: impl Fn(&[String]) -> String,
    ) -> fmt::Result {
        self.matter(f)?;
        let Some(buses) = self.buses() else { return Ok(()) };
        let or = if matches!(self, NoGuestPort::Full(_)) { "detach something, or " } else { "" };
        write!(f, "; {or}{}", add(buses))?;
        match self {
            NoGuestPort::NoSlot { .. } => Ok(()),
            _ => f.write_str(", or use --add-controller (in a rule: `add_controller = true`)"),
        }
    }

    /// What is the matter, without advice.
    fn matter(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NoGuestPort::NoController => f.write_str("this VM has no USB controller"),
            NoGuestPort::UnknownBus(bus, others) => {
                write!(f, "this VM has no USB bus `{}`; it has {}", escape(bus), others.join(", "))
            }
            NoGuestPort::NoneFits { speed, buses } => write!(
                f,
                "no USB controller of this VM ({}) takes a device of {speed} Mb/s",
                buses.join(", ")
            ),
            NoGuestPort::Full(buses) => write!(f, "no free port on {}", buses.join(", ")),
            NoGuestPort::NoSlot { lacks, said } => {
                lacks.matter(f)?;
                write!(f, ", and no slot for a controller more ({})", escape(&words(said)))
            }
        }
    }
}

/// The words for who starts QEMU; [`NoGuestPort::for_libvirt`] has others.
impl fmt::Display for NoGuestPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.with_advice(f, |buses| format!("add `{}` to its QEMU", line_to_add(buses)))
    }
}

impl std::error::Error for NoGuestPort {}

/// What a domain's XML needs for as many ports as there can be (libvirt,
/// docs/formatdomain.rst, "Controllers").
pub const CONTROLLER_XML: &str = "<controller type='usb' model='qemu-xhci' ports='15'/>";

struct ForLibvirt<'a>(&'a NoGuestPort);

impl fmt::Display for ForLibvirt<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.with_advice(f, |_| {
            format!("add `{CONTROLLER_XML}` to its XML with `virsh edit`, then stop and start it")
        })
    }
}

/// The option that adds a controller with as many ports as there can be
/// (QEMU, include/hw/usb/xhci.h, `XHCI_MAXPORTS_2`), under an id not yet taken.
fn line_to_add(buses: &[String]) -> String {
    let taken = |id: &str| buses.iter().any(|bus| bus.strip_suffix(".0") == Some(id));
    let id = ["xhci", "xhci2", "xhci3"].into_iter().find(|id| !taken(id)).unwrap_or("xhci4");
    format!("-device qemu-xhci,id={id},p2=15,p3=15")
}

/// The controllers of a VM, and what is at their ports: where a device can go.
/// It may be out of date, for a VM has other clients.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// The controllers.
    pub controllers: Vec<Controller>,
    /// The ports that are known to be in use.
    pub taken: Vec<GuestPort>,
    /// Those of them that were taken in this process, by the device's id.
    pub by_id: BTreeMap<DeviceId, GuestPort>,
}

impl Layout {
    /// Notes that a device took a port.
    pub fn take(&mut self, id: &DeviceId, guest_port: &GuestPort) {
        self.taken.push(guest_port.clone());
        self.by_id.insert(id.clone(), guest_port.clone());
    }

    /// Notes that a device is gone. The port of one that came in another way
    /// counts as in use from then on, which costs no more than that port.
    pub fn free(&mut self, id: &DeviceId) {
        if let Some(free) = self.by_id.remove(id) {
            self.taken.retain(|taken| *taken != free);
        }
    }

    /// The places for a device of a speed, the best first.
    ///
    /// # Errors
    ///
    /// As for [`guest_ports`].
    pub fn guest_ports(
        &self,
        speed: Option<Speed>,
        placement: &Placement,
    ) -> Result<Vec<GuestPort>, NoGuestPort> {
        guest_ports(&self.controllers, &self.taken, speed, placement)
    }
}

/// The places for a device of a speed, the best first. `taken` are the places
/// that are known to be in use; others may be, so the next place is worth a
/// try when QEMU says that a port is in use.
///
/// # Errors
///
/// When there is none, and what to do about it.
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
                // This tool does not know the ports of the guest's hubs. It
                // takes what the user gave.
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
        // Taken or not: QEMU has the last word on what was asked for.
        assert_eq!(found(placement(Some("xhci.0"), Some("1"))), Ok(vec![guest_port("xhci.0", 1)]));
        assert_eq!(found(placement(None, Some("3"))), Ok(vec![guest_port("xhci.0", 3)]));
        assert_eq!(found(placement(Some("xhci.0"), None)).unwrap()[0], guest_port("xhci.0", 4));
        let error = found(placement(Some("nope.0"), None)).unwrap_err();
        assert!(error.to_string().contains("nope.0") && error.to_string().contains("xhci.0"));
    }
}
