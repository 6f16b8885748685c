//! The daemon under stress: many cycles, lost events, and its own sudden death.

use crate::daemon::{Daemon, configure, rule};
use crate::hardware::{Device, Hardware, Plugged, Stick, xhci};
use crate::inside;
use crate::tool::run;
use crate::udev;
use crate::vm::Vm;
use crate::wait::wait_until;
use rustix::process::Signal;
use std::fs;

crate::tests![
    many_plugs_and_pulls_leave_nothing_behind: long,
    events_that_got_lost_lead_to_a_look_at_everything: any_qemu,
    a_daemon_that_dies_in_an_attach_leaves_one_clean_state_to_the_next: any_qemu,
];

/// How many devices come and go, `LAB_CYCLES` or this.
const CYCLES: usize = 20;

const AT_ONCE: usize = 4;

fn many_plugs_and_pulls_leave_nothing_behind() {
    let cycles = std::env::var(inside::CYCLES).map_or(CYCLES, |cycles| cycles.parse().unwrap());
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").start();
    configure(&["a"], &rule("a", "port = \"1-*\""));
    // A page of two MiB would look like growth.
    fs::write("/sys/kernel/mm/transparent_hugepage/enabled", "never").unwrap();
    let daemon = Daemon::start();
    let mut at_first = None;
    for round in 1..=cycles.div_ceil(AT_ONCE) {
        let mice = (1..).take(AT_ONCE).map(|n| (Device::Mouse, xhci(n))).collect();
        let plugged = hardware.plug_all(mice);
        vm.gets(&plugged.iter().collect::<Vec<_>>());
        hardware.pull_all(&plugged);
        vm.loses_all();
        // The first rounds set up what is set up once.
        let now = || (vm.descriptors(), daemon.descriptors());
        let (descriptors, memory) = *at_first.get_or_insert_with(|| {
            daemon.wait_for_status("1 VM, 1 running, 0 devices attached");
            daemon.is_idle();
            (now(), daemon.memory())
        });
        wait_until(&format!("{descriptors:?} descriptors are open, not {:?}", now()), || {
            now() == descriptors
        });
        let grown = daemon.memory().saturating_sub(memory);
        // A few more threads at a time than before leave their stacks and their part of the heap.
        assert!(grown <= 256, "{memory} KiB grew by {grown} KiB in {} cycles", round * AT_ONCE);
        eprintln!("{} cycles: {:?}, {memory} KiB and {grown} KiB", round * AT_ONCE, now());
    }
}

fn events_that_got_lost_lead_to_a_look_at_everything() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").start();
    configure(&["a"], &rule("a", "port = \"*\""));
    let daemon = Daemon::start();
    let before = hardware.plug(Stick::new("SN1"), xhci(3));
    let stays = hardware.plug(Device::Mouse, xhci(5));
    let detached = hardware.plug(Device::Mouse, xhci(6));
    vm.gets(&[&before, &stays, &detached]);
    run(["detach", &vm.socket(), &detached.port]).succeeds();
    daemon.freeze();
    for _ in 0..1000 {
        fs::write("/sys/bus/usb/devices/usb1/uevent", "change").unwrap();
    }
    udev::settle();
    // These it does not hear.
    hardware.pull(&before);
    let after = hardware.plug(Stick::new("SN2"), xhci(4));
    udev::settle();
    daemon.thaw();
    daemon.wait_for_log(&["events of the kernel got lost"]);
    // What a person has detached stays so.
    vm.gets(&[&after, &stays]);
    daemon.wait_for_status("1 VM, 1 running, 2 devices attached");
    // And these it does.
    hardware.pull_all(&[after, stays]);
    vm.loses_all();
    assert_eq!(daemon.log().matches("got lost").count(), 1, "{}", daemon.log());
}

fn a_daemon_that_dies_in_an_attach_leaves_one_clean_state_to_the_next() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").start();
    configure(&["a"], &rule("a", "port = \"2-3\""));
    let has_opened = |daemon: &Daemon, stick: &Plugged| daemon.has_open(&stick.node());
    let has_passed = |_: &Daemon, stick: &Plugged| vm.open_nodes().contains(&stick.node());
    for is_time in [&has_opened as &dyn Fn(&Daemon, &Plugged) -> bool, &has_passed] {
        let stick = hardware.plug(Stick::new("SN1"), xhci(3));
        // As long as udev looks at the disk, nothing is attached.
        stick.disk();
        udev::settle();
        let mut daemon = Daemon::launch(&[], &[]);
        // No pause in between, so as not to miss it.
        while !is_time(&daemon, &stick) {
            assert!(!daemon.said().contains(&"READY=1".to_owned()), "too late: it is attached");
        }
        daemon.signal(Signal::KILL);
        daemon.wait();
        let _next = Daemon::start();
        vm.gets(&[&stick]);
        vm.must_have_no_spare_descriptors();
        assert_eq!(vm.open_nodes(), [stick.node()]);
        hardware.pull(&stick);
        vm.loses_all();
    }
}
