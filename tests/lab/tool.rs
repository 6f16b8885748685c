//! The program under test, run as its users run it.

use std::ffi::OsStr;
use std::process::{Command, Output};

pub const PROGRAM: &str = env!("CARGO_BIN_EXE_usb-qmp-hotplug");

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
pub fn run_with<I, S, E>(arguments: I, environment: E) -> Outcome
where
    I: IntoIterator<Item = S>,
    S: AsRef<OsStr>,
    E: IntoIterator<Item = (&'static str, &'static str)>,
{
    let mut command = Command::new(PROGRAM);
    command.args(arguments).envs(environment);
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
