//! Adds a USB controller to a VM that has no port for a device.

use std::collections::BTreeSet;

use qapi::qmp::device_add;
use serde_json::{Map, Value};
use tracing::{debug, info};

use super::qmp;
use super::vm::{Object, PERIPHERAL, Vm};
use super::{Controller, ControllerKind, GuestPort, NoGuestPort, Placement, guest_ports};
use crate::text::escape;
use crate::usb::Speed;

/// The id of the first controller that is added. A number is added to the next
/// ones.
const ID: &str = "usb-qmp-hotplug-xhci";

/// The most controllers that are added to one VM. They are enough for 60
/// devices.
const MAX_ADDED: usize = 4;

/// The ports of each speed. This is the maximum (QEMU, hw/usb/hcd-xhci.h,
/// `XHCI_MAXPORTS_2`).
const PORTS: u32 = 15;

/// The bus of a `pc` machine. Its slots accept devices at any time. A `q35`
/// machine has no bus of this name. There, only the ports that the VM was given
/// for hotplug accept devices (QEMU, docs/pcie.txt, section 3).
const PCI: &str = "pci.0";

/// The types of those ports (QEMU, hw/pci-bridge/). The bus of each has the
/// port's id (QEMU, hw/pci/pci_bridge.c, `pci_bridge_initfn`) and accepts one
/// device, at slot 0. If no slot is named, QEMU adds more devices there, but no
/// guest finds them.
const SLOTS: [&str; 3] = ["pcie-root-port", "ioh3420", "xio3130-downstream"];

/// The place of a PCI device: its bus and its slot. QEMU chooses what is not
/// set.
type Slot = (Option<String>, Option<u8>);

impl Vm {
    /// Adds an xHCI controller because the VM `lacks` a port. Returns the ports
    /// on it for a device of this speed, or the error that there is no slot.
    /// With `dry_run`, it changes nothing and returns what it would do.
    ///
    /// # Errors
    ///
    /// The same errors as [`crate::qemu::qmp::Session::reply`].
    pub async fn add_controller(
        &mut self,
        lacks: NoGuestPort,
        speed: Option<Speed>,
        placement: &Placement,
        dry_run: bool,
    ) -> Result<Result<Vec<GuestPort>, NoGuestPort>, qmp::Error> {
        let objects = self.ask_objects(&[PERIPHERAL])?;
        let objects = self.answer_objects(objects).await?;
        let Some(id) = free_id(&objects) else { return Ok(Err(lacks)) };
        if !dry_run {
            if let Err(said) = self.add_xhci(&id, &objects).await? {
                return Ok(Err(NoGuestPort::NoSlot { lacks: Box::new(lacks), said }));
            }
            info!("added USB controller {id} to {}", escape(&self.name()));
        }
        let controller = Controller {
            bus: format!("{id}.0"),
            bus_path: format!("{PERIPHERAL}/{id}/{id}.0"),
            kind: ControllerKind::Xhci,
            usb2_ports: PORTS,
            usb3_ports: PORTS,
            companion_ports: BTreeSet::new(),
        };
        Ok(guest_ports(&[controller], &[], speed, placement))
    }

    /// Adds it at the first slot that QEMU finds free. If there is none,
    /// returns QEMU's last message.
    async fn add_xhci(
        &mut self,
        id: &str,
        objects: &[Object],
    ) -> Result<Result<(), String>, qmp::Error> {
        let mut said = String::new();
        let mut missing = BTreeSet::new();
        for (bus, slot) in slots(objects) {
            if bus.as_ref().is_some_and(|bus| missing.contains(bus)) {
                continue;
            }
            let mut arguments = Map::from_iter([
                ("p2".to_owned(), Value::from(PORTS)),
                ("p3".to_owned(), Value::from(PORTS)),
            ]);
            arguments.extend(slot.map(|slot| ("addr".to_owned(), format!("{slot:#x}").into())));
            let driver = "qemu-xhci".to_owned();
            let command =
                device_add { driver, id: Some(id.to_owned()), bus: bus.clone(), arguments };
            let Err(error) = self.session.execute(&command).await else { return Ok(Ok(())) };
            let Some(refusal) = error.refusal() else { return Err(error) };
            debug!(?bus, ?slot, "no slot for a controller: {}", escape(&refusal.desc));
            said.clone_from(&refusal.desc);
            // If the bus exists, this refusal means only that the slot is in
            // use (QEMU, hw/pci/pci.c, `do_pci_register_device`).
            if !refusal.desc.starts_with("PCI: slot") {
                missing.extend(bus);
            }
        }
        Ok(Err(said))
    }
}

/// The first id that no object has.
fn free_id(objects: &[Object]) -> Option<String> {
    let taken: BTreeSet<&str> = objects.iter().filter_map(|object| object.id.as_deref()).collect();
    let numbered = (2..=MAX_ADDED).map(|number| format!("{ID}{number}"));
    std::iter::once(ID.to_owned()).chain(numbered).find(|id| !taken.contains(id.as_str()))
}

/// The slots that a controller may use, the highest first, because VM managers
/// count from the lowest.
fn slots(objects: &[Object]) -> Vec<Slot> {
    let pci = (1..=31).rev().map(|slot| (Some(PCI.to_owned()), Some(slot)));
    let ports = objects.iter().filter(|object| SLOTS.contains(&object.driver.as_str()));
    let mut ports: Vec<&String> = ports.filter_map(|object| object.id.as_ref()).collect();
    ports.sort_by_key(|id| std::cmp::Reverse((id.len(), *id)));
    let ports = ports.into_iter().take(32).map(|id| (Some(id.clone()), Some(0)));
    pci.chain(ports).chain([(None, None)]).collect()
}
