//! One QEMU: its process, and what is known about it while the process lives.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::task::{Context, Poll, ready};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use tokio::io::unix::AsyncFd;

use crate::host::readable::readable;
use crate::qemu::Layout;
use crate::reconcile::Handled;
use crate::usb::{Address, Port};

/// A QEMU that answered.
#[derive(Debug, Default)]
pub struct Qemu {
    pid: Option<i32>,
    /// Reports the end of the process (pidfd_open(2)).
    end: Option<AsyncFd<OwnedFd>>,
    /// The devices that were attached since it started.
    pub handled: Handled,
    /// Its controllers and ports after the last conversation with it.
    pub layout: Option<Layout>,
    /// The devices that it has under an id of this tool, as it says itself.
    pub attached: BTreeMap<Port, Address>,
    /// The devices that this daemon attached, or that belong to this VM by the
    /// rules, whatever QEMU says of them. Only these go back to the host's
    /// drivers when it ends.
    pub given: BTreeMap<Port, Address>,
}

impl Qemu {
    /// A QEMU of which only the process is known, if the process can be seen.
    pub fn new(pid: Option<i32>) -> Self {
        let process = pid.and_then(Pid::from_raw);
        let end = process.and_then(|pid| pidfd_open(pid, PidfdFlags::NONBLOCK).ok());
        Qemu { pid, end: end.and_then(|end| readable(end).ok()), ..Qemu::default() }
    }

    /// Whether a connection to this process is a connection to this QEMU. The
    /// kernel uses process ids again, so the same number alone is not enough.
    pub fn is_process(&self, pid: Option<i32>) -> bool {
        self.pid == pid && !self.has_ended()
    }

    /// Whether the kernel will report its end.
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

    /// Ready when it has ended. Never ready if its end is not reported.
    pub fn poll_end(&self, context: &mut Context<'_>) -> Poll<()> {
        let Some(end) = &self.end else { return Poll::Pending };
        match ready!(end.poll_read_ready(context)) {
            Ok(_) => Poll::Ready(()),
            // An error does not mean that the process ended.
            Err(_) => Poll::Pending,
        }
    }
}
