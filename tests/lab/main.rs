//! Tests with real USB events: a kernel, udevd and QEMU in a disposable machine (`contrib/lab`).
//!
//! Outside the machine this is an ordinary test program: `cargo test --test lab [FILTER]`. It boots one machine
//! for each QEMU version that a selected test needs ([`Kind`]) and runs itself in there ([`outside`]). Inside, each test
//! is a process of its own, one after the other, and starts with every device unplugged, no QEMU running
//! and no rule of an earlier test ([`inside`]). What a failed test printed, and the QEMUs it started, is shown.
//!
//! A test is a function without arguments that panics when it fails, named after the behaviour it shows and
//! listed in its file's `TESTS`. Its parts:
//!
//! - [`hardware`]: plug and pull sticks, mice and hubs on the machine's controllers
//! - [`sockets`]: the controllers' sockets, and bus numbers that change places
//! - [`gadget`]: devices of any kind that the kernel plays itself
//! - [`remote`]: devices that the test itself plays, with every misbehaviour
//! - [`vm`]: a QEMU in the machine, and what it says of itself on a monitor of its own
//! - [`udev`]: rules, and waiting for udevd
//! - [`tool`]: the program under test, as a user runs it
//! - [`host`]: other programs on the machine
//! - [`journal`]: what was logged
//! - [`wait`]: there are no fixed sleeps, only conditions with deadlines
//!
//! ```ignore
//! let mut hardware = Hardware::open();
//! let vm = Vm::new("a").start();
//! let stick = hardware.plug(Stick::new("SN1"), xhci(3));
//! tool::run(["attach", &vm.socket(), &stick.port]).succeeds();
//! assert_eq!(vm.usb_devices().len(), 1);
//! ```
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]
#![allow(dead_code)]

mod attach;
mod bursts;
mod by_hand;
mod by_udev_rule;
mod claims;
mod completions;
mod composite;
mod configfs;
mod controllers;
mod cut_off;
mod daemon;
mod demo;
mod disks;
mod gadget;
mod hardware;
mod host;
mod hubs;
mod inside;
mod inspect;
mod journal;
mod leftovers;
mod libvirt;
mod libvirtd;
mod linux_guest;
mod list;
mod machine;
mod man;
mod meanwhile;
mod outside;
mod owners;
mod port_names;
mod proxy;
mod qmp;
mod recipes;
mod refused;
mod remote;
mod remote_hub;
mod remote_wire;
mod rule;
mod service;
mod sockets;
mod starting;
mod storage;
mod strings;
mod sync;
mod take;
mod tool;
mod truth;
mod udev;
mod units;
mod usbip;
mod uses;
mod vm;
mod vms;
mod wait;
mod waiting;
mod watch;
mod watch_endurance;
mod watch_service;
mod watch_vms;
mod zoo;

use std::process::ExitCode;

/// A test that runs inside the machine.
#[derive(Clone, Copy)]
struct Test {
    name: &'static str,
    kind: Kind,
    run: fn(),
}

/// Which machines run a test by default. With `LAB=all` (`contrib/test --all`), those of every QEMU version do.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    /// Those with the oldest and the newest QEMU: the test depends on how QEMU behaves, and that has not changed in
    /// between.
    Usual,
    /// One, and these tests take turns at all of them: what the test shows is the host's doing or the program's
    /// words, whatever QEMU does.
    AnyQemu,
    /// Those of every QEMU version: the test depends on what differs from version to version.
    EveryQemu,
    /// The one with QEMU 7.2: the test is about another program, and that goes with this QEMU.
    Qemu7,
    /// None: the test takes many minutes, or shows what only very many repetitions show.
    Long,
    /// One whose process 1 is systemd.
    Systemd,
    /// One that runs beside the others: whatever QEMU does, the test mostly waits, for instance until the kernel
    /// gives a device up.
    Waits,
}

/// `tests![a, b: every_qemu, c: long]`: functions of this file, named `file::a` and so on, and their [`Kind`]s.
macro_rules! tests {
    ($($name:ident $(: $kind:ident)?),+ $(,)?) => {
        pub(crate) const TESTS: &[crate::Test] = &[$(crate::Test {
            name: concat!(module_path!(), "::", stringify!($name)),
            kind: crate::kind!($($kind)?),
            run: $name,
        }),+];
    };
}
use tests;

macro_rules! kind {
    () => {
        crate::Kind::Usual
    };
    (any_qemu) => {
        crate::Kind::AnyQemu
    };
    (every_qemu) => {
        crate::Kind::EveryQemu
    };
    (qemu_7) => {
        crate::Kind::Qemu7
    };
    (long) => {
        crate::Kind::Long
    };
    (systemd) => {
        crate::Kind::Systemd
    };
    (waits) => {
        crate::Kind::Waits
    };
}
use kind;

fn all_tests() -> impl Iterator<Item = Test> {
    [
        machine::TESTS,
        by_udev_rule::TESTS,
        attach::TESTS,
        refused::TESTS,
        recipes::TESTS,
        owners::TESTS,
        take::TESTS,
        disks::TESTS,
        storage::TESTS,
        by_hand::TESTS,
        claims::TESTS,
        completions::TESTS,
        controllers::TESTS,
        demo::TESTS,
        list::TESTS,
        vms::TESTS,
        rule::TESTS,
        port_names::TESTS,
        hubs::TESTS,
        uses::TESTS,
        inspect::TESTS,
        man::TESTS,
        leftovers::TESTS,
        truth::TESTS,
        meanwhile::TESTS,
        cut_off::TESTS,
        usbip::TESTS,
        libvirt::TESTS,
        zoo::TESTS,
        composite::TESTS,
        strings::TESTS,
        bursts::TESTS,
        linux_guest::TESTS,
        starting::TESTS,
        sync::TESTS,
        watch::TESTS,
        waiting::TESTS,
        watch_vms::TESTS,
        watch_service::TESTS,
        watch_endurance::TESTS,
        units::TESTS,
    ]
    .concat()
    .into_iter()
    .map(|test| Test { name: test.name.trim_start_matches("lab::"), ..test })
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.split_first() {
        Some((mode, names)) if mode == inside::RUN => inside::run(names),
        Some((mode, names)) if mode == inside::RUN_ONE => inside::run_one(&names[0]),
        _ => outside::run(),
    }
}
