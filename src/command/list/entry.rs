//! The facts about one device.

use std::fmt;
use std::sync::Arc;

use serde::Serialize;

use crate::host::{self, Bus, CLAIMED, Holder, Host, Look, OtherUse, Strings};
use crate::policy::rule::{self, Effect};
use crate::policy::{Policy, Reading};
use crate::text::escape;
use crate::usb::{Address, BusPath, Device, Port, PortPath, Speed};

/// A device in the JSON document.
#[derive(Debug, Clone, Serialize)]
pub struct Entry {
    pub port: Port,
    /// The stable name of the port.
    pub path: Option<PortPath>,
    /// The other half of the same USB 3 socket.
    pub twin: Option<Port>,
    pub hub: bool,
    pub bus: u16,
    pub address: u8,
    pub vendor: String,
    pub product: String,
    pub vendor_name: Option<String>,
    pub product_name: Option<String>,
    pub serial: Option<String>,
    pub speed_mbps: Option<Speed>,
    pub drivers: Vec<String>,
    pub in_use: Vec<UseReport>,
    /// The other uses of the device on this host.
    pub other_use: Vec<OtherUseReport>,
    /// Whether the kernel has authorized it.
    pub authorized: bool,
    /// Whether a program has it open, even one that this user may not see.
    pub held: bool,
    pub held_by: Vec<HolderReport>,
    pub rule: Option<RuleReport>,
    /// Whether its drivers are starting, so that its strings cannot be read.
    pub starting: bool,
}

/// The facts about a device that cannot be read while drivers start for it.
struct Late {
    strings: Strings,
    rule: Option<RuleReport>,
}

impl Late {
    fn of(host: &Host, policy: &Policy, device: &Device) -> Self {
        let Strings { manufacturer, product, serial } = host.strings(&device.port);
        // The hardware database has names for many devices that have no strings
        // of their own (hwdb(7), usb.ids).
        let name =
            |text: Option<String>, property| text.or_else(|| host.property(&device.port, property));
        let strings = Strings {
            manufacturer: name(manufacturer, "ID_VENDOR_FROM_DATABASE"),
            product: name(product, "ID_MODEL_FROM_DATABASE"),
            serial,
        };
        let rule = policy.decision(host, device, Reading::Patient).rule();
        Late { strings, rule: rule.map(|(_, rule)| rule.into()) }
    }
}

/// A disk in use.
#[derive(Debug, Clone, Serialize)]
pub struct UseReport {
    pub disk: String,
    /// `mount`, `btrfs`, `swap`, `loop`, `holder`, `bcache`, `zfs`, `program`
    /// or `unknown`.
    pub by: &'static str,
    /// The mount point, the block device that it is part of, or the program
    /// that has it open.
    pub what: Option<String>,
    #[serde(skip)]
    text: String,
}

/// A use that does not concern a disk.
#[derive(Debug, Clone, Serialize)]
pub struct OtherUseReport {
    /// The name of the network adapter or the node, `ttyUSB0`.
    pub name: Option<String>,
    /// `default-route`, `address`, `program` or `only-keyboard`.
    pub by: &'static str,
    /// The program.
    pub what: Option<String>,
    #[serde(skip)]
    text: String,
}

impl From<OtherUse> for OtherUseReport {
    fn from(used: OtherUse) -> Self {
        let (by, text) = (used.word(), used.to_string());
        let (name, what) = match used {
            OtherUse::DefaultRoute(name) | OtherUse::Address(name) => (Some(name), None),
            OtherUse::Program(name, holder) => (Some(name), Some(holder.to_string())),
            OtherUse::OnlyKeyboard => (None, None),
        };
        OtherUseReport { name, by, what, text }
    }
}

/// A process that has the device's node open.
#[derive(Debug, Clone, Serialize)]
pub struct HolderReport {
    pub pid: i32,
    pub vm: Option<String>,
    pub program: String,
    #[serde(skip)]
    text: String,
}

impl From<Holder> for HolderReport {
    fn from(holder: Holder) -> Self {
        let text = holder.to_string();
        HolderReport { pid: holder.pid, vm: holder.vm, program: holder.program, text }
    }
}

/// The rule that decides.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RuleReport {
    /// The line where it begins.
    pub line: usize,
    /// Whether the device stays with the host.
    pub deny: bool,
    /// The VM it belongs to.
    pub vm: Option<String>,
}

impl From<&rule::Rule> for RuleReport {
    fn from(rule: &rule::Rule) -> Self {
        let vm = match &rule.effect {
            Effect::Attach(target) => Some(target.vm.clone()),
            Effect::Deny => None,
        };
        RuleReport { line: rule.line, deny: vm.is_none(), vm }
    }
}

impl fmt::Display for RuleReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.vm {
            Some(vm) => write!(f, "rule at line {}: VM {}", self.line, escape(vm)),
            None => write!(f, "rule at line {}: denied", self.line),
        }
    }
}

