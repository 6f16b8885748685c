//! Devices of every kind.

use crate::gadget::{Gadget, Gadgets};
use crate::hardware::Plugged;
use crate::tool::run;
use crate::vm::Vm;
use crate::wait::wait_until;
use std::path::Path;

crate::tests![devices_of_every_class_come_and_go];

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
