//! Reads and writes the packets of libvirt's protocol, without I/O (libvirt,
//! docs/kbase/internals/rpc.rst, src/rpc/virnetprotocol.x). A packet has a
//! length, a header, and the arguments or the result of the procedure in XDR
//! (RFC 4506). XDR has numbers of four bytes, the highest byte first. A string
//! has its length before it, and it is filled up to a multiple of four bytes.

use super::frame::MAX_MESSAGE;

/// Which of libvirt's protocols a procedure belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Program {
    /// The protocol of all hypervisors (libvirt, src/remote/remote_protocol.x).
    Remote = 0x2000_8086,
    /// The protocol for QEMU alone (libvirt, src/remote/qemu_protocol.x).
    Qemu = 0x2000_8087,
}

/// The version of both protocols.
const VERSION: u32 = 1;

/// Kinds of packets (`virNetMessageType`).
const CALL: u32 = 0;
const REPLY: u32 = 1;
const CALL_WITH_FDS: u32 = 4;
const REPLY_WITH_FDS: u32 = 5;

/// The status of a reply (`virNetMessageStatus`).
const OK: u32 = 0;

/// The size of a packet's length and header, in bytes.
pub const HEADER: usize = 28;

/// The longest packet that is read, in bytes.
const MAX_PACKET: usize = MAX_MESSAGE + 1024;

/// A procedure and its arguments.
#[derive(Debug)]
pub struct Call {
    /// The protocol it belongs to.
    pub program: Program,
    /// Its number there.
    pub procedure: u32,
    /// Its arguments, in XDR.
    pub arguments: Vec<u8>,
}

impl Call {
    /// The packet of this call. A descriptor is sent after the packet.
    pub fn packet(&self, serial: u32, with_descriptor: bool) -> Vec<u8> {
        let kind = if with_descriptor { CALL_WITH_FDS } else { CALL };
        let mut body = Xdr::default();
        for word in [self.program as u32, VERSION, self.procedure, kind, serial, OK] {
            body = body.number(word);
        }
        if with_descriptor {
            body = body.number(1);
        }
        let mut body = body.bytes();
        body.extend_from_slice(&self.arguments);
        let length = u32::try_from(body.len() + 4).unwrap_or(u32::MAX);
        let mut packet = length.to_be_bytes().to_vec();
        packet.extend(body);
        packet
    }
}

/// Writes XDR.
#[derive(Debug, Default)]
pub struct Xdr(Vec<u8>);

impl Xdr {
    /// Adds a number.
    pub fn number(mut self, number: u32) -> Self {
        self.0.extend(number.to_be_bytes());
        self
    }

    /// Adds a string.
    pub fn string(self, text: &str) -> Self {
        let mut xdr = self.number(u32::try_from(text.len()).unwrap_or(u32::MAX));
        xdr.0.extend_from_slice(text.as_bytes());
        xdr.0.resize(xdr.0.len().next_multiple_of(4), 0);
        xdr
    }

    /// Everything that was written.
    pub fn bytes(self) -> Vec<u8> {
        self.0
    }
}

/// Reads XDR.
#[derive(Debug, Clone, Copy)]
pub struct Reader<'a>(pub &'a [u8]);

impl<'a> Reader<'a> {
    /// Reads the next number.
    pub fn number(&mut self) -> Option<u32> {
        let (number, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(u32::from_be_bytes(*number))
    }

    /// Reads the next `count` bytes.
    pub fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (bytes, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(bytes)
    }

    /// Reads the next string.
    pub fn string(&mut self) -> Option<&'a [u8]> {
        let length = usize::try_from(self.number()?).ok()?;
        let padded = self.take(length.checked_next_multiple_of(4)?)?;
        padded.get(..length)
    }
}

/// The result of a call.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The result of the procedure, in XDR.
    Done(Vec<u8>),
    /// The procedure failed.
    Failed {
        /// The error's number (libvirt, include/libvirt/virterror.h).
        code: u32,
        /// libvirt's words.
        message: String,
    },
}

/// The length of the packet that begins with these bytes. `None` if no packet
/// begins like that.
pub fn length(start: [u8; 4]) -> Option<usize> {
    let length = usize::try_from(u32::from_be_bytes(start)).ok()?;
    (HEADER..=MAX_PACKET).contains(&length).then_some(length)
}

