//! What is detached, and what stays.

use std::fs;

use usb_qmp_hotplug::attach::{self, Detached};
use usb_qmp_hotplug::presence::Leftover;
use usb_qmp_hotplug::qemu::Vm;
use usb_qmp_hotplug::usb::Address;

use crate::machine::Machine;
use crate::qemu::Qemu;
use crate::{ENOUGH, address, end, id, vm};

#[tokio::test]
async fn a_device_that_is_not_there_is_no_error_to_detach() {
    let (mut vm, served, _directory) = vm(Qemu::default(), ENOUGH).await;
    assert!(!vm.detach(&id()).await.unwrap());
    assert_eq!(clear(&Machine::new(), &mut vm, None).await, Detached::NotThere);
    // What an attach may have left goes in any case.
    assert_eq!(end(vm, served).changes, ["device_del usb-host-1-1.2", "remove-fd", "remove-fd"]);
}

#[tokio::test]
async fn the_removal_of_an_old_device_leaves_a_newer_one_at_its_port() {
    let machine = Machine::new();
    let qemu = Qemu::with_device("usb-host-1-1.2", 1, 38, "1");
    let (mut vm, served, _directory) = vm(qemu, ENOUGH).await;
    assert_eq!(clear(&machine, &mut vm, Some(address())).await, Detached::NotThere);
    let newer = Some("1:38".parse().unwrap());
    assert_eq!(clear(&machine, &mut vm, newer).await, Detached::Leftover(Leftover::Replaced));
    assert_eq!(end(vm, served).changes, ["device_del usb-host-1-1.2", "remove-fd"]);
}

async fn clear(machine: &Machine, vm: &mut Vm, address: Option<Address>) -> Detached {
    attach::detach_leftover(&machine.host(), vm, &id(), address).await.unwrap()
}

#[tokio::test]
async fn what_is_still_there_stays_whatever_is_said_of_it() {
    let machine = Machine::new();
    let qemu = Qemu::with_device("usb-host-1-1.2", 1, 37, "1");
    let (mut vm, served, _directory) = vm(qemu, ENOUGH).await;
    // The kernel resets it: for a moment it has no address.
    machine.stick_at("0");
    assert_eq!(clear(&machine, &mut vm, Some(address())).await, Detached::Stays);
    machine.stick_at("37");
    machine.lock();
    assert_eq!(clear(&machine, &mut vm, Some(address())).await, Detached::Stays);
    assert_eq!(clear(&machine, &mut vm, None).await, Detached::Stays);
    // A host that shows no devices shows none that is gone.
    fs::remove_dir_all(machine.root.path().join("sys")).unwrap();
    assert_eq!(clear(&machine, &mut vm, None).await, Detached::Stays);
    machine.write("sys/bus/usb/devices/usb1/uevent", "");
    assert_eq!(clear(&machine, &mut vm, None).await, Detached::Leftover(Leftover::Gone));
    assert_eq!(end(vm, served).changes, ["device_del usb-host-1-1.2", "remove-fd"]);
}
