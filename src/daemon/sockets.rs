//! Notices that a VM starts, because its socket appears. inotify(7) watches
//! each directory on the path to the socket: the socket's own directory or, if
//! it does not exist, the nearest existing directory above it; and the
//! directories of symbolic links on the path. inotify does not report that
//! something was mounted over a directory. The kernel's list of mounts reports
//! that.

use std::collections::{BTreeSet, VecDeque};
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::future::pending;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use rustix::io::Errno;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tracing::{debug, warn};

use crate::host::readable::{readable, urgent};
use crate::text::escape;

/// How many symbolic links a path may lead through (path_resolution(7)).
const MAX_LINKS: usize = 40;

/// How often a path is checked again if it changes during the check.
const MAX_LOOKS: usize = 10;

/// The sockets of the configured VMs.
#[derive(Debug)]
pub struct Sockets {
    inotify: AsyncFd<OwnedFd>,
    /// Reports changes of the mounts. `None` if there is no /proc.
    mounts: Option<AsyncFd<OwnedFd>>,
    targets: Vec<Target>,
    /// inotify's numbers of the directories that are watched.
    watched: BTreeSet<i32>,
    /// The directories that cannot be watched and that were logged.
    told: BTreeSet<PathBuf>,
}

/// A socket that is expected.
#[derive(Debug)]
struct Target {
    /// The VM's name.
    vm: String,
    socket: PathBuf,
    /// The entries of directories that the path depends on. Each has inotify's
    /// number of its directory.
    entries: Vec<(i32, OsString)>,
}

/// An entry of a directory that changed. Without a name, the directory itself
/// changed. If both are missing, anything may have changed.
type Change = (Option<i32>, Option<OsString>);

impl Sockets {
    /// Creates a watcher that watches nothing yet.
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
        let (targets, watched, told) = (Vec::new(), BTreeSet::new(), BTreeSet::new());
        Ok(Sockets { inotify, mounts, targets, watched, told })
    }

    /// Replaces the watched sockets by those of these VMs. A socket that
    /// appeared before and was not returned yet is not forgotten.
    pub fn watch(&mut self, targets: Vec<(String, PathBuf)>) {
        let target = |(vm, socket)| Target { vm, socket, entries: Vec::new() };
        self.targets = targets.into_iter().map(target).collect();
        self.told.clear();
        self.look_for(|_| true);
    }

    /// Waits until sockets appear, and returns the names of their VMs.
    ///
    /// # Errors
    ///
    /// When inotify cannot be read.
    pub async fn appeared(&mut self) -> io::Result<Vec<String>> {
        loop {
            let names = tokio::select! {
                ready = self.inotify.readable() => {
                    let read = ready?.try_io(|inotify| read(inotify.get_ref()));
                    let Ok(changes) = read else { continue };
                    let changes = changes?;
                    self.look_for(|target| changes.iter().any(|change| target.depends_on(change)))
                        .into_iter()
                        .map(|(name, _)| name)
                        .collect()
                }
                // A path that was changed now leads through other directories.
                () = mounted(self.mounts.as_ref()) => self
                    .look_for(|_| true)
                    .into_iter()
                    .filter_map(|(name, is_other)| is_other.then_some(name))
                    .collect(),
            };
            let names: Vec<String> = names;
            if !names.is_empty() {
                return Ok(names);
            }
        }
    }

    /// Checks the paths to these sockets again. Returns the VMs whose sockets
    /// exist, and whether each path has changed.
    fn look_for(&mut self, which: impl Fn(&Target) -> bool) -> Vec<(String, bool)> {
        let mut there = Vec::new();
        let mut targets = std::mem::take(&mut self.targets);
        for target in targets.iter_mut().filter(|target| which(target)) {
            let entries = self.arm(&target.vm, &target.socket);
            let is_other = entries != target.entries;
            target.entries = entries;
            if target.socket.exists() {
                there.push((target.vm.clone(), is_other));
            }
        }
        self.targets = targets;
        let entries = self.targets.iter().flat_map(|target| &target.entries);
        let needed: BTreeSet<i32> = entries.map(|(number, _)| *number).collect();
        for number in self.watched.difference(&needed) {
            // The kernel has removed it if the directory is gone.
            let _ = inotify::remove_watch(&self.inotify, *number);
        }
        self.watched = needed;
        there
    }

    /// Watches the directories on the path to a socket.
    fn arm(&mut self, vm: &str, socket: &Path) -> Vec<(i32, OsString)> {
        let flags = WatchFlags::CREATE
            | WatchFlags::MOVED_TO
            | WatchFlags::DELETE_SELF
            | WatchFlags::MOVE_SELF
            | WatchFlags::ONLYDIR;
        let mut way = way_to(socket);
        for _ in 0..MAX_LOOKS {
            let mut entries = Vec::new();
            for (directory, name) in &way {
                match inotify::add_watch(&self.inotify, directory, flags) {
                    Ok(number) => {
                        self.watched.insert(number);
                        entries.push((number, name.clone()));
                    }
                    // The directory was removed just now.
                    Err(Errno::NOENT | Errno::NOTDIR) => {}
                    Err(error) if self.told.insert(directory.clone()) => {
                        let directory = directory.to_string_lossy();
                        warn!(
                            vm,
                            "{vm}: its start will not be noticed: cannot watch {}: {error}; {}",
                            escape(&directory),
                            advice(error)
                        );
                    }
                    Err(_) => {}
                }
            }
            // An entry may have appeared before it was watched.
            let now = way_to(socket);
            if now == way {
                return entries;
            }
            way = now;
        }
        Vec::new()
    }
}

