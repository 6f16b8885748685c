//! A line that says what a person waits for: on a terminal's standard error,
//! written over in place, and gone when it is over.

use std::io::{IsTerminal, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::time::{Instant, interval_at};

use crate::text::fit;

/// What takes less is not worth a line.
const PATIENCE: Duration = Duration::from_millis(500);

/// Goes back to the line's beginning and erases it (ECMA-48, Erase in Line).
const ERASE: &str = "\r\x1b[K";

/// Whether there is a line that others who write to standard error must erase.
static SHOWN: AtomicBool = AtomicBool::new(false);

/// What to write before a line of another kind: it takes the place of one that
/// is shown now, and the next [`Progress::show`] brings that back.
pub fn make_way() -> &'static str {
    if SHOWN.swap(false, Ordering::Relaxed) { ERASE } else { "" }
}

/// Does the work. If it takes longer than half a second, a line says what is
/// waited for, and for how long.
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

/// The line; it goes away with this.
#[derive(Debug)]
pub struct Progress {
    seen: bool,
}

impl Progress {
    /// A line that is seen only on a terminal that can erase it.
    pub fn new(quiet: bool) -> Self {
        let dumb = std::env::var_os("TERM").is_none_or(|term| term.is_empty() || term == "dumb");
        Progress { seen: !quiet && !dumb && std::io::stderr().is_terminal() }
    }

    /// Whether anybody sees it.
    pub fn is_seen(&self) -> bool {
        self.seen
    }

    /// Shows the text, which must be escaped already, in place of the last.
    pub fn show(&self, text: &str) {
        if self.seen {
            let size = rustix::termios::tcgetwinsize(std::io::stderr()).ok();
            let columns = size.map(|size| usize::from(size.ws_col)).filter(|columns| *columns > 0);
            // A line that is full wraps, and then it cannot be erased.
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
