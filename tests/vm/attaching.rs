//! Which device a VM gets, at which port, and which it does not get.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use serde_json::{Map, json};
use usb_qmp_hotplug::attach::{self, Attached, Open, Options};
use usb_qmp_hotplug::qemu::{Controller, ControllerKind, GuestPort, Layout, Placement};
use usb_qmp_hotplug::text::chain;

use crate::machine::Machine;
use crate::qemu::Qemu;
use crate::{ENOUGH, attach_from, end, guest_ports, id, vm};

/// What is known of a VM after an earlier conversation with it.
fn known(taken: &[&str]) -> Layout {
    let controller = Controller {
        bus: "xhci.0".into(),
        bus_path: "/machine/peripheral/xhci/xhci.0".into(),
        kind: ControllerKind::Xhci,
        usb2_ports: 4,
        usb3_ports: 4,
        companion_ports: BTreeSet::new(),
    };
    let (controllers, taken) = (vec![controller], guest_ports(taken));
    Layout { controllers, taken, by_id: BTreeMap::new() }
}

#[tokio::test]
async fn a_vm_that_is_known_is_asked_nothing_before_it_gets_a_device() {
    let machine = Machine::new();
    // It would answer no question.
    let qemu = Qemu { refuses: Some(("qom-list", "not now")), ..Qemu::default() };
    let (mut vm, served, _directory) = vm(qemu, ENOUGH).await;
    vm.layout = Some(known(&["4"]));
    let attached =
        attach::attach(&machine.host(), &mut vm, &machine.device(), &Options::default()).await;
    let [guest_port] = guest_ports(&["3"]).try_into().unwrap();
    assert_eq!(attached.unwrap(), Attached::There(guest_port.clone()));
    // From then on that port is known to be in use, and free again when it is.
    assert_eq!(vm.layout.as_ref().unwrap().taken, guest_ports(&["4", "3"]));
    assert!(vm.detach(&id()).await.unwrap());
    assert_eq!(vm.layout.as_ref().unwrap().taken, guest_ports(&["4"]));
    assert_eq!(end(vm, served).changes, ["device_add 3", "device_del usb-host-1-1.2", "remove-fd"]);
}

#[tokio::test]
async fn a_vm_that_is_not_as_it_was_known_is_asked_and_gets_the_device_elsewhere() {
    let machine = Machine::new();
    let (device, host) = (machine.device(), machine.host());
    let cases = [
        // Somebody else has the port by now.
        Qemu { in_use: vec!["4"], ..Qemu::default() },
        Qemu::with_device("other", 1, 99, "4"),
        // An earlier device of this port was not detached.
        Qemu::with_device("usb-host-1-1.2", 1, 36, "3"),
    ];
    for (qemu, port) in cases.into_iter().zip(["3", "3", "4"]) {
        let (mut vm, served, _directory) = vm(qemu, ENOUGH).await;
        vm.layout = Some(known(&[]));
        let attached = attach::attach(&host, &mut vm, &device, &Options::default()).await;
        let [guest_port] = guest_ports(&[port]).try_into().unwrap();
        assert_eq!(attached.unwrap(), Attached::There(guest_port));
        assert_eq!(end(vm, served).changes[0], "device_add 4");
    }
}

#[tokio::test]
async fn a_node_that_only_qemu_may_open_is_named_to_it() {
    let machine = Machine::new();
    let (attached, qemu) = attach_from(&machine, Qemu::default(), &Options::default()).await;
    let [guest_port] = guest_ports(&["4"]).try_into().unwrap();
    assert_eq!(attached.unwrap(), Attached::There(guest_port));
    assert_eq!(qemu.added[0]["hostdevice"], "/dev/bus/usb/001/037");
    assert_eq!(qemu.changes, ["device_add 4"]);
}

#[tokio::test]
async fn an_old_qemu_gets_the_address_alone() {
    for version in [[4, 2, 0], [5, 1, 0]] {
        let machine = Machine::new();
        let qemu = Qemu { version, ..Qemu::default() };
        let (attached, qemu) = attach_from(&machine, qemu, &Options::default()).await;
        attached.unwrap();
        let expected = json!({
            "driver": "usb-host", "id": "usb-host-1-1.2", "bus": "xhci.0", "port": "4",
            "hostbus": 1, "hostaddr": 37,
        });
        assert_eq!((qemu.changes, qemu.added), (vec!["device_add 4".into()], vec![expected]));
    }
}

#[tokio::test]
async fn the_address_alone_is_what_open_address_means() {
    let machine = Machine::new();
    let options = Options { open: Open::Address, ..Options::default() };
    let (attached, qemu) = attach_from(&machine, Qemu::default(), &options).await;
    attached.unwrap();
    assert_eq!(qemu.added[0].get("hostdevice"), None);
}

#[tokio::test]
async fn properties_of_the_user_reach_qemu() {
    let machine = Machine::new();
    let properties = Map::from_iter([("guest-reset".to_owned(), json!(false))]);
    let options = Options { properties, ..Options::default() };
    let (attached, qemu) = attach_from(&machine, Qemu::default(), &options).await;
    attached.unwrap();
    assert_eq!(qemu.added[0]["guest-reset"], json!(false));
}

#[tokio::test]
async fn a_dry_run_changes_nothing() {
    let options = Options { dry_run: true, ..Options::default() };
    for address in [36, 37] {
        let machine = Machine::new();
        let qemu = Qemu::with_device("usb-host-1-1.2", 1, address, "1");
        let (attached, qemu) = attach_from(&machine, qemu, &options).await;
        attached.unwrap();
        assert!(qemu.changes.is_empty(), "{:?}", qemu.changes);
    }
}

