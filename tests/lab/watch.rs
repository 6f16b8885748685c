//! The daemon, and what is plugged and pulled.

use crate::daemon::{CONFIG, Daemon, configure, rule};
use crate::hardware::{Device, Hardware, Stick, ehci, xhci};
use crate::journal::Journal;
use crate::tool::run;
use crate::udev;
use crate::vm::Vm;
use crate::wait::wait_until;
use rustix::process::Signal;

crate::tests![
    what_was_there_before_the_daemon_is_attached: any_qemu,
    what_was_there_before_the_vm_is_attached: any_qemu,
    a_plug_and_a_pull_are_logged_with_all_fields: any_qemu,
    devices_that_swap_their_ports_stay_with_their_vms: any_qemu,
    ports_keep_their_vms_when_devices_swap: any_qemu,
    a_device_that_left_and_came_back_at_once_is_there_again: any_qemu,
    either_name_of_a_usb3_socket_means_both: any_qemu,
    a_detach_by_hand_stands_until_the_next_plug: any_qemu,
    what_a_person_attached_leaves_when_it_is_pulled: any_qemu,
    what_a_person_moved_to_another_vm_leaves_when_it_is_pulled: any_qemu,
    a_rule_may_ask_udev_and_an_earlier_one_may_deny: any_qemu,
    a_rule_for_all_behind_a_hub_leaves_the_hub_alone: any_qemu,
];

fn what_was_there_before_the_daemon_is_attached() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").start();
    let all = vec![(Stick::new("SN1").into(), xhci(3)), (Device::Mouse, ehci(2))];
    let plugged = hardware.plug_all(all);
    let other = hardware.plug(Device::Tablet, xhci(4));
    configure(&["a"], &(rule("a", "port = \"2-3\"") + &rule("a", "port = \"3-2\"")));
    let daemon = Daemon::start();
    // It is ready when all is done, not earlier.
    for device in &plugged {
        vm.must_have(device);
    }
    assert_eq!(other.driver().as_deref(), Some("usbhid"));
    daemon.wait_for_status("1 VM, 1 running, 2 devices attached");
}

fn what_was_there_before_the_vm_is_attached() {
    let mut hardware = Hardware::open();
    configure(&["a"], &rule("a", "port = \"2-3\""));
    assert!(!std::path::Path::new("/run/vm").exists(), "its directory comes with the VM");
    let daemon = Daemon::start();
    let stick = hardware.plug(Stick::new("SN1"), xhci(3));
    daemon.wait_for_status("1 VM, 0 running, 0 devices attached");
    let vm = Vm::new("a").start();
    vm.gets(&[&stick]);
    daemon.wait_for_status("1 VM, 1 running, 1 device attached");
}

fn a_plug_and_a_pull_are_logged_with_all_fields() {
    let mut hardware = Hardware::open();
    let journal = Journal::journald();
    let vm = Vm::new("a").start();
    configure(&["a"], &rule("a", "serial = \"SN*\""));
    let _daemon = Daemon::start();
    let stick = hardware.plug(Stick::new("SN1"), xhci(3));
    let attached = journal.wait_for("attached 2-3");
    vm.gets(&[&stick]);
    hardware.pull(&stick);
    let detached = journal.wait_for("detached usb-host-2-3");
    vm.loses_all();
    for entry in [&attached, &detached] {
        assert_eq!((&*entry["VM"], &*entry["PORT"]), ("a", "2-3"), "{entry:?}");
        assert_eq!((&*entry["ID"], &*entry["PRIORITY"]), ("usb-host-2-3", "5"), "{entry:?}");
        assert!(entry["MS"].parse::<u32>().is_ok(), "{entry:?}");
    }
    assert_eq!(attached["RULE"], "3", "{attached:?}");
    let about_it = |entry: &&_| {
        let entry: &crate::journal::Entry = entry;
        entry.contains_key("PORT")
    };
    assert_eq!(journal.entries().iter().filter(about_it).count(), 2, "{:?}", journal.entries());
}

