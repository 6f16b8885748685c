//! Notices that a VM starts: its socket appears, or the file with the process id
//! of a libvirt domain, which is as good as a socket here. inotify(7) watches the
//! socket's directory, or as long as there is none, the nearest one above. It
//! does not tell that something is mounted over a directory; the kernel's list
//! of mounts does.

use std::collections::{BTreeSet, HashMap};
use std::ffi::OsStr;
use std::fs::File;
use std::future::pending;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use rustix::io::Errno;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tracing::{debug, warn};

use crate::host::readable::{readable, urgent};
use crate::text::escape;

/// The sockets of the configured VMs.
#[derive(Debug)]
pub struct Sockets {
    inotify: AsyncFd<OwnedFd>,
    /// Told of mounts, where there is a /proc.
    mounts: Option<AsyncFd<OwnedFd>>,
    /// The VMs' names and sockets.
    targets: Vec<(String, PathBuf)>,
    /// The watched directories, by inotify's number for them, each by all the
    /// paths that lead there (`/run` and `/var/run`).
    directories: Directories,
    /// The directories that cannot be watched, as was told.
    told: BTreeSet<PathBuf>,
}

/// What is watched for a socket.
#[derive(PartialEq, Eq)]
enum Watched {
    /// No more than a directory above the socket's own, which is not there.
    Above,
    /// The socket's directory, as before.
    Still,
    /// The socket's directory, which came, or had something mounted over it.
    Newly,
}

type Directories = HashMap<i32, BTreeSet<PathBuf>>;

/// An entry of a directory that changed; without a name, the directory itself.
type Change = (PathBuf, Option<PathBuf>);

impl Sockets {
    /// Watches for nothing yet.
    ///
    /// # Errors
    ///
    /// When the kernel gives no inotify instance.
    pub fn new() -> io::Result<Self> {
        let inotify = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        let inotify = readable(inotify)?;
        let mounts = File::open("/proc/self/mountinfo")
            .and_then(|mounts| urgent(mounts.into()))
            .inspect_err(|error| debug!("mounts will not be noticed: {error}"))
            .ok();
        let (targets, directories) = (Vec::new(), HashMap::new());
        Ok(Sockets { inotify, mounts, targets, directories, told: BTreeSet::new() })
    }

    /// Watches for the sockets of these VMs instead. What appeared before and
    /// was not asked for yet is not forgotten.
    pub fn watch(&mut self, targets: Vec<(String, PathBuf)>) {
        self.targets = targets;
        self.told.clear();
        let before = std::mem::take(&mut self.directories);
        for index in 0..self.targets.len() {
            self.arm(index);
        }
        for (number, paths) in before {
            if !self.directories.contains_key(&number)
                && inotify::remove_watch(&self.inotify, number).is_err()
            {
                debug!("{paths:?} was not watched any more");
            }
        }
    }

    /// The names of VMs whose sockets appeared, as soon as one does.
    ///
    /// # Errors
    ///
    /// When inotify cannot be read.
    pub async fn appeared(&mut self) -> io::Result<Vec<String>> {
        loop {
            let names = tokio::select! {
                ready = self.inotify.readable() => {
                    let directories = &mut self.directories;
                    let read = ready?.try_io(|inotify| read(inotify.get_ref(), directories));
                    let Ok(changes) = read else { continue };
                    self.concerned(&changes?)
                }
                () = mounted(self.mounts.as_ref()) => self.uncovered(),
            };
            if !names.is_empty() {
                return Ok(names);
            }
        }
    }

