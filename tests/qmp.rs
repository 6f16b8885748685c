//! A session against a peer that does what a real QEMU will not do on demand.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

mod peer;
#[path = "peer/session.rs"]
mod session;

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use peer::{Peer, reply};
use qapi::qmp::{add_fd, qom_get, query_name, query_status, remove_fd};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use serde_json::{Value, json};
use session::{ENOUGH, outcome, with_peer};
use usb_qmp_hotplug::qemu::qmp::{Error, ErrorKind, Session};

/// The path that errors name.
const SOCKET: &str = "/run/vm.qmp";

/// A session with a peer that follows a script.
async fn session<T: Send + 'static>(
    time: Duration,
    script: impl FnOnce(Peer) -> T + Send + 'static,
) -> (Result<Session, Error>, JoinHandle<T>) {
    with_peer(&Path::new(SOCKET).into(), time, |stream| script(Peer::new(stream))).await
}

/// Greets, and answers the negotiation when it comes.
fn begin(peer: &mut Peer) {
    peer.greet([10, 0, 2]);
    let negotiation = peer.next("qmp_capabilities");
    peer.answer(&negotiation, json!({}));
}

fn name() -> query_name {
    query_name {}
}

// What comes between a command and its reply.

#[tokio::test]
async fn an_event_that_somebody_wants_is_kept_and_any_other_hurts_nothing() {
    let (session, peer) = session(ENOUGH, |mut peer| {
        peer.greet([10, 0, 2]);
        peer.write("{\"event\": \"NOBODY_KNOWS_THIS\", \"data\": {\"a\": [1]}, \"new\": {}}\r\n");
        let negotiation = peer.next("qmp_capabilities");
        peer.write(
            "{\"event\": \"RESET\"}\r\n{\"event\": \"DEVICE_DELETED\", \"data\": {\"a\": [1]}}\r\n",
        );
        peer.answer(&negotiation, json!({}));
        let command = peer.next("query-name");
        peer.write(
            "{\"event\": \"STOP\", \"timestamp\": {\"seconds\": 1, \"microseconds\": 2}}\r\n",
        );
        peer.answer(&command, json!({"name": "a"}));
        peer.rest();
    })
    .await;
    let mut session = session.unwrap();
    session.want_events("DEVICE_DELETED");
    assert_eq!(session.execute(&name()).await.unwrap().name.as_deref(), Some("a"));
    let is_it = |data: &Value| *data == json!({"a": [1]});
    assert!(session.event(is_it, Instant::now().into()).await.unwrap());
    assert!(!session.event(is_it, Instant::now().into()).await.unwrap(), "it came once");
    drop(session);
    peer.join().unwrap();
}

#[tokio::test]
async fn more_events_than_are_kept_do_not_stop_a_reply() {
    let (session, peer) = session(ENOUGH, |mut peer| {
        begin(&mut peer);
        let command = peer.next("query-name");
        peer.write("{\"event\": \"NOISE\"}\r\n".repeat(5000));
        peer.answer(&command, json!({}));
    })
    .await;
    let mut session = session.unwrap();
    session.want_events("NOISE");
    assert_eq!(session.execute(&name()).await.unwrap().name, None);
    peer.join().unwrap();
}

/// What is said of a peer that says this without end.
async fn said_of(noise: impl Fn(usize) -> String + Send + 'static) -> String {
    let (session, peer) = session(ENOUGH, move |mut peer| {
        begin(&mut peer);
        peer.next("query-name");
        (0..)
            .map(noise)
            .take_while(|noise| peer.write(noise))
            .map(|noise| noise.len())
            .sum::<usize>()
    })
    .await;
    let mut session = session.unwrap();
    session.want_events("NOISE");
    let error = session.execute(&name()).await.unwrap_err();
    drop(session);
    // What the socket holds comes on top of what was read.
    let written = peer.join().unwrap();
    assert!(written < 4 << 20, "{written} bytes were taken");
    outcome(error).0
}

#[tokio::test]
async fn a_conversation_is_bounded_however_it_is_filled() {
    for long in ["NOISE", "OTHER"] {
        let event = move |_| {
            let data = "[],".repeat(80_000);
            format!("{{\"event\": \"{long}\", \"data\": [{data}0]}}\r\n")
        };
        assert!(said_of(event).await.contains("more than 2 MiB in one conversation"));
    }
    let short = said_of(|_| "{\"event\": \"X\"}\r\n".repeat(100)).await;
    assert!(short.contains("more than 16384 messages in one conversation"), "{short}");
    // Replies to what was never asked, and to what was asked, again and again.
    for id in [0, 77] {
        let reply = said_of(move |_| format!("{{\"id\": {id}, \"return\": [[[]]]}}\r\n")).await;
        assert!(reply.contains("in one conversation"), "{reply}");
    }
    let deep = said_of(|_| "{\"a\":".repeat(1000)).await;
    assert!(deep.contains("nested deeper than 64"), "{deep}");
}

