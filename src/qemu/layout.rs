//! Reads where a VM's USB devices are: its controllers from QOM, and the real
//! port and the speed of each device from the text of `info usb`.

use std::collections::{BTreeMap, BTreeSet};

use qapi::qmp::{human_monitor_command, x_query_usb};

use super::qmp::{Error, Ticket, Version};
use super::qom::{QomGet, QomList};
use super::vm::{MAX_NAME, Object, Vm};
use super::{Controller, ControllerKind, InfoLine, parse_info_usb};

/// EHCI controllers have six ports (QEMU, hw/usb/hcd-ehci.h, `EHCI_PORTS`).
const EHCI_PORTS: u32 = 6;

/// UHCI controllers have two ports (QEMU, hw/usb/hcd-uhci.h, `UHCI_PORTS`).
const UHCI_PORTS: u32 = 2;

/// The first QEMU that has `x-query-usb`.
const X_QUERY_USB_SINCE: Version = Version { major: 6, minor: 2, micro: 0 };

/// The most controllers that are read. A PCI bus has 32 slots.
const MAX_CONTROLLERS: usize = 256;

/// The most ports of a controller that has their number as a property (QEMU,
/// hw/usb/hcd-xhci.h, `XHCI_MAXPORTS_2`; hw/usb/hcd-ohci.h, `OHCI_MAX_PORTS`).
const MAX_PORTS: u32 = 15;

/// The questions about a controller that have no answer yet.
pub(super) struct ControllerTickets {
    kind: ControllerKind,
    path: String,
    bus: BusName,
    counts: [Option<Ticket<QomGet>>; 2],
    /// For a companion: its main controller, and the first port that it serves.
    master: Option<[Ticket<QomGet>; 2]>,
}

/// The request for the text of `info usb`.
pub(super) enum InfoUsb {
    ForPrograms(Ticket<x_query_usb>),
    ForPeople(Ticket<human_monitor_command>),
}

/// The name of a controller's bus.
enum BusName {
    /// The name follows from the controller's id (QEMU, hw/core/bus.c,
    /// `qbus_init_internal`).
    Known(String),
    /// The name is read from the controller's children, if it has its own bus.
    /// A companion has none.
    Asked(Ticket<QomList>),
}

impl Vm {
    /// Asks for the text of `info usb`. A QEMU can be built without the
    /// commands of the human monitor. QEMU has a QMP command for the same text
    /// since 6.2 (QEMU, qapi/machine.json, `x-query-usb`).
    pub(super) fn ask_info_usb(&mut self) -> Result<InfoUsb, Error> {
        if self.session.version() >= X_QUERY_USB_SINCE {
            return Ok(InfoUsb::ForPrograms(self.session.send(&x_query_usb {})?));
        }
        let command_line = "info usb".to_owned();
        let command = human_monitor_command { cpu_index: None, command_line };
        Ok(InfoUsb::ForPeople(self.session.send(&command)?))
    }

    pub(super) async fn answer_info_usb(
        &mut self,
        ticket: InfoUsb,
    ) -> Result<Vec<InfoLine>, Error> {
        let text = match ticket {
            InfoUsb::ForPrograms(ticket) => {
                self.answer(ticket).await?.map(|text| text.human_readable_text)
            }
            InfoUsb::ForPeople(ticket) => self.answer(ticket).await?,
        };
        Ok(parse_info_usb(&text.unwrap_or_default()))
    }

    pub(super) fn ask_controllers(
        &mut self,
        objects: &[Object],
    ) -> Result<Vec<ControllerTickets>, Error> {
        let mut asked = Vec::new();
        for Object { path, driver, id } in objects {
            let Some(kind) = ControllerKind::of_driver(driver) else { continue };
            if asked.len() >= MAX_CONTROLLERS {
                return Err(self.too_much("a list of more than 256 USB controllers"));
            }
            let counts = match kind {
                ControllerKind::Xhci => [Some(self.ask(path, "p2")?), Some(self.ask(path, "p3")?)],
                ControllerKind::Ohci => [Some(self.ask(path, "num-ports")?), None],
                ControllerKind::Ehci | ControllerKind::Uhci => [None, None],
            };
            let master = match kind {
                ControllerKind::Uhci | ControllerKind::Ohci => {
                    Some([self.ask(path, "masterbus")?, self.ask(path, "firstport")?])
                }
                ControllerKind::Ehci | ControllerKind::Xhci => None,
            };
            let bus = match id {
                Some(id) if kind == ControllerKind::Xhci => BusName::Known(format!("{id}.0")),
                _ => BusName::Asked(self.session.send(&QomList { path: path.clone() })?),
            };
            asked.push(ControllerTickets { kind, path: path.clone(), bus, counts, master });
        }
        Ok(asked)
    }

    pub(super) async fn answer_controllers(
        &mut self,
        tickets: Vec<ControllerTickets>,
    ) -> Result<Vec<Controller>, Error> {
        let mut controllers = Vec::new();
        let mut companion_ports: BTreeMap<String, BTreeSet<u32>> = BTreeMap::new();
        for ControllerTickets { kind, path, bus, counts, master } in tickets {
            let mut numbers = [0; 2];
            for (number, ticket) in numbers.iter_mut().zip(counts) {
                let Some(ticket) = ticket else { continue };
                let value = self.answer(ticket).await?.and_then(|value| value.number());
                *number =
                    value.and_then(|value| u32::try_from(value).ok()).unwrap_or(0).min(MAX_PORTS);
            }
            let (usb2_ports, usb3_ports) = match (kind, numbers) {
                (ControllerKind::Ehci, _) => (EHCI_PORTS, 0),
                (ControllerKind::Uhci, _) => (UHCI_PORTS, 0),
                (ControllerKind::Xhci | ControllerKind::Ohci, [usb2, usb3]) => (usb2, usb3),
            };
            if let Some([master, first]) = master {
                let master = self.answer_text(master).await?;
                let first = self.answer(first).await?.and_then(|value| value.number());
                // `firstport` counts from 0 (QEMU, hw/usb/hcd-ehci.c,
                // `ehci_register_companion`).
                let first =
                    first.and_then(|first| u32::try_from(first).ok()).unwrap_or(0).min(EHCI_PORTS);
                if let Some(master) = master {
                    companion_ports
                        .entry(master)
                        .or_default()
                        .extend(first + 1..=first + usb2_ports);
                }
            }
            let bus = match bus {
                BusName::Known(bus) => Some(bus),
                BusName::Asked(children) => {
                    let mut children = self.answer(children).await?.unwrap_or_default().into_iter();
                    let bus = children.find(|child| child.child_type() == Some("usb-bus"));
                    bus.map(|child| child.name).filter(|name| name.len() <= MAX_NAME)
                }
            };
            controllers.extend(bus.map(|bus| Controller {
                bus_path: format!("{path}/{bus}"),
                bus,
                kind,
                usb2_ports,
                usb3_ports,
                companion_ports: BTreeSet::new(),
            }));
        }
        for controller in &mut controllers {
            controller.companion_ports =
                companion_ports.remove(&controller.bus).unwrap_or_default();
        }
        Ok(controllers)
    }
}
