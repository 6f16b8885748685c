//! Waiting for conditions, never for a fixed time.

use std::thread;
use std::time::{Duration, Instant};

/// How long anything may take. Emulation inside emulation is slow, and the real machine may be busy.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// How soon it is looked again at first.
const SHORTLY: Duration = Duration::from_millis(10);

/// The first `Some` that `condition` gives, or a panic that says `what` did not happen.
pub fn wait_for<T>(what: &str, condition: impl FnMut() -> Option<T>) -> T {
    wait_at_most(PATIENCE, what, condition)
}

pub fn wait_at_most<T>(
    patience: Duration,
    what: &str,
    mut condition: impl FnMut() -> Option<T>,
) -> T {
    let start = Instant::now();
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(start.elapsed() < patience, "not within {patience:?}: {what}");
        // Each look costs the one processor two switches, which are slow under emulation: fewer, the longer it takes.
        thread::sleep((start.elapsed() / 16).clamp(SHORTLY, 5 * SHORTLY));
    }
}

/// Waits until `condition` holds.
pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    wait_for(what, || condition().then_some(()));
}
