//! What a VM waits for, and why: everything that was refused for a reason that
//! can pass. It is done when the reason has passed. Where the kernel tells of
//! that, nobody looks before; else somebody looks now and then, for as long as
//! something waits.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use tokio::sync::mpsc::UnboundedSender;
use tokio::task::{JoinHandle, spawn_local};
use tokio::time::{sleep, timeout};
use tracing::debug;

use super::queue::Work;
use super::shared::Shared;
use crate::error::Until;
use crate::host::{CLAIMED, Host, Signs, Told, blocking};
use crate::usb::{Device, Port};

/// A sign comes a moment before what it stands for.
const MOMENT: Duration = Duration::from_millis(100);

/// How long to wait before looking again where nothing tells, at first and at
/// most. Each look at a VM takes its monitor for a moment.
const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(8));

/// How long to wait before looking again where the kernel tells as a rule.
const MOSTLY: Duration = Duration::from_secs(30);

/// The devices that wait for a VM, by port.
#[derive(Debug, Default)]
pub struct Waiting(BTreeMap<Port, Waiter>);

/// One that waits.
#[derive(Debug)]
struct Waiter {
    device: Device,
    until: Until,
    /// How often it was refused for this reason.
    refusals: u32,
    task: JoinHandle<()>,
}

impl Drop for Waiter {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Waiting {
    /// The ports whose devices wait.
    pub fn ports(&self) -> impl Iterator<Item = &Port> {
        self.0.keys()
    }

    /// Has a device wait until its refusal has passed. Its port is then given
    /// to the worker.
    pub fn add(
        &mut self,
        shared: &Rc<Shared>,
        device: Device,
        until: Until,
        worker: UnboundedSender<Work>,
    ) {
        let port = device.port.clone();
        let is_same = |before: &Waiter| before.device == device && before.until == until;
        let before = self.0.remove(&port).filter(is_same);
        let refusals = before.map_or(0, |before| before.refusals.saturating_add(1));
        let wait = Wait { shared: shared.clone(), device: device.clone(), until, refusals };
        let task = async move {
            let port = wait.device.port.clone();
            wait.until_it_may_go_well().await;
            debug!(%port, "trying again");
            let _ = worker.send(Work::Port(port));
        };
        let waiter = Waiter { device, until, refusals, task: spawn_local(task) };
        self.0.insert(port, waiter);
    }

    /// The device at a port waits no more.
    pub fn remove(&mut self, port: &Port) {
        self.0.remove(port);
    }

    /// Only these go on waiting.
    pub fn retain(&mut self, keep: impl Fn(&Port) -> bool) {
        self.0.retain(|port, _| keep(port));
    }
}

/// What a waiter needs to know.
struct Wait {
    shared: Rc<Shared>,
    device: Device,
    until: Until,
    refusals: u32,
}

impl Wait {
    async fn until_it_may_go_well(&self) {
        // Events from here on may end the wait.
        let mut changes = self.shared.usb_changes();
        let (host, port) = (&self.shared.host, &self.device.port);
        let signs = match self.until {
            Until::DisksFree(_) => Signs::of_disks(host, port),
            Until::LetGo => Signs::of_node(host, self.device.address),
            Until::Authorized => Ok(Signs::default()),
            Until::Started => return self.until_started().await,
            Until::Untold => {
                // A device that left the VM may have freed a port.
                let _ = timeout(self.pause(), changes.changed()).await;
                return sleep(MOMENT).await;
            }
        };
        let Ok(signs) = signs else { return sleep(self.pause()).await };
        sleep(MOMENT).await;
        if self.refusals > 0 && !self.is_seen().await {
            // The host does not show why it was refused again.
            return sleep(self.pause()).await;
        }
        let at_most = match self.until {
            Until::DisksFree(Told::Never) => RETRY.0,
            Until::DisksFree(Told::Mostly) | Until::LetGo => MOSTLY,
            _ => Duration::MAX,
        };
        while self.is_seen().await {
            tokio::select! {
                () = signs.next() => {}
                Ok(()) = changes.changed() => {}
                () = sleep(at_most) => {}
            }
            sleep(MOMENT).await;
        }
    }

    /// A thread waits for the drivers, as the kernel lets it.
    async fn until_started(&self) {
        let (host, port) = (self.shared.host.clone(), self.device.port.clone());
        if self.refusals > 0 {
            sleep(self.pause()).await;
        }
        if blocking(move || host.wait_for_drivers(&port)).await.is_err() {
            sleep(self.pause()).await;
        }
    }

    /// Whether the host shows that the reason is there still, without
    /// disturbing anybody.
    async fn is_seen(&self) -> bool {
        let (host, device, until) = (self.shared.host.clone(), self.device.clone(), self.until);
        // Who looks at all processes takes a while.
        blocking(move || is_seen(&host, &device, until)).await.unwrap_or(false)
    }

    fn pause(&self) -> Duration {
        RETRY.1.min(RETRY.0.saturating_mul(1 << self.refusals.min(8)))
    }
}

fn is_seen(host: &Host, device: &Device, until: Until) -> bool {
    let port = &device.port;
    match until {
        Until::DisksFree(_) => !host.uses(port).is_empty(),
        Until::LetGo => {
            host.is_locked(device.address) == Some(true)
                || host.drivers(port).iter().any(|driver| driver == CLAIMED)
        }
        Until::Authorized => !host.is_authorized(port),
        Until::Started | Until::Untold => false,
    }
}
