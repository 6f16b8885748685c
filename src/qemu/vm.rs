//! One VM's USB devices, read and changed over a [`Session`] with its monitor.
//!
//! Everything is read from QOM, QEMU's object tree (QEMU, docs/devel/qom.rst).
//! Only a device's real port and its speed are not there (see `layout.rs`).

use std::collections::HashSet;
use std::time::Duration;

use qapi::qmp::device_del;

use super::Layout;
use super::device::DELETED;
use super::qmp::{Error, ErrorKind, Session, Ticket, VmAddress};
use super::qom::{Property, QomGet, QomList};
use crate::usb::{Address, DeviceId};

/// The QOM path of the devices that the user added with an id (QEMU,
/// system/qdev-monitor.c).
pub(super) const PERIPHERAL: &str = "/machine/peripheral";

/// The QOM paths of the devices that the user added.
pub(super) const USERS: &[&str] = &[PERIPHERAL, "/machine/peripheral-anon"];

/// The QOM paths of all devices, including the machine's own (QEMU,
/// hw/core/qdev.c). A machine has many devices of its own.
pub(super) const ALL: &[&str] = &[PERIPHERAL, "/machine/peripheral-anon", UNATTACHED];

/// The QOM path of the machine's own devices.
pub(super) const UNATTACHED: &str = "/machine/unattached";

/// How the names of the machine's own devices begin. The other objects there
/// are memory and interrupt lines (QEMU, hw/core/qdev.c,
/// `device_set_realized`).
const OWN_DEVICE: &str = "device[";

/// The devices that contain the USB controller of a `pc` machine since QEMU 8.2
/// (QEMU, hw/isa/piix.c).
const SOUTH_BRIDGES: [&str; 2] = ["PIIX3", "piix4-isa"];

/// The prefix that names a set of descriptors where QEMU expects a file (QEMU,
/// qapi/misc.json, `add-fd`).
pub(super) const FDSET: &str = "/dev/fdset/";

/// A device of the host that a VM was given, as far as the VM knows it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Given {
    /// Its address on the host, if the VM was told.
    pub address: Option<Address>,
    /// Whether QEMU got an open descriptor of it.
    pub by_descriptor: bool,
}

/// The questions about a host device in the VM that have no answer yet.
pub(super) struct GivenTickets {
    address: [Ticket<QomGet>; 2],
    node: Ticket<QomGet>,
}

/// The most objects that are read in one conversation. A VM with 512 processors
/// has about a thousand.
const MAX_OBJECTS: usize = 4096;

/// The longest name of an object, in bytes. The ids that VM managers choose
/// have about ten.
pub(super) const MAX_NAME: usize = 256;

/// A VM whose monitor answers.
#[derive(Debug)]
pub struct Vm {
    pub(super) session: Session,
    /// The known controllers and ports, from this conversation or from an
    /// earlier one with the same QEMU.
    pub layout: Option<Layout>,
}

/// An object in one of the containers.
#[derive(Debug, Clone)]
pub(super) struct Object {
    pub path: String,
    pub driver: String,
    /// Its name, if that is the device's id.
    pub id: Option<String>,
}

impl From<Session> for Vm {
    fn from(session: Session) -> Self {
        Vm { session, layout: None }
    }
}

impl Vm {
    /// Connects to the VM's monitor. `time` is the limit for the whole
    /// conversation.
    ///
    /// # Errors
    ///
    /// The same errors as [`Session::connect`].
    pub async fn connect(address: &VmAddress, time: Duration) -> Result<Vm, Error> {
        Ok(Session::connect(address, time).await?.into())
    }

    /// Connects as soon as the monitor is free. `time` begins then.
    ///
    /// # Errors
    ///
    /// The same errors as [`Session::connect_when_free`].
    pub async fn connect_when_free(address: &VmAddress, time: Duration) -> Result<Vm, Error> {
        Ok(Session::connect_when_free(address, time).await?.into())
    }

    /// Connects when the monitor is free, within `turn`. `time` begins then.
    ///
    /// # Errors
    ///
    /// The same errors as [`Session::connect_in_turn`].
    pub async fn connect_in_turn(
        address: &VmAddress,
        turn: Duration,
        time: Duration,
    ) -> Result<Vm, Error> {
        Ok(Session::connect_in_turn(address, turn, time).await?.into())
    }

    /// The session, for commands that this module has no function for.
    pub fn session(&mut self) -> &mut Session {
        &mut self.session
    }

    /// The monitor's address, as text for messages.
    pub fn name(&self) -> String {
        self.session.address().to_string()
    }

    /// QEMU's process id, if it can be seen.
    pub fn pid(&self) -> Option<i32> {
        self.session.peer_pid()
    }

    /// Removes the device with this id. Returns false if there is none.
    ///
    /// # Errors
    ///
    /// The same errors as [`Vm::remove`].
    pub async fn detach(&mut self, id: &DeviceId) -> Result<bool, Error> {
        let is_detached = self.remove(id.as_str()).await?;
        if let (true, Some(layout)) = (is_detached, &mut self.layout) {
            layout.free(id);
        }
        Ok(is_detached)
    }

