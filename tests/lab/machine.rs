//! The lab itself: what the other tests take for granted.

use crate::hardware::{Device, Hardware, Plugged, Stick, dock, ehci, uhci, xhci};
use crate::sockets::swap_buses;
use crate::vm::Vm;
use crate::wait::wait_until;
use serde_json::json;
use std::fs;
use std::process::Command;

crate::tests![
    qemu_has_the_version_its_name_says: every_qemu,
    a_plugged_stick_reaches_sysfs_and_udev: any_qemu,
    every_socket_is_where_it_says: any_qemu,
    bus_numbers_change_places_and_sockets_do_not: any_qemu,
    qemu_boots_from_a_stick_attached_by_address: any_qemu,
    an_isolated_qemu_sees_no_usb_device: any_qemu,
];

fn qemu_has_the_version_its_name_says() {
    let vm = Vm::new("a").start();
    let version = &vm.qmp("query-version", json!({}))["qemu"];
    let wanted = std::env::var("LAB_QEMU").unwrap();
    assert_eq!(format!("{}.{}", version["major"], version["minor"]), wanted);
}

fn a_plugged_stick_reaches_sysfs_and_udev() {
    let mut hardware = Hardware::open();
    let stick = hardware.plug(Stick::new("SN1").content(b"hello".to_vec()), xhci(3));
    assert_eq!(fs::read_to_string(stick.sysfs.join("serial")).unwrap().trim(), "SN1");
    assert!(stick.node().exists());
    let known = Command::new("udevadm")
        .args(["info", "--query=property"])
        .arg(&stick.sysfs)
        .output()
        .unwrap();
    let known = String::from_utf8(known.stdout).unwrap();
    assert!(known.contains("ID_SERIAL_SHORT=SN1"), "{known}");
    assert!(fs::read(stick.disk()).unwrap().starts_with(b"hello"));
    assert_eq!(stick.driver().as_deref(), Some("usb-storage"));
    hardware.pull(&stick);
    assert!(!stick.sysfs.exists());
}

fn every_socket_is_where_it_says() {
    let mut hardware = Hardware::open();
    let plugged = hardware.plug_all(vec![
        (Device::Mouse, xhci(1)),
        (Device::Keyboard, xhci(15)),
        (Stick::new("SN1").into(), ehci(2)),
        (Device::Tablet, uhci(2)),
        (Device::Hub, uhci(1)),
    ]);
    let behind = hardware.plug(Device::Mouse, uhci(1).below(3));
    let ports: Vec<&str> =
        plugged.iter().chain([&behind]).map(|device| device.port.as_str()).collect();
    assert_eq!(ports, ["1-1", "1-15", "3-2", "4-2", "4-1", "4-1.3"]);
}

fn bus_numbers_change_places_and_sockets_do_not() {
    let mut hardware = Hardware::open();
    hardware.connect_dock();
    let plugged = hardware.plug_all(vec![
        (Stick::new("HERE").into(), xhci(3)),
        (Device::Hub, xhci(2)),
        (Stick::new("DOCK").into(), dock(3)),
        (Device::Hub, dock(2)),
    ]);
    let numbers = |plugged: &[Plugged]| plugged.iter().map(|d| d.bus).collect::<Vec<_>>();
    let [usb2, usb3] = [plugged[3].bus, plugged[2].bus];
    assert!(usb2 > 4 && usb3 == usb2 + 1, "the last ones: {plugged:?}");
    assert_eq!(numbers(&plugged), [2, 1, usb3, usb2]);
    let controllers = |plugged: &[Plugged]| {
        let path = |device: &Plugged| device.devpath().split("/usb").next().unwrap().to_owned();
        plugged.iter().map(path).collect::<Vec<_>>()
    };
    let before = controllers(&plugged);

    swap_buses();
    let swapped: Vec<Plugged> = plugged.iter().map(Plugged::again).collect();
    assert_eq!(numbers(&swapped), [usb3, usb2, 2, 1]);
    assert_eq!(controllers(&swapped), before);
    assert_eq!(fs::read_to_string(swapped[2].sysfs.join("serial")).unwrap().trim(), "DOCK");

    swap_buses();
    let back: Vec<Plugged> = plugged.iter().map(Plugged::again).collect();
    assert_eq!(numbers(&back), numbers(&plugged));

    // The next test finds what it expects.
    swap_buses();
    hardware.clear();
    assert_eq!(hardware.plug(Stick::new("NEXT"), xhci(3)).port, "2-3");
    assert!(dock(3).candidates().is_empty());
}

fn qemu_boots_from_a_stick_attached_by_address() {
    let mut hardware = Hardware::open();
    let stick = hardware.plug(Stick::bootable("SN1", "booted from SN1"), xhci(3));
    let vm = Vm::new("a").paused().start();
    vm.qmp("device_add", json!({"driver": "usb-host", "id": "stick", "hostbus": stick.bus, "hostaddr": stick.address}));
    assert_eq!(vm.open_nodes(), [stick.node()]);
    assert_eq!(stick.driver(), None);
    vm.boot();
    vm.wait_for_debug("booted from SN1");
    assert_eq!(stick.driver().as_deref(), Some("usbfs"));
    vm.qmp("device_del", json!({"id": "stick"}));
    assert!(vm.open_nodes().is_empty());
    wait_until("the host's driver is back", || stick.driver().as_deref() == Some("usb-storage"));
}

fn an_isolated_qemu_sees_no_usb_device() {
    let mut hardware = Hardware::open();
    let stick = hardware.plug(Stick::new("SN1"), xhci(3));
    let vm = Vm::new("a").isolated().start();
    let status = fs::read_to_string(format!("/proc/{}/status", vm.pid())).unwrap();
    assert!(status.contains("Uid:\t65534"), "{status}");
    assert!(status.contains("Seccomp:\t2"), "{status}");
    let by_address = json!({"driver": "usb-host", "id": "stick", "hostbus": stick.bus, "hostaddr": stick.address});
    let refusal = vm.try_qmp("device_add", by_address).unwrap_err();
    assert!(refusal.contains("failed to find host usb device"), "{refusal}");
}
