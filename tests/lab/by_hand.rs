//! `udev` typed by hand or run by somebody else's script, and what it logs.

use crate::hardware::{Device, Hardware, Plugged, Stick, xhci};
use crate::journal::Journal;
use crate::tool::{self, Outcome, run, run_with};
use crate::udev;
use crate::vm::Vm;

crate::tests![
    bus_and_device_numbers_are_enough: any_qemu,
    a_vm_that_does_not_run_is_no_failure: any_qemu,
    a_late_remove_leaves_the_new_device_alone: any_qemu,
    an_event_starts_neither_thread_nor_process: any_qemu,
    the_journal_gets_one_line_for_each_event: any_qemu,
    syslog_gets_it_where_there_is_no_journal: any_qemu,
    a_hub_that_a_rule_meets_is_only_worth_a_warning: any_qemu,
];

fn bus_and_device_numbers_are_enough() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").start();
    let plugged = hardware
        .plug_all(vec![(Stick::new("SN1").into(), xhci(3)), (Stick::new("SN2").into(), xhci(4))]);
    for stick in &plugged {
        typed("add", stick, &vm).succeeds();
    }
    vm.gets(&[&plugged[0], &plugged[1]]);
    typed("remove", &plugged[0], &vm).succeeds();
    vm.gets(&[&plugged[1]]);
    hardware.pull(&plugged[1]);
    typed("remove", &plugged[1], &vm).succeeds();
    vm.loses_all();
    // It is the same when it is over.
    typed("remove", &plugged[1], &vm).succeeds();
    typed("add", &plugged[1], &vm).exits(3);
}

fn a_vm_that_does_not_run_is_no_failure() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").start();
    let stick = hardware.plug(Stick::new("SN1"), xhci(3));
    let socket = vm.socket();
    let numbers = numbers(&stick);
    vm.kill();
    for vm in [&socket, "/run/nothing/here.qmp"] {
        for action in ["add", "remove"] {
            let variables = [("ACTION", action), ("BUSNUM", &numbers[0]), ("DEVNUM", &numbers[1])];
            let done = run_with(["udev", vm], variables).succeeds();
            assert!(done.stderr.contains("not running"), "{}", done.stderr);
        }
    }
    run(["attach", &socket, &stick.port]).exits(4);
    assert_eq!(stick.driver().as_deref(), Some("usb-storage"));
}

fn a_late_remove_leaves_the_new_device_alone() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").start();
    let old = hardware.plug(Stick::new("SN1"), xhci(3));
    let devpath = old.devpath();
    hardware.pull(&old);
    let new = hardware.plug(Stick::new("SN2"), xhci(3));
    run(["attach", &vm.socket(), &new.port]).succeeds();
    let [bus, device] = &numbers(&old);
    let late = [
        ("ACTION", "remove"),
        ("SUBSYSTEM", "usb"),
        ("DEVTYPE", "usb_device"),
        ("DEVPATH", &devpath),
        ("BUSNUM", bus),
        ("DEVNUM", device),
    ];
    run_with(["udev", &vm.socket()], late).succeeds();
    vm.gets(&[&new]);
}

fn an_event_starts_neither_thread_nor_process() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").start();
    let mouse = hardware.plug(Device::Mouse, xhci(3));
    let [bus, address] = &numbers(&mouse);
    for action in ["add", "remove"] {
        let variables = [("ACTION", action), ("BUSNUM", bus), ("DEVNUM", address)];
        tool::run_alone(["udev", &vm.socket()], variables).succeeds();
        assert_eq!(vm.open_nodes().len(), usize::from(action == "add"), "{action}");
    }
}

fn the_journal_gets_one_line_for_each_event() {
    let mut hardware = Hardware::open();
    let journal = Journal::journald();
    let vm = Vm::new("a").start();
    tool::rules(&tool::rule(r#"DEVPATH=="*/2-3""#, &vm));
    let stick = hardware.plug(Stick::new("SN1"), xhci(3));
    let attached = journal.wait_for("attached");
    udev::settle();
    hardware.pull(&stick);
    let detached = journal.wait_for("detached");
    udev::settle();
    for (entry, word) in [(&attached, "46f4:0001"), (&detached, "2-3")] {
        assert_eq!(entry["SYSLOG_IDENTIFIER"], "usb-qmp-hotplug");
        assert_eq!((&*entry["PORT"], &*entry["ID"]), ("2-3", "usb-host-2-3"));
        assert_eq!((&*entry["PRIORITY"], &entry["VM"]), ("5", &vm.socket()));
        assert!(entry["MS"].parse::<u32>().is_ok(), "{entry:?}");
        assert!(entry["MESSAGE"].contains(word), "{entry:?}");
    }
    assert!(attached["MESSAGE"].contains("xhci.0 port 15"), "{attached:?}");
    assert_eq!(journal.entries(), [attached, detached]);
}

fn syslog_gets_it_where_there_is_no_journal() {
    let mut hardware = Hardware::open();
    let log = Journal::syslogd();
    let vm = Vm::new("a").start();
    tool::rules(&tool::rule(r#"DEVPATH=="*/2-3""#, &vm));
    let stick = hardware.plug(Stick::new("SN1"), xhci(3));
    let line = &log.wait_for("attached")["MESSAGE"];
    assert!(line.contains("usb-qmp-hotplug[") && line.contains("2-3"), "{line}");
    hardware.pull(&stick);
    log.wait_for("detached");
    vm.loses_all();
}

fn a_hub_that_a_rule_meets_is_only_worth_a_warning() {
    let mut hardware = Hardware::open();
    let journal = Journal::journald();
    let vm = Vm::new("a").start();
    tool::rules(&tool::rule(r#"DEVPATH=="*/1-5*""#, &vm));
    let hub = hardware.plug(Device::Hub, xhci(5));
    let mouse = hardware.plug(Device::Mouse, xhci(5).below(2));
    let warning = journal.wait_for("hub");
    assert_eq!(warning["PRIORITY"], "4", "{warning:?}");
    vm.gets(&[&mouse]);
    assert_eq!(hub.driver().as_deref(), Some("hub"));
    // The hub takes the mouse along.
    hardware.pull(&hub);
    vm.loses_all();
}

/// A device's numbers as people type them.
fn numbers(device: &Plugged) -> [String; 2] {
    [format!("{:03}", device.bus), format!("{:03}", device.address)]
}

fn typed(action: &'static str, device: &Plugged, vm: &Vm) -> Outcome {
    let [bus, address] = &numbers(device);
    run_with(["udev", &vm.socket()], [("ACTION", action), ("BUSNUM", bus), ("DEVNUM", address)])
}
