//! The Unix sockets of a QEMU's monitors: how this process can reach them, and
//! which clients are connected. Nothing is connected for that.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::net::netlink::{SOCK_DIAG, SocketAddrNetlink};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

use super::cmdline::Endpoint;
use super::{Holder, Qemu};
use crate::host::{Host, read_if_there};

/// How this process can reach a socket of another process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reach {
    /// It has this path here.
    Here(PathBuf),
    /// It is in the mount namespace of the other process, and this path through
    /// `/proc` leads to it.
    Elsewhere(PathBuf),
    /// Its path is relative to a directory that this process may not see.
    Hidden,
}

/// The Unix sockets of a network namespace, as `/proc/net/unix` lists them.
#[derive(Debug, Clone, Default)]
pub struct UnixSockets(Vec<Row>);

#[derive(Debug, Clone, PartialEq, Eq)]
struct Row {
    inode: u64,
    is_connected: bool,
    is_listening: bool,
    path: String,
}

impl UnixSockets {
    /// Reads the table: address, references, protocol, flags, type, state,
    /// inode, and the path if there is one (Linux, net/unix/af_unix.c,
    /// `unix_seq_show`).
    fn parse(text: &str) -> Self {
        let row = |line: &str| {
            let mut path = line;
            let mut fields = [""; 7];
            // Fields are padded with blanks, and the path may contain blanks,
            // too.
            for field in &mut fields {
                let start = path.trim_start_matches(' ');
                (*field, path) = start.split_once(' ').unwrap_or((start, ""));
            }
            let [_, _, _, flags, _, state, inode] = fields;
            // SS_CONNECTED (Linux, include/uapi/linux/net.h) means connected.
            let is_connected = state == "03";
            // __SO_ACCEPTCON (Linux, include/uapi/linux/net.h) means listening.
            let is_listening = u32::from_str_radix(flags, 16).ok()? & 0x1_0000 != 0;
            let (inode, path) = (inode.parse().ok()?, path.to_owned());
            Some(Row { inode, is_connected, is_listening, path })
        };
        UnixSockets(text.lines().skip(1).filter_map(row).collect())
    }

    /// The connections that a server at this path has accepted. A connection
    /// that still waits in the queue has no inode yet.
    fn accepted(&self, path: &str) -> impl Iterator<Item = u64> {
        let rows = self.0.iter().filter(move |row| row.is_connected && row.path == path);
        rows.map(|row| row.inode).filter(|inode| *inode > 0)
    }

    /// The sockets that a process listens on: inode and path.
    fn listening(&self) -> impl Iterator<Item = (u64, &str)> {
        let rows = self.0.iter().filter(|row| row.is_listening && row.path.starts_with('/'));
        rows.map(|row| (row.inode, row.path.as_str()))
    }

    /// The path of the socket with this inode.
    pub fn path(&self, inode: u64) -> Option<&str> {
        let row = self.0.iter().find(|row| row.inode == inode)?;
        (!row.path.is_empty()).then_some(row.path.as_str())
    }
}

impl Host {
    /// The Unix sockets that this process and another process see. A connection
    /// is listed where its client is, and that may be another network
    /// namespace.
    pub fn unix_sockets(&self, pid: i32) -> UnixSockets {
        let tables = ["/proc/net/unix".to_owned(), format!("/proc/{pid}/net/unix")];
        let texts = tables.iter().filter_map(|table| read_if_there(&self.path(table)).ok()?);
        let mut rows: Vec<Row> = texts.flat_map(|text| UnixSockets::parse(&text).0).collect();
        rows.sort_by(|a, b| (a.inode, &a.path).cmp(&(b.inode, &b.path)));
        rows.dedup();
        UnixSockets(rows)
    }

    /// The sockets that a process has open: their inodes, by descriptor. `None`
    /// if this process may not see them.
    pub fn open_sockets(&self, pid: i32) -> Option<BTreeMap<u32, u64>> {
        let descriptors = fs::read_dir(self.path(format!("/proc/{pid}/fd"))).ok()?;
        let socket = |entry: fs::DirEntry| {
            let number = entry.file_name().to_str()?.parse().ok()?;
            Some((number, socket_inode(&fs::read_link(entry.path()).ok()?)?))
        };
        Some(descriptors.flatten().filter_map(socket).collect())
    }

    /// The monitors of a QEMU: first those of its command line, then the other
    /// sockets that it listens on. A monitor that was added while the QEMU runs
    /// is one of the latter.
    pub fn monitors(&self, qemu: &Qemu) -> Vec<Endpoint> {
        let line = &qemu.command_line;
        let mut monitors = line.monitors.clone();
        // libvirt itself adds and removes other sockets, and it gives access to
        // the monitor.
        let open = match line.libvirts {
            Some(_) => BTreeMap::new(),
            None => self.open_sockets(qemu.pid).unwrap_or_default(),
        };
        if open.is_empty() {
            return monitors;
        }
        let known = |path: &str| {
            // In the command line, a comma in a path is written twice.
            let is_in = |argument: &String| argument.replace(",,", ",").contains(path);
            let is_its = |at: &Endpoint| *at == Endpoint::Unix(path.to_owned());
            qemu.arguments.iter().any(is_in) || line.chardevs.iter().any(is_its)
        };
        let given = |inode: u64| {
            let number = open.iter().find(|(_, i)| **i == inode).map(|(number, _)| *number);
            let is_it = |at: &Endpoint| matches!(at, Endpoint::Descriptor(n) if Some(*n) == number);
            line.chardevs.iter().chain(&line.monitors).any(is_it)
        };
        let sockets = self.unix_sockets(qemu.pid);
        let own = sockets.listening().filter(|(inode, _)| open.values().any(|i| i == inode));
        let unknown = own.filter(|(inode, path)| !known(path) && !given(*inode));
        monitors.extend(unknown.map(|(_, path)| Endpoint::Listening(path.to_owned())));
        monitors
    }

