//! What a VM has, and what it only seems to have.

use crate::daemon::{Daemon, configure, rule};
use crate::hardware::{Device, Hardware, Plugged, Stick, xhci};
use crate::sockets::rebind_xhci;
use crate::tool::{self, run};
use crate::udev;
use crate::vm::Vm;
use crate::wait::wait_until;
use rustix::fs::{FlockOperation, flock};
use serde_json::{Value, json};
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

crate::tests![
    a_device_whose_controller_was_bound_again_is_dead_until_it_is_attached_again,
    the_daemon_replaces_what_its_controller_lost_while_the_monitor_was_held: any_qemu,
    a_device_that_a_snapshot_took_is_dead_until_it_is_attached_again,
    a_vm_that_waits_for_its_state_gets_its_device_when_it_runs,
    what_qemu_opened_itself_is_dead_when_the_host_drives_it_again,
    a_removal_that_somebody_made_up_detaches_nothing: any_qemu,
    the_daemon_says_of_its_own_vms_device_that_it_is_there: any_qemu,
    a_dry_run_claims_nothing: any_qemu,
    an_id_is_free_again_where_qemu_takes_its_time: every_qemu,
];

fn state(vm: &Vm) -> String {
    let report = run(["inspect", "--json", &vm.socket()]).succeeds().stdout;
    let report: Value = serde_json::from_str(&report).unwrap();
    let state = report["devices"][0]["host"]["state"].as_str().unwrap().to_owned();
    let table = run(["inspect", &vm.socket()]).succeeds().stdout;
    assert!(table.lines().any(|line| line.ends_with(&state)), "{table}");
    state
}

/// Whether the VM has these devices, each connected to what is plugged in now.
pub fn is_connected_to(vm: &Vm, devices: &[&Plugged]) -> bool {
    let mut nodes: Vec<PathBuf> = devices.iter().map(|device| device.node()).collect();
    let mut open = vm.open_nodes();
    nodes.sort();
    open.sort();
    // A node is open in a set before it is a device.
    let ids = vm.ids();
    let has_id = |device: &&Plugged| ids.contains(&device.id_in_vm());
    open == nodes && devices.iter().all(has_id) && nodes.iter().all(|node| is_locked(node))
}

pub fn is_locked(node: &Path) -> bool {
    flock(File::open(node).unwrap(), FlockOperation::NonBlockingLockShared).is_err()
}

fn a_device_whose_controller_was_bound_again_is_dead_until_it_is_attached_again() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").start();
    let stick = hardware.plug(Stick::new("SN1"), xhci(3));
    // So that it gets the first address.
    rebind_xhci();
    let mut stick = stick.again();
    configure(&["a"], &rule("a", "port = \"2-3\""));
    let sync = || run(["--config", "/run/usb-qmp-hotplug.toml", "sync"]).succeeds().stdout;
    run(["attach", &vm.socket(), &stick.port]).succeeds();
    for by_sync in [true, false] {
        assert_eq!(state(&vm), "present");
        assert!(sync().contains("nothing to do"));
        let address = stick.address;
        rebind_xhci();
        stick = stick.again();
        assert_eq!(stick.address, address);
        assert_eq!(vm.ids(), ["usb-host-2-3"]);
        assert_eq!(state(&vm), "dead");
        let list = run(["list", "--json"]).succeeds().stdout;
        let list: Value = serde_json::from_str(&list).unwrap();
        let its = list["devices"].as_array().unwrap().iter().find(|its| its["port"] == "2-3");
        assert_eq!((&its.unwrap()["held"], &its.unwrap()["held_by"]), (&json!(false), &json!([])));
        if by_sync {
            let would = run(["--config", "/run/usb-qmp-hotplug.toml", "sync", "--dry-run"]);
            assert!(would.succeeds().stdout.contains("would attach usb-host-2-3"));
            assert_eq!(state(&vm), "dead");
            assert!(sync().contains("attached usb-host-2-3"));
        } else {
            let shown = run(["attach", &vm.socket(), &stick.port]).succeeds().stdout;
            assert!(shown.contains("attached 2-3"), "{shown}");
        }
        assert!(is_connected_to(&vm, &[&stick]), "{:?}", vm.open_nodes());
    }
    assert_eq!(state(&vm), "present");
    run(["detach", &vm.socket(), &stick.port]).succeeds();
    vm.loses_all();
}

fn the_daemon_replaces_what_its_controller_lost_while_the_monitor_was_held() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").start();
    rebind_xhci();
    let mice = hardware.plug_all((3..=5).map(|port| (Device::Mouse, xhci(port))).collect());
    configure(&["a"], &rule("a", "port = \"1-*\""));
    let daemon = Daemon::start();
    vm.gets(&mice.iter().collect::<Vec<_>>());
    for _ in 0..2 {
        let held = hold(&vm.socket());
        rebind_xhci();
        let mice: Vec<Plugged> = mice.iter().map(Plugged::again).collect();
        udev::settle();
        drop(held);
        wait_until("the mice are in the VM again", || {
            is_connected_to(&vm, &mice.iter().collect::<Vec<_>>())
        });
    }
    daemon.wait_for_status("1 VM, 1 running, 3 devices attached");
}

