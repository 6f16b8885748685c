//! Shows on a terminal what a person waits for. The line is on standard error.
//! It is overwritten in place and erased at the end.

use std::io::{IsTerminal, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::time::{Instant, interval_at};

use crate::text::fit;

/// Work that takes less time is not shown.
const PATIENCE: Duration = Duration::from_millis(500);

/// Moves to the beginning of the line and erases it (ECMA-48, Erase in Line).
const ERASE: &str = "\r\x1b[K";

/// Whether a line is shown that other writers to standard error must erase
/// first.
static SHOWN: AtomicBool = AtomicBool::new(false);

/// The text to write before another kind of line. It erases the line that is
/// shown now, and the next [`Progress::show`] shows that again.
pub fn make_way() -> &'static str {
    if SHOWN.swap(false, Ordering::Relaxed) { ERASE } else { "" }
}

/// Does the work. If it takes longer than half a second, a line shows what it
/// waits for and for how long.
pub async fn during<T>(quiet: bool, what: impl Fn() -> String, work: impl Future<Output = T>) -> T {
    let progress = Progress::new(quiet);
    let mut work = std::pin::pin!(work);
    let start = Instant::now();
    let mut tick = interval_at(start + PATIENCE, PATIENCE);
    loop {
        tokio::select! {
            biased;
            done = &mut work => return done,
            _ = tick.tick(), if progress.is_seen() => match start.elapsed().as_secs() {
                0 => progress.show(&format!("{} ...", what())),
                seconds => progress.show(&format!("{} ... {seconds} s", what())),
            },
        }
    }
}

/// The progress line. It is erased when this value is dropped.
#[derive(Debug)]
pub struct Progress {
    seen: bool,
}

impl Progress {
    /// Creates a line. It is visible only on a terminal that can erase it.
    pub fn new(quiet: bool) -> Self {
        let dumb = std::env::var_os("TERM").is_none_or(|term| term.is_empty() || term == "dumb");
        Progress { seen: !quiet && !dumb && std::io::stderr().is_terminal() }
    }

    /// Whether the line is visible.
    pub fn is_seen(&self) -> bool {
        self.seen
    }

    /// Replaces the text of the line. The text must be escaped already.
    pub fn show(&self, text: &str) {
        if self.seen {
            let size = rustix::termios::tcgetwinsize(std::io::stderr()).ok();
            let columns = size.map(|size| usize::from(size.ws_col)).filter(|columns| *columns > 0);
            // A full line would wrap, and a wrapped line cannot be erased.
            write(&format!("{ERASE}{}", fit(text, columns.unwrap_or(80).saturating_sub(1))));
            SHOWN.store(true, Ordering::Relaxed);
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        write(make_way());
    }
}

fn write(text: &str) {
    // If this fails, there is no other place to report it to.
    let mut error = std::io::stderr().lock();
    let _ = error.write_all(text.as_bytes()).and_then(|()| error.flush());
}
