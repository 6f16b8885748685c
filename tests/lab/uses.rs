//! What the host uses a device for that is no disk: its network, a program, the person who types.

use crate::daemon::{Daemon, configure, rule};
use crate::gadget::{Gadget, Gadgets};
use crate::hardware::{Device, Hardware, Plugged, xhci};
use crate::host::must;
use crate::journal::Journal;
use crate::tool::{self, run};
use crate::udev;
use crate::vm::Vm;
use crate::wait::wait_for;
use std::fs;
use std::os::unix::fs::OpenOptionsExt;

crate::tests![
    an_adapter_with_the_default_route_is_refused_by_hand_and_told_in_the_log: any_qemu,
    an_adapter_with_the_default_route_is_told_where_a_udev_rule_takes_it: any_qemu,
    a_serial_port_that_a_program_has_open_is_told: any_qemu,
    a_sound_device_and_a_printer_that_a_program_has_open_are_told: any_qemu,
    the_only_keyboard_is_told: any_qemu,
    what_is_not_authorized_is_shown: any_qemu,
];

/// The line of `list --flat` for a device.
fn listed(device: &Plugged) -> String {
    let all = run(["list", "--flat"]).succeeds().stdout;
    all.lines().find(|line| line.starts_with(&format!("{}\t", device.port))).unwrap().to_owned()
}

/// The network adapter of a device, once udev has given it its name.
pub fn adapter(device: &Plugged) -> String {
    let directory = device.sysfs.join(format!("{}:1.0/net", device.port));
    let adapter = || {
        let adapter = fs::read_dir(&directory).ok()?.flatten().next()?;
        Some(adapter.file_name().into_string().unwrap())
    };
    wait_for("a network adapter", adapter);
    udev::settle();
    adapter().unwrap()
}

fn an_adapter_with_the_default_route_is_refused_by_hand_and_told_in_the_log() {
    let mut gadgets = Gadgets::load(1);
    let vm = Vm::new("a").start();
    let device = gadgets.plug(Gadget::new(0x1d6b, 0x0104).network(), 0);
    let use_it = || {
        let adapter = adapter(&device);
        must("ip", &["address", "add", "10.9.9.2/24", "dev", &adapter]);
        must("ip", &["link", "set", &adapter, "up"]);
        adapter
    };
    let name = use_it();
    assert!(listed(&device).contains(&format!("\t{name} has an address\t")), "{}", listed(&device));
    must("ip", &["route", "add", "default", "via", "10.9.9.1", "dev", &name, "metric", "7"]);
    assert!(listed(&device).contains(&format!("\t{name} has the default route\t")));
    let attach = || run(["attach", &vm.socket(), &device.port]);
    let refused = attach().exits(7).stderr;
    assert!(refused.contains(&format!("{name} has the default route")), "{refused}");
    assert!(vm.ids().is_empty());
    let forced = run(["attach", "--force", &vm.socket(), &device.port]).succeeds().stderr;
    assert!(forced.contains(&format!("{name} has the default route")), "{forced}");
    vm.gets(&[&device]);
    run(["detach", &vm.socket(), &device.port]).succeeds();

    let name = use_it();
    let told = attach().succeeds().stderr;
    assert!(told.contains(&format!("{name} has an address")), "{told}");
    run(["detach", &vm.socket(), &device.port]).succeeds();

    let name = use_it();
    must("ip", &["route", "add", "default", "via", "10.9.9.1", "dev", &name, "metric", "7"]);
    configure(&["a"], &rule("a", &format!("port = \"{}\"", device.port)));
    let daemon = Daemon::start();
    vm.gets(&[&device]);
    daemon.wait_for_log(&[
        "was in use on this host when a got it",
        &format!("{name} has the default route"),
    ]);
    gadgets.pull(&device);
}

fn an_adapter_with_the_default_route_is_told_where_a_udev_rule_takes_it() {
    let mut gadgets = Gadgets::load(1);
    let journal = Journal::journald();
    let vm = Vm::new("a").start();
    let device = gadgets.plug(Gadget::new(0x1d6b, 0x0104).network(), 0);
    let name = adapter(&device);
    must("ip", &["address", "add", "10.9.9.2/24", "dev", &name]);
    must("ip", &["link", "set", &name, "up"]);
    must("ip", &["route", "add", "default", "via", "10.9.9.1", "dev", &name, "metric", "7"]);
    tool::rules(&tool::rule(&format!("KERNEL==\"{}\"", device.port), &vm));
    udev::trigger("add", &device.sysfs);
    vm.gets(&[&device]);
    let entry = journal.wait_for("was in use on this host when");
    assert!(entry["MESSAGE"].contains(&format!("{name} has the default route")), "{entry:?}");
    assert_eq!(entry["PRIORITY"], "4", "a warning");
    gadgets.pull(&device);
}

