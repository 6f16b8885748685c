//! In the machine: runs the tests one after the other, each in a process of its own, and reports every result at once.

use crate::hardware::Hardware;
use crate::journal::Journal;
use crate::{Kind, Test, all_tests, daemon, gadget, libvirtd, remote, service, udev, vm};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::time::{Duration, Instant};

pub const RUN: &str = "--inside-the-lab";
pub const RUN_ONE: &str = "--one-inside-the-lab";

/// Between what a failed test printed and what the kernel logged meanwhile.
pub const KERNEL_LOG: &str = "--- the kernel's log\n";

/// How often the tests that repeat something do so, if more often than is good for everyday use.
pub const CYCLES: &str = "LAB_CYCLES";

impl Test {
    /// It does not take half as long even on a machine that is busy with other things, unless it hangs.
    pub fn deadline(&self) -> Duration {
        let is_long = self.kind == Kind::Long || std::env::var(CYCLES).is_ok();
        Duration::from_secs(if is_long { 60 } else { 15 } * 60)
    }
}

/// One line of standard output.
#[derive(Serialize, Deserialize)]
pub struct Report {
    pub test: String,
    /// What is to be shown of a test that failed.
    pub failure: Option<String>,
    pub seconds: f64,
}

pub fn run(names: &[String]) -> ExitCode {
    for test in all_tests().filter(|test| names.iter().any(|name| name == test.name)) {
        let start = Instant::now();
        let report = Report {
            test: test.name.to_owned(),
            failure: run_apart(&test).err(),
            seconds: start.elapsed().as_secs_f64(),
        };
        let mut line = serde_json::to_string(&report).expect("plain data");
        line.push('\n');
        std::io::stdout().write_all(line.as_bytes()).expect("the lab's standard output");
    }
    ExitCode::SUCCESS
}

/// Runs a test in a process of its own, on a clean machine.
fn run_apart(test: &Test) -> Result<(), String> {
    const OUTPUT: &str = "/run/output";
    let output = File::create(OUTPUT).expect("a file below /run");
    // The kernel's log goes on from here; to read all of it takes long.
    let begins = format!("{} begins", test.name);
    fs::write("/dev/kmsg", &begins).expect("the kernel's log");
    let mut child = Command::new(std::env::current_exe().expect("this program"))
        .args([RUN_ONE, test.name])
        .stdin(Stdio::null())
        .stdout(output.try_clone().expect("a descriptor"))
        .stderr(output)
        .process_group(0)
        .spawn()
        .expect("this program starts");
    let ended = ends_within(test.deadline(), &mut child);
    if ended.is_some_and(|status| status.success()) {
        return Ok(());
    }
    let stuck = stuck();
    // With every program that it has started, or those would be in the way of the next.
    let _ = kill_process_group(Pid::from_child(&child), Signal::KILL);
    let _ = child.wait();
    let ending = match ended {
        Some(_) => String::new(),
        None => format!("It was killed after {:?}.\n", test.deadline()),
    };
    let output = fs::read(OUTPUT).unwrap_or_default();
    let kernel = kernel_log();
    let known = kernel.iter().rposition(|line| line.ends_with(&begins));
    let kernel = kernel[known.map_or(0, |known| known + 1)..].join("\n");
    Err(format!("{}{ending}{stuck}{KERNEL_LOG}{kernel}", String::from_utf8_lossy(&output)))
}

/// The processes that wait in the kernel and cannot be interrupted, and those that a device goes through: for what
/// they wait (proc_pid_stack(5)). udevd has events to deal with as long as there is /run/udev/queue.
fn stuck() -> String {
    let is_udevd_busy = fs::exists("/run/udev/queue").unwrap_or_default();
    let mut stuck = if is_udevd_busy { "--- udevd is not done\n" } else { "" }.to_owned();
    for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let read = |name| fs::read_to_string(process.path().join(name)).unwrap_or_default();
        let name = read("comm");
        let name = name.trim_end();
        // The state comes after the name, which is in parentheses (proc_pid_stat(5)).
        let is_stuck =
            read("stat").rsplit_once(") ").is_some_and(|(_, state)| state.starts_with('D'));
        let handles_devices = ["systemd-udevd", "(udev-worker)", "usb-qmp-hotplug"].contains(&name)
            || name.starts_with("qemu-system");
        if is_stuck || handles_devices {
            stuck += &format!("--- {name} waits in the kernel\n{}", read("stack"));
        }
    }
    stuck
}

/// Sleeps until it ends: to look now and then would cost the test time.
fn ends_within(patience: Duration, child: &mut Child) -> Option<ExitStatus> {
    let process = pidfd_open(Pid::from_child(child), PidfdFlags::empty()).expect("a child");
    let timeout = patience.try_into().expect("some minutes");
    poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&timeout)).expect("a child");
    child.try_wait().expect("a child")
}

pub fn run_one(name: &str) -> ExitCode {
    let Some(Test { run, .. }) = all_tests().find(|test| test.name == name) else {
        eprintln!("no such test: {name}");
        return ExitCode::FAILURE;
    };
    libvirtd::clear();
    vm::clear();
    udev::forget_rules();
    // What the program logs is shown if the test fails.
    let journal = (!service::has_systemd()).then(Journal::journald);
    daemon::clear();
    gadget::clear();
    remote::clear();
    Hardware::open().clear();
    run();
    drop(journal);
    ExitCode::SUCCESS
}

fn kernel_log() -> Vec<String> {
    let log = Command::new("dmesg").output().expect("dmesg").stdout;
    String::from_utf8_lossy(&log).lines().map(str::to_owned).collect()
}