impl Target {
    fn depends_on(&self, (directory, name): &Change) -> bool {
        let Some(directory) = directory else { return true };
        let is_it = |entry: &OsString| name.as_ref().is_none_or(|name| name == entry);
        self.entries.iter().any(|(number, entry)| number == directory && is_it(entry))
    }
}

/// The entries that a path depends on, as directories and names in them: each
/// symbolic link on the path, and the path's end or the first entry that does
/// not exist.
fn way_to(path: &Path) -> Vec<(PathBuf, OsString)> {
    let mut entries: Vec<(PathBuf, OsString)> = Vec::new();
    let mut directory = PathBuf::from("/");
    let mut rest: VecDeque<OsString> = names(path).collect();
    while let Some(name) = rest.pop_front() {
        if name == ".." {
            directory.pop();
            continue;
        }
        let path = directory.join(&name);
        let kind = fs::symlink_metadata(&path).map(|found| found.file_type());
        if kind.as_ref().is_ok_and(fs::FileType::is_dir) {
            directory = path;
            continue;
        }
        entries.push((directory.clone(), name));
        match fs::read_link(&path) {
            Ok(target) if entries.len() <= MAX_LINKS => {
                if target.is_absolute() {
                    directory = PathBuf::from("/");
                }
                names(&target).rev().for_each(|name| rest.push_front(name));
            }
            _ => break,
        }
    }
    entries
}

/// The names in a path, including `..`.
fn names(path: &Path) -> impl DoubleEndedIterator<Item = OsString> {
    path.components().filter_map(|component| match component {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some("..".into()),
        _ => None,
    })
}

/// What to do about a directory that cannot be watched.
fn advice(error: Errno) -> &'static str {
    match error {
        Errno::ACCESS | Errno::PERM => "this user must be allowed to read that directory",
        Errno::NOSPC => "raise fs.inotify.max_user_watches (sysctl), then reload",
        _ => "reload when that has been repaired",
    }
}

/// Waits until something is mounted or unmounted. poll(2) reports that as a
/// priority event (proc(5), `/proc/pid/mountinfo`).
async fn mounted(mounts: Option<&AsyncFd<OwnedFd>>) {
    match mounts {
        Some(mounts) => match mounts.ready(Interest::PRIORITY).await {
            Ok(mut ready) => ready.clear_ready(),
            Err(_) => pending().await,
        },
        None => pending().await,
    }
}

/// Reads all events. If events were lost, anything may have changed.
fn read(inotify: &OwnedFd) -> io::Result<Vec<Change>> {
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
            changes.push((None, None));
        }
        let name = event.file_name().map(|name| OsStr::from_bytes(name.to_bytes()).to_owned());
        changes.push((Some(event.wd()), name));
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
        assert!(sockets.watched.len() <= 3, "{:?}", sockets.watched);
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
        assert_eq!(sockets.watched.len(), 1);
    }

    #[tokio::test]
    async fn a_link_may_lead_to_what_comes_later_or_moves() {
        use std::os::unix::fs::symlink;
        let root = tempfile::tempdir().unwrap();
        let path = |name: &str| root.path().join(name);
        fs::create_dir(path("run")).unwrap();
        fs::create_dir(path("deep")).unwrap();
        // A link to a directory, in which there is a link to the socket.
        symlink("deep/vm", path("vm")).unwrap();
        let mut sockets = watching(vec![("a".into(), path("vm/a.qmp"))]);
        fs::create_dir(path("deep/vm")).unwrap();
        symlink(path("run/first"), path("deep/vm/a.qmp")).unwrap();
        // The socket itself comes last.
        fs::write(path("run/first"), "").unwrap();
        assert_eq!(appeared(&mut sockets).await, ["a"]);
        // The link is moved to another one.
        fs::write(path("run/second"), "").unwrap();
        symlink(path("run/second"), path("new")).unwrap();
        fs::rename(path("new"), path("deep/vm/a.qmp")).unwrap();
        assert_eq!(appeared(&mut sockets).await, ["a"]);
        // The file that the link leads to is created again.
        fs::remove_file(path("run/second")).unwrap();
        fs::write(path("run/second"), "").unwrap();
        assert_eq!(appeared(&mut sockets).await, ["a"]);
    }

    #[test]
    fn a_way_that_leads_in_a_circle_has_an_end() {
        let root = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("circle", root.path().join("circle")).unwrap();
        assert!(way_to(&root.path().join("circle/a")).len() <= MAX_LINKS + 1);
        assert_eq!(way_to(Path::new("/nowhere/../a")), [("/".into(), "nowhere".into())]);
    }
}