    /// The clients that are connected to the monitor of a QEMU at this path, as
    /// far as the processes can be seen. The path is in QEMU's words. `None` if
    /// no client is known.
    pub fn clients(&self, pid: i32, path: &str) -> Option<Vec<Holder>> {
        let open = self.open_sockets(pid);
        // If QEMU's descriptors cannot be read, a relative path may belong to
        // another VM.
        if open.is_none() && !path.starts_with('/') {
            return None;
        }
        let is_its =
            |inode: &u64| open.as_ref().is_none_or(|open| open.values().any(|i| i == inode));
        let sockets = self.unix_sockets(pid);
        let accepted: Vec<u64> = sockets.accepted(path).filter(is_its).collect();
        if accepted.is_empty() {
            return None;
        }
        let peers: Vec<u64> = accepted.into_iter().filter_map(peer).collect();
        let has_one = |client: &i32| {
            self.open_sockets(*client).is_some_and(|o| o.values().any(|i| peers.contains(i)))
        };
        let mut clients = if peers.is_empty() { Vec::new() } else { self.processes() };
        clients.retain(has_one);
        Some(clients.into_iter().map(|client| self.holder(client)).collect())
    }

    /// How this process can reach a socket that another process has at `path`.
    pub fn reach(&self, pid: i32, path: &str) -> Reach {
        let process = self.path(format!("/proc/{pid}"));
        let path = match fs::read_link(process.join("cwd")) {
            Ok(directory) => directory.join(path),
            Err(_) if path.starts_with('/') => PathBuf::from(path),
            Err(_) => return Reach::Hidden,
        };
        let here = self.path(&path);
        let elsewhere = process.join("root").join(path.strip_prefix("/").unwrap_or(&path));
        let file = |path: &Path| fs::metadata(path).map(|file| (file.dev(), file.ino()));
        match (file(&elsewhere), file(&here)) {
            (Ok(its), Ok(ours)) if its == ours => Reach::Here(here),
            (Ok(_), _) => Reach::Elsewhere(elsewhere),
            (Err(_), _) => Reach::Here(here),
        }
    }
}

/// `socket:[12345]`
fn socket_inode(link: &Path) -> Option<u64> {
    link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
}

/// The inode of the other end of a connected socket, if the kernel tells it.
fn peer(inode: u64) -> Option<u64> {
    let inode = u32::try_from(inode).ok()?;
    let answer = ask_kernel(&request(inode)).ok()?;
    peer_in(&answer, inode).map(u64::from)
}

