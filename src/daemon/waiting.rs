//! The devices that a VM waits for, and why. A device waits here if it was
//! refused for a reason that can pass, and it is tried again when the reason
//! has passed. If the kernel reports that, the daemon waits for the report.
//! Otherwise the daemon checks again from time to time, as long as a device
//! waits.

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

/// The kernel's sign arrives a moment before the change itself.
const MOMENT: Duration = Duration::from_millis(100);

/// How long to wait before checking again when nothing reports the change: the
/// first time, and at most. Each check of a VM uses its monitor for a moment.
/// Nobody should wait longer than two seconds for a device that can be attached.
const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_millis(1500));

/// How long to wait before checking again when the kernel reports most changes.
const MOSTLY: Duration = Duration::from_secs(30);

/// The devices that wait for a VM, by port.
#[derive(Debug, Default)]
pub struct Waiting(BTreeMap<Port, Waiter>);

/// A device that waits.
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

    /// Makes a device wait until the reason for its refusal has passed. Then
    /// the worker gets its port.
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
            let end = wait.until_it_may_go_well().await;
            debug!(%port, "trying again: {}", end.as_text());
            let _ = worker.send(Work::Port(port));
        };
        let waiter = Waiter { device, until, refusals, task: spawn_local(task) };
        self.0.insert(port, waiter);
    }

    /// Removes the device at a port: it does not wait any more.
    pub fn remove(&mut self, port: &Port) {
        self.0.remove(port);
    }

    /// Keeps only these ports waiting.
    pub fn retain(&mut self, keep: impl Fn(&Port) -> bool) {
        self.0.retain(|port, _| keep(port));
    }
}

/// The facts that a waiting task needs.
struct Wait {
    shared: Rc<Shared>,
    device: Device,
    until: Until,
    refusals: u32,
}

/// What ended a wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// The kernel reported a change.
    Reported,
    /// Nothing was reported, and it was time to check.
    Time,
}

impl End {
    fn as_text(self) -> &'static str {
        match self {
            End::Reported => "the kernel reported a change",
            End::Time => "it is time to check",
        }
    }
}

impl Wait {
    async fn until_it_may_go_well(&self) -> End {
        // Events that arrive after this line may end the wait.
        let mut changes = self.shared.usb_changes();
        let (host, port) = (&self.shared.host, &self.device.port);
        let signs = match self.until {
            Until::DisksFree(_) => Signs::of_disks(host, port),
            Until::LetGo => Signs::of_node(host, self.device.address),
            Until::Authorized => Ok(Signs::default()),
            Until::Started => return self.until_started().await,
            Until::Untold => {
                // A device that left the VM may have freed a port.
                let end = match timeout(self.pause(), changes.changed()).await {
                    Ok(_) => End::Reported,
                    Err(_) => End::Time,
                };
                sleep(MOMENT).await;
                return end;
            }
        };
        let Ok(signs) = signs else { return self.a_while().await };
        sleep(MOMENT).await;
        if self.refusals > 0 && !self.is_seen().await {
            // The host does not show why the attach was refused again.
            return self.a_while().await;
        }
        let at_most = match self.until {
            Until::DisksFree(Told::Never) => RETRY.0,
            Until::DisksFree(Told::Mostly) | Until::LetGo => MOSTLY,
            _ => Duration::MAX,
        };
        // The change may have happened before the first check.
        let mut end = End::Reported;
        while self.is_seen().await {
            end = tokio::select! {
                () = signs.next() => End::Reported,
                Ok(()) = changes.changed() => End::Reported,
                () = sleep(at_most) => End::Time,
            };
            sleep(MOMENT).await;
        }
        end
    }

    /// Waits on a thread until the drivers have started. The kernel makes a
    /// reader wait for that.
    async fn until_started(&self) -> End {
        let (host, port) = (self.shared.host.clone(), self.device.port.clone());
        if self.refusals > 0 {
            sleep(self.pause()).await;
        }
        match blocking(move || host.wait_for_drivers(&port)).await {
            Ok(()) => End::Reported,
            Err(_) => self.a_while().await,
        }
    }

    /// Waits until it is time to check again.
    async fn a_while(&self) -> End {
        sleep(self.pause()).await;
        End::Time
    }

    /// Whether the host shows that the reason still exists. The check disturbs
    /// no process.
    async fn is_seen(&self) -> bool {
        let (host, device, until) = (self.shared.host.clone(), self.device.clone(), self.until);
        // A check of all processes takes a while.
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
