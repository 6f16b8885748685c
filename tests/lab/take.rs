//! Devices that go from one VM to another, and back to the host: `attach --take`, `release`.

use crate::hardware::{Device, Hardware, Stick, xhci};
use crate::owners::{claim, theirs};
use crate::tool::{run, run_within};
use crate::vm::Vm;
use crate::wait::wait_until;
use serde_json::json;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Duration;

crate::tests![
    a_device_is_taken_from_the_vm_that_has_it: every_qemu,
    what_its_vm_would_take_again_is_not_taken: any_qemu,
    what_a_vm_has_twice_leaves_it_as_a_whole: any_qemu,
    what_has_no_room_or_no_monitor_is_not_taken: waits,
    a_vm_that_may_have_the_device_gets_all_of_the_time: waits,
    release_gives_a_device_back_whoever_has_it: any_qemu,
];

fn a_device_is_taken_from_the_vm_that_has_it() {
    let mut hardware = Hardware::open();
    let (a, b) = (Vm::new("a").start(), Vm::new("b").start());
    let stick = hardware.plug(Stick::new("SN1"), xhci(3));
    run(["attach", &a.socket(), &stick.port]).succeeds();
    let take = |options: &[&str]| {
        run(["attach", "--take", &b.socket(), &stick.port].iter().chain(options))
    };
    let said = take(&["--dry-run"]).succeeds().stdout;
    assert!(
        said.contains(&format!(
            "would take 2-3 (46f4:0001, {}:{}) (usb-host-2-3) from {}",
            stick.bus,
            stick.address,
            a.socket()
        )),
        "{said}"
    );
    a.must_have(&stick);
    let said = take(&[]).succeeds().stdout;
    assert!(said.contains("took 2-3") && said.contains("attached 2-3"), "{said}");
    a.loses_all();
    b.gets(&[&stick]);
    run(["detach", &b.socket(), &stick.port]).succeeds();
    // Whatever its id is there, and whoever made it.
    theirs(&a, &stick, "theirs");
    let said = take(&[]).succeeds().stdout;
    assert!(said.contains("(theirs) from"), "{said}");
    a.loses_all();
    b.gets(&[&stick]);
    // From who searches for it, too: the search ends with the object.
    run(["detach", &b.socket(), &stick.port]).succeeds();
    a.qmp("device_add", json!({"driver": "usb-host", "vendorid": 0x46f4}));
    wait_until("QEMU has found it", || a.open_nodes() == [stick.node()]);
    take(&[]).succeeds();
    a.loses_all();
    b.gets(&[&stick]);
}

fn what_its_vm_would_take_again_is_not_taken() {
    let mut hardware = Hardware::open();
    let (a, b) = (Vm::new("a").start(), Vm::new("b").start());
    let mouse = hardware.plug(Device::Mouse, xhci(3));
    // A VM that is paused searches for nothing until it runs again (QEMU, hw/usb/host-libusb.c,
    // `usb_host_auto_check`).
    a.qmp("stop", json!({}));
    theirs(&a, &mouse, "has");
    a.qmp("device_add", json!({"driver": "usb-host", "id": "waits", "vendorid": 0x0627}));
    let attached = |id: &str| {
        let path = format!("/machine/peripheral/{id}");
        a.qmp("qom-get", json!({"path": path, "property": "attached"}))
    };
    assert_eq!((attached("has"), attached("waits")), (json!(true), json!(false)));
    for command in [&["attach", "--take", &b.socket(), &mouse.port][..], &["release", &mouse.port]]
    {
        let refused = run(command).exits(7).stderr;
        assert!(refused.contains("its waits looks for such a device"), "{refused}");
    }
    assert_eq!(attached("has"), json!(true));
    b.loses_all();
    run(["detach", &a.socket(), "waits"]).succeeds();
    a.qmp("cont", json!({}));
    run(["attach", "--take", &b.socket(), &mouse.port]).succeeds();
    a.loses_all();
    b.gets(&[&mouse]);
}

fn what_a_vm_has_twice_leaves_it_as_a_whole() {
    let mut hardware = Hardware::open();
    let (a, b) = (Vm::new("a").start(), Vm::new("b").start());
    let stick = hardware.plug(Stick::new("SN1"), xhci(3));
    // QEMU lets both of them open it.
    for id in ["one", "two"] {
        a.qmp("device_add", json!({"driver": "usb-host", "id": id, "vendorid": 0x46f4}));
    }
    wait_until("both have found it", || a.open_nodes().len() == 2);
    let said = run(["attach", "--take", &b.socket(), &stick.port]).succeeds().stdout;
    assert!(said.contains("(one, two) from"), "{said}");
    a.loses_all();
    b.gets(&[&stick]);
}

