//! Attaches that are cut off in the middle. Whatever cuts them off, QEMU's copy of the descriptor keeps the device
//! from nobody for longer than until somebody says the next word to this VM.

use crate::daemon::{Daemon, configure, rule};
use crate::hardware::{Device, Hardware, Plugged, xhci};
use crate::proxy::{self, Moment, Pass};
use crate::tool::{self, PROGRAM, run};
use crate::truth::{hold, is_connected_to, is_locked, open_locked};
use crate::vm::Vm;
use crate::wait::{wait_for, wait_until};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};

crate::tests![
    an_attach_that_is_stopped_takes_its_lock_along: any_qemu,
    an_attach_that_is_late_takes_its_lock_along,
    an_attach_whose_connection_ends_takes_its_lock_along: any_qemu,
    what_an_attach_left_that_was_killed_goes_with_the_next_attach_or_detach: any_qemu,
    what_a_qemu_that_was_stopped_does_later_is_found,
    what_an_attach_left_that_was_killed_goes_with_the_next_word: any_qemu,
    what_qemu_attached_too_late_is_attached_again,
    what_came_through_another_monitor_is_not_laid_to_a_pause: any_qemu,
];

/// An attach of a mouse to VM a, of which QEMU has done the first command: it has the descriptor.
struct Cut {
    a: Vm,
    b: Vm,
    mouse: Plugged,
}

impl Cut {
    fn new() -> Cut {
        let mut hardware = Hardware::open();
        let (a, b) = (Vm::new("a").start(), Vm::new("b").start());
        let mouse = hardware.plug(Device::Mouse, xhci(3));
        Cut { a, b, mouse }
    }

    /// Has QEMU do no more of the next attach than to take the descriptor, and `then` decides how it ends. What is
    /// said later through the same socket, and so with the same set of descriptors, is passed on.
    fn after_descriptor(&self, mut then: impl FnMut() -> Pass + Send + 'static) {
        let (mut is_cut, mut has_rest) = (false, false);
        proxy::listen_to(self.a.socket(), move |moment| match moment {
            Moment::Asked(text) if text.contains("add-fd") && !is_cut => {
                (is_cut, has_rest) = (true, !text.contains("device_add"));
                then()
            }
            Moment::Asked(text) if text.contains("device_add") && has_rest => {
                has_rest = false;
                Pass::Keep
            }
            _ => Pass::On,
        });
    }

    fn attach(&self) -> Child {
        let arguments = ["--timeout", tool::SECONDS, "attach", proxy::SOCKET, &self.mouse.port];
        Command::new(PROGRAM).args(arguments).stderr(Stdio::null()).spawn().unwrap()
    }

    fn wait_until_qemu_has_the_descriptor(&self) {
        wait_until("QEMU has the descriptor", || self.a.open_nodes() == [self.mouse.node()]);
        assert!(is_locked(&self.mouse.node()));
        assert_eq!(self.a.ids(), [""; 0]);
    }

    /// Nothing keeps either VM from it.
    fn is_forgotten(&self) {
        assert!(!is_locked(&self.mouse.node()));
        for (vm, socket) in [(&self.b, self.b.socket().as_str()), (&self.a, proxy::SOCKET)] {
            run(["attach", socket, &self.mouse.port]).succeeds();
            assert!(is_connected_to(vm, &[&self.mouse]));
            vm.must_have_no_spare_descriptors();
            run(["detach", socket, &self.mouse.port]).succeeds();
            vm.loses_all();
        }
    }
}

fn an_attach_that_is_stopped_takes_its_lock_along() {
    let cut = Cut::new();
    for signal in [Signal::TERM, Signal::INT] {
        cut.after_descriptor(|| Pass::First);
        let mut attach = cut.attach();
        cut.wait_until_qemu_has_the_descriptor();
        kill_process(Pid::from_child(&attach), signal).unwrap();
        let status = wait_for("its end", || attach.try_wait().unwrap());
        assert_eq!(status.code(), Some(128 + signal.as_raw()));
        cut.is_forgotten();
    }
}

fn an_attach_that_is_late_takes_its_lock_along() {
    let cut = Cut::new();
    cut.after_descriptor(|| Pass::First);
    tool::run_within("8", ["attach", proxy::SOCKET, &cut.mouse.port]).exits(5);
    assert_eq!(cut.a.ids(), [""; 0]);
    cut.is_forgotten();
}

