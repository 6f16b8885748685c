//! `inspect`, against what is known to be in the VM.

use crate::hardware::{Device, Hardware, Stick, xhci};
use crate::remote::{self, Remotes, VENDOR};
use crate::tool::run;
use crate::vm::Vm;
use crate::wait::wait_until;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::fs;

crate::tests![
    every_device_is_shown_where_it_is: every_qemu,
    hardware_that_is_gone_or_was_replaced_is_shown_as_such: any_qemu,
    a_look_has_qemu_load_nothing: every_qemu,
    a_vm_without_devices_says_so: any_qemu,
    the_hosts_own_name_and_speed_are_shown_where_qemu_cuts_them: any_qemu,
    what_qemu_has_found_by_itself_is_shown: every_qemu,
];

fn every_device_is_shown_where_it_is() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").argument("-device", "usb-ehci,id=ehci");
    let vm = vm.argument("-device", "piix3-usb-uhci").start();
    let add = |driver: &str, id: Option<&str>, bus: &str, port: &str| {
        let mut arguments = json!({"driver": driver, "bus": bus, "port": port});
        if let Some(id) = id {
            arguments["id"] = id.into();
        }
        vm.qmp("device_add", arguments);
    };
    add("usb-hub", Some("hub"), "xhci.0", "2");
    add("usb-hub", None, "xhci.0", "2.3");
    add("usb-tablet", Some("tablet"), "xhci.0", "2.3.1");
    add("usb-mouse", None, "ehci.0", "1");
    add("usb-kbd", Some("keyboard"), "usb-bus.0", "2");
    let stick = hardware.plug(Stick::new("SN1"), xhci(3));
    run(["attach", &vm.socket(), &stick.port]).succeeds();

    let report = inspect(&vm);
    assert_eq!(report["vm"]["name"], "a");
    assert_eq!(report["vm"]["socket"], vm.socket());
    assert_eq!(report["vm"]["status"], "running");
    let version = vm.qmp("query-version", json!({}));
    let version = ["major", "minor", "micro"].map(|part| version["qemu"][part].to_string());
    assert_eq!(report["vm"]["qemu"], version.join("."));
    let devices = report["devices"].as_array().unwrap();
    let seen: BTreeSet<_> = devices.iter().map(summary).collect();
    let expected = [
        ["xhci.0", "15", "5000", "usb-host", "usb-host-2-3", "QEMU USB HARDDRIVE"],
        ["xhci.0", "2", "12", "usb-hub", "hub", "QEMU USB Hub"],
        ["xhci.0", "2.3", "12", "usb-hub", "", "QEMU USB Hub"],
        ["xhci.0", "2.3.1", "12", "usb-tablet", "tablet", "QEMU USB Tablet"],
        ["ehci.0", "1", "480", "usb-mouse", "", "QEMU USB Mouse"],
        ["usb-bus.0", "2", "12", "usb-kbd", "keyboard", "QEMU USB Keyboard"],
    ];
    let expected = expected.map(|device| device.map(str::to_owned));
    assert_eq!(seen, BTreeSet::from(expected.clone()));
    assert_eq!(devices.len(), expected.len());
    for device in devices {
        let path = device["qom_path"].as_str().unwrap();
        assert_eq!(vm.qmp("qom-get", json!({"path": path, "property": "type"})), device["driver"]);
        if device["driver"] == "usb-host" {
            let host = json!({
                "bus": stick.bus, "address": stick.address, "port": "2-3",
                "path": "pci-0000:00:14.0-usbv3-0:3", "vendor": "46f4", "product": "0001", "serial": "SN1", "state": "present",
            });
            assert_eq!(device["host"], host);
        } else {
            assert_eq!(device["host"], Value::Null, "{device}");
        }
    }

    let table = run(["inspect", &vm.socket()]).succeeds().stdout;
    for device in &expected {
        let shown = |line: &&str| {
            let mut cells =
                device.iter().enumerate().filter(|(i, cell)| *i != 3 && !cell.is_empty());
            cells.all(|(_, cell)| line.contains(&**cell))
        };
        assert!(table.lines().any(|line| shown(&line)), "{device:?}\n{table}");
    }
    let address = format!("{}:{}", stick.bus, stick.address);
    assert!(table.contains(&format!("2-3 {address} 46f4:0001 present")), "{table}");
}

fn hardware_that_is_gone_or_was_replaced_is_shown_as_such() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").start();
    let stick = hardware.plug(Stick::new("SN1"), xhci(3));
    run(["attach", &vm.socket(), &stick.port]).succeeds();
    let state = |state: &str, serial: Value| {
        let report = inspect(&vm);
        assert_eq!(report["devices"].as_array().unwrap().len(), 1);
        let device = &report["devices"][0];
        assert_eq!((&device["id"], &device["guest_port"]), (&json!("usb-host-2-3"), &json!("15")));
        assert_eq!(
            (&device["host"]["port"], &device["host"]["state"]),
            (&json!("2-3"), &json!(state))
        );
        assert_eq!(device["host"]["address"], stick.address);
        assert_eq!(device["host"]["serial"], serial);
        let table = run(["inspect", &vm.socket()]).succeeds().stdout;
        assert!(table.lines().any(|line| line.contains("2-3") && line.ends_with(state)), "{table}");
    };
    state("present", "SN1".into());
    hardware.pull(&stick);
    state("gone", Value::Null);
    let new = hardware.plug(Device::Mouse, xhci(2));
    state("gone", Value::Null);
    hardware.pull(&new);
    hardware.plug(Stick::new("SN2"), xhci(3));
    state("replaced", Value::Null);
    run(["attach", &vm.socket(), &stick.port]).succeeds();
    assert_eq!(inspect(&vm)["devices"][0]["host"]["serial"], "SN2");
}

