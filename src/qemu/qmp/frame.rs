//! Turns bytes into messages, without I/O. A monitor writes one JSON object per
//! line, or with `pretty=on` one object over many lines. The end of an object
//! is found by its braces, so both formats are read in the same way.

use std::borrow::Cow;

use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;

use super::{ErrorKind, Version};
use crate::text::words;

/// The longest message that is read, in bytes. QEMU's longest replies to this
/// tool have some ten KiB.
pub const MAX_MESSAGE: usize = 256 << 10;

/// The most bytes that are read in one conversation.
pub const MAX_BYTES: usize = 2 << 20;

/// The most messages that are read in one conversation. In the largest VMs,
/// there are two replies for each of thousands of objects, and as many events.
pub const MAX_MESSAGES: usize = 16 << 10;

/// The deepest nesting of a message. QEMU's own messages to this tool have only
/// a few levels.
const MAX_DEPTH: usize = 64;

/// The least space for one read, in bytes.
const ROOM: usize = 1024;

/// A message from a monitor.
#[derive(Debug, PartialEq)]
pub enum Message {
    /// The first message, which a monitor sends by itself.
    Greeting(Version),
    /// The reply to a command of this session.
    Reply {
        /// The command's id.
        id: u64,
        /// The result of the command.
        reply: Reply,
    },
    /// An event.
    Event {
        /// Its name, `DEVICE_DELETED`.
        name: String,
        /// Its data, as JSON, or `null`.
        data: String,
    },
    /// A reply to a command of another client. It has no id of the kind that
    /// this tool gives.
    Foreign,
    /// An error that belongs to no command: QEMU could not read what was sent.
    Complaint(String),
}

/// The result of a command.
#[derive(Debug, PartialEq)]
pub enum Reply {
    /// Its return value, as JSON text. It is kept as text, because a generic
    /// JSON value could need up to a hundred times the memory.
    Return(String),
    /// QEMU's refusal.
    Error {
        /// The error's class.
        class: String,
        /// The error's text.
        desc: String,
    },
}

/// The bytes that have been read and are not complete messages yet. It takes no
/// more bytes than one conversation may have.
#[derive(Debug, Default)]
pub struct Frames {
    bytes: Vec<u8>,
    /// Where in `bytes` the next message begins.
    start: usize,
    /// How many of `bytes` were searched for the end of a message.
    scanned: usize,
    depth: usize,
    in_string: bool,
    escaped: bool,
    bounds: Bounds,
}

/// How much one conversation has read.
#[derive(Debug, Default)]
pub struct Bounds {
    bytes: usize,
    messages: usize,
}

impl Bounds {
    /// Counts a message of so many bytes. Returns an error if the limit is
    /// exceeded.
    pub fn add(&mut self, bytes: usize) -> Result<(), ErrorKind> {
        self.bytes += bytes;
        self.messages += 1;
        if self.bytes > MAX_BYTES {
            return Err(ErrorKind::TooMuch("more than 2 MiB in one conversation"));
        }
        if self.messages > MAX_MESSAGES {
            return Err(ErrorKind::TooMuch("more than 16384 messages in one conversation"));
        }
        Ok(())
    }
}

impl Frames {
    /// The buffer for the next bytes. It has space for one read at its end, but
    /// not for much more, because the peer is not trusted.
    pub fn space(&mut self) -> &mut Vec<u8> {
        // The bytes that were used are dropped here and not after each message,
        // so the rest is moved only once per read.
        self.bytes.drain(..self.start);
        self.scanned -= self.start;
        self.start = 0;
        self.bytes.reserve(ROOM);
        &mut self.bytes
    }

    /// Returns the next complete message, if there is one.
    pub fn next(&mut self) -> Result<Option<Message>, ErrorKind> {
        let end = self.scan()?;
        let begun = end.unwrap_or(self.bytes.len()) - self.start;
        if begun > MAX_MESSAGE {
            return Err(ErrorKind::TooMuch("a message longer than 256 KiB"));
        }
        let Some(end) = end else { return Ok(None) };
        self.bounds.add(begun)?;
        let message = parse(self.bytes.get(self.start..end).unwrap_or_default());
        self.start = end;
        self.scanned = end;
        message.map(Some)
    }

    /// The end of the first object, if the object is complete.
    fn scan(&mut self) -> Result<Option<usize>, ErrorKind> {
        for (i, &byte) in self.bytes.iter().enumerate().skip(self.scanned) {
            if self.in_string {
                match byte {
                    _ if self.escaped => self.escaped = false,
                    b'\\' => self.escaped = true,
                    b'"' => self.in_string = false,
                    _ => {}
                }
                continue;
            }
            match byte {
                b'{' | b'[' if self.depth == MAX_DEPTH => {
                    return Err(ErrorKind::TooMuch("a message nested deeper than 64"));
                }
                b'{' | b'[' => self.depth += 1,
                b'}' | b']' if self.depth > 1 => self.depth -= 1,
                b'}' | b']' if self.depth == 1 => {
                    self.depth = 0;
                    return Ok(Some(i + 1));
                }
                b'"' if self.depth > 0 => self.in_string = true,
                byte if self.depth == 0 && !byte.is_ascii_whitespace() => {
                    let rest = self.bytes.get(i..).unwrap_or_default();
                    return Err(not_qmp(rest));
                }
                _ => {}
            }
        }
        self.scanned = self.bytes.len();
        Ok(None)
    }
}