fn an_attach_whose_connection_ends_takes_its_lock_along() {
    let cut = Cut::new();
    cut.after_descriptor(|| Pass::FirstAndEnd);
    let lost = run(["attach", proxy::SOCKET, &cut.mouse.port]).exits(1).stderr;
    assert!(lost.contains("connection"), "{lost}");
    assert_eq!(cut.a.open_nodes(), [cut.mouse.node()], "QEMU has the descriptor");
    cut.is_forgotten();
}

fn what_an_attach_left_that_was_killed_goes_with_the_next_attach_or_detach() {
    let cut = Cut::new();
    let leave = || {
        let pid = Arc::new(Mutex::new(None));
        let its = pid.clone();
        cut.after_descriptor(move || {
            let pid = wait_for("its process id", || *its.lock().unwrap());
            // It can do nothing more, and the connection ends with it.
            kill_process(pid, Signal::KILL).unwrap();
            Pass::FirstAndEnd
        });
        let mut attach = cut.attach();
        *pid.lock().unwrap() = Some(Pid::from_child(&attach));
        attach.wait().unwrap();
        cut.wait_until_qemu_has_the_descriptor();
    };
    leave();
    let refused = run(["attach", &cut.b.socket(), &cut.mouse.port]).exits(7).stderr;
    assert!(refused.contains("VM a") && refused.contains("detach it there"), "{refused}");
    let left = run(["detach", proxy::SOCKET, &cut.mouse.port]).exits(3).stderr;
    assert!(left.contains("has no device"), "{left}");
    cut.a.must_be_clean();
    cut.is_forgotten();
    leave();
    run(["attach", proxy::SOCKET, &cut.mouse.port]).succeeds();
    assert!(is_connected_to(&cut.a, &[&cut.mouse]));
    run(["detach", proxy::SOCKET, &cut.mouse.port]).succeeds();
    cut.is_forgotten();
}

fn what_a_qemu_that_was_stopped_does_later_is_found() {
    let cut = Cut::new();
    let socket = cut.a.socket();
    let qemu = Pid::from_raw(cut.a.pid()).unwrap();
    let listen = || {
        let mut is_stopped = false;
        proxy::listen(cut.a.socket(), move |moment| {
            if !is_stopped && matches!(moment, Moment::Asked(text) if text.contains("add-fd")) {
                is_stopped = true;
                kill_process(qemu, Signal::STOP).unwrap();
            }
            true
        });
    };
    listen();
    // The tool gives up, and takes its lock along.
    tool::run_within("8", ["attach", proxy::SOCKET, &cut.mouse.port]).exits(5);
    assert!(!is_locked(&cut.mouse.node()));
    cut.a.signal(Signal::CONT);
    wait_until("QEMU has done it", || cut.a.ids() == [cut.mouse.id_in_vm()]);
    let shown = run(["attach", &socket, &cut.mouse.port]).succeeds().stdout;
    assert!(shown.contains("attached 1-3"), "{shown}");
    assert!(is_connected_to(&cut.a, &[&cut.mouse]));
    run(["detach", &socket, &cut.mouse.port]).succeeds();
    // The tool is killed: what QEMU does later is a whole attach.
    listen();
    let mut attach = cut.attach();
    wait_until("QEMU is stopped", || {
        let status = fs::read_to_string(format!("/proc/{}/status", cut.a.pid())).unwrap();
        status.contains("State:\tT")
    });
    attach.kill().unwrap();
    attach.wait().unwrap();
    cut.a.signal(Signal::CONT);
    wait_until("QEMU has done it", || is_connected_to(&cut.a, &[&cut.mouse]));
    let shown = run(["attach", &socket, &cut.mouse.port]).succeeds().stdout;
    assert!(shown.contains("already"), "{shown}");
    run(["detach", &socket, &cut.mouse.port]).succeeds();
    cut.is_forgotten();
}