/// Reads a packet, without its length. Returns `Ok(None)` if it is not the
/// reply to this call, and `Err` if libvirt would never send it.
pub fn reply(packet: &[u8], call: &Call, serial: u32) -> Result<Option<Outcome>, ()> {
    let mut xdr = Reader(packet);
    let mut header = [0; 6];
    for word in &mut header {
        *word = xdr.number().ok_or(())?;
    }
    let [program, _, procedure, kind, to, status] = header;
    let is_reply = matches!(kind, REPLY | REPLY_WITH_FDS);
    if !is_reply || to != serial || program != call.program as u32 || procedure != call.procedure {
        return Ok(None);
    }
    // No reply that this tool reads has a descriptor.
    if kind == REPLY_WITH_FDS && xdr.number() != Some(0) {
        return Err(());
    }
    if status == OK {
        return Ok(Some(Outcome::Done(xdr.0.to_vec())));
    }
    // The error's number and origin come first. Then a flag says whether there
    // is a message.
    let (code, _) = (xdr.number().ok_or(())?, xdr.number().ok_or(())?);
    let message = match xdr.number().ok_or(())? {
        0 => "it gives no reason".into(),
        _ => String::from_utf8_lossy(xdr.string().ok_or(())?),
    };
    Ok(Some(Outcome::Failed { code, message: message.into_owned() }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn call() -> Call {
        let arguments = Xdr::default().string("abcde").number(0).bytes();
        Call { program: Program::Qemu, procedure: 7, arguments }
    }

    /// The packet of a reply, without its length.
    fn answer(kind: u32, serial: u32, status: u32, rest: &[u8]) -> Vec<u8> {
        let mut xdr = Xdr::default();
        for word in [Program::Qemu as u32, 1, 7, kind, serial, status] {
            xdr = xdr.number(word);
        }
        [xdr.bytes(), rest.to_vec()].concat()
    }

    #[test]
    fn a_call_is_what_libvirt_reads() {
        assert_eq!(
            call().packet(3, true),
            [
                0, 0, 0, 48, 0x20, 0, 0x80, 0x87, 0, 0, 0, 1, 0, 0, 0, 7, 0, 0, 0, 4, 0, 0, 0,
                3, //
                0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 5, b'a', b'b', b'c', b'd', b'e', 0, 0, 0, 0, 0, 0,
                0
            ]
        );
        let plain = call().packet(3, false);
        assert_eq!((plain.len(), plain[3], plain[19]), (44, 44, 0));
    }

    #[test]
    fn a_reply_is_told_from_what_else_comes() {
        let given = Xdr::default().string("{}").bytes();
        let done = Ok(Some(Outcome::Done(given.clone())));
        assert_eq!(reply(&answer(REPLY, 3, OK, &given), &call(), 3), done);
        // A reply to another call, or an event.
        assert_eq!(reply(&answer(REPLY, 2, OK, &given), &call(), 3), Ok(None));
        assert_eq!(reply(&answer(2, 3, OK, &given), &call(), 3), Ok(None));
        let error = Xdr::default().number(55).number(10).number(1).string("not running").bytes();
        let failed = Outcome::Failed { code: 55, message: "not running".into() };
        assert_eq!(reply(&answer(REPLY, 3, 1, &error), &call(), 3), Ok(Some(failed)));
        assert_eq!(reply(&answer(REPLY, 3, 1, &error[..9]), &call(), 3), Err(()));
    }

    #[test]
    fn lengths_are_bounded() {
        assert_eq!(length([0, 0, 0, 28]), Some(28));
        for start in [[0, 0, 0, 27], [0; 4], [0xff; 4], [0x01, 0, 0, 0], *b"{\"QM"] {
            assert_eq!(length(start), None, "{start:?}");
        }
        let mut xdr = Reader(&[0xff, 0xff, 0xff, 0xff, 1, 2, 3, 4]);
        assert_eq!(xdr.string(), None);
    }

    proptest! {
        #[test]
        fn no_packet_panics(bytes in proptest::collection::vec(any::<u8>(), 0..120)) {
            let _ = reply(&bytes, &call(), 3);
            let _ = reply(&answer(REPLY, 3, 1, &bytes), &call(), 3);
            let mut xdr = Reader(&bytes);
            while xdr.string().is_some() {}
        }

        #[test]
        fn a_string_is_read_back(text in "\\PC{0,40}") {
            let bytes = Xdr::default().string(&text).number(7).bytes();
            let mut xdr = Reader(&bytes);
            prop_assert_eq!(xdr.string(), Some(text.as_bytes()));
            prop_assert_eq!(xdr.number(), Some(7));
        }
    }
}
