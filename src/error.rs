//! The errors of the program, and its exit codes.

use crate::host::{self, Told};
use crate::policy::config;
use crate::qemu::{NoGuestPort, VmAddress, qmp};
use crate::text::escape;
use crate::usb::{Device, EventError, ParseError};

/// An error of this tool. Its message names the thing that failed and the next
/// step. The cause, if there is one, is its source.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The monitor failed, or it refused a command.
    #[error(transparent)]
    Qmp(#[from] qmp::Error),
    /// Reading or using the host's devices failed.
    #[error(transparent)]
    Host(#[from] host::Error),
    /// A text is not the name of a domain.
    #[error(transparent)]
    Domain(#[from] qmp::NotADomain),
    /// The configuration cannot be used.
    #[error(transparent)]
    Config(#[from] config::Error),
    /// No VM has that name.
    #[error("{0}")]
    NoVm(String),
    /// The system refused something that the daemon needs.
    #[error("cannot {what}")]
    Setup {
        /// What could not be done.
        what: &'static str,
        /// The reason.
        source: std::io::Error,
    },
    /// The command line is wrong.
    #[error("{0}")]
    Usage(String),
    /// The variables of udev are wrong.
    #[error(transparent)]
    Event(#[from] EventError),
    /// A word on the command line is not a valid name.
    #[error(transparent)]
    Parse(#[from] ParseError),
    /// The user named a hub.
    #[error("{0} is a hub: hubs stay with the host; name a device behind it")]
    Hub(Device),
    /// The VM's QEMU keeps a device open that the VM does not have. It may have
    /// had the device before, because a paused QEMU before 9.1 keeps
    /// descriptors (monitor/fds.c, `monitor_fdset_cleanup`), or the descriptor
    /// came through another monitor.
    #[error("VM {} still holds {device}: {}", escape(.vm), match .is_paused {
        true => "it had it before, and a QEMU before 9.1 that is paused keeps it until it runs again; \
                 resume it",
        false => "it was passed through another monitor of it, or is about to be; detach it through \
                  that one, or restart the VM",
    })]
    StillHeld {
        /// The VM's socket.
        vm: String,
        /// The device.
        device: Device,
        /// Whether the VM is paused.
        is_paused: bool,
    },
    /// The VM is being restored, or migrated to this host.
    #[error("VM {} waits for its saved or migrated state, and would lose {device} with it; let it run \
             first", escape(.vm))]
    Incoming {
        /// The VM's socket.
        vm: String,
        /// The device.
        device: Device,
    },
    /// The kernel makes a process wait that opens or reads a device. Its
    /// drivers have not started yet, or it does not answer.
    #[error(
        "{0} is not ready: its drivers are still starting, or it does not answer; give it more time \
         with --timeout, or plug it in again"
    )]
    Silent(Device),
    /// The VM has no port for the device.
    #[error("VM {}: {}", escape(&.vm.to_string()), why_no_port(.vm, .why))]
    NoGuestPort {
        /// The VM.
        vm: VmAddress,
        /// Why.
        why: NoGuestPort,
    },
    /// The VM has no such device.
    #[error("VM {} has no device for {what}; `usb-qmp-hotplug inspect` shows what it has", escape(.vm))]
    NotInVm {
        /// The VM's socket.
        vm: String,
        /// What the user named.
        what: String,
    },
    /// A VM has the device, and none of its monitors can be used.
    #[error(
        "{device} is in {vm}, and no monitor of that VM can be used; `usb-qmp-hotplug vms` shows why"
    )]
    OutOfReach {
        /// The device.
        device: Device,
        /// The VM, as text for messages.
        vm: String,
    },
    /// The host has no such device, and a VM that may still have it did not
    /// answer.
    #[error("{missing}; VM {} may still have it, and cannot be asked", escape(.vm))]
    UnknownLeftover {
        /// What the host says about the device.
        missing: host::Error,
        /// The VM's address.
        vm: String,
        /// Why it cannot be asked.
        source: Box<Error>,
    },
    /// The VM would take a device again as soon as it is detached.
    #[error("the VM that has {device} would take it back at once: its {} looks for such a device; \
             detach that first", escape(.by))]
    WouldReturn {
        /// The device.
        device: Device,
        /// The object that would take it.
        by: String,
    },
    /// It cannot be known which of several objects of a VM has the device.
    #[error("the VM has {device}, and QEMU does not tell as which of {}; give an id",
        escape(&.names.join(", ")))]
    Unclear {
        /// The device.
        device: Device,
        /// The objects that may have it.
        names: Vec<String>,
    },
    /// Standard output or the log could not be written.
    #[error("cannot write {what}")]
    Write {
        /// What could not be written.
        what: &'static str,
        /// The reason.
        source: std::io::Error,
    },
    /// No device was plugged in within the time limit.
    #[error("nothing was plugged in within {0} s; --wait SECONDS waits longer")]
    NothingCame(u64),
    /// A rule of udev could not be installed.
    #[error("cannot install {}; --install needs root", escape(&.path.to_string_lossy()))]
    Install {
        /// The rule's file.
        path: std::path::PathBuf,
        /// The reason.
        source: std::io::Error,
    },
    /// Other users may change the program that a rule runs as root.
    #[error(
        "the rule is not installed: {0}, which udev would run as root; install the program in \
             /usr/bin, and run it from there"
    )]
    Exposed(host::Exposed),
    /// udev does not accept a rule.
    #[error("{} is not installed, udevadm says: {complaint}", escape(&.path.to_string_lossy()))]
    BadRule {
        /// The rule's file.
        path: std::path::PathBuf,
        /// What udevadm said.
        complaint: String,
    },
    /// A signal stopped the program.
    #[error(
        "stopped by {name}; what a VM was asked to do it may still do, `usb-qmp-hotplug inspect` \
             shows what it has"
    )]
    Stopped {
        /// The signal's name.
        name: &'static str,
        /// Its number (signal(7)).
        number: i32,
    },
    /// Several things failed. Each failure was reported already.
    #[error("{} of {of} failed", .errors.len())]
    Several {
        /// What failed.
        errors: Vec<Error>,
        /// How many things were to be done.
        of: usize,
    },
}

