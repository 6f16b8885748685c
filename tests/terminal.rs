//! What a person at a terminal sees while something takes long.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

#[allow(dead_code, reason = "shared with tests that use more of it")]
mod tool;

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use rustix::fs::{Mode, OFlags, open};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};
use tempfile::TempDir;
use tool::{outcome_of, program};

/// A VM whose monitor another client holds: it accepts, and never greets.
struct HeldVm {
    directory: TempDir,
    _monitor: UnixListener,
}

impl HeldVm {
    fn new() -> HeldVm {
        let directory = tempfile::tempdir().unwrap();
        let _monitor = UnixListener::bind(directory.path().join("vm.qmp")).unwrap();
        let vm = HeldVm { directory, _monitor };
        let configuration = format!("[vm.win11]\nqmp = \"{}\"\n", vm.path("vm.qmp").display());
        fs::write(vm.path("vm.toml"), configuration).unwrap();
        vm
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The program, which waits this long for the monitor of the VM `win11`.
    fn program(&self, seconds: &str, arguments: &[&str]) -> Command {
        let mut program = program(["--timeout", seconds, "--config"]);
        program.arg(self.path("vm.toml")).args(arguments);
        program
    }
}

/// What the program writes to a terminal that is its standard error.
fn written(command: &mut Command, columns: u16) -> String {
    let terminal = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&terminal).unwrap();
    unlockpt(&terminal).unwrap();
    let size = Winsize { ws_row: 24, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    tcsetwinsize(&terminal, size).unwrap();
    let name = ptsname(&terminal, Vec::new()).unwrap();
    let end = open(name, OFlags::RDWR | OFlags::NOCTTY, Mode::empty()).unwrap();
    let mut child = command.stdout(Stdio::null()).stderr(end).spawn().unwrap();
    // The last copy of the other end must be the child's.
    command.stderr(Stdio::null());
    let mut bytes = Vec::new();
    // The end is EIO, when nobody has the other end open any more.
    let _ = File::from(terminal).read_to_end(&mut bytes);
    child.wait().unwrap();
    String::from_utf8(bytes).unwrap()
}

/// The lines that were to be seen, each in the place of the one before it.
fn lines(written: &str) -> Vec<&str> {
    written.split("\r\u{1b}[K").collect()
}

#[test]
fn who_waits_for_a_monitor_is_told_so_and_in_the_end_the_line_is_gone() {
    let vm = HeldVm::new();
    let waits = |arguments: &[&str], waits_for: &str| {
        let written = written(vm.program("1.4", arguments).env("TERM", "xterm"), 200);
        let lines = lines(&written);
        let [before, first, .., second, last] = lines.as_slice() else {
            panic!("{arguments:?}: {lines:?}");
        };
        let waiting = format!("waiting for {waits_for}");
        assert_eq!(*before, "", "{arguments:?}");
        assert!(first.starts_with(&waiting), "{lines:?}");
        assert!(second.starts_with(&waiting) && second.ends_with(" ... 1 s"), "{lines:?}");
        assert!(last.starts_with("usb-qmp-hotplug: "), "{lines:?}");
        assert!(last.contains("another client holds this monitor"), "{lines:?}");
    };
    std::thread::scope(|scope| {
        scope.spawn(|| waits(&["inspect", "win11"], "the monitor at "));
        scope.spawn(|| waits(&["detach", "win11", "1-1"], "the monitor at "));
        scope.spawn(|| waits(&["sync", "win11"], "win11"));
    });
}

#[test]
fn the_line_fits_the_terminal() {
    let vm = HeldVm::new();
    let written = written(vm.program("0.7", &["inspect", "win11"]).env("TERM", "xterm"), 20);
    assert_eq!(lines(&written).get(1), Some(&"waiting for the mo…"), "{written:?}");
}

#[test]
fn what_is_quick_or_quiet_or_no_terminal_gets_no_line() {
    let vm = HeldVm::new();
    let inspect = ["inspect", "win11"];
    let quiet = [inspect.as_slice(), &["--quiet"]].concat();
    for (what, written) in [
        ("quick", written(vm.program("0.3", &inspect).env("TERM", "xterm"), 80)),
        ("quiet", written(vm.program("0.7", &quiet).env("TERM", "xterm"), 80)),
        ("dumb", written(vm.program("0.7", &inspect).env("TERM", "dumb"), 80)),
        ("none", outcome_of(vm.program("0.7", &inspect).env("TERM", "xterm")).stderr),
    ] {
        assert!(written.starts_with("usb-qmp-hotplug: "), "{what}: {written:?}");
        assert_eq!(written.lines().count(), 1, "{what}: {written:?}");
    }
}