/// A client that has the monitor to itself.
pub fn hold(socket: &str) -> UnixStream {
    let stream = UnixStream::connect(socket).unwrap();
    let mut greeting = String::new();
    BufReader::new(&stream).read_line(&mut greeting).unwrap();
    assert!(greeting.contains("QMP"), "{greeting}");
    stream
}

fn a_device_that_a_snapshot_took_is_dead_until_it_is_attached_again() {
    let mut hardware = Hardware::open();
    let disk = "/run/snapshots.qcow2";
    fs::write(disk, empty_qcow2()).unwrap();
    let drive = format!("if=none,id=snapshots,format=qcow2,file={disk}");
    let vm = Vm::new("a").argument("-drive", &drive).start();
    let mouse = hardware.plug(Device::Mouse, xhci(3));
    configure(&["a"], &rule("a", "port = \"1-3\""));
    let daemon = Daemon::start();
    vm.gets(&[&mouse]);
    let hmp = |line: &str| {
        let said = vm.qmp("human-monitor-command", json!({"command-line": line}));
        assert_eq!(said, "", "{line}");
    };
    hmp("savevm one");
    hmp("loadvm one");
    wait_until("QEMU has let go of it", || vm.open_nodes().is_empty());
    assert_eq!(vm.ids(), ["usb-host-1-3"]);
    assert_eq!(state(&vm), "dead");
    // Whatever has it look: here a configuration that is read again.
    daemon.reload();
    wait_until("the mouse is in the VM again", || is_connected_to(&vm, &[&mouse]));
    assert_eq!(state(&vm), "present");
    hmp("loadvm one");
    wait_until("QEMU has let go of it", || vm.open_nodes().is_empty());
    run(["attach", &vm.socket(), &mouse.port]).succeeds();
    assert!(is_connected_to(&vm, &[&mouse]));
}

/// An image of a MiB without content (QEMU, docs/interop/qcow2.rst): a header, a table of reference counts, a
/// block of them and a table of clusters, each in a cluster of its own.
fn empty_qcow2() -> Vec<u8> {
    const CLUSTER: usize = 1 << 16;
    let mut image = vec![0; 4 * CLUSTER];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"QFI\xfb");
    for (at, value) in [(4, 2_u32), (20, 16), (36, 1), (56, 1)] {
        put(at, &value.to_be_bytes());
    }
    for (at, value) in [(24, 1 << 20), (40, 3 * CLUSTER), (48, CLUSTER), (CLUSTER, 2 * CLUSTER)] {
        put(at, &(value as u64).to_be_bytes());
    }
    for cluster in 0..4 {
        put(2 * CLUSTER + 2 * cluster, &1_u16.to_be_bytes());
    }
    image
}

fn a_vm_that_waits_for_its_state_gets_its_device_when_it_runs() {
    let mut hardware = Hardware::open();
    let saved = "/run/saved";
    let vm = Vm::new("a").start();
    vm.qmp("migrate", json!({"uri": format!("exec:cat >{saved}")}));
    wait_until("its state is saved", || {
        vm.qmp("query-migrate", json!({}))["status"] == "completed"
    });
    vm.kill();
    let mouse = hardware.plug(Device::Mouse, xhci(3));
    let vm = Vm::new("a").argument("-incoming", "defer").start();
    for dry_run in [&["--dry-run"][..], &[]] {
        let attach = ["attach", &vm.socket(), &mouse.port];
        let refused = run(attach.iter().chain(dry_run)).exits(7).stderr;
        assert!(refused.contains("saved or migrated state"), "{refused}");
    }
    configure(&["a"], &rule("a", "port = \"1-3\""));
    let daemon = Daemon::start();
    daemon.wait_for_log(&["saved or migrated state"]);
    daemon.wait_for_status("1 VM, 1 running, 0 devices attached, 1 waiting");
    assert_eq!(vm.ids(), [""; 0]);
    vm.qmp("migrate-incoming", json!({"uri": format!("exec:cat {saved}")}));
    vm.gets(&[&mouse]);
    assert!(is_connected_to(&vm, &[&mouse]));
}

fn what_qemu_opened_itself_is_dead_when_the_host_drives_it_again() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").start();
    let stick = hardware.plug(Stick::new("SN1"), xhci(3));
    rebind_xhci();
    let stick = stick.again();
    // QEMU finds it only when udev has told of it.
    udev::settle();
    run(["attach", "--open", "address", &vm.socket(), &stick.port]).succeeds();
    assert_eq!(state(&vm), "present");
    assert!(run(["attach", &vm.socket(), &stick.port]).succeeds().stdout.contains("already"));
    rebind_xhci();
    let again = stick.again();
    assert_eq!(again.address, stick.address);
    wait_until("the host drives it", || again.driver().as_deref() == Some("usb-storage"));
    assert_eq!(state(&vm), "dead");
    run(["attach", &vm.socket(), &stick.port]).succeeds();
    assert!(is_connected_to(&vm, &[&again]));
}

