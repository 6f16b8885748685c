//! `list`: what the host has, and who has it.

use crate::hardware::{Device, Hardware, Plugged, Stick, uhci, xhci};
use crate::tool::{self, PROGRAM, run};
use crate::vm::Vm;
use crate::wait::{wait_for, wait_until};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use std::fs::{self, File};
use std::path::Path;
use std::process::{Child, Command, Stdio};

crate::tests![
    a_tree_shows_hubs_and_what_is_behind_them: any_qemu,
    a_mounted_disk_and_swap_space_are_told: any_qemu,
    who_has_a_device_is_told_to_everybody: any_qemu,
    the_rule_that_decides_is_told: any_qemu,
    a_bad_configuration_is_told_and_no_obstacle: any_qemu,
    plugs_and_pulls_are_followed: any_qemu,
    following_ends_when_nobody_reads: any_qemu,
];

const MOUNT_POINT: &str = "/run/the mount";

fn a_tree_shows_hubs_and_what_is_behind_them() {
    let mut hardware = Hardware::open();
    hardware.plug(Device::Hub, xhci(5));
    let behind = hardware.plug(Stick::new("SN1"), xhci(5).below(2));
    hardware.plug(Stick::new("SN2"), xhci(3));
    hardware.plug(Device::Mouse, uhci(1));
    let shown = run(["list"]).succeeds().stdout;
    assert!(shown.contains("└ 1-5 "), "{shown}");
    assert!(shown.contains("  └ 1-5.2 "), "{shown}");
    assert!(shown.contains("└ 2-3 "), "{shown}");
    assert!(shown.lines().all(|line| line.chars().count() <= 80), "{shown}");
    assert!(!shown.contains('\u{1b}'), "not a terminal: {shown}");

    let hub = listed("1-5");
    assert_eq!((&hub["hub"], &hub["twin"]), (&json!(true), &json!("2-5")));
    let stick = listed(&behind.port);
    assert_eq!(stick["serial"], "SN1");
    assert_eq!(stick["drivers"], json!(["usb-storage"]));
    assert_eq!(stick["speed_mbps"], 12);
    assert_eq!(stick["address"], behind.address);
    assert_eq!(stick["product_name"], "QEMU USB HARDDRIVE");
    assert_eq!(listed("2-3")["twin"], "1-3");

    let flat = run(["list", "--flat"]).succeeds().stdout;
    let ports: Vec<&str> = flat.lines().filter_map(|line| line.split('\t').next()).collect();
    assert_eq!(ports, ["1-5", "1-5.2", "2-3", "4-1"]);
}

fn a_mounted_disk_and_swap_space_are_told() {
    let mut hardware = Hardware::open();
    let mounted = hardware.plug(Stick::new("SN1").mebibytes(4), xhci(3));
    let swap = hardware.plug(Stick::new("SN2").mebibytes(4), xhci(4));
    let (disk, other) = (mounted.disk(), swap.disk());
    must("mkfs.ext4", &["-q", disk.to_str().unwrap()]);
    fs::create_dir_all(MOUNT_POINT).unwrap();
    must("mount", &[disk.to_str().unwrap(), MOUNT_POINT]);
    must("mkswap", &["-q", other.to_str().unwrap()]);
    must("swapon", &[other.to_str().unwrap()]);
    let name = |path: &Path| path.file_name().unwrap().to_str().unwrap().to_owned();
    let in_use = |device: &Plugged| listed(&device.port)["in_use"].clone();
    let mount = json!([{"disk": name(&disk), "by": "mount", "what": MOUNT_POINT}]);
    assert_eq!(in_use(&mounted), mount);
    assert_eq!(in_use(&swap), json!([{"disk": name(&other), "by": "swap", "what": null}]));
    let shown = run(["list"]).succeeds().stdout;
    assert!(shown.contains("is mounted on /run/the mount"), "{shown}");
    assert!(shown.contains("is swap space"), "{shown}");
    // It has looked, and claimed nothing.
    must("swapoff", &[other.to_str().unwrap()]);
    must("umount", &[MOUNT_POINT]);
    assert_eq!(in_use(&mounted), json!([]));
}

fn who_has_a_device_is_told_to_everybody() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("win11").start();
    let stick = hardware.plug(Stick::new("SN1"), xhci(3));
    assert_eq!(listed(&stick.port)["held"], false);
    run(["attach", &vm.socket(), &stick.port]).succeeds();
    let entry = listed(&stick.port);
    assert_eq!(entry["held_by"][0]["pid"], vm.pid());
    assert_eq!(entry["held_by"][0]["vm"], "win11");
    let shown = run(["list"]).succeeds().stdout;
    assert!(shown.contains(&format!("in VM win11 (process {})", vm.pid())), "{shown}");

    // Another user sees that it is held, and not by whom.
    let other = tool::run_as_nobody(["list", "--json"]).succeeds();
    let entry = device(&serde_json::from_str(&other.stdout).unwrap(), &stick.port);
    assert_eq!((&entry["held"], &entry["held_by"]), (&json!(true), &json!([])));

    run(["detach", &vm.socket(), &stick.port]).succeeds();
    assert_eq!(listed(&stick.port)["held"], false);
}

