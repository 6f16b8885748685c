//! The completion scripts in their shells. A shell that is not installed is
//! passed over, and its tests count as ignored.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use libtest_mimic::{Arguments, Trial};
use std::path::Path;
use std::process::{Command, ExitCode};

const PROGRAM: &str = env!("CARGO_BIN_EXE_usb-qmp-hotplug");

/// A test in a shell of this name.
type Test = fn(&str);

/// In each shell, something that prints the candidates for the words given to
/// it, after it has read the script at `$0`.
const SHELLS: [(&str, &[&str]); 3] = [
    (
        "bash",
        &[
            "--norc",
            "-c",
            "source $0; COMP_WORDS=(\"$@\") COMP_CWORD=$(($# - 1)) COMP_TYPE=9; \
         _usb_qmp_hotplug \"$1\"; printf '%s\\n' \"${COMPREPLY[@]}\"",
        ],
    ),
    (
        "zsh",
        &[
            "-f",
            "-c",
            "compdef() { :; }; _describe() { print -l -- \"${(P@)3}\"; }; \
         _files() { print files; }; compset() { :; }; source $0; \
         words=(\"$@\"); CURRENT=$#; PREFIX=${words[-1]}; _usb-qmp-hotplug",
        ],
    ),
    ("fish", &["--no-config", "-c", "source $argv[1]; set -e argv[1]; complete -C \"$argv\""]),
];

fn completed(shell: &str, words: &[&str]) -> String {
    let (_, how) = SHELLS.iter().find(|(name, _)| *name == shell).unwrap();
    let script = tempfile::NamedTempFile::new().unwrap();
    let printed = Command::new(PROGRAM).args(["completions", shell]).output().unwrap();
    assert!(printed.status.success());
    std::fs::write(script.path(), printed.stdout).unwrap();
    let output = Command::new(shell)
        .args(*how)
        .arg(script.path())
        .arg(PROGRAM)
        .args(words)
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(errors.is_empty(), "{shell}: {errors}");
    String::from_utf8(output.stdout).unwrap()
}

#[track_caller]
fn offers(shell: &str, words: &[&str], wanted: &[&str], unwanted: &[&str]) {
    let offered = completed(shell, words);
    for word in wanted {
        assert!(offered.contains(word), "{shell} {words:?}: no {word} in {offered:?}");
    }
    for word in unwanted {
        assert!(!offered.contains(word), "{shell} {words:?}: {word} in {offered:?}");
    }
}

fn commands_and_options(shell: &str) {
    offers(shell, &[""], &["attach", "detach", "Show every USB device"], &["complete\t"]);
    offers(shell, &["det"], &["detach"], &["attach"]);
    offers(shell, &["attach", "vm", "--guest"], &["--guest-bus", "--guest-port"], &["--force"]);
    offers(shell, &["rule", "--by", ""], &["port", "product", "serial"], &["attach"]);
    // The shell does that itself, and bash's own way is not seen from a script.
    let files: &[&str] = if shell == "zsh" { &["files"] } else { &[] };
    offers(shell, &["--config", "/"], files, &[":files"]);
}

fn names_of_vms(shell: &str) {
    let config = tempfile::Builder::new().prefix("conf").tempfile().unwrap();
    let toml = "[vm.win11]\nqmp = \"/run/win11.qmp\"\n[vm.wine]\nqmp = \"/run/w.qmp\"\n";
    std::fs::write(config.path(), toml).unwrap();
    let config = config.path().to_str().unwrap();
    offers(shell, &["--config", config, "attach", "w"], &["win11", "wine", "/run/w.qmp"], &[]);
    offers(shell, &["--config", config, "rule", "--vm", "win"], &["win11", "wine"], &[]);
    offers(shell, &["--config", config, "sync", "wine", "win1"], &["win11"], &["wine"]);
}

fn main() -> ExitCode {
    let tests: [(&str, Test); 2] =
        [("commands_and_options", commands_and_options), ("names_of_vms", names_of_vms)];
    let trial = |(shell, name, test): (&'static str, &str, Test)| {
        let missing = !["/usr/bin", "/bin", "/usr/local/bin"]
            .iter()
            .any(|directory| Path::new(directory).join(shell).exists());
        let run = move || {
            test(shell);
            Ok(())
        };
        Trial::test(format!("{shell}::{name}"), run).with_ignored_flag(missing)
    };
    let trials = SHELLS
        .iter()
        .flat_map(|(shell, _)| tests.iter().map(move |(name, test)| (*shell, *name, *test)))
        .map(trial)
        .collect();
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}