fn a_look_has_qemu_load_nothing() {
    let vm = Vm::new("a").start();
    let modules = || -> BTreeSet<String> {
        let maps = fs::read_to_string(format!("/proc/{}/maps", vm.pid())).expect("QEMU runs");
        let files = maps.lines().filter_map(|line| Some(line.split_once('/')?.1.to_owned()));
        files.filter(|file| file.ends_with(".so")).collect()
    };
    let before = modules();
    inspect(&vm);
    assert_eq!(modules(), before);
}

fn a_vm_without_devices_says_so() {
    let vm = Vm::new("a").start();
    assert_eq!(inspect(&vm)["devices"], json!([]));
    let shown = run(["inspect", &vm.socket()]).succeeds().stdout;
    assert!(shown.contains("no USB devices"), "{shown}");
    run(["inspect", "/run/vm/none.qmp"]).exits(4);
}

fn inspect(vm: &Vm) -> Value {
    serde_json::from_str(&run(["inspect", "--json", &vm.socket()]).succeeds().stdout).expect("JSON")
}

fn summary(device: &Value) -> [String; 6] {
    ["guest_bus", "guest_port", "speed_mbps", "driver", "id", "product"].map(|key| {
        match &device[key] {
            Value::Null => String::new(),
            Value::String(text) => text.clone(),
            other => other.to_string(),
        }
    })
}

fn the_hosts_own_name_and_speed_are_shown_where_qemu_cuts_them() {
    let _hardware = Hardware::open();
    let vm = Vm::new("a").start();
    let mut remotes = Remotes::load();
    let units = |text: &str| text.encode_utf16().collect::<Vec<_>>();
    let names = ["A name of more than 31 characters, all of them", "日本語 Größe", "two\nlines"];
    for (port, name) in (1..).zip(names) {
        let device = remote::Device::new(0x1209, 0x0001).interface(&VENDOR);
        let device = device.strings(&units("Lab"), &units(name), &units("SN"));
        let device = remotes.plug(device, port);
        run(["attach", &vm.socket(), &device.port]).succeeds();
        let report = inspect(&vm);
        let shown = &report["devices"][0];
        assert_eq!((&shown["product"], &shown["speed_mbps"]), (&json!(name), &json!(480)));
        run(["detach", &vm.socket(), &device.port]).succeeds();
        remotes.pull(&device);
    }
}

fn what_qemu_has_found_by_itself_is_shown() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").argument("-device", "usb-host,vendorid=0x46f4,productid=0x0001");
    let vm = vm.argument("-device", "usb-host,id=port,hostbus=1,hostport=4,port=2").start();
    let host = |product: &str| {
        let report = inspect(&vm);
        let devices = report["devices"].as_array().unwrap();
        assert_eq!(devices.len(), 2, "{report}");
        devices.iter().find(|device| (device["id"] == "port") == (product == "0627")).unwrap()["host"].clone()
    };
    // It looks for them, and there are none.
    let none = json!({
        "bus": null, "address": null, "port": null, "path": null,
        "vendor": "46f4", "product": "0001", "serial": null, "state": "gone",
    });
    assert_eq!(host("46f4"), none);
    assert_eq!((&host("0627")["bus"], &host("0627")["state"]), (&json!(1), &json!("gone")));

    let stick = hardware.plug(Stick::new("SN1"), xhci(3));
    let mouse = hardware.plug(Device::Mouse, xhci(4));
    wait_until("QEMU has found both", || vm.open_nodes().len() == 2);
    let there = json!({
        "bus": stick.bus, "address": stick.address, "port": "2-3",
        "path": "pci-0000:00:14.0-usbv3-0:3", "vendor": "46f4", "product": "0001",
        "serial": "SN1", "state": "present",
    });
    assert_eq!(host("46f4"), there);
    assert_eq!((&host("0627")["port"], &host("0627")["vendor"]), (&json!("1-4"), &json!("0627")));
    let table = run(["inspect", &vm.socket()]).succeeds().stdout;
    let address = format!("{}:{}", mouse.bus, mouse.address);
    assert!(table.contains(&format!("1-4 {address} 0627:0001 present")), "{table}");
    let report = inspect(&vm);
    assert!(
        report["devices"].as_array().unwrap().iter().all(|device| device["product"] != Value::Null)
    );

    // Another of the same kind is the host's.
    let other = hardware.plug(Stick::new("SN2"), xhci(5));
    assert_eq!(host("46f4"), there);
    hardware.pull_all(&[other, stick]);
    assert_eq!(host("46f4"), none);
}
