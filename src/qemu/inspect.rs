//! What a VM really has.

use qapi::qmp::{query_name, query_status};

use super::vm::{ALL, Given, Object, PERIPHERAL, Vm};
use crate::qemu::qmp::{Error, ErrorKind, Version};
use crate::qemu::{Controller, InfoLine, parse_info_usb};
use crate::usb::Speed;

/// What QEMU's hub says it is (QEMU, hw/usb/dev-hub.c).
const HUB_PRODUCT: &str = "QEMU USB Hub";

/// A VM's USB.
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
    /// The devices, by bus and port.
    pub devices: Vec<GuestDevice>,
}

impl Inventory {
    /// How many ports of a controller have nothing plugged in. What is behind
    /// a hub takes none.
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
    /// The port it is at.
    pub port: Option<String>,
    /// How fast it runs.
    pub speed: Option<Speed>,
    /// Its own name. Untrusted.
    pub product: Option<String>,
    /// The host's device, if it is one.
    pub host: Option<Given>,
}

/// What QOM says of a device.
struct QomDevice {
    object: Object,
    bus_path: Option<String>,
    asked_port: Option<String>,
    host: Option<Given>,
}

impl Vm {
    /// Every USB device in the VM, in two round trips.
    ///
    /// # Errors
    ///
    /// As for [`crate::qemu::qmp::Session::reply`].
    pub async fn inspect(&mut self) -> Result<Inventory, Error> {
        let status = self.session.send(&query_status {})?;
        let name = self.session.send(&query_name {})?;
        let objects = self.ask_objects(ALL)?;
        let info = self.ask_info_usb()?;

        let status = match self.answer(status).await {
            // A state of a newer QEMU.
            Err(Error { kind: ErrorKind::Unexpected { .. }, .. }) => None,
            status => status?,
        };
        let status = status.and_then(|s| serde_json::to_value(s.status).ok());
        let name = self.answer(name).await?.and_then(|name| name.name);
        let objects = self.answer_objects(objects).await?;
        let lines = parse_info_usb(&self.answer(info).await?.unwrap_or_default());

        let controllers = self.ask_controllers(&objects)?;
        // A device is USB when its bus is. The types would tell, too, but to
        // list them QEMU loads all of its modules, and QEMU 10.0 aborts when a
        // package upgrade has replaced them under it (util/module.c).
        let mut asked = Vec::new();
        for object in objects {
            let bus = self.ask(&object.path, "parent_bus")?;
            let port = self.ask(&object.path, "port")?;
            let host = if object.driver == "usb-host" {
                Some(self.ask_given(&object.path)?)
            } else {
                None
            };
            asked.push((object, bus, port, host));
        }
        let controllers = self.answer_controllers(controllers).await?;
        let mut facts = Vec::new();
        for (object, bus, port, host) in asked {
            let bus_path = self.answer_text(bus).await?;
            let on_usb = |c: &Controller| Some(&c.bus_path) == bus_path.as_ref();
            // A board may have a controller where nobody looked for it.
            let bus = bus_path.as_deref().and_then(|path| path.rsplit('/').next());
            let is_usb = object.driver == "usb-host"
                || bus.is_some_and(|name| name.starts_with("usb-bus."))
                || controllers.iter().any(on_usb);
            let asked_port = self.answer_text(port).await?.filter(|port| !port.is_empty());
            let host = match host {
                Some(tickets) => Some(self.answer_given(tickets).await?.unwrap_or_default()),
                None => None,
            };
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

/// Joins what QOM says with the lines of `info usb`.
fn join(mut facts: Vec<QomDevice>, lines: &[InfoLine]) -> Vec<GuestDevice> {
    // QEMU numbers its own names for devices without id in the order of their
    // creation, which is also the order of the text's lines. Those that come
    // with the machine are created before those of the user.
    facts.sort_by_cached_key(|fact| {
        (fact.object.path.starts_with(PERIPHERAL), natural(&fact.object.path))
    });
    let mut line_of: Vec<Option<&InfoLine>> = facts.iter().map(|fact| by_id(fact, lines)).collect();

    // The devices without id, bus by bus: where as many are left as lines,
    // they are the same in the same order.
    let mut left: Vec<&InfoLine> = lines.iter().collect();
    left.retain(|line| !line_of.iter().flatten().any(|known| std::ptr::eq(*known, *line)));
    let numbers = |path: &Option<String>| -> Vec<u32> {
        let on_bus = facts.iter().zip(&line_of).filter(|(fact, _)| fact.bus_path == *path);
        on_bus.filter_map(|(_, line)| Some((*line)?.bus)).collect()
    };
    let mut paths: Vec<Option<String>> = facts.iter().map(|fact| fact.bus_path.clone()).collect();
    paths.sort();
    paths.dedup();
    let known: Vec<(Option<String>, Option<u32>)> =
        paths.iter().map(|path| (path.clone(), numbers(path).first().copied())).collect();
    let taken: Vec<u32> = known.iter().filter_map(|(_, number)| *number).collect();
    let unknown = known.iter().filter(|(_, number)| number.is_none()).count();
    for (path, number) in known {
        let on_this_bus = |line: &&&InfoLine| match number {
            Some(number) => line.bus == number,
            None => unknown == 1 && !taken.contains(&line.bus),
        };
        // Hubs apart from the rest: QEMU adds one wherever it runs out of ports.
        for hubs in [true, false] {
            let is_hub = |line: &&&InfoLine| (line.product(None) == Some(HUB_PRODUCT)) == hubs;
            let its_lines = left.iter().filter(on_this_bus).filter(is_hub).copied();
            let without = facts.iter().enumerate().zip(&line_of).filter(|((_, fact), line)| {
                let is_hub = fact.object.driver == "usb-hub";
                fact.bus_path == path
                    && fact.object.id.is_none()
                    && line.is_none()
                    && is_hub == hubs
            });
            let without: Vec<(usize, &QomDevice)> = without.map(|(fact, _)| fact).collect();
            let its_lines: Vec<&InfoLine> = its_lines.collect();
            let asked_elsewhere = without.iter().zip(&its_lines).any(|((_, fact), line)| {
                fact.asked_port.as_ref().is_some_and(|port| *port != line.port)
            });
            if its_lines.len() != without.len() || asked_elsewhere {
                continue;
            }
            for ((i, _), line) in without.into_iter().zip(its_lines) {
                if let Some(slot) = line_of.get_mut(i) {
                    *slot = Some(line);
                }
            }
        }
    }
    let mut devices: Vec<GuestDevice> =
        facts.into_iter().zip(line_of).map(|(fact, line)| device(fact, line)).collect();
    devices.sort_by_cached_key(|device| {
        (device.bus.clone(), natural(device.port.as_deref().unwrap_or("~")), device.id.clone())
    });
    devices
}

/// The line of a device with an id. Where a product's name forges a second
/// one, the port that was asked for decides, or nothing does.
fn by_id<'a>(fact: &QomDevice, lines: &'a [InfoLine]) -> Option<&'a InfoLine> {
    let id = fact.object.id.as_deref()?;
    let found: Vec<&InfoLine> = lines.iter().filter(|l| l.product(Some(id)).is_some()).collect();
    match found.as_slice() {
        [only] => Some(only),
        several => {
            let mut at_port = several.iter().filter(|l| Some(&l.port) == fact.asked_port.as_ref());
            let first = at_port.next()?;
            at_port.next().is_none().then_some(*first)
        }
    }
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
