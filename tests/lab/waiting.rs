//! What the daemon was refused for a reason that passes: it is done when the reason has passed, and not before
//! anybody looks for it again.

use crate::composite::Array;
use crate::daemon::{CONFIG, Daemon, configure, rule};
use crate::hardware::{Device, Hardware, Plugged, Stick, xhci};
use crate::host::{load, must};
use crate::remote::{self, Remotes};
use crate::tool::{self, run, run_alone};
use crate::truth::open_locked;
use crate::vm::Vm;
use crate::wait::{wait_at_most, wait_until};
use rustix::fs::{FlockOperation, flock};
use rustix::process::{Resource, Rlimit, prlimit};
use serde_json::json;
use std::fs::{self, File};
use std::time::Duration;

crate::tests![
    a_mounted_stick_is_attached_when_it_is_unmounted: waits,
    swap_space_is_attached_when_it_is_not_swapped_to: any_qemu,
    a_disk_that_a_program_has_open_is_attached_when_it_is_closed: any_qemu,
    what_another_vm_has_is_attached_when_it_is_detached_there: any_qemu,
    what_another_vm_has_is_attached_when_that_is_killed: any_qemu,
    what_a_qemu_took_by_itself_is_attached_when_it_gives_it_back: any_qemu,
    what_somebody_has_locked_is_attached_when_it_is_closed: any_qemu,
    what_is_not_authorized_is_attached_when_it_is: any_qemu,
    a_full_vm_gets_the_next_device_when_one_is_detached: any_qemu,
    a_full_vm_gets_a_device_when_a_virtual_one_leaves: any_qemu,
    what_is_part_of_other_block_devices_is_attached_when_those_are_gone: any_qemu,
    a_vm_that_migrates_gets_its_device_when_it_has_stopped: every_qemu,
    a_device_whose_drivers_take_long_is_attached_when_they_are_done: waits,
    without_descriptors_it_goes_on_when_there_are_some: any_qemu,
    without_threads_it_goes_on_when_there_are_some: any_qemu,
    what_was_pulled_does_not_wait: any_qemu,
];

/// The kernel tells, so it takes moments, of emulation inside emulation; to look again now and then would take 30 s.
const SOON: Duration = Duration::from_secs(20);

/// What the daemon says to itself when the kernel has woken it, and not its own clock.
const TOLD: &str = "trying again: the kernel reported a change";

/// It gets the device because the kernel has told of it.
#[track_caller]
fn gets_when_told(daemon: &Daemon, vm: &Vm, device: &Plugged) {
    gets_soon(vm, device);
    let log = daemon.log();
    let last = log.lines().rfind(|line| line.contains("trying again"));
    assert!(last.is_some_and(|line| line.contains(TOLD)), "{log}");
}

#[track_caller]
fn gets_soon(vm: &Vm, device: &Plugged) {
    wait_at_most(SOON, "it to be attached", || (vm.ids() == [device.id_in_vm()]).then_some(()));
    vm.must_have(device);
}

/// A daemon that gives the stick at 2-3 to VM a, and has been refused it.
fn refused(vms: &[&str], why: &str) -> Daemon {
    configure(vms, &rule("a", "port = \"2-3\""));
    let daemon = Daemon::launch(&["--verbose", "--timeout", tool::SECONDS], &[]);
    daemon.wait_until_it_says("READY=1");
    let status = last_status(&daemon);
    assert!(status.ends_with(", 1 waiting"), "{status}");
    let line = daemon.wait_for_log(&[why, "it is attached as soon as that is over"]);
    assert!(!line.contains("sync") && !line.contains("--force"), "{line}");
    daemon
}

fn last_status(daemon: &Daemon) -> String {
    let said = daemon.said();
    said.iter().rfind(|line| line.starts_with("STATUS=")).cloned().unwrap_or_default()
}

