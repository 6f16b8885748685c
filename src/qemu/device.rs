//! Attaches a host device to the VM.

use std::collections::{BTreeMap, HashMap};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::Duration;

use qapi::qmp::{RunState, add_fd, device_add, query_fdsets, query_status, remove_fd};
use serde_json::{Map, Value};
use tokio::time::Instant;
use tracing::debug;

use super::qmp::{self, Ticket};
use super::usb_host::{USB_HOST, UsbHost};
use super::vm::{ALL, FDSET, Given, Object, USERS, Vm};
use crate::qemu::{ControllerKind, GuestPort, InfoLine, Layout, NoGuestPort, Placement};
use crate::usb::{Address, DeviceId, Speed};

/// The most ports that are tried before QEMU's answer "in use" is final.
const MAX_TRIES: usize = 64;

/// How long the id of a removed device may stay in use. QEMU 5.2 needed about
/// 50 ms.
const UNTIL_DELETED: Duration = Duration::from_secs(1);

/// The event that QEMU sends when a device has been removed.
pub(super) const DELETED: &str = "DEVICE_DELETED";

/// The data of that event (QEMU, qapi/qdev.json).
#[derive(serde::Deserialize)]
struct Deleted {
    device: Option<String>,
}

/// How QEMU opens the device.
#[derive(Debug)]
pub enum Access<'a> {
    /// This tool opened the node, and it passes the descriptor.
    Descriptor(&'a OwnedFd),
    /// QEMU opens its node.
    Node(PathBuf),
    /// QEMU looks for it in its list of devices. This is for a QEMU older than
    /// 5.2.
    Address,
}

/// A device to attach.
#[derive(Debug)]
pub struct Attachment<'a> {
    /// The id it gets.
    pub id: &'a DeviceId,
    /// Its address on the host.
    pub address: Address,
    /// More properties of usb-host, as the user gave them.
    pub options: &'a Map<String, Value>,
}

/// The state of a VM, as far as it matters to a device (QEMU,
/// qapi/run-state.json, `RunState`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// Its processors run.
    Running,
    /// Its processors are stopped.
    Stopped,
    /// It waits for the state of a saved or migrated VM. That state does not
    /// include a device that is attached now, so the device would be an object
    /// without hardware (QEMU, hw/usb/host-libusb.c, `usb_host_post_load`).
    Incoming,
}

/// The facts about a VM that an attach needs.
#[derive(Debug)]
pub struct Probe {
    /// The host device that has the id already.
    pub present: Option<Given>,
    /// The host devices in the VM that do not have an id of this tool.
    pub others: Vec<UsbHost>,
    /// The state of the VM.
    pub status: Status,
    /// The ports that the device can use once the id is free, the best one
    /// first.
    pub guest_ports: Result<Vec<GuestPort>, NoGuestPort>,
}

impl Vm {
    /// Looks for the id, and for ports that a device of this speed can use.
    /// This takes two round trips. It takes four if no xHCI controller that the
    /// user added has a free port, because the machine's own controllers are
    /// read then, too.
    ///
    /// # Errors
    ///
    /// The same errors as [`crate::qemu::qmp::Session::reply`].
    pub async fn probe(
        &mut self,
        id: &DeviceId,
        speed: Option<Speed>,
        placement: &Placement,
    ) -> Result<Probe, qmp::Error> {
        let probe = self.probe_of(USERS, id, speed, placement).await?;
        let best = probe.guest_ports.as_ref().ok().and_then(|guest_ports| guest_ports.first());
        let is_xhci = |guest_port: &GuestPort| {
            let controllers = self.layout.iter().flat_map(|layout| &layout.controllers);
            let mut on_it = controllers.filter(|c| c.bus == guest_port.bus);
            on_it.any(|c| c.kind == ControllerKind::Xhci)
        };
        if best.is_some_and(|guest_port| placement.bus.is_some() || is_xhci(guest_port)) {
            return Ok(probe);
        }
        self.probe_of(ALL, id, speed, placement).await
    }

