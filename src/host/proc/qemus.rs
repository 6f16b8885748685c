//! Finds the QEMU processes of this host in `/proc` (proc(5)), whichever
//! program started them.

use std::ffi::OsStr;
use std::fs;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::fs::{Mode, OFlags, open};

use super::cmdline::CommandLine;
use crate::host::{Host, read_if_there};

/// The longest file of QEMU's options that is read, in bytes.
const MAX_CONFIG: u64 = 1 << 20;

/// A QEMU process that runs a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Qemu {
    /// The process id.
    pub pid: i32,
    /// The name of the program, `qemu-system-x86_64`.
    pub program: String,
    /// The user that it runs as: the name, or the number if there is no name.
    pub user: Option<String>,
    /// That user's number.
    pub uid: Option<u32>,
    /// Whether it is stopped (SIGSTOP). Then it answers no client.
    pub is_stopped: bool,
    /// The facts in its command line.
    pub command_line: CommandLine,
    /// Its command line.
    pub arguments: Vec<String>,
}

impl Host {
    /// The QEMU processes, by process id.
    pub fn qemus(&self) -> Vec<Qemu> {
        self.processes().into_iter().filter_map(|pid| self.qemu(pid)).collect()
    }

    /// Whether this process sees only some of the other processes in `/proc`
    /// (proc(5), `hidepid`).
    pub fn hides_processes(&self) -> bool {
        let table = read_if_there(&self.path("/proc/self/mountinfo")).ok().flatten();
        let hides = |line: &str| {
            let (mount, filesystem) = line.split_once(" - ")?;
            let is_proc = mount.split(' ').nth(4)? == "/proc" && filesystem.starts_with("proc ");
            let hides = |option: &str| {
                option.strip_prefix("hidepid=").is_some_and(|v| !matches!(v, "0" | "off"))
            };
            Some(is_proc && filesystem.split([' ', ',']).any(hides))
        };
        let hidden = table.unwrap_or_default().lines().any(|line| hides(line) == Some(true));
        hidden && !rustix::process::geteuid().is_root()
    }

    /// The QEMU with this process id. `None` if the process is not a QEMU.
    pub fn qemu(&self, pid: i32) -> Option<Qemu> {
        let directory = self.path(format!("/proc/{pid}"));
        let read = |name| read_if_there(&directory.join(name)).ok().flatten().unwrap_or_default();
        // Kernel threads and processes that have ended have no command line.
        let cmdline = read("cmdline");
        let arguments: Vec<&str> = cmdline.split_terminator('\0').collect();
        let first = arguments.first()?;
        let executable = fs::read_link(directory.join("exe")).ok();
        let program = match &executable {
            Some(path) => path.file_name().map(program_name).unwrap_or_default(),
            None => base_name(first).to_owned(),
        };
        // A program may rename itself (`-name process=`). The name can be read
        // even if the program's file may not be read.
        let by_name =
            is_qemu(&program) || (executable.is_none() && is_qemu(read("comm").trim_end()));
        if !by_name && !looks_like_qemu(&arguments) {
            return None;
        }
        let status = read("status");
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name));
        // The fields are the real, effective and saved user, and the user for
        // the filesystem.
        let uid = field("Uid:").and_then(|uids| uids.split_whitespace().nth(1));
        Some(Qemu {
            pid,
            program,
            uid: uid.and_then(|uid| uid.parse().ok()),
            user: uid.map(|uid| self.user_name(uid).unwrap_or_else(|| uid.to_owned())),
            is_stopped: field("State:").is_some_and(|state| state.trim_start().starts_with('T')),
            command_line: CommandLine::parse(arguments.iter().copied(), |path| {
                self.file_of(pid, path)
            }),
            arguments: arguments.into_iter().map(str::to_owned).collect(),
        })
    }

    /// The text of a file that a process reads at this path, if it is a regular
    /// file in the process's own mount namespace and is not too long.
    fn file_of(&self, pid: i32, path: &str) -> Option<String> {
        let process = self.path(format!("/proc/{pid}"));
        let path = fs::read_link(process.join("cwd")).ok()?.join(path);
        let path = process.join("root").join(path.strip_prefix("/").unwrap_or(&path));
        // Without O_NONBLOCK, opening a pipe would wait for a writer that may
        // never come.
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let file = fs::File::from(open(&path, flags, Mode::empty()).ok()?);
        let is_plain = file.metadata().ok()?.is_file();
        let mut text = String::new();
        let mut start = is_plain.then(|| file.take(MAX_CONFIG + 1))?;
        start.read_to_string(&mut text).ok()?;
        (start.limit() > 0).then_some(text)
    }

    /// The name of a user in the local table of users (passwd(5)).
    fn user_name(&self, uid: &str) -> Option<String> {
        let table = read_if_there(&self.path("/etc/passwd")).ok()??;
        table.lines().find_map(|line| {
            let mut fields = line.split(':');
            let name = fields.next()?;
            (fields.nth(1)? == uid).then(|| name.to_owned())
        })
    }
}

