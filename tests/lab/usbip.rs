//! A device from another machine: the kernel's USB/IP, over loopback.

use crate::hardware::{Hardware, Stick, xhci};
use crate::tool::run;
use crate::vm::Vm;
use crate::wait::{wait_for, wait_until};
use std::fs;
use std::net::TcpStream;
use std::process::{Child, Command};

crate::tests![a_device_from_another_machine_is_at_a_port_like_any_other: any_qemu];

fn a_device_from_another_machine_is_at_a_port_like_any_other() {
    must("modprobe", &["-a", "vhci-hcd", "usbip-host"]);
    must("ip", &["link", "set", "lo", "up"]);
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").paused().start();
    let stick = hardware.plug(Stick::bootable("FAR", "booted from afar"), xhci(3));
    let _server = Server(Command::new("usbipd").spawn().unwrap());
    wait_until("the server to listen", || TcpStream::connect("127.0.0.1:3240").is_ok());
    must("usbip", &["bind", "-b", &stick.port]);
    must("usbip", &["attach", "-r", "127.0.0.1", "-b", &stick.port]);
    let port = wait_for("the device to come out of the network", || port_of("FAR", &stick.port));

    run(["attach", &vm.socket(), &port]).succeeds();
    assert_eq!(vm.ids(), [format!("usb-host-{port}")]);
    let shown = run(["inspect", &vm.socket()]).succeeds().stdout;
    assert!(shown.contains(&format!("usb-host-{port}")) && shown.contains("present"), "{shown}");
    vm.boot();
    vm.wait_for_debug("booted from afar");
    run(["detach", &vm.socket(), &port]).succeeds();
    vm.loses_all();

    must("usbip", &["detach", "-p", &usbip_port()]);
    wait_until("it to be gone", || port_of("FAR", &stick.port).is_none());
    must("usbip", &["unbind", "-b", &stick.port]);
}

/// The port of the device with this serial number that is not at `other`.
fn port_of(serial: &str, other: &str) -> Option<String> {
    let mut ports = fs::read_dir("/sys/bus/usb/devices").unwrap().map(|entry| entry.unwrap());
    let far = ports.find(|entry| {
        let its_serial = fs::read_to_string(entry.path().join("serial")).unwrap_or_default();
        its_serial.trim() == serial && entry.file_name() != other
    })?;
    far.file_name().into_string().ok()
}

/// What USB/IP itself calls the only port in use: `Port 15: <Port in Use> ...`.
fn usbip_port() -> String {
    let shown = Command::new("usbip").arg("port").output().unwrap().stdout;
    let shown = String::from_utf8(shown).unwrap();
    let line = shown.lines().find_map(|line| line.strip_prefix("Port ")?.split_once(':'));
    line.unwrap_or_else(|| panic!("{shown}")).0.to_owned()
}

struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn must(program: &str, arguments: &[&str]) {
    let status = Command::new(program).args(arguments).status().unwrap();
    assert!(status.success(), "{program} {arguments:?}: {status}");
}
