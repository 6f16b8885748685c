//! The other end of libvirt's socket: a thread that plays libvirtd, with a script for each test.

use std::io::{IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use serde_json::{Value, json};

const REMOTE: u32 = 0x2000_8086;
const QEMU: u32 = 0x2000_8087;

/// How long a peer waits for what should come at once: only a test that fails waits so long.
const PATIENCE: Duration = Duration::from_secs(10);

/// A call as it arrived.
#[derive(Debug)]
pub struct Call {
    pub program: u32,
    pub procedure: u32,
    pub serial: u32,
    /// Without what says how many descriptors there are.
    pub arguments: Vec<u8>,
    pub descriptor: Option<OwnedFd>,
}

impl Call {
    /// The command for a monitor.
    pub fn command(&self) -> Value {
        assert_eq!(self.program, QEMU, "{self:?}");
        let named = domain("test").len();
        let length = number(&self.arguments[named..]) as usize;
        serde_json::from_slice(&self.arguments[named + 4..][..length]).unwrap()
    }
}

/// libvirtd's end of a connection.
pub struct Libvirtd {
    stream: UnixStream,
}

impl Libvirtd {
    pub fn new(stream: UnixStream) -> Self {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        Libvirtd { stream }
    }

    /// The next call, or `None` at the end.
    pub fn call(&mut self) -> Option<Call> {
        let mut length = [0; 4];
        self.stream.read_exact(&mut length).ok()?;
        let mut packet = vec![0; number(&length) as usize - 4];
        self.stream.read_exact(&mut packet).unwrap();
        let words: Vec<u32> = packet.chunks(4).map(number).collect();
        let [program, 1, procedure, kind, serial, 0] = words[..6] else {
            panic!("the header {:?}", &words[..6])
        };
        let mut arguments = packet.split_off(24);
        let mut descriptor = None;
        if kind == 4 {
            assert_eq!(number(&arguments), 1, "descriptors");
            arguments.drain(..4);
            descriptor = Some(self.descriptor());
        }
        Some(Call { program, procedure, serial, arguments, descriptor })
    }

    /// The next call, which is of this procedure.
    #[track_caller]
    pub fn next(&mut self, procedure: u32) -> Call {
        let call = self.call().unwrap_or_else(|| panic!("the end instead of {procedure}"));
        assert_eq!(call.procedure, procedure, "{call:?}");
        call
    }

    pub fn write(&mut self, bytes: impl AsRef<[u8]>) {
        // The other end may have had enough.
        let _ = self.stream.write_all(bytes.as_ref());
    }

    pub fn give(&mut self, call: &Call, given: &[u8]) {
        self.write(packet(call, 0, given));
    }

    pub fn fail(&mut self, call: &Call, code: u32, message: &str) {
        let error = [words(&[code, 10, 1]), string(message), words(&[2, 0, 0, 0, 0, 0, 0, 0])];
        self.write(packet(call, 1, &error.concat()));
    }

    /// Passes on what QEMU answered.
    pub fn answer(&mut self, call: &Call, answer: Value) {
        self.give(call, &string(&answer.to_string()));
    }

    /// All that comes before the first command of a session: for the domain `test`, which runs.
    pub fn begin(&mut self) {
        self.log_in();
        self.look_up();
    }

    pub fn log_in(&mut self) {
        let list = self.next(66);
        self.give(&list, &words(&[1, 0]));
        self.open();
    }

    pub fn open(&mut self) {
        let open = self.next(1);
        assert_eq!((open.program, &open.arguments[8..23]), (REMOTE, &b"qemu:///session"[..]));
        self.give(&open, &[]);
    }

    /// Finds the domain, and its QEMU's version.
    pub fn look_up(&mut self) {
        let lookup = self.next(23);
        assert_eq!(lookup.arguments, string("test"));
        self.give(&lookup, &domain("test"));
        self.version();
    }

    pub fn version(&mut self) {
        let call = self.next(1);
        assert_eq!(call.command(), json!({"execute": "query-version"}));
        let qemu = json!({"major": 10, "minor": 0, "micro": 2});
        let version = json!({"qemu": qemu, "package": ""});
        self.answer(&call, json!({"return": version, "id": "libvirt-7"}));
    }

    /// Whether nothing has been sent that was not read.
    pub fn is_idle(&self) -> bool {
        self.stream.set_nonblocking(true).unwrap();
        let mut byte = [0];
        let peeked = rustix::net::recv(&self.stream, &mut byte, RecvFlags::PEEK);
        self.stream.set_nonblocking(false).unwrap();
        matches!(peeked, Err(rustix::io::Errno::AGAIN))
    }

    /// The descriptor that comes with a byte of its own.
    fn descriptor(&mut self) -> OwnedFd {
        let mut byte = [0];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC;
        let buffers = &mut [IoSliceMut::new(&mut byte)];
        recvmsg(&self.stream, buffers, &mut control, flags).unwrap();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(mut descriptors) = message {
                return descriptors.next().unwrap();
            }
        }
        panic!("no descriptor with its byte")
    }
}

/// A reply to a call; status 1 for one that failed.
pub fn packet(call: &Call, status: u32, rest: &[u8]) -> Vec<u8> {
    let header = words(&[call.program, 1, call.procedure, 1, call.serial, status]);
    framed(&[header, rest.to_vec()].concat())
}

/// A packet with its length before it.
pub fn framed(packet: &[u8]) -> Vec<u8> {
    let length = u32::try_from(packet.len() + 4).unwrap();
    [&length.to_be_bytes(), packet].concat()
}

/// A domain that runs, as libvirt names it: name, UUID, id.
pub fn domain(name: &str) -> Vec<u8> {
    [string(name), vec![7; 16], words(&[5])].concat()
}

pub fn string(text: &str) -> Vec<u8> {
    let mut bytes = words(&[u32::try_from(text.len()).unwrap()]);
    bytes.extend(text.as_bytes());
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

pub fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_be_bytes()).collect()
}

fn number(bytes: &[u8]) -> u32 {
    u32::from_be_bytes(bytes[..4].try_into().unwrap())
}
