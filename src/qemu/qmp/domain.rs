//! A domain of libvirt: its name, and the sockets and files of its libvirt.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::PathBuf;
use std::str::FromStr;

use rustix::io::Errno;
use rustix::process::{Pid, test_kill_process};

use crate::text::escape;

/// The longest name of a domain, in bytes. It is the longest name of a file
/// without `.pid` and the other text that libvirt adds.
const MAX_NAME: usize = 240;

/// The largest table of users that is read, in bytes.
const MAX_USERS: u64 = 1 << 20;

/// A domain of libvirt. Its text is the part of an address after `libvirt:`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Domain {
    name: String,
    of: Owner,
}

/// The owner of the libvirt that the domain belongs to.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Owner {
    /// The system, `qemu:///system`.
    System,
    /// The user who runs this program, `qemu:///session`.
    Caller,
    /// Another user, by name or number. Only root can use it.
    User(String),
}

/// The error for a text that names no domain.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`libvirt:{}` names no domain; write `libvirt:NAME`, `libvirt:session/NAME` for a VM of your \
     own, or as root `libvirt:USER@session/NAME`",
    escape(.0)
)]
pub struct NotADomain(String);

impl Domain {
    /// A domain of the system's libvirt. `None` if the text cannot be a
    /// domain's name.
    pub fn of_system(name: &str) -> Option<Self> {
        is_name(name).then(|| Domain { name: name.to_owned(), of: Owner::System })
    }

    /// A domain of a user's own libvirt. The user is the caller, or is given by
    /// name or number.
    pub fn of_session(name: &str, user: Option<&str>) -> Option<Self> {
        let of = match user {
            None => Owner::Caller,
            Some(user) if is_user(user) => Owner::User(user.to_owned()),
            Some(_) => return None,
        };
        is_name(name).then(|| Domain { name: name.to_owned(), of })
    }

    /// The same domain, written so that it means the same for every user.
    pub fn of_user(self) -> Self {
        let Owner::Caller = self.of else { return self };
        let uid = rustix::process::geteuid().as_raw();
        let name = users().find(|(_, number)| *number == uid).map(|(name, _)| name);
        Domain { of: Owner::User(name.unwrap_or_else(|| uid.to_string())), ..self }
    }

    /// Its name in libvirt.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The URI of its libvirt (libvirt, docs/drvqemu.rst).
    pub fn uri(&self) -> &'static str {
        match self.of {
            Owner::System => "qemu:///system",
            Owner::Caller | Owner::User(_) => "qemu:///session",
        }
    }

    /// The number of the user whose libvirt it is. `None` for a name that is
    /// not in the local table of users (passwd(5)).
    pub(super) fn uid(&self) -> Option<u32> {
        match &self.of {
            Owner::System => Some(0),
            Owner::Caller => Some(rustix::process::geteuid().as_raw()),
            Owner::User(user) => user_id(user),
        }
    }

    /// The sockets of libvirt: first that of virtqemud, then that of libvirtd
    /// (libvirt, docs/daemons.rst).
    pub(super) fn sockets(&self) -> [PathBuf; 2] {
        let directory = self.directory();
        ["virtqemud-sock", "libvirt-sock"].map(|name| directory.join(name))
    }

    /// The file with the process id of its QEMU. It exists while the domain
    /// runs (libvirt, src/qemu/qemu_conf.c, `stateDir`).
    pub fn pid_file(&self) -> PathBuf {
        let state = match self.of {
            Owner::System => "qemu",
            Owner::Caller | Owner::User(_) => "qemu/run",
        };
        self.directory().join(state).join(format!("{}.pid", self.name))
    }

    /// The process id of its QEMU, as far as this user may see it.
    pub fn pid(&self) -> Option<i32> {
        let mut text = String::new();
        File::open(self.pid_file()).ok()?.take(32).read_to_string(&mut text).ok()?;
        text.trim().parse().ok().filter(|pid| *pid > 0)
    }

    /// Whether its libvirt may ask this user for a password, possibly in a
    /// window. root and the group `libvirt` need none (libvirt, docs/auth.rst).
    pub fn asks_for_password(&self) -> bool {
        let is_root = rustix::process::geteuid().is_root();
        self.of == Owner::System && !is_root && !is_in_group_libvirt()
    }

    /// Whether the process of its QEMU exists, as far as this user may see it.
    pub(super) fn runs(&self) -> bool {
        let process = self.pid().and_then(Pid::from_raw);
        // A process of another user exists, although it may not be signalled.
        process.is_some_and(|pid| !matches!(test_kill_process(pid), Err(Errno::SRCH)))
    }

    fn directory(&self) -> PathBuf {
        let run = match self.of {
            Owner::System => return PathBuf::from("/run/libvirt"),
            Owner::Caller => std::env::var_os("XDG_RUNTIME_DIR").filter(|dir| !dir.is_empty()),
            Owner::User(_) => None,
        };
        // This is where systemd-logind creates it. A user without a number has
        // none.
        let of_user = || match self.uid() {
            Some(uid) => PathBuf::from(format!("/run/user/{uid}")),
            None => PathBuf::from("/run/user/unknown"),
        };
        run.map_or_else(of_user, PathBuf::from).join("libvirt")
    }
}

