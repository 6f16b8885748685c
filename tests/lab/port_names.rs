//! Names of ports that stay when bus numbers change places.

use crate::daemon::{CONFIG, Daemon, configure, rule};
use crate::hardware::{Device, Hardware, Plugged, Stick, dock, ehci, uhci, xhci};
use crate::sockets::swap_buses;
use crate::tool::{self, run};
use crate::udev;
use crate::vm::Vm;
use serde_json::Value;
use std::process::Command;

crate::tests![
    a_ports_stable_name_is_the_one_that_udev_gives_it: any_qemu,
    either_name_of_a_port_can_be_typed: any_qemu,
    a_udev_rule_means_the_same_sockets_after_bus_numbers_changed_places: any_qemu,
    a_udev_rule_for_one_half_leaves_the_port_of_the_same_number_alone: any_qemu,
    a_configuration_means_the_same_sockets_after_bus_numbers_changed_places: any_qemu,
    who_names_a_port_by_bus_number_is_told_once: any_qemu,
];

/// The stable name of each device's port, as `list` shows it.
fn names(devices: &[&Plugged]) -> Vec<String> {
    let list: Value = serde_json::from_str(&run(["list", "--json"]).succeeds().stdout).unwrap();
    let name = |device: &&Plugged| {
        let mut all = list["devices"].as_array().unwrap().iter();
        let entry = all.find(|entry| entry["port"] == device.port.as_str()).unwrap();
        entry["path"].as_str().unwrap().to_owned()
    };
    devices.iter().map(name).collect()
}

/// A property that udev has of a device.
fn property(device: &Plugged, name: &str) -> Option<String> {
    let info = Command::new("udevadm").args(["info", "-q", "property"]).arg(&device.sysfs).output();
    let text = String::from_utf8(info.unwrap().stdout).unwrap();
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
    value.map(str::to_owned)
}

fn a_ports_stable_name_is_the_one_that_udev_gives_it() {
    let mut hardware = Hardware::open();
    let plugged = hardware.plug_all(vec![
        (Device::Mouse, xhci(3)),
        (Stick::new("SN1").into(), xhci(4)),
        (Device::Hub, xhci(2)),
        (Stick::new("SN2").into(), ehci(1)),
        (Device::Mouse, uhci(2)),
    ]);
    let behind = hardware.plug(Device::Mouse, xhci(2).below(3));
    let all: Vec<&Plugged> = plugged.iter().chain([&behind]).collect();
    let names = names(&all);
    assert_eq!(
        names,
        [
            "pci-0000:00:14.0-usbv2-0:3",
            "pci-0000:00:14.0-usbv3-0:4",
            "pci-0000:00:14.0-usbv2-0:2",
            "pci-0000:00:1a.0-usbv2-0:1",
            "pci-0000:00:1d.0-usbv1-0:2",
            "pci-0000:00:14.0-usbv2-0:2.3",
        ]
    );
    for (device, name) in all.iter().zip(&names) {
        let without = name.replace("-usbv1-", "-usb-").replace("-usbv2-", "-usb-");
        let without = without.replace("-usbv3-", "-usb-");
        assert_eq!(property(device, "ID_PATH"), Some(without));
        // Only systemd 254 and newer know it.
        if let Some(theirs) = property(device, "ID_PATH_WITH_USB_REVISION") {
            assert_eq!(*name, theirs);
        }
    }
}

fn either_name_of_a_port_can_be_typed() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").start();
    let stick = hardware.plug(Stick::new("SN1"), xhci(3));
    run(["attach", &vm.socket(), "pci-0000:00:14.0-usbv3-0:3"]).succeeds();
    vm.gets(&[&stick]);
    run(["detach", &vm.socket(), "pci-0000:00:14.0-usbv3-0:3"]).succeeds();
    vm.loses_all();
    let wrong = run(["attach", &vm.socket(), "pci-0000:00:14.0-usbv2-0:3"]).exits(3);
    assert!(wrong.stderr.contains("did you mean `pci-0000:00:14.0-usbv3-0:3`?"), "{wrong:?}");
    let half = run(["attach", &vm.socket(), "pci-0000:00:14.0-usb-0:3"]).exits(2);
    assert!(half.stderr.contains("`-usbv2-0:`"), "{half:?}");
}

/// A stick and, behind a hub, a mouse in each controller; the same sockets of both.
struct Desk {
    devices: Vec<Plugged>,
}

impl Desk {
    fn new(hardware: &mut Hardware) -> Desk {
        hardware.connect_dock();
        let mut devices = hardware.plug_all(vec![
            (Stick::new("HERE").into(), xhci(3)),
            (Stick::new("DOCK").into(), dock(3)),
            (Device::Hub, xhci(2)),
            (Device::Hub, dock(2)),
        ]);
        devices.extend(
            hardware.plug_all(vec![
                (Device::Mouse, xhci(2).below(1)),
                (Device::Mouse, dock(2).below(1)),
            ]),
        );
        Desk { devices }
    }

    /// Bus numbers change places; what one controller's ports were called, the other's are now.
    fn swap(&mut self) {
        let ports = |desk: &Desk| desk.devices.iter().map(|d| d.port.clone()).collect::<Vec<_>>();
        let before = ports(self);
        swap_buses();
        self.devices = self.devices.iter().map(Plugged::again).collect();
        let now = ports(self);
        assert_eq!(
            [&now[0], &now[1], &now[4], &now[5]],
            [&before[1], &before[0], &before[5], &before[4]]
        );
    }