fn a_sound_device_and_a_printer_that_a_program_has_open_are_told() {
    let mut gadgets = Gadgets::load(1);
    let vm = Vm::new("a").start();
    let device = gadgets.plug(Gadget::new(0x1d6b, 0x0105).midi().printer(), 0);
    // The gadget has a sound card of its own.
    let card = device.sysfs.join(format!("{}:1.0/sound", device.port));
    let name = |path: &std::path::Path, start: &str| {
        let names = fs::read_dir(path).ok()?.flatten();
        let mut names = names.filter_map(|entry| entry.file_name().into_string().ok());
        names.find(|name| name.starts_with(start))
    };
    let midi = wait_for("the sound device", || name(&card.join(name(&card, "card")?), "midiC"));
    let nonblocking = rustix::fs::OFlags::NONBLOCK.bits() as i32;
    let open = |path: &str| {
        let mut options = fs::OpenOptions::new();
        options.write(true).custom_flags(nonblocking);
        wait_for(path, || options.open(path).ok())
    };
    let _open = (open(&format!("/dev/snd/{midi}")), open("/dev/usb/lp0"));
    let told = run(["attach", &vm.socket(), &device.port]).succeeds().stderr;
    let this = std::process::id();
    for node in [&midi, "lp0"] {
        assert!(told.contains(&format!("{node} is open in process {this} (")), "{told}");
    }
    assert_eq!(told.lines().count(), 1, "{told}");
    gadgets.pull(&device);
}

fn a_serial_port_that_a_program_has_open_is_told() {
    let mut gadgets = Gadgets::load(1);
    let vm = Vm::new("a").start();
    let device = gadgets.plug(Gadget::new(0x1d6b, 0x0104).serial_port(), 0);
    let nonblocking = rustix::fs::OFlags::NONBLOCK.bits() as i32;
    let open = || {
        let mut options = fs::OpenOptions::new();
        options.read(true).write(true).custom_flags(nonblocking).open("/dev/ttyACM0").ok()
    };
    let port = wait_for("the serial port", open);
    let told = format!("ttyACM0 is open in process {} (", std::process::id());
    assert!(listed(&device).contains(&told), "{}", listed(&device));
    let attached = run(["attach", &vm.socket(), &device.port]).succeeds().stderr;
    assert!(attached.contains(&told), "{attached}");
    drop(port);
    run(["detach", &vm.socket(), &device.port]).succeeds();
    wait_for("the serial port", open);
    let attached = run(["attach", &vm.socket(), &device.port]).succeeds().stderr;
    assert_eq!(attached, "");
    gadgets.pull(&device);
}

fn the_only_keyboard_is_told() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").start();
    // The machine's own one.
    for entry in fs::read_dir("/sys/bus/serio/drivers/atkbd").into_iter().flatten().flatten() {
        let name = entry.file_name();
        if name.to_str().unwrap().starts_with("serio") {
            fs::write("/sys/bus/serio/drivers/atkbd/unbind", name.as_encoded_bytes()).unwrap();
        }
    }
    let hub = hardware.plug(Device::Hub, xhci(4));
    let wide = run(["rule", &hub.port, "--vm", &vm.socket()]).succeeds().stderr;
    assert!(wide.contains("every keyboard"), "{wide}");
    let keyboard = hardware.plug(Device::Keyboard, xhci(4).below(1));
    let is_told = || listed(&keyboard).contains("it is the only keyboard");
    wait_for("the only keyboard", || is_told().then_some(()));
    for device in [&keyboard, &hub] {
        let rule = run(["rule", &device.port, "--vm", &vm.socket()]).succeeds().stderr;
        assert!(rule.contains(&format!("{} (", keyboard.port)), "{rule}");
        assert!(rule.contains("is the only keyboard of this host"), "{rule}");
    }
    let attached = run(["attach", &vm.socket(), &keyboard.port]).succeeds().stderr;
    assert!(attached.contains("it is the only keyboard"), "{attached}");
    run(["detach", &vm.socket(), &keyboard.port]).succeeds();
    wait_for("the only keyboard", || is_told().then_some(()));
    configure(&["a"], &rule("a", &format!("port = \"{}\"", keyboard.port)));
    let daemon = Daemon::start();
    daemon.wait_for_log(&["was in use on this host when a got it", "it is the only keyboard"]);
    drop(daemon);
    run(["detach", &vm.socket(), &keyboard.port]).succeeds();

    let other = hardware.plug(Device::Keyboard, xhci(5));
    wait_for("two keyboards", || (!is_told()).then_some(()));
    let rule = run(["rule", &other.port, "--vm", &vm.socket()]).succeeds().stderr;
    assert!(rule.contains("is a keyboard, and the rule gives it to the VM"), "{rule}");
    let attached = run(["attach", &vm.socket(), &other.port]).succeeds().stderr;
    assert_eq!(attached, "");
    hardware.pull_all(&[other, keyboard, hub]);
}

fn what_is_not_authorized_is_shown() {
    let mut hardware = Hardware::open();
    let mouse = hardware.plug(Device::Mouse, xhci(3));
    assert!(!listed(&mouse).contains("authorized"));
    fs::write(mouse.sysfs.join("authorized"), "0").unwrap();
    assert!(listed(&mouse).contains("\tit is not authorized\t"), "{}", listed(&mouse));
    let json = run(["list", "--json"]).succeeds().stdout;
    assert!(json.contains("\"authorized\": false"), "{json}");
    fs::write(mouse.sysfs.join("authorized"), "1").unwrap();
    hardware.pull(&mouse);
}
