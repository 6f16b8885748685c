//! The daemon as a service: what it tells systemd, signals, and a configuration that changes.

use crate::daemon::{self, CONFIG, Daemon, configuration, configure, rule};
use crate::hardware::{Device, Hardware, Stick, xhci};
use crate::host::must;
use crate::journal::Journal;
use crate::tool;
use crate::vm::Vm;
use crate::wait::{PATIENCE, wait_until};
use rustix::process::Signal;
use serde_json::json;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::thread;
use std::time::{Duration, Instant};

crate::tests![
    it_is_ready_when_the_first_sync_is_done_and_says_how_things_stand: any_qemu,
    a_good_configuration_takes_over: any_qemu,
    a_configuration_counts_for_what_waits_since_before_it: waits,
    a_bad_configuration_changes_nothing_and_is_told_line_by_line: any_qemu,
    a_configuration_that_is_a_pipe_does_not_stop_it: any_qemu,
    a_bad_configuration_at_the_start_is_an_error: any_qemu,
    the_journal_has_each_line_once: any_qemu,
    the_watchdog_is_told_that_it_lives: any_qemu,
    it_ends_at_once_and_what_is_attached_stays: any_qemu,
    it_takes_its_devices_along_where_that_is_wanted: any_qemu,
    it_waits_at_its_end_for_a_vm_that_has_to_give_up_its_devices: waits,
    idle_it_never_wakes: waits,
];

fn it_is_ready_when_the_first_sync_is_done_and_says_how_things_stand() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").start();
    let stick = hardware.plug(Stick::new("SN1"), xhci(3));
    configure(&["a", "b", "c"], &rule("a", "port = \"2-3\""));
    let daemon = Daemon::start();
    vm.must_have(&stick);
    let said = daemon.said();
    let ready = said.iter().position(|line| line == "READY=1").unwrap();
    assert_eq!(said[ready + 1], "STATUS=3 VMs, 1 running, 1 device attached");
    hardware.pull(&stick);
    daemon.wait_for_status("3 VMs, 1 running, 0 devices attached");
    vm.kill();
    daemon.wait_for_status("3 VMs, 0 running, 0 devices attached");
}

fn a_good_configuration_takes_over() {
    let mut hardware = Hardware::open();
    let (a, b) = (Vm::new("a").start(), Vm::new("b").start());
    let stick = hardware.plug(Stick::new("SN1"), xhci(3));
    let mouse = hardware.plug(Device::Mouse, xhci(4));
    configure(&["a"], &rule("a", "port = \"2-3\""));
    let daemon = Daemon::start();
    configure(&["a", "b"], &(rule("b", "port = \"1-4\"") + &rule("a", "port = \"1-5\"")));
    daemon.reload();
    b.gets(&[&mouse]);
    let said = daemon.said();
    let reloading = said.iter().position(|line| line == "RELOADING=1").unwrap();
    assert!(said[reloading + 1].starts_with("MONOTONIC_USEC="), "{said:?}");
    assert!(said[reloading..].iter().any(|line| line == "READY=1"), "{said:?}");
    // What is attached stays until it is pulled.
    a.must_have(&stick);
    hardware.pull(&stick);
    a.loses_all();
    let mouse = hardware.plug(Device::Mouse, xhci(5));
    a.gets(&[&mouse]);
    // A VM that is not in it any more is left alone.
    configure(&["b"], "");
    daemon.reload();
    daemon.wait_for_status("1 VM, 1 running, 1 device attached");
    a.must_have(&mouse);
}

fn a_configuration_counts_for_what_waits_since_before_it() {
    let mut hardware = Hardware::open();
    let (a, b) = (Vm::new("a").start(), Vm::new("b").start());
    configure(&["a", "b"], &rule("a", "port = \"1-3\""));
    let daemon = Daemon::launch(&["--timeout", "15"], &[]);
    daemon.wait_until_it_says("READY=1");
    a.signal(Signal::STOP);
    let moves = hardware.plug(Device::Mouse, xhci(3));
    daemon.wait_for_log(&["a does not answer"]);
    configure(&["a", "b"], &(rule("b", "port = \"1-3\"") + &rule("a", "port = \"1-4\"")));
    daemon.reload();
    b.gets(&[&moves]);
    a.signal(Signal::CONT);
    // Work is done in order: this one comes last.
    let last = hardware.plug(Device::Mouse, xhci(4));
    a.gets(&[&last]);
    b.gets(&[&moves]);
}