fn filesystem(stick: &Plugged) -> String {
    let disk = stick.disk().display().to_string();
    must("mkfs.ext4", &["-q", &disk]);
    fs::create_dir_all("/run/stick").unwrap();
    disk
}

fn a_mounted_stick_is_attached_when_it_is_unmounted() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").start();
    let stick = hardware.plug(Stick::new("SN1").mebibytes(4), xhci(3));
    must("mount", &[&filesystem(&stick), "/run/stick"]);
    let daemon = refused(&["a"], "mounted on /run/stick");
    // Nobody looks before the kernel tells.
    daemon.must_sleep_for(Duration::from_secs(5));
    // Other mounts are no reason to disturb the VM.
    must("mount", &["-t", "tmpfs", "none", "/mnt"]);
    must("umount", &["/mnt"]);
    // The same again is not worth a line.
    daemon.reload();
    let log = daemon.log();
    let is_new = |line: &&str| line.contains("mounted on") && !line.contains("again");
    assert_eq!(log.lines().filter(is_new).count(), 1, "{log}");
    let would = run(["--config", CONFIG, "sync", "--dry-run"]).exits(7);
    assert!(would.stdout.contains("usb-host-2-3"), "{}", would.stdout);
    assert!(would.stdout.contains("mounted on /run/stick"), "{}", would.stdout);
    daemon.is_idle();
    must("umount", &["/run/stick"]);
    gets_when_told(&daemon, &vm, &stick);
    daemon.wait_for_status("1 VM, 1 running, 1 device attached");
    // It goes back to the host like one that was attached at once.
    vm.kill();
    wait_until("the driver is back", || stick.driver().as_deref() == Some("usb-storage"));
}

fn swap_space_is_attached_when_it_is_not_swapped_to() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").start();
    let stick = hardware.plug(Stick::new("SN1").mebibytes(4), xhci(3));
    let disk = stick.disk().display().to_string();
    must("mkswap", &[&disk]);
    must("swapon", &[&disk]);
    let daemon = refused(&["a"], "swap space");
    must("swapoff", &[&disk]);
    gets_when_told(&daemon, &vm, &stick);
}

fn a_disk_that_a_program_has_open_is_attached_when_it_is_closed() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").start();
    let stick = hardware.plug(Stick::new("SN1").mebibytes(4), xhci(3));
    // As the service, the daemon sees a program that has locked the disk, as QEMU does, and no other.
    let open = File::open(stick.disk()).unwrap();
    flock(&open, FlockOperation::LockExclusive).unwrap();
    let daemon = refused(&["a"], "open in process");
    drop(open);
    gets_when_told(&daemon, &vm, &stick);
}

fn what_another_vm_has_is_attached_when_it_is_detached_there() {
    let mut hardware = Hardware::open();
    let (a, b) = (Vm::new("a").start(), Vm::new("b").start());
    let stick = hardware.plug(Stick::new("SN1"), xhci(3));
    run(["attach", &b.socket(), &stick.port]).succeeds();
    let daemon = refused(&["a", "b"], "is held by");
    run(["detach", &b.socket(), &stick.port]).succeeds();
    gets_when_told(&daemon, &a, &stick);
    // What a person moves stays where it was moved to.
    run(["detach", &a.socket(), &stick.port]).succeeds();
    run(["attach", &b.socket(), &stick.port]).succeeds();
    run(["detach", &b.socket(), &stick.port]).succeeds();
    daemon.is_idle();
    assert_eq!(a.ids(), [""; 0]);
}

fn what_another_vm_has_is_attached_when_that_is_killed() {
    let mut hardware = Hardware::open();
    let (a, other) = (Vm::new("a").start(), Vm::new("other").start());
    let stick = hardware.plug(Stick::new("SN1"), xhci(3));
    run(["attach", &other.socket(), &stick.port]).succeeds();
    let daemon = refused(&["a"], "is held by");
    other.kill();
    gets_when_told(&daemon, &a, &stick);
}

