//! One QEMU: its process, and what is known of it as long as that lives.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::task::{Context, Poll, ready};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use tokio::io::unix::AsyncFd;
use tracing::warn;

use crate::host::readable::readable;
use crate::host::{Host, Node, blocking};
use crate::qemu::Layout;
use crate::reconcile::Handled;
use crate::usb::{Address, Port};

/// A QEMU that answered.
#[derive(Debug, Default)]
pub struct Qemu {
    pid: Option<i32>,
    /// Tells of the process's end (pidfd_open(2)).
    end: Option<AsyncFd<OwnedFd>>,
    /// What was attached since it started.
    pub handled: Handled,
    /// Its controllers and ports, as the last conversation with it left them.
    pub layout: Option<Layout>,
    /// What it has of ours, as it says itself.
    pub attached: BTreeMap<Port, Address>,
    /// What was given to it, whatever it says: by this daemon, or by its rules.
    /// Only that goes back to the host's drivers when it ends.
    pub given: BTreeMap<Port, Address>,
}

impl Qemu {
    /// A QEMU that nothing is known of but its process, if that can be seen.
    pub fn new(pid: Option<i32>) -> Self {
        let process = pid.and_then(Pid::from_raw);
        let end = process.and_then(|pid| pidfd_open(pid, PidfdFlags::NONBLOCK).ok());
        Qemu { pid, end: end.and_then(|end| readable(end).ok()), ..Qemu::default() }
    }

    /// Whether a connection to this process is one to this QEMU. Process ids
    /// come round again.
    pub fn is_process(&self, pid: Option<i32>) -> bool {
        self.pid == pid && !self.has_ended()
    }

    /// Whether its end is told.
    pub fn is_watched(&self) -> bool {
        self.end.is_some()
    }

    /// Whether it is known to have ended.
    pub fn has_ended(&self) -> bool {
        let ended = |end: &AsyncFd<OwnedFd>| {
            let mut end = [PollFd::new(end, PollFlags::IN)];
            poll(&mut end, Some(&Timespec::default())).is_ok_and(|count| count > 0)
        };
        self.end.as_ref().is_some_and(ended)
    }

    /// Ready when it has ended; never, if that is not told.
    pub fn poll_end(&self, context: &mut Context<'_>) -> Poll<()> {
        let Some(end) = &self.end else { return Poll::Pending };
        match ready!(end.poll_read_ready(context)) {
            Ok(_) => Poll::Ready(()),
            // An error does not mean that the process ended.
            Err(_) => Poll::Pending,
        }
    }

    /// Gives what it was given back to the host's drivers. What another process
    /// holds by now, or still, is left alone. This may wait for the hardware.
    pub async fn give_back(self, host: &Host) {
        if self.given.is_empty() {
            return;
        }
        let host = host.clone();
        let give_back = move || {
            for (port, address) in self.given {
                let is_there = matches!(host.device(&port), Ok(Some(d)) if d.address == address);
                if is_there && matches!(host.open(address), Ok(Node::Ours(_))) {
                    host.probe_drivers(&port);
                }
            }
        };
        if let Err(error) = blocking(give_back).await {
            warn!("cannot give devices back to the host's drivers: {error}; plug them in again");
        }
    }
}
