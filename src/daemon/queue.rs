//! The queue of a worker: its work, in order.

use std::collections::VecDeque;
use std::future::pending;

use tokio::sync::mpsc::UnboundedReceiver;

use crate::usb::Port;

/// One piece of work for a worker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Work {
    /// The VM's socket appeared, so this may be a new VM.
    Started,
    /// Check all ports.
    Sync,
    /// A device was plugged in at this port.
    Plugged(Port),
    /// Something else happened at this port.
    Port(Port),
}

/// The work that is still to be done, the next piece first.
#[derive(Debug, Default)]
pub struct Queue(VecDeque<Work>);

impl Queue {
    /// Adds work, unless the queue has it already. After a start the whole VM
    /// is checked, so a start replaces all other work.
    pub fn add(&mut self, work: Work) {
        if work == Work::Started {
            self.0.clear();
        }
        if self.is_new(&work) {
            self.0.push_back(work);
        }
    }

    /// Puts back work that is to be tried again.
    pub fn put_back(&mut self, work: Work) {
        if self.is_new(&work) {
            self.0.push_front(work);
        }
    }

    fn is_new(&self, work: &Work) -> bool {
        !self.0.contains(work) && !self.0.contains(&Work::Started)
    }

    /// Returns the next piece of work.
    pub fn next(&mut self) -> Option<Work> {
        self.0.pop_front()
    }

    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Removes all work, because the VM does not run. It is done at the VM's
    /// start.
    pub fn drop_all(&mut self) {
        self.0.retain(|work| *work == Work::Started);
    }

    /// Waits for more work and adds it.
    pub async fn hear(&mut self, inbox: &mut UnboundedReceiver<Work>) {
        match inbox.recv().await {
            Some(work) => self.add(work),
            None => pending().await,
        }
        while let Ok(work) = inbox.try_recv() {
            self.add(work);
        }
    }

    /// Adds the work that arrives, until the VM starts.
    pub async fn hear_until_start(&mut self, inbox: &mut UnboundedReceiver<Work>) {
        while !self.0.contains(&Work::Started) {
            self.hear(inbox).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn queue(work: &[Work]) -> Queue {
        let mut queue = Queue::default();
        work.iter().cloned().for_each(|work| queue.add(work));
        queue
    }

    fn port(port: &str) -> Work {
        Work::Port(port.parse().unwrap())
    }

    #[test]
    fn the_same_work_stands_once_and_in_order() {
        let mut queue = queue(&[port("1-1"), Work::Sync, port("1-2"), port("1-1"), Work::Sync]);
        assert_eq!(queue.0, [port("1-1"), Work::Sync, port("1-2")]);
        queue.put_back(port("1-2"));
        queue.put_back(port("1-3"));
        assert_eq!(queue.0, [port("1-3"), port("1-1"), Work::Sync, port("1-2")]);
    }

    #[test]
    fn a_start_stands_for_everything() {
        let mut queue = queue(&[port("1-1"), Work::Started, Work::Sync, port("1-2")]);
        queue.put_back(port("1-1"));
        assert_eq!(queue.0, [Work::Started]);
    }

    #[test]
    fn work_is_dropped_with_the_vm_but_its_start_is_not() {
        let mut dropped = queue(&[port("1-1"), Work::Sync]);
        dropped.drop_all();
        assert!(dropped.is_empty());
        let mut started = queue(&[Work::Started]);
        started.drop_all();
        assert_eq!(started.next(), Some(Work::Started));
    }
}
