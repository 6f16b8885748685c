//! Where in the guest a device goes.

use crate::daemon::{Daemon, configure, rule};
use crate::hardware::{Device, Hardware, Plugged, Stick, uhci, xhci};
use crate::tool::{Outcome, run};
use crate::vm::Vm;
use serde_json::json;

crate::tests![
    a_full_speed_controller_takes_what_it_can: every_qemu,
    a_high_speed_controller_alone_takes_no_slow_device: every_qemu,
    a_vm_without_usb_is_told_what_to_add: any_qemu,
    a_vm_without_usb_gets_a_controller_that_the_next_device_finds,
    all_fifteen_ports_are_used_and_then_the_error_says_what_to_add,
    the_guests_bus_and_port_can_be_chosen: any_qemu,
];

fn a_full_speed_controller_takes_what_it_can() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").without_controller().argument("-device", "piix3-usb-uhci,id=uhci");
    let vm = vm.start();
    let plugged = hardware.plug_all(vec![
        (Device::Mouse, uhci(1)),
        (Stick::new("SN1").into(), xhci(3)),
        (Stick::new("SN2").into(), xhci(4)),
    ]);
    attach(&vm, &plugged[0]).succeeds();
    attach(&vm, &plugged[1]).succeeds();
    vm.gets(&[&plugged[0], &plugged[1]]);
    let full = attach(&vm, &plugged[2]).exits(6);
    assert!(full.stderr.contains("-device qemu-xhci,id="), "{}", full.stderr);
    must_have_no_hub(&vm);
}

fn a_high_speed_controller_alone_takes_no_slow_device() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").without_controller().argument("-device", "usb-ehci,id=ehci").start();
    let plugged =
        hardware.plug_all(vec![(Device::Mouse, uhci(1)), (Stick::new("SN1").into(), xhci(3))]);
    let refused = attach(&vm, &plugged[0]).exits(6);
    assert!(refused.stderr.contains("12 Mb/s"), "{}", refused.stderr);
    assert!(refused.stderr.contains("-device qemu-xhci,id="), "{}", refused.stderr);
    assert_eq!(plugged[0].driver().as_deref(), Some("usbhid"));
    attach(&vm, &plugged[1]).succeeds();
    vm.gets(&[&plugged[1]]);
}

fn a_vm_without_usb_is_told_what_to_add() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").without_controller().start();
    let stick = hardware.plug(Stick::new("SN1"), xhci(3));
    let refused = attach(&vm, &stick).exits(6);
    assert!(refused.stderr.contains("-device qemu-xhci,id=xhci,"), "{}", refused.stderr);
    vm.loses_all();
    let shown = run(["inspect", &vm.socket()]).succeeds().stdout;
    assert!(shown.contains("this VM has no USB controller"), "{shown}");
}

fn a_vm_without_usb_gets_a_controller_that_the_next_device_finds() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").without_controller().start();
    let plugged =
        hardware.plug_all(vec![(Device::Mouse, uhci(1)), (Stick::new("SN1").into(), xhci(3))]);
    run(["attach", "--add-controller", &vm.socket(), &plugged[0].port]).succeeds();
    attach(&vm, &plugged[1]).succeeds();
    assert_eq!([&plugged[0], &plugged[1]].map(|device| port_of(&vm, device)), ["15", "14"]);
    vm.gets(&[&plugged[0], &plugged[1]]);
    must_have_no_hub(&vm);
    // So says a rule.
    let vm = Vm::new("b").without_controller().start();
    configure(&["b"], &rule("b", "port = \"1-5\"\nadd_controller = true"));
    let _daemon = Daemon::start();
    let mouse = hardware.plug(Device::Mouse, xhci(5));
    vm.gets(&[&mouse]);
}

fn all_fifteen_ports_are_used_and_then_the_error_says_what_to_add() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").start();
    // The last ones QEMU would put behind a slow hub of its own if they did not name their port.
    for port in (1..=14).filter(|port| *port != 9) {
        let arguments = json!({"driver": "usb-tablet", "bus": "xhci.0", "port": port.to_string()});
        vm.qmp("device_add", arguments);
    }
    let sticks = (3..=5).map(|n| (Stick::new(&format!("SN{n}")).into(), xhci(n)));
    let sticks = hardware.plug_all(sticks.collect());
    attach(&vm, &sticks[0]).succeeds();
    attach(&vm, &sticks[1]).succeeds();
    assert_eq!([&sticks[0], &sticks[1]].map(|stick| port_of(&vm, stick)), ["15", "9"]);
    let full = attach(&vm, &sticks[2]).exits(6);
    assert!(full.stderr.contains("xhci.0"), "{}", full.stderr);
    assert!(full.stderr.contains("-device qemu-xhci,id=xhci2,p2=15,p3=15"), "{}", full.stderr);
    must_have_no_hub(&vm);
    vm.gets(&[&sticks[0], &sticks[1]]);
    assert_eq!(sticks[2].driver().as_deref(), Some("usb-storage"));
}

fn the_guests_bus_and_port_can_be_chosen() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").argument("-device", "usb-ehci,id=ehci").start();
    let sticks = (3..=4).map(|n| (Stick::new(&format!("SN{n}")).into(), xhci(n)));
    let sticks = hardware.plug_all(sticks.collect());
    let attach_at = |stick: &Plugged, bus: &str, port: &str| {
        run(["attach", "--guest-bus", bus, "--guest-port", port, &vm.socket(), &stick.port])
    };
    attach_at(&sticks[0], "ehci.0", "5").succeeds();
    assert_eq!(port_of(&vm, &sticks[0]), "5");
    let taken = attach_at(&sticks[1], "ehci.0", "5").exits(6);
    assert!(taken.stderr.contains("usb port 5 (bus ehci.0)"), "{}", taken.stderr);
    attach_at(&sticks[1], "ehci.0", "7").exits(6);
    let unknown = run(["attach", "--guest-bus", "nope.0", &vm.socket(), &sticks[1].port]).exits(6);
    assert!(unknown.stderr.contains("ehci.0") && unknown.stderr.contains("xhci.0"), "{unknown:?}");
    run(["attach", "--guest-port", "12", &vm.socket(), &sticks[1].port]).succeeds();
    assert_eq!(port_of(&vm, &sticks[1]), "12");
    vm.gets(&[&sticks[0], &sticks[1]]);
}

fn attach(vm: &Vm, device: &Plugged) -> Outcome {
    run(["attach", &vm.socket(), &device.port])
}

/// The guest's port, as QEMU's own text says it.
fn port_of(vm: &Vm, device: &Plugged) -> String {
    let id = format!(", ID: {}", device.id_in_vm());
    let line = vm.usb_devices().into_iter().find(|line| line.ends_with(&id)).expect("in the VM");
    let (_, port) = line.split_once(", Port ").expect("a port");
    port.split_once(',').expect("a speed").0.to_owned()
}

fn must_have_no_hub(vm: &Vm) {
    let devices = vm.usb_devices();
    assert!(!devices.iter().any(|line| line.contains("Hub")), "{devices:?}");
}
