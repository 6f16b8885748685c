//! Stands in for journald or syslogd and keeps what is logged.

use crate::wait::wait_for;
use std::fs;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread;

pub struct Journal {
    entries: Arc<Mutex<Vec<String>>>,
}

impl Journal {
    /// Listens where journald does: each entry is its `FIELD=value` lines.
    pub fn journald() -> Journal {
        Journal::listen(Path::new("/run/systemd/journal/socket"))
    }

    /// Listens where syslogd does; there is no journald then.
    pub fn syslogd() -> Journal {
        Journal::listen(Path::new("/dev/log"))
    }

    fn listen(path: &Path) -> Journal {
        forget();
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let socket = UnixDatagram::bind(path).expect("the journal's socket");
        let entries = Arc::new(Mutex::new(Vec::new()));
        let journal = Journal { entries: Arc::clone(&entries) };
        thread::spawn(move || {
            let mut buffer = vec![0; 1 << 16];
            while let Ok(length) = socket.recv(&mut buffer) {
                entries
                    .lock()
                    .unwrap()
                    .push(String::from_utf8_lossy(&buffer[..length]).into_owned());
            }
        });
        journal
    }

    pub fn entries(&self) -> Vec<String> {
        self.entries.lock().unwrap().clone()
    }

    /// The first entry that contains all of `parts`, once it is there.
    pub fn wait_for(&self, parts: &[&str]) -> String {
        wait_for(&format!("a log entry with {parts:?}"), || {
            self.entries().into_iter().find(|entry| parts.iter().all(|part| entry.contains(part)))
        })
    }
}

/// Removes the sockets that an earlier test has left.
pub fn forget() {
    for path in ["/run/systemd/journal/socket", "/dev/log"] {
        let _ = fs::remove_file(path);
    }
}
