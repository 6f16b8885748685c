//! A QEMU that has been taken over, and does its worst at the very edge of what is read of it.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

#[expect(dead_code, reason = "other tests use the rest")]
mod peer;
#[expect(dead_code, reason = "other tests use the rest")]
mod tool;

use std::io::Write;
use std::os::unix::net::UnixListener;
use std::process::Command as Process;

use peer::{Command, Peer};
use tool::{Outcome, PROGRAM, outcome_of};

/// The longest message that is read, in bytes.
const LONGEST: usize = 256 << 10;

/// All that one process may hold, in KiB: what is read, what becomes of it, and the program itself.
const MEMORY: usize = 16 << 10;

/// What a peer says to a command: a result as JSON, and what comes before it.
type Script = fn(&Command) -> (String, String);

/// What became of a command, and how many commands the peer got, and bytes.
fn run(arguments: &[&str], script: Script) -> (Outcome, usize) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("vm.qmp");
    let listener = UnixListener::bind(&path).unwrap();
    let serving = std::thread::spawn(move || {
        let stream = listener.accept().unwrap().0;
        let mut out = stream.try_clone().unwrap();
        let mut peer = Peer::new(stream);
        peer.greet([10, 0, 2]);
        // QEMU takes commands however much of what it said was read.
        let (say, said) = std::sync::mpsc::channel::<String>();
        let saying = std::thread::spawn(move || {
            let _ = said.iter().try_for_each(|text| out.write_all(text.as_bytes()));
        });
        let mut commands = 0;
        while let Some(command) = peer.command() {
            commands += 1;
            let (before, result) = script(&command);
            let reply = format!("{before}{{\"return\":{result},\"id\":{}}}\n", command.id);
            if say.send(reply).is_err() {
                break;
            }
        }
        drop(say);
        saying.join().unwrap();
        commands
    });
    // What a process may hold is limited, so that too much is a failure and not a matter of opinion.
    let mut program = Process::new("sh");
    program.args(["-c", "ulimit -d \"$0\" && exec \"$@\"", &MEMORY.to_string(), PROGRAM]);
    program.args(["--timeout", "60"]).args(arguments).arg(&path).env("RUST_BACKTRACE", "0");
    let outcome = outcome_of(&mut program);
    drop(directory);
    (outcome, serving.join().unwrap())
}

/// It ends by itself, with a result or an error of a bounded length.
#[track_caller]
fn is_borne(script: Script) {
    for arguments in [&["inspect", "--json"][..], &["inspect"]] {
        let (outcome, commands) = run(arguments, script);
        assert!(
            [0, 1].contains(&outcome.code),
            "{arguments:?}: {} {}",
            outcome.code,
            outcome.stderr
        );
        assert!(outcome.stderr.len() < 6000, "{} bytes of words", outcome.stderr.len());
        assert!(commands <= 16 << 10, "{commands} commands");
    }
}

/// As many of these as a message takes.
fn fill(item: impl Fn(usize) -> String, separator: &str) -> String {
    let mut text = String::new();
    for n in 0.. {
        let item = item(n);
        if text.len() + item.len() + 100 > LONGEST {
            break;
        }
        if n > 0 {
            text += separator;
        }
        text += &item;
    }
    text
}

fn child(name: &str, kind: &str) -> String {
    format!("{{\"name\":\"{name}\",\"type\":\"child<{kind}>\"}}")
}

fn is_about(command: &Command, path: &str) -> bool {
    command.name == "qom-list" && command.arguments["path"] == path
}

/// What an ordinary QEMU says to what is not the matter here.
fn ordinary(command: &Command) -> String {
    match command.name.as_str() {
        "query-status" => "{\"running\":true,\"status\":\"running\"}".into(),
        "qom-list" => "[]".into(),
        "human-monitor-command" => "\"\"".into(),
        _ => "{}".into(),
    }
}

/// Each device with an id has a line, and each line is one's.
#[test]
fn as_many_devices_and_lines_as_there_may_be_are_joined() {
    is_borne(|command| {
        let result = match command.name.as_str() {
            "qom-list" if is_about(command, "/machine/peripheral") => {
                let children: Vec<String> =
                    (0..4096).map(|n| child(&format!("d{n}"), "usb-kbd")).collect();
                format!("[{}]", children.join(","))
            }
            "qom-get" if command.arguments["property"] == "parent_bus" => {
                "\"/machine/x/usb-bus.0\"".into()
            }
            "human-monitor-command" => {
                let line =
                    |n| format!("  Device 0.{n}, Port {n}, Speed 12 Mb/s, Product x, ID: d{n}");
                format!("\"{}\"", fill(line, "\\n"))
            }
            _ => ordinary(command),
        };
        (String::new(), result)
    });
}

#[test]
fn as_many_controllers_as_there_may_be_are_looked_at() {
    is_borne(|command| {
        let result = match command.name.as_str() {
            "qom-list" if is_about(command, "/machine/unattached") => {
                let name = |n| format!("device[{n}]{}", "x".repeat(200));
                let children: Vec<String> =
                    (0..255).map(|n| child(&name(n), "qemu-xhci")).collect();
                format!("[{}]", children.join(","))
            }
            "qom-list" => format!("[{}]", fill(|n| child(&n.to_string(), "usb-bus"), ",")),
            "qom-get" => u32::MAX.to_string(),
            "human-monitor-command" => {
                let line = |n| format!("  Device {n}.1, Port 1, Speed 12 Mb/s, Product x");
                format!("\"{}\"", fill(line, "\\n"))
            }
            _ => ordinary(command),
        };
        (String::new(), result)
    });
}

/// A JSON value takes a hundred times the memory that its text does.
#[test]
fn replies_with_values_that_nobody_asked_for_take_no_memory() {
    is_borne(|command| {
        let many = fill(|_| "{\"\":0}".into(), ",");
        let result = match command.name.as_str() {
            "qom-list" if is_about(command, "/machine/peripheral") => {
                format!(
                    "[{{\"name\":\"a\",\"type\":\"child<usb-host>\",\"default-value\":[{many}]}}]"
                )
            }
            "query-status" | "qom-list" | "human-monitor-command" => ordinary(command),
            _ => format!("[{many}]"),
        };
        (String::new(), result)
    });
}

#[test]
fn events_and_replies_of_others_take_no_memory() {
    is_borne(|command| {
        let many = fill(|_| "[]".into(), ",");
        let event = format!("{{\"event\":\"DEVICE_DELETED\",\"data\":[{many}]}}\n");
        let foreign = format!("{{\"id\":[{many}],\"return\":0}}\n");
        (event + &foreign, ordinary(command))
    });
    is_borne(|command| {
        let short = "{\"event\":\"X\"}".repeat(3000);
        (short, ordinary(command))
    });
}

#[test]
fn long_words_are_not_repeated() {
    is_borne(|command| {
        let word = "\\u0301".repeat(40_000);
        let result = match command.name.as_str() {
            "query-name" => format!("{{\"name\":\"{word}\"}}"),
            "query-status" => format!("\"{word}\""),
            "human-monitor-command" => {
                format!("\"  Device 0.1, Port 1, Speed 12 Mb/s, Product {word}, ID: a\"")
            }
            "qom-list" if is_about(command, "/machine/peripheral") => {
                format!("[{}]", child("a", "usb-kbd"))
            }
            "qom-get" => format!("\"/x/usb-bus.{word}\""),
            _ => ordinary(command),
        };
        (String::new(), result)
    });
}
