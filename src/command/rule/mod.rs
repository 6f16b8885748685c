//! `rule DEVICE --vm VM`: creates the udev rule, or the configuration, that
//! gives a device or a port to a VM.

mod install;
mod keyboard;
mod learn;
mod serial;
mod socket;
mod toml;
mod udev;
mod what;

use std::path::Path;
use std::time::Duration;

use tracing::{info, warn};

use super::{Context, seconds};
use crate::cli::Rule;
use crate::error::Error;
use crate::host::Host;
use crate::policy::config::DEFAULT_PATH;
use crate::policy::exposed::exposed;
use crate::qemu::VmAddress;
use crate::ui::output::print;
use what::{Naming, What};

/// The value of `--timeout` if the user does not give it.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(5);

/// The VM that a rule is for.
struct RuleVm {
    /// The name that udev passes to this program: a name in the configuration,
    /// or an absolute path.
    name: String,
    /// Its address. A socket's path is absolute.
    address: VmAddress,
    /// Whether the name is in the configuration.
    configured: bool,
}

/// Prints the rule, or installs it.
pub async fn run(context: &Context, arguments: &Rule) -> Result<(), Error> {
    let vm = vm(context, arguments.vm.as_deref())?;
    let naming = Naming { by: arguments.by, bus_number: arguments.bus_number };
    let what = match &arguments.device {
        Some(device) => What::named(&context.host, &device.parse()?, naming)?,
        None => {
            let wait = seconds("--wait", &arguments.wait)?;
            let device = learn::plugged(context, wait).await?;
            What::of_device(&context.host, &device, naming)?
        }
    };
    if let What::Below(_) = what {
        info!("{what}: hubs stay with the host, what is behind them goes to the VM");
    }
    warn_of_numbers(&context.host, &what);
    keyboard::warn_of_keyboards(&context.host, &what);
    let command = command(context, &vm)?;
    // udev runs the program as root. An exposed one is not installed at all.
    let program = command.first().map(Path::new).filter(|_| !arguments.toml);
    let config = vm.configured.then_some(context.config.as_path());
    let warned = program.filter(|_| !arguments.install);
    for told in exposed(&context.host, warned, config, [(vm.name.as_str(), &vm.address)]) {
        warn!("{told}");
    }
    if arguments.toml {
        return print(&toml::configuration(context, &what, &vm)?);
    }
    let rule = udev::rule(&what, &vm.name, &command)?;
    if !arguments.install {
        return print(&rule);
    }
    if let Some(exposed) = program.and_then(|program| context.host.exposed_file(program)) {
        return Err(Error::Exposed(exposed));
    }
    install::install(context, &what, &vm.name, &rule)?;
    let ports = match &what {
        What::Port(socket) => socket.ports.as_slice(),
        _ => &[],
    };
    if let Some(device) = ports.iter().find_map(|port| context.host.device(port).ok()?) {
        info!("{device} is plugged in already; `attach` takes it now, or plug it in again");
    }
    Ok(())
}

/// Warns once that a rule uses bus numbers, and shows the stable name.
fn warn_of_numbers(host: &Host, what: &What) {
    let (What::Port(socket) | What::Below(socket)) = what else { return };
    if socket.place.is_some() {
        return;
    }
    let instead = match socket.ports.first().and_then(|port| host.port_path(port)) {
        Some(path) => format!("without --bus-number the rule names {path}"),
        None => "its controller has no name that stays".to_owned(),
    };
    warn!("after the next boot {} may be another port; {instead}", socket.numbers());
}

/// The VM with this name or path, or the only VM. A name that is not in the
/// configuration, but only in a running VM, cannot be used in a udev rule.
fn vm(context: &Context, vm: Option<&str>) -> Result<RuleVm, Error> {
    let (address, configured) = match vm {
        Some(vm) if VmAddress::read(vm)?.is_none() => {
            let known = context.config_if_there()?.address(vm).is_some();
            (context.typed_vm(vm)?, known.then_some(vm))
        }
        Some(vm) => (context.vm(vm)?, None),
        None => (context.only_vm()?, None),
    };
    // udev runs programs in its own directory and as root.
    let address = match address {
        VmAddress::Socket(socket) => std::path::absolute(&socket.path)
            .map_err(|source| Error::Setup { what: "tell the current directory", source })?
            .into(),
        VmAddress::Libvirt(domain) => domain.of_user().into(),
    };
    let name = match (configured, &address) {
        (Some(name), _) => name.to_owned(),
        (None, VmAddress::Socket(socket)) => text(socket)?,
        (None, VmAddress::Libvirt(_)) => address.to_string(),
    };
    Ok(RuleVm { name, address, configured: configured.is_some() })
}

/// The command that udev is to run.
fn command(context: &Context, vm: &RuleVm) -> Result<Vec<String>, Error> {
    let program = std::env::current_exe()
        .map_err(|source| Error::Setup { what: "tell where this program is", source })?;
    let mut command = vec![text(&program)?];
    if context.timeout != DEFAULT_TIMEOUT {
        command.extend(["--timeout".to_owned(), context.timeout.as_secs_f64().to_string()]);
    }
    // The configuration is read only for names.
    if vm.configured && context.config != Path::new(DEFAULT_PATH) {
        let config = std::path::absolute(&context.config)
            .map_err(|source| Error::Setup { what: "tell the current directory", source })?;
        command.extend(["--config".to_owned(), text(&config)?]);
    }
    command.extend(["udev".to_owned(), vm.name.clone()]);
    Ok(command)
}

/// A path as text.
fn text(path: &Path) -> Result<String, Error> {
    path.to_str().map(str::to_owned).ok_or_else(|| {
        let path = path.to_string_lossy();
        let path = crate::text::escape(&path);
        Error::Usage(format!("the path {path} is not UTF-8 and cannot be written in a rule"))
    })
}
