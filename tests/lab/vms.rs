//! `vms`: the QEMUs of this host, and their monitors.

use crate::hardware::{Hardware, Stick, xhci};
use crate::tool::{self, run};
use crate::vm::Vm;
use crate::wait::{PATIENCE, wait_for, wait_until};
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::Signal;
use serde_json::{Value, json};
use std::fs;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Child, Command};
use std::time::Instant;

crate::tests![
    a_free_monitor_tells_of_free_ports_and_is_free_afterwards: any_qemu,
    a_held_monitor_tells_who_holds_it: any_qemu,
    a_domain_is_shown_as_one_though_libvirt_is_away: any_qemu,
    a_vm_that_runs_is_given_a_monitor_that_is_found: any_qemu,
    monitors_of_every_kind_are_found: every_qemu,
    a_stopped_qemu_does_not_hang_it: any_qemu,
    another_user_is_told_what_it_may_not_see: any_qemu,
    a_vm_of_the_configuration_that_does_not_run_is_shown: any_qemu,
];

fn a_free_monitor_tells_of_free_ports_and_is_free_afterwards() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").start();
    let isolated = Vm::new("b").isolated().start();
    let stick = hardware.plug(Stick::new("SN1"), xhci(3));
    run(["attach", &vm.socket(), &stick.port]).succeeds();
    let vms = vms();
    let report = of(&vms, vm.pid());
    assert_eq!((&report["name"], &report["user"]), (&json!("a"), &json!("root")));
    assert_eq!(report["status"], "running");
    assert_eq!(monitor(report, "a.qmp")["state"], "free");
    assert_eq!(report["controllers"], json!([{"bus": "xhci.0", "ports": 15, "free": 14}]));
    let report = of(&vms, isolated.pid());
    assert_eq!(monitor(report, "b.qmp")["state"], "free");
    assert_eq!(monitor(report, "b.qmp")["socket"], isolated.socket());
    let shown = run(["vms"]).succeeds().stdout;
    assert!(shown.contains("14 of 15 on xhci.0"), "{shown}");
    run(["detach", &vm.socket(), &stick.port]).succeeds();
}

fn a_held_monitor_tells_who_holds_it() {
    let vm = Vm::new("a").start();
    // The test itself has the one for checks.
    let vms = vms();
    let held = monitor(of(&vms, vm.pid()), "a.check");
    assert_eq!(held["state"], "held");
    assert_eq!(held["held_by"][0]["pid"], std::process::id());
    assert_eq!(of(&vms, vm.pid())["to_add"], Value::Null, "the other one is free");
}

fn a_domain_is_shown_as_one_though_libvirt_is_away() {
    let directory = "/run/libvirt/qemu/domain-1-web1";
    fs::create_dir_all(directory).unwrap();
    let path = format!("{directory}/monitor.sock");
    let _ = fs::remove_file(&path);
    let socket = UnixListener::bind(&path).unwrap();
    fcntl_setfd(&socket, FdFlags::empty()).unwrap();
    let chardev = format!("socket,id=charmonitor,fd={},server=on,wait=off", socket.as_raw_fd());
    let qemu = qemu(
        "/",
        &[
            "-name",
            "guest=web1,debug-threads=on",
            "-chardev",
            &chardev,
            "-mon",
            "chardev=charmonitor,id=monitor,mode=control",
        ],
    );
    drop(socket);
    wait_until("its command line", || {
        fs::read_to_string(format!("/proc/{}/cmdline", qemu.pid())).unwrap().contains("web1")
    });
    let vms = vms();
    let report = of(&vms, qemu.pid());
    assert_eq!((&report["libvirt"], &report["name"]), (&json!(true), &json!("web1")));
    let monitors = report["monitors"].as_array().unwrap();
    assert_eq!(monitors.len(), 1, "{report}");
    assert_eq!(
        (&monitors[0]["socket"], &monitors[0]["state"]),
        (&json!("libvirt:web1"), &json!("gone"))
    );
    assert_eq!(report["to_add"], Value::Null);
    let shown = run(["vms"]).succeeds().stdout;
    assert!(shown.contains("libvirt:web1") && shown.contains("libvirt does not listen"), "{shown}");
    let named = run(["inspect", "web1"]).exits(4).stderr;
    assert!(named.contains("VM libvirt:web1: libvirt does not listen"), "{named}");
}

