//! Devices that went without anybody telling QEMU, and attaches that failed.

use crate::daemon::{Daemon, configure, rule};
use crate::hardware::{Device, Hardware, Plugged, Socket, Stick, uhci, xhci};
use crate::tool::run;
use crate::vm::Vm;
use crate::wait::wait_until;
use serde_json::json;
use std::fs::{self, File};
use std::os::fd::OwnedFd;

crate::tests![
    a_leftover_is_replaced_by_what_is_plugged_in_now: every_qemu,
    a_leftover_is_replaced_even_if_its_address_came_round_again: any_qemu,
    a_leftover_can_be_named_in_every_way_that_is_left: any_qemu,
    the_host_gets_its_driver_back: any_qemu,
    failed_attaches_leave_no_descriptor_behind: every_qemu,
    a_failed_attach_does_not_keep_other_vms_out: every_qemu,
    qemu_refuses_a_port_an_id_or_a_bus_before_it_opens_the_device: every_qemu,
    a_port_that_was_free_when_the_daemon_looked_is_passed_over: any_qemu,
];

fn a_leftover_is_replaced_by_what_is_plugged_in_now() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").start();
    let old = attached(&mut hardware, &vm, Stick::new("SN1"), xhci(3));
    hardware.pull(&old);
    assert_eq!(vm.ids(), ["usb-host-2-3"]);
    let new = hardware.plug(Stick::new("SN2"), xhci(3));
    assert_ne!(old.address, new.address);
    let would = run(["attach", "--dry-run", &vm.socket(), &new.port]).succeeds().stdout;
    assert!(would.contains("would attach 2-3"), "{would}");
    assert_eq!(vm.ids(), ["usb-host-2-3"]);
    run(["attach", &vm.socket(), &new.port]).succeeds();
    vm.gets(&[&new]);
    assert_eq!(vm.open_nodes(), [new.node()]);
}

fn a_leftover_is_replaced_even_if_its_address_came_round_again() {
    let mut hardware = Hardware::open();
    restart_full_speed_bus();
    let vm = Vm::new("a").start();
    let old = attached(&mut hardware, &vm, Device::Mouse, uhci(1));
    hardware.pull(&old);
    restart_full_speed_bus();
    let new = hardware.plug(Device::Mouse, uhci(1));
    assert_eq!((&old.port, old.bus, old.address), (&new.port, new.bus, new.address));

    let again = run(["attach", &vm.socket(), &new.port]).succeeds().stdout;
    assert!(again.contains("attached 4-1"), "{again}");
    vm.gets(&[&new]);
    // An old node's path says that it was deleted.
    assert_eq!(vm.open_nodes(), [new.node()]);
}

fn a_leftover_can_be_named_in_every_way_that_is_left() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").start();
    let sticks = (3..=5).map(|n| (Stick::new(&format!("SN{n}")).into(), xhci(n)));
    let sticks = hardware.plug_all(sticks.collect());
    let ports: Vec<&str> = sticks.iter().map(|stick| stick.port.as_str()).collect();
    run(["attach", &vm.socket()].iter().chain(&ports)).succeeds();
    hardware.pull_all(&sticks);
    let address = format!("{}:{}", sticks[1].bus, sticks[1].address);
    run(["detach", &vm.socket(), ports[0], &address, &sticks[2].id_in_vm()]).succeeds();
    vm.loses_all();
}

fn the_host_gets_its_driver_back() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").start();
    let stick = attached(&mut hardware, &vm, Stick::new("SN1").content(b"hello".to_vec()), xhci(3));
    assert_ne!(stick.driver().as_deref(), Some("usb-storage"));
    run(["detach", &vm.socket(), &stick.port]).succeeds();
    wait_until("the host's driver is back", || stick.driver().as_deref() == Some("usb-storage"));
    assert!(fs::read(stick.disk()).unwrap().starts_with(b"hello"));
}

fn failed_attaches_leave_no_descriptor_behind() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").start();
    let stick = hardware.plug(Stick::new("SN1"), xhci(3));
    let other = attached(&mut hardware, &vm, Stick::new("SN2"), xhci(4));
    let before = vm.descriptors();
    for options in [
        ["-o", "no-such-thing=1"],
        ["-o", "isobufs=many"],
        ["--guest-port", "15"],
        ["--guest-port", "16"],
        ["--guest-bus", "nope.0"],
    ] {
        run(["attach", &vm.socket(), &stick.port].iter().chain(&options)).exits(6);
        vm.must_have_no_spare_descriptors();
    }
    vm.gets(&[&other]);
    assert_eq!(vm.open_nodes(), [other.node()]);
    assert_eq!(vm.descriptors(), before);
    run(["attach", &vm.socket(), &stick.port]).succeeds();
    vm.gets(&[&other, &stick]);
}