fn the_rule_that_decides_is_told() {
    let mut hardware = Hardware::open();
    hardware.plug(Device::Mouse, xhci(1));
    hardware.plug(Stick::new("SN1"), xhci(3));
    hardware.plug(Device::Hub, xhci(5));
    let file = "/run/rules.toml";
    let rules = "[vm.a]\nqmp = \"/run/vm/a.qmp\"\n[[rule]]\ndeny = true\nclass = \"03\"\n\
                 [[rule]]\nvm = \"a\"\nport = \"*\"\n";
    fs::write(file, rules).unwrap();
    let shown = run(["list", "--json", "--config", file]).succeeds().stdout;
    let list: Value = serde_json::from_str(&shown).unwrap();
    assert_eq!(device(&list, "1-1")["rule"], json!({"line": 3, "deny": true, "vm": null}));
    assert_eq!(device(&list, "2-3")["rule"], json!({"line": 6, "deny": false, "vm": "a"}));
    assert_eq!(device(&list, "1-5")["rule"], Value::Null, "a hub stays");
    let shown = run(["list", "--config", file]).succeeds().stdout;
    assert!(shown.contains("rule at line 6: VM a"), "{shown}");
    assert!(shown.contains("rule at line 3: denied"), "{shown}");
}

fn a_bad_configuration_is_told_and_no_obstacle() {
    let mut hardware = Hardware::open();
    hardware.plug(Device::Mouse, xhci(1));
    let file = "/run/bad.toml";
    fs::write(file, "[[rule]]\nprot = \"1-1\"\n").unwrap();
    let outcome = run(["list", "--flat", "--config", file]).succeeds();
    assert!(outcome.stderr.contains("bad.toml:2:1"), "{}", outcome.stderr);
    assert!(outcome.stdout.starts_with("1-1\t"), "{}", outcome.stdout);
    // The usual one need not be there.
    assert_eq!(run(["list"]).succeeds().stderr, "");
}

fn plugs_and_pulls_are_followed() {
    let mut hardware = Hardware::open();
    // With its serial number, a line has more columns than a terminal.
    let here = hardware.plug(Stick::new("SN345678901234567890"), xhci(3));
    let (mut follower, lines) = follow(&[]);
    let (mut json, documents) = follow(&["--json"]);
    let hub = hardware.plug(Device::Hub, xhci(5));
    let mouse = hardware.plug(Device::Mouse, xhci(5).below(1));
    hardware.pull(&here);
    hardware.pull_all(std::slice::from_ref(&hub));
    for file in [&lines, &documents] {
        wait_until("five lines", || fs::read_to_string(file).unwrap().lines().count() == 5);
    }
    let text = fs::read_to_string(lines).unwrap();
    let words: Vec<(&str, &str)> = text
        .lines()
        .map(|line| line.split_whitespace())
        .map(|mut words| (words.next().unwrap(), words.next().unwrap()))
        .collect();
    let [hub, mouse, stick] = [&hub, &mouse, &here].map(|device| device.port.as_str());
    // udev keeps the order of what happens to one device, not of what happens to several.
    let line = |word, port| words.iter().position(|line| *line == (word, port)).expect(&text);
    assert!(line("plugged", hub) < line("pulled", hub), "{text}");
    assert!(line("plugged", mouse) < line("pulled", mouse), "{text}");
    line("pulled", stick);
    assert!(text.contains("QEMU USB HARDDRIVE"), "known from before: {text}");
    assert!(text.contains("serial SN345678901234567890\n"), "no line is cut: {text}");
    for line in fs::read_to_string(documents).unwrap().lines() {
        let document: Value = serde_json::from_str(line).unwrap();
        assert!(document["device"]["port"].is_string(), "{line}");
    }
    for (child, signal) in [(&mut follower, Signal::INT), (&mut json, Signal::TERM)] {
        let pid = Pid::from_child(child);
        kill_process(pid, signal).unwrap();
        assert!(child.wait().unwrap().success());
    }
}

fn following_ends_when_nobody_reads() {
    let mut child = Command::new(PROGRAM)
        .args(["list", "--watch"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let ended = wait_for("its end", || child.try_wait().unwrap());
    assert!(ended.success(), "{ended}");
}

/// Starts `list --watch`, its standard output in a file, and waits until it hears.
fn follow(arguments: &[&str]) -> (Child, String) {
    let file = format!("/run/followed{}", arguments.len());
    let child = Command::new(PROGRAM)
        .args(["list", "--watch"])
        .args(arguments)
        .stdout(File::create(&file).unwrap())
        .spawn()
        .unwrap();
    // It hears, and has looked, once it waits.
    wait_until("it waits", || {
        fs::read_to_string(format!("/proc/{}/wchan", child.id())).unwrap().contains("poll")
    });
    (child, file)
}

/// What `list --json` says of the device at a port.
#[track_caller]
fn listed(port: &str) -> Value {
    let shown = run(["list", "--json"]).succeeds().stdout;
    device(&serde_json::from_str(&shown).unwrap(), port)
}

#[track_caller]
fn device(list: &Value, port: &str) -> Value {
    let devices = list["devices"].as_array().unwrap();
    devices.iter().find(|device| device["port"] == port).unwrap_or(&Value::Null).clone()
}

#[track_caller]
fn must(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output().expect(program);
    assert!(output.status.success(), "{program} {arguments:?}: {output:?}");
}