/// A bus in the JSON document.
#[derive(Debug, Clone, Serialize)]
pub struct BusReport {
    pub bus: u16,
    /// The stable name of the bus, which begins the names of its ports.
    pub path: Option<BusPath>,
    pub speed_mbps: Option<Speed>,
    pub ports: Option<u32>,
    pub controller: String,
}

impl From<Bus> for BusReport {
    fn from(bus: Bus) -> Self {
        let Bus { number, path, speed, ports, controller } = bus;
        BusReport { bus: number, path, speed_mbps: speed, ports, controller }
    }
}

impl Entry {
    /// Reads the facts about devices, each with its holders. If drivers are
    /// starting for a device, only the facts are shown that can be read at
    /// once.
    ///
    /// # Errors
    ///
    /// [`host::Error::Thread`].
    pub fn of_all(
        host: &Host,
        policy: &Arc<Policy>,
        devices: Vec<(Device, Vec<Holder>)>,
    ) -> Result<Vec<Self>, host::Error> {
        let read = {
            let (host, policy) = (host.clone(), policy.clone());
            move |device: Device| Late::of(&host, &policy, &device)
        };
        let all: Vec<Device> = devices.iter().map(|(device, _)| device.clone()).collect();
        let late = host.in_haste(all, read)?;
        let entry = |((device, holders), late)| Entry::of(host, policy, &device, holders, late);
        Ok(devices.into_iter().zip(late).map(entry).collect())
    }

    fn of(
        host: &Host,
        policy: &Policy,
        device: &Device,
        holders: Vec<Holder>,
        late: Option<Late>,
    ) -> Self {
        let port = &device.port;
        let starting = late.is_none();
        let Late { strings, rule } = late.unwrap_or_else(|| {
            let rule = policy.decision(host, device, Reading::AtOnce).rule();
            Late { strings: Strings::default(), rule: rule.map(|(_, rule)| rule.into()) }
        });
        let drivers = host.drivers(port);
        Entry {
            port: port.clone(),
            path: host.port_path(port),
            twin: host.twin(port),
            hub: device.is_hub(),
            bus: device.address.bus,
            address: device.address.device,
            vendor: format!("{:04x}", device.id.vendor),
            product: format!("{:04x}", device.id.product),
            vendor_name: strings.manufacturer,
            product_name: strings.product,
            serial: strings.serial,
            speed_mbps: host.speed(port),
            in_use: if device.is_hub() { Vec::new() } else { uses(host, port) },
            other_use: if device.is_hub() {
                Vec::new()
            } else {
                host.other_uses(port, Look::Thorough).into_iter().map(Into::into).collect()
            },
            authorized: host.is_authorized(port),
            held: !holders.is_empty()
                || drivers.iter().any(|driver| driver == CLAIMED)
                || host.is_locked(device.address) == Some(true),
            held_by: holders.into_iter().map(HolderReport::from).collect(),
            rule,
            starting,
            drivers,
        }
    }

    /// The names of the manufacturer and the product.
    pub fn name(&self) -> Option<String> {
        let (manufacturer, product) = (self.vendor_name.clone(), self.product_name.clone());
        Strings { manufacturer, product, serial: None }.name()
    }

    /// The name. If there is none, a text that says why.
    pub fn shown_name(&self) -> String {
        match self.name() {
            Some(name) => name,
            None if self.starting => "(starting)".to_owned(),
            None => "(no name)".to_owned(),
        }
    }

    /// `1:37`
    pub fn at(&self) -> String {
        Address { bus: self.bus, device: self.address }.to_string()
    }

    /// `152d:2338`
    pub fn id(&self) -> String {
        format!("{}:{}", self.vendor, self.product)
    }

    /// `sda1 is mounted on /mnt`
    pub fn uses(&self) -> Vec<String> {
        let disks = self.in_use.iter().map(|used| used.text.clone());
        let others = self.other_use.iter().map(|used| used.text.clone());
        let authorized = (!self.authorized).then(|| "it is not authorized".to_owned());
        disks.chain(others).chain(authorized).collect()
    }

    /// `VM win11 (process 1234)`
    pub fn held_text(&self) -> Option<String> {
        let holders: Vec<&str> = self.held_by.iter().map(|holder| holder.text.as_str()).collect();
        match holders.as_slice() {
            [] if self.held => Some("a process that this user may not see".to_owned()),
            [] => None,
            some => Some(some.join(", ")),
        }
    }
}

fn uses(host: &Host, port: &Port) -> Vec<UseReport> {
    let report = |used: crate::host::Use| {
        let text = format!("{} is {}", escape(&used.disk), used.by);
        UseReport { by: used.by.word(), what: used.by.what(), disk: used.disk, text }
    };
    host.uses(port).into_iter().map(report).collect()
}