/// Since QEMU 11.1; before, it is only told.
fn a_vm_that_runs_is_given_a_monitor_that_is_found() {
    fs::create_dir_all("/run/vm").unwrap();
    let _ = fs::remove_file("/run/grows.qmp");
    let qemu = qemu("/", &["-name", "grows", "-monitor", "unix:/run/vm/people,server=on,wait=off"]);
    let people = wait_for("its monitor", || UnixStream::connect("/run/vm/people").ok());
    drop(people);
    let vms = vms();
    let advice = &of(&vms, qemu.pid())["to_paste"];
    let line = advice["lines"].as_str().unwrap();
    assert!(
        advice["to"] == "shell" && line.ends_with("socat - UNIX-CONNECT:/run/vm/people"),
        "{line}"
    );
    let shown = run(["vms"]).succeeds().stdout;
    assert!(shown.contains("Or if it is QEMU 11.1 or later, run, while it runs:"), "{shown}");
    if std::env::var("LAB_QEMU").unwrap() != "11.1" {
        return;
    }
    // As the line does it.
    let mut people = UnixStream::connect("/run/vm/people").unwrap();
    for command in line.split('\'').filter(|part| part.contains("usb")) {
        writeln!(people, "{command}").unwrap();
    }
    wait_until("the new monitor", || UnixStream::connect("/run/grows.qmp").is_ok());
    drop(people);
    let report = self::vms();
    let report = of(&report, qemu.pid());
    let found = monitor(report, "grows.qmp");
    assert_eq!((&found["state"], &found["socket"]), (&json!("free"), &json!("/run/grows.qmp")));
    assert_eq!((&report["to_add"], &report["to_paste"]), (&Value::Null, &Value::Null));
    let shown = run(["inspect", "grows"]).succeeds().stdout;
    assert!(shown.contains("VM grows: QEMU 11.1"), "{shown}");

    let chardev = "socket,id=m,path=/run/vm/object.qmp,server=on,wait=off";
    let json = r#"{"qom-type": "monitor-qmp", "id": "q", "chardev": "m"}"#;
    for object in ["monitor-qmp,id=q,chardev=m", json] {
        let _ = fs::remove_file("/run/vm/object.qmp");
        let arguments = ["-name", "object", "-chardev", chardev, "-object", object];
        let _qemu = self::qemu("/", &arguments);
        wait_until("it listens", || UnixStream::connect("/run/vm/object.qmp").is_ok());
        let shown = run(["inspect", "object"]).succeeds().stdout;
        assert!(shown.contains("VM object: QEMU 11.1"), "{shown}");
    }
}

fn monitors_of_every_kind_are_found() {
    fs::create_dir_all("/run/vm").unwrap();
    let relative =
        qemu("/run/vm", &["-name", "relative", "-qmp", "unix:rel.qmp,server=on,wait=off"]);
    let tcp = qemu("/", &["-name", "tcp", "-qmp-pretty", "tcp:127.0.0.1:4444,server=on,wait=off"]);
    let none = qemu("/", &["-name", "none,process=renamed"]);
    let removed = qemu(
        "/run/vm",
        &[
            "-chardev",
            "socket,id=m,path=/run/vm/x.qmp,server=on,wait=off",
            "-mon",
            "m,mode=control",
        ],
    );
    for socket in ["/run/vm/rel.qmp", "/run/vm/x.qmp"] {
        wait_until("it listens", || UnixStream::connect(socket).is_ok());
    }
    fs::remove_file("/run/vm/x.qmp").unwrap();
    wait_until("it is renamed", || {
        fs::read_to_string(format!("/proc/{}/comm", none.pid())).unwrap() == "renamed\n"
    });
    let vms = vms();
    let found = monitor(of(&vms, relative.pid()), "rel.qmp");
    assert_eq!((&found["socket"], &found["state"]), (&json!("/run/vm/rel.qmp"), &json!("free")));
    let report = of(&vms, tcp.pid());
    assert_eq!(report["monitors"][0]["state"], "unusable");
    assert_eq!(report["to_add"]["lines"], "-qmp unix:/run/tcp.qmp,server=on,wait=off");
    let report = of(&vms, none.pid());
    assert_eq!((&report["monitors"], &report["name"]), (&json!([]), &json!("none")));
    assert_eq!(monitor(of(&vms, removed.pid()), "x.qmp")["state"], "gone");
    let shown = run(["vms"]).succeeds().stdout;
    assert!(shown.contains("-qmp unix:/run/none.qmp,server=on,wait=off"), "{shown}");
}