    /// The VMs that changes mean something for, their watches moved to where
    /// their sockets can now appear.
    fn concerned(&mut self, changes: &[Change]) -> Vec<String> {
        let mut names = Vec::new();
        for index in 0..self.targets.len() {
            let Some((name, socket)) = self.targets.get(index).cloned() else { continue };
            let concerns = |(directory, entry): &&Change| match entry {
                Some(entry) => socket.starts_with(directory.join(entry)),
                None => socket.starts_with(directory),
            };
            let mut concerning = changes.iter().filter(concerns).peekable();
            if concerning.peek().is_none() {
                continue;
            }
            let mut is_socket = false;
            for (directory, entry) in concerning {
                is_socket |= entry.as_ref().is_some_and(|entry| directory.join(entry) == socket);
            }
            // A directory that came may hold the socket already.
            if is_socket || (self.arm(index) != Watched::Above && socket.exists()) {
                names.push(name);
            }
        }
        names
    }

    /// The VMs whose sockets are in a directory that was mounted, or unmounted,
    /// where another one is watched.
    fn uncovered(&mut self) -> Vec<String> {
        let mut names = Vec::new();
        for index in 0..self.targets.len() {
            let is_new = self.arm(index) == Watched::Newly;
            let target = self.targets.get(index).filter(|(_, socket)| is_new && socket.exists());
            names.extend(target.map(|(name, _)| name.clone()));
        }
        names
    }

    /// Watches the nearest directory of a socket's that there is.
    fn arm(&mut self, index: usize) -> Watched {
        let Some((name, socket)) = self.targets.get(index) else { return Watched::Above };
        let flags = WatchFlags::CREATE
            | WatchFlags::MOVED_TO
            | WatchFlags::DELETE_SELF
            | WatchFlags::MOVE_SELF
            | WatchFlags::ONLYDIR;
        let above: Vec<&Path> = socket.ancestors().skip(1).collect();
        let mut armed = None;
        // Again, if a nearer one came into being meanwhile.
        loop {
            let added = above.iter().enumerate().find_map(|(distance, directory)| {
                match inotify::add_watch(&self.inotify, *directory, flags) {
                    Ok(number) => return Some((distance, number, *directory)),
                    // It is yet to come.
                    Err(Errno::NOENT | Errno::NOTDIR) => {}
                    Err(error) if self.told.insert((*directory).to_owned()) => {
                        let directory = directory.to_string_lossy();
                        warn!(
                            vm = name,
                            "{name}: its start will not be noticed: cannot watch {}: {error}; {}",
                            escape(&directory),
                            advice(error)
                        );
                    }
                    Err(_) => {}
                }
                None
            });
            let Some((distance, number, directory)) = added else {
                let socket = socket.to_string_lossy();
                debug!(vm = name, "cannot watch for the socket {}", escape(&socket));
                return Watched::Above;
            };
            let paths = self.directories.entry(number).or_default();
            let is_new = paths.insert(directory.to_owned());
            match distance {
                0 if is_new => return Watched::Newly,
                0 => return Watched::Still,
                _ if armed == Some(distance) => return Watched::Above,
                _ => {}
            }
            armed = Some(distance);
        }
    }
}

/// What to do about a directory that cannot be watched.
fn advice(error: Errno) -> &'static str {
    match error {
        Errno::ACCESS | Errno::PERM => "this user must be allowed to read that directory",
        Errno::NOSPC => "raise fs.inotify.max_user_watches (sysctl)",
        _ => "after each start, run `usb-qmp-hotplug sync`",
    }
}

/// Waits until something is mounted or unmounted (proc(5),
/// `/proc/pid/mountinfo`: poll(2) tells it as a priority event).
async fn mounted(mounts: Option<&AsyncFd<OwnedFd>>) {
    match mounts {
        Some(mounts) => match mounts.ready(Interest::PRIORITY).await {
            Ok(mut ready) => ready.clear_ready(),
            Err(_) => pending().await,
        },
        None => pending().await,
    }
}

