//! The bench: who gets a plugged device into a virtual machine how fast, in one run of the lab.
//!
//! `contrib/bench/run` builds this program and runs it three times over: in the lab, where it plays the rounds
//! ([`race`], [`counts`], [`resident`]) and prints JSON; there again, as the contender that cannot be beaten ([`floor`]);
//! and outside, where it prints the table and draws the picture ([`report`]).
//!
//! Time begins when the kernel's own uevent (`add` or `remove` of the device) arrives on a netlink socket here
//! ([`kernel`]). It ends when a second monitor of QEMU says that the device is attached, or gone. That monitor
//! is not polled: it is asked when the kernel tells that QEMU took the device from the host's driver (`unbind`
//! of an interface), or that it closed the node (inotify), and since QEMU serves one command after the other,
//! its answer comes when the work is done. All contenders are measured alike, and take turns in every round.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stdout,
    reason = "a bench that fails stops"
)]
#![allow(dead_code, unused_imports, reason = "the lab's tests use the rest of their modules")]

mod contender;
mod counts;
mod cpu;
mod floor;
#[path = "../../tests/lab/hardware.rs"]
mod hardware;
mod kernel;
mod options;
#[path = "../../tests/lab/qmp.rs"]
mod qmp;
mod race;
mod report;
mod resident;
#[path = "../../tests/lab/sockets.rs"]
mod sockets;
mod svg;
#[path = "../../tests/lab/udev.rs"]
mod udev;
#[path = "../../tests/lab/vm.rs"]
mod vm;
#[path = "../../tests/lab/wait.rs"]
mod wait;

use options::Options;
use serde_json::json;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["inside", options @ ..] => inside(&Options::parse(options)),
        ["floor", socket, log] => floor::run(socket, log),
        ["report", measured, directory, load] => report::run(measured, directory, load),
        _ => panic!("run contrib/bench/run instead"),
    }
}

fn inside(options: &Options) {
    let race = race::run(options);
    let counts = counts::run();
    let resident = resident::run(options);
    println!("{}", json!({"race": race, "counts": counts, "resident": resident}));
}
