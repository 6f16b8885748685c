//! A worker's work, in order.

use std::collections::VecDeque;
use std::future::pending;

use tokio::sync::mpsc::UnboundedReceiver;

use crate::usb::Port;

/// Something for a worker to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Work {
    /// The VM's socket appeared: this may be a new VM.
    Started,
    /// Look at everything.
    Sync,
    /// A device was plugged in at this port.
    Plugged(Port),
    /// Something else happened at this port.
    Port(Port),
}

/// What is to be done, the next thing first.
#[derive(Debug, Default)]
pub struct Queue(VecDeque<Work>);

impl Queue {
    /// Adds work, unless it is there already. A start is looked at as a whole,
    /// so nothing else is left to do besides.
    pub fn add(&mut self, work: Work) {
        if work == Work::Started {
            self.0.clear();
        }
        if self.is_new(&work) {
            self.0.push_back(work);
        }
    }

    /// Puts work back that is to be tried again.
    pub fn put_back(&mut self, work: Work) {
        if self.is_new(&work) {
            self.0.push_front(work);
        }
    }

    fn is_new(&self, work: &Work) -> bool {
        !self.0.contains(work) && !self.0.contains(&Work::Started)
    }

    /// The next thing to do.
    pub fn next(&mut self) -> Option<Work> {
        self.0.pop_front()
    }

    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The VM is not there: whatever there is to do is done at its start.
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

    /// Adds what comes, until a VM starts.
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
