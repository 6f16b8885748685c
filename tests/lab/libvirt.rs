//! Domains of a real libvirtd, which nobody has changed for this tool.

use crate::daemon::{CONFIG, Daemon, rule};
use crate::hardware::{Hardware, Stick, xhci};
use crate::libvirtd::{EDITOR, Libvirtd, PERSON, Whose};
use crate::tool::{self, PROGRAM, SECONDS, run, run_hastily};
use crate::udev;
use crate::vm::Vm;
use crate::wait::wait_until;
use rustix::process::Signal;
use serde_json::json;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

crate::tests![
    a_domain_gets_a_device_by_hand: qemu_7,
    a_domain_gets_and_loses_a_device_by_rule_five_times: qemu_7,
    a_domain_that_watch_keeps_may_come_and_go: qemu_7,
    libvirtd_may_come_and_go_while_watch_keeps_a_domain: qemu_7,
    a_domain_that_is_restored_gets_its_device_once_it_runs: qemu_7,
    a_domain_that_was_saved_with_a_device_is_rescued: qemu_7,
    apparmor_confines_a_domain_and_minds_no_device_that_is_passed: qemu_7,
    what_a_hostdev_has_is_refused: qemu_7,
    a_domain_of_a_users_own_gets_a_device_from_that_user_and_from_root: qemu_7,
];

fn a_domain_gets_a_device_by_hand() {
    let mut hardware = Hardware::open();
    let stick = hardware.plug(Stick::new("SN1"), xhci(3));
    let there_is_none = run(["inspect", "libvirt:test 1"]).exits(4).stderr;
    assert!(there_is_none.contains("start virtqemud or libvirtd"), "{there_is_none}");

    let libvirtd = Libvirtd::start(Whose::System);
    let unknown = run(["inspect", "libvirt:test 1"]).exits(4).stderr;
    assert!(unknown.contains("no such domain"), "{unknown}");
    libvirtd.define("test 1", "");
    let off = run(["attach", "libvirt:test 1", &stick.port]).exits(4).stderr;
    assert!(off.contains("the domain is not running"), "{off}");

    let vm = libvirtd.start_domain("test 1");
    let said = run(["attach", "libvirt:test 1", &stick.port]).succeeds().stdout;
    assert!(said.contains(&format!("to libvirt:test 1 as {}", stick.id_in_vm())), "{said}");
    vm.must_have(&stick);
    vm.must_have_no_spare_descriptors();
    let again = run(["attach", "libvirt:test 1", &stick.port]).succeeds().stdout;
    assert!(again.contains("already"), "{again}");
    let shown = run(["inspect", "libvirt:test 1"]).succeeds().stdout;
    assert!(shown.contains(&format!("{} 46f4:0001 present", stick.address)), "{shown}");

    let vms = run(["vms"]).succeeds().stdout;
    assert!(vms.contains("  free        libvirt:test 1\n"), "{vms}");
    assert!(vms.contains("14 of 15 on usb.0"), "{vms}");
    let by_name = run(["inspect", "test 1"]).succeeds().stdout;
    assert_eq!(by_name, shown);
    let written = run(["rule", &stick.port, "--toml", "--vm", "test 1"]).succeeds().stdout;
    assert!(written.contains("libvirt = \"test 1\""), "{written}");
    fs::write(CONFIG, written).unwrap();
    run(["detach", "libvirt:test 1", &stick.port]).succeeds();
    run(["--config", CONFIG, "sync"]).succeeds();
    vm.must_have(&stick);

    libvirtd.signal(Signal::STOP);
    let start = Instant::now();
    let late = run_hastily(["detach", "libvirt:test 1", &stick.port]).exits(5).stderr;
    assert!(late.contains("libvirt is stopped"), "{late}");
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
    libvirtd.signal(Signal::CONT);

    run(["detach", "libvirt:test 1", &stick.port]).succeeds();
    vm.loses_all();
    wait_until("the driver is back", || stick.driver().as_deref() == Some("usb-storage"));
}

/// A rule for port 2-3 and a domain.
fn tool_rule(domain: &str) -> String {
    format!(
        "SUBSYSTEM==\"usb\", ENV{{DEVTYPE}}==\"usb_device\", ACTION==\"add|remove\", DEVPATH==\"*/2-3\", \
         RUN+=\"'{PROGRAM}' --timeout {SECONDS} udev libvirt:{domain}\"\n"
    )
}

fn a_domain_gets_and_loses_a_device_by_rule_five_times() {
    let mut hardware = Hardware::open();
    let libvirtd = Libvirtd::start(Whose::System);
    let vm = libvirtd.domain("test-1");
    tool::rules(&tool_rule("test-1"));
    for round in 1..=5 {
        let stick = hardware.plug(Stick::new(&format!("SN{round}")), xhci(3));
        vm.gets(&[&stick]);
        hardware.pull(&stick);
        vm.loses_all();
    }
}

