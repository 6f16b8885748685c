//! Finds the VM of a device when the rules cannot tell it at once. Rules may
//! ask for the serial number or a property. While drivers start for a device,
//! the kernel makes a reader of those wait. So a thread reads them, and the
//! daemon does not wait.

use std::collections::BTreeMap;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::spawn_local;
use tokio::time::{sleep, timeout};
use tracing::{info, warn};

use super::shared::Shared;
use crate::host::blocking;
use crate::policy::{HostDevice, Policy, Reading, Table};
use crate::usb::{Address, Device, Port};

/// How long to wait before asking again when the system could not start a
/// thread.
const PAUSE: Duration = Duration::from_secs(2);

/// The devices whose VM a thread is finding out.
#[derive(Debug, Default)]
pub struct Asked(BTreeMap<Port, Asking>);

#[derive(Debug)]
struct Asking {
    device: Device,
    /// Whether the answer takes longer than a conversation may.
    is_late: bool,
    /// Whether there is more to read since the thread began.
    is_old: bool,
}

impl Shared {
    /// Puts a whole table in force.
    pub fn replace_table(self: &Rc<Self>, table: Table) {
        let unclear = table.values().filter(|seen| !seen.is_clear);
        let unclear: Vec<Device> = unclear.map(|seen| seen.device.clone()).collect();
        *self.table.borrow_mut() = table;
        unclear.into_iter().for_each(|device| self.ask(device));
    }

    /// Records a device that was plugged in, and returns where it belongs.
    pub fn plugged(self: &Rc<Self>, device: Device) -> HostDevice {
        let seen = self.policy().seen(&self.host, device.clone(), Reading::AtOnce);
        self.table.borrow_mut().insert(device.port.clone(), seen.clone());
        if !seen.is_clear {
            self.ask(device);
        }
        seen
    }

    /// Finds out where a device belongs, after udev has written about it.
    pub fn ask_again(self: &Rc<Self>, address: Address) {
        let device = {
            let table = self.table.borrow();
            let unclear = |seen: &&HostDevice| seen.device.address == address && !seen.is_clear;
            table.values().find(unclear).map(|seen| seen.device.clone())
        };
        if let Some(device) = device {
            self.ask(device);
        }
    }

    /// Finds out where a device belongs.
    fn ask(self: &Rc<Self>, device: Device) {
        let asking = Asking { device: device.clone(), is_late: false, is_old: false };
        let before = self.asked.borrow_mut().0.insert(device.port.clone(), asking);
        // A thread already reads this. If that is not enough, it reads again.
        match before {
            Some(before) if before.device == device => {
                let before = Asking { is_old: true, ..before };
                self.asked.borrow_mut().0.insert(device.port.clone(), before);
            }
            _ => drop(spawn_local(answer(self.clone(), device))),
        }
    }

    /// How many devices have not been read in time.
    pub fn late(&self) -> usize {
        let asked = self.asked.borrow();
        let late =
            asked.0.values().filter(|asking| asking.is_late && self.is_unclear(&asking.device));
        late.count()
    }

    fn is_unclear(&self, device: &Device) -> bool {
        let table = self.table.borrow();
        table.get(&device.port).is_some_and(|seen| seen.device == *device && !seen.is_clear)
    }

    /// Whether the answer about a device is still of interest.
    fn is_asked(&self, device: &Device) -> bool {
        let asked = self.asked.borrow();
        let is_asked = asked.0.get(&device.port).is_some_and(|asking| asking.device == *device);
        is_asked && self.is_unclear(device)
    }

    /// Logs that the answer takes long.
    fn is_late(&self, device: &Device) {
        if !self.is_asked(device) {
            return;
        }
        info!(
            port = %device.port,
            "{device} is starting: its drivers are not done, and a rule asks what cannot be read \
             before that; waiting"
        );
        if let Some(asking) = self.asked.borrow_mut().0.get_mut(&device.port) {
            asking.is_late = true;
        }
        self.changed.notify_one();
    }

    /// Records an answer. Returns false if it does not count: the rules that
    /// asked have been replaced, or there is more to read by now.
    fn answered(&self, policy: &Arc<Policy>, seen: HostDevice) -> bool {
        let (port, is_asked) = (seen.device.port.clone(), self.is_asked(&seen.device));
        if is_asked && !Arc::ptr_eq(policy, &self.policy()) {
            return false;
        }
        let mut asked = self.asked.borrow_mut();
        if let Some(asking) = asked.0.get_mut(&port).filter(|_| is_asked && !seen.is_clear) {
            if std::mem::take(&mut asking.is_old) {
                return false;
            }
        }
        if asked.0.get(&port).is_some_and(|asking| asking.device == seen.device) {
            asked.0.remove(&port);
        }
        if is_asked {
            self.table.borrow_mut().insert(port.clone(), seen);
            self.placed.borrow_mut().push(port);
        }
        self.changed.notify_one();
        true
    }
}

/// Reads what the rules ask about a device, for as long as the kernel needs.
async fn answer(shared: Rc<Shared>, device: Device) {
    loop {
        let policy = shared.policy();
        let read = {
            let (host, policy, device) = (shared.host.clone(), policy.clone(), device.clone());
            move || policy.seen(&host, device, Reading::Patient)
        };
        let mut reading = pin!(blocking(read));
        let seen = match timeout(shared.timeout, &mut reading).await {
            Ok(seen) => seen,
            Err(_) => {
                shared.is_late(&device);
                reading.await
            }
        };
        match seen {
            Ok(seen) => {
                if shared.answered(&policy, seen) {
                    return;
                }
            }
            Err(error) => {
                let port = &device.port;
                warn!(%port, "cannot ask {device} what it is, trying again: {error}");
                sleep(PAUSE).await;
            }
        }
    }
}