/// A request for one socket and its peer (sock_diag(7)). It has a header and
/// then a `unix_diag_req` for any cookie.
fn request(inode: u32) -> Vec<u8> {
    const SOCK_DIAG_BY_FAMILY: u16 = 20;
    const NLM_F_REQUEST: u16 = 1;
    const UDIAG_SHOW_PEER: u32 = 4;
    const AF_UNIX: u8 = 1;
    let any = u32::MAX;
    let mut body = vec![AF_UNIX, 0, 0, 0];
    for word in [any, inode, UDIAG_SHOW_PEER, any, any] {
        body.extend(word.to_ne_bytes());
    }
    let length = u32::try_from(body.len() + 16).unwrap_or_default();
    let mut message = length.to_ne_bytes().to_vec();
    message.extend(SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    message.extend(NLM_F_REQUEST.to_ne_bytes());
    message.extend([0; 8]);
    message.extend(body);
    message
}

/// Sends the request and reads the answer. The kernel answers while the request
/// is sent, or not at all.
fn ask_kernel(request: &[u8]) -> io::Result<Vec<u8>> {
    let (family, kind) = (AddressFamily::NETLINK, SocketType::DGRAM);
    let socket = rustix::net::socket_with(family, kind, SocketFlags::CLOEXEC, Some(SOCK_DIAG))?;
    let kernel = SocketAddrNetlink::new(0, 0);
    rustix::net::sendto(&socket, request, SendFlags::empty(), &kernel)?;
    let mut answer = vec![0; 4096];
    let (length, _) = rustix::net::recv(&socket, answer.as_mut_slice(), RecvFlags::DONTWAIT)?;
    answer.truncate(length);
    Ok(answer)
}

/// Reads the answer: a header of 16 bytes, a `unix_diag_msg` of 16 bytes, and
/// attributes, each with its length and type (sock_diag(7), `UNIX_DIAG_PEER`).
fn peer_in(answer: &[u8], inode: u32) -> Option<u32> {
    const UNIX_DIAG_PEER: u16 = 2;
    let word = |bytes: &[u8], at: usize| {
        Some(u32::from_ne_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
    };
    if word(answer, 20)? != inode {
        return None;
    }
    let mut attributes = answer.get(32..)?;
    loop {
        let length = u16::from_ne_bytes(attributes.get(..2)?.try_into().ok()?);
        let kind = u16::from_ne_bytes(attributes.get(2..4)?.try_into().ok()?);
        if kind == UNIX_DIAG_PEER {
            return word(attributes, 4);
        }
        attributes = attributes.get(usize::from(length).max(4).next_multiple_of(4)..)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::proc::cmdline::CommandLine;
    use proptest::prelude::*;
    use std::os::unix::net::{UnixListener, UnixStream};

    const TABLE: &str = "\
Num       RefCount Protocol Flags    Type St Inode Path
00000000434d82f8: 00000002 00000000 00010000 0001 01 130674 /run/a.qmp
00000000bf4deaf7: 00000003 00000000 00000000 0001 03 129617 /run/a.qmp
00000000bf4deaf8: 00000002 00000000 00000000 0001 02     0 /run/b.qmp
00000000daa719aa: 00000003 00000000 00000000 0001 03 129611
000000009b5f0764: 00000003 00000000 00000000 0001 03  1660 /run/with a blank
garbage
";

    #[test]
    fn an_accepted_connection_is_told_from_one_that_waits() {
        let sockets = UnixSockets::parse(TABLE);
        let accepted = |path| sockets.accepted(path).collect::<Vec<u64>>();
        assert_eq!(accepted("/run/a.qmp"), [129617]);
        assert_eq!(accepted("/run/b.qmp"), [0; 0]);
        assert_eq!(accepted("/run/with a blank"), [1660]);
        assert_eq!(sockets.path(130674), Some("/run/a.qmp"));
        assert_eq!(sockets.listening().collect::<Vec<_>>(), [(130674, "/run/a.qmp")]);
        assert_eq!(sockets.path(129611), None);
    }

    #[test]
    fn a_client_is_known_as_long_as_it_is_connected() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.qmp");
        let listener = UnixListener::bind(&path).unwrap();
        let (host, own) = (Host::default(), i32::try_from(std::process::id()).unwrap());
        let clients = || host.clients(own, path.to_str().unwrap());
        assert_eq!(clients(), None);
        let client = UnixStream::connect(&path).unwrap();
        assert_eq!(clients(), None, "it waits");
        let server = listener.accept().unwrap();
        // If the kernel has no sock_diag for Unix sockets, the clients have no
        // names.
        let known = clients().unwrap();
        assert!(known.iter().all(|holder| holder.pid == own), "{known:?}");
        drop((client, server));
        assert_eq!(clients(), None);
    }

    #[test]
    fn a_socket_that_no_command_line_names_may_be_a_monitor() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("added,later.qmp");
        let _listener = UnixListener::bind(&path).unwrap();
        let path = path.to_str().unwrap().to_owned();
        let monitors = |arguments: &[String], command_line: CommandLine| {
            let pid = i32::try_from(std::process::id()).unwrap();
            let (program, arguments) = (String::new(), arguments.to_vec());
            let qemu = Qemu {
                pid,
                program,
                user: None,
                uid: None,
                is_stopped: false,
                command_line,
                arguments,
            };
            Host::default().monitors(&qemu)
        };
        let found = Endpoint::Listening(path.clone());
        assert!(monitors(&[], CommandLine::default()).contains(&found));
        let named = format!("unix:{},server=on", path.replace(',', ",,"));
        assert!(!monitors(&["-serial".into(), named], CommandLine::default()).contains(&found));
        let chardevs = vec![Endpoint::Unix(path)];
        let in_a_file = CommandLine { chardevs, ..CommandLine::default() };
        assert!(!monitors(&[], in_a_file).contains(&found));
        let libvirts = Some(Endpoint::Descriptor(23));
        let of_libvirt = CommandLine { libvirts, ..CommandLine::default() };
        assert_eq!(monitors(&[], of_libvirt), []);
    }

    #[test]
    fn a_relative_path_is_one_of_the_other_process() {
        let host = Host::default();
        let own = i32::try_from(std::process::id()).unwrap();
        let file = std::env::current_dir().unwrap().join("Cargo.toml");
        assert_eq!(host.reach(own, "Cargo.toml"), Reach::Here(file.clone()));
        assert_eq!(host.reach(own, file.to_str().unwrap()), Reach::Here(file));
        assert_eq!(host.reach(0, "Cargo.toml"), Reach::Hidden);
    }

    proptest! {
        #[test]
        fn no_table_panics(text in "(Num|[0-9a-f]{1,4}| |:|\n|\\PC){0,80}") {
            let _ = UnixSockets::parse(&text);
        }

        #[test]
        fn no_answer_panics(bytes in proptest::collection::vec(any::<u8>(), 0..80)) {
            let _ = peer_in(&bytes, 0);
        }
    }
}