fn what_an_attach_left_that_was_killed_goes_with_the_next_word() {
    let mut hardware = Hardware::open();
    let (a, b) = (Vm::new("a").start(), Vm::new("b").start());
    let mouse = hardware.plug(Device::Mouse, xhci(3));
    let leave = || {
        a.pass_descriptor(set_of(&a), &open_locked(&mouse));
        assert!(is_locked(&mouse.node()));
    };
    let attach = |vm: &Vm| run(["attach", &vm.socket(), &mouse.port]);
    // `detach` says that there is nothing, and sees to it.
    leave();
    let refused = attach(&b).exits(7).stderr;
    assert!(refused.contains("VM a") && refused.contains("detach it there"), "{refused}");
    run(["detach", &a.socket(), &mouse.port]).exits(3);
    assert!(!is_locked(&mouse.node()));
    a.must_be_clean();
    // So does an attach, whatever the socket's path looks like.
    let link = "/run/link.qmp";
    let _ = fs::remove_file(link);
    std::os::unix::fs::symlink(a.socket(), link).unwrap();
    for socket in [a.socket().as_str(), link, "/run/vm/../vm/a.qmp"] {
        leave();
        run(["attach", socket, &mouse.port]).succeeds();
        assert!(is_connected_to(&a, &[&mouse]));
        a.must_have_no_spare_descriptors();
        run(["detach", socket, &mouse.port]).succeeds();
        a.loses_all();
    }
    let sets = a.qmp("query-fdsets", json!({}));
    assert!(sets.as_array().unwrap().len() <= 1, "{sets}");
    // And an "already".
    attach(&a).succeeds();
    let second = hardware.plug(Device::Mouse, xhci(4));
    a.pass_descriptor(set_of(&a), &open_locked(&second));
    assert!(attach(&a).succeeds().stdout.contains("already"));
    assert!(!is_locked(&second.node()));
    // And a daemon, which may not look at QEMU's descriptors.
    a.pass_descriptor(set_of(&a), &open_locked(&second));
    configure(&["a"], &rule("a", "port = \"1-*\""));
    let daemon = Daemon::start();
    wait_until("both are in the VM", || is_connected_to(&a, &[&mouse, &second]));
    hardware.pull(&second);
    let held = hold(&a.socket());
    let second = hardware.plug(Device::Mouse, xhci(4));
    a.pass_descriptor(set_of(&a), &open_locked(&second));
    drop(held);
    wait_until("both are in the VM again", || is_connected_to(&a, &[&mouse, &second]));
    assert!(!daemon.log().contains("held by"), "{}", daemon.log());
}

/// The set that the program uses for what it passes through the VM's first monitor: a hash (FNV-1a) of the socket's
/// device and inode.
fn set_of(vm: &Vm) -> i64 {
    let socket = fs::metadata(vm.socket()).unwrap();
    let bytes = [socket.dev().to_le_bytes(), socket.ino().to_le_bytes()].concat();
    let hash = bytes
        .iter()
        .fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193));
    i64::from(hash & 0x7fff_ffff)
}

fn what_qemu_attached_too_late_is_attached_again() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").start();
    let mouse = hardware.plug(Device::Mouse, xhci(3));
    proxy::listen(
        vm.socket(),
        |moment| !matches!(moment, Moment::Answered(text) if text.contains("device_add")),
    );
    tool::run_within("8", ["attach", proxy::SOCKET, &mouse.port]).exits(5);
    wait_until("QEMU has done it", || vm.ids() == [mouse.id_in_vm()]);
    assert!(!is_locked(&mouse.node()));
    let shown = run(["attach", &vm.socket(), &mouse.port]).succeeds().stdout;
    assert!(shown.contains("attached 1-3"), "{shown}");
    assert!(is_connected_to(&vm, &[&mouse]));
}

fn what_came_through_another_monitor_is_not_laid_to_a_pause() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").start();
    let mouse = hardware.plug(Device::Mouse, xhci(3));
    vm.pass_descriptor(77, &open_locked(&mouse));
    let refused = run(["attach", &vm.socket(), &mouse.port]).exits(7).stderr;
    assert!(refused.contains("still holds") && refused.contains("another monitor"), "{refused}");
    assert!(!refused.contains("paused"), "{refused}");
    // The other one's affairs are not touched.
    assert!(is_locked(&mouse.node()));
    vm.qmp("remove-fd", json!({"fdset-id": 77}));
    run(["attach", &vm.socket(), &mouse.port]).succeeds();
    assert!(is_connected_to(&vm, &[&mouse]));
}