fn devices_that_swap_their_ports_stay_with_their_vms() {
    let mut hardware = Hardware::open();
    let (a, b) = (Vm::new("a").start(), Vm::new("b").start());
    configure(&["a", "b"], &(rule("a", "serial = \"SNA\"") + &rule("b", "serial = \"SNB\"")));
    let daemon = Daemon::start();
    let sticks = |of_a, of_b| {
        vec![(Stick::new("SNA").into(), xhci(of_a)), (Stick::new("SNB").into(), xhci(of_b))]
    };
    let before = hardware.plug_all(sticks(3, 4));
    a.gets(&[&before[0]]);
    b.gets(&[&before[1]]);
    // All four events at once.
    daemon.freeze();
    hardware.pull_all(&before);
    let after = hardware.plug_all(sticks(4, 3));
    udev::settle();
    daemon.thaw();
    for (vm, stick) in [(&a, &after[0]), (&b, &after[1])] {
        vm.gets(&[stick]);
        assert_eq!(vm.open_nodes(), [stick.node()]);
    }
    a.must_have_no_spare_descriptors();
    b.must_have_no_spare_descriptors();
}

fn ports_keep_their_vms_when_devices_swap() {
    let mut hardware = Hardware::open();
    let (a, b) = (Vm::new("a").start(), Vm::new("b").start());
    configure(&["a", "b"], &(rule("a", "port = \"2-3\"") + &rule("b", "port = \"2-4\"")));
    let _daemon = Daemon::start();
    let sticks = |first, second| {
        vec![(Stick::new(first).into(), xhci(3)), (Stick::new(second).into(), xhci(4))]
    };
    let mut plugged = hardware.plug_all(sticks("SN1", "SN2"));
    for (first, second) in [("SN2", "SN1"), ("SN1", "SN2")] {
        a.gets(&[&plugged[0]]);
        b.gets(&[&plugged[1]]);
        hardware.pull_all(&plugged);
        plugged = hardware.plug_all(sticks(first, second));
        // The ids stay the same.
        for (vm, stick) in [(&a, &plugged[0]), (&b, &plugged[1])] {
            wait_until("the new one is there", || vm.open_nodes() == [stick.node()]);
        }
    }
}

fn a_device_that_left_and_came_back_at_once_is_there_again() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").start();
    configure(&["a"], &rule("a", "port = \"2-3\""));
    let daemon = Daemon::start();
    let before = hardware.plug(Stick::new("SN1"), xhci(3));
    vm.gets(&[&before]);
    daemon.freeze();
    hardware.pull(&before);
    let after = hardware.plug(Stick::new("SN1"), xhci(3));
    udev::settle();
    daemon.thaw();
    wait_until("the new one is there", || vm.open_nodes() == [after.node()]);
    vm.gets(&[&after]);
    assert!(!daemon.log().contains("WARN"), "{}", daemon.log());
}

fn either_name_of_a_usb3_socket_means_both() {
    let mut hardware = Hardware::open();
    let (a, b) = (Vm::new("a").start(), Vm::new("b").start());
    // A fast stick appears at 2-3 and 2-4, the mice at 1-3 and 1-4.
    let rules = rule("a", "port = \"1-3\"") + &rule("b", "port = \"1-4\"\ntwin = false");
    configure(&["a", "b"], &rules);
    let _daemon = Daemon::start();
    let fast = hardware.plug(Stick::new("SN1"), xhci(4));
    let matched = hardware.plug(Stick::new("SN2"), xhci(3));
    assert_eq!((&*matched.port, &*fast.port), ("2-3", "2-4"));
    a.gets(&[&matched]);
    assert!(b.ids().is_empty());
    hardware.pull_all(&[matched, fast]);
    a.loses_all();
    let slow = hardware.plug_all(vec![(Device::Mouse, xhci(3)), (Device::Mouse, xhci(4))]);
    a.gets(&[&slow[0]]);
    b.gets(&[&slow[1]]);
}

fn a_detach_by_hand_stands_until_the_next_plug() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").start();
    let stick = hardware.plug(Stick::new("SN1"), xhci(3));
    configure(&["a"], &(rule("a", "port = \"2-3\"") + &rule("a", "port = \"1-5\"")));
    // Attached before the daemon, it is in the daemon's care all the same.
    run(["attach", &vm.socket(), &stick.port]).succeeds();
    let daemon = Daemon::start();
    run(["detach", &vm.socket(), &stick.port]).succeeds();
    udev::trigger("add", &stick.sysfs);
    udev::settle();
    daemon.reload();
    // Work is done in order: when the mouse is there, the rest was looked at.
    let mouse = hardware.plug(Device::Mouse, xhci(5));
    vm.gets(&[&mouse]);

    hardware.pull(&stick);
    let stick = hardware.plug(Stick::new("SN1"), xhci(3));
    vm.gets(&[&mouse, &stick]);
    run(["detach", &vm.socket(), &stick.port]).succeeds();
    vm.kill();
    let vm = Vm::new("a").start();
    vm.gets(&[&mouse, &stick]);

    // Nothing is written down: a daemon that starts makes reality match.
    run(["detach", &vm.socket(), &stick.port]).succeeds();
    drop(daemon);
    let _next = Daemon::start();
    vm.gets(&[&mouse, &stick]);
}

