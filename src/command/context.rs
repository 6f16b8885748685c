//! The facts that every command needs: the global options, the configuration,
//! the VMs.

use std::path::{Path, PathBuf};
use std::time::Duration;

use tracing::warn;

use crate::cli::{Cli, Global};
use crate::daemon::Settings;
use crate::error::Error;
use crate::host::Host;
use crate::policy::config::{self, Config};
use crate::qemu::{Vm, VmAddress};
use crate::text::{chain, escape, nearest};
use crate::ui::output::print;
use crate::ui::progress;

/// The facts that every command needs.
#[derive(Debug)]
pub struct Context {
    /// The host.
    pub host: Host,
    /// The limit for one conversation with a VM.
    pub timeout: Duration,
    /// The path of the configuration.
    pub config: PathBuf,
    /// Print only failures.
    pub quiet: bool,
}

impl Context {
    /// Creates the context from the global options.
    ///
    /// # Errors
    ///
    /// [`Error::Usage`].
    pub fn new(cli: &Cli) -> Result<Self, Error> {
        let Global { timeout, config, quiet, .. } = &cli.global;
        let timeout = seconds("--timeout", timeout)?;
        let host = Host::default().within(timeout);
        Ok(Context { host, timeout, config: config.clone(), quiet: *quiet })
    }

    /// The settings for the daemon.
    pub fn settings(&self) -> Settings {
        let (host, timeout, config) = (self.host.clone(), self.timeout, self.config.clone());
        Settings { host, timeout, config }
    }

    /// Reads the configuration.
    pub fn config(&self) -> Result<Config, Error> {
        Ok(Config::read(&self.config)?)
    }

    /// Reads the configuration. If the file does not exist, the configuration
    /// is empty.
    pub fn config_if_there(&self) -> Result<Config, Error> {
        match self.config() {
            Err(Error::Config(config::Error::Io { source, .. }))
                if source.kind() == std::io::ErrorKind::NotFound =>
            {
                Ok(Config::default())
            }
            config => config,
        }
    }

    /// Reads the configuration for a command that also works without it. If the
    /// file is wrong, or was named and does not exist, the user is told and the
    /// configuration is empty.
    pub fn config_or_none(&self) -> Config {
        let is_default = self.config == Path::new(config::DEFAULT_PATH);
        let config = if is_default { self.config_if_there() } else { self.config() };
        config.unwrap_or_else(|error| {
            warn!("going on without a configuration: {}", chain(&error));
            Config::default()
        })
    }

    /// The address of a VM: the path of its socket, which contains a `/`,
    /// `libvirt:NAME`, or a name in the configuration. The configuration is
    /// read only for a name.
    pub fn vm(&self, vm: &str) -> Result<VmAddress, Error> {
        if let Some(address) = self.written_vm(vm)? {
            return Ok(address);
        }
        let config = self.config_if_there()?;
        Err(self.unknown_vm(vm, nearest(vm, config.vms.iter().map(|vm| vm.name.as_str()))))
    }

    /// The address of a VM, from the text itself or from the configuration.
    pub fn written_vm(&self, vm: &str) -> Result<Option<VmAddress>, Error> {
        match VmAddress::read(vm)? {
            Some(address) => Ok(Some(address)),
            None => Ok(self.config_if_there()?.address(vm).cloned()),
        }
    }

    /// The error for a name that no VM has. `meant` is a VM that the user may
    /// have meant.
    pub fn unknown_vm(&self, vm: &str, meant: Option<&str>) -> Error {
        let next = match meant {
            Some(name) => format!("did you mean `{}`?", escape(name)),
            None => "give the path of its QMP socket, which has a `/`, or `libvirt:NAME`; \
                     `usb-qmp-hotplug vms` shows what runs"
                .to_owned(),
        };
        let (vm, file) = (escape(vm), self.config.to_string_lossy());
        Error::NoVm(format!("no VM `{vm}` in {}; {next}", escape(&file)))
    }

    /// Does work that may take a while. On a terminal, a line shows what it is.
    pub async fn during<T>(&self, what: impl Fn() -> String, work: impl Future<Output = T>) -> T {
        progress::during(self.quiet, what, work).await
    }

    /// Connects to a VM.
    pub async fn connect(&self, address: &VmAddress) -> Result<Vm, Error> {
        let shown = address.to_string();
        let what = || format!("waiting for the monitor at {}", escape(&shown));
        Ok(self.during(what, Vm::connect(address, self.timeout)).await?)
    }

    /// Prints what was done to standard output.
    pub fn say(&self, line: std::fmt::Arguments<'_>) -> Result<(), Error> {
        if self.quiet { Ok(()) } else { print(&format!("{line}\n")) }
    }
}

/// The time that an option gives, in seconds.
pub fn seconds(option: &str, text: &str) -> Result<Duration, Error> {
    let seconds: Option<f64> = text.parse().ok().filter(|s| (0.001..=86_400.0).contains(s));
    seconds.map(Duration::from_secs_f64).ok_or_else(|| {
        let text = escape(text);
        Error::Usage(format!("{option} {text}: give seconds, more than 0 and at most 86400"))
    })
}