/// The name of a program's file, even if an upgrade has replaced the file.
fn program_name(name: &OsStr) -> String {
    let name = String::from_utf8_lossy(name.as_bytes());
    name.strip_suffix(" (deleted)").unwrap_or(&name).to_owned()
}

fn base_name(path: &str) -> &str {
    Path::new(path).file_name().and_then(OsStr::to_str).unwrap_or_default()
}

/// The names of QEMU's program: `qemu-system-x86_64`, Red Hat's `qemu-kvm`,
/// Proxmox VE's `kvm`, and NixOS's wrapper `.qemu-system-x86_64-wrapped`.
fn is_qemu(name: &str) -> bool {
    let name = name.trim_start_matches('.');
    name.starts_with("qemu-system-") || matches!(name, "qemu-kvm" | "kvm" | "qemu-kvm-wrapped")
}

/// Whether these are the arguments of a QEMU with another name: they have
/// monitors and a machine. A program that starts a QEMU with these arguments,
/// for example sudo, is not a QEMU.
fn looks_like_qemu(arguments: &[&str]) -> bool {
    let has = |options: &[&str]| arguments.iter().any(|argument| options.contains(argument));
    has(&["-qmp", "-qmp-pretty", "-mon", "-monitor", "-object"])
        && has(&["-machine", "-M", "-device", "-accel", "-nodefaults"])
        && !arguments.iter().any(|argument| is_qemu(base_name(argument)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    /// Creates a `/proc` with these processes: id, program, name, arguments.
    fn processes(all: &[(i32, Option<&str>, &str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (pid, exe, comm, arguments) in all {
            let directory = root.path().join(format!("proc/{pid}"));
            fs::create_dir_all(&directory).unwrap();
            let cmdline =
                if arguments.is_empty() { String::new() } else { format!("{arguments} ") };
            fs::write(directory.join("cmdline"), cmdline.replace(' ', "\0")).unwrap();
            fs::write(directory.join("comm"), format!("{comm}\n")).unwrap();
            let status = "Name:\tx\nState:\tS (sleeping)\nUid:\t0\t64055\t0\t0\n";
            fs::write(directory.join("status"), status).unwrap();
            if let Some(exe) = exe {
                symlink(exe, directory.join("exe")).unwrap();
            }
        }
        fs::create_dir_all(root.path().join("etc")).unwrap();
        fs::write(root.path().join("etc/passwd"), "root:x:0:0::/:\nqemu:x:64055:1::/:\n").unwrap();
        root
    }

    #[test]
    fn qemus_are_known_by_whatever_name() {
        let root = processes(&[
            (1, Some("/usr/bin/qemu-system-x86_64"), "qemu-system-x86", "qemu-system-x86_64 -S"),
            (2, Some("/usr/bin/kvm"), "kvm", "/usr/bin/kvm -id 100"),
            (3, Some("/usr/libexec/qemu-kvm (deleted)"), "qemu-kvm", "qemu-kvm -S"),
            // These have renamed themselves with -name process=. One belongs to
            // the same user, one to another user.
            (4, Some("/opt/bin/qemu-system-arm"), "ubuntu", "qemu-system-arm -name process=ubuntu"),
            (5, None, "ubuntu", "/usr/bin/qemu-system-arm -name process=ubuntu"),
            (6, None, "qemu-system-x86", "vm"),
            (7, Some("/opt/my-vmm"), "my-vmm", "my-vmm -qmp unix:/a,server=on -machine q35"),
            (8, Some("/opt/vmm"), "vmm", "vmm -object monitor-qmp,id=q,chardev=m -machine q35"),
            // These run no VM.
            (
                20,
                Some("/usr/bin/sudo"),
                "sudo",
                "sudo qemu-system-x86_64 -qmp unix:/a -machine q35",
            ),
            (21, Some("/bin/sh"), "kvm", "/bin/sh /usr/local/bin/kvm -qmp unix:/a -M q35"),
            (22, None, "kvm-nx-lpage-re", ""),
            (23, Some("/usr/bin/qemu-img"), "qemu-img", "qemu-img convert a b"),
            (24, Some("/usr/bin/grep"), "grep", "grep -device kvm"),
        ]);
        let qemus = Host::at(root.path()).qemus();
        let pids: Vec<i32> = qemus.iter().map(|qemu| qemu.pid).collect();
        assert_eq!(pids, [1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(qemus[2].program, "qemu-kvm");
        assert_eq!(qemus[0].user.as_deref(), Some("qemu"));
        assert!(!qemus[0].is_stopped);
    }
}
