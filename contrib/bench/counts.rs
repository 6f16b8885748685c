//! What an attach costs in instructions and system calls, which are the same on every machine: by rule those of the
//! whole process, by `watch` those that one device more makes. valgrind and strace count, with patience.

use crate::contender::DIRECTORY;
use crate::hardware::{Device, Hardware, Plugged, xhci};
use crate::vm::Vm;
use crate::wait::wait_at_most;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use std::fs::{self, File};
use std::process::{Command, Stdio};
use std::time::Duration;

/// An emulator in an emulator is slow.
const PATIENCE: Duration = Duration::from_secs(600);

/// A program that counts, and how many its file says it has counted.
struct Counter {
    what: &'static str,
    command: &'static [&'static str],
    counted: fn(&str) -> Option<usize>,
}

const COUNTERS: [Counter; 2] = [
    Counter {
        what: "instructions",
        command: &[
            "valgrind",
            "--tool=callgrind",
            "--callgrind-out-file=/dev/null",
            "--log-file=counted",
        ],
        counted: |text| text.rsplit_once("Collected : ")?.1.split_whitespace().next()?.parse().ok(),
    },
    Counter {
        what: "system_calls",
        command: &["strace", "-f", "-o", "counted"],
        // The rest of a call that another thread has interrupted stands on a line of its own.
        counted: |text| {
            let is_call = |line: &&str| line.contains('(') && !line.contains(" resumed>");
            Some(text.lines().filter(is_call).count())
        },
    },
];

pub fn run() -> Value {
    let vm = Vm::new("counted").start();
    let config = "[[rule]]\nvm = \"counted\"\nport = \"1-*\"\ntwin = false\n";
    let config = format!("[vm.counted]\nqmp = \"{}\"\n{config}", vm.socket());
    fs::write(format!("{DIRECTORY}/counted.toml"), config).expect("space");
    let mut hardware = Hardware::open();
    let mut all = json!({});
    for counter in COUNTERS {
        if Command::new(counter.command[0]).arg("--version").output().is_err() {
            eprintln!("{} is not installed: {} are not counted", counter.command[0], counter.what);
            continue;
        }
        let mouse = hardware.plug(Device::Mouse, xhci(3));
        let rule_add = counter.rule(&vm, &mouse, "add");
        assert!(vm.has(&mouse), "it is attached");
        hardware.pull(&mouse);
        let rule_remove = counter.rule(&vm, &mouse, "remove");
        assert!(vm.ids().is_empty(), "it is detached");
        let [one, two] = [1, 2].map(|devices| counter.watch(&vm, &mut hardware, devices));
        all[counter.what] = json!({
            "rule_add": rule_add, "rule_remove": rule_remove, "watch_add": two - one,
        });
        eprintln!("{}: {}", counter.what, all[counter.what]);
    }
    all
}

impl Counter {
    fn command(&self) -> Command {
        let mut command = Command::new(self.command[0]);
        command.current_dir(DIRECTORY).args(&self.command[1..]);
        command.arg("./tool").args(["--timeout", "300"]);
        command.stdin(Stdio::null()).stdout(Stdio::null());
        command.stderr(File::create(format!("{DIRECTORY}/errors")).expect("space"));
        command
    }

    fn counted(&self) -> usize {
        let text = fs::read_to_string(format!("{DIRECTORY}/counted")).expect("it has counted");
        (self.counted)(&text).expect("it says how many")
    }

    /// All of a process that handles an event.
    fn rule(&self, vm: &Vm, mouse: &Plugged, action: &str) -> usize {
        let path = mouse.sysfs.strip_prefix("/sys").expect("it is in sysfs");
        let status = self
            .command()
            .args(["udev", &vm.socket()])
            .envs([("ACTION", action), ("SUBSYSTEM", "usb"), ("DEVTYPE", "usb_device")])
            .envs([("PRODUCT", "627/1/0"), ("TYPE", "0/0/0")])
            .env("DEVPATH", format!("/{}", path.display()))
            .env("DEVNAME", mouse.node())
            .env("BUSNUM", format!("{:03}", mouse.bus))
            .env("DEVNUM", format!("{:03}", mouse.address))
            .status()
            .expect("it runs");
        assert!(status.success(), "{action}: {status}");
        self.counted()
    }

    /// All of a daemon that attaches so many devices, one after the other.
    fn watch(&self, vm: &Vm, hardware: &mut Hardware, devices: u32) -> usize {
        let mut counter =
            self.command().args(["--config", "counted.toml", "watch"]).spawn().expect("it runs");
        let log = || fs::read_to_string(format!("{DIRECTORY}/errors")).unwrap_or_default();
        wait_at_most(PATIENCE, "it is ready", || log().contains("ready").then_some(()));
        let mice: Vec<Plugged> = (3..3 + devices)
            .map(|socket| {
                let mouse = hardware.plug(Device::Mouse, xhci(socket));
                wait_at_most(PATIENCE, "it is attached", || vm.has(&mouse).then_some(()));
                mouse
            })
            .collect();
        // strace has the daemon as its child, and valgrind is the daemon.
        let children = format!("/proc/{0}/task/{0}/children", counter.id());
        let child = fs::read_to_string(children).unwrap_or_default();
        let pid = child.trim().parse().unwrap_or(counter.id() as i32);
        kill_process(Pid::from_raw(pid).expect("a process"), Signal::TERM).expect("it runs");
        counter.wait().expect("it ends");
        for mouse in &mice {
            hardware.pull(mouse);
            vm.qmp("device_del", json!({"id": mouse.id_in_vm()}));
        }
        self.counted()
    }
}
