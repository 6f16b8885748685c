//! The `usb-qmp-hotplug` program: arguments, logging, runtime, one command,
//! exit code.

use std::ffi::OsString;
use std::io;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;

use clap::Parser;
use tokio::runtime::{Builder, Runtime};
use usb_qmp_hotplug::cli::{Cli, Command};
use usb_qmp_hotplug::text::escape;
use usb_qmp_hotplug::ui::{log, output};
use usb_qmp_hotplug::{Error, command};

/// The runtime waits for the kernel's events. tokio panics if it cannot get the
/// five descriptors that it needs, so this function tries first whether they
/// are available.
fn runtime() -> io::Result<Runtime> {
    let spare = [UnixStream::pair()?, UnixStream::pair()?, UnixStream::pair()?];
    drop(spare);
    Builder::new_current_thread().enable_io().enable_time().build()
}

fn main() -> ExitCode {
    let words: Vec<OsString> = std::env::args_os().collect();
    let cli = Cli::read(&words).unwrap_or_else(|error| {
        // clap repeats words that it does not understand, and a terminal would
        // obey control characters in them. So clap gets the words escaped the
        // second time.
        let shown = words.iter().map(|word| escape(&word.to_string_lossy()).into_owned());
        Cli::try_parse_from(shown).err().unwrap_or(error).exit()
    });
    let in_background = matches!(cli.command, Command::Udev(_) | Command::Watch);
    log::start(in_background, cli.global.quiet, cli.global.verbose);
    let done = runtime()
        .map_err(|source| Error::Setup {
            what: "wait for events (`ulimit -n` raises a limit)",
            source,
        })
        .and_then(|runtime| runtime.block_on(command::run(&cli)));
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            output::report(&error, in_background);
            ExitCode::from(error.exit_code())
        }
    }
}
