//! One device, one VM; and QEMUs that have hardly any rights.

use crate::hardware::{Device, Hardware, Stick, xhci};
use crate::tool::{self, run};
use crate::udev;
use crate::vm::Vm;
use crate::wait::wait_until;
use std::fs;
use std::process::Command;
use std::thread;

crate::tests![
    a_second_vm_is_kept_out_until_the_first_is_killed,
    of_two_vms_with_a_rule_for_one_port_one_gets_it: any_qemu,
    a_qemu_without_rights_gets_devices_by_rule: any_qemu,
    a_guest_of_an_isolated_qemu_boots_from_the_stick: any_qemu,
    two_monitors_of_one_vm_do_not_mix_devices_up,
    a_busy_or_stopped_monitor_hangs_nobody,
    a_device_that_a_vm_gave_back_can_go_to_it_again_and_to_another: every_qemu,
    an_old_paused_qemu_that_keeps_what_it_gave_back_is_named: every_qemu,
    a_lock_of_who_may_only_read_the_node_keeps_nobody_out: any_qemu,
    a_rule_keeps_others_from_opening_a_node_at_all: any_qemu,
];

/// The README's rule.
fn a_rule_keeps_others_from_opening_a_node_at_all() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").start();
    let readme = include_str!("../../README.md");
    let rule = readme.split('`').find(|code| code.contains(r#"ACTION!="remove", MODE="0660""#));
    tool::rules(&format!("{}\n", rule.unwrap()));
    let stick = hardware.plug(Stick::new("SN1"), xhci(3));
    udev::settle();
    let node = stick.node();
    let opens = |user: &str| {
        let mut shell = Command::new("setpriv");
        shell.args(["--reuid", user, "--regid", user, "--clear-groups", "sh", "-c", ": <$0"]);
        shell.arg(&node).status().unwrap().success()
    };
    assert_eq!(["0", "65534"].map(opens), [true, false]);
    run(["attach", &vm.socket(), &stick.port]).succeeds();
    vm.gets(&[&stick]);
}

fn a_lock_of_who_may_only_read_the_node_keeps_nobody_out() {
    let mut hardware = Hardware::open();
    let (first, second) = (Vm::new("first").start(), Vm::new("second").start());
    let stick = hardware.plug(Stick::new("SN1"), xhci(3));
    let node = stick.node();
    let mut stranger = Command::new("setpriv")
        .args(["--pdeathsig", "KILL", "--reuid", "65534", "--clear-groups", "flock", "--no-fork"])
        .arg(&node)
        .args(["sleep", "3600"])
        .spawn()
        .unwrap();
    let pid = stranger.id();
    let info = format!("/proc/{pid}/fdinfo");
    wait_until("the stranger has its lock", || {
        let mut files = fs::read_dir(&info).into_iter().flatten().flatten();
        files.any(|file| fs::read_to_string(file.path()).is_ok_and(|info| info.contains("FLOCK")))
    });
    // Who cannot see what it has open must believe the lock, and says whose it is.
    let unseeing = ["setpriv", "--bounding-set", "-sys_ptrace", "--inh-caps", "-sys_ptrace"];
    let refused =
        tool::run_in(&unseeing, tool::PROGRAM, ["attach", &*first.socket(), &*stick.port]).exits(7);
    assert!(refused.stderr.contains(&format!("process {pid} (sleep)")), "{}", refused.stderr);
    run(["attach", "--dry-run", &first.socket(), &stick.port]).succeeds();
    let attached = run(["attach", &first.socket(), &stick.port]).succeeds();
    let said = format!("process {pid} (sleep) has locked the node");
    assert!(attached.stderr.contains(&said), "{}", attached.stderr);
    first.gets(&[&stick]);
    let refused = run(["attach", &second.socket(), &stick.port]).exits(7);
    let holder = format!("VM first (process {})", first.pid());
    assert!(refused.stderr.contains(&holder), "{}", refused.stderr);
    run(["detach", &first.socket(), &stick.port]).succeeds();
    run(["attach", &second.socket(), &stick.port]).succeeds();
    second.gets(&[&stick]);
    stranger.kill().unwrap();
    stranger.wait().unwrap();
    run(["attach", &first.socket(), &stick.port]).exits(7);
    run(["detach", &second.socket(), &stick.port]).succeeds();
    run(["attach", &first.socket(), &stick.port]).succeeds();
    first.gets(&[&stick]);
}

fn a_second_vm_is_kept_out_until_the_first_is_killed() {
    let mut hardware = Hardware::open();
    let (first, second) = (Vm::new("first").start(), Vm::new("second").start());
    let stick = hardware.plug(Stick::new("SN1"), xhci(3));
    run(["attach", &first.socket(), &stick.port]).succeeds();
    for force in [&[][..], &["--force"]] {
        let arguments = ["attach", &second.socket(), &stick.port];
        let refused = run(arguments.iter().chain(force)).exits(7);
        let holder = format!("VM first (process {})", first.pid());
        assert!(refused.stderr.contains(&holder), "{}", refused.stderr);
        second.loses_all();
    }
    first.gets(&[&stick]);
    first.kill();
    run(["attach", &second.socket(), &stick.port]).succeeds();
    second.gets(&[&stick]);
    run(["detach", &second.socket(), &stick.port]).succeeds();
    second.loses_all();
    wait_until("the host's driver is back", || stick.driver().as_deref() == Some("usb-storage"));
}

fn of_two_vms_with_a_rule_for_one_port_one_gets_it() {
    let mut hardware = Hardware::open();
    let (first, second) = (Vm::new("first").start(), Vm::new("second").start());
    let rule = |vm| tool::rule(r#"DEVPATH=="*/2-3""#, vm);
    tool::rules(&[rule(&first), rule(&second)].concat());
    let stick = hardware.plug(Stick::new("SN1"), xhci(3));
    first.gets(&[&stick]);
    udev::settle();
    second.loses_all();
    hardware.pull(&stick);
    first.loses_all();
}

fn a_qemu_without_rights_gets_devices_by_rule() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").unprivileged().start();
    tool::rules(&tool::rule(r#"DEVPATH=="*/2-3""#, &vm));
    for serial in ["SN1", "SN2"] {
        let stick = hardware.plug(Stick::new(serial), xhci(3));
        vm.gets(&[&stick]);
        hardware.pull(&stick);
        vm.loses_all();
    }
}

fn a_guest_of_an_isolated_qemu_boots_from_the_stick() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").isolated().paused().start();
    tool::rules(&tool::rule(r#"DEVPATH=="*/2-3""#, &vm));
    let stick = hardware.plug(Stick::bootable("SN1", "booted from SN1"), xhci(3));
    vm.gets(&[&stick]);
    vm.boot();
    vm.wait_for_debug("booted from SN1");
    assert_eq!(stick.driver().as_deref(), Some("usbfs"));
    run(["detach", &vm.socket(), &stick.port]).succeeds();
    vm.loses_all();
    wait_until("the host's driver is back", || stick.driver().as_deref() == Some("usb-storage"));
}

fn two_monitors_of_one_vm_do_not_mix_devices_up() {
    let mut hardware = Hardware::open();
    let other = "/run/vm/other.qmp";
    let vm = Vm::new("a").argument("-qmp", &format!("unix:{other},server=on,wait=off")).start();
    let sticks = (1..=4).map(|n| (Stick::new(&format!("SN{n}")).into(), xhci(n)));
    let sticks = hardware.plug_all(sticks.collect());
    let socket = vm.socket();
    thread::scope(|scope| {
        for (stick, monitor) in sticks.iter().zip([&socket, other].into_iter().cycle()) {
            scope.spawn(|| run(["attach", monitor, &stick.port]).succeeds());
        }
    });
    vm.gets(&sticks.iter().collect::<Vec<_>>());
    vm.must_have_no_spare_descriptors();
    let shown = run(["inspect", "--json", &socket]).succeeds().stdout;
    let shown: serde_json::Value = serde_json::from_str(&shown).unwrap();
    for device in shown["devices"].as_array().unwrap() {
        assert_eq!(device["host"]["state"], "present", "{device}");
    }
}

fn a_busy_or_stopped_monitor_hangs_nobody() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").start();
    let stick = hardware.plug(Stick::new("SN1"), xhci(3));
    let attach = || tool::run_hastily(["attach", &vm.socket(), &stick.port]);
    let held = std::os::unix::net::UnixStream::connect(vm.socket()).unwrap();
    let refused = attach().exits(5);
    assert!(refused.stderr.contains("another client holds"), "{}", refused.stderr);
    drop(held);
    vm.signal(rustix::process::Signal::STOP);
    attach().exits(5);
    vm.signal(rustix::process::Signal::CONT);
    // Nothing of the attempts is left to happen later.
    run(["detach", &vm.socket(), &stick.port]).exits(3);
    vm.loses_all();
    run(["attach", &vm.socket(), &stick.port]).succeeds();
    vm.gets(&[&stick]);
}

fn a_device_that_a_vm_gave_back_can_go_to_it_again_and_to_another() {
    let mut hardware = Hardware::open();
    let (first, second) = (Vm::new("first").start(), Vm::new("second").start());
    let stick = hardware.plug(Stick::new("SN1"), xhci(3));
    for _ in 0..3 {
        run(["attach", &first.socket(), &stick.port]).succeeds();
        first.gets(&[&stick]);
        run(["attach", &second.socket(), &stick.port]).exits(7);
        run(["detach", &first.socket(), &stick.port]).succeeds();
        first.loses_all();
    }
    run(["attach", &second.socket(), &stick.port]).succeeds();
    second.gets(&[&stick]);
}

fn an_old_paused_qemu_that_keeps_what_it_gave_back_is_named() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").paused().start();
    let mouse = hardware.plug(Device::Mouse, xhci(3));
    let attach = || run(["attach", &vm.socket(), &mouse.port]);
    attach().succeeds();
    run(["detach", &vm.socket(), &mouse.port]).succeeds();
    let is_old = ["5.2", "7.2"].contains(&std::env::var("LAB_QEMU").unwrap().as_str());
    if is_old {
        let refused = attach().exits(7).stderr;
        assert!(refused.contains("still holds 1-3") && refused.contains("resume"), "{refused}");
        vm.boot();
    }
    attach().succeeds();
    vm.gets(&[&mouse]);
}
