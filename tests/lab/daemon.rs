//! `watch`, as systemd runs it: with a configuration, the capabilities of its unit and no more, no network, and
//! somebody who listens to what it says of itself.

use crate::host;
use crate::tool::{self, PROGRAM};
use crate::udev;
use crate::wait::{wait_for, wait_until};
use rustix::process::{Pid, Signal, kill_process};
use std::fs::{self, File};
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

pub const CONFIG: &str = "/run/usb-qmp-hotplug.toml";
const NOTIFY: &str = "/run/notify";
const LOG: &str = "/run/daemon.log";

pub struct Daemon {
    child: Child,
    said: Arc<Mutex<Vec<String>>>,
}

/// The configuration of these VMs, and what else is in it.
pub fn configure(vms: &[&str], rules: &str) {
    fs::write(CONFIG, configuration(vms, rules)).unwrap();
}

pub fn configuration(vms: &[&str], rules: &str) -> String {
    let vm = |vm: &&str| format!("[vm.{vm}]\nqmp = \"/run/vm/{vm}.qmp\"\n");
    let vms: String = vms.iter().map(vm).collect();
    format!("{vms}{rules}")
}

/// A rule: what matches goes to the VM.
pub fn rule(vm: &str, matches: &str) -> String {
    format!("[[rule]]\nvm = \"{vm}\"\n{matches}\n")
}

/// What the daemon's standard error is.
pub fn log_file() -> File {
    File::options().create(true).append(true).open(LOG).unwrap()
}

/// The unit's `CapabilityBoundingSet=`, as `setpriv` wants it.
pub fn capabilities() -> String {
    let unit = include_str!("../../contrib/systemd/usb-qmp-hotplug.service");
    let set = unit.lines().find_map(|line| line.strip_prefix("CapabilityBoundingSet="));
    let names = set.expect("the unit has the line").split_whitespace();
    let names = names.map(|name| format!(",+{}", name.trim_start_matches("CAP_").to_lowercase()));
    format!("-all{}", names.collect::<String>())
}

impl Daemon {
    /// Starts it once udevd has looked at every disk, and waits until it is ready. udevd opens a disk to look at it, and
    /// the daemon with its unit's capabilities cannot see that it is udevd: it would make the disk wait.
    pub fn start() -> Daemon {
        udev::settle();
        let daemon = Daemon::launch(&["--timeout", tool::SECONDS], &[]);
        daemon.wait_until_it_says("READY=1");
        daemon
    }

    /// Starts it with options and variables.
    pub fn launch(options: &[&str], environment: &[(&str, &str)]) -> Daemon {
        Daemon::launch_in(&[], options, environment)
    }