fn a_domain_that_watch_keeps_may_come_and_go() {
    let mut hardware = Hardware::open();
    let libvirtd = Libvirtd::start(Whose::System);
    libvirtd.define("test-1", "");
    fs::write(CONFIG, "[vm.a]\nlibvirt = \"test-1\"\n".to_owned() + &rule("a", "port = \"2-3\""))
        .unwrap();
    let daemon = Daemon::start();
    let stick = hardware.plug(Stick::new("SN1"), xhci(3));
    for _ in 0..2 {
        let vm = libvirtd.start_domain("test-1");
        vm.gets(&[&stick]);
        libvirtd.virsh(&["destroy", "test-1"]);
        wait_until("the driver is back", || stick.driver().as_deref() == Some("usb-storage"));
        daemon.wait_for_status("1 VM, 0 running, 0 devices attached");
    }
}

fn libvirtd_may_come_and_go_while_watch_keeps_a_domain() {
    let mut hardware = Hardware::open();
    let libvirtd = Libvirtd::start(Whose::System);
    libvirtd.define("test-1", "");
    fs::write(CONFIG, "[vm.a]\nlibvirt = \"test-1\"\n".to_owned() + &rule("a", "port = \"2-3\""))
        .unwrap();
    let daemon = Daemon::start();
    let stick = hardware.plug(Stick::new("SN1"), xhci(3));
    // While it is away, a device leaves and another one comes.
    let vm = libvirtd.start_domain("test-1");
    vm.gets(&[&stick]);
    libvirtd.stop();
    hardware.pull(&stick);
    let next = hardware.plug(Stick::new("SN2"), xhci(3));
    daemon.wait_for_log(&["a: ", "start virtqemud or libvirtd"]);
    assert_eq!(vm.ids(), [stick.id_in_vm()]);
    let libvirtd = Libvirtd::start(Whose::System);
    wait_until("the next one is there", || vm.has(&next));

    // And while it hangs.
    libvirtd.signal(Signal::STOP);
    hardware.pull(&next);
    let last = hardware.plug(Stick::new("SN3"), xhci(3));
    libvirtd.signal(Signal::CONT);
    wait_until("the last one is there", || vm.has(&last));
    vm.must_have(&last);
    hardware.pull(&last);
    vm.loses_all();
}

fn a_domain_that_is_restored_gets_its_device_once_it_runs() {
    let mut hardware = Hardware::open();
    let libvirtd = Libvirtd::start(Whose::System);
    let before = libvirtd.domain("test-1");
    libvirtd.virsh(&["managedsave", "test-1"]);
    drop(before);
    fs::write(CONFIG, "[vm.a]\nlibvirt = \"test-1\"\n".to_owned() + &rule("a", "port = \"2-3\""))
        .unwrap();
    let daemon = Daemon::start();
    let stick = hardware.plug(Stick::new("SN1"), xhci(3));
    let vm = libvirtd.start_domain("test-1");
    vm.gets(&[&stick]);
    wait_until("libvirt lets it run", || vm.qmp("query-status", json!({}))["running"] == true);
    vm.must_have(&stick);
    daemon.wait_for_status("1 VM, 1 running, 1 device attached");
}