#[tokio::test]
async fn a_refusal_of_any_length_is_cut() {
    let (session, peer) = session(ENOUGH, |mut peer| {
        begin(&mut peer);
        let command = peer.next("query-name");
        peer.refuse(&command, &"C".repeat(9000), &"\u{202e}".repeat(9000));
        let command = peer.next("query-name");
        peer.answer(&command, json!({"name": {"x".repeat(9000): 1}}));
        let command = peer.next("query-name");
        peer.answer(&command, json!("y".repeat(9000)));
    })
    .await;
    let mut session = session.unwrap();
    for _ in 0..3 {
        let (text, _) = outcome(session.execute(&name()).await.unwrap_err());
        // Each of 500 characters may take an escape of ten.
        assert!(text.len() < 6000, "{} bytes", text.len());
    }
    peer.join().unwrap();
}

// How replies arrive.

#[tokio::test]
async fn a_reply_may_come_byte_by_byte() {
    let (session, peer) = session(ENOUGH, |mut peer| {
        begin(&mut peer);
        let command = peer.next("query-name");
        let text = reply(&command, json!({"name": "a \u{e4} \"}{ \\"})).to_string() + "\r\n";
        for byte in text.bytes() {
            peer.write([byte]);
            std::thread::yield_now();
        }
        let command = peer.next("query-name");
        peer.answer(&command, json!({"name": "b"}));
    })
    .await;
    let mut session = session.unwrap();
    assert_eq!(session.execute(&name()).await.unwrap().name.unwrap(), "a \u{e4} \"}{ \\");
    assert_eq!(session.execute(&name()).await.unwrap().name.unwrap(), "b");
    peer.join().unwrap();
}

#[tokio::test]
async fn commands_in_a_row_cost_one_round_trip_and_are_answered_in_any_order() {
    let (session, peer) = session(ENOUGH, |mut peer| {
        peer.greet([10, 0, 2]);
        // All that was asked is here before anything is answered, and the answers come in one piece.
        let negotiation = peer.next("qmp_capabilities");
        let first = peer.next("query-name");
        let second = peer.next("query-status");
        let third = peer.next("query-name");
        let answers = [
            reply(&negotiation, json!({})),
            reply(&first, json!({"name": "first"})),
            reply(&third, json!({"name": "third"})),
            json!({"error": {"class": "GenericError", "desc": "no"}, "id": second.id}),
        ];
        peer.write(answers.map(|answer| answer.to_string()).join("\r\n") + "\r\n");
    })
    .await;
    let mut session = session.unwrap();
    let first = session.send(&name()).unwrap();
    let second = session.send(&query_status {}).unwrap();
    let third = session.send(&name()).unwrap();
    assert_eq!(session.reply(third).await.unwrap().name.unwrap(), "third");
    assert_eq!(session.reply(first).await.unwrap().name.unwrap(), "first");
    assert_eq!(session.reply(second).await.unwrap_err().refusal().unwrap().desc, "no");
    peer.join().unwrap();
}

#[tokio::test]
async fn replies_may_be_pretty_printed_over_many_lines() {
    let (session, peer) = session(ENOUGH, |mut peer| {
        peer.greet([10, 0, 2]);
        for _ in 0..2 {
            let command = peer.command().unwrap();
            let pretty = serde_json::to_string_pretty(&reply(&command, json!({}))).unwrap();
            peer.write(pretty.replace('\n', "\r\n") + "\r\n");
        }
    })
    .await;
    let mut session = session.unwrap();
    assert_eq!(session.execute(&name()).await.unwrap().name, None);
    peer.join().unwrap();
}

