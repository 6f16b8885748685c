//! Devices of every kind.

use crate::daemon::{Daemon, configure, rule};
use crate::gadget::{Gadget, Gadgets};
use crate::hardware::{self, Hardware, Plugged, xhci};
use crate::remote::{self, Answer, Device, Remotes, VENDOR};
use crate::remote_hub;
use crate::tool::run;
use crate::vm::Vm;
use crate::wait::{PATIENCE, wait_at_most, wait_for, wait_until};
use rustix::process::Signal;
use serde_json::Value;
use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

crate::tests![
    devices_of_every_class_come_and_go: any_qemu,
    a_usb_3_hub_has_two_halves_and_each_port_of_it_a_twin: any_qemu,
    a_device_that_hangs_in_probe_keeps_its_readers_waiting: any_qemu,
    a_device_that_leaves_at_any_moment_leaves_nothing: long,
];

fn devices_of_every_class_come_and_go() {
    let mut gadgets = Gadgets::load(3);
    let vm = Vm::new("a").start();
    let office = Gadget::new(0x1d6b, 0x0104).keyboard().network().serial_port();
    let studio = Gadget::new(0x1d6b, 0x0105).midi().printer().storage(&[4, 4]);
    let phone = Gadget::new(0x1d6b, 0x0106).interface(0xff).fast_network();
    let zoo = [office, studio, phone].into_iter().zip(0..);
    let zoo: Vec<Plugged> = zoo.map(|(gadget, socket)| gadgets.plug(gadget, socket)).collect();
    let drivers = |device: usize| (0..5).filter_map(|n| zoo[device].driver_of(n)).collect();
    let have = |device, wanted: &[&str]| {
        let what = format!("{wanted:?} for {:?}", zoo[device]);
        wait_until(&what, || Vec::<String>::eq(&drivers(device), wanted));
    };
    let have_drivers = || {
        have(0, &["usbhid", "cdc_ether", "cdc_ether", "cdc_acm", "cdc_acm"]);
        have(1, &["snd-usb-audio", "snd-usb-audio", "usblp", "usb-storage"]);
        have(2, &["cdc_ncm", "cdc_ncm"]);
    };
    have_drivers();
    for node in ["/dev/ttyACM0", "/dev/usb/lp0", "/dev/snd/midiC0D0", "/dev/hidraw0"] {
        wait_until(node, || Path::new(node).exists());
    }
    assert_ne!(zoo[1].lun(0), zoo[1].lun(1));

    for device in &zoo {
        run(["attach", &vm.socket(), &device.port]).succeeds();
    }
    vm.gets(&zoo.iter().collect::<Vec<_>>());
    for device in &zoo {
        run(["detach", &vm.socket(), &device.port]).succeeds();
    }
    vm.loses_all();
    have_drivers();
    for device in &zoo {
        gadgets.pull(device);
    }
}

fn a_usb_3_hub_has_two_halves_and_each_port_of_it_a_twin() {
    let mut remotes = Remotes::load();
    let vm = Vm::new("a").start();
    let slow = Device::new(0x1209, 0x0001).interface(&VENDOR);
    let fast = Device::new(0x1209, 0x0002).interface(&VENDOR).super_speed();
    let (usb2, slow) = remote_hub::plug(&mut remotes, false, 4, vec![(slow, 2)]);
    assert_eq!(listed(&slow[0])["twin"], Value::Null, "its other half is not there yet");
    let (usb3, fast) = remote_hub::plug(&mut remotes, true, 4, vec![(fast, 1)]);
    assert_eq!(listed(&usb2)["twin"], usb3.port);
    assert_eq!(listed(&slow[0])["twin"], format!("{}.2", usb3.port));
    assert_eq!(listed(&fast[0])["twin"], format!("{}.1", usb2.port));
    assert_eq!(listed(&fast[0])["speed_mbps"], 5000);
    run(["attach", &vm.socket(), &slow[0].port, &fast[0].port]).succeeds();
    vm.gets(&[&slow[0], &fast[0]]);
    for hub in [&usb2, &usb3] {
        run(["attach", &vm.socket(), &hub.port]).exits(7);
    }
    remote_hub::pull(&mut remotes, &usb2, &slow);
    remote_hub::pull(&mut remotes, &usb3, &fast);
}

fn a_device_that_hangs_in_probe_keeps_its_readers_waiting() {
    let mut remotes = Remotes::load();
    let id = remotes.insert(Device::hangs_in_probe(1), 2);
    let sysfs = wait_for("the kernel to find it", || {
        remote::socket(2, false).candidates().into_iter().find(|path| path.join("product").exists())
    });
    let product = sysfs.join("product");
    let reader = thread::spawn(move || fs::read_to_string(product));
    // It answers what needs no lock, a whole second long.
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(1) {
        assert_eq!(fs::read_to_string(sysfs.join("idProduct")).unwrap(), "0020\n");
    }
    assert!(!reader.is_finished(), "{:?}", reader.join());
    remotes.remove(&id);
    wait_until("the reader goes on", || reader.is_finished());
}

fn a_device_that_leaves_at_any_moment_leaves_nothing() {
    let mut hardware = Hardware::open();
    let mut remotes = Remotes::load();
    let vm = Vm::new("a").start();
    configure(&["a"], &rule("a", "port = \"*\""));
    let mut daemon = Daemon::start();
    // The kernel asks a few times, then QEMU does.
    let leave = (1..=10).map(|moment| {
        let mut asked = 0;
        let device = Device::new(0x1209, 0x0001).interface(&VENDOR).answers(move |_| {
            asked += 1;
            (asked == moment).then_some(Answer::Disconnect)
        });
        remotes.insert(device, moment)
    });
    let mut leave: Vec<String> = leave.collect();
    leave.push(remotes.insert(Device::new(0x1209, 0x0002).interface(&VENDOR), 11));
    // The kernel tries each of them several times.
    wait_at_most(4 * PATIENCE, "the one that stays to be attached", || {
        vm.ids().iter().any(|id| id.ends_with("-11")).then_some(())
    });
    let mouse = hardware.plug(hardware::Device::Mouse, xhci(3));
    wait_until("and another device", || vm.ids().contains(&mouse.id_in_vm()));
    for id in leave {
        remotes.remove(&id);
    }
    vm.gets(&[&mouse]);
    daemon.is_idle();
    vm.gets(&[&mouse]);
    vm.must_have_no_spare_descriptors();
    daemon.signal(Signal::TERM);
    assert!(daemon.wait().success());
}

/// What `list --json` says of it.
fn listed(device: &Plugged) -> Value {
    let list: Value = serde_json::from_str(&run(["list", "--json"]).succeeds().stdout).unwrap();
    let mut devices = list["devices"].as_array().unwrap().iter();
    devices.find(|entry| entry["port"] == device.port).cloned().unwrap_or_default()
}