fn a_removal_that_somebody_made_up_detaches_nothing() {
    let mut hardware = Hardware::open();
    let (a, b) = (Vm::new("a").start(), Vm::new("b").start());
    let mouse = hardware.plug(Device::Mouse, xhci(3));
    let stick = hardware.plug(Stick::new("SN1"), xhci(4));
    configure(&["a"], &rule("a", "port = \"1-3\""));
    let daemon = Daemon::start();
    tool::rules(&tool::rule(r#"DEVPATH=="*/2-4""#, &b));
    udev::trigger("add", &stick.sysfs);
    a.gets(&[&mouse]);
    b.gets(&[&stick]);
    for device in [&mouse, &stick] {
        udev::trigger("remove", &device.sysfs);
    }
    udev::settle();
    b.must_have(&stick);
    // Which event the daemon has got to, its answer to a later one tells.
    let other = hardware.plug(Device::Mouse, xhci(5));
    configure(&["a"], &rule("a", "port = \"1-*\""));
    daemon.reload();
    a.gets(&[&mouse, &other]);
    hardware.pull_all(&[mouse, stick, other]);
    a.loses_all();
    b.loses_all();
}

fn the_daemon_says_of_its_own_vms_device_that_it_is_there() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").start();
    configure(&["a"], &rule("a", "port = \"1-3\""));
    // udev's program is the first, through a monitor of its own.
    let mut daemon = Daemon::start();
    for round in 0..3 {
        let held = hold(&vm.socket());
        let mouse = hardware.plug(Device::Mouse, xhci(3));
        attach_at_second_monitor(&vm, &mouse);
        drop(held);
        vm.gets(&[&mouse]);
        if round == 2 {
            // So is who starts later.
            drop(daemon);
            daemon = Daemon::start();
        }
        daemon.wait_for_status("1 VM, 1 running, 1 device attached");
        hardware.pull(&mouse);
        vm.loses_all();
    }
    let log = daemon.log();
    assert!(!log.contains("held by") && !log.contains("still holds"), "{log}");
}

/// Attaches as the program does, through the monitor that the test has.
fn attach_at_second_monitor(vm: &Vm, device: &Plugged) {
    vm.pass_descriptor(77, &open_locked(device));
    let arguments = json!({
        "driver": "usb-host", "id": device.id_in_vm(), "bus": "xhci.0", "port": "9",
        "hostbus": device.bus, "hostaddr": device.address, "hostdevice": "/dev/fdset/77",
    });
    vm.qmp("device_add", arguments);
    vm.qmp("remove-fd", json!({"fdset-id": 77}));
}

pub fn open_locked(device: &Plugged) -> OwnedFd {
    let node = File::options().read(true).write(true).open(device.node()).unwrap();
    // The daemon claims a device while it connects, and lets go where the monitor is busy.
    wait_until("nobody has it", || flock(&node, FlockOperation::NonBlockingLockExclusive).is_ok());
    node.into()
}

fn a_dry_run_claims_nothing() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").start();
    let stick = hardware.plug(Stick::new("SN1"), xhci(3));
    let disk = stick.disk();
    udev::settle();
    let watch = rustix::fs::inotify::init(rustix::fs::inotify::CreateFlags::NONBLOCK).unwrap();
    for path in [&stick.node(), &disk] {
        let open = rustix::fs::inotify::WatchFlags::OPEN;
        rustix::fs::inotify::add_watch(&watch, path, open).unwrap();
    }
    let would = run(["attach", "--dry-run", &vm.socket(), &stick.port]).succeeds().stdout;
    assert!(would.contains("would attach"), "{would}");
    configure(&["a"], &rule("a", "port = \"2-3\""));
    let config = "/run/usb-qmp-hotplug.toml";
    let would = run(["--config", config, "sync", "--dry-run"]).succeeds().stdout;
    assert!(would.contains("would attach"), "{would}");
    let mut buffer = [0; 256];
    let heard = rustix::io::read(watch.as_fd(), &mut buffer[..]);
    assert_eq!(heard.unwrap_err(), rustix::io::Errno::AGAIN, "it opened the device or its disk");
    vm.loses_all();
}

fn an_id_is_free_again_where_qemu_takes_its_time() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").start();
    let mouse = hardware.plug(Device::Mouse, xhci(3));
    for _ in 0..3 {
        // It scans for a device that does not come; so do placeholders for devices that a saved VM had.
        let arguments = json!({
            "driver": "usb-host", "id": mouse.id_in_vm(), "bus": "xhci.0", "port": "2",
            "vendorid": 65535, "productid": 65535,
        });
        wait_until("its id is free", || vm.try_qmp("device_add", arguments.clone()).is_ok());
        run(["attach", &vm.socket(), &mouse.port]).succeeds();
        assert!(is_connected_to(&vm, &[&mouse]));
        run(["detach", &vm.socket(), &mouse.port]).succeeds();
        vm.loses_all();
    }
}
