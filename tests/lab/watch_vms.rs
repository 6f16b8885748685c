//! The daemon, and VMs that start, end, hang and are talked to by others.

use crate::daemon::{CONFIG, Daemon, configure, rule};
use crate::hardware::{Device, Hardware, Stick, ehci, xhci};
use crate::host::must;
use crate::tool::{self, run};
use crate::vm::Vm;
use crate::wait::wait_until;
use rustix::process::Signal;
use serde_json::{Value, json};
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

crate::tests![
    a_killed_vm_gives_its_device_back_and_has_it_again_when_it_restarts,
    what_is_in_use_when_a_vm_ends_goes_back_when_it_is_let_go: any_qemu,
    what_a_killed_vm_was_not_given_by_the_daemon_is_left_alone: any_qemu,
    at_whose_socket_another_user_listens_gets_nothing_and_is_told: any_qemu,
    a_vm_that_does_its_worst_costs_no_memory_and_keeps_no_other_from_its_device: long,
    a_stopped_vm_delays_no_other_and_gets_its_devices_later: waits,
    a_monitor_that_another_client_held_for_long_is_used_when_it_is_free: waits,
    a_socket_that_is_replaced_is_a_new_vm: any_qemu,
    a_vm_is_noticed_where_something_was_mounted_over_its_directory: any_qemu,
    all_vms_are_noticed_where_their_directory_is_mounted: any_qemu,
    a_vm_whose_monitor_is_held_at_the_start_keeps_nobody_from_being_ready: waits,
    a_vm_whose_process_cannot_be_seen_gets_its_device_after_a_restart_too: any_qemu,
    sixty_four_vms_cost_an_event_no_more_than_one: any_qemu,
];

/// A client that has the monitor to itself.
fn hold(socket: &str) -> UnixStream {
    let stream = UnixStream::connect(socket).unwrap();
    let mut greeting = String::new();
    BufReader::new(&stream).read_line(&mut greeting).unwrap();
    assert!(greeting.contains("QMP"), "{greeting}");
    stream
}

fn a_vm_that_does_its_worst_costs_no_memory_and_keeps_no_other_from_its_device() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").start();
    let talks = Arc::new(AtomicUsize::new(0));
    let worst = Worst::new();
    let listener = UnixListener::bind("/run/vm/b.qmp").unwrap();
    let counting = Arc::clone(&talks);
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let _ = worst.talk(&stream);
            counting.fetch_add(1, Ordering::Relaxed);
        }
    });
    let rules = rule("b", "port = \"1-3\"") + &rule("a", "port = \"2-4\"");
    configure(&["a", "b"], &rules);
    let daemon = Daemon::start();
    wait_until("the other VM has begun", || talks.load(Ordering::Relaxed) > 2);
    for round in 0..2 {
        let before = talks.load(Ordering::Relaxed);
        let mouse = hardware.plug(Device::Mouse, xhci(3));
        let stick = hardware.plug(Stick::new(&format!("SN{round}")), xhci(4));
        vm.gets(&[&stick]);
        let meanwhile = talks.load(Ordering::Relaxed) - before;
        assert!(meanwhile < CLAIMS / 2, "{meanwhile} conversations came before");
        hardware.pull_all(&[mouse, stick]);
        vm.loses_all();
    }
    let most = daemon.most_memory();
    eprintln!("{most} KiB at most");
    assert!(most < 16 << 10, "{most} KiB");
}

/// How many devices of the host it says it has.
const CLAIMS: usize = 255;

/// A VM that says as much as is read of it, at once: as many objects as there may be, hundreds of them devices of the
/// host, and events as long as they may be.
struct Worst {
    objects: String,
    event: String,
}

