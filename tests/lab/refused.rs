//! What must not leave the host.

use crate::hardware::{Device, Hardware, Plugged, Stick, xhci};
use crate::journal::Journal;
use crate::tool::{self, Outcome, run};
use crate::vm::Vm;
use crate::{udev, wait::wait_for};
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

crate::tests![
    a_hub_is_refused_however_it_is_named: any_qemu,
    a_mounted_disk_is_refused_and_stays_whole: any_qemu,
    a_disk_mounted_only_elsewhere_is_refused: any_qemu,
    swap_space_and_parts_of_other_disks_are_refused: any_qemu,
    a_rule_does_not_take_a_mounted_disk_either: any_qemu,
];

const MOUNT_POINT: &str = "/run/the mount";

fn a_hub_is_refused_however_it_is_named() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").start();
    let hub = hardware.plug(Device::Hub, xhci(5));
    let node = hub.node();
    let sysfs = format!("/sys{}", hub.devpath());
    let names = [&hub.port, "0409:55aa", node.to_str().unwrap(), &sysfs];
    let root = ["1:1", "/dev/bus/usb/002/001", "/sys/bus/usb/devices/usb1"];
    for force in [&[][..], &["--force"]] {
        let attach = ["attach", &vm.socket()];
        let refused = run(attach.iter().chain(&names).chain(&root).chain(force)).exits(7);
        let refusals = refused.stderr.lines().filter(|line| line.contains("hub")).count();
        assert_eq!(refusals, names.len() + root.len(), "{}", refused.stderr);
    }
    vm.loses_all();
    assert_eq!(hub.driver().as_deref(), Some("hub"));
}

fn a_mounted_disk_is_refused_and_stays_whole() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").start();
    let stick = hardware.plug(partitioned("SN1"), xhci(3));
    let partition = partition_of(&stick);
    must("mkfs.ext4", &["-q", &partition]);
    fs::create_dir_all(MOUNT_POINT).unwrap();
    must("mount", &[&partition, MOUNT_POINT]);
    let file = Path::new(MOUNT_POINT).join("file");
    fs::write(&file, "precious").unwrap();

    let refused = attach(&vm, &stick).exits(7);
    assert!(refused.stderr.contains(MOUNT_POINT), "{}", refused.stderr);
    assert!(refused.stderr.contains("2-3"), "{}", refused.stderr);
    vm.loses_all();
    assert_eq!(fs::read_to_string(&file).unwrap(), "precious");
    must("umount", &[MOUNT_POINT]);
    must("fsck.ext4", &["-fn", &partition]);

    // Not in use any more, it may go; and while it is being attached nothing else gets it.
    attach(&vm, &stick).succeeds();
    vm.gets(&[&stick]);
    run(["detach", &vm.socket(), &stick.port]).succeeds();

    let partition = partition_of(&stick);
    must("mount", &[&partition, MOUNT_POINT]);
    attach(&vm, &stick).exits(7);
    run(["attach", "--force", &vm.socket(), &stick.port]).succeeds();
    vm.gets(&[&stick]);
    must("umount", &["--lazy", MOUNT_POINT]);
}

fn a_disk_mounted_only_elsewhere_is_refused() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").start();
    let stick = hardware.plug(Stick::new("SN1").mebibytes(4), xhci(3));
    let disk = stick.disk();
    must("mkfs.ext4", &["-q", disk.to_str().unwrap()]);
    let script = "mount \"$0\" /mnt && echo mounted && exec cat";
    let mut elsewhere = Command::new("unshare")
        .args(["--mount", "sh", "-c", script])
        .arg(&disk)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = [0; 8];
    std::io::Read::read_exact(elsewhere.stdout.as_mut().unwrap(), &mut said).expect("mounted");
    assert!(!fs::read_to_string("/proc/mounts").unwrap().contains(disk.to_str().unwrap()));

    let refused = attach(&vm, &stick).exits(7);
    assert!(refused.stderr.contains("mount"), "{}", refused.stderr);
    vm.loses_all();
    drop(elsewhere.stdin.take());
    elsewhere.wait().unwrap();
    attach(&vm, &stick).succeeds();
}

fn swap_space_and_parts_of_other_disks_are_refused() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").start();
    let stick = hardware.plug(partitioned("SN1"), xhci(3));
    let partition = partition_of(&stick);
    must("mkswap", &["-q", &partition]);
    must("swapon", &[&partition]);
    let refused = attach(&vm, &stick).exits(7);
    assert!(refused.stderr.contains("swap"), "{}", refused.stderr);
    must("swapoff", &[&partition]);

    must("modprobe", &["dm-mod"]);
    let table = format!("0 2048 linear {partition} 0");
    must("dmsetup", &["create", "secret", "--noudevsync", "--table", &table]);
    let refused = attach(&vm, &stick).exits(7);
    assert!(refused.stderr.contains("secret"), "{}", refused.stderr);
    must("dmsetup", &["remove", "--noudevsync", "--retry", "secret"]);
    vm.loses_all();
    attach(&vm, &stick).succeeds();
}

fn a_rule_does_not_take_a_mounted_disk_either() {
    let mut hardware = Hardware::open();
    let journal = Journal::journald();
    let vm = Vm::new("a").start();
    let stick = hardware.plug(Stick::new("SN1").mebibytes(4), xhci(3));
    let disk = stick.disk();
    must("mkfs.ext4", &["-q", disk.to_str().unwrap()]);
    fs::create_dir_all(MOUNT_POINT).unwrap();
    must("mount", &[disk.to_str().unwrap(), MOUNT_POINT]);
    tool::rules(&tool::rule(r#"DEVPATH=="*/2-3""#, &vm));
    udev::trigger("add", &stick.sysfs);
    let entry = journal.wait_for("mounted on");
    assert!(entry["MESSAGE"].contains(MOUNT_POINT), "{entry:?}");
    assert_eq!(entry["PRIORITY"], "3");
    udev::settle();
    vm.loses_all();
    assert_eq!(stick.driver().as_deref(), Some("usb-storage"));
    must("umount", &[MOUNT_POINT]);
}

fn attach(vm: &Vm, stick: &Plugged) -> Outcome {
    run(["attach", &vm.socket(), &stick.port])
}

/// A stick with one partition.
fn partitioned(serial: &str) -> Stick {
    let mut table = vec![0; 512];
    let (kind, start, length) = (0x83, 2048_u32, 6144_u32);
    table[450] = kind;
    table[454..458].copy_from_slice(&start.to_le_bytes());
    table[458..462].copy_from_slice(&length.to_le_bytes());
    table[510..].copy_from_slice(&[0x55, 0xaa]);
    Stick::new(serial).content(table).mebibytes(4)
}

fn partition_of(stick: &Plugged) -> String {
    let node = format!("{}1", stick.disk().display());
    wait_for(&node, || Path::new(&node).exists().then(|| node.clone()))
}

#[track_caller]
fn must(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output().expect(program);
    assert!(output.status.success(), "{program} {arguments:?}: {output:?}");
}
