//! Bytes into messages, apart from any I/O. A monitor writes one JSON object
//! a line, or with `pretty=on` one over many lines; where an object ends is
//! found by its braces, so both are read alike.

use serde::Deserialize;
use serde_json::Value;

use super::{ErrorKind, Event, Version};

/// The longest message that is read, in bytes. QEMU's longest replies here
/// are some ten KiB.
pub const MAX_MESSAGE: usize = 4 << 20;

/// How many bytes a read has room for, at least.
const ROOM: usize = 1024;

/// What a monitor sends.
#[derive(Debug, PartialEq)]
pub enum Message {
    /// The first message of a monitor.
    Greeting(Version),
    /// The reply to a command of ours.
    Reply {
        /// The command's id.
        id: u64,
        /// What came of it.
        reply: Reply,
    },
    /// Something happened.
    Event(Event),
    /// A reply to a command of somebody else: it has no id of the kind that we
    /// give.
    Foreign,
    /// An error that belongs to no command: QEMU could not read what was sent.
    Complaint(String),
}

/// What came of a command.
#[derive(Debug, PartialEq)]
pub enum Reply {
    /// Its result.
    Return(Value),
    /// QEMU's refusal.
    Error {
        /// The error's class.
        class: String,
        /// The error's text.
        desc: String,
    },
}

/// Bytes on their way to becoming messages.
#[derive(Debug, Default)]
pub struct Frames {
    bytes: Vec<u8>,
    /// How far `bytes` was looked at.
    scanned: usize,
    depth: usize,
    in_string: bool,
    escaped: bool,
}

impl Frames {
    /// Where the next bytes go: to the end of this, which has room for some,
    /// and not for many: whoever fills it has not been looked at yet.
    pub fn space(&mut self) -> &mut Vec<u8> {
        self.bytes.reserve_exact(ROOM);
        &mut self.bytes
    }

    /// The next whole message, if there is one.
    pub fn next(&mut self) -> Result<Option<Message>, ErrorKind> {
        let Some(end) = self.scan()? else {
            return if self.bytes.len() > MAX_MESSAGE { Err(ErrorKind::TooLong) } else { Ok(None) };
        };
        let message = parse(self.bytes.get(..end).unwrap_or_default());
        self.bytes.drain(..end);
        self.scanned = 0;
        message.map(Some)
    }

    /// The end of the first object, if it is all there.
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

/// What stands between two braces, whatever it is.
#[derive(Deserialize)]
struct Envelope {
    #[serde(rename = "QMP")]
    greeting: Option<Greeting>,
    id: Option<Value>,
    // A command may well return null.
    #[serde(rename = "return", default, deserialize_with = "some")]
    result: Option<Value>,
    error: Option<Refused>,
    event: Option<String>,
    #[serde(default)]
    data: Value,
}

#[derive(Deserialize)]
struct Greeting {
    version: VersionInfo,
}

#[derive(Deserialize)]
struct VersionInfo {
    qemu: Version,
}

#[derive(Deserialize)]
struct Refused {
    class: String,
    desc: String,
}

fn some<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<Value>, D::Error> {
    Value::deserialize(deserializer).map(Some)
}

fn parse(bytes: &[u8]) -> Result<Message, ErrorKind> {
    let envelope: Envelope = serde_json::from_slice(bytes).map_err(|_| not_qmp(bytes))?;
    let id = envelope.id.as_ref().and_then(Value::as_u64);
    match envelope {
        Envelope { greeting: Some(greeting), .. } => Ok(Message::Greeting(greeting.version.qemu)),
        Envelope { event: Some(name), data, .. } => Ok(Message::Event(Event { name, data })),
        Envelope { result: Some(value), .. } => Ok(match id {
            Some(id) => Message::Reply { id, reply: Reply::Return(value) },
            None => Message::Foreign,
        }),
        Envelope { error: Some(Refused { class, desc }), id: given, .. } => Ok(match (id, given) {
            (Some(id), _) => Message::Reply { id, reply: Reply::Error { class, desc } },
            (None, Some(_)) => Message::Foreign,
            (None, None) => Message::Complaint(desc),
        }),
        _ => Err(not_qmp(bytes)),
    }
}

/// Reads the reply to a command, whatever its id.
pub fn reply(bytes: &[u8]) -> Result<Reply, ErrorKind> {
    let envelope: Envelope = serde_json::from_slice(bytes).map_err(|_| not_qmp(bytes))?;
    match envelope {
        Envelope { result: Some(value), .. } => Ok(Reply::Return(value)),
        Envelope { error: Some(Refused { class, desc }), .. } => Ok(Reply::Error { class, desc }),
        _ => Err(not_qmp(bytes)),
    }
}

/// The error that shows how foreign bytes begin.
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
                messages.push(message);
            }
        }
        Ok(messages)
    }

    #[test]
    fn messages_are_the_same_in_one_piece_and_byte_by_byte_and_pretty_printed() {
        let compact = format!(
            "{GREETING}\r\n{}\r\n{}\r\n{}\r\n",
            r#"{"return": {"a": "\"}{\\"}, "id": 3}"#,
            r#"{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "FUTURE", "data": [1]}"#,
            r#"{"id": 4, "error": {"class": "NewClass", "desc": "no"}}"#,
        );
        let want = all(compact.as_bytes(), usize::MAX).unwrap();
        assert_eq!(want.len(), 4);
        assert_eq!(want[0], Message::Greeting(Version { major: 10, minor: 0, micro: 2 }));
        assert_eq!(all(compact.as_bytes(), 1).unwrap(), want);
        let pretty: String = compact
            .lines()
            .map(|line| {
                let value: Value = serde_json::from_str(line).unwrap();
                serde_json::to_string_pretty(&value).unwrap() + "\r\n"
            })
            .collect();
        assert_eq!(all(pretty.as_bytes(), 7).unwrap(), want);
    }

    #[test]
    fn a_null_result_is_a_result() {
        let messages = all(br#"{"return": null, "id": 1}"#, 100).unwrap();
        assert_eq!(messages, [Message::Reply { id: 1, reply: Reply::Return(Value::Null) }]);
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

    #[test]
    fn a_message_without_end_is_bounded() {
        let mut frames = Frames::default();
        frames.space().extend_from_slice(b"{\"event\": \"");
        for _ in 0..MAX_MESSAGE / 8192 {
            assert!(frames.next().unwrap().is_none());
            frames.space().extend_from_slice(&[b'x'; 8192]);
        }
        assert!(matches!(frames.next(), Err(ErrorKind::TooLong)));
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