fn what_has_no_room_or_no_monitor_is_not_taken() {
    let mut hardware = Hardware::open();
    let a = Vm::new("a").start();
    let b = Vm::new("b").without_controller().start();
    let stick = hardware.plug(Stick::new("SN1"), xhci(3));
    run(["attach", &a.socket(), &stick.port]).succeeds();
    run(["attach", "--take", &b.socket(), &stick.port]).exits(6);
    let _held: Vec<_> = ["qmp", "check"]
        .map(|monitor| UnixStream::connect(format!("/run/vm/a.{monitor}")))
        .into_iter()
        .collect();
    let c = Vm::new("c").start();
    let refused = run_within("8", ["attach", "--take", &c.socket(), &stick.port]).exits(5).stderr;
    let named = format!("is in VM a (process {}), and no monitor", a.pid());
    assert!(refused.contains(&named), "{refused}");
    a.must_have(&stick);
}

fn a_vm_that_may_have_the_device_gets_all_of_the_time() {
    let mut hardware = Hardware::open();
    let (a, b) = (Vm::new("a").start(), Vm::new("b").start());
    let mouse = hardware.plug(Device::Mouse, xhci(3));
    run(["attach", &a.socket(), &mouse.port]).succeeds();
    let held = UnixStream::connect(a.socket()).unwrap();
    let words = ["attach", "--take", &b.socket(), &mouse.port];
    thread::scope(|scope| {
        let taken = scope.spawn(|| run(words));
        // Longer than a VM gets that may not have the device.
        thread::sleep(Duration::from_secs(4));
        drop(held);
        taken.join().unwrap().succeeds();
    });
    a.loses_all();
    b.gets(&[&mouse]);
    hardware.pull(&mouse);
    let held = UnixStream::connect(b.socket()).unwrap();
    let unknown = run_within("8", ["release", &mouse.port]).exits(5).stderr;
    let may = format!(
        "no USB device for port {} on this host; `usb-qmp-hotplug list` shows what is \
        plugged in; VM {} may still have it",
        mouse.port,
        b.socket()
    );
    assert!(unknown.contains(&may), "{unknown}");
    thread::scope(|scope| {
        let released = scope.spawn(|| run(["release", &mouse.port]));
        thread::sleep(Duration::from_secs(4));
        drop(held);
        let said = released.join().unwrap().succeeds().stdout;
        assert!(said.contains("its device is gone"), "{said}");
    });
    b.loses_all();
}

fn release_gives_a_device_back_whoever_has_it() {
    let mut hardware = Hardware::open();
    let (a, b) = (Vm::new("a").start(), Vm::new("b").start());
    let stick = hardware.plug(Stick::new("SN1"), xhci(3));
    let mouse = hardware.plug(Device::Mouse, xhci(4));
    run(["attach", &a.socket(), &stick.port]).succeeds();
    theirs(&b, &mouse, "theirs");
    run(["release", "--dry-run", &stick.port, &mouse.port]).succeeds();
    a.must_have(&stick);
    let said = run(["release", &stick.port, &mouse.port]).succeeds().stdout;
    assert!(said.contains("detached 2-3") && said.contains("(theirs) from /run/vm/b."), "{said}");
    a.loses_all();
    b.loses_all();
    wait_until("the drivers are back", || {
        stick.driver().as_deref() == Some("usb-storage")
            && mouse.driver().as_deref() == Some("usbhid")
    });
    let said = run(["release", &stick.port]).succeeds().stdout;
    assert!(said.contains("no VM has 2-3"), "{said}");
    // What a killed QEMU has left without a driver.
    run(["attach", &a.socket(), &stick.port]).succeeds();
    a.kill();
    run(["release", &stick.port]).succeeds();
    assert_eq!(stick.driver().as_deref(), Some("usb-storage"));
    // What is gone and still in a VM.
    run(["attach", &b.socket(), &stick.port]).succeeds();
    hardware.pull(&stick);
    let said = run(["release", "2-3"]).succeeds().stdout;
    assert!(said.contains("usb-host-2-3") && said.contains("its device is gone"), "{said}");
    b.loses_all();
    run(["release", "2-3"]).exits(3);
    // A program keeps what it has.
    let program = claim(&mouse);
    let refused = run(["release", &mouse.port]).exits(7).stderr;
    assert!(refused.contains(&program.0.id().to_string()), "{refused}");
}