/// Reads all there is to read. What got lost concerns everybody.
fn read(inotify: &OwnedFd, directories: &mut Directories) -> io::Result<Vec<Change>> {
    let mut space = [MaybeUninit::uninit(); 4096];
    let mut reader = inotify::Reader::new(inotify, &mut space);
    let mut changes = Vec::new();
    loop {
        let event = match reader.next() {
            Ok(event) => event,
            Err(Errno::AGAIN) if !changes.is_empty() => return Ok(changes),
            Err(error) => return Err(error.into()),
        };
        if event.events().contains(ReadFlags::QUEUE_OVERFLOW) {
            changes.push((PathBuf::from("/"), None));
        }
        let Some(paths) = directories.get(&event.wd()) else { continue };
        let name = event.file_name().map(|name| PathBuf::from(OsStr::from_bytes(name.to_bytes())));
        changes.extend(paths.iter().map(|directory| (directory.clone(), name.clone())));
        // The directory is gone, and its number comes round again.
        if event.events().contains(ReadFlags::IGNORED) {
            directories.remove(&event.wd());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::time::Duration;

    async fn appeared(sockets: &mut Sockets) -> Vec<String> {
        tokio::time::timeout(Duration::from_secs(10), sockets.appeared()).await.unwrap().unwrap()
    }

    fn watching(targets: Vec<(String, PathBuf)>) -> Sockets {
        let mut sockets = Sockets::new().unwrap();
        sockets.watch(targets);
        sockets
    }

    #[tokio::test]
    async fn a_socket_that_appears_is_noticed_however_often() {
        let root = tempfile::tempdir().unwrap();
        let socket = root.path().join("a.qmp");
        let other = root.path().join("b.qmp");
        let targets = vec![("a".into(), socket.clone()), ("b".into(), other)];
        let mut sockets = watching(targets);
        for _ in 0..3 {
            fs::write(&socket, "").unwrap();
            assert_eq!(appeared(&mut sockets).await, ["a"]);
            fs::remove_file(&socket).unwrap();
        }
        fs::write(root.path().join("new"), "").unwrap();
        fs::rename(root.path().join("new"), &socket).unwrap();
        assert_eq!(appeared(&mut sockets).await, ["a"]);
    }

    #[tokio::test]
    async fn directories_may_come_later_and_go_again() {
        let root = tempfile::tempdir().unwrap();
        let directory = root.path().join("run/vm");
        let socket = directory.join("a.qmp");
        let mut sockets = watching(vec![("a".into(), socket.clone())]);
        for _ in 0..3 {
            fs::create_dir_all(&directory).unwrap();
            fs::write(&socket, "").unwrap();
            assert_eq!(appeared(&mut sockets).await, ["a"]);
            fs::remove_dir_all(root.path().join("run")).unwrap();
        }
        assert!(sockets.directories.len() <= 3, "{:?}", sockets.directories);
    }

    #[tokio::test]
    async fn two_paths_may_lead_to_one_directory() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("run")).unwrap();
        std::os::unix::fs::symlink("run", root.path().join("other")).unwrap();
        let targets = ["run", "other"].map(|d| (d.to_owned(), root.path().join(d).join(d)));
        let mut sockets = watching(targets.to_vec());
        for (name, socket) in targets {
            fs::write(socket, "").unwrap();
            assert_eq!(appeared(&mut sockets).await, [name]);
        }
    }

    #[tokio::test]
    async fn what_appears_while_the_targets_change_is_noticed() {
        let root = tempfile::tempdir().unwrap();
        let socket = |name: &str| root.path().join(name).join("qmp");
        fs::create_dir(root.path().join("a")).unwrap();
        fs::create_dir(root.path().join("b")).unwrap();
        let mut sockets = watching(vec![("a".into(), socket("a"))]);
        fs::write(socket("a"), "").unwrap();
        sockets.watch(vec![("a".into(), socket("a")), ("b".into(), socket("b"))]);
        assert_eq!(appeared(&mut sockets).await, ["a"]);
        sockets.watch(vec![("b".into(), socket("b"))]);
        fs::write(root.path().join("a/other"), "").unwrap();
        fs::write(socket("b"), "").unwrap();
        assert_eq!(appeared(&mut sockets).await, ["b"]);
        assert_eq!(sockets.directories.len(), 1);
    }
}
