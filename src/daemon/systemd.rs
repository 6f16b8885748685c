//! Tells systemd about the daemon, if systemd started it (sd_notify(3)).

use sd_notify::NotifyState;
use tokio::time::{Interval, interval};
use tracing::warn;

/// The daemon works. `status` is what `systemctl status` shows.
pub fn ready(status: &str) {
    notify(&[NotifyState::Ready, NotifyState::Status(status)]);
}

/// The status has changed.
pub fn status(status: &str) {
    notify(&[NotifyState::Status(status)]);
}

/// The daemon reads its configuration again. [`ready`] follows.
pub fn reloading() {
    let mut states = vec![NotifyState::Reloading];
    states.extend(NotifyState::monotonic_usec_now().ok());
    notify(&states);
}

/// The daemon is ending.
pub fn stopping() {
    notify(&[NotifyState::Stopping]);
}

/// systemd's watchdog. It restarts a daemon that does not report in time.
pub struct Watchdog(Option<Interval>);

impl Watchdog {
    /// The watchdog that the daemon's unit asks for.
    pub fn new() -> Self {
        let limit = sd_notify::watchdog_enabled().filter(|limit| !limit.is_zero());
        Watchdog(limit.map(|limit| interval(limit / 3)))
    }

    /// Waits until it is time to report. If there is no watchdog, it waits for
    /// ever.
    pub async fn due(&mut self) {
        match &mut self.0 {
            Some(interval) => {
                interval.tick().await;
            }
            None => std::future::pending().await,
        }
    }

    /// Reports that the daemon works.
    pub fn report(&self) {
        notify(&[NotifyState::Watchdog]);
    }
}

fn notify(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        warn!("cannot tell systemd: {error}");
    }
}
