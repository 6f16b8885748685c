//! The shipped units under a real systemd: all that they deny, and the daemon's work with what is left.

use crate::daemon::{configuration, rule};
use crate::gadget::{Gadget, Gadgets};
use crate::hardware::{Device, Hardware, Plugged, Stick, xhci};
use crate::host::must;
use crate::service::{Service, in_the_sandbox, other_unit};
use crate::tool::{self, PROGRAM, SECONDS};
use crate::uses::adapter;
use crate::vm::Vm;
use crate::wait::wait_until;
use serde_json::{Value, json};
use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;

crate::tests![
    the_unit_denies_what_it_says: systemd,
    the_unit_is_not_exposed: systemd,
    the_service_attaches_what_is_plugged_in_until_it_is_pulled: systemd,
    the_service_gives_a_killed_vm_its_device_again: systemd,
    the_service_waits_for_a_busy_monitor: systemd,
    the_service_refuses_a_disk_that_the_host_uses: systemd,
    the_service_has_systemd_unmount_what_its_rule_wants_unmounted: systemd,
    the_service_asks_udev_and_sees_the_hosts_network: systemd,
    at_shutdown_devices_leave_before_libvirt_saves_the_guests: systemd,
    the_service_of_a_user_does_the_same_for_the_users_vm: systemd,
];

fn the_unit_denies_what_it_says() {
    let mut hardware = Hardware::open();
    let stick = hardware.plug(Stick::new("SN1"), xhci(3));
    let (disk, node) = (stick.disk(), stick.node());
    let said = in_the_sandbox(&format!(
        "try() {{ if (eval \"$2\") >/dev/null 2>&1; then echo \"may $1\"; else echo \"may not $1\"; fi; }}
        try 'use the node' ': <>{}'
        try 'read the disk' ': <{disk}'
        try 'write the disk' ': >>{disk}'
        try 'read memory' ': </dev/mem'
        try 'use a terminal' ': <>/dev/ttyS0'
        try 'rebind drivers' ': >>/sys/bus/usb/drivers_probe'
        try 'write sysfs' ': >>/sys/module/usbcore/parameters/autosuspend'
        try 'write /etc' ': >/etc/new'
        try 'reach the network' 'perl -MSocket -e \"socket(S, PF_INET, SOCK_STREAM, 0) or exit 1\"'
        try 'name a process' 'grep -q systemd /proc/1/comm'
        try 'look into a process' 'head -c 1 /proc/1/environ'
        try 'see an adapter of the host' 'tail -n +3 /proc/net/dev | grep -v \" lo:\"'
        try 'make a namespace' 'unshare --mount true'
        try 'mount' 'mount -t tmpfs tmpfs /mnt'
        try 'kill' 'setpriv --dump | grep -q cap_kill'
        try 'set the clock' 'date -s @0'
        ",
        node.display(),
        disk = disk.display(),
    ));
    let may: Vec<&str> = said.lines().filter_map(|line| line.strip_prefix("may ")).collect();
    let may: Vec<&str> = may.into_iter().filter(|what| !what.starts_with("not ")).collect();
    assert_eq!(said.lines().count(), 16, "{said}");
    assert_eq!(
        may,
        ["use the node", "read the disk", "rebind drivers", "name a process"],
        "{said}"
    );
}

fn the_unit_is_not_exposed() {
    let service = Service::of_the_machine();
    service.configure(&[], "");
    let output = Command::new("systemd-analyze")
        .args(["security", "--no-pager", "usb-qmp-hotplug.service"])
        .output()
        .unwrap();
    let report = String::from_utf8(output.stdout).unwrap();
    let exposure = report.rsplit_once("usb-qmp-hotplug.service: ").map(|(_, level)| level);
    let exposure: f32 = exposure.unwrap().split(' ').next().unwrap().parse().unwrap();
    assert!(exposure <= 1.5, "{report}");
}

fn the_service_attaches_what_is_plugged_in_until_it_is_pulled() {
    let service = Service::of_the_machine();
    comes_and_goes(&service, Vm::new("a").start());
}

fn comes_and_goes(service: &Service, vm: Vm) {
    let mut hardware = Hardware::open();
    let before = hardware.plug(Stick::new("SN1"), xhci(3));
    service.configure(&["a"], &rule("a", "serial = \"SN*\""));
    service.start();
    vm.must_have(&before);
    service.wait_for_status("1 VM, 1 running, 1 device attached");
    let stick = hardware.plug(Stick::new("SN2"), xhci(4));
    vm.gets(&[&before, &stick]);
    hardware.pull_all(&[before, stick]);
    vm.loses_all();
    service.configure(&["a"], &rule("a", "port = \"1-5\""));
    service.reload();
    let mouse = hardware.plug(Device::Mouse, xhci(5));
    vm.gets(&[&mouse]);
    service.configure(&["a"], "[[rule]]\nvm = \"b\"\n");
    service.reload();
    service.wait_for_log(&["usb-qmp-hotplug.toml:4:", "b"]);
    vm.must_have(&mouse);
    assert_eq!(service.property("ActiveState"), "active");
}

fn the_service_gives_a_killed_vm_its_device_again() {
    let mut hardware = Hardware::open();
    let service = Service::of_the_machine();
    service.configure(&["a"], &rule("a", "port = \"2-3\""));
    service.start();
    let stick = hardware.plug(Stick::new("SN1"), xhci(3));
    for _ in 0..2 {
        let vm = Vm::new("a").unprivileged().start();
        vm.gets(&[&stick]);
        vm.kill();
        wait_until("the driver is back", || stick.driver().as_deref() == Some("usb-storage"));
        service.wait_for_status("1 VM, 0 running, 0 devices attached");
    }
}

