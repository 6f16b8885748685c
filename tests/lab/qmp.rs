//! A small QMP client that shares nothing with the program under test.

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

pub struct Qmp<S> {
    stream: BufReader<S>,
    last_id: u64,
}

impl<S: Read + Write> Qmp<S> {
    /// Takes over a stream on which the monitor may or may not have been used before.
    pub fn new(stream: S) -> Self {
        let mut qmp =
            Qmp { stream: BufReader::new(stream), last_id: u64::from(std::process::id()) << 32 };
        // Refused when an earlier user of the stream has negotiated already.
        let _ = qmp.execute("qmp_capabilities", json!({}));
        qmp
    }

    /// The answer, or the error's description.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, String> {
        let id = self.send(command, &arguments);
        self.answer(id)
    }

    /// Like [`Qmp::execute`] for a command that must succeed.
    pub fn must(&mut self, command: &str, arguments: Value) -> Value {
        self.execute(command, arguments.clone())
            .unwrap_or_else(|error| panic!("{command} {arguments}: {error}"))
    }

    /// Sends all commands before it reads the first answer.
    pub fn must_all(&mut self, commands: &[(&str, Value)]) {
        let ids: Vec<u64> =
            commands.iter().map(|(command, arguments)| self.send(command, arguments)).collect();
        for (id, command) in ids.into_iter().zip(commands) {
            self.answer(id).unwrap_or_else(|error| panic!("{command:?}: {error}"));
        }
    }

    fn send(&mut self, command: &str, arguments: &Value) -> u64 {
        self.last_id += 1;
        let line =
            json!({"execute": command, "arguments": arguments, "id": self.last_id}).to_string();
        self.stream.get_mut().write_all(line.as_bytes()).expect("the monitor takes commands");
        self.last_id
    }

    fn answer(&mut self, id: u64) -> Result<Value, String> {
        loop {
            let mut line = String::new();
            let length = self.stream.read_line(&mut line).expect("the monitor answers");
            assert!(length > 0, "the monitor was closed");
            // Not JSON: the rest of a line whose beginning an earlier user of the stream has read.
            let Ok(mut message) = serde_json::from_str::<Value>(&line) else { continue };
            if message["id"] == id {
                return match message.get("error") {
                    Some(error) => Err(error["desc"].as_str().unwrap_or_default().to_owned()),
                    None => Ok(message["return"].take()),
                };
            }
        }
    }
}

impl Qmp<UnixStream> {
    /// A command that must succeed, and takes a descriptor.
    pub fn with_descriptor(&mut self, descriptor: &OwnedFd, command: &str, arguments: &Value) {
        self.last_id += 1;
        let line =
            json!({"execute": command, "arguments": arguments, "id": self.last_id}).to_string();
        send(self.stream.get_ref().as_fd(), line.as_bytes(), Some(descriptor));
        self.answer(self.last_id).unwrap_or_else(|error| panic!("{command}: {error}"));
    }
}

/// Sends bytes, with a descriptor on the first of them.
pub fn send(stream: BorrowedFd<'_>, bytes: &[u8], descriptor: Option<&OwnedFd>) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let rights = descriptor.map(|descriptor| [descriptor.as_fd()]);
    if let Some(rights) = &rights {
        control.push(SendAncillaryMessage::ScmRights(rights));
    }
    let sent = sendmsg(stream, &[IoSlice::new(bytes)], &mut control, SendFlags::empty());
    assert_eq!(sent.expect("the monitor reads"), bytes.len());
}