    /// Starts it below another program.
    pub fn launch_in(wrapper: &[&str], options: &[&str], environment: &[(&str, &str)]) -> Daemon {
        let _ = fs::remove_file(NOTIFY);
        let socket = UnixDatagram::bind(NOTIFY).expect("the service manager's socket");
        let said = Arc::new(Mutex::new(Vec::new()));
        let saying = Arc::clone(&said);
        thread::spawn(move || {
            let mut buffer = vec![0; 1 << 12];
            while let Ok(length) = socket.recv(&mut buffer) {
                let text = String::from_utf8_lossy(&buffer[..length]).into_owned();
                saying.lock().unwrap().extend(text.lines().map(str::to_owned));
            }
        });
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "unshare", "--net"])
            .args(wrapper)
            .args(["setpriv", "--inh-caps", "-all", "--no-new-privs"])
            .args(["--bounding-set", &capabilities()])
            .args([PROGRAM, "--config", CONFIG])
            .args(options)
            .arg("watch")
            .env("NOTIFY_SOCKET", NOTIFY)
            .envs(environment.iter().copied())
            .stdin(Stdio::null())
            .stderr(log_file())
            .spawn()
            .expect("the daemon starts");
        Daemon { child, said }
    }

    /// What it told systemd, line by line.
    pub fn said(&self) -> Vec<String> {
        self.said.lock().unwrap().clone()
    }

    #[track_caller]
    pub fn wait_until_it_says(&self, line: &str) {
        wait_until(&format!("the daemon says {line}; so far {:?}", self.said()), || {
            self.said().iter().any(|said| said == line)
        });
    }

    /// Waits until this is the last of its STATUS lines.
    #[track_caller]
    pub fn wait_for_status(&self, status: &str) {
        let is_status = |line: &&String| line.starts_with("STATUS=");
        wait_until(&format!("STATUS={status}; so far {:?}", self.said()), || {
            let said = self.said();
            said.iter().rfind(is_status).is_some_and(|last| *last == format!("STATUS={status}"))
        });
    }

    /// The first line of its log that has all these parts, once it is there.
    #[track_caller]
    pub fn wait_for_log(&self, parts: &[&str]) -> String {
        wait_for(&format!("{parts:?} in the log"), || {
            self.log()
                .lines()
                .find(|line| parts.iter().all(|p| line.contains(p)))
                .map(str::to_owned)
        })
    }

    /// Everything it has logged, and those before it in the same test.
    pub fn log(&self) -> String {
        fs::read_to_string(LOG).unwrap_or_default()
    }

    pub fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).expect("the daemon runs");
    }

    /// Stops it in its tracks and waits until it stands.
    pub fn freeze(&self) {
        self.signal(Signal::STOP);
        wait_until("the daemon stands still", || self.field("status", "State:").starts_with('T'));
    }

    pub fn thaw(&self) {
        self.signal(Signal::CONT);
    }

    /// Has it read its configuration again.
    pub fn reload(&self) {
        let reloads = || self.said().iter().filter(|line| *line == "READY=1").count();
        let before = reloads();
        self.signal(Signal::HUP);
        wait_until("it has reloaded", || reloads() > before);
    }

    /// Waits for its end.
    pub fn wait(&mut self) -> ExitStatus {
        wait_for("the daemon ends", || self.child.try_wait().unwrap())
    }

    /// How many descriptors it has open.
    pub fn descriptors(&self) -> usize {
        fs::read_dir(self.proc("fd")).expect("the daemon runs").count()
    }

    /// The memory that it has allocated and used, in kibibytes: without the pages of the program's file, more of which
    /// are there whenever it does something for the first time.
    pub fn memory(&self) -> u64 {
        self.field("status", "RssAnon:").trim_end_matches(" kB").parse().unwrap()
    }

    /// The most memory that it ever had, in kibibytes.
    pub fn most_memory(&self) -> u64 {
        self.field("status", "VmHWM:").trim_end_matches(" kB").parse().unwrap()
    }

    /// Waits until nothing is left to do: udevd has no event that it may still tell, no thread waits for the hardware,
    /// and the daemon sleeps for a second. It is looked at several times meanwhile: where the whole machine gets no
    /// processor for a second, a daemon that has something to do does not sleep or wake either.
    pub fn is_idle(&self) {
        udev::settle();
        wait_until("it has one thread, which slept for a second", || {
            let before = self.switches();
            let sleeps = || {
                thread::sleep(Duration::from_millis(100));
                self.switches() == before
            };
            (0..10).all(|_| sleeps()) && fs::read_dir(self.proc("task")).unwrap().count() == 1
        });
    }

    /// How often all of its threads together have slept and woken.
    fn switches(&self) -> u64 {
        let tasks = fs::read_dir(self.proc("task")).expect("the daemon runs");
        let switches = |task: fs::DirEntry| {
            let status = fs::read_to_string(task.path().join("status")).unwrap_or_default();
            let lines = status.lines().filter(|line| line.contains("ctxt_switches"));
            lines.map(|line| line.rsplit('\t').next().unwrap().parse::<u64>().unwrap()).sum::<u64>()
        };
        tasks.flatten().map(switches).sum()
    }

    /// Nothing wakes it for this long, once it is idle. If something does, the failure shows each time what program ran,
    /// and what the kernel did for it (Documentation/trace/events.rst in the kernel's source).
    #[track_caller]
    pub fn must_sleep_for(&self, time: Duration) {
        let tracing = Path::new("/sys/kernel/tracing");
        // The daemon is told of mounts, so this comes before it is idle.
        host::mount("tracefs", "tracefs", tracing);
        let write = |file: &str, text: &str| {
            fs::write(tracing.join(file), text).expect("the kernel's trace");
        };
        write("events/sched/sched_waking/filter", &format!("pid == {}", self.child.id()));
        write("options/stacktrace", "1");
        write("trace", "");
        write("events/sched/sched_waking/enable", "1");
        self.is_idle();
        let before = self.switches();
        thread::sleep(time);
        let after = self.switches();
        let wakes = fs::read_to_string(tracing.join("trace")).expect("the kernel's trace");
        assert_eq!(after, before, "{wakes}");
    }

    /// Whether it has this file open.
    pub fn has_open(&self, path: &Path) -> bool {
        let descriptors = fs::read_dir(self.proc("fd")).expect("the daemon runs").flatten();
        descriptors.filter_map(|d| fs::read_link(d.path()).ok()).any(|open| open == path)
    }

    fn proc(&self, name: &str) -> String {
        format!("/proc/{}/{name}", self.child.id())
    }

    fn field(&self, file: &str, name: &str) -> String {
        let text = fs::read_to_string(self.proc(file)).expect("the daemon runs");
        text.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim().to_owned()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if thread::panicking() {
            eprintln!("--- the daemon's log\n{}said {:?}", self.log(), self.said());
        }
    }
}

/// Removes what an earlier test has left.
pub fn clear() {
    for file in [CONFIG, NOTIFY, LOG] {
        let _ = fs::remove_file(file);
    }
}
