//! The contender that cannot be beaten: it is running, its connection is open, it hears the kernel itself and
//! asks nothing.

use crate::kernel::{Uevent, Uevents, now};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::{Value, json};
use std::fs::File;
use std::io::{BufRead, BufReader, IoSlice, Write};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

pub fn id(port: &str) -> String {
    format!("floor-{port}")
}

/// Serves the monitor at `socket`, and notes in `log` how long each command took, a line each, in nanoseconds.
pub fn run(socket: &str, log: &str) {
    let mut uevents = Uevents::listen();
    let mut monitor = BufReader::new(UnixStream::connect(socket).expect("the monitor"));
    let mut log = File::create(log).expect("the log");
    monitor.read_line(&mut String::new()).expect("the greeting");
    let negotiate = json!({"execute": "qmp_capabilities", "id": "last"});
    exchange(&mut monitor, &format!("{negotiate}\n"), None);
    writeln!(log, "ready").expect("the log");
    loop {
        let event = uevents.next();
        if !event.is_usb_device() {
            continue;
        }
        let took = match event.action.as_str() {
            "add" => attach(&mut monitor, &event),
            "remove" => {
                let delete = json!({"execute": "device_del", "arguments": {"id": id(event.name())}, "id": "last"});
                exchange(&mut monitor, &format!("{delete}\n"), None)
            }
            _ => continue,
        };
        writeln!(log, "{} {took}", event.action).expect("the log");
    }
}

fn attach(monitor: &mut BufReader<UnixStream>, event: &Uevent) -> u64 {
    let node = format!("/dev/{}", event.get("DEVNAME").unwrap_or_default());
    let Ok(node) = File::options().read(true).write(true).open(node) else { return 0 };
    let device = json!({
        "driver": "usb-host", "id": id(event.name()), "bus": "xhci.0", "hostdevice": "/dev/fdset/1",
        "hostbus": event.number("BUSNUM"), "hostaddr": event.number("DEVNUM"),
    });
    let commands = [
        json!({"execute": "add-fd", "arguments": {"fdset-id": 1}}),
        json!({"execute": "device_add", "arguments": device, "id": "last"}),
        json!({"execute": "remove-fd", "arguments": {"fdset-id": 1}}),
    ];
    let text: String = commands.iter().map(|command| format!("{command}\n")).collect();
    exchange(monitor, &text, Some(&node))
}

/// Sends the commands, with a descriptor on them, and waits for the answer to the one whose id is `last`.
fn exchange(monitor: &mut BufReader<UnixStream>, commands: &str, descriptor: Option<&File>) -> u64 {
    let start = now();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let rights = descriptor.map(|descriptor| [descriptor.as_fd()]);
    if let Some(rights) = &rights {
        control.push(SendAncillaryMessage::ScmRights(rights));
    }
    let bytes = [IoSlice::new(commands.as_bytes())];
    sendmsg(monitor.get_ref(), &bytes, &mut control, SendFlags::empty()).expect("the monitor");
    loop {
        let mut line = String::new();
        assert!(monitor.read_line(&mut line).expect("the monitor") > 0, "QEMU ended");
        if serde_json::from_str::<Value>(&line).is_ok_and(|answer| answer["id"] == "last") {
            return now() - start;
        }
    }
}