impl Worst {
    fn new() -> Worst {
        let object = |n: usize| {
            let (name, kind) = if n <= CLAIMS {
                (format!("usb-host-1-{n}"), "usb-host")
            } else {
                (format!("d{n}"), "usb-kbd")
            };
            format!(r#"{{"name":"{name}","type":"child<{kind}>"}}"#)
        };
        let objects = (1..4096).map(object).collect::<Vec<_>>().join(",");
        let values = vec![r#"{"":0}"#; 35_000].join(",");
        Worst {
            objects: format!("[{objects}]"),
            event: format!(r#"{{"event":"DEVICE_DELETED","data":[{values}]}}"#),
        }
    }

    fn talk(&self, mut stream: &UnixStream) -> std::io::Result<()> {
        let version = json!({"major": 10, "minor": 0, "micro": 2});
        writeln!(stream, "{}", json!({"QMP": {"version": {"qemu": version}, "capabilities": []}}))?;
        for line in BufReader::new(stream).lines() {
            let command: Value = serde_json::from_str(&line?)?;
            let is_list = command["arguments"]["path"] == "/machine/peripheral";
            let mut before = "";
            let result = match command["execute"].as_str() {
                Some("query-status") => r#"{"running":true,"status":"running"}"#,
                Some("qom-list") if is_list => &self.objects,
                Some("qom-list") => "[]",
                Some("qom-get") => "1",
                Some("device_del") => {
                    before = &self.event;
                    "{}"
                }
                _ => "{}",
            };
            let id = &command["id"];
            write!(stream, "{before}\n{{\"return\":{result},\"id\":{id}}}\n")?;
        }
        Ok(())
    }
}

fn at_whose_socket_another_user_listens_gets_nothing_and_is_told() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").unprivileged().start();
    let mouse = hardware.plug(Device::Mouse, xhci(3));
    configure(&["a"], &rule("a", "port = \"1-3\""));
    let config = fs::read_to_string(CONFIG).unwrap();
    let of_user =
        |user: &str| config.replace("\n[[rule]]", &format!("\nuser = \"{user}\"\n[[rule]]"));
    fs::write(CONFIG, of_user("root")).unwrap();
    let daemon = Daemon::start();
    daemon.wait_for_log(&["a: ", "listens on the socket", "it gets nothing"]);
    daemon.wait_for_status("1 VM, 0 running, 0 devices attached");
    assert!(vm.ids().is_empty());
    fs::write(CONFIG, of_user("65534")).unwrap();
    daemon.reload();
    vm.gets(&[&mouse]);
}

fn what_a_killed_vm_was_not_given_by_the_daemon_is_left_alone() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").start();
    configure(&["a"], &rule("a", "port = \"2-4\""));
    let daemon = Daemon::start();
    let sticks = (3..=4).map(|n| (Stick::new(&format!("SN{n}")).into(), xhci(n)));
    let sticks = hardware.plug_all(sticks.collect());
    vm.gets(&[&sticks[1]]);
    run(["attach", &vm.socket(), &sticks[0].port]).succeeds();
    vm.gets(&[&sticks[0], &sticks[1]]);
    // The daemon has seen both in the VM.
    daemon.reload();
    daemon.wait_for_status("1 VM, 1 running, 2 devices attached");
    vm.kill();
    // It goes through them by port.
    wait_until("the driver is back", || sticks[1].driver().as_deref() == Some("usb-storage"));
    assert_eq!(sticks[0].driver(), None);
}

fn a_killed_vm_gives_its_device_back_and_has_it_again_when_it_restarts() {
    let mut hardware = Hardware::open();
    configure(&["a"], &rule("a", "port = \"2-3\""));
    let daemon = Daemon::start();
    let stick = hardware.plug(Stick::new("SN1"), xhci(3));
    let mut vm = Vm::new("a").start();
    for _ in 0..2 {
        vm.gets(&[&stick]);
        assert_ne!(stick.driver().as_deref(), Some("usb-storage"));
        vm.kill();
        wait_until("the driver is back", || stick.driver().as_deref() == Some("usb-storage"));
        daemon.wait_for_status("1 VM, 0 running, 0 devices attached");
        vm = Vm::new("a").start();
    }
    vm.gets(&[&stick]);
}

fn what_is_in_use_when_a_vm_ends_goes_back_when_it_is_let_go() {
    let mut hardware = Hardware::open();
    configure(&["a"], &rule("a", "port = \"2-3\""));
    let daemon = Daemon::launch(&["--verbose", "--timeout", tool::SECONDS], &[]);
    daemon.wait_until_it_says("READY=1");
    let stick = hardware.plug(Stick::new("SN1"), xhci(3));
    let vm = Vm::new("a").start();
    vm.gets(&[&stick]);
    // As the kernel keeps it for a while where QEMU waits for it with io_uring.
    let kept = vm.copy_of(&stick);
    vm.kill();
    daemon.wait_for_log(&["2-3 is in use still"]);
    assert_eq!(stick.driver(), None);
    drop(kept);
    wait_until("the driver is back", || stick.driver().as_deref() == Some("usb-storage"));
}

fn a_stopped_vm_delays_no_other_and_gets_its_devices_later() {
    let mut hardware = Hardware::open();
    let (a, b) = (Vm::new("a").start(), Vm::new("b").start());
    configure(&["a", "b"], &(rule("a", "serial = \"SNA\"") + &rule("b", "serial = \"SNB\"")));
    let daemon = Daemon::launch(&["--timeout", "15"], &[]);
    daemon.wait_until_it_says("READY=1");
    a.signal(Signal::STOP);
    let of_a = hardware.plug(Stick::new("SNA"), xhci(3));
    daemon.wait_for_log(&["a does not answer"]);
    for _ in 0..2 {
        let of_b = hardware.plug(Stick::new("SNB"), xhci(4));
        b.gets(&[&of_b]);
        hardware.pull(&of_b);
        b.loses_all();
    }
    a.signal(Signal::CONT);
    a.gets(&[&of_a]);
    assert_eq!(daemon.log().matches("a does not answer").count(), 1, "{}", daemon.log());
}

fn a_monitor_that_another_client_held_for_long_is_used_when_it_is_free() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").start();
    configure(&["a"], &rule("a", "port = \"2-3\""));
    let daemon = Daemon::launch(&["--timeout", "15"], &[]);
    daemon.wait_until_it_says("READY=1");
    let holder = hold(&vm.socket());
    let first = hardware.plug(Stick::new("SN1"), xhci(3));
    daemon.wait_for_log(&["a does not answer", "another client holds its monitor"]);
    // What counts is what is there when the monitor is free.
    hardware.pull(&first);
    let second = hardware.plug(Stick::new("SN2"), xhci(3));
    assert!(vm.ids().is_empty());
    drop(holder);
    vm.gets(&[&second]);
    // Between events it is free, for anybody.
    drop(hold(&vm.socket()));
}

