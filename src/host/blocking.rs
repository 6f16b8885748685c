//! Runs work on its own thread if it may wait for hardware. The kernel decides
//! how long such work takes.

use std::io;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::{Instant, timeout_at};

use super::{Error, Host};

/// Runs the work on a new thread that ends with it. A caller that does not want
/// to wait any more drops the future, and the thread goes on. (tokio's own
/// threads end the program if the system cannot start a thread.)
///
/// # Errors
///
/// When no thread can be started, or the work panicked.
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<T> {
    start(work)?.await.map_err(|_| io::Error::other("its thread panicked"))
}

/// Runs the work for each item on its own thread. The result is `None` if it
/// takes longer than the limit.
///
/// # Errors
///
/// When no thread can be started.
pub async fn blocking_each<T: Send + 'static, R: Send + 'static>(
    things: impl IntoIterator<Item = T>,
    limit: Duration,
    work: impl Fn(T) -> R + Clone + Send + 'static,
) -> io::Result<Vec<Option<R>>> {
    let end = Instant::now() + limit;
    let begin = |thing| {
        let work = work.clone();
        start(move || work(thing))
    };
    let running = things.into_iter().map(begin).collect::<io::Result<Vec<_>>>()?;
    let mut results = Vec::new();
    for thread in running {
        results.push(timeout_at(end, thread).await.ok().and_then(Result::ok));
    }
    Ok(results)
}

/// Drops a value on its own thread, because the kernel may make a close wait.
/// The close of a device's node waits while another process resets the device
/// (Linux, drivers/usb/core/devio.c, `usbdev_release`). The close of a disk
/// sends a command to it (Linux, drivers/scsi/sd.c, `sd_release`). If no thread
/// can be started, the value is dropped on this one.
pub fn blocking_drop<T: Send + 'static>(value: T) {
    // A closure that could not be started is dropped, and the value with it.
    let _ = thread::Builder::new().spawn(move || drop(value));
}

impl Host {
    /// Runs the work for each item on its own thread, and waits for all of them
    /// for a fifth of the caller's time at most (see [`Host::within`]). The
    /// result is `None` if it takes longer. This is for a caller that shows or
    /// looks for devices, and can continue without those that are starting.
    ///
    /// # Errors
    ///
    /// [`Error::Thread`].
    pub fn in_haste<T: Send + 'static, R: Send + 'static>(
        &self,
        things: impl IntoIterator<Item = T>,
        work: impl Fn(T) -> R + Clone + Send + 'static,
    ) -> Result<Vec<Option<R>>, Error> {
        let begin = |thing| {
            let (work, (sender, result)) = (work.clone(), mpsc::channel());
            let start = thread::Builder::new().spawn(move || {
                // The receiver may have stopped waiting.
                let _ = sender.send(work(thing));
            });
            start.map(|_| result).map_err(Error::Thread)
        };
        let running = things.into_iter().map(begin).collect::<Result<Vec<_>, _>>()?;
        let end = std::time::Instant::now() + self.haste;
        let result = |thread: mpsc::Receiver<R>| {
            let left = end.saturating_duration_since(std::time::Instant::now());
            thread.recv_timeout(left).ok()
        };
        Ok(running.into_iter().map(result).collect())
    }

    /// Like [`Host::in_haste`], but the result is the default if it takes
    /// longer, or if a thread cannot be started.
    pub fn in_haste_or_default<T: Send + 'static, R: Default + Send + 'static>(
        &self,
        things: Vec<T>,
        work: impl Fn(T) -> R + Clone + Send + 'static,
    ) -> Vec<R> {
        let count = things.len();
        let results = self.in_haste(things, work).unwrap_or_default();
        let mut results: Vec<R> = results.into_iter().map(Option::unwrap_or_default).collect();
        results.resize_with(count, R::default);
        results
    }
}

fn start<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<oneshot::Receiver<T>> {
    let (sender, result) = oneshot::channel();
    thread::Builder::new().spawn(move || {
        // The receiver may have stopped waiting.
        let _ = sender.send(work());
    })?;
    Ok(result)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_work_is_done_elsewhere_and_its_result_comes_back() {
        let here = thread::current().id();
        let there = blocking(|| thread::current().id()).await.unwrap();
        assert_ne!(here, there);
    }

    #[test]
    fn a_close_that_waits_delays_nobody() {
        struct Waits(mpsc::Receiver<()>, mpsc::Sender<thread::ThreadId>);
        impl Drop for Waits {
            fn drop(&mut self) {
                let _ = self.0.recv();
                let _ = self.1.send(thread::current().id());
            }
        }
        let (end, until) = mpsc::channel();
        let (sender, dropped_on) = mpsc::channel();
        blocking_drop(Waits(until, sender));
        end.send(()).unwrap();
        assert_ne!(dropped_on.recv().unwrap(), thread::current().id());
    }

    #[tokio::test]
    async fn a_panic_is_an_error() {
        assert!(blocking(|| panic!("on purpose")).await.is_err());
    }

    #[tokio::test]
    async fn one_that_takes_too_long_delays_no_other() {
        let (_never, forever) = std::sync::mpsc::channel::<()>();
        let forever = std::sync::Arc::new(std::sync::Mutex::new(forever));
        let work = move |number: u8| {
            if number == 2 {
                // The first thread waits here, and the second one for the lock.
                let _ = forever.lock().map(|forever| forever.recv());
            }
            number
        };
        let limit = Duration::from_secs(1);
        let results = blocking_each([1, 2, 3], limit, work.clone()).await.unwrap();
        assert_eq!(results, [Some(1), None, Some(3)]);
        let results = Host::default().within(5 * limit).in_haste([1, 2, 3], work).unwrap();
        assert_eq!(results, [Some(1), None, Some(3)]);
    }
}