fn what_a_qemu_took_by_itself_is_attached_when_it_gives_it_back() {
    let mut hardware = Hardware::open();
    let stick = hardware.plug(Stick::bootable("SN1", "booted from SN1"), xhci(3));
    let own =
        Vm::new("own").paused().argument("-device", "usb-host,id=own,vendorid=0x46f4,productid=1");
    let own = own.start();
    own.boot();
    own.wait_for_debug("booted from SN1");
    let a = Vm::new("a").start();
    let daemon = refused(&["a"], "is in use by");
    own.qmp("device_del", json!({"id": "own"}));
    gets_when_told(&daemon, &a, &stick);
}

fn what_somebody_has_locked_is_attached_when_it_is_closed() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").start();
    let stick = hardware.plug(Stick::new("SN1"), xhci(3));
    let locked = open_locked(&stick);
    let daemon = refused(&["a"], "is held by");
    drop(locked);
    gets_when_told(&daemon, &vm, &stick);
}

fn what_is_not_authorized_is_attached_when_it_is() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").start();
    let stick = hardware.plug(Stick::new("SN1"), xhci(3));
    fs::write(stick.sysfs.join("authorized"), "0").unwrap();
    let daemon = refused(&["a"], "is not authorized");
    fs::write(stick.sysfs.join("authorized"), "1").unwrap();
    gets_when_told(&daemon, &vm, &stick);
}

fn a_full_vm_gets_the_next_device_when_one_is_detached() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").without_controller();
    let vm = vm.argument("-device", "qemu-xhci,id=xhci,p2=1,p3=1").start();
    let [mouse, stick] =
        [hardware.plug(Device::Mouse, xhci(4)), hardware.plug(Stick::new("SN1"), xhci(3))];
    configure(&["a"], &(rule("a", "port = \"1-4\"") + &rule("a", "port = \"2-3\"")));
    run(["attach", &vm.socket(), &mouse.port]).succeeds();
    let daemon = Daemon::start();
    daemon.wait_for_status("1 VM, 1 running, 1 device attached, 1 waiting");
    run(["detach", &vm.socket(), &mouse.port]).succeeds();
    gets_soon(&vm, &stick);
}

fn a_full_vm_gets_a_device_when_a_virtual_one_leaves() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").without_controller();
    let vm = vm.argument("-device", "qemu-xhci,id=xhci,p2=1,p3=1");
    let vm = vm.argument("-device", "usb-tablet,id=tablet,bus=xhci.0,port=1").start();
    let stick = hardware.plug(Stick::new("SN1"), xhci(3));
    let _daemon = refused(&["a"], "no free port");
    // Nothing tells, so it looks again and again.
    vm.qmp("device_del", json!({"id": "tablet"}));
    gets_soon(&vm, &stick);
}

fn what_is_part_of_other_block_devices_is_attached_when_those_are_gone() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").start();
    let stick = hardware.plug(Stick::new("SN1").mebibytes(4), xhci(3));
    load("dm-mod", &[]);
    let mapped = |disk: &str, uuid: &str| {
        let table = format!("0 2048 linear {disk} 0");
        must("dmsetup", &["create", "part", "--uuid", uuid, "--noudevsync", "--table", &table]);
    };
    for uuid in ["LVM-0123456789abcdef", "CRYPT-0123456789abcdef", "other"] {
        mapped(stick.disk().to_str().unwrap(), uuid);
        let daemon = refused(&["a"], "(part)");
        must("dmsetup", &["remove", "--noudevsync", "--retry", "part"]);
        gets_soon(&vm, &stick);
        drop(daemon);
        run(["detach", &vm.socket(), &stick.port]).succeeds();
    }
    let array = Array::assemble(&stick.disk());
    let _daemon = refused(&["a"], "part of md7");
    array.stop();
    gets_soon(&vm, &stick);
}

