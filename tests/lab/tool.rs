//! The program under test, run as its users run it.

use crate::host::must;
use crate::udev;
use crate::vm::Vm;
use std::ffi::OsStr;
use std::process::{Command, Output};

pub const PROGRAM: &str = env!("CARGO_BIN_EXE_usb-qmp-hotplug");

/// Instead of the program's own, which are for real machines that are not busy with other tests.
pub const SECONDS: &str = "60";

/// A rule that runs the program at the events of what matches.
pub fn rule(matches: &str, vm: &Vm) -> String {
    let run = format!("'{PROGRAM}' --timeout {SECONDS} udev {}", vm.socket());
    format!(
        "SUBSYSTEM==\"usb\", ENV{{DEVTYPE}}==\"usb_device\", ACTION==\"add|remove\", {matches}, RUN+=\"{run}\"\n"
    )
}

/// Makes these the test's rules. Those that are for real machines get the time that the lab's machines need.
pub fn rules(text: &str) {
    let patient = format!("{PROGRAM} --timeout {SECONDS} udev ");
    udev::rules(&text.replace(&format!("{PROGRAM} udev "), &patient));
}

/// What a run of the program came to.
#[derive(Debug)]
pub struct Outcome {
    pub status: i32,
    pub stdout: String,
    pub stderr: String,
}

pub fn run<I, S>(arguments: I) -> Outcome
where
    I: IntoIterator<Item = S>,
    S: AsRef<OsStr>,
{
    run_with::<_, _, [(&str, &str); 0]>(arguments, [])
}

/// With these environment variables besides.
pub fn run_with<'a, I, S, E>(arguments: I, environment: E) -> Outcome
where
    I: IntoIterator<Item = S>,
    S: AsRef<OsStr>,
    E: IntoIterator<Item = (&'static str, &'a str)>,
{
    outcome(Command::new(PROGRAM).args(["--timeout", SECONDS]).args(arguments).envs(environment))
}

/// As root with the rights of the service's unit and no more.
pub fn run_as_the_unit<'a>(arguments: impl IntoIterator<Item = &'a str>) -> Outcome {
    run_as_the_unit_within(SECONDS, arguments)
}

/// With this many seconds.
pub fn run_as_the_unit_within<'a>(
    seconds: &str,
    arguments: impl IntoIterator<Item = &'a str>,
) -> Outcome {
    let capabilities = crate::daemon::capabilities();
    let wrapper =
        ["setpriv", "--inh-caps", "-all", "--no-new-privs", "--bounding-set", &capabilities];
    run_in_within(seconds, &wrapper, PROGRAM, arguments)
}

/// The program at this path, below another one. It may have too few rights to tell udevd, which looks at a
/// new disk for a while, from another program that has the disk open.
pub fn run_in<'a>(
    wrapper: &[&str],
    program: &str,
    arguments: impl IntoIterator<Item = &'a str>,
) -> Outcome {
    udev::settle();
    run_in_within(SECONDS, wrapper, program, arguments)
}

fn run_in_within<'a>(
    seconds: &str,
    wrapper: &[&str],
    program: &str,
    arguments: impl IntoIterator<Item = &'a str>,
) -> Outcome {
    let mut command = Command::new(wrapper[0]);
    outcome(command.args(&wrapper[1..]).arg(program).args(["--timeout", seconds]).args(arguments))
}

/// With this many seconds.
pub fn run_within<'a>(seconds: &str, arguments: impl IntoIterator<Item = &'a str>) -> Outcome {
    outcome(Command::new(PROGRAM).args(["--timeout", seconds]).args(arguments))
}

/// With so little time that it is over soon.
pub fn run_hastily<'a>(arguments: impl IntoIterator<Item = &'a str>) -> Outcome {
    run_within("2", arguments)
}

/// A group of processes in which `$1` is to be (Linux, Documentation/admin-guide/cgroup-v2.rst, `pids`).
const GROUP: &str = "set -e
    mountpoint -q /run/cgroup || mount -m -t cgroup2 cgroup /run/cgroup
    mkdir -p /run/cgroup/alone
    echo +pids >/run/cgroup/cgroup.subtree_control
    echo $1 >/run/cgroup/alone/cgroup.procs
    echo 1 >/run/cgroup/alone/pids.max";

/// Has the kernel let a process start no thread any more, until `max` is written to the file.
pub fn leave_alone(pid: rustix::process::Pid) -> &'static str {
    let pid = pid.as_raw_nonzero().to_string();
    must("sh", &["-c", GROUP, "sh", &pid]);
    "/run/cgroup/alone/pids.max"
}

/// Where the kernel lets it start no thread and no process.
pub fn run_alone<'a>(
    arguments: impl IntoIterator<Item = &'a str>,
    environment: impl IntoIterator<Item = (&'static str, &'a str)>,
) -> Outcome {
    let script = format!("set -- $$ \"$@\"; {GROUP}; shift; exec \"$@\"");
    let mut command = Command::new("sh");
    command.args(["-c", &script, "sh", PROGRAM, "--timeout", SECONDS]).args(arguments);
    outcome(command.envs(environment))
}

/// As the user and group 65534, who may not open device nodes, when udevd has looked at them.
pub fn run_as_nobody<'a>(arguments: impl IntoIterator<Item = &'a str>) -> Outcome {
    udev::settle();
    // Not everybody may enter the directory it was built in.
    const COPY: &str = "/run/usb-qmp-hotplug";
    std::fs::copy(PROGRAM, COPY).expect("space below /run");
    let mut command = Command::new("setpriv");
    command.args("--reuid 65534 --regid 65534 --clear-groups --inh-caps=-all".split(' '));
    outcome(command.args([COPY, "--timeout", SECONDS]).args(arguments))
}

fn outcome(command: &mut Command) -> Outcome {
    let Output { status, stdout, stderr } = command.output().expect("the program starts");
    let outcome = Outcome {
        status: status.code().unwrap_or_else(|| panic!("{command:?}: {status}")),
        stdout: String::from_utf8(stdout).expect("text"),
        stderr: String::from_utf8(stderr).expect("text"),
    };
    eprintln!("{command:?}\n{outcome:?}");
    outcome
}

impl Outcome {
    #[track_caller]
    pub fn succeeds(self) -> Outcome {
        self.exits(0)
    }

    #[track_caller]
    pub fn exits(self, status: i32) -> Outcome {
        assert_eq!(self.status, status, "exit status; standard error: {}", self.stderr);
        self
    }
}