/// The content of one object, of whatever kind of message.
#[derive(Deserialize)]
struct Envelope<'a> {
    #[serde(rename = "QMP")]
    greeting: Option<Greeting>,
    #[serde(borrow)]
    id: Option<&'a RawValue>,
    // Some commands return null.
    #[serde(borrow, rename = "return", default, deserialize_with = "some")]
    result: Option<&'a RawValue>,
    #[serde(borrow)]
    error: Option<Refused<'a>>,
    #[serde(borrow)]
    event: Option<Cow<'a, str>>,
    #[serde(borrow)]
    data: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct Greeting {
    version: VersionInfo,
}

/// The return value of `query-version`, which is also in the greeting (QEMU,
/// qapi/control.json).
#[derive(Deserialize)]
pub struct VersionInfo {
    /// QEMU's version.
    pub qemu: Version,
}

#[derive(Deserialize)]
struct Refused<'a> {
    #[serde(borrow)]
    class: Cow<'a, str>,
    #[serde(borrow)]
    desc: Cow<'a, str>,
}

fn some<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<&'de RawValue>, D::Error> {
    <&RawValue>::deserialize(deserializer).map(Some)
}

fn parse(bytes: &[u8]) -> Result<Message, ErrorKind> {
    let envelope: Envelope = serde_json::from_slice(bytes).map_err(|_| not_qmp(bytes))?;
    let id = envelope.id.and_then(|id| id.get().parse().ok());
    match envelope {
        Envelope { greeting: Some(greeting), .. } => Ok(Message::Greeting(greeting.version.qemu)),
        Envelope { event: Some(name), data, .. } => {
            let data = data.map_or("null", RawValue::get).to_owned();
            Ok(Message::Event { name: name.into_owned(), data })
        }
        Envelope { result: Some(value), .. } => Ok(match id {
            Some(id) => Message::Reply { id, reply: Reply::Return(value.get().to_owned()) },
            None => Message::Foreign,
        }),
        Envelope { error: Some(Refused { class, desc }), id: given, .. } => Ok(match (id, given) {
            (Some(id), _) => Message::Reply { id, reply: refusal(&class, &desc) },
            (None, Some(_)) => Message::Foreign,
            (None, None) => Message::Complaint(words(&desc).into_owned()),
        }),
        _ => Err(not_qmp(bytes)),
    }
}

/// A refusal in QEMU's words, cut to a length that people can read.
fn refusal(class: &str, desc: &str) -> Reply {
    Reply::Error { class: words(class).into_owned(), desc: words(desc).into_owned() }
}

/// Reads the reply to a command, whatever its id.
pub fn reply(bytes: &[u8]) -> Result<Reply, ErrorKind> {
    let envelope: Envelope = serde_json::from_slice(bytes).map_err(|_| not_qmp(bytes))?;
    match envelope {
        Envelope { result: Some(value), .. } => Ok(Reply::Return(value.get().to_owned())),
        Envelope { error: Some(Refused { class, desc }), .. } => Ok(refusal(&class, &desc)),
        _ => Err(not_qmp(bytes)),
    }
}