fn what_a_person_attached_leaves_when_it_is_pulled() {
    let mut hardware = Hardware::open();
    let vms = [Vm::new("a").start(), Vm::new("b").start()];
    configure(&["a", "b"], "");
    let _daemon = Daemon::start();
    let stick = hardware.plug(Stick::new("SN1"), xhci(3));
    run(["--config", CONFIG, "attach", "b", &stick.port]).succeeds();
    vms[1].gets(&[&stick]);
    hardware.pull(&stick);
    vms[1].loses_all();
}

fn what_a_person_moved_to_another_vm_leaves_when_it_is_pulled() {
    let mut hardware = Hardware::open();
    let (a, b) = (Vm::new("a").start(), Vm::new("b").start());
    configure(&["a", "b"], &rule("a", "serial = \"SN1\""));
    let daemon = Daemon::start();
    let by_hand = |command: &str, vm: &Vm, port: &str| {
        run([command, &vm.socket(), port]).succeeds();
    };
    let stick = hardware.plug(Stick::new("SN1"), xhci(3));
    daemon.wait_for_status("2 VMs, 2 running, 1 device attached");
    by_hand("detach", &a, &stick.port);
    by_hand("attach", &b, &stick.port);
    hardware.pull(&stick);
    b.loses_all();
    daemon.wait_for_status("2 VMs, 2 running, 0 devices attached");

    // Nor does it matter that another VM had the port before, and hangs.
    let stick = hardware.plug(Stick::new("SN1"), xhci(3));
    daemon.wait_for_status("2 VMs, 2 running, 1 device attached");
    a.signal(Signal::STOP);
    hardware.pull(&stick);
    let other = hardware.plug(Stick::new("SN2"), xhci(3));
    by_hand("attach", &b, &other.port);
    hardware.pull(&other);
    b.loses_all();
    a.signal(Signal::CONT);
    a.loses_all();
}

fn a_rule_may_ask_udev_and_an_earlier_one_may_deny() {
    let mut hardware = Hardware::open();
    let (a, b) = (Vm::new("a").start(), Vm::new("b").start());
    let denied = "[[rule]]\ndeny = true\nproperty = { ID_MODEL = \"QEMU_USB_M*\" }\n".to_owned();
    let asked = rule("a", "property = { ID_BUS = \"usb\", ID_MODEL = \"QEMU_USB_T*\" }");
    configure(&["a", "b"], &(denied + &asked + &rule("b", "port = \"*\"")));
    let plugged = hardware.plug_all(vec![(Device::Mouse, xhci(3)), (Device::Tablet, xhci(4))]);
    // As when the daemon starts and udev has not got to them yet.
    udev::settle();
    for device in &plugged {
        udev::forget_device('c', &device.sysfs);
    }
    let _daemon = Daemon::start();
    assert_eq!((a.ids(), b.ids()), (vec![], vec![]), "nobody knows whose they are");
    for device in &plugged {
        udev::trigger("add", &device.sysfs);
    }
    a.gets(&[&plugged[1]]);
    let keyboard = hardware.plug(Device::Keyboard, xhci(5));
    b.gets(&[&keyboard]);
    assert_eq!(plugged[0].driver().as_deref(), Some("usbhid"));
}

fn a_rule_for_all_behind_a_hub_leaves_the_hub_alone() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").start();
    configure(&["a"], &rule("a", "port = \"1-5*\""));
    let daemon = Daemon::start();
    let hub = hardware.plug(Device::Hub, xhci(5));
    let behind = hardware
        .plug_all(vec![(Device::Mouse, xhci(5).below(2)), (Device::Keyboard, xhci(5).below(3))]);
    vm.gets(&[&behind[0], &behind[1]]);
    assert_eq!(hub.driver().as_deref(), Some("hub"));
    hardware.pull(&hub);
    vm.loses_all();
    daemon.wait_for_status("1 VM, 1 running, 0 devices attached");
}
