//! The units for systemd: that it understands them, and what they leave to the program.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

const UNITS: [&str; 2] = ["usb-qmp-hotplug.service", "user/usb-qmp-hotplug.service"];

/// What systemd-analyze says; nothing where there is none.
fn analyze(arguments: &[&str], unit: &Path) -> Option<Output> {
    let mut command = Command::new("systemd-analyze");
    // A user's manager must have it.
    command.env("XDG_RUNTIME_DIR", std::env::temp_dir());
    match command.args(arguments).arg(unit).output() {
        Ok(output) => Some(output),
        Err(_) => {
            eprintln!("ignored: there is no systemd-analyze");
            None
        }
    }
}

fn version() -> Option<u32> {
    let version = Command::new("systemd-analyze").arg("--version").output().ok()?;
    String::from_utf8_lossy(&version.stdout).split_whitespace().nth(1)?.parse().ok()
}

/// A unit as it is installed, but of a program that is there.
fn installed(unit: &str, root: &Path) -> PathBuf {
    let contrib = Path::new(env!("CARGO_MANIFEST_DIR")).join("contrib/systemd");
    let text = fs::read_to_string(contrib.join(unit)).unwrap();
    let program = env!("CARGO_BIN_EXE_usb-qmp-hotplug");
    assert!(text.contains("ExecStart=/usr/bin/usb-qmp-hotplug "), "{unit}");
    let mut text = text.replace("/usr/bin/usb-qmp-hotplug", program);
    if version().is_some_and(|version| version < 253) {
        let older = fs::read_to_string(contrib.join("older-than-253.conf")).unwrap();
        text = text.replace("Type=notify-reload\n", &older.replace("[Service]\n", ""));
    }
    let path = root.join("usb-qmp-hotplug.service");
    fs::write(&path, text).unwrap();
    path
}

#[test]
fn systemd_understands_every_line_of_the_units() {
    let root = tempfile::tempdir().unwrap();
    for (unit, manager) in UNITS.into_iter().zip(["--system", "--user"]) {
        let path = installed(unit, root.path());
        let Some(verified) = analyze(&["--man=no", manager, "verify"], &path) else { return };
        let said = String::from_utf8_lossy(&verified.stderr);
        // It judges what else is installed, too.
        let about_it: Vec<&str> =
            said.lines().filter(|line| line.contains("usb-qmp-hotplug")).collect();
        assert!(verified.status.success() && about_it.is_empty(), "{unit}: {said}");
    }
}

#[test]
fn the_service_is_exposed_by_two_of_ten_at_most() {
    let root = tempfile::tempdir().unwrap();
    let path = installed(UNITS[0], root.path());
    let arguments = ["security", "--offline=true", "--no-pager", "--threshold=20"];
    let Some(judged) = analyze(&arguments, &path) else { return };
    let said = String::from_utf8_lossy(&judged.stdout);
    assert!(judged.status.success(), "{said}{}", String::from_utf8_lossy(&judged.stderr));
    assert!(said.contains("Overall exposure level"), "{said}");
}
