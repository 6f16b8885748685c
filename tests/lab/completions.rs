//! Completion with real devices: ports by their names, and what is in a VM.

use crate::hardware::{Device, Hardware, Stick, xhci};
use crate::tool;
use crate::vm::Vm;

crate::tests![ports_and_ids_are_offered_with_their_names: any_qemu];

fn offered(words: &[&str]) -> String {
    tool::run(["complete", "bash", "--"].iter().chain(words)).succeeds().stdout
}

fn ports_and_ids_are_offered_with_their_names() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").start();
    let socket = vm.socket();
    let hub = hardware.plug(Device::Hub, xhci(4));
    let mouse = hardware.plug(Device::Mouse, xhci(4).below(1));
    let stick = hardware.plug(Stick::new("SN\u{1b}1"), xhci(6));
    assert_eq!(
        offered(&["attach", &socket, ""]),
        "1-4.1\t0627:0001 QEMU USB Mouse\n2-6\t46f4:0001 QEMU USB HARDDRIVE\n"
    );
    assert!(
        offered(&["rule", "--vm", &socket, "1"]).starts_with("1-4\thub, 0409:55aa QEMU USB Hub\n")
    );
    // bash parts words at `:`, and what it kept is left out.
    assert_eq!(
        offered(&["attach", &socket, "0627", ":", "0"]),
        "0001\t1-4.1 0627:0001 QEMU USB Mouse\n"
    );
    // A port by its stable name, where that was begun.
    assert_eq!(
        offered(&["attach", &socket, "pci-0000", ":", "00", ":", "14.0-usbv2"]),
        "14.0-usbv2-0:4.1\t1-4.1 0627:0001 QEMU USB Mouse\n"
    );
    assert!(offered(&["attach", &socket, "s"]).contains("serial="), "the mouse has one");
    assert!(!offered(&["attach", &socket, "s"]).contains("SN"), "it cannot be typed");
    assert!(offered(&["inspect", ""]).contains(&format!("{socket}\ta\n")));
    assert_eq!(offered(&["inspect", "a"]), format!("a\t{socket}\n"));
    assert_eq!(offered(&["udev", "a"]), "", "a rule has no such name");

    tool::run(["attach", &socket, &stick.port]).succeeds();
    assert_eq!(offered(&["detach", &socket, ""]), "usb-host-2-6\t46f4:0001 QEMU USB HARDDRIVE\n");
    assert_eq!(offered(&["detach", &socket, "2"]), "2-6\t46f4:0001 QEMU USB HARDDRIVE\n");
    assert!(offered(&["detach", &socket, "pci"]).starts_with("pci-0000:00:14.0-usbv3-0:6\t46f4"));
    hardware.pull(&stick);
    assert_eq!(offered(&["detach", &socket, "usb"]), "usb-host-2-6\tgone\n");
    assert_eq!(offered(&["detach", "/run/none.qmp", ""]), "");
    hardware.pull_all(&[mouse, hub]);
}