    /// The stick and the mouse at the controller that is built in go to one VM, the dock's stick to another.
    #[track_caller]
    fn must_be_in(&self, a: &Vm, b: &Vm) {
        let [here, dock, _, _, mouse, other] = &self.devices[..] else { panic!() };
        a.gets(&[here, mouse]);
        b.gets(&[dock]);
        udev::settle();
        assert_eq!(a.ids().len() + b.ids().len(), 3);
        assert_eq!(other.driver().as_deref(), Some("usbhid"));
    }
}

fn a_udev_rule_means_the_same_sockets_after_bus_numbers_changed_places() {
    let mut hardware = Hardware::open();
    let (a, b) = (Vm::new("a").start(), Vm::new("b").start());
    let mut desk = Desk::new(&mut hardware);
    let rule = |device: &Plugged, vm: &Vm| {
        run(["rule", &device.port, "--vm", &vm.socket()]).succeeds().stdout
    };
    let [here, dock, hub, ..] = &desk.devices[..] else { panic!() };
    let rules = [rule(here, &a), rule(hub, &a), rule(dock, &b)].concat();
    let names_no_bus = rules
        .lines()
        .filter(|line| !line.starts_with('#'))
        .all(|line| !line.contains("/usb1") && !line.contains("/1-") && !line.contains("/2-"));
    assert!(names_no_bus, "{rules}");
    tool::rules(&rules);
    for device in &desk.devices {
        udev::trigger("add", &device.sysfs);
    }
    desk.must_be_in(&a, &b);
    // What is attached leaves, and comes back as what it is now.
    desk.swap();
    desk.must_be_in(&a, &b);

    // At coldplug, too.
    a.kill();
    b.kill();
    let (a, b) = (Vm::new("a").start(), Vm::new("b").start());
    for device in &desk.devices {
        udev::trigger("add", &device.sysfs);
    }
    desk.must_be_in(&a, &b);
    let mouse = hardware.plug(Device::Mouse, xhci(4));
    // What is behind a hub goes first: pulled out with its hub, it has no name any more.
    desk.devices.reverse();
    hardware.pull_all(&desk.devices);
    a.loses_all();
    b.loses_all();
    hardware.pull(&mouse);
}

fn a_udev_rule_for_one_half_leaves_the_port_of_the_same_number_alone() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").start();
    let hub = hardware.plug(Device::Hub, xhci(4));
    // A slow hub has one half, as has a port whose other half has another number.
    let rule = run(["rule", "1-4.1", "--vm", &vm.socket()]).succeeds().stdout;
    tool::rules(&rule);
    let mouse = hardware.plug(Device::Mouse, xhci(4).below(1));
    vm.gets(&[&mouse]);
    hardware.pull_all(&[mouse, hub]);
    vm.loses_all();

    let mut only_the = |half: Half, rules: &str| {
        tool::rules(rules);
        for (plugged, is_meant) in
            [(Device::Mouse, half == Half::Usb2), (Stick::new("SN1").into(), half == Half::Usb3)]
        {
            let plugged = hardware.plug(plugged, xhci(3));
            udev::settle();
            assert_eq!(vm.ids(), if is_meant { vec![plugged.id_in_vm()] } else { vec![] });
            hardware.pull(&plugged);
            vm.loses_all();
        }
    };
    let rule = rule.replace("*-4.1", "*-3");
    only_the(Half::Usb2, &rule);
    only_the(Half::Usb3, &rule.replace("00|01|02", "03"));
}

#[derive(PartialEq, Eq)]
enum Half {
    Usb2,
    Usb3,
}

fn a_configuration_means_the_same_sockets_after_bus_numbers_changed_places() {
    let mut hardware = Hardware::open();
    let (a, b) = (Vm::new("a").start(), Vm::new("b").start());
    let mut desk = Desk::new(&mut hardware);
    let port = |device: &Plugged, vm: &str| {
        let toml = run(["rule", &device.port, "--toml", "--vm", &format!("/run/vm/{vm}.qmp")]);
        let toml = toml.succeeds().stdout;
        rule(vm, toml.lines().find(|line| line.starts_with("port = ")).unwrap())
    };
    let [here, dock, hub, ..] = &desk.devices[..] else { panic!() };
    configure(&["a", "b"], &[port(here, "a"), port(hub, "a"), port(dock, "b")].concat());
    let daemon = Daemon::start();
    desk.must_be_in(&a, &b);
    assert!(!daemon.log().contains("bus number"), "{}", daemon.log());
    desk.swap();
    desk.must_be_in(&a, &b);
    drop(daemon);

    // At coldplug, too.
    a.kill();
    b.kill();
    let (a, b) = (Vm::new("a").start(), Vm::new("b").start());
    let _daemon = Daemon::start();
    desk.must_be_in(&a, &b);
    run(["--config", CONFIG, "sync", "--dry-run"]).succeeds();
}

fn who_names_a_port_by_bus_number_is_told_once() {
    let hardware = Hardware::open();
    let vm = Vm::new("a").start();
    configure(&["a"], &rule("a", "port = \"1-3\""));
    let told = "write `pci-0000:00:14.0-usbv2-0:3` in place of `1-3` (line 3)";
    let dry = run(["--config", CONFIG, "sync", "--dry-run"]).succeeds();
    assert_eq!(dry.stderr.lines().filter(|line| line.contains(told)).count(), 1, "{dry:?}");
    assert!(!run(["--config", CONFIG, "sync"]).succeeds().stderr.contains(told));
    let daemon = Daemon::start();
    daemon.reload();
    assert_eq!(daemon.log().matches(told).count(), 1, "{}", daemon.log());
    let rule = run(["rule", "1-3", "--bus-number", "--vm", &vm.socket()]).succeeds();
    assert!(rule.stdout.contains(r#""*/1-3|*/2-3""#), "{rule:?}");
    assert!(rule.stderr.contains("pci-0000:00:14.0-usbv2-0:3"), "{rule:?}");
    drop(hardware);
}
