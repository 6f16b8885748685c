//! The other end of a monitor's socket: a thread that plays QEMU, with a script for each test.

use std::collections::VecDeque;
use std::io::{IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use serde_json::{Value, json};

/// How long a peer waits for what should come at once: only a test that fails waits so long.
const PATIENCE: Duration = Duration::from_secs(10);

/// A command as it arrived.
#[derive(Debug)]
pub struct Command {
    pub name: String,
    pub id: Value,
    pub arguments: Value,
}

/// QEMU's end of a connection.
pub struct Peer {
    stream: UnixStream,
    unread: VecDeque<u8>,
    descriptor: Option<OwnedFd>,
}

impl Peer {
    pub fn new(stream: UnixStream) -> Self {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        Peer { stream, unread: VecDeque::new(), descriptor: None }
    }

    /// Writes all of it; false if the other end has gone.
    pub fn write(&mut self, bytes: impl AsRef<[u8]>) -> bool {
        self.stream.write_all(bytes.as_ref()).is_ok()
    }

    pub fn greet(&mut self, version: [u32; 3]) {
        let [major, minor, micro] = version;
        let qemu = json!({"major": major, "minor": minor, "micro": micro});
        let greeting =
            json!({"QMP": {"version": {"qemu": qemu, "package": ""}, "capabilities": ["oob"]}});
        self.write(format!("{greeting}\r\n"));
    }

    /// The next command, or `None` at the end.
    pub fn command(&mut self) -> Option<Command> {
        loop {
            if let Some(end) = self.unread.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.unread.drain(..=end).collect();
                let mut message: Value = serde_json::from_slice(&line).unwrap();
                return Some(Command {
                    name: message["execute"].as_str().unwrap().to_owned(),
                    id: message["id"].take(),
                    arguments: message["arguments"].take(),
                });
            }
            if self.receive() == 0 {
                return None;
            }
        }
    }

    /// The next command, which has this name.
    #[track_caller]
    pub fn next(&mut self, name: &str) -> Command {
        let command = self.command().unwrap_or_else(|| panic!("the end instead of {name}"));
        assert_eq!(command.name, name);
        command
    }

    pub fn answer(&mut self, command: &Command, result: Value) -> bool {
        self.write(format!("{}\r\n", reply(command, result)))
    }

    pub fn refuse(&mut self, command: &Command, class: &str, desc: &str) -> bool {
        let error = json!({"class": class, "desc": desc});
        self.write(format!("{}\r\n", json!({"error": error, "id": command.id})))
    }

    /// The descriptor that came last with what was read, once (as QEMU's `add-fd` takes it).
    pub fn take_descriptor(&mut self) -> Option<OwnedFd> {
        self.descriptor.take()
    }

    /// What was sent and not read yet, up to the end.
    pub fn rest(mut self) -> Vec<u8> {
        while self.receive() > 0 {}
        self.unread.into()
    }

    /// One read; the number of bytes that came.
    fn receive(&mut self) -> usize {
        let mut bytes = [0; 4096];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut buffers = [IoSliceMut::new(&mut bytes)];
        let received =
            match recvmsg(&self.stream, &mut buffers, &mut control, RecvFlags::CMSG_CLOEXEC) {
                Ok(received) => received.bytes,
                // Closed with something unread.
                Err(rustix::io::Errno::CONNRESET) => 0,
                Err(error) => panic!("the peer cannot read: {error}"),
            };
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(descriptors) = message {
                self.descriptor = descriptors.last();
            }
        }
        self.unread.extend(&bytes[..received]);
        received
    }
}

/// The reply to a command.
pub fn reply(command: &Command, result: Value) -> Value {
    json!({"return": result, "id": command.id})
}