fn a_socket_that_is_replaced_is_a_new_vm() {
    let mut hardware = Hardware::open();
    let old = Vm::new("a").start();
    configure(&["a"], &rule("a", "port = \"2-3\""));
    let daemon = Daemon::start();
    let stick = hardware.plug(Stick::new("SN1"), xhci(3));
    old.gets(&[&stick]);
    // The lab's own monitor; QEMU replaces the daemon's.
    fs::remove_file("/run/vm/a.check").unwrap();
    let new = Vm::new("a").start();
    daemon.wait_for_log(&["is held by"]);
    old.must_have(&stick);
    assert!(new.ids().is_empty());
    // The old one's end sets it free.
    old.kill();
    new.gets(&[&stick]);
}

fn a_vm_is_noticed_where_something_was_mounted_over_its_directory() {
    let mut hardware = Hardware::open();
    configure(&["a"], &rule("a", "port = \"1-3\""));
    let mouse = hardware.plug(Device::Mouse, xhci(3));
    fs::create_dir("/run/vm").unwrap();
    let daemon = Daemon::start();
    // As the directory of a user's that logs in, /run/user/1000.
    let sh = |command: &str| Command::new("sh").args(["-c", command]).status().unwrap();
    assert!(sh("mount -t tmpfs none /run/vm").success());
    let vm = Vm::new("a").start();
    vm.gets(&[&mouse]);
    vm.kill();
    daemon.wait_for_status("1 VM, 0 running, 0 devices attached");
    assert!(sh("umount /run/vm").success());
    let vm = Vm::new("a").start();
    vm.gets(&[&mouse]);
}

fn all_vms_are_noticed_where_their_directory_is_mounted() {
    let mut hardware = Hardware::open();
    let (a, b) = (Vm::new("a").start(), Vm::new("b").start());
    let [mouse, tablet] =
        [hardware.plug(Device::Mouse, xhci(3)), hardware.plug(Device::Tablet, xhci(4))];
    configure(&["a", "b"], &(rule("a", "port = \"1-3\"") + &rule("b", "port = \"1-4\"")));
    let config = fs::read_to_string(CONFIG).unwrap().replace("/run/vm/", "/run/other/");
    fs::write(CONFIG, config).unwrap();
    fs::create_dir_all("/run/other").unwrap();
    let daemon = Daemon::start();
    daemon.wait_for_status("2 VMs, 0 running, 0 devices attached");
    must("mount", &["--bind", "/run/vm", "/run/other"]);
    a.gets(&[&mouse]);
    b.gets(&[&tablet]);
    drop(daemon);
    must("umount", &["/run/other"]);
}

