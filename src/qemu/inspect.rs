//! Reads the USB devices that a VM has.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use qapi::qmp::{query_name, query_status};

use super::usb_host::{USB_HOST, UsbHost};
use super::vm::{ALL, Object, PERIPHERAL, UNATTACHED, Vm};
use crate::qemu::qmp::{Error, ErrorKind, Version};
use crate::qemu::{Controller, InfoLine};
use crate::usb::Speed;

/// The product name of QEMU's own hub (QEMU, hw/usb/dev-hub.c).
const HUB_PRODUCT: &str = "QEMU USB Hub";

/// The USB controllers and devices of a VM.
#[derive(Debug)]
pub struct Inventory {
    /// The name that the VM was given (`-name`).
    pub name: Option<String>,
    /// QEMU's version.
    pub version: Version,
    /// `running`, `paused` and so on (QEMU, qapi/run-state.json).
    pub status: Option<String>,
    /// The controllers.
    pub controllers: Vec<Controller>,
    /// The devices, sorted by bus and port.
    pub devices: Vec<GuestDevice>,
}

impl Inventory {
    /// How many ports of a controller are free. A device behind a hub uses no
    /// port of the controller.
    pub fn free_ports(&self, controller: &Controller) -> u32 {
        let on_it = |device: &&GuestDevice| {
            device.bus.as_ref() == Some(&controller.bus)
                && device.port.as_ref().is_none_or(|port| !port.contains('.'))
        };
        let taken = u32::try_from(self.devices.iter().filter(on_it).count()).unwrap_or(u32::MAX);
        controller.ports().saturating_sub(taken)
    }
}

/// A USB device in a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestDevice {
    /// Its id, if it has one.
    pub id: Option<String>,
    /// Its place in QEMU's object tree.
    pub qom_path: String,
    /// Its type, `usb-host`.
    pub driver: String,
    /// The bus it is on.
    pub bus: Option<String>,
    /// The port it is plugged into.
    pub port: Option<String>,
    /// How fast it runs.
    pub speed: Option<Speed>,
    /// Its product name, as the device gives it. Untrusted.
    pub product: Option<String>,
    /// How QEMU got the host's device, if it is a host device.
    pub host: Option<UsbHost>,
}

/// The properties of a device in QOM.
struct QomDevice {
    object: Object,
    bus_path: Option<String>,
    asked_port: Option<String>,
    host: Option<UsbHost>,
}

impl Vm {
    /// Reads every USB device in the VM, in two round trips.
    ///
    /// # Errors
    ///
    /// The same errors as [`crate::qemu::qmp::Session::reply`].
    pub async fn inspect(&mut self) -> Result<Inventory, Error> {
        let status = self.session.send(&query_status {})?;
        let name = self.session.send(&query_name {})?;
        let objects = self.ask_objects(ALL)?;
        let info = self.ask_info_usb()?;

        let status = match self.answer(status).await {
            // A newer QEMU may have a state that this tool does not know.
            Err(Error { kind: ErrorKind::Unexpected { .. }, .. }) => None,
            status => status?,
        };
        let status = status.and_then(|s| serde_json::to_value(s.status).ok());
        let name = self.answer(name).await?.and_then(|name| name.name);
        let objects = self.answer_objects(objects).await?;
        let lines = self.answer_info_usb(info).await?;

        let controllers = self.ask_controllers(&objects)?;
        // A device is a USB device if its bus is a USB bus. The list of types
        // would tell this, too, but QEMU loads all of its modules for that
        // list. QEMU 10.0 aborts if a package upgrade has replaced the modules
        // of the running QEMU (util/module.c).
        let mut asked = Vec::new();
        for object in objects {
            let bus = self.ask(&object.path, "parent_bus")?;
            // A machine asks for no port for its own devices (QEMU,
            // hw/usb/bus.c, `usb_create_simple`).
            let is_own = object.path.starts_with(UNATTACHED);
            let port = if is_own { None } else { Some(self.ask(&object.path, "port")?) };
            let is_host = object.driver == USB_HOST;
            let host = is_host.then(|| self.ask_usb_host(&object)).transpose()?;
            asked.push((object, bus, port, host));
        }
        let controllers = self.answer_controllers(controllers).await?;
        let bus_paths: HashSet<&str> = controllers.iter().map(|c| c.bus_path.as_str()).collect();
        let mut facts = Vec::new();
        for (object, bus, port, host) in asked {
            let bus_path = self.answer_text(bus).await?;
            // Some boards have a controller at a path where this tool does not
            // look.
            let bus = bus_path.as_deref().and_then(|path| path.rsplit('/').next());
            let is_usb = object.driver == USB_HOST
                || bus.is_some_and(|name| name.starts_with("usb-bus."))
                || bus_path.as_deref().is_some_and(|path| bus_paths.contains(path));
            let port = match port {
                Some(port) => self.answer_text(port).await?,
                None => None,
            };
            let asked_port = port.filter(|port| !port.is_empty());
            let host = self.answer_usb_hosts(host.into_iter().collect()).await?.pop();
            if is_usb {
                facts.push(QomDevice { object, bus_path, asked_port, host });
            }
        }
        let version = self.session.version();
        let devices = join(facts, &lines);
        let status = status.as_ref().and_then(|status| status.as_str()).map(str::to_owned);
        Ok(Inventory { name, version, status, controllers, devices })
    }
}