/// The error for bytes that are not QMP. It shows how they begin.
fn not_qmp(bytes: &[u8]) -> ErrorKind {
    let start: String = String::from_utf8_lossy(bytes.get(..60).unwrap_or(bytes)).into_owned();
    ErrorKind::NotQmp { saw: format!("it sent `{}`", start.trim_end()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GREETING: &str = r#"{"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10}, "package": "}"}, "capabilities": ["oob"]}}"#;

    fn all(bytes: &[u8], pieces: usize) -> Result<Vec<Message>, ErrorKind> {
        let mut frames = Frames::default();
        let mut messages = Vec::new();
        for piece in bytes.chunks(pieces) {
            frames.space().extend_from_slice(piece);
            while let Some(message) = frames.next()? {
                messages.push(match message {
                    Message::Reply { id, reply: Reply::Return(json) } => {
                        let value: serde_json::Value = serde_json::from_str(&json).unwrap();
                        Message::Reply { id, reply: Reply::Return(value.to_string()) }
                    }
                    other => other,
                });
            }
        }
        Ok(messages)
    }

    #[test]
    fn messages_are_the_same_in_one_piece_and_byte_by_byte_and_pretty_printed() {
        let compact = format!(
            "{GREETING}\r\n{}\r\n{}\r\n{}\r\n",
            r#"{"return": {"a": "\"}{\\"}, "id": 3}"#,
            r#"{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "FUTURE", "data": 1}"#,
            r#"{"id": 4, "error": {"class": "NewClass", "desc": "no"}}"#,
        );
        let want = all(compact.as_bytes(), usize::MAX).unwrap();
        assert_eq!(want.len(), 4);
        assert_eq!(want[0], Message::Greeting(Version { major: 10, minor: 0, micro: 2 }));
        assert_eq!(all(compact.as_bytes(), 1).unwrap(), want);
        let pretty: String = compact
            .lines()
            .map(|line| {
                let value: serde_json::Value = serde_json::from_str(line).unwrap();
                serde_json::to_string_pretty(&value).unwrap() + "\r\n"
            })
            .collect();
        assert_eq!(all(pretty.as_bytes(), 7).unwrap(), want);
    }

    #[test]
    fn a_null_result_is_a_result() {
        let messages = all(br#"{"return": null, "id": 1}"#, 100).unwrap();
        assert_eq!(messages, [Message::Reply { id: 1, reply: Reply::Return("null".into()) }]);
    }

    #[test]
    fn an_error_without_id_is_a_complaint() {
        let line = br#"{"error": {"class": "GenericError", "desc": "Invalid JSON syntax"}}"#;
        assert_eq!(all(line, 9).unwrap(), [Message::Complaint("Invalid JSON syntax".into())]);
    }

    #[test]
    fn what_is_not_qmp_is_said_at_once() {
        for bytes in [&b"HTTP/1.1 400"[..], b"{\"a\": 1}", b"[1]", b"}", b"\xff"] {
            let error = all(bytes, 3).unwrap_err();
            assert!(matches!(error, ErrorKind::NotQmp { .. }), "{bytes:?}: {error:?}");
        }
    }

    /// The error for a peer that sends this again and again.
    fn at_last(text: &str) -> String {
        let mut frames = Frames::default();
        for _ in 0..=MAX_BYTES / text.len().min(100) {
            frames.space().extend_from_slice(text.as_bytes());
            loop {
                match frames.next() {
                    Ok(Some(_)) => {}
                    Ok(None) => break,
                    Err(ErrorKind::TooMuch(what)) => return what.to_owned(),
                    Err(other) => panic!("{other:?}"),
                }
            }
        }
        panic!("it may go on")
    }

    #[test]
    fn a_message_without_end_is_bounded() {
        let mut frames = Frames::default();
        frames.space().extend_from_slice(b"{\"event\": \"");
        for _ in 0..MAX_MESSAGE / 8192 {
            assert!(frames.next().unwrap().is_none());
            frames.space().extend_from_slice(&[b'x'; 8192]);
        }
        assert!(matches!(frames.next(), Err(ErrorKind::TooMuch(_))));
    }

    #[test]
    fn a_conversation_is_bounded_in_bytes_and_messages_and_depth() {
        let long = format!("{{\"event\": \"{}\"}}\n", "x".repeat(200_000));
        assert!(at_last(&long).contains("2 MiB"));
        assert!(at_last("{\"event\": \"x\"}").contains("16384 messages"));
        assert!(at_last("                    ").contains("256 KiB"));
        assert!(at_last(&format!("{{\"id\": {}", "[".repeat(100))).contains("deeper than 64"));
    }

    #[test]
    fn what_a_conversation_may_have_costs_a_bounded_amount_of_memory() {
        // One read may bring many messages. They are not kept after they were
        // read.
        let mut frames = Frames::default();
        let many = "{\"event\":\"x\"}".repeat(MAX_MESSAGES);
        let mut messages = 0;
        for piece in many.as_bytes().chunks(MAX_MESSAGE) {
            frames.space().extend_from_slice(piece);
            while frames.next().unwrap().is_some() {
                messages += 1;
            }
            assert!(frames.bytes.capacity() <= 2 * MAX_MESSAGE + ROOM);
        }
        assert_eq!(messages, MAX_MESSAGES);
    }

    #[test]
    fn a_refusal_has_so_many_words() {
        let desc = "y".repeat(10_000);
        let line = format!("{{\"id\": 1, \"error\": {{\"class\": \"A\", \"desc\": \"{desc}\"}}}}");
        let [Message::Reply { reply: Reply::Error { desc, .. }, .. }] =
            &all(line.as_bytes(), 1000).unwrap()[..]
        else {
            panic!("no refusal")
        };
        assert_eq!(desc.chars().count(), 501);
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), pieces in 1..50usize) {
            let _ = all(&bytes, pieces);
        }

        #[test]
        fn no_json_panics(text in r#"(\{|\}|\[|\]|"|\\|,|:|"return"|"id"|"error"|1| |\n){0,40}"#) {
            let _ = all(text.as_bytes(), 5);
        }
    }
}
