//! The program under test, run as its users run it.

use std::ffi::OsStr;
use std::process::{Command, Stdio};

pub const PROGRAM: &str = env!("CARGO_BIN_EXE_usb-qmp-hotplug");

/// What a run of the program came to.
#[derive(Debug)]
pub struct Outcome {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

/// The program with these arguments, in an environment with next to nothing.
pub fn program(arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Command {
    let mut command = Command::new(PROGRAM);
    command.args(arguments).env_clear().stdin(Stdio::null());
    command
}

/// Runs the program with these arguments.
#[track_caller]
pub fn run(arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Outcome {
    outcome_of(&mut program(arguments))
}

/// Runs a command to its end.
#[track_caller]
pub fn outcome_of(command: &mut Command) -> Outcome {
    let output = command.output().unwrap();
    let code = output.status.code().unwrap_or_else(|| panic!("{command:?}: {}", output.status));
    Outcome {
        code,
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

impl Outcome {
    /// That it failed with this exit code, and said these words on standard error and nothing on
    /// standard output.
    #[track_caller]
    pub fn fails(self, code: i32, words: &[&str]) -> Self {
        assert_eq!((self.code, self.stdout.as_str()), (code, ""), "{}", self.stderr);
        for words in words {
            assert!(self.stderr.contains(words), "{words}: {}", self.stderr);
        }
        assert!(self.stderr.starts_with("usb-qmp-hotplug: "), "{}", self.stderr);
        self
    }
}