#[tokio::test]
async fn many_commands_at_once_get_through_a_slow_reader_with_one_descriptor() {
    const COUNT: usize = 10_000;
    let (session, peer) = session(ENOUGH, |mut peer| {
        begin(&mut peer);
        let first = peer.next("query-name");
        peer.answer(&first, json!({}));
        let mut commands = vec![peer.next("qom-get")];
        let descriptor = peer.take_descriptor();
        commands.extend((1..COUNT).map(|_| peer.next("qom-get")));
        for command in &commands {
            peer.answer(command, json!(null));
        }
        (descriptor.is_some(), peer.take_descriptor().is_some())
    })
    .await;
    let mut session = session.unwrap();
    session.execute(&name()).await.unwrap();
    let question = qom_get { path: "/machine".into(), property: "type".into() };
    let file = File::open("/dev/null").unwrap().into();
    let mut tickets = vec![session.send_with_descriptor(&question, file).unwrap()];
    while tickets.len() < COUNT {
        tickets.push(session.send(&question).unwrap());
    }
    for ticket in tickets {
        assert_eq!(session.reply(ticket).await.unwrap(), Value::Null);
    }
    assert_eq!(peer.join().unwrap(), (true, false));
}

// Peers that are none.

#[tokio::test]
async fn an_end_in_the_middle_of_a_line_is_a_lost_connection() {
    let (session, peer) = session(ENOUGH, |mut peer| {
        begin(&mut peer);
        peer.next("query-name");
        peer.write("{\"return\": {\"na");
    })
    .await;
    let mut session = session.unwrap();
    let error = session.execute(&name()).await.unwrap_err();
    peer.join().unwrap();
    assert!(matches!(error.kind, ErrorKind::Lost(None)), "{error:?}");
    let (text, code) = outcome(error);
    assert!(text.contains(SOCKET) && text.contains("connection was lost"), "{text}");
    assert_eq!(code, 1);
    // And that was that: nothing of a broken session can be used.
    let again = session.send(&name()).unwrap_err();
    assert!(matches!(again.kind, ErrorKind::Unusable), "{again:?}");
}

#[tokio::test]
async fn an_end_instead_of_the_greeting_is_a_lost_connection() {
    let (session, peer) = session(ENOUGH, drop).await;
    peer.join().unwrap();
    let error = session.unwrap_err();
    assert!(matches!(error.kind, ErrorKind::Lost(_)), "{error:?}");
}

#[tokio::test]
async fn what_is_not_qmp_is_an_error_that_shows_it() {
    for garbage in
        [&b"SSH-2.0-OpenSSH_9.2\r\n"[..], b"\0\x1b]0;x\x07\xff", b"[]", b"{\"hello\": 1}\r\n"]
    {
        let (session, peer) = session(ENOUGH, move |mut peer| {
            peer.write(garbage);
            peer.rest()
        })
        .await;
        let error = session.unwrap_err();
        assert!(matches!(error.kind, ErrorKind::NotQmp { .. }), "{error:?}");
        let (text, code) = outcome(error);
        assert!(text.contains("does not speak QMP") && text.contains(SOCKET), "{text}");
        assert!(!text.contains(char::is_control), "{text:?}");
        assert_eq!(code, 1);
        assert_eq!(peer.join().unwrap(), b"");
    }
}

#[tokio::test]
async fn messages_without_end_before_the_greeting_are_not_qmp() {
    let (session, peer) = session(ENOUGH, move |mut peer| {
        // For ever.
        while peer.write("{\"event\": \"RESET\"}\r\n".repeat(100)) {}
    })
    .await;
    let error = session.unwrap_err();
    assert!(matches!(error.kind, ErrorKind::NotQmp { .. }), "{error:?}");
    peer.join().unwrap();
}

#[tokio::test]
async fn events_and_late_replies_before_the_greeting_hurt_nothing() {
    let (session, peer) = session(ENOUGH, move |mut peer| {
        peer.write("{\"event\": \"RESET\"}\r\n{\"return\": {}, \"id\": 0}\r\n");
        begin(&mut peer);
        let command = peer.next("query-name");
        peer.answer(&command, json!({"name": "ours"}));
    })
    .await;
    let mut session = session.unwrap();
    assert_eq!(session.execute(&name()).await.unwrap().name.as_deref(), Some("ours"));
    peer.join().unwrap();
}

#[tokio::test]
async fn the_ids_of_two_conversations_do_not_meet() {
    let mut ids = Vec::new();
    for _ in 0..8 {
        let (session, peer) = session(ENOUGH, |mut peer| {
            begin(&mut peer);
            let command = peer.next("query-name");
            peer.answer(&command, json!({}));
            command.id.as_u64().unwrap()
        })
        .await;
        session.unwrap().execute(&name()).await.unwrap();
        ids.push(peer.join().unwrap());
    }
    ids.sort_unstable();
    assert!(ids.windows(2).all(|two| two[1] - two[0] > 1000), "{ids:?}");
}