fn a_failed_attach_does_not_keep_other_vms_out() {
    let mut hardware = Hardware::open();
    let first = Vm::new("first").argument("-device", "usb-ehci,id=ehci").start();
    let second = Vm::new("second").start();
    let mouse = hardware.plug(Device::Mouse, uhci(1));
    // QEMU opens a slow device before it finds that it does not fit a fast bus, and forgets to close it.
    let attach = ["attach", "--guest-bus", "ehci.0", "--guest-port", "1"];
    run(attach.iter().copied().chain([&*first.socket(), &mouse.port])).exits(6);
    first.must_have_no_spare_descriptors();
    run(["attach", &second.socket(), &mouse.port]).succeeds();
    second.gets(&[&mouse]);
}

fn attached(
    hardware: &mut Hardware,
    vm: &Vm,
    device: impl Into<Device>,
    socket: Socket,
) -> Plugged {
    let plugged = hardware.plug(device, socket);
    run(["attach", &vm.socket(), &plugged.port]).succeeds();
    vm.gets(&[&plugged]);
    plugged
}

/// Takes the full-speed controller from its driver and gives it back, so that the kernel counts addresses from
/// the start.
fn restart_full_speed_bus() {
    let driver = std::path::Path::new("/sys/bus/pci/drivers/uhci_hcd");
    let bus = || fs::read_link("/sys/bus/usb/devices/usb4").ok();
    let controller = bus().expect("the bus");
    let controller = controller.parent().and_then(|path| path.file_name()).expect("its controller");
    fs::write(driver.join("unbind"), controller.as_encoded_bytes()).expect("unbind");
    assert_eq!(bus(), None);
    fs::write(driver.join("bind"), controller.as_encoded_bytes()).expect("bind");
    wait_until("the bus is back", || bus().is_some());
}

/// So the daemon may try what it knows of a VM without a question, whether it is still so or not.
fn qemu_refuses_a_port_an_id_or_a_bus_before_it_opens_the_device() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").start();
    let mouse = hardware.plug(Device::Mouse, xhci(3));
    // The first device of the host has QEMU open files of its own.
    run(["attach", &vm.socket(), &mouse.port]).succeeds();
    run(["detach", &vm.socket(), &mouse.port]).succeeds();
    vm.loses_all();
    let tablet = |id: &str, port: &str| json!({"driver": "usb-tablet", "id": id, "bus": "xhci.0", "port": port});
    vm.qmp("device_add", tablet("taken", "1"));
    let node: OwnedFd =
        File::options().read(true).write(true).open(mouse.node()).expect("the node").into();
    let before = vm.descriptors();
    for (id, bus, port) in
        [("new", "xhci.0", "1"), ("taken", "xhci.0", "2"), ("new", "nope.0", "1")]
    {
        vm.pass_descriptor(7, &node);
        let device = json!({"driver": "usb-host", "id": id, "bus": bus, "port": port,
                            "hostdevice": "/dev/fdset/7", "hostbus": mouse.bus, "hostaddr": mouse.address});
        let refused = vm.try_qmp("device_add", device).expect_err("it is refused");
        vm.qmp("remove-fd", json!({"fdset-id": 7}));
        assert_eq!((vm.descriptors(), vm.open_nodes()), (before, Vec::new()), "{refused}");
    }
}

fn a_port_that_was_free_when_the_daemon_looked_is_passed_over() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").start();
    configure(&["a"], &rule("a", "port = \"1-*\"\ntwin = false"));
    let _daemon = Daemon::start();
    let mut guest_ports = Vec::new();
    for _ in 0..3 {
        let mouse = hardware.plug(Device::Mouse, xhci(3));
        vm.gets(&[&mouse]);
        let devices = vm.usb_devices();
        let its = devices.iter().find(|line| line.ends_with(&mouse.id_in_vm())).expect("its line");
        let guest_port = its.split("Port ").nth(1).and_then(|rest| rest.split(',').next());
        let guest_port = guest_port.expect("its port").to_owned();
        hardware.pull(&mouse);
        vm.loses_all();
        // The daemon knows this port as free, and is not told.
        let id = format!("tablet{}", guest_ports.len());
        vm.qmp(
            "device_add",
            json!({"driver": "usb-tablet", "id": id, "bus": "xhci.0", "port": guest_port}),
        );
        guest_ports.push((guest_port, vm.descriptors()));
    }
    let [(first, _), (second, before), (third, after)] = &guest_ports[..] else { unreachable!() };
    assert!(first != second && second != third && first != third, "{guest_ports:?}");
    assert_eq!(before, after);
}