    /// Removes a device by its id or by its path in the object tree. Returns
    /// false if there is none. A USB device is removed completely when QEMU
    /// answers. Descriptors of its attach that are still in the set are
    /// removed, too.
    ///
    /// # Errors
    ///
    /// The same errors as [`Session::reply`].
    pub async fn remove(&mut self, name: &str) -> Result<bool, Error> {
        self.session.want_events(DELETED);
        let removed = self.session.send(&device_del { id: name.to_owned() })?;
        let emptied = self.ask_to_drop_descriptors()?;
        let removed = self.session.reply(removed).await;
        if removed.as_ref().map_or_else(|error| error.refusal().is_some(), |_| true) {
            self.answer(emptied).await?;
        }
        match removed {
            Ok(_) => Ok(true),
            Err(error) if error.refusal().is_some_and(|r| r.is_not_found()) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// The host device with this id. `None` if the VM has no such id, or if the
    /// object is not a host device.
    ///
    /// # Errors
    ///
    /// The same errors as [`Session::reply`].
    pub async fn given(&mut self, id: &DeviceId) -> Result<Option<Given>, Error> {
        let tickets = self.ask_given(&format!("{PERIPHERAL}/{id}"))?;
        self.answer_given(tickets).await
    }

    pub(super) fn ask_given(&mut self, path: &str) -> Result<GivenTickets, Error> {
        let address = [self.ask(path, "hostbus")?, self.ask(path, "hostaddr")?];
        Ok(GivenTickets { address, node: self.ask(path, "hostdevice")? })
    }

    pub(super) async fn answer_given(
        &mut self,
        GivenTickets { address: [bus, device], node }: GivenTickets,
    ) -> Result<Option<Given>, Error> {
        let bus = self.answer(bus).await?;
        let device = self.answer(device).await?;
        let node = self.answer_text(node).await?;
        if bus.is_none() {
            return Ok(None);
        }
        let bus = bus.and_then(|value| u16::try_from(value.number()?).ok());
        let device = device.and_then(|value| u8::try_from(value.number()?).ok());
        // Zero means that the property was not set.
        let address = bus.zip(device).filter(|(bus, device)| *bus > 0 && *device > 0);
        let address = address.map(|(bus, device)| Address { bus, device });
        let by_descriptor = node.as_ref().is_some_and(|node| node.starts_with(FDSET));
        let address = address.or_else(|| address_of_node(&node?));
        Ok(Some(Given { address, by_descriptor }))
    }

    /// Every host device in the VM that has an id.
    ///
    /// # Errors
    ///
    /// The same errors as [`Session::reply`].
    pub async fn host_devices(&mut self) -> Result<Vec<(DeviceId, Given)>, Error> {
        let objects = self.ask_objects(&[PERIPHERAL])?;
        let mut asked = Vec::new();
        for object in self.answer_objects(objects).await? {
            let id = object.id.and_then(|id| id.parse().ok());
            if let (Some(id), "usb-host") = (id, object.driver.as_str()) {
                asked.push((id, self.ask_given(&object.path)?));
            }
        }
        let mut found = Vec::new();
        for (id, tickets) in asked {
            found.extend(self.answer_given(tickets).await?.map(|given| (id, given)));
        }
        Ok(found)
    }

    pub(super) fn too_much(&self, what: &'static str) -> Error {
        Error::new(self.session.address(), ErrorKind::TooMuch(what))
    }

    pub(super) fn ask(&mut self, path: &str, property: &str) -> Result<Ticket<QomGet>, Error> {
        self.session.send(&QomGet { path: path.to_owned(), property: property.to_owned() })
    }

    /// The reply to a question that QEMU may refuse because the object or the
    /// property does not exist.
    pub(super) async fn answer<C: qapi::qmp::QmpCommand>(
        &mut self,
        ticket: Ticket<C>,
    ) -> Result<Option<C::Ok>, Error> {
        match self.session.reply(ticket).await {
            Ok(value) => Ok(Some(value)),
            Err(error) if error.refusal().is_some() => Ok(None),
            Err(error) => Err(error),
        }
    }

    pub(super) async fn answer_text(
        &mut self,
        ticket: Ticket<QomGet>,
    ) -> Result<Option<String>, Error> {
        Ok(self.answer(ticket).await?.and_then(Property::text))
    }

    pub(super) fn ask_objects(
        &mut self,
        containers: &[&'static str],
    ) -> Result<Vec<(&'static str, Ticket<QomList>)>, Error> {
        let ask =
            |path: &'static str| Ok((path, self.session.send(&QomList { path: path.to_owned() })?));
        containers.iter().copied().map(ask).collect()
    }

    pub(super) async fn answer_objects(
        &mut self,
        tickets: Vec<(&'static str, Ticket<QomList>)>,
    ) -> Result<Vec<Object>, Error> {
        let mut objects = Vec::new();
        for (container, ticket) in tickets {
            let mut names = HashSet::new();
            for property in &self.answer(ticket).await?.unwrap_or_default() {
                let Some(driver) = property.child_type() else { continue };
                if container == UNATTACHED && !property.name.starts_with(OWN_DEVICE) {
                    continue;
                }
                // QEMU names each object once.
                if !names.insert(property.name.as_str()) {
                    continue;
                }
                if property.name.len() > MAX_NAME {
                    return Err(self.too_much("a name longer than 256 bytes"));
                }
                if objects.len() >= MAX_OBJECTS {
                    return Err(self.too_much("a list of more than 4096 objects"));
                }
                let id = (container == PERIPHERAL).then(|| property.name.clone());
                let path = format!("{container}/{}", property.name);
                if SOUTH_BRIDGES.contains(&driver) {
                    // If this object does not exist, QEMU refuses the questions
                    // about it.
                    let (path, driver) = (format!("{path}/uhci"), "uhci".to_owned());
                    objects.push(Object { path, driver, id: None });
                }
                objects.push(Object { path, driver: driver.to_owned(), id });
            }
        }
        Ok(objects)
    }
}

/// The address in `/dev/bus/usb/001/037`.
pub(super) fn address_of_node(node: &str) -> Option<Address> {
    let (bus, device) = node.strip_prefix("/dev/bus/usb/")?.split_once('/')?;
    Address::from_numbers(bus, device).ok()
}
