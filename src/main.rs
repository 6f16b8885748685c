//! The `usb-qmp-hotplug` program: arguments, logging, runtime, one command,
//! exit code.

use std::process::ExitCode;

use clap::Parser;
use usb_qmp_hotplug::cli::{Cli, Command};
use usb_qmp_hotplug::{Error, command, log};

fn main() -> ExitCode {
    let cli = Cli::parse();
    let in_background = matches!(cli.command, Command::Udev(_) | Command::Watch);
    log::start(in_background, cli.quiet, cli.verbose);
    let done = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .build()
        .map_err(|source| Error::Write { what: "to the kernel's event queue", source })
        .and_then(|runtime| {
            let done = runtime.block_on(command::run(&cli));
            // Whoever still waits for the hardware is not waited for.
            runtime.shutdown_background();
            done
        });
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            command::report(&error);
            ExitCode::from(error.exit_code())
        }
    }
}
