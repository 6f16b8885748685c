//! The errors of a monitor: the connection failed, or QEMU refused a command.

use std::fmt;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::time::Duration;

use super::VmAddress;
pub use super::libvirt_error::LibvirtError;
use crate::text::escape;

/// An error of a QMP session: the VM, and what went wrong.
#[derive(Debug)]
pub struct Error {
    /// The monitor's address, as the user gave it.
    pub vm: VmAddress,
    /// What went wrong.
    pub kind: ErrorKind,
}

impl Error {
    pub(crate) fn new(vm: &VmAddress, kind: ErrorKind) -> Self {
        Error { vm: vm.clone(), kind }
    }

    /// QEMU's refusal, if the error is one.
    pub fn refusal(&self) -> Option<&Refusal> {
        match &self.kind {
            ErrorKind::Refused(refusal) => Some(refusal),
            _ => None,
        }
    }

    /// Whether a process listens there that must not.
    pub fn is_other_user(&self) -> bool {
        matches!(self.kind, ErrorKind::OtherUser { .. })
    }

    /// Whether the VM does not run: there is no socket, or no process listens
    /// on it, or a process listens that must not.
    pub fn is_not_running(&self) -> bool {
        match &self.kind {
            ErrorKind::NoSocket(_) | ErrorKind::NobodyListens(_) | ErrorKind::OtherUser { .. } => {
                true
            }
            ErrorKind::Libvirt(error) => error.is_not_running(),
            _ => false,
        }
    }
}

/// What went wrong in a session.
#[derive(Debug)]
pub enum ErrorKind {
    /// There is no file at the socket's path.
    NoSocket(io::Error),
    /// There is a socket that no process listens on: QEMU has ended.
    NobodyListens(io::Error),
    /// The file at the path is not a socket.
    NotASocket,
    /// The process that listens on the socket belongs to another user than it
    /// should.
    OtherUser {
        /// The id of the user that it should belong to.
        wanted: u32,
        /// The id of the user that it belongs to.
        found: u32,
    },
    /// The socket could not be reached for another reason.
    Connect(io::Error),
    /// No greeting before the deadline: another client holds the monitor, or
    /// QEMU does not run.
    NoGreeting {
        /// How long this tool waited.
        waited: Duration,
    },
    /// What the peer sends is not QMP.
    NotQmp {
        /// The data that was received instead.
        saw: String,
    },
    /// The peer sent more than is read in one conversation. The text says how
    /// much.
    TooMuch(&'static str),
    /// The connection broke. It has no source if the peer closed it.
    Lost(Option<io::Error>),
    /// No reply before the deadline.
    NoReply {
        /// How long this tool waited.
        waited: Duration,
    },
    /// The session had an error before, and cannot be used any more.
    Unusable,
    /// QEMU refused the command.
    Refused(Refusal),
    /// libvirt refused to pass the command on.
    Libvirt(LibvirtError),
    /// A reply or an argument does not have the format of the command.
    Unexpected {
        /// The command.
        command: &'static str,
        /// The part that did not fit.
        source: serde_json::Error,
    },
}

/// QEMU's refusal of a command, in QEMU's words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// The command that was refused.
    pub command: &'static str,
    /// The error's class, `GenericError` (QEMU, qapi/error.json).
    pub class: String,
    /// The error's text, for people.
    pub desc: String,
}

impl Refusal {
    /// Whether QEMU has no device of that id or path (class `DeviceNotFound`;
    /// QEMU, system/qdev-monitor.c and qom/qom-qmp-cmds.c).
    pub fn is_not_found(&self) -> bool {
        self.class == "DeviceNotFound"
    }

    /// Whether QEMU neither adds nor removes devices because it is migrating
    /// (QEMU, system/qdev-monitor.c, `qdev_device_add_from_qdict`). The class
    /// is `GenericError`, so only the text can be compared.
    pub fn is_while_migrating(&self) -> bool {
        self.desc.ends_with("not allowed while migrating")
    }
}

impl ErrorKind {
    pub(super) fn from_connect(error: io::Error, path: &Path) -> Self {
        // The kernel refuses a connection to a file that is not a socket.
        let other = || path.metadata().is_ok_and(|found| !found.file_type().is_socket());
        match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => ErrorKind::NoSocket(error),
            io::ErrorKind::ConnectionRefused if other() => ErrorKind::NotASocket,
            io::ErrorKind::ConnectionRefused => ErrorKind::NobodyListens(error),
            _ => ErrorKind::Connect(error),
        }
    }
}