#[tokio::test]
async fn a_reply_to_a_client_that_has_left_is_passed_over() {
    // Its ids may be of any kind, or none.
    for id in [json!(77), json!(-1), json!("libvirt-7"), json!([1]), Value::Null] {
        let (session, peer) = session(ENOUGH, move |mut peer| {
            begin(&mut peer);
            let command = peer.next("query-name");
            // QEMU was at work for it, and the monitor is ours now.
            peer.write(json!({"return": {"name": "not ours"}, "id": id}).to_string());
            if !id.is_null() {
                peer.write(json!({"error": {"class": "C", "desc": "no"}, "id": id}).to_string());
            }
            peer.answer(&command, json!({"name": "ours"}));
        })
        .await;
        let answer = session.unwrap().execute(&name()).await.unwrap();
        assert_eq!(answer.name.as_deref(), Some("ours"));
        peer.join().unwrap();
    }
}

#[tokio::test]
async fn an_error_without_id_ends_the_session_with_its_text() {
    let (session, peer) = session(ENOUGH, |mut peer| {
        begin(&mut peer);
        peer.next("query-name");
        peer.write(
            "{\"error\": {\"class\": \"GenericError\", \"desc\": \"Invalid JSON syntax\"}}\r\n",
        );
    })
    .await;
    let error = session.unwrap().execute(&name()).await.unwrap_err();
    assert!(error.to_string().contains("Invalid JSON syntax"), "{error}");
    peer.join().unwrap();
}

#[tokio::test]
async fn a_line_of_100_megabytes_is_given_up_early() {
    let (session, peer) = session(ENOUGH, |mut peer| {
        begin(&mut peer);
        peer.next("query-name");
        peer.write("{\"return\": {\"name\": \"");
        let piece = [b'x'; 1 << 16];
        (0..1600).take_while(|_| peer.write(piece)).count() * piece.len()
    })
    .await;
    let mut session = session.unwrap();
    let error = session.execute(&name()).await.unwrap_err();
    drop(session);
    assert!(matches!(error.kind, ErrorKind::TooMuch(_)), "{error:?}");
    let (text, code) = outcome(error);
    assert!(text.contains("a message longer than 256 KiB, which no QEMU does"), "{text}");
    assert_eq!(code, 1);
    let written = peer.join().unwrap();
    assert!(written < 2 << 20, "{written} bytes were taken");
}

// Time.

#[tokio::test(start_paused = true)]
async fn without_a_greeting_nothing_is_sent_and_the_error_says_what_to_do() {
    let (session, peer) = session(Duration::from_secs(5), Peer::rest).await;
    let error = session.unwrap_err();
    assert_eq!(peer.join().unwrap(), b"", "sent before the greeting");
    assert!(matches!(error.kind, ErrorKind::NoGreeting { .. }), "{error:?}");
    let (text, code) = outcome(error);
    assert_eq!(code, 5);
    for part in [SOCKET, "5s", "another client", "stopped", "-qmp unix:PATH,server=on,wait=off"] {
        assert!(text.contains(part), "{part}: {text}");
    }
}

#[tokio::test]
async fn without_a_reply_the_error_says_how_to_wait_longer() {
    let (session, peer) = session(Duration::from_secs(5), |mut peer| {
        peer.greet([10, 0, 2]);
        peer.rest()
    })
    .await;
    let mut session = session.unwrap();
    tokio::time::pause();
    let error = session.execute(&name()).await.unwrap_err();
    assert!(matches!(error.kind, ErrorKind::NoReply { .. }), "{error:?}");
    assert!(session.send(&name()).is_err(), "a session that is out of time is over");
    drop(session);
    let (text, code) = outcome(error);
    assert_eq!(code, 5);
    assert!(text.contains("5s") && text.contains("--timeout"), "{text}");
    assert!(!peer.join().unwrap().is_empty());
}

#[tokio::test]
async fn a_peer_that_never_stops_talking_gets_no_more_time() {
    let start = Instant::now();
    let (session, peer) = session(Duration::from_secs(1), |mut peer| {
        begin(&mut peer);
        let until = Instant::now() + ENOUGH;
        while peer.write("{\"event\": \"NOISE\"}\r\n") && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(1));
        }
    })
    .await;
    let error = session.unwrap().execute(&name()).await.unwrap_err();
    assert!(matches!(error.kind, ErrorKind::NoReply { .. }), "{error:?}");
    assert!(start.elapsed() < ENOUGH / 2, "{:?}", start.elapsed());
    peer.join().unwrap();
}

