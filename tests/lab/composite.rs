//! Devices with several functions and several disks: what the host uses of one of them keeps all of it.

use crate::gadget::{Gadget, Gadgets};
use crate::hardware::Plugged;
use crate::host::{load, must};
use crate::tool::{run, run_as_the_unit, run_as_the_unit_within};
use crate::vm::Vm;
use crate::wait::{wait_for, wait_until};
use rustix::fs::{FlockOperation, flock};
use std::fs::{self, File};
use std::path::Path;
use std::process::Command;

crate::tests![
    a_disk_in_use_keeps_the_whole_device: any_qemu,
    parts_of_arrays_and_volumes_are_refused: any_qemu,
    a_disc_that_a_program_reads_is_refused: any_qemu,
];

const MOUNT_POINT: &str = "/run/composite";

/// A keyboard, a modem and two disks.
fn composite() -> Gadget {
    Gadget::new(0x1d6b, 0x0104).keyboard().serial_port().storage(&[8, 8])
}

fn a_disk_in_use_keeps_the_whole_device() {
    let mut gadgets = Gadgets::load(1);
    let vm = Vm::new("a").start();
    let device = gadgets.plug(composite(), 0);
    let [first, second] = [0, 1].map(|number| name(&device, number));
    must("mkfs.ext4", &["-q", &first]);
    fs::create_dir_all(MOUNT_POINT).unwrap();
    must("mount", &[&first, MOUNT_POINT]);
    is_refused(&vm, &device, &first, MOUNT_POINT);
    must("umount", &[MOUNT_POINT]);

    must("mkswap", &["-q", &second]);
    must("swapon", &[&second]);
    is_refused(&vm, &device, &second, "swap");
    must("swapoff", &[&second]);

    run(["attach", &vm.socket(), &device.port]).succeeds();
    vm.gets(&[&device]);
}

fn parts_of_arrays_and_volumes_are_refused() {
    let mut gadgets = Gadgets::load(1);
    let vm = Vm::new("a").start();
    let device = gadgets.plug(composite(), 0);
    let second = name(&device, 1);

    // What lvm2 asks of the kernel for a logical volume.
    load("dm-mod", &[]);
    let table = format!("0 2048 linear {second} 0");
    let uuid = "LVM-0123456789abcdef";
    must("dmsetup", &["create", "group-data", "--uuid", uuid, "--noudevsync", "--table", &table]);
    is_refused(&vm, &device, &second, "group-data");
    must("dmsetup", &["remove", "--noudevsync", "--retry", "group-data"]);

    let array = Array::assemble(&device.lun(1));
    is_refused(&vm, &device, &second, "stop the array (`mdadm --stop /dev/md7`)");
    array.stop();

    run(["attach", &vm.socket(), &device.port]).succeeds();
    vm.gets(&[&device]);
}

fn a_disc_that_a_program_reads_is_refused() {
    let mut gadgets = Gadgets::load(1);
    let vm = Vm::new("a").start();
    let device = gadgets.plug(Gadget::new(0x1d6b, 0x0104).cdrom(4), 0);
    load("sr_mod", &[]);
    let disc = wait_for("the disc", || File::open("/dev/sr0").ok());
    let mut program = Command::new("sleep").arg("1000").stdin(disc).spawn().unwrap();
    let attach = ["attach", &vm.socket(), &device.port];
    let refused = run(attach).exits(7).stderr;
    let user = format!("sr0 is open in process {} (sleep)", program.id());
    assert!(refused.contains(&user), "{refused}");
    // udev's look at the disc, which is locked meanwhile, hides nobody.
    let udevs = File::open("/dev/sr0").unwrap();
    flock(&udevs, FlockOperation::LockShared).unwrap();
    let refused = run_as_the_unit_within("20", attach).exits(7).stderr;
    assert!(
        refused.contains(
            "sr0 is open, perhaps only for a look by the kernel, by udev, or by a program"
        ),
        "{refused}"
    );
    drop(udevs);
    let refused = run_as_the_unit(attach).exits(7).stderr;
    assert!(refused.contains("sr0 is in use by something"), "{refused}");
    vm.loses_all();
    program.kill().unwrap();
    program.wait().unwrap();
    run_as_the_unit(attach).succeeds();
    vm.gets(&[&device]);
}

#[track_caller]
fn is_refused(vm: &Vm, device: &Plugged, disk: &str, reason: &str) {
    let refused = run(["attach", &vm.socket(), &device.port]).exits(7).stderr;
    let disk = disk.trim_start_matches("/dev/");
    assert!(refused.contains(&device.port) && refused.contains(disk), "{refused}");
    assert!(refused.contains(reason), "{refused}");
    vm.loses_all();
    assert_eq!(device.driver().as_deref(), Some("usbhid"));
}

fn name(device: &Plugged, number: u32) -> String {
    device.lun(number).to_str().unwrap().to_owned()
}

/// An array of one disk, without mdadm (Linux, Documentation/admin-guide/md.rst).
pub struct Array;

impl Array {
    const MD: &str = "/sys/block/md7/md";

    pub fn assemble(disk: &Path) -> Array {
        load("md-mod", &[]);
        load("raid1", &[]);
        fs::write("/sys/module/md_mod/parameters/new_array", "md7").expect("md");
        let name = disk.file_name().unwrap().to_str().unwrap();
        let number = fs::read_to_string(format!("/sys/class/block/{name}/dev")).unwrap();
        let member = format!("dev-{name}");
        for (attribute, value) in [
            ("metadata_version", "none"),
            ("level", "raid1"),
            ("raid_disks", "1"),
            ("component_size", "2048"),
            ("new_dev", &number),
            (&format!("{member}/slot"), "0"),
            ("array_state", "active"),
        ] {
            fs::write(format!("{}/{attribute}", Array::MD), value)
                .unwrap_or_else(|error| panic!("{attribute}: {error}"));
        }
        Array
    }

    pub fn stop(self) {
        wait_until("the array is not in use", || {
            fs::write(format!("{}/array_state", Array::MD), "clear").is_ok()
        });
    }
}