/// As the README says.
fn a_domain_that_was_saved_with_a_device_is_rescued() {
    let mut hardware = Hardware::open();
    let libvirtd = Libvirtd::start(Whose::System);
    let vm = libvirtd.domain("test-1");
    let stick = hardware.plug(Stick::new("SN1"), xhci(3));
    run(["attach", "libvirt:test-1", &stick.port]).succeeds();
    libvirtd.virsh(&["managedsave", "test-1"]);
    drop(vm);
    let refused = libvirtd.try_virsh(&["start", "test-1"]).unwrap_err();
    let section = refused.split_once("Unknown savevm section or instance '").expect(&refused).1;
    // '0000:00:01.2/15/usb-host'
    let port = section.split('/').nth(1).unwrap();
    assert_eq!(port, "15", "{refused}");
    let readme = include_str!("../../README.md");
    let lines: String = readme
        .lines()
        .skip_while(|line| !line.trim().starts_with("<qemu:arg value='-device'/>"))
        .take(2)
        .map(str::trim)
        .collect();
    assert!(lines.contains(r#""id":"rescue""#), "{lines}");
    let lines = lines.replace(r#""port":"2""#, &format!(r#""port":"{port}""#));
    fs::write("/run/lines.sed", format!("s|</qemu:commandline>|{lines}&|\n")).unwrap();
    fs::write(EDITOR, "#!/bin/sh\nsed -i -f /run/lines.sed \"$1\"\n").unwrap();
    fs::set_permissions(EDITOR, fs::Permissions::from_mode(0o755)).unwrap();
    libvirtd.virsh(&["managedsave-edit", "test-1"]);
    let vm = libvirtd.start_domain("test-1");
    wait_until("libvirt lets it run", || vm.qmp("query-status", json!({}))["running"] == true);
    run(["detach", "libvirt:test-1", "rescue"]).succeeds();
    assert_eq!(vm.usb_devices(), [""; 0]);
    run(["attach", "libvirt:test-1", &stick.port]).succeeds();
    vm.gets(&[&stick]);
}

fn apparmor_confines_a_domain_and_minds_no_device_that_is_passed() {
    let mut hardware = Hardware::open();
    let libvirtd = Libvirtd::start_confined();
    let vm = libvirtd.domain("test-1");
    let profile = fs::read_to_string(format!("/proc/{}/attr/current", vm.pid())).unwrap();
    assert!(profile.starts_with("libvirt-") && profile.contains("(enforce)"), "{profile}");
    // By hand, and not as long as QEMU itself opens it.
    let stick = hardware.plug(Stick::new("SN1"), xhci(3));
    let by_address = json!({"driver": "usb-host", "hostbus": stick.bus, "hostaddr": stick.address});
    let refusal = vm.try_qmp("device_add", by_address).unwrap_err();
    assert!(refusal.contains("failed to"), "{refusal}");
    udev::settle();
    run(["attach", "libvirt:test-1", &stick.port]).succeeds();
    vm.gets(&[&stick]);
    run(["detach", "libvirt:test-1", &stick.port]).succeeds();
    hardware.pull(&stick);
    // By a rule.
    tool::rules(&tool_rule("test-1"));
    let stick = hardware.plug(Stick::new("SN2"), xhci(3));
    vm.gets(&[&stick]);
    hardware.pull(&stick);
    vm.loses_all();
    udev::forget_rules();
    // By the daemon.
    fs::write(CONFIG, "[vm.a]\nlibvirt = \"test-1\"\n".to_owned() + &rule("a", "port = \"2-3\""))
        .unwrap();
    let _daemon = Daemon::start();
    let stick = hardware.plug(Stick::new("SN3"), xhci(3));
    vm.gets(&[&stick]);
    hardware.pull(&stick);
    vm.loses_all();
}

fn what_a_hostdev_has_is_refused() {
    let mut hardware = Hardware::open();
    let libvirtd = Libvirtd::start(Whose::System);
    let stick = hardware.plug(Stick::new("SN1"), xhci(3));
    let (bus, address) = (stick.bus, stick.address);
    libvirtd.define(
        "has",
        &format!(
            "<hostdev mode='subsystem' type='usb'><source><address bus='{bus}' device='{address}'/></source></hostdev>"
        ),
    );
    let has = libvirtd.start_domain("has");
    let wants = Vm::new("wants").start();
    let held = run(["attach", &wants.socket(), &stick.port]).exits(7).stderr;
    assert!(held.contains(&format!("VM has (process {})", has.pid())), "{held}");
    assert!(has.open_nodes().contains(&stick.node()));
    assert_ne!(stick.driver().as_deref(), Some("usb-storage"));
}

fn a_domain_of_a_users_own_gets_a_device_from_that_user_and_from_root() {
    let mut hardware = Hardware::open();
    let libvirtd = Libvirtd::start(Whose::Persons);
    let vm = libvirtd.domain("own");
    let stick = hardware.plug(Stick::new("SN1"), xhci(3));
    let copy = "/run/usb-qmp-hotplug";
    fs::copy(PROGRAM, copy).unwrap();
    let own = |words: &[&str]| {
        let mut command = Whose::Persons.command(&[copy, "--timeout", SECONDS]);
        let status = command.args(words).status().unwrap();
        assert!(status.success(), "{words:?}: {status}");
    };
    for domain in ["libvirt:person@session/own", &format!("libvirt:{PERSON}@session/own")] {
        run(["attach", domain, &stick.port]).succeeds();
        vm.gets(&[&stick]);
        run(["detach", domain, &stick.port]).succeeds();
        vm.loses_all();
    }
    fs::set_permissions(stick.node(), fs::Permissions::from_mode(0o666)).unwrap();
    own(&["attach", "libvirt:session/own", &stick.port]);
    vm.gets(&[&stick]);
    own(&["detach", "libvirt:session/own", &stick.port]);
    vm.loses_all();
}