fn a_vm_whose_monitor_is_held_at_the_start_keeps_nobody_from_being_ready() {
    let mut hardware = Hardware::open();
    let (a, b) = (Vm::new("a").start(), Vm::new("b").start());
    let sticks = hardware
        .plug_all(vec![(Stick::new("SNA").into(), xhci(3)), (Stick::new("SNB").into(), xhci(4))]);
    configure(&["a", "b"], &(rule("a", "serial = \"SNA\"") + &rule("b", "serial = \"SNB\"")));
    let holder = hold(&a.socket());
    let daemon = Daemon::launch(&["--timeout", "15"], &[]);
    daemon.wait_until_it_says("READY=1");
    b.gets(&[&sticks[1]]);
    assert!(a.ids().is_empty());
    // Its start sync is not over: what happens meanwhile counts, too.
    hardware.pull(&sticks[0]);
    let later = hardware.plug(Stick::new("SNA"), xhci(5));
    drop(holder);
    a.gets(&[&later]);
    daemon.wait_for_status("2 VMs, 2 running, 2 devices attached");
}

fn a_vm_whose_process_cannot_be_seen_gets_its_device_after_a_restart_too() {
    let mut hardware = Hardware::open();
    configure(&["a"], &rule("a", "port = \"2-3\""));
    // In a PID namespace of its own, the daemon sees no process of others.
    let apart = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"];
    let daemon = Daemon::launch_in(&apart, &["--timeout", tool::SECONDS], &[]);
    daemon.wait_until_it_says("READY=1");
    let stick = hardware.plug(Stick::new("SN1"), xhci(3));
    for _ in 0..2 {
        let vm = Vm::new("a").start();
        vm.gets(&[&stick]);
        vm.kill();
    }
}

fn sixty_four_vms_cost_an_event_no_more_than_one() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").start();
    // Of the others, one in eight runs and the rest does not even exist.
    let names: Vec<String> = (1..64).map(|n| format!("b{n}")).collect();
    let talks = Arc::new(AtomicUsize::new(0));
    for name in names.iter().step_by(8) {
        stand_in(name, Arc::clone(&talks));
    }
    let vms: Vec<&str> = ["a"].into_iter().chain(names.iter().map(String::as_str)).collect();
    configure(&vms, &rule("a", "port = \"*\""));
    let daemon = Daemon::start();
    daemon.wait_for_status("64 VMs, 9 running, 0 devices attached");
    assert_eq!(talks.load(Ordering::SeqCst), 8, "each has had its sync");
    for _ in 0..2 {
        let plugged = hardware.plug_all(vec![
            (Stick::new("SN1").into(), xhci(3)),
            (Device::Mouse, ehci(2)),
            (Device::Tablet, xhci(4)),
        ]);
        vm.gets(&plugged.iter().collect::<Vec<_>>());
        hardware.pull_all(&plugged);
        vm.loses_all();
    }
    assert_eq!(talks.load(Ordering::SeqCst), 8, "a VM was asked that is not concerned");
}

/// Stands in for a VM that has no device, and counts who talks to it.
fn stand_in(name: &str, talks: Arc<AtomicUsize>) {
    let listener = UnixListener::bind(format!("/run/vm/{name}.qmp")).unwrap();
    thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            talks.fetch_add(1, Ordering::SeqCst);
            let version = json!({"qemu": {"major": 10, "minor": 0, "micro": 0}, "package": ""});
            let greeting = json!({"QMP": {"version": version, "capabilities": []}});
            writeln!(&stream, "{greeting}\r").unwrap();
            for line in BufReader::new(&stream).lines().map_while(Result::ok) {
                let command: Value = serde_json::from_str(&line).unwrap();
                let result = if command["execute"] == "qom-list" { json!([]) } else { json!({}) };
                writeln!(&stream, "{}\r", json!({"return": result, "id": command["id"]})).unwrap();
            }
        }
    });
}
