//! The commands. Each has its own file, or a directory if it has parts that no
//! other command needs. No command imports another.

mod attach;
mod complete;
mod completions;
mod context;
mod detach;
mod inspect;
mod list;
mod man;
mod options;
mod release;
mod rule;
mod running;
mod sync;
mod take;
mod udev;
mod vms;

pub use context::{Context, seconds};

use tokio::signal::unix::{SignalKind, signal};

use crate::cli::{Cli, Command};
use crate::daemon;
use crate::error::Error;

/// Runs the command.
///
/// # Errors
///
/// The error of the command, or the signal that stopped it.
pub async fn run(cli: &Cli) -> Result<(), Error> {
    match &cli.command {
        // When an attach is dropped, it releases its lock. If the process is
        // killed instead, QEMU may keep a locked descriptor that it has not
        // used yet.
        Command::Attach(_) | Command::Udev(_) | Command::Sync(_) => tokio::select! {
            biased;
            done = work(cli) => done,
            stopped = stopped() => stopped,
        },
        _ => work(cli).await,
    }
}

/// Waits for a signal that stops a program.
async fn stopped() -> Result<(), Error> {
    let listen = |kind| {
        let what = "handle signals";
        signal(kind).map_err(|source| Error::Setup { what, source })
    };
    let mut interrupt = listen(SignalKind::interrupt())?;
    let mut terminate = listen(SignalKind::terminate())?;
    let (name, number) = tokio::select! {
        _ = interrupt.recv() => ("SIGINT", SignalKind::interrupt()),
        _ = terminate.recv() => ("SIGTERM", SignalKind::terminate()),
    };
    Err(Error::Stopped { name, number: number.as_raw_value() })
}

async fn work(cli: &Cli) -> Result<(), Error> {
    let context = Context::new(cli)?;
    // All but `udev` are in boxes: a future is as large as its largest part, and
    // an event should not touch memory for other commands.
    match &cli.command {
        Command::Inspect(arguments) => Box::pin(inspect::run(&context, arguments)).await,
        Command::Attach(arguments) => Box::pin(attach::run(&context, arguments)).await,
        Command::Detach(arguments) => Box::pin(detach::run(&context, arguments)).await,
        Command::Release(arguments) => Box::pin(release::run(&context, arguments)).await,
        Command::Udev(arguments) => udev::run(&context, arguments).await,
        Command::List(arguments) => Box::pin(list::run(&context, arguments)).await,
        Command::Vms(arguments) => Box::pin(vms::run(&context, arguments)).await,
        Command::Sync(arguments) => Box::pin(sync::run(&context, arguments)).await,
        Command::Watch => Box::pin(daemon::run(&context.settings())).await,
        Command::Rule(arguments) => Box::pin(rule::run(&context, arguments)).await,
        Command::Man(arguments) => man::run(&context, arguments),
        Command::Completions(arguments) => completions::run(arguments),
        Command::Complete(arguments) => Box::pin(complete::run(&context, arguments)).await,
    }
}
