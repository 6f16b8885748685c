//! USB/IP's messages, as the machine with the device sends them (Linux, Documentation/usb/usbip_protocol.rst).

use std::collections::HashSet;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

/// USB 2.0, table 9-2: what is asked for on the control pipe.
#[derive(Debug)]
pub struct Setup {
    /// `bmRequestType`: 0x80 is to the host, 0x20 of a class, 1 to an interface.
    pub kind: u8,
    pub request: u8,
    pub value: u16,
    pub index: u16,
    pub length: u16,
}

pub enum Answer {
    /// Done, with these bytes where the request is one to the host.
    Data(Vec<u8>),
    /// Refused.
    Stall,
    /// None at all: the driver waits until its own deadline.
    Never,
    /// The connection ends in the middle of the answer.
    Disconnect,
}

const SUBMIT: u32 = 1;
const UNLINK: u32 = 2;
const PIPE: u32 = 32_u32.wrapping_neg(); // Linux, Documentation/driver-api/usb/error-codes.rst

/// Answers one device's transfers until the connection ends. Only the control pipe answers at all.
pub fn serve(mut stream: UnixStream, mut answer: impl FnMut(&Setup) -> Answer) -> io::Result<()> {
    let mut unanswered = HashSet::new();
    let mut head = [0; 48];
    loop {
        stream.read_exact(&mut head)?;
        let word = |n: usize| u32::from_be_bytes(head[n * 4..][..4].try_into().expect("4 bytes"));
        let (command, number) = (word(0), word(1));
        if command == UNLINK {
            const RESET: u32 = 104_u32.wrapping_neg(); // it waited; else it had been answered
            let status = if unanswered.remove(&word(5)) { RESET } else { 0 };
            reply(&mut stream, (command, number), status, &[], 0)?;
            continue;
        }
        assert_eq!(command, SUBMIT);
        let (is_in, endpoint, length) = (word(3) == 1, word(4), word(6));
        if !is_in {
            io::copy(&mut (&stream).take(length.into()), &mut io::sink())?;
        }
        let packets = word(8);
        if endpoint != 0 {
            assert!(packets == 0 || packets == u32::MAX, "no isochronous endpoints");
            unanswered.insert(number);
            continue;
        }
        let pair = |n: usize| u16::from_le_bytes([head[40 + n], head[41 + n]]);
        let (value, index) = (pair(2), pair(4));
        let setup = Setup { kind: head[40], request: head[41], value, index, length: pair(6) };
        match answer(&setup) {
            Answer::Data(mut data) if is_in => {
                data.truncate(length as usize);
                reply(&mut stream, (command, number), 0, &data, data.len() as u32)?;
            }
            Answer::Data(_) => reply(&mut stream, (command, number), 0, &[], length)?,
            Answer::Stall => reply(&mut stream, (command, number), PIPE, &[], 0)?,
            Answer::Never => drop(unanswered.insert(number)),
            Answer::Disconnect => {
                stream.write_all(&[0, 0, 0, 3, 0])?;
                return stream.shutdown(Shutdown::Both);
            }
        }
    }
}

fn reply(
    stream: &mut UnixStream,
    (command, number): (u32, u32),
    status: u32,
    data: &[u8],
    length: u32,
) -> io::Result<()> {
    let mut message = Vec::new();
    for word in [command + 2, number, 0, 0, 0, status, length] {
        message.extend(word.to_be_bytes());
    }
    message.resize(48, 0);
    message.extend(data);
    stream.write_all(&message)
}
