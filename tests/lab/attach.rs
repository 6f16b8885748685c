//! `attach` and `detach` as a person types them.

use crate::hardware::{Device, Hardware, Stick, xhci};
use crate::tool::{self, run};
use crate::vm::Vm;
use serde_json::{Value, json};
use std::fs;
use std::os::unix::fs::PermissionsExt;

crate::tests![
    every_way_to_name_a_device_attaches_and_detaches_it: any_qemu,
    a_name_that_fits_several_devices_lists_them: any_qemu,
    a_dry_run_changes_nothing_and_neither_does_a_repeat: any_qemu,
    what_can_be_done_is_done_and_the_rest_reported: any_qemu,
    options_reach_qemu: every_qemu,
    an_old_qemu_can_open_the_device_by_its_address: every_qemu,
    a_user_who_may_not_open_the_node_leaves_that_to_qemu: any_qemu,
];

fn every_way_to_name_a_device_attaches_and_detaches_it() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").start();
    let mut all: Vec<_> = (1..=6).map(|n| (Device::Mouse, xhci(n))).collect();
    all.extend([(Device::Tablet, xhci(7)), (Stick::new("SN8").into(), xhci(8))]);
    let plugged = hardware.plug_all(all);
    let [port, number, padded, node, link, path, tablet, _stick] = &plugged[..] else {
        panic!("{plugged:?}")
    };
    let serial = fs::read_to_string(tablet.sysfs.join("serial")).unwrap();
    let names = [
        port.port.clone(),
        format!("{}:{}", number.bus, number.address),
        format!("{:03}:{:03}", padded.bus, padded.address),
        node.node().to_str().unwrap().to_owned(),
        link.sysfs.to_str().unwrap().to_owned(),
        format!("/sys{}", path.devpath()),
        format!("serial={}", serial.trim_end()),
        "46f4:0001".to_owned(),
    ];
    let command = |command: &str, names: &[String]| {
        let socket = [command.to_owned(), vm.socket()];
        run(socket.iter().chain(names)).succeeds().stdout
    };
    let said = command("attach", &names);
    assert_eq!(said.lines().count(), 8, "{said}");
    vm.gets(&plugged.iter().collect::<Vec<_>>());
    let said = command("detach", &names);
    assert_eq!(said.lines().count(), 8, "{said}");
    vm.loses_all();

    command("attach", &names[..1]);
    command("detach", &[port.id_in_vm()]);
    vm.loses_all();
    let again = run(["detach", &vm.socket(), &port.port]).exits(3);
    assert!(again.stderr.contains(&port.port), "{}", again.stderr);
}

fn a_name_that_fits_several_devices_lists_them() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").start();
    let plugged = hardware
        .plug_all(vec![(Stick::new("SN").into(), xhci(3)), (Stick::new("SN").into(), xhci(4))]);
    for name in ["46f4:0001", "serial=SN"] {
        let refused = run(["attach", &vm.socket(), name]).exits(2);
        for stick in &plugged {
            assert!(refused.stderr.contains(&stick.port), "{}", refused.stderr);
        }
        assert!(vm.ids().is_empty());
    }
    // Only one of them is in the VM, so it is clear which one is to leave it.
    run(["attach", &vm.socket(), &plugged[1].port]).succeeds();
    run(["detach", &vm.socket(), "46f4:0001"]).succeeds();
    vm.loses_all();
}

fn a_dry_run_changes_nothing_and_neither_does_a_repeat() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").start();
    let stick = hardware.plug(Stick::new("SN1"), xhci(3));
    let would = run(["attach", "--dry-run", &vm.socket(), &stick.port]).succeeds().stdout;
    assert!(would.contains("would attach 2-3") && would.contains("xhci.0 port 15"), "{would}");
    assert!(vm.ids().is_empty());
    assert_eq!(stick.driver().as_deref(), Some("usb-storage"));

    run(["attach", &vm.socket(), &stick.port]).succeeds();
    let descriptors = vm.descriptors();
    let again = run(["attach", &vm.socket(), &stick.port]).succeeds().stdout;
    assert!(again.contains("already"), "{again}");
    vm.gets(&[&stick]);
    assert_eq!(vm.descriptors(), descriptors);
    vm.must_have_no_spare_descriptors();

    run(["detach", "--dry-run", &vm.socket(), &stick.port]).succeeds();
    vm.gets(&[&stick]);
}

fn what_can_be_done_is_done_and_the_rest_reported() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").start();
    let stick = hardware.plug(Stick::new("SN1"), xhci(3));
    let partly = run(["attach", &vm.socket(), "1-9", &stick.port]).exits(3);
    assert!(partly.stderr.contains("1-9") && partly.stdout.contains("2-3"), "{partly:?}");
    vm.gets(&[&stick]);
    let partly = run(["detach", &vm.socket(), "usb-host-1-9", &stick.port]).exits(3);
    assert!(partly.stderr.contains("usb-host-1-9"), "{partly:?}");
    vm.loses_all();
    run(["attach", "/run/vm/none.qmp", &stick.port]).exits(4);
}

fn options_reach_qemu() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").start();
    let stick = hardware.plug(Stick::new("SN1"), xhci(3));
    let attach = |options: &[&str]| {
        let socket = vm.socket();
        run(["attach", &socket, &stick.port].iter().chain(options))
    };
    let refused = attach(&["-o", "no-such-thing=1"]).exits(6);
    assert!(refused.stderr.contains("'usb-host.no-such-thing' not found"), "{}", refused.stderr);
    attach(&["-o", "hostbus=1"]).exits(2);
    vm.loses_all();

    attach(&["-o", "guest-reset=off", "-o", "isobufs=8", "-o", "msos-desc=false"]).succeeds();
    let option = |name: &str| -> Value {
        let path = format!("/machine/peripheral/{}", stick.id_in_vm());
        vm.qmp("qom-get", json!({"path": path, "property": name}))
    };
    assert_eq!(
        ["guest-reset", "isobufs", "msos-desc"].map(option),
        [json!(false), json!(8), json!(false)]
    );
}

fn an_old_qemu_can_open_the_device_by_its_address() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").start();
    let stick = hardware.plug(Stick::new("SN1"), xhci(3));
    run(["attach", "--open", "address", &vm.socket(), &stick.port]).succeeds();
    vm.gets(&[&stick]);
    let path = format!("/machine/peripheral/{}", stick.id_in_vm());
    let by_descriptor = vm.qmp("qom-get", json!({"path": path, "property": "hostdevice"}));
    assert_eq!(by_descriptor, "");
    run(["detach", &vm.socket(), &stick.port]).succeeds();
    vm.loses_all();
}

fn a_user_who_may_not_open_the_node_leaves_that_to_qemu() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").start();
    fs::set_permissions(vm.socket(), fs::Permissions::from_mode(0o666)).unwrap();
    let stick = hardware.plug(Stick::new("SN1"), xhci(3));
    tool::run_as_nobody(["attach", "--verbose", &vm.socket(), &stick.port]).succeeds();
    vm.gets(&[&stick]);
    tool::run_as_nobody(["detach", &vm.socket(), &stick.port]).succeeds();
    vm.loses_all();
}
