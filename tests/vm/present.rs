//! What a VM has at a port already when it gets the device there.

use std::fs;

use usb_qmp_hotplug::Error;
use usb_qmp_hotplug::attach::{self, Attached, Options};

use crate::machine::Machine;
use crate::qemu::Qemu;
use crate::{ENOUGH, attach_from, end, guest_ports, vm};

/// Out with the old device, and with what its attach may have left; in with the new one.
const REPLACED: [&str; 3] = ["device_del usb-host-1-1.2", "remove-fd", "device_add 4"];

#[tokio::test]
async fn what_an_earlier_device_left_behind_is_replaced() {
    let machine = Machine::new();
    let qemu = Qemu::with_device("usb-host-1-1.2", 1, 36, "4");
    let (attached, qemu) = attach_from(&machine, qemu, &Options::default()).await;
    let [guest_port] = guest_ports(&["4"]).try_into().unwrap();
    assert_eq!(attached.unwrap(), Attached::There(guest_port), "its port is free again");
    assert_eq!(qemu.changes, REPLACED);
}

#[tokio::test]
async fn a_leftover_stays_where_another_device_came_since_it_was_looked_for() {
    let machine = Machine::new();
    let (device, host) = (machine.device(), machine.host());
    machine.stick_at("38");
    let qemu = Qemu::with_device("usb-host-1-1.2", 1, 38, "1");
    let (mut vm, served, _directory) = vm(qemu, ENOUGH).await;
    let error = attach::attach(&host, &mut vm, &device, &Options::default()).await.unwrap_err();
    assert_eq!(error.exit_code(), 3, "{error}");
    assert_eq!(end(vm, served).changes, [""; 0]);
}

#[tokio::test]
async fn a_device_that_is_there_already_stays_as_it_is_and_nothing_is_left_in_its_set() {
    let machine = Machine::new();
    machine.lock();
    let qemu = Qemu::with_device("usb-host-1-1.2", 1, 37, "1");
    // What this process may not see (/proc/PID/fd of another user's QEMU) is believed.
    let (attached, qemu) = attach_from(&machine, qemu, &Options::default()).await;
    assert_eq!(attached.unwrap(), Attached::Already);
    assert_eq!(qemu.changes, ["remove-fd"]);
}

#[tokio::test]
async fn what_cannot_be_known_is_not_detached() {
    let machine = Machine::new();
    // Without a list of locks, and where QEMU opened the node itself.
    for by_descriptor in [true, false] {
        let qemu = Qemu { by_descriptor, ..Qemu::with_device("usb-host-1-1.2", 1, 37, "1") };
        let (attached, qemu) = attach_from(&machine, qemu, &Options::default()).await;
        assert_eq!(attached.unwrap(), Attached::Already);
        assert_eq!(qemu.changes, ["remove-fd"]);
    }
}

#[tokio::test]
async fn what_is_not_locked_any_more_is_replaced() {
    let machine = Machine::new();
    machine.locks("");
    let qemu = Qemu::with_device("usb-host-1-1.2", 1, 37, "1");
    let (attached, qemu) = attach_from(&machine, qemu, &Options::default()).await;
    assert!(matches!(attached.unwrap(), Attached::There(_)));
    assert_eq!(qemu.changes, [&["remove-fd"], &REPLACED[..]].concat());
}

#[tokio::test]
async fn what_qemu_opened_itself_is_replaced_when_the_host_drives_it_again() {
    let machine = Machine::new();
    let interface = machine.root.path().join("sys/bus/usb/devices/1-1.2/1-1.2:1.0");
    fs::create_dir(&interface).unwrap();
    std::os::unix::fs::symlink("../drivers/usb-storage", interface.join("driver")).unwrap();
    let qemu = Qemu { by_descriptor: false, ..Qemu::with_device("usb-host-1-1.2", 1, 37, "1") };
    let (attached, qemu) = attach_from(&machine, qemu, &Options::default()).await;
    assert!(matches!(attached.unwrap(), Attached::There(_)));
    assert_eq!(qemu.changes, [&["remove-fd"], &REPLACED[..]].concat());
}

#[tokio::test]
async fn an_address_that_came_round_again_does_not_hide_a_new_device() {
    let machine = Machine::new();
    // The process at the other end of the socket is this one, and has no USB device open.
    machine.write(&format!("proc/{}/fd/x", std::process::id()), "");
    let qemu = Qemu::with_device("usb-host-1-1.2", 1, 37, "1");
    let (attached, qemu) = attach_from(&machine, qemu, &Options::default()).await;
    assert!(matches!(attached.unwrap(), Attached::There(_)));
    assert_eq!(qemu.changes, [&["remove-fd"], &REPLACED[..]].concat());
}

#[tokio::test]
async fn a_vm_that_waits_for_its_state_gets_nothing() {
    let machine = Machine::new();
    for dry_run in [false, true] {
        let options = Options { dry_run, ..Options::default() };
        let qemu = Qemu { status: "inmigrate", ..Qemu::with_device("usb-host-1-1.2", 1, 36, "1") };
        let (attached, qemu) = attach_from(&machine, qemu, &options).await;
        let error = attached.unwrap_err();
        assert!(matches!(error, Error::Incoming { .. }), "{error}");
        assert_eq!((error.exit_code(), qemu.changes), (7, Vec::new()));
    }
}

#[tokio::test]
async fn an_id_that_an_old_qemu_frees_a_moment_later_is_waited_for() {
    let machine = Machine::new();
    let qemu = Qemu {
        version: [5, 2, 0],
        frees_late: true,
        ..Qemu::with_device("usb-host-1-1.2", 1, 36, "1")
    };
    let (attached, qemu) = attach_from(&machine, qemu, &Options::default()).await;
    assert!(matches!(attached.unwrap(), Attached::There(_)));
    assert_eq!(qemu.changes, [&REPLACED[..], &["device_add 4"]].concat());
}