#[tokio::test]
async fn a_dry_run_sees_the_port_that_a_leftover_would_give_back() {
    let machine = Machine::new();
    let options = Options { dry_run: true, ..Options::default() };
    let qemu = Qemu { ports: 1, ..Qemu::with_device("usb-host-1-1.2", 1, 36, "1") };
    let (attached, qemu) = attach_from(&machine, qemu, &options).await;
    let [guest_port] = guest_ports(&["1"]).try_into().unwrap();
    assert_eq!(attached.unwrap(), Attached::There(guest_port));
    assert!(qemu.changes.is_empty(), "{:?}", qemu.changes);
}

#[tokio::test]
async fn a_leftover_stays_where_its_device_is_gone_too() {
    let machine = Machine::new();
    fs::remove_file(machine.root.path().join("dev/bus/usb/001/037")).unwrap();
    let qemu = Qemu::with_device("usb-host-1-1.2", 1, 36, "4");
    let (attached, qemu) = attach_from(&machine, qemu, &Options::default()).await;
    assert_eq!(attached.unwrap_err().exit_code(), 3);
    assert!(qemu.changes.is_empty(), "{:?}", qemu.changes);
}

#[tokio::test]
async fn a_mounted_disk_stays_with_the_host_unless_forced() {
    let machine = Machine::new();
    machine.mount();
    let (attached, qemu) = attach_from(&machine, Qemu::default(), &Options::default()).await;
    let error = attached.unwrap_err();
    assert_eq!(error.exit_code(), 7);
    assert!(error.to_string().contains("/media/stick"), "{error}");
    assert!(qemu.changes.is_empty(), "{:?}", qemu.changes);
    let options = Options { force: true, ..Options::default() };
    let (attached, qemu) = attach_from(&machine, Qemu::default(), &options).await;
    attached.unwrap();
    assert_eq!(qemu.changes, ["device_add 4"]);
}

#[tokio::test]
async fn a_hub_stays_with_the_host_even_if_forced() {
    let machine = Machine::new();
    machine.write("sys/bus/usb/devices/1-1.2/bDeviceClass", "09\n");
    let options = Options { force: true, ..Options::default() };
    let (attached, qemu) = attach_from(&machine, Qemu::default(), &options).await;
    let error = attached.unwrap_err();
    assert_eq!(error.exit_code(), 7);
    assert!(error.to_string().contains("is a hub"), "{error}");
    assert!(qemu.changes.is_empty(), "{:?}", qemu.changes);
}

#[tokio::test]
async fn a_taken_port_is_not_even_tried() {
    let machine = Machine::new();
    let qemu = Qemu::with_device("usb-host-1-1.3", 1, 38, "4");
    let (attached, qemu) = attach_from(&machine, qemu, &Options::default()).await;
    attached.unwrap();
    assert_eq!(qemu.changes, ["device_add 3"]);
}

#[tokio::test]
async fn a_port_that_the_user_chose_is_the_only_one_tried() {
    let machine = Machine::new();
    let placement = Placement { bus: Some("xhci.0".into()), port: Some("1".into()) };
    let options = Options { placement, ..Options::default() };
    let qemu = Qemu::with_device("usb-host-1-1.3", 1, 38, "1");
    let (attached, qemu) = attach_from(&machine, qemu, &options).await;
    assert_eq!(attached.unwrap_err().exit_code(), 6);
    assert_eq!(qemu.changes, ["device_add 1"]);
}

#[tokio::test]
async fn a_vm_without_room_says_what_to_add() {
    let machine = Machine::new();
    let full = Qemu { ports: 1, ..Qemu::with_device("usb-host-1-1.3", 1, 38, "1") };
    let none = Qemu { ports: 0, ..Qemu::default() };
    for (qemu, words) in [(full, "no free port on xhci.0"), (none, "no USB controller")] {
        let (attached, qemu) = attach_from(&machine, qemu, &Options::default()).await;
        let error = attached.unwrap_err();
        assert_eq!(error.exit_code(), 6);
        let text = chain(&error);
        assert!(text.contains(words) && text.contains("-device qemu-xhci,id="), "{text}");
        assert!(qemu.changes.is_empty(), "{:?}", qemu.changes);
    }
}

#[tokio::test]
async fn a_vm_without_room_gets_a_controller_if_the_user_wants_it() {
    let machine = Machine::new();
    let full = || Qemu { ports: 1, ..Qemu::with_device("usb-host-1-1.3", 1, 38, "1") };
    for (qemu, dry_run) in [(full(), false), (Qemu { ports: 0, ..Qemu::default() }, true)] {
        let options = Options { add_controller: true, dry_run, ..Options::default() };
        let (attached, qemu) = attach_from(&machine, qemu, &options).await;
        let place = GuestPort { bus: "usb-qmp-hotplug-xhci.0".into(), port: "15".into() };
        assert_eq!(attached.unwrap(), Attached::There(place));
        let changes = ["device_add usb-qmp-hotplug-xhci", "device_add 15"];
        assert_eq!(qemu.changes, if dry_run { &[] } else { &changes[..] });
    }
    let placement = Placement { bus: Some("xhci.0".into()), port: None };
    let options = Options { add_controller: true, placement, ..Options::default() };
    let (attached, qemu) = attach_from(&machine, full(), &options).await;
    assert!(chain(&attached.unwrap_err()).contains("no free port on xhci.0"));
    assert!(qemu.changes.is_empty(), "{:?}", qemu.changes);
}
