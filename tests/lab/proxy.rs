//! A monitor's socket between the program under test and QEMU, so that something can happen at a certain moment of
//! a conversation, or the conversation come to an end there.

use crate::qmp::send;
use std::fs;
use std::io::{BufRead, BufReader, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

/// What is about to be passed on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Moment<'a> {
    /// Commands.
    Asked(&'a str),
    /// The replies to all of those commands.
    Answered(&'a str),
}

/// What to do with what is about to be passed on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Pass {
    /// It is passed on.
    On,
    /// It is kept back, with its descriptor, until the client leaves.
    Keep,
    /// Of the commands, QEMU gets the first one only.
    First,
    /// QEMU gets the first one, and when it has done that, the connection ends on either side.
    FirstAndEnd,
}

pub const SOCKET: &str = "/run/proxy.qmp";

/// Listens at [`SOCKET`]. `passes` is asked before something is passed on; what it says no to is kept back, with its
/// descriptor, until the client leaves.
pub fn listen(socket: String, mut passes: impl FnMut(Moment<'_>) -> bool + Send + 'static) {
    listen_to(socket, move |moment| if passes(moment) { Pass::On } else { Pass::Keep });
}

/// Likewise, with more to choose from.
pub fn listen_to(socket: String, mut passes: impl FnMut(Moment<'_>) -> Pass + Send + 'static) {
    let _ = fs::remove_file(SOCKET);
    let listener = UnixListener::bind(SOCKET).expect("a socket");
    thread::spawn(move || {
        for client in listener.incoming() {
            let vm = UnixStream::connect(&socket).expect("the VM listens");
            serve(&client.expect("a client"), &vm, &mut passes);
        }
    });
}

fn serve(
    mut client: &UnixStream,
    mut vm: &UnixStream,
    passes: &mut impl FnMut(Moment<'_>) -> Pass,
) {
    let (mut asked, mut answered, mut commands) = (0, Vec::new(), String::new());
    let mut kept = Vec::new();
    let mut has_left = false;
    // QEMU forgets what a client asked that has left. It is to do what was passed on.
    while !has_left || (asked > 0 && kept.is_empty()) {
        let mut ready = [PollFd::new(client, PollFlags::IN), PollFd::new(vm, PollFlags::IN)];
        poll(&mut ready[usize::from(has_left)..], None).expect("poll");
        if !has_left && !ready[0].revents().is_empty() {
            let (bytes, descriptor) = receive(client.as_fd());
            if bytes.is_empty() {
                has_left = true;
                continue;
            }
            let text = String::from_utf8(bytes).expect("commands are text");
            commands += &text;
            let first = text.split_inclusive('\n').next().unwrap_or_default();
            match passes(Moment::Asked(&text)) {
                Pass::On => {
                    asked += text.lines().count();
                    send(vm.as_fd(), text.as_bytes(), descriptor.as_ref());
                }
                Pass::Keep => {
                    asked += text.lines().count();
                    kept.push(descriptor);
                }
                Pass::First => {
                    asked += 1;
                    send(vm.as_fd(), first.as_bytes(), descriptor.as_ref());
                    kept.push(None);
                }
                Pass::FirstAndEnd => {
                    send(vm.as_fd(), first.as_bytes(), descriptor.as_ref());
                    wait_for_reply(vm);
                    return;
                }
            }
        } else {
            let mut bytes = [0; 4096];
            let length = vm.read(&mut bytes).expect("QEMU runs");
            if length == 0 {
                return;
            }
            answered.extend_from_slice(&bytes[..length]);
            let text = String::from_utf8_lossy(&answered);
            let replies = text.lines().filter(|line| line.contains("\"id\": ")).count();
            if answered.ends_with(b"\n") && replies >= asked {
                if replies == 0 || passes(Moment::Answered(&commands)) == Pass::On {
                    has_left |= client.write_all(&answered).is_err();
                }
                (asked, answered, commands) = (asked - replies, Vec::new(), String::new());
            }
        }
    }
}

fn wait_for_reply(vm: &UnixStream) {
    let mut lines = BufReader::new(vm).lines().map(|line| line.expect("QEMU runs"));
    assert!(lines.any(|line| line.contains("\"id\": ")), "QEMU left");
}

fn receive(stream: BorrowedFd<'_>) -> (Vec<u8>, Option<OwnedFd>) {
    let mut bytes = vec![0; 1 << 16];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut buffers = [IoSliceMut::new(&mut bytes)];
    let received = recvmsg(stream, &mut buffers, &mut control, RecvFlags::CMSG_CLOEXEC);
    let received = received.map_or(0, |received| received.bytes);
    let mut descriptor = None;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(mut descriptors) = message {
            descriptor = descriptors.next();
        }
    }
    bytes.truncate(received);
    (bytes, descriptor)
}