/// A user as people write it: `libvirt-qemu (64055)`.
fn user_name(id: u32) -> String {
    match super::users().find(|(_, known)| *known == id) {
        Some((name, _)) => format!("user {} ({id})", escape(&name)),
        None => format!("user {id}"),
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let vm = self.vm.to_string();
        let vm = escape(&vm);
        let by_libvirt = self.vm.domain().is_some();
        match &self.kind {
            ErrorKind::NoGreeting { waited } | ErrorKind::NoReply { waited } if by_libvirt => {
                write!(
                    f,
                    "VM {vm}: no answer within {waited:?}; libvirt is stopped or waits for a password, another \
                 job holds the domain (`virsh domjobinfo` says which), or its QEMU is stopped: try again, or give it more time \
                 with --timeout"
                )
            }
            ErrorKind::Connect(_) if by_libvirt => write!(f, "VM {vm}: cannot connect to libvirt"),
            ErrorKind::NotQmp { saw } if by_libvirt => {
                write!(
                    f,
                    "VM {vm}: libvirt answers something else than it should ({})",
                    escape(saw)
                )
            }
            ErrorKind::Lost(_) if by_libvirt => {
                write!(f, "VM {vm}: the connection to libvirt was lost; try again when it is there")
            }
            ErrorKind::NoSocket(_) => write!(
                f,
                "VM {vm}: there is no such socket; start QEMU with `-qmp unix:{vm},server=on,wait=off`"
            ),
            ErrorKind::NobodyListens(_) => {
                write!(f, "VM {vm}: nobody listens on the socket; start the VM")
            }
            ErrorKind::OtherUser { wanted, found } => write!(
                f,
                "VM {vm}: a process of {} listens on the socket, and not one of {}, as the configuration \
                 wants it; it gets nothing. Check who that is, or set the VM's `user`",
                user_name(*found),
                user_name(*wanted)
            ),
            ErrorKind::NotASocket => {
                write!(f, "VM {vm}: this is not a socket; give the path of its `-qmp` socket")
            }
            ErrorKind::Connect(_) => write!(f, "VM {vm}: cannot connect to the socket"),
            ErrorKind::NoGreeting { waited } => write!(
                f,
                "VM {vm}: no greeting within {waited:?}; another client holds this monitor, or QEMU is \
                 stopped. A monitor serves one client at a time: give QEMU a second one for this tool, \
                 `-qmp unix:PATH,server=on,wait=off`"
            ),
            ErrorKind::NotQmp { saw } => write!(
                f,
                "VM {vm}: the peer does not speak QMP ({}); check that the path is that of a `-qmp` \
                 socket",
                escape(saw)
            ),
            ErrorKind::TooMuch(what) => write!(
                f,
                "VM {vm}: the peer sends {what}, which no QEMU does; check what listens there, and \
                 whether it can still be trusted"
            ),
            ErrorKind::Lost(_) => {
                write!(f, "VM {vm}: the connection was lost; check whether QEMU has ended")
            }
            ErrorKind::NoReply { waited } => write!(
                f,
                "VM {vm}: no reply within {waited:?}; QEMU is stopped or busy, try again or give it \
                 more time with --timeout"
            ),
            ErrorKind::Unusable => {
                write!(f, "VM {vm}: the session ended with an earlier error; connect again")
            }
            ErrorKind::Refused(refusal) => write!(f, "VM {vm}: {refusal}"),
            ErrorKind::Libvirt(error) => write!(f, "VM {vm}: {error}"),
            ErrorKind::Unexpected { command, .. } => {
                write!(f, "VM {vm}: `{command}` has another form than this tool knows")
            }
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match &self.kind {
            ErrorKind::NoSocket(source)
            | ErrorKind::NobodyListens(source)
            | ErrorKind::Connect(source)
            | ErrorKind::Lost(Some(source)) => Some(source),
            ErrorKind::Unexpected { source, .. } => Some(source),
            ErrorKind::Libvirt(error) => error.source(),
            _ => None,
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "QEMU refused `{}`: {}", self.command, escape(&self.desc))
    }
}