/// libvirt allows any name without a `/` (libvirt, src/conf/domain_conf.c).
/// This tool does not accept names that cannot be shown.
fn is_name(name: &str) -> bool {
    let fits = (1..=MAX_NAME).contains(&name.len()) && escape(name) == name;
    fits && !name.contains('/') && !matches!(name, "." | "..")
}

fn is_user(user: &str) -> bool {
    !user.is_empty() && !user.contains([':', '/']) && escape(user) == user
}

fn is_in_group_libvirt() -> bool {
    let mut own: Vec<u32> =
        rustix::process::getgroups().unwrap_or_default().into_iter().map(|g| g.as_raw()).collect();
    own.push(rustix::process::getegid().as_raw());
    numbers("/etc/group").any(|(name, gid)| name == "libvirt" && own.contains(&gid))
}

/// The id of a user, given by name or number. `None` for a name that is not in
/// the local table of users (passwd(5)).
pub fn user_id(user: &str) -> Option<u32> {
    let by_name = || users().find(|(name, _)| name == user).map(|(_, id)| id);
    user.parse().ok().or_else(by_name)
}

/// The local users and their numbers (passwd(5)).
pub(super) fn users() -> impl Iterator<Item = (String, u32)> {
    numbers("/etc/passwd")
}

/// The names in a table, each with the number in its third field.
fn numbers(table: &str) -> impl Iterator<Item = (String, u32)> + use<> {
    let file = table;
    let mut table = Vec::new();
    // A table that cannot be read has no users.
    let _ = File::open(file).and_then(|file| file.take(MAX_USERS).read_to_end(&mut table));
    let table = String::from_utf8_lossy(&table).into_owned();
    let user = |line: &str| {
        let mut fields = line.split(':');
        Some((fields.next()?.to_owned(), fields.nth(1)?.parse().ok()?))
    };
    table.lines().filter_map(user).collect::<Vec<_>>().into_iter()
}

impl FromStr for Domain {
    type Err = NotADomain;

    fn from_str(text: &str) -> Result<Self, NotADomain> {
        let domain = match text.split_once('/') {
            None => Domain::of_system(text),
            Some(("session", name)) => Domain::of_session(name, None),
            Some((whose, name)) => match whose.strip_suffix("@session") {
                Some(user) => Domain::of_session(name, Some(user)),
                None => None,
            },
        };
        domain.ok_or_else(|| NotADomain(text.to_owned()))
    }
}

impl fmt::Display for Domain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.of {
            Owner::System => f.write_str(&self.name),
            Owner::Caller => write!(f, "session/{}", self.name),
            Owner::User(user) => write!(f, "{user}@session/{}", self.name),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::path::Path;

    #[test]
    fn a_domain_is_read_as_it_is_written() {
        for (text, uri, pid_file) in [
            ("win11", "qemu:///system", "/run/libvirt/qemu/win11.pid"),
            ("a b_1.2", "qemu:///system", "/run/libvirt/qemu/a b_1.2.pid"),
            ("1000@session/x", "qemu:///session", "/run/user/1000/libvirt/qemu/run/x.pid"),
            ("root@session/x", "qemu:///session", "/run/user/0/libvirt/qemu/run/x.pid"),
        ] {
            let domain: Domain = text.parse().unwrap();
            assert_eq!(domain.to_string(), text);
            assert_eq!(domain.uri(), uri);
            assert_eq!(domain.pid_file(), Path::new(pid_file));
        }
        let own: Domain = "session/x".parse().unwrap();
        assert_eq!(own.uid(), Some(rustix::process::geteuid().as_raw()));
    }

    #[test]
    fn a_user_that_is_not_known_leads_nowhere() {
        let domain: Domain = "nobody-here@session/x".parse().unwrap();
        assert_eq!(domain.uid(), None);
        assert_eq!(domain.pid(), None);
    }

    #[test]
    fn what_is_no_domain_says_so() {
        let long = "x".repeat(300);
        for text in [
            "",
            "session/",
            "a/b",
            "@session/x",
            "x@session/",
            ".",
            "..",
            "a\nb",
            "session/a/b",
            &long,
        ] {
            assert!(text.parse::<Domain>().is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn no_text_panics_or_changes(text in "(session/|@session/|\\PC|\n){0,30}") {
            if let Ok(domain) = text.parse::<Domain>() {
                prop_assert_eq!(domain.to_string(), text);
            }
        }
    }
}
