//! What changes on the host while a device is being attached.

use crate::hardware::{Device, Hardware, Stick, xhci};
use crate::proxy::{self, Moment};
use crate::tool::{self, run};
use crate::truth::{is_connected_to, open_locked};
use crate::udev;
use crate::vm::Vm;
use std::fs::{self, File};
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};

crate::tests![
    a_device_that_leaves_during_its_attach_is_not_called_attached,
    a_node_without_its_device_is_not_passed_on: any_qemu,
    a_lock_that_passes_is_waited_for: any_qemu,
    a_claim_that_passes_is_waited_for: any_qemu,
];

fn a_device_that_leaves_during_its_attach_is_not_called_attached() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").start();
    let mouse = hardware.plug(Device::Mouse, xhci(3));
    let port = mouse.port.clone();
    proxy::listen(vm.socket(), move |moment| {
        // QEMU has attached it, and has yet to say so.
        if matches!(moment, Moment::Answered(text) if text.contains("device_add")) {
            hardware.pull(&mouse);
        }
        true
    });
    let left = run(["attach", proxy::SOCKET, &port]).exits(3);
    assert!(left.stdout.is_empty() && left.stderr.contains("is gone"), "{left:?}");
    vm.loses_all();
}

fn a_node_without_its_device_is_not_passed_on() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").start();
    let old = hardware.plug(Device::Mouse, xhci(3));
    run(["attach", &vm.socket(), &old.port]).succeeds();
    hardware.pull(&old);
    let mouse = hardware.plug(Device::Mouse, xhci(3));
    let before = vm.descriptors();
    let port = mouse.port.clone();
    let seen = Arc::new(Mutex::new(String::new()));
    let log = seen.clone();
    proxy::listen(vm.socket(), move |moment| {
        if let Moment::Asked(text) = moment {
            *log.lock().unwrap() += text;
        }
        // The node is open by now.
        if matches!(moment, Moment::Answered(text) if text.contains("device_del")) {
            hardware.pull(&mouse);
        }
        true
    });
    run(["attach", proxy::SOCKET, &port]).exits(3);
    let seen = seen.lock().unwrap();
    assert!(seen.contains("device_del") && !seen.contains("add-fd"), "{seen}");
    vm.loses_all();
    assert!(vm.descriptors() <= before);
}

fn a_lock_that_passes_is_waited_for() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").start();
    let mouse = hardware.plug(Device::Mouse, xhci(3));
    let locked = Arc::new(Mutex::new(Some(open_locked(&mouse))));
    let until = locked.clone();
    // Held until the tool has met it and asks the VM again.
    proxy::listen(vm.socket(), move |moment| {
        if matches!(moment, Moment::Asked(text) if text.contains("remove-fd")) {
            until.lock().unwrap().take();
        }
        true
    });
    run(["attach", proxy::SOCKET, &mouse.port]).succeeds();
    assert!(locked.lock().unwrap().is_none());
    assert!(is_connected_to(&vm, &[&mouse]));
}

fn a_claim_that_passes_is_waited_for() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").start();
    let stick = hardware.plug(Stick::new("SN1"), xhci(3));
    udev::settle();
    // As another of these programs does it, for as long as its attach takes.
    let other = format!("/run/{}", Path::new(tool::PROGRAM).file_name().unwrap().to_str().unwrap());
    fs::copy("/bin/sleep", &other).unwrap();
    let disk = File::open(stick.disk()).unwrap();
    let other = Command::new(other).arg("1000").stdin(disk).spawn().unwrap();
    let other = Arc::new(Mutex::new(Some(other)));
    let until = other.clone();
    let mut asked = 0;
    proxy::listen(vm.socket(), move |moment| {
        // The first question is before the claim, and each later one after it was refused.
        asked += u32::from(matches!(moment, Moment::Asked(text) if text.contains("hostaddr")));
        if let Some(mut other) = until.lock().unwrap().take_if(|_| asked > 1) {
            other.kill().unwrap();
            other.wait().unwrap();
        }
        true
    });
    run(["attach", proxy::SOCKET, &stick.port]).succeeds();
    assert!(other.lock().unwrap().is_none());
    assert!(is_connected_to(&vm, &[&stick]));
}