#[tokio::test]
async fn a_peer_that_does_not_read_gets_no_more_time_than_one_that_does_not_answer() {
    let (done, finished) = std::sync::mpsc::channel::<()>();
    let (session, peer) = session(Duration::from_secs(1), move |mut peer| {
        peer.greet([10, 0, 2]);
        let _ = finished.recv();
    })
    .await;
    let mut session = session.unwrap();
    let path = "x".repeat(1 << 20);
    let question = qom_get { path, property: "type".into() };
    let error = session.execute(&question).await.unwrap_err();
    assert!(matches!(error.kind, ErrorKind::NoReply { .. }), "{error:?}");
    drop(done);
    peer.join().unwrap();
}

// What leaves the session as it was.

#[tokio::test]
async fn a_refusal_is_qemus_own_words_and_the_session_goes_on() {
    let (session, peer) = session(ENOUGH, |mut peer| {
        begin(&mut peer);
        let command = peer.next("query-name");
        peer.refuse(&command, "GenericError", "Bus 'nope\u{1b}[2J' not found");
        let command = peer.next("query-name");
        peer.answer(&command, json!({"name": "a"}));
    })
    .await;
    let mut session = session.unwrap();
    let error = session.execute(&name()).await.unwrap_err();
    let refusal = error.refusal().unwrap();
    assert_eq!((refusal.command, refusal.class.as_str()), ("query-name", "GenericError"));
    assert!(!refusal.is_not_found());
    let (text, code) = outcome(error);
    assert!(text.contains("Bus 'nope\\u{1b}[2J' not found"), "{text:?}");
    assert_eq!(code, 6);
    assert_eq!(session.execute(&name()).await.unwrap().name.unwrap(), "a");
    peer.join().unwrap();
}

#[tokio::test]
async fn a_reply_of_another_shape_is_an_error_and_the_session_goes_on() {
    let (session, peer) = session(ENOUGH, |mut peer| {
        begin(&mut peer);
        let command = peer.next("query-name");
        peer.answer(&command, json!([1, 2]));
        let command = peer.next("query-name");
        peer.answer(&command, json!({"name": "a"}));
    })
    .await;
    let mut session = session.unwrap();
    let error = session.execute(&name()).await.unwrap_err();
    assert!(matches!(error.kind, ErrorKind::Unexpected { command: "query-name", .. }), "{error:?}");
    assert_eq!(outcome(error).1, 1);
    assert_eq!(session.execute(&name()).await.unwrap().name.unwrap(), "a");
    peer.join().unwrap();
}

// Descriptors.

#[tokio::test]
async fn a_descriptor_rides_on_its_commands_bytes_and_is_sent_once() {
    let (session, peer) = session(ENOUGH, |mut peer| {
        begin(&mut peer);
        let first = peer.next("query-name");
        assert!(peer.take_descriptor().is_none());
        peer.answer(&first, json!({}));
        let add = peer.next("add-fd");
        let file = File::from(peer.take_descriptor().unwrap());
        let remove = peer.next("remove-fd");
        peer.answer(&add, json!({"fd": 9, "fdset-id": 3}));
        peer.answer(&remove, json!({}));
        let last = peer.next("query-name");
        peer.answer(&last, json!({}));
        assert!(peer.take_descriptor().is_none());
        (file.metadata().unwrap().ino(), add.arguments)
    })
    .await;
    let mut session = session.unwrap();
    session.execute(&name()).await.unwrap();
    let file = tempfile::tempfile().unwrap();
    let inode = file.metadata().unwrap().ino();
    let add = add_fd { fdset_id: Some(3), opaque: None };
    let add = session.send_with_descriptor(&add, file.into()).unwrap();
    let remove = session.send(&remove_fd { fdset_id: 3, fd: None }).unwrap();
    assert_eq!(session.reply(add).await.unwrap().fd, 9);
    session.reply(remove).await.unwrap();
    session.execute(&name()).await.unwrap();
    assert_eq!(peer.join().unwrap(), (inode, json!({"fdset-id": 3})));
}

// Connecting.

async fn connect(path: &Path) -> Error {
    Session::connect(&path.into(), Duration::from_secs(5)).await.unwrap_err()
}