/// What has to happen before a refused attach can succeed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Until {
    /// Its disks become free: unmounted and closed. The kernel may report that.
    DisksFree(Told),
    /// The process that has the device releases it.
    LetGo,
    /// The device is authorized. Then the kernel adds its interfaces.
    Authorized,
    /// Its drivers start.
    Started,
    /// Something that nothing reports: the VM gets a free port or ends its
    /// migration, or the system has a free descriptor or thread again.
    Untold,
}

/// Whether the system lacks a resource that may soon be free again (errno(3)).
fn is_shortage(error: &std::io::Error) -> bool {
    use rustix::io::Errno;
    let short = [Errno::MFILE, Errno::NFILE, Errno::NOMEM, Errno::AGAIN, Errno::NOBUFS];
    Errno::from_io_error(error).is_some_and(|error| short.contains(&error))
}

/// Why a VM has no port for a device, with advice for the way the VM is
/// started.
fn why_no_port(vm: &VmAddress, why: &NoGuestPort) -> String {
    match vm {
        VmAddress::Socket(_) => why.to_string(),
        VmAddress::Libvirt(_) => why.for_libvirt().to_string(),
    }
}

impl Error {
    /// What a refused attach has to wait for. `None` if waiting does not help.
    pub fn until(&self) -> Option<Until> {
        match self {
            Error::Host(host::Error::InUse(used)) => Some(Until::DisksFree(used.by.told())),
            Error::Host(host::Error::Unmount { .. }) => Some(Until::DisksFree(Told::Always)),
            Error::Host(host::Error::Held { .. } | host::Error::Claimed { .. }) => {
                Some(Until::LetGo)
            }
            Error::StillHeld { .. } => Some(Until::LetGo),
            Error::Host(host::Error::NotAuthorized(_)) => Some(Until::Authorized),
            Error::Silent(_) => Some(Until::Started),
            Error::NoGuestPort { .. } | Error::Incoming { .. } => Some(Until::Untold),
            Error::Host(host::Error::Read { source, .. } | host::Error::Thread(source))
            | Error::Setup { source, .. }
                if is_shortage(source) =>
            {
                Some(Until::Untold)
            }
            Error::Qmp(error) => match &error.kind {
                qmp::ErrorKind::Refused(no) if no.is_while_migrating() => Some(Until::Untold),
                qmp::ErrorKind::Connect(source) if is_shortage(source) => Some(Until::Untold),
                _ => None,
            },
            _ => None,
        }
    }

