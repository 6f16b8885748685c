//! What packages ship, judged by the programs that read it: the units by systemd, the manual pages by man.
//! Where one of these is not installed, its tests are reported as ignored.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use libtest_mimic::{Arguments, Trial};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Output};

const PROGRAM: &str = env!("CARGO_BIN_EXE_usb-qmp-hotplug");
const UNITS: [&str; 2] = ["usb-qmp-hotplug.service", "user/usb-qmp-hotplug.service"];

/// A test, its name, and the program that it needs.
type Test = (&'static str, &'static str, fn());

const TESTS: [Test; 4] = [
    (
        "systemd_understands_every_line_of_the_units",
        "systemd-analyze",
        systemd_understands_every_line_of_the_units,
    ),
    (
        "the_service_is_exposed_by_one_and_a_half_of_ten_at_most",
        "systemd-analyze",
        the_service_is_exposed_by_one_and_a_half_of_ten_at_most,
    ),
    ("man_has_nothing_to_complain_about", "man", man_has_nothing_to_complain_about),
    (
        "udev_understands_every_line_of_the_example_rules",
        "udevadm",
        udev_understands_every_line_of_the_example_rules,
    ),
];

/// What keeps a test from running.
fn missing(program: &str) -> Option<String> {
    match Command::new(program).arg("--version").output() {
        Err(error) => Some(format!("cannot run {program}: {error}")),
        Ok(output) if program == "udevadm" => {
            let version = String::from_utf8_lossy(&output.stdout).trim().to_owned();
            let verifies = version.parse().is_ok_and(|version: u32| version >= 254);
            (!verifies).then(|| format!("udevadm {version} checks no rules, 254 does"))
        }
        Ok(_) => None,
    }
}

fn main() -> ExitCode {
    let trial = |(name, program, test): Test| {
        let missing = missing(program);
        if let Some(missing) = &missing {
            eprintln!("shipped: {name} is ignored: {missing}");
        }
        let run = move || {
            test();
            Ok(())
        };
        Trial::test(name, run).with_ignored_flag(missing.is_some())
    };
    let trials = TESTS.into_iter().map(trial).collect();
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}

fn analyze(arguments: &[&str], unit: &Path) -> Output {
    let mut command = Command::new("systemd-analyze");
    // A user's manager must have it.
    command.env("XDG_RUNTIME_DIR", std::env::temp_dir());
    command.args(arguments).arg(unit).output().unwrap()
}

fn version() -> Option<u32> {
    let version = Command::new("systemd-analyze").arg("--version").output().unwrap();
    String::from_utf8_lossy(&version.stdout).split_whitespace().nth(1)?.parse().ok()
}

/// A unit as it is installed, but of a program that is there.
fn installed(unit: &str, root: &Path) -> PathBuf {
    let contrib = Path::new(env!("CARGO_MANIFEST_DIR")).join("contrib/systemd");
    let text = fs::read_to_string(contrib.join(unit)).unwrap();
    assert!(text.contains("ExecStart=/usr/bin/usb-qmp-hotplug "), "{unit}");
    let mut text = text.replace("/usr/bin/usb-qmp-hotplug", PROGRAM);
    if version().is_some_and(|version| version < 253) {
        let older = fs::read_to_string(contrib.join("older-than-253.conf")).unwrap();
        text = text.replace("Type=notify-reload\n", &older.replace("[Service]\n", ""));
    }
    let path = root.join("usb-qmp-hotplug.service");
    fs::write(&path, text).unwrap();
    path
}

fn systemd_understands_every_line_of_the_units() {
    let root = tempfile::tempdir().unwrap();
    for (unit, manager) in UNITS.into_iter().zip(["--system", "--user"]) {
        let path = installed(unit, root.path());
        let verified = analyze(&["--man=no", manager, "verify"], &path);
        let said = String::from_utf8_lossy(&verified.stderr);
        // It judges what else is installed, too.
        let about_it: Vec<&str> =
            said.lines().filter(|line| line.contains("usb-qmp-hotplug")).collect();
        assert!(verified.status.success() && about_it.is_empty(), "{unit}: {said}");
    }
}

fn the_service_is_exposed_by_one_and_a_half_of_ten_at_most() {
    let root = tempfile::tempdir().unwrap();
    let path = installed(UNITS[0], root.path());
    let arguments = ["security", "--offline=true", "--no-pager", "--threshold=15"];
    let judged = analyze(&arguments, &path);
    let said = String::from_utf8_lossy(&judged.stdout);
    assert!(judged.status.success(), "{said}{}", String::from_utf8_lossy(&judged.stderr));
    assert!(said.contains("Overall exposure level"), "{said}");
}

fn man_has_nothing_to_complain_about() {
    let directory = tempfile::tempdir().unwrap();
    let written = Command::new(PROGRAM).arg("man").arg(directory.path()).output().unwrap();
    assert!(written.status.success(), "{}", String::from_utf8_lossy(&written.stderr));
    let pages: Vec<PathBuf> =
        fs::read_dir(directory.path()).unwrap().map(|page| page.unwrap().path()).collect();
    assert!(pages.len() > 2, "{pages:?}");
    for page in pages {
        let output = Command::new("man")
            .args(["--warnings=all", "-E", "UTF-8", "-l", "-Tutf8", "-Z"])
            .env_clear()
            .envs([("MANWIDTH", "80"), ("LC_ALL", "C.UTF-8"), ("PATH", "/usr/bin:/bin")])
            .arg(&page)
            .output()
            .unwrap();
        let complaints = String::from_utf8_lossy(&output.stderr);
        assert!(complaints.is_empty(), "{}: {complaints}", page.display());
        assert!(output.status.success(), "{}", page.display());
    }
}

fn udev_understands_every_line_of_the_example_rules() {
    let example = include_str!("../contrib/udev/90-usb-qmp-hotplug.rules");
    let rule = |line: &&str| line.starts_with("#SUBSYSTEM") || line.starts_with("#    ");
    let rules: String = example
        .lines()
        .filter(rule)
        .map(|line| line.trim_start_matches('#').to_owned() + "\n")
        .collect();
    assert!(rules.matches("RUN+=").count() > 3, "{rules}");
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("90-example.rules");
    fs::write(&file, rules).unwrap();
    let verified = Command::new("udevadm").arg("verify").arg(&file).output().unwrap();
    assert!(verified.status.success(), "{}", String::from_utf8_lossy(&verified.stderr));
}