#[tokio::test]
async fn without_a_socket_there_is_no_vm() {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("file"), "").unwrap();
    std::os::unix::fs::symlink("nowhere", directory.path().join("link")).unwrap();
    for path in ["none", "file/below", "link"] {
        let error = connect(&directory.path().join(path)).await;
        assert!(
            matches!(error.kind, ErrorKind::NoSocket(_)) && error.is_not_running(),
            "{error:?}"
        );
        let (text, code) = outcome(error);
        assert!(text.contains("no such socket") && text.contains("-qmp unix:"), "{text}");
        assert_eq!(code, 4);
    }
}

#[tokio::test]
async fn a_socket_that_nobody_listens_on_is_a_vm_that_has_ended() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("vm.qmp");
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let error = connect(&path).await;
    assert!(error.is_not_running(), "{error:?}");
    let (text, code) = outcome(error);
    assert!(text.contains("nobody listens"), "{text}");
    assert_eq!(code, 4);
}

#[tokio::test]
async fn what_is_no_socket_is_said_to_be_none() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("vm.img");
    fs::write(&file, "").unwrap();
    for path in [file.as_path(), directory.path()] {
        let error = connect(path).await;
        assert!(!error.is_not_running(), "a wrong path is no VM that has ended");
        let (text, code) = outcome(error);
        assert!(text.contains("not a socket"), "{text}");
        assert_eq!(code, 4);
    }
}

#[tokio::test]
async fn a_path_too_long_for_a_socket_is_an_error() {
    let (text, code) = outcome(connect(&Path::new("/run").join("x".repeat(200))).await);
    assert!(text.contains("SUN_LEN"), "{text}");
    assert_eq!(code, 1);
}

/// A monitor whose queue of connections is full, and those that fill it.
fn crowded(path: &Path) -> (std::os::unix::net::UnixListener, Vec<std::os::fd::OwnedFd>) {
    let address = SocketAddrUnix::new(path).unwrap();
    let socket = |flags| {
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap()
    };
    let listener = socket(SocketFlags::CLOEXEC);
    rustix::net::bind(&listener, &address).unwrap();
    rustix::net::listen(&listener, 0).unwrap();
    let mut crowd = Vec::new();
    loop {
        let one = socket(SocketFlags::CLOEXEC | SocketFlags::NONBLOCK);
        match rustix::net::connect(&one, &address) {
            Ok(()) => crowd.push(one),
            Err(error) => {
                assert_eq!(error, rustix::io::Errno::AGAIN);
                return (listener.into(), crowd);
            }
        }
    }
}

#[tokio::test]
async fn while_the_queue_of_connections_is_full_connecting_is_tried_again() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("vm.qmp");
    let (listener, crowd) = crowded(&path);
    let address = path.into();
    let session = Session::connect(&address, ENOUGH);
    tokio::pin!(session);
    let waited = tokio::time::timeout(Duration::from_millis(50), &mut session).await;
    assert!(waited.is_err(), "it did not wait: {waited:?}");
    // The others leave; who comes next is served.
    let count = crowd.len();
    drop(crowd);
    let server = std::thread::spawn(move || {
        for _ in 0..count {
            listener.accept().unwrap();
        }
        let mut peer = Peer::new(listener.accept().unwrap().0);
        begin(&mut peer);
        let command = peer.next("query-name");
        peer.answer(&command, json!({}));
    });
    session.await.unwrap().execute(&name()).await.unwrap();
    server.join().unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_queue_that_stays_full_is_a_monitor_that_others_hold() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("vm.qmp");
    let _crowd = crowded(&path);
    let error = connect(&path).await;
    assert!(matches!(error.kind, ErrorKind::NoGreeting { .. }), "{error:?}");
    assert_eq!(outcome(error).1, 5);
}

#[tokio::test(start_paused = true)]
async fn who_waits_for_a_turn_waits_no_longer() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("vm.qmp");
    let _crowd = crowded(&path);
    let turn = Duration::from_secs(60);
    let error =
        Session::connect_in_turn(&path.into(), turn, Duration::from_secs(5)).await.unwrap_err();
    assert!(matches!(error.kind, ErrorKind::NoGreeting { waited } if waited == turn), "{error:?}");
}

#[tokio::test(start_paused = true)]
async fn a_path_is_shown_without_its_control_characters() {
    let directory = tempfile::tempdir().unwrap();
    for name in ["a\nb\u{1b}[2J", "full\u{1b}"] {
        let path = directory.path().join(name);
        let _crowd = name.starts_with("full").then(|| crowded(&path));
        let (text, _) = outcome(connect(&path).await);
        assert!(text.contains("\\u{1b}") && !text.contains(char::is_control), "{text:?}");
    }
}