fn a_stopped_qemu_does_not_hang_it() {
    let (stopped, other) = (Vm::new("a").start(), Vm::new("b").start());
    stopped.signal(Signal::STOP);
    let start = Instant::now();
    let vms = vms();
    assert!(start.elapsed() < PATIENCE / 2, "{:?}", start.elapsed());
    assert_eq!(monitor(of(&vms, stopped.pid()), "a.qmp")["state"], "stopped");
    assert_eq!(monitor(of(&vms, other.pid()), "b.qmp")["state"], "free");
    stopped.signal(Signal::CONT);
}

fn another_user_is_told_what_it_may_not_see() {
    let vm = Vm::new("a").start();
    let shown = tool::run_as_nobody(["vms", "--json"]).succeeds().stdout;
    let vms: Value = serde_json::from_str(&shown).unwrap();
    let report = of(&vms, vm.pid());
    assert_eq!(report["name"], "a");
    assert_eq!(monitor(report, "a.qmp")["state"], "forbidden");
    let held = monitor(report, "a.check");
    assert_eq!((&held["state"], &held["held_by"]), (&json!("held"), &json!([])));
    let shown = tool::run_as_nobody(["vms"]).succeeds().stdout;
    assert!(shown.contains("this user may not connect to it"), "{shown}");
    assert!(shown.contains("by a client that this user may not see"), "{shown}");
}

fn a_vm_of_the_configuration_that_does_not_run_is_shown() {
    let vm = Vm::new("a").start();
    let file = "/run/vms.toml";
    let text =
        format!("[vm.one]\nqmp = \"{}\"\n[vm.two]\nqmp = \"/run/vm/two.qmp\"\n", vm.socket());
    fs::write(file, text).unwrap();
    let shown = run(["vms", "--json", "--config", file]).succeeds().stdout;
    let vms: Value = serde_json::from_str(&shown).unwrap();
    assert_eq!(monitor(of(&vms, vm.pid()), "a.qmp")["configured_as"], "one");
    let all = vms["vms"].as_array().unwrap();
    assert_eq!(all.len(), 2);
    assert_eq!((&all[1]["name"], &all[1]["pid"]), (&json!("two"), &Value::Null));
    assert_eq!(all[1]["monitors"][0]["state"], "gone");
    let shown = run(["vms", "--config", file]).succeeds().stdout;
    assert!(shown.contains("two  not running"), "{shown}");
}

/// A QEMU that ends with the test.
struct Qemu(Child);

impl Qemu {
    fn pid(&self) -> i32 {
        self.0.id().try_into().unwrap()
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts a QEMU with these arguments and nothing else to its name.
fn qemu(directory: &str, arguments: &[&str]) -> Qemu {
    let child = Command::new("qemu-system-x86_64")
        .args(["-nodefaults", "-no-user-config", "-display", "none", "-accel", "tcg", "-m", "64"])
        .arg("-S")
        .args(arguments)
        .current_dir(directory)
        .spawn()
        .expect("QEMU starts");
    Qemu(child)
}

#[track_caller]
fn vms() -> Value {
    serde_json::from_str(&run(["vms", "--json"]).succeeds().stdout).unwrap()
}

#[track_caller]
fn of(vms: &Value, pid: i32) -> &Value {
    let all = vms["vms"].as_array().unwrap();
    all.iter().find(|vm| vm["pid"] == pid).unwrap_or_else(|| panic!("no {pid} in {vms}"))
}

/// The monitor whose socket has this name.
#[track_caller]
fn monitor<'a>(vm: &'a Value, name: &str) -> &'a Value {
    let all = vm["monitors"].as_array().unwrap();
    let found = all.iter().find(|m| m["asked"].as_str().unwrap().ends_with(name));
    found.unwrap_or_else(|| panic!("no {name} in {vm}"))
}