fn a_bad_configuration_changes_nothing_and_is_told_line_by_line() {
    let mut hardware = Hardware::open();
    let journal = Journal::journald();
    let vm = Vm::new("a").start();
    configure(&["a"], &rule("a", "port = \"2-3\""));
    let daemon = Daemon::start();
    configure(&["b"], &rule("a", "prot = \"2-4\""));
    daemon.reload();
    let unknown = journal.wait_for(&format!("{CONFIG}:4:6: "));
    let misspelt = journal.wait_for(&format!("{CONFIG}:5:1: "));
    assert!(misspelt["MESSAGE"].contains("`port`"), "{misspelt:?}");
    for entry in [unknown, misspelt, journal.wait_for("the old configuration stays")] {
        assert_eq!((&*entry["PRIORITY"], entry["MESSAGE"].lines().count()), ("3", 1), "{entry:?}");
    }
    let status = "1 VM, 1 running, 0 devices attached";
    let bad = "; the configuration is bad, the one before it stays in force";
    daemon.wait_for_status(&format!("{status}{bad}"));
    let stick = hardware.plug(Stick::new("SN1"), xhci(3));
    vm.gets(&[&stick]);
    hardware.pull(&stick);
    vm.loses_all();
    fs::remove_file(CONFIG).unwrap();
    daemon.reload();
    journal.wait_for("cannot read the configuration");
    configure(&["a"], &rule("a", "port = \"2-4\""));
    daemon.reload();
    daemon.wait_for_status(status);
}

fn a_configuration_that_is_a_pipe_does_not_stop_it() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").start();
    configure(&["a"], &rule("a", "port = \"2-3\""));
    let daemon = Daemon::launch(&["--timeout", "15"], &[]);
    daemon.wait_until_it_says("READY=1");
    fs::remove_file(CONFIG).unwrap();
    must("mkfifo", &[CONFIG]);
    daemon.signal(Signal::HUP);
    daemon.wait_until_it_says("RELOADING=1");
    let stick = hardware.plug(Stick::new("SN1"), xhci(3));
    vm.gets(&[&stick]);
    daemon.wait_for_log(&["cannot read the configuration", "no regular file"]);
    fs::remove_file(CONFIG).unwrap();
    configure(&["a", "b"], "");
    daemon.signal(Signal::HUP);
    daemon.wait_for_status("2 VMs, 1 running, 1 device attached");
}

fn a_bad_configuration_at_the_start_is_an_error() {
    fs::write(CONFIG, "[vm.a]\n").unwrap();
    let mut daemon = Daemon::launch(&[], &[]);
    assert_eq!(daemon.wait().code(), Some(2));
    daemon.wait_for_log(&[&format!("{CONFIG}:1:"), "qmp"]);
    assert_eq!(daemon.said(), [""; 0]);
}

fn the_journal_has_each_line_once() {
    let journal = Journal::journald();
    configure(&["a"], "");
    // systemd names the stream that standard error is.
    let stream = daemon::log_file().metadata().unwrap();
    let stream = format!("{}:{}", stream.dev(), stream.ino());
    let mut daemon = Daemon::launch(&[], &[("JOURNAL_STREAM", &stream)]);
    journal.wait_for("ready: 1 VM");
    daemon.signal(Signal::TERM);
    daemon.wait();
    assert_eq!(daemon.log(), "");
    // Somebody else's stream.
    let daemon = Daemon::launch(&[], &[("JOURNAL_STREAM", "1:1")]);
    daemon.wait_for_log(&["ready: 1 VM"]);
}

fn the_watchdog_is_told_that_it_lives() {
    configure(&["a"], "");
    let daemon = Daemon::launch(&[], &[("WATCHDOG_USEC", "300000")]);
    let told = || daemon.said().iter().filter(|line| *line == "WATCHDOG=1").count();
    wait_until("the watchdog is told", || told() > 3);
    daemon.freeze();
    let before = told();
    thread::sleep(Duration::from_millis(300));
    assert!(told() <= before + 1, "somebody else tells it");
    daemon.thaw();
    wait_until("the watchdog is told again", || told() > before + 3);
    drop(daemon);
    let none = Daemon::launch(&[], &[("WATCHDOG_USEC", "0")]);
    none.wait_until_it_says("READY=1");
}

