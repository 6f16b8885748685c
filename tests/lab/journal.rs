//! Stands in for journald or syslogd and keeps what the program under test logs.

use crate::wait::wait_for;
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread;

pub struct Journal {
    entries: Arc<Mutex<Vec<Entry>>>,
}

/// What was logged: journald's fields, or syslog's one line as `MESSAGE`.
pub type Entry = BTreeMap<String, String>;

impl Journal {
    /// Listens where journald does.
    pub fn journald() -> Journal {
        Journal::listen(Path::new("/run/systemd/journal/socket"), fields)
    }

    /// Listens where syslogd does; there is no journald then.
    pub fn syslogd() -> Journal {
        Journal::listen(Path::new("/dev/log"), |line| {
            [("MESSAGE".to_owned(), String::from_utf8_lossy(line).into_owned())].into()
        })
    }

    fn listen(path: &Path, parse: fn(&[u8]) -> Entry) -> Journal {
        forget();
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let socket = UnixDatagram::bind(path).expect("the journal's socket");
        let entries = Arc::new(Mutex::new(Vec::new()));
        let journal = Journal { entries: Arc::clone(&entries) };
        thread::spawn(move || {
            let mut buffer = vec![0; 1 << 16];
            while let Ok(length) = socket.recv(&mut buffer) {
                let entry = parse(&buffer[..length]);
                // Programs look whether there is a journal by sending it nothing, and udevd logs as well.
                let name = entry.get("SYSLOG_IDENTIFIER").or(entry.get("MESSAGE"));
                if name.is_some_and(|name| name.contains("usb-qmp-hotplug")) {
                    entries.lock().unwrap().push(entry);
                }
            }
        });
        journal
    }

    pub fn entries(&self) -> Vec<Entry> {
        self.entries.lock().unwrap().clone()
    }

    /// The first entry whose message contains this, once it is there.
    pub fn wait_for(&self, part: &str) -> Entry {
        wait_for(&format!("a log entry with {part:?}"), || {
            self.entries().into_iter().find(|entry| entry["MESSAGE"].contains(part))
        })
    }
}

impl Drop for Journal {
    /// Shows what a failed test has logged.
    fn drop(&mut self) {
        if thread::panicking() {
            for entry in self.entries() {
                eprintln!("logged: {}", entry["MESSAGE"]);
            }
        }
    }
}

/// The fields of an entry in journald's protocol: `NAME=value`, or the name, the value's length in eight bytes,
/// and a value that may hold newlines.
fn fields(mut rest: &[u8]) -> Entry {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let mut fields = Entry::new();
    while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
        let (line, tail) = (&rest[..end], &rest[end + 1..]);
        if let Some(equals) = line.iter().position(|byte| *byte == b'=') {
            fields.insert(text(&line[..equals]), text(&line[equals + 1..]));
            rest = tail;
        } else {
            let (length, tail) = tail.split_first_chunk().expect("a length");
            let (value, tail) = tail.split_at(u64::from_le_bytes(*length) as usize);
            fields.insert(text(line), text(value));
            rest = &tail[1..];
        }
    }
    fields
}

/// Removes the sockets that an earlier test has left.
pub fn forget() {
    for path in ["/run/systemd/journal/socket", "/dev/log"] {
        let _ = fs::remove_file(path);
    }
}
