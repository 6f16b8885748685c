//! The VMs that run on this host, with their names and the addresses of their
//! monitors.

use super::Context;
use crate::error::Error;
use crate::host::proc::cmdline::Endpoint;
use crate::host::{Host, Qemu, Reach};
use crate::qemu::VmAddress;
use crate::qemu::qmp::Domain;
use crate::text::{escape, nearest};

/// A VM that runs.
#[derive(Debug)]
pub struct Running {
    /// Its process.
    pub qemu: Qemu,
    /// Its domain, if libvirt started it.
    pub domain: Option<Domain>,
}

impl Running {
    /// The VM of a QEMU.
    pub fn of(qemu: Qemu) -> Self {
        let domain = domain(&qemu);
        Running { qemu, domain }
    }

    /// Its name, if it was given one.
    pub fn name(&self) -> Option<&str> {
        self.qemu.command_line.name.as_deref()
    }

    /// Whether its name can be trusted. Any process can give itself any name,
    /// so only processes of root, of the caller and of the system's own users
    /// are trusted.
    pub fn is_trusted(&self) -> bool {
        let own = rustix::process::geteuid().as_raw();
        self.qemu.uid.is_some_and(|uid| uid == own || is_system(uid))
    }

    /// Its address: through libvirt, or the first of its monitors that no
    /// client is known to use.
    pub fn address(&self, host: &Host) -> Option<VmAddress> {
        if let Some(domain) = &self.domain {
            return Some(domain.clone().into());
        }
        let pid = self.qemu.pid;
        let monitors = host.monitors(&self.qemu);
        let mut sockets = monitors.iter().filter_map(|monitor| match monitor {
            Endpoint::Unix(path) | Endpoint::Listening(path) => {
                let is_held = host.clients(pid, path).is_some();
                match host.reach(pid, path) {
                    Reach::Here(socket) | Reach::Elsewhere(socket) => Some((is_held, socket)),
                    Reach::Hidden => None,
                }
            }
            Endpoint::Descriptor(_) | Endpoint::Client(_) | Endpoint::Other(_) => None,
        });
        let first = sockets.next()?;
        let free = std::iter::once(first.clone()).chain(sockets).find(|(is_held, _)| !is_held);
        Some(free.unwrap_or(first).1.into())
    }

    /// `process 4711 of user anna`
    fn process(&self) -> String {
        let user = self.qemu.user.as_deref().unwrap_or("unknown");
        format!("process {} of user {}", self.qemu.pid, escape(user))
    }
}

/// The domain of a QEMU that libvirt started. It is the domain whose file has
/// the process id of the QEMU. If this user may not read that file, the user
/// who runs the QEMU decides whose domain it is.
fn domain(qemu: &Qemu) -> Option<Domain> {
    qemu.command_line.libvirts.as_ref()?;
    let name = qemu.command_line.name.as_deref()?;
    let system = Domain::of_system(name)?;
    let user = match qemu.uid {
        Some(uid) if uid == rustix::process::geteuid().as_raw() => None,
        Some(uid) => Some(qemu.user.clone().unwrap_or_else(|| uid.to_string())),
        None => return Some(system),
    };
    let session = Domain::of_session(name, user.as_deref())?;
    let is_its = |domain: &Domain| domain.pid() == Some(qemu.pid);
    let is_persons = !is_its(&system) && (is_its(&session) || !qemu.uid.is_none_or(is_system));
    Some(if is_persons { session } else { system })
}

/// Whether a user is not a person: root, a user of the system (login.defs(5),
/// `UID_MIN`), or the user of a service (systemd, docs/UIDS-GIDS.md). Debian's
/// libvirt-qemu is one of the latter.
fn is_system(uid: u32) -> bool {
    uid < 1000 || (61_184..=65_519).contains(&uid)
}

impl Context {
    /// The VMs that run on this host, as far as this user may see them.
    pub fn running(&self) -> Vec<Running> {
        self.host.qemus().into_iter().map(Running::of).collect()
    }

    /// The address of a VM that a person has typed. It works like
    /// [`Context::vm`], and it also accepts the name of a running VM.
    ///
    /// # Errors
    ///
    /// As for [`Context::vm`]. It is also an error if several VMs have the
    /// name, or if only a VM of another person has it.
    pub fn typed_vm(&self, vm: &str) -> Result<VmAddress, Error> {
        if let Some(address) = self.written_vm(vm)? {
            return Ok(address);
        }
        let running = self.running();
        let has_name = |running: &&Running| running.name() == Some(vm);
        let shown = escape(vm);
        let (trusted, others): (Vec<&Running>, Vec<&Running>) =
            running.iter().filter(has_name).partition(|running| running.is_trusted());
        match (trusted.as_slice(), others.as_slice()) {
            ([one], _) => one.address(&self.host).ok_or_else(|| {
                Error::NoVm(format!(
                    "VM {shown} ({}) has no QMP socket that can be reached; `usb-qmp-hotplug vms` \
                     shows what to add",
                    one.process()
                ))
            }),
            ([], [other, ..]) => Err(Error::NoVm(format!(
                "only {} calls itself {shown}, and anybody's process can; give the path of its QMP \
                 socket, or `libvirt:`, to mean it",
                other.process()
            ))),
            ([], []) => {
                let config = self.config_if_there()?;
                let names = config.vms.iter().map(|vm| vm.name.as_str());
                let known = nearest(vm, names.chain(running.iter().filter_map(Running::name)));
                Err(self.unknown_vm(vm, known))
            }
            (several, _) => {
                let address = |one: &&Running| match one.address(&self.host) {
                    Some(address) => {
                        format!("{} ({})", escape(&address.to_string()), one.process())
                    }
                    None => one.process(),
                };
                let all: Vec<String> = several.iter().map(address).collect();
                Err(Error::Usage(format!(
                    "several VMs are called {shown}; name one of {}",
                    all.join(", ")
                )))
            }
        }
    }

    /// The address of the VM that runs on this host, if there is only one.
    ///
    /// # Errors
    ///
    /// When no VM runs, or several do.
    pub fn only_vm(&self) -> Result<VmAddress, Error> {
        let running = self.running();
        let reached = |running: &Running| {
            let address = running.is_trusted().then(|| running.address(&self.host))??;
            Some((running.name().unwrap_or("without a name").to_owned(), address))
        };
        let mut found: Vec<(String, VmAddress)> = running.iter().filter_map(reached).collect();
        match (found.len(), found.pop()) {
            (1, Some((name, address))) => {
                let (name, shown) = (escape(&name), address.to_string());
                tracing::info!(
                    "the rule is for VM {name} ({}), which alone runs here",
                    escape(&shown)
                );
                Ok(address)
            }
            (0, _) => Err(Error::Usage(
                "no VM runs here that can be reached; say which one is meant with --vm".into(),
            )),
            (_, last) => {
                let all = found.into_iter().chain(last);
                let all: Vec<String> =
                    all.map(|(_, address)| escape(&address.to_string()).into_owned()).collect();
                Err(Error::Usage(format!(
                    "several VMs run here; say which one is meant with --vm: {}",
                    all.join(", ")
                )))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_persons_process_is_nobody_elses_vm() {
        for uid in [0, 107, 999, 64_055, 61_200] {
            assert!(is_system(uid), "{uid}");
        }
        for uid in [1000, 1001, 60_100, 65_534, 100_000] {
            assert!(!is_system(uid), "{uid}");
        }
    }
}