fn it_takes_its_devices_along_where_that_is_wanted() {
    let mut hardware = Hardware::open();
    let (a, b) = (Vm::new("a").start(), Vm::new("b").start());
    let plugged =
        hardware.plug_all(vec![(Stick::new("SN1").into(), xhci(3)), (Device::Mouse, xhci(4))]);
    let text = configuration(&["a", "b", "off"], &rule("a", "port = \"2-3\""));
    fs::write(CONFIG, format!("detach_at_stop = true\n{text}")).unwrap();
    let mut daemon = Daemon::start();
    a.gets(&[&plugged[0]]);
    // One that a person has attached is this tool's, too; another one is not.
    tool::run(["attach", &b.socket(), &plugged[1].port]).succeeds();
    let theirs = json!({"driver": "usb-host", "id": "theirs", "vendorid": 1, "productid": 1});
    b.qmp("device_add", theirs);
    daemon.signal(Signal::TERM);
    assert_eq!(daemon.wait().code(), Some(0));
    a.must_be_clean();
    assert_eq!(b.ids(), ["theirs"]);
    assert_eq!(plugged[1].driver().as_deref(), Some("usbhid"));
}

fn it_waits_at_its_end_for_a_vm_that_has_to_give_up_its_devices() {
    const TIMEOUT: Duration = Duration::from_secs(5);
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").start();
    let stick = hardware.plug(Stick::new("SN1"), xhci(3));
    let text = configuration(&["a"], &rule("a", "port = \"2-3\""));
    fs::write(CONFIG, format!("detach_at_stop = true\n{text}")).unwrap();
    let mut daemon = Daemon::launch(&["--timeout", &TIMEOUT.as_secs().to_string()], &[]);
    vm.gets(&[&stick]);
    daemon.wait_for_status("1 VM, 1 running, 1 device attached");
    vm.signal(Signal::STOP);
    daemon.signal(Signal::TERM);
    daemon.wait_until_it_says("STOPPING=1");
    // Longer than it waits at other times.
    thread::sleep(TIMEOUT + Duration::from_secs(1));
    vm.signal(Signal::CONT);
    assert_eq!(daemon.wait().code(), Some(0));
    vm.must_be_clean();

    // Who does not want to wait says so a second time.
    let mut daemon = Daemon::start();
    vm.gets(&[&stick]);
    vm.signal(Signal::STOP);
    daemon.signal(Signal::INT);
    daemon.wait_until_it_says("STOPPING=1");
    daemon.signal(Signal::INT);
    assert_eq!(daemon.wait().code(), Some(0));
    assert!(daemon.log().contains("told to end a second time"), "{}", daemon.log());
    vm.signal(Signal::CONT);
    vm.must_have(&stick);
}

fn it_ends_at_once_and_what_is_attached_stays() {
    let mut hardware = Hardware::open();
    let (a, b) = (Vm::new("a").start(), Vm::new("b").start());
    let stick = hardware.plug(Stick::new("SN1"), xhci(3));
    configure(&["a", "b"], &(rule("a", "port = \"2-3\"") + &rule("b", "port = \"1-4\"")));
    for signal in [Signal::TERM, Signal::INT] {
        let mut daemon = Daemon::start();
        a.gets(&[&stick]);
        // Not even a VM that hangs holds it up.
        b.signal(Signal::STOP);
        let mouse = hardware.plug(Device::Mouse, xhci(4));
        let asked = Instant::now();
        daemon.signal(signal);
        assert_eq!(daemon.wait().code(), Some(0));
        assert!(asked.elapsed() < PATIENCE / 2, "{:?}", asked.elapsed());
        wait_until("it says so", || daemon.said().last().is_some_and(|line| line == "STOPPING=1"));
        a.must_have(&stick);
        hardware.pull(&mouse);
        b.signal(Signal::CONT);
    }
}

fn idle_it_never_wakes() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").start();
    let stick = hardware.plug(Stick::new("SN1"), xhci(3));
    configure(&["a", "b"], &rule("a", "port = \"2-3\""));
    let daemon = Daemon::start();
    vm.must_have(&stick);
    // Nor while somebody holds a monitor.
    let holder = std::os::unix::net::UnixStream::connect(vm.socket()).unwrap();
    // Longer than it has for its start: no timer of that may be left.
    daemon.must_sleep_for(Duration::from_secs(35));
    drop(holder);
}
