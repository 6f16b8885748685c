//! The commands, one file each: what it does, and how it shows the result.

mod attach;
mod complete;
mod completions;
mod detach;
mod how;
mod inspect;
mod list;
mod man;
mod rule;
mod screen;
mod sync;
mod udev;
mod vms;
mod watch;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tracing::{error, warn};

use crate::cli::{Cli, Command, Global};
use crate::config::{self, Config};
use crate::error::{Error, chain};
use crate::host::Host;
use crate::progress;
use crate::text::{escape, escape_json, nearest};
use crate::vm::Vm;

/// What every command needs.
#[derive(Debug)]
pub struct Context {
    /// The host.
    pub host: Host,
    /// The time for one conversation with a VM.
    pub timeout: Duration,
    /// Where the configuration is.
    config: PathBuf,
    /// Say only what failed.
    pub quiet: bool,
}

impl Context {
    /// The context that the global options ask for.
    ///
    /// # Errors
    ///
    /// [`Error::Usage`].
    pub fn new(cli: &Cli) -> Result<Self, Error> {
        let Global { timeout, config, quiet, .. } = &cli.global;
        let timeout = seconds("--timeout", timeout)?;
        Ok(Context { host: Host::default(), timeout, config: config.clone(), quiet: *quiet })
    }

    /// Reads the configuration.
    fn config(&self) -> Result<Config, Error> {
        Ok(Config::read(&self.config)?)
    }

    /// Reads the configuration; one that is not there is empty.
    fn config_if_there(&self) -> Result<Config, Error> {
        match self.config() {
            Err(Error::Config(config::Error::Io { source, .. }))
                if source.kind() == std::io::ErrorKind::NotFound =>
            {
                Ok(Config::default())
            }
            config => config,
        }
    }

    /// Reads the configuration for what can do without: a bad one is told and
    /// counts as empty, and so is one that was named and is not there.
    fn config_or_none(&self) -> Config {
        let is_default = self.config == Path::new(config::DEFAULT_PATH);
        let config = if is_default { self.config_if_there() } else { self.config() };
        config.unwrap_or_else(|error| {
            warn!("going on without a configuration: {}", chain(&error));
            Config::default()
        })
    }

    /// The socket of a VM: a path, which has a `/`, or a name of the
    /// configuration, which is only read for that.
    fn socket(&self, vm: &str) -> Result<PathBuf, Error> {
        if vm.contains('/') {
            return Ok(PathBuf::from(vm));
        }
        let config = self.config_if_there()?;
        if let Some(socket) = config.socket(vm) {
            return Ok(socket.to_owned());
        }
        let names = config.vms.iter().map(|vm| vm.name.as_str());
        let next = match nearest(vm, names) {
            Some(name) => format!("did you mean `{name}`?"),
            None => {
                "give the path of its QMP socket, which has a `/`; `usb-qmp-hotplug vms` shows it"
                    .to_owned()
            }
        };
        let (vm, file) = (escape(vm), self.config.to_string_lossy());
        Err(Error::NoVm(format!("no VM `{vm}` in {}; {next}", escape(&file))))
    }

    /// Does what may take a while; on a terminal a line then says what it is.
    async fn during<T>(&self, what: impl Fn() -> String, work: impl Future<Output = T>) -> T {
        progress::during(self.quiet, what, work).await
    }

    /// Connects to a VM.
    async fn connect(&self, socket: &Path) -> Result<Vm, Error> {
        let shown = socket.to_string_lossy();
        let what = || format!("waiting for the monitor at {}", escape(&shown));
        Ok(self.during(what, Vm::connect(socket, self.timeout)).await?)
    }

    /// Says what was done, on standard output.
    fn say(&self, line: std::fmt::Arguments<'_>) -> Result<(), Error> {
        if self.quiet { Ok(()) } else { print(&format!("{line}\n")) }
    }
}

/// Runs the command.
///
/// # Errors
///
/// What the command met.
pub async fn run(cli: &Cli) -> Result<(), Error> {
    let context = Context::new(cli)?;
    match &cli.command {
        Command::Inspect(arguments) => inspect::run(&context, arguments).await,
        Command::Attach(arguments) => attach::run(&context, arguments).await,
        Command::Detach(arguments) => detach::run(&context, arguments).await,
        Command::Udev(arguments) => udev::run(&context, arguments).await,
        Command::List(arguments) => list::run(&context, arguments).await,
        Command::Vms(arguments) => vms::run(&context, arguments).await,
        Command::Sync(arguments) => sync::run(&context, arguments).await,
        Command::Watch => watch::run(&context).await,
        Command::Rule(arguments) => rule::run(&context, arguments).await,
        Command::Man(arguments) => man::run(&context, arguments),
        Command::Completions(arguments) => completions::run(arguments),
        Command::Complete(arguments) => complete::run(&context, arguments).await,
    }
}

/// The time that an option names.
fn seconds(option: &str, text: &str) -> Result<Duration, Error> {
    let seconds: Option<f64> = text.parse().ok().filter(|s| (0.001..=86_400.0).contains(s));
    seconds.map(Duration::from_secs_f64).ok_or_else(|| {
        let text = escape(text);
        Error::Usage(format!("{option} {text}: give seconds, more than 0 and at most 86400"))
    })
}

/// Writes to standard output. Whoever closes the pipe has seen enough.
fn print(text: &str) -> Result<(), Error> {
    print_more(text).map(drop)
}

/// As [`print()`]; false if nobody reads any more.
fn print_more(text: &str) -> Result<bool, Error> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(false),
        Err(source) => Err(Error::Write { what: "standard output", source }),
    }
}

/// A JSON document, for people too.
fn json(document: &impl serde::Serialize) -> Result<String, Error> {
    serde_json::to_string_pretty(document)
        .map(|json| escape_json(json) + "\n")
        .map_err(|error| Error::Write { what: "the JSON document", source: error.into() })
}

/// Reports an error to the log. A hub that udev met is no failure: a rule for
/// all that is behind a hub meets the hubs there, too.
pub fn report(error: &Error, in_background: bool) {
    match error {
        Error::Several { errors, .. } => {
            errors.iter().for_each(|error| report(error, in_background));
            error!("{error}");
        }
        Error::Hub(_) if in_background => warn!("{error}"),
        _ => error!("{}", chain(error)),
    }
}

/// One error, or several as one.
fn together(mut errors: Vec<Error>, of: usize) -> Result<(), Error> {
    if errors.len() > 1 {
        return Err(Error::Several { errors, of });
    }
    errors.pop().map_or(Ok(()), Err)
}