    /// The exit code. Scripts depend on it.
    ///
    /// | code | meaning |
    /// |---|---|
    /// | 1 | anything else |
    /// | 2 | usage, or a bad configuration |
    /// | 3 | no such device |
    /// | 4 | no such VM: no socket, or nobody listens |
    /// | 5 | the VM did not answer in time, or another client holds its monitor |
    /// | 6 | QEMU said no |
    /// | 7 | refused: hub, in use by the host, or held by another VM |
    /// | 130, 143 | stopped by SIGINT or SIGTERM |
    pub fn exit_code(&self) -> u8 {
        use qmp::{ErrorKind, LibvirtError};
        match self {
            Error::Usage(_)
            | Error::Domain(_)
            | Error::Event(_)
            | Error::Parse(_)
            | Error::Config(_) => 2,
            Error::NoVm(_) => 4,
            Error::Host(host::Error::Ambiguous { .. }) => 2,
            Error::Host(host::Error::NoDevice(_) | host::Error::Gone(_)) => 3,
            Error::Unclear { .. } => 2,
            Error::OutOfReach { .. } => 5,
            Error::UnknownLeftover { source, .. } => source.exit_code(),
            Error::WouldReturn { .. } => 7,
            Error::NotInVm { .. } | Error::NothingCame(_) => 3,
            Error::Qmp(error) => match error.kind {
                ErrorKind::NoSocket(_) | ErrorKind::NotASocket | ErrorKind::NobodyListens(_) => 4,
                ErrorKind::OtherUser { .. } => 4,
                ErrorKind::NoGreeting { .. } | ErrorKind::NoReply { .. } => 5,
                ErrorKind::Refused(_) => 6,
                ErrorKind::Libvirt(ref error) => match error {
                    LibvirtError::Busy => 5,
                    error if error.is_no_vm() => 4,
                    _ => 1,
                },
                _ => 1,
            },
            Error::NoGuestPort { .. } => 6,
            Error::Hub(_) | Error::StillHeld { .. } | Error::Incoming { .. } => 7,
            Error::Host(host::Error::RootHub(_)) => 7,
            Error::Host(host::Error::InUse(_) | host::Error::Held { .. }) => 7,
            Error::Host(host::Error::Claimed { .. } | host::Error::NotAuthorized(_)) => 7,
            Error::Host(host::Error::DefaultRoute { .. }) => 7,
            Error::Host(host::Error::Unmount { .. }) => 7,
            Error::Host(_) | Error::Write { .. } | Error::Setup { .. } => 1,
            Error::Exposed(_)
            | Error::Install { .. }
            | Error::BadRule { .. }
            | Error::Silent(_) => 1,
            // Shells use the same number (bash(1), "Exit status").
            Error::Stopped { number, .. } => u8::try_from(128 + number).unwrap_or(1),
            Error::Several { errors, .. } => errors.iter().map(Error::exit_code).max().unwrap_or(1),
        }
    }
}
