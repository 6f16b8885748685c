//! What users set up: a rule, and from then on nothing but plugging and pulling.

use crate::daemon::{Daemon, configure, rule};
use crate::hardware::{Device, Hardware, Stick, xhci};
use crate::vm::Vm;
use crate::wait::wait_until;
use crate::{tool, udev};
use std::fs;
use std::path::Path;
use std::process::Command;

crate::tests![
    a_stick_comes_and_goes_five_times_at_one_port: any_qemu,
    a_rule_on_the_product_attaches_and_detaches: any_qemu,
    six_devices_plugged_at_once_all_arrive_and_all_leave,
    what_was_plugged_in_before_arrives_when_udev_replays: any_qemu,
    where_interfaces_are_not_authorized_no_driver_of_the_host_sees_the_device: any_qemu,
    where_devices_are_not_authorized_only_what_a_rule_names_works: any_qemu,
];

/// The rules of the README's recipe that has this text in it.
fn recipe(part: &str) -> String {
    let readme = include_str!("../../README.md");
    let block = readme.split("```").find(|block| block.contains(part));
    block.expect("the README has the recipe").trim_start().to_owned()
}

/// A bus, as it was before the test.
struct Bus(&'static str, String);

impl Bus {
    fn new(attribute: &'static str) -> Bus {
        Bus(attribute, fs::read_to_string(attribute).unwrap())
    }
}

impl Drop for Bus {
    fn drop(&mut self) {
        fs::write(self.0, &self.1).unwrap();
    }
}

fn where_devices_are_not_authorized_only_what_a_rule_names_works() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").start();
    let bus = Bus::new("/sys/bus/usb/devices/usb2/authorized_default");
    let recipe = recipe("ATTR{authorized_default}");
    tool::rules(&recipe);
    udev::trigger("add", Path::new("/sys/bus/usb/devices/usb2"));
    udev::settle();
    assert_eq!(fs::read_to_string(bus.0).unwrap(), "0\n");
    configure(&["a"], &rule("a", "port = \"2-*\""));
    let daemon = Daemon::start();
    // Neither the host nor the VM has what no rule names.
    let stick = hardware.plug(Stick::new("SN1"), xhci(3));
    daemon.wait_for_log(&["2-3", "not authorized"]);
    udev::settle();
    assert_eq!(fs::read_to_string(stick.sysfs.join("authorized")).unwrap(), "0\n");
    assert_eq!((stick.driver(), vm.ids()), (None, Vec::new()));
    hardware.pull(&stick);
    tool::rules(&recipe.replace("152d/2338", "46f4/1"));
    let stick = hardware.plug(Stick::new("SN2"), xhci(3));
    vm.gets(&[&stick]);
    hardware.pull(&stick);
    vm.loses_all();
    // By a rule of its own, which comes later.
    drop(daemon);
    tool::rules(&(recipe.replace("152d/2338", "46f4/1") + &tool::rule(r#"DEVPATH=="*/2-3""#, &vm)));
    let stick = hardware.plug(Stick::new("SN3"), xhci(3));
    vm.gets(&[&stick]);
    hardware.pull(&stick);
    vm.loses_all();
}

/// The README's recipe.
fn where_interfaces_are_not_authorized_no_driver_of_the_host_sees_the_device() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").start();
    let bus = Bus::new("/sys/bus/usb/devices/usb2/interface_authorized_default");
    let recipe = recipe("ATTR{interface_authorized_default}");
    tool::rules(&(recipe + &tool::rule(r#"DEVPATH=="*/2-3""#, &vm)));
    udev::trigger("add", Path::new("/sys/bus/usb/devices/usb2"));
    udev::settle();
    assert_eq!(fs::read_to_string(bus.0).unwrap(), "0\n");
    // What earlier tests had at this port.
    assert!(Command::new("dmesg").arg("--clear").status().unwrap().success());
    let stick = hardware.plug(Stick::new("SN1"), xhci(3));
    vm.gets(&[&stick]);
    let log = Command::new("dmesg").output().unwrap().stdout;
    drop(bus);
    let log = String::from_utf8_lossy(&log);
    let says = |what: &str| log.contains(&format!("usb-storage {}:1.0: {what}", stick.port));
    assert!(says("Interface 0 is not authorized for usage"), "{log}");
    assert!(!says("USB Mass Storage device detected"), "{log}");
    let interface = format!("/sys/bus/usb/devices/{}:1.0/authorized", stick.port);
    assert_eq!(fs::read_to_string(interface).unwrap(), "1\n");
    hardware.pull(&stick);
    vm.loses_all();
}

fn a_stick_comes_and_goes_five_times_at_one_port() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").start();
    tool::rules(&tool::rule(r#"DEVPATH=="*/2-3""#, &vm));
    let mut descriptors = None;
    for round in 1..=5 {
        let stick = hardware.plug(Stick::new(&format!("SN{round}")), xhci(3));
        vm.gets(&[&stick]);
        assert_ne!(stick.driver().as_deref(), Some("usb-storage"));
        hardware.pull(&stick);
        vm.loses_all();
        udev::settle();
        // The first one has QEMU set up its USB library.
        if round > 1 {
            let second = *descriptors.get_or_insert_with(|| vm.descriptors());
            wait_until("no more are open than after the second", || vm.descriptors() <= second);
        }
    }
}

fn a_rule_on_the_product_attaches_and_detaches() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").start();
    tool::rules(&tool::rule(r#"ENV{PRODUCT}=="46f4/1/*""#, &vm));
    let stick = hardware.plug(Stick::new("SN1"), xhci(7));
    let mouse = hardware.plug(Device::Mouse, xhci(3));
    vm.gets(&[&stick]);
    udev::settle();
    assert_eq!(mouse.driver().as_deref(), Some("usbhid"));
    hardware.pull_all(&[mouse, stick]);
    vm.loses_all();
}

fn six_devices_plugged_at_once_all_arrive_and_all_leave() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").start();
    tool::rules(&tool::rule(r#"DEVPATH=="*/[12]-*""#, &vm));
    let mut all = vec![(Stick::new("SN1").into(), xhci(5)), (Stick::new("SN2").into(), xhci(6))];
    let others = [Device::Mouse, Device::Tablet, Device::Keyboard, Device::Mouse];
    all.extend(others.into_iter().zip((1..).map(xhci)));
    let plugged = hardware.plug_all(all);
    vm.gets(&plugged.iter().collect::<Vec<_>>());
    hardware.pull_all(&plugged);
    vm.loses_all();
}

fn what_was_plugged_in_before_arrives_when_udev_replays() {
    let mut hardware = Hardware::open();
    let stick = hardware.plug(Stick::new("SN1"), xhci(3));
    let vm = Vm::new("a").start();
    tool::rules(&tool::rule(r#"DEVPATH=="*/2-3""#, &vm));
    for _ in 0..2 {
        udev::trigger("add", &stick.sysfs);
        udev::settle();
        vm.gets(&[&stick]);
    }
    // Other events of the same device change nothing.
    udev::trigger("change", &stick.sysfs);
    udev::settle();
    vm.gets(&[&stick]);
}