    /// Probes the controllers in these containers.
    async fn probe_of(
        &mut self,
        containers: &[&'static str],
        id: &DeviceId,
        speed: Option<Speed>,
        placement: &Placement,
    ) -> Result<Probe, qmp::Error> {
        let status = self.ask_status()?;
        let objects = self.ask_objects(containers)?;
        let info = self.ask_info_usb()?;
        let status = self.answer_status(status).await?;
        let objects = self.answer_objects(objects).await?;
        let lines = self.answer_info_usb(info).await?;

        let has_id = |object: &&Object| object.id.as_deref() == Some(id.as_str());
        let present = objects.iter().find(has_id).filter(|object| object.driver == USB_HOST);
        let present = match present {
            Some(object) => Some(self.ask_given(&object.path)?),
            None => None,
        };
        let is_ours = |id: &String| id.parse().is_ok_and(|id: DeviceId| id.port().is_some());
        let mut others = Vec::new();
        for object in &objects {
            let is_other = object.driver == USB_HOST && !object.id.as_ref().is_some_and(is_ours);
            if is_other {
                others.push(self.ask_usb_host(object)?);
            }
        }
        let controllers = self.ask_controllers(&objects)?;
        // The text has only numbers for buses. One device of each bus gives its
        // name.
        let with_id: HashMap<&str, &Object> =
            objects.iter().filter_map(|object| Some((object.id.as_deref()?, object))).collect();
        let mut buses = BTreeMap::new();
        for line in &lines {
            let object = line.id().and_then(|id| with_id.get(id));
            if let (Some(object), false) = (object, buses.contains_key(&line.bus)) {
                buses.insert(line.bus, self.ask(&object.path, "parent_bus")?);
            }
        }

        let present = match present {
            Some(tickets) => self.answer_given(tickets).await?,
            None => None,
        };
        let others = self.answer_usb_hosts(others).await?;
        let controllers = self.answer_controllers(controllers).await?;
        let by_path: HashMap<&str, &str> =
            controllers.iter().map(|c| (c.bus_path.as_str(), c.bus.as_str())).collect();
        let mut names = BTreeMap::new();
        for (number, ticket) in buses {
            if let Some(path) = self.answer_text(ticket).await? {
                names.extend(by_path.get(path.as_str()).map(|bus| (number, (*bus).to_owned())));
            }
        }
        // If there is only one bus and its number is not known, all other lines
        // belong to that bus.
        let only = match controllers.as_slice() {
            [only] if !names.values().any(|name| *name == only.bus) => Some(&only.bus),
            _ => None,
        };
        let guest_port = |line: InfoLine| {
            let bus = names.get(&line.bus).or(only)?.clone();
            Some(GuestPort { bus, port: line.port })
        };
        // The port of a leftover is free for the new device, because the
        // leftover is removed first.
        let stays =
            |line: &InfoLine| present.is_none() || line.product(Some(id.as_str())).is_none();
        let taken: Vec<GuestPort> =
            lines.into_iter().filter(stays).filter_map(guest_port).collect();
        let layout = Layout { controllers, taken, by_id: BTreeMap::new() };
        let guest_ports = layout.guest_ports(speed, placement);
        // A VM that waits for a saved state gets other devices from that state.
        self.layout = (status != Status::Incoming).then_some(layout);
        Ok(Probe { present, others, status, guest_ports })
    }

    fn ask_status(&mut self) -> Result<Ticket<query_status>, qmp::Error> {
        self.session.send(&query_status {})
    }

    async fn answer_status(&mut self, ticket: Ticket<query_status>) -> Result<Status, qmp::Error> {
        match self.answer(ticket).await {
            Ok(Some(info)) if info.status == RunState::inmigrate => Ok(Status::Incoming),
            Ok(Some(info)) if !info.running => Ok(Status::Stopped),
            // A newer QEMU may have a state that this tool does not know.
            Ok(_) | Err(qmp::Error { kind: qmp::ErrorKind::Unexpected { .. }, .. }) => {
                Ok(Status::Running)
            }
            Err(error) => Err(error),
        }
    }

    /// Attaches a device at the first of these ports that QEMU finds free.
    /// Returns `None` if there was no port to try.
    ///
    /// # Errors
    ///
    /// QEMU's refusal, or an error of the session.
    pub async fn attach(
        &mut self,
        attachment: &Attachment<'_>,
        access: &Access<'_>,
        guest_ports: &[GuestPort],
    ) -> Result<Option<GuestPort>, qmp::Error> {
        let mut tries = guest_ports.iter().take(MAX_TRIES).peekable();
        while let Some(guest_port) = tries.next() {
            match self.device_add(attachment, access, guest_port).await {
                Ok(()) => {
                    if let Some(layout) = &mut self.layout {
                        layout.take(attachment.id, guest_port);
                    }
                    return Ok(Some(guest_port.clone()));
                }
                Err(error) if is_duplicate(&error) && self.is_deleted(attachment.id).await? => {
                    debug!(id = %attachment.id, "its id is free now, trying again");
                    self.device_add(attachment, access, guest_port).await?;
                    return Ok(Some(guest_port.clone()));
                }
                Err(error) if tries.peek().is_some() && is_in_use(&error) => {
                    debug!(%guest_port, "in use, trying the next one");
                }
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }

    async fn device_add(
        &mut self,
        attachment: &Attachment<'_>,
        access: &Access<'_>,
        guest_port: &GuestPort,
    ) -> Result<(), qmp::Error> {
        let mut arguments = attachment.options.clone();
        arguments.insert("hostbus".into(), attachment.address.bus.into());
        arguments.insert("hostaddr".into(), attachment.address.device.into());
        arguments.insert("port".into(), guest_port.port.clone().into());
        let fdset_id = self.fdset_id();
        let added = match access {
            Access::Descriptor(descriptor) => {
                arguments.insert("hostdevice".into(), format!("{FDSET}{fdset_id}").into());
                let descriptor = descriptor.try_clone().map_err(|source| {
                    qmp::Error::new(self.session.address(), qmp::ErrorKind::Lost(Some(source)))
                })?;
                let command = add_fd { fdset_id: Some(fdset_id), opaque: None };
                Some(self.session.send_with_descriptor(&command, descriptor)?)
            }
            Access::Node(path) => {
                arguments.insert("hostdevice".into(), path.to_string_lossy().into());
                None
            }
            Access::Address => None,
        };
        let attached = self.session.send(&device_add {
            driver: "usb-host".into(),
            id: Some(attachment.id.to_string()),
            bus: Some(guest_port.bus.clone()),
            arguments,
        })?;
        // The removal is sent before the reply to the addition arrives, so no
        // descriptor stays in the set, even if the attach or this process
        // fails. The device keeps its own copy. (Before QEMU 9.1, the
        // descriptors of a paused VM stay until it runs: monitor/fds.c,
        // `monitor_fdset_cleanup`.)
        let removed = match added {
            Some(_) => Some(self.session.send(&remove_fd { fdset_id, fd: None })?),
            None => None,
        };
        if let Some(added) = added {
            self.session.reply(added).await?;
        }
        let attached = self.session.reply(attached).await;
        // If the session broke, the first error says why. Later replies only
        // repeat that.
        let goes_on = attached.as_ref().map_or_else(|error| error.refusal().is_some(), |_| true);
        if let (Some(removed), true) = (removed, goes_on) {
            self.answer(removed).await?;
        }
        attached.map(|_| ())
    }

    /// Waits until a removed device has released its id. QEMU before 6.0 does
    /// that a moment later, and then sends an event. Returns false if the event
    /// does not arrive in time.
    async fn is_deleted(&mut self, id: &DeviceId) -> Result<bool, qmp::Error> {
        self.session.want_events(DELETED);
        let is_it = |deleted: &Deleted| deleted.device.as_deref() == Some(id.as_str());
        self.session.event(is_it, Instant::now() + UNTIL_DELETED).await
    }

    /// Closes the descriptors of an attach that was interrupted, for example
    /// because its process was killed. A descriptor in the set claims its
    /// device for ever.
    ///
    /// # Errors
    ///
    /// The same errors as [`crate::qemu::qmp::Session::reply`].
    pub async fn drop_descriptors(&mut self) -> Result<(), qmp::Error> {
        let emptied = self.ask_to_drop_descriptors()?;
        // QEMU refuses if there is no such set. That is the usual case.
        self.answer(emptied).await.map(|_| ())
    }

    pub(super) fn ask_to_drop_descriptors(&mut self) -> Result<Ticket<remove_fd>, qmp::Error> {
        let fdset_id = self.fdset_id();
        self.session.send(&remove_fd { fdset_id, fd: None })
    }

    /// Whether QEMU still has descriptors in the set that it was told to empty.
    ///
    /// # Errors
    ///
    /// The same errors as [`crate::qemu::qmp::Session::reply`].
    pub async fn keeps_descriptors(&mut self) -> Result<bool, qmp::Error> {
        let fdset_id = self.fdset_id();
        let asked = self.session.send(&query_fdsets {})?;
        let sets = self.answer(asked).await?.unwrap_or_default();
        Ok(sets.iter().any(|set| set.fdset_id == fdset_id && !set.fds.is_empty()))
    }

    /// The number of the set that descriptors are passed through. QEMU keeps an
    /// emptied set for ever, so each socket always uses the same number,
    /// whatever path leads to it. QEMU opens any descriptor of a set, so two
    /// sockets must not share one.
    fn fdset_id(&self) -> i64 {
        let address = self.session.address();
        let file = address.socket().and_then(|socket| std::fs::metadata(socket).ok());
        // FNV-1a is short, and it gives the same result in every build of this
        // tool.
        let hash = |bytes: &[u8]| {
            let step = |hash: u32, byte: &u8| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193);
            i64::from(bytes.iter().fold(0x811c_9dc5, step) & 0x7fff_ffff)
        };
        match file {
            Some(file) => hash(&[file.dev().to_le_bytes(), file.ino().to_le_bytes()].concat()),
            None => hash(address.to_string().as_bytes()),
        }
    }
}

/// Whether QEMU said that the id is in use, with the text that it had before
/// 6.0 (QEMU, util/qemu-option.c, `qemu_opts_create`).
fn is_duplicate(error: &qmp::Error) -> bool {
    error.refusal().is_some_and(|refusal| {
        refusal.desc.starts_with("Duplicate ID '") && refusal.desc.ends_with("for device")
    })
}

/// Whether QEMU refused the device because of its port or its id. Then the
/// known layout of the VM is out of date. QEMU refuses before it opens the
/// device (QEMU, hw/usb/bus.c, `usb_qdev_realize`).
pub fn is_misplaced(error: &qmp::Error) -> bool {
    let starts = |with: &[&str]| {
        let refusal = error.refusal();
        refusal.is_some_and(|refusal| with.iter().any(|with| refusal.desc.starts_with(with)))
    };
    is_in_use(error) || starts(&["Duplicate ", "Bus '"])
}

/// Whether QEMU said that the port is in use (QEMU, hw/usb/bus.c,
/// `usb_claim_port`). The class is `GenericError`, so only the text can be
/// compared.
fn is_in_use(error: &qmp::Error) -> bool {
    error.refusal().is_some_and(|refusal| refusal.desc.ends_with("not found (in use?)"))
}