fn the_service_waits_for_a_busy_monitor() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").start();
    let service = Service::of_the_machine();
    service.configure(&["a"], &rule("a", "port = \"2-3\""));
    service.start();
    let holder = UnixStream::connect(vm.socket()).unwrap();
    BufReader::new(&holder).read_line(&mut String::new()).unwrap();
    let stick = hardware.plug(Stick::new("SN1"), xhci(3));
    service.wait_for_log(&["a does not answer", "another client holds its monitor"]);
    drop(holder);
    vm.gets(&[&stick]);
}

/// A stick with a filesystem that is mounted there.
fn mounted(hardware: &mut Hardware, directory: &str) -> Plugged {
    let stick = hardware.plug(Stick::new("SN1").mebibytes(4), xhci(3));
    let disk = stick.disk();
    let disk = disk.to_str().unwrap();
    must("mkfs.ext4", &["-q", disk]);
    fs::create_dir_all(directory).unwrap();
    must("mount", &[disk, directory]);
    stick
}

fn the_service_refuses_a_disk_that_the_host_uses() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").start();
    let stick = mounted(&mut hardware, "/run/stick");
    let service = Service::of_the_machine();
    service.configure(&["a"], &rule("a", "port = \"2-3\""));
    service.start();
    service.wait_for_log(&["mounted on /run/stick"]);
    assert!(vm.ids().is_empty());
    // A program that has it open, and no lock on it. The service may not look into that.
    let open = fs::File::open(stick.disk()).unwrap();
    must("umount", &["/run/stick"]);
    service.reload();
    service.wait_for_log(&["sda is in use by something that this user may not see"]);
    assert!(vm.ids().is_empty());
    drop(open);
    vm.gets(&[&stick]);
}

fn the_service_has_systemd_unmount_what_its_rule_wants_unmounted() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").start();
    let stick = mounted(&mut hardware, "/run/a stick");
    let busy = fs::File::create("/run/a stick/open").unwrap();
    let service = Service::of_the_machine();
    service.configure(&["a"], &rule("a", "port = \"2-3\"\nunmount = true"));
    service.start();
    service.wait_for_log(&["cannot unmount /run/a stick"]);
    assert!(vm.ids().is_empty() && Path::new("/run/a stick/open").exists());
    drop(busy);
    service.reload();
    service.wait_for_log(&["unmounted /run/a stick"]);
    vm.gets(&[&stick]);
    assert!(!Path::new("/run/a stick/open").exists());
    assert!(!service.log().contains("may not unmount"), "{}", service.log());
}

fn the_service_asks_udev_and_sees_the_hosts_network() {
    let mut gadgets = Gadgets::load(1);
    let vm = Vm::new("a").start();
    let device = gadgets.plug(Gadget::new(0x1d6b, 0x0104).network(), 0);
    let adapter = adapter(&device);
    must("ip", &["address", "add", "10.9.9.2/24", "dev", &adapter]);
    must("ip", &["link", "set", &adapter, "up"]);
    let service = Service::of_the_machine();
    service
        .configure(&["a"], &rule("a", "property = { ID_VENDOR_ID = \"1d6b\", ID_BUS = \"usb\" }"));
    service.start();
    vm.gets(&[&device]);
    service.wait_for_log(&["was in use on this host", &format!("{adapter} has an address")]);
    gadgets.pull(&device);
    vm.loses_all();
    let again = gadgets.plug(Gadget::new(0x1d6b, 0x0104).network(), 0);
    vm.gets(&[&again]);
    gadgets.pull(&again);
    vm.loses_all();
}

fn at_shutdown_devices_leave_before_libvirt_saves_the_guests() {
    const GUESTS: &str = "libvirt-guests.service";
    let mut hardware = Hardware::open();
    let stick = hardware.plug(Stick::new("SN1"), xhci(3));
    let vm = Vm::new("a").start();
    other_unit(
        GUESTS,
        &format!(
            "[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=true\n\
             ExecStop=sh -c 'systemctl is-active usb-qmp-hotplug.service >/run/state; \
             {PROGRAM} --timeout {SECONDS} inspect --json {} >/run/saved'\n",
            vm.socket()
        ),
    );
    // As shutdown.target, it ends all in one transaction.
    let all = format!("{GUESTS} usb-qmp-hotplug.service");
    other_unit("end.target", &format!("[Unit]\nConflicts={all}\nAfter={all}\n"));
    let service = Service::of_the_machine();
    let rules = rule("a", "port = \"2-3\"");
    service.configure_all(&format!("detach_at_stop = true\n{}", configuration(&["a"], &rules)));
    for _ in 0..2 {
        let _ = fs::remove_file("/run/saved");
        must("systemctl", &["start", GUESTS]);
        service.start();
        vm.gets(&[&stick]);
        must("systemctl", &["start", "end.target"]);
        assert_eq!(fs::read_to_string("/run/state").unwrap(), "inactive\n");
        let saved: Value = serde_json::from_slice(&fs::read("/run/saved").unwrap()).unwrap();
        assert_eq!(saved["devices"], json!([]), "{saved}");
        assert_eq!(saved["vm"]["status"], "running");
        wait_until("the driver is back", || stick.driver().as_deref() == Some("usb-storage"));
    }
}

fn the_service_of_a_user_does_the_same_for_the_users_vm() {
    tool::rules(
        "ACTION!=\"remove\", SUBSYSTEM==\"usb\", ENV{DEVTYPE}==\"usb_device\", \
         ATTR{bDeviceClass}!=\"09\", GROUP=\"nogroup\", MODE=\"0660\"\n",
    );
    let service = Service::of_a_user();
    comes_and_goes(&service, Vm::new("a").unprivileged().start());
}