/// Joins the properties from QOM with the lines of `info usb`.
fn join(mut facts: Vec<QomDevice>, lines: &[InfoLine]) -> Vec<GuestDevice> {
    // QEMU gives names to devices without an id. It numbers them in the order
    // of their creation, and the text's lines have the same order. The
    // machine's own devices are created before those of the user.
    facts.sort_by_cached_key(|fact| {
        (fact.object.path.starts_with(PERIPHERAL), natural(&fact.object.path))
    });
    let mut with_id: HashMap<&str, Vec<usize>> = HashMap::new();
    for (number, line) in lines.iter().enumerate() {
        if let Some(id) = line.id() {
            with_id.entry(id).or_default().push(number);
        }
    }
    let mut line_of: Vec<Option<usize>> =
        facts.iter().map(|fact| by_id(fact, lines, &with_id)).collect();

    // The devices without an id, for each bus, and hubs apart from other
    // devices: QEMU adds a hub when a bus has no free port. If there are as
    // many devices as lines, they belong together in this order.
    let mut buses: BTreeMap<Option<&str>, Bus> = BTreeMap::new();
    for (i, (fact, line)) in facts.iter().zip(&line_of).enumerate() {
        let bus = buses.entry(fact.bus_path.as_deref()).or_default();
        match line.and_then(|number| lines.get(number)) {
            Some(line) => {
                bus.number.get_or_insert(line.bus);
            }
            None if fact.object.id.is_some() => {}
            None if fact.object.driver == "usb-hub" => bus.hubs.push(i),
            None => bus.others.push(i),
        }
    }
    let known: BTreeSet<u32> = buses.values().filter_map(|bus| bus.number).collect();
    let used: BTreeSet<usize> = line_of.iter().flatten().copied().collect();
    // Sorted by the number of the bus, or all together if the number is not
    // known.
    let mut left: BTreeMap<(Option<u32>, bool), Vec<usize>> = BTreeMap::new();
    for (number, line) in lines.iter().enumerate().filter(|(number, _)| !used.contains(number)) {
        let bus = Some(line.bus).filter(|bus| known.contains(bus));
        let is_hub = line.product(None) == Some(HUB_PRODUCT);
        left.entry((bus, is_hub)).or_default().push(number);
    }
    let unknown = buses.values().filter(|bus| bus.number.is_none()).count();
    for bus in buses.values().filter(|bus| bus.number.is_some() || unknown == 1) {
        for (is_hub, devices) in [(true, &bus.hubs), (false, &bus.others)] {
            let its_lines = left.get(&(bus.number, is_hub)).map_or(&[][..], Vec::as_slice);
            if its_lines.len() != devices.len() {
                continue;
            }
            let asked_elsewhere = devices.iter().zip(its_lines).any(|(device, line)| {
                let asked = facts.get(*device).and_then(|fact| fact.asked_port.as_ref());
                asked.is_some() && asked != lines.get(*line).map(|line| &line.port)
            });
            if asked_elsewhere {
                continue;
            }
            for (device, line) in devices.iter().zip(its_lines) {
                if let Some(slot) = line_of.get_mut(*device) {
                    *slot = Some(*line);
                }
            }
        }
    }
    let line_of = line_of.into_iter().map(|number| lines.get(number?));
    let mut devices: Vec<GuestDevice> =
        facts.into_iter().zip(line_of).map(|(fact, line)| device(fact, line)).collect();
    devices.sort_by_cached_key(|device| {
        (device.bus.clone(), natural(device.port.as_deref().unwrap_or("~")), device.id.clone())
    });
    devices
}

/// The state of a bus while its devices are joined with the text's lines.
#[derive(Default)]
struct Bus {
    /// Its number in the text, if a device with an id has told it.
    number: Option<u32>,
    /// Its hubs that have no line yet.
    hubs: Vec<usize>,
    /// Its other devices that have no line yet.
    others: Vec<usize>,
}

/// The line of a device with an id. A product name can imitate a second line.
/// Then the port that was asked for decides. If it does not, no line is used.
fn by_id(
    fact: &QomDevice,
    lines: &[InfoLine],
    with_id: &HashMap<&str, Vec<usize>>,
) -> Option<usize> {
    let several = with_id.get(fact.object.id.as_deref()?)?;
    if let [only] = several.as_slice() {
        return Some(*only);
    }
    let asked =
        |number: &&usize| lines.get(**number).map(|line| &line.port) == fact.asked_port.as_ref();
    let mut at_port = several.iter().filter(asked);
    let first = at_port.next()?;
    at_port.next().is_none().then_some(*first)
}

fn device(fact: QomDevice, line: Option<&InfoLine>) -> GuestDevice {
    let QomDevice { object, bus_path, asked_port, host } = fact;
    let Object { path, driver, id } = object;
    let bus = bus_path.and_then(|path| path.rsplit('/').next().map(str::to_owned));
    let product = line.and_then(|line| line.product(id.as_deref())).map(str::to_owned);
    GuestDevice {
        qom_path: path,
        bus: bus.filter(|bus| !bus.is_empty()),
        port: line.map(|line| line.port.clone()).or(asked_port),
        speed: line.and_then(|line| line.speed),
        product,
        host,
        driver,
        id,
    }
}

/// A key that sorts `device[10]` after `device[9]`.
fn natural(text: &str) -> Vec<(u64, String)> {
    let mut key = Vec::new();
    for word in text.split_inclusive(|c: char| !c.is_ascii_digit()) {
        let (digits, rest) = match word.char_indices().last() {
            Some((i, c)) if !c.is_ascii_digit() => word.split_at(i),
            _ => (word, ""),
        };
        key.push((digits.parse().unwrap_or(0), rest.to_owned()));
    }
    key
}
