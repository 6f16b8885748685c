//! Work on a thread of its own: what may wait for hardware, for as long as the
//! kernel does.

use std::io;
use std::thread;

use tokio::sync::oneshot;

/// Does the work on a thread, which ends with it. Whoever does not want to wait
/// any more drops the future; the thread goes on. (tokio's own threads end the
/// program where the system has no thread to give.)
///
/// # Errors
///
/// When there is no thread to be had, or the work panicked.
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<T> {
    let (sender, result) = oneshot::channel();
    thread::Builder::new().spawn(move || {
        // Nobody may be waiting any more.
        let _ = sender.send(work());
    })?;
    result.await.map_err(|_| io::Error::other("its thread panicked"))
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

    #[tokio::test]
    async fn a_panic_is_an_error() {
        assert!(blocking(|| panic!("on purpose")).await.is_err());
    }
}