fn a_vm_that_migrates_gets_its_device_when_it_has_stopped() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").start();
    // It waits where everything has been sent but the devices' state.
    let status = |status| {
        wait_until(status, || vm.qmp("query-migrate", json!({}))["status"] == status);
    };
    let pause = json!({"capability": "pause-before-switchover", "state": true});
    vm.qmp("migrate-set-capabilities", json!({"capabilities": [pause]}));
    vm.qmp("migrate", json!({"uri": "exec:cat >/dev/null"}));
    status("pre-switchover");
    let stick = hardware.plug(Stick::new("SN1"), xhci(3));
    let _daemon = refused(&["a"], "not allowed while migrating");
    vm.qmp("migrate_cancel", json!({}));
    status("cancelled");
    gets_soon(&vm, &stick);
}

fn a_device_whose_drivers_take_long_is_attached_when_they_are_done() {
    let _hardware = Hardware::open();
    let mut remotes = Remotes::load();
    let vm = Vm::new("a").start();
    configure(&["a"], &rule("a", "vendor = \"1209\""));
    let daemon = Daemon::launch(&["--timeout", "8"], &[]);
    daemon.wait_until_it_says("READY=1");
    let id = remotes.insert(remote::Device::hangs_in_probe(1), 2);
    daemon.wait_for_log(&["its drivers are still starting"]);
    daemon.wait_for_status("1 VM, 1 running, 0 devices attached, 1 waiting");
    daemon.wait_for_status("1 VM, 1 running, 1 device attached");
    remotes.remove(&id);
    vm.loses_all();
}

fn without_descriptors_it_goes_on_when_there_are_some() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").start();
    configure(&["a"], &rule("a", "port = \"2-3\""));
    let daemon = Daemon::start();
    daemon.is_idle();
    let limit = prlimit(
        Some(daemon.pid()),
        Resource::Nofile,
        Rlimit { current: Some(daemon.descriptors() as u64), maximum: Some(1024) },
    );
    let limit = limit.unwrap();
    let stick = hardware.plug(Stick::new("SN1"), xhci(3));
    daemon.wait_for_log(&["Too many open files"]);
    daemon.wait_for_status("1 VM, 1 running, 0 devices attached, 1 waiting");
    prlimit(Some(daemon.pid()), Resource::Nofile, limit).unwrap();
    gets_soon(&vm, &stick);
}

fn without_threads_it_goes_on_when_there_are_some() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").start();
    configure(&["a"], &rule("a", "port = \"2-3\""));
    let daemon = Daemon::start();
    daemon.is_idle();
    let room = tool::leave_alone(daemon.pid());
    let stick = hardware.plug(Stick::new("SN1"), xhci(3));
    daemon.wait_for_log(&["on a thread of its own", "Resource temporarily unavailable"]);
    daemon.wait_for_status("1 VM, 1 running, 0 devices attached, 1 waiting");
    fs::write(room, "max").unwrap();
    gets_soon(&vm, &stick);
    // A command says so, and ends.
    run(["detach", &vm.socket(), &stick.port]).succeeds();
    let socket = vm.socket();
    let attach = &["attach", &socket, &stick.port][..];
    for arguments in [attach, &["list", "--json"], &["rule", "--vm", "a", "serial=SN1"]] {
        let refused = run_alone(arguments.iter().copied(), []).exits(1).stderr;
        assert!(refused.contains("Resource temporarily unavailable"), "{refused}");
        assert!(!refused.contains("panicked"), "{refused}");
    }
}

fn what_was_pulled_does_not_wait() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").start();
    let stick = hardware.plug(Stick::new("SN1").mebibytes(4), xhci(3));
    must("mount", &[&filesystem(&stick), "/run/stick"]);
    let daemon = refused(&["a"], "mounted on /run/stick");
    hardware.pull(&stick);
    daemon.wait_for_status("1 VM, 1 running, 0 devices attached");
    must("umount", &["/run/stick"]);
    let stick = hardware.plug(Stick::new("SN1"), xhci(3));
    vm.gets(&[&stick]);
}
