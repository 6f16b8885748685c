//! Files that other users may change: the directory of a socket, a file that
//! root reads, a program that root runs. A user who may change one can get a
//! device or become root.

use std::fmt;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::Host;
use crate::text::escape;

/// A file or directory that others may change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exposed {
    /// The path.
    pub path: PathBuf,
    /// The users who may change it.
    pub to: String,
}

impl fmt::Display for Exposed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} may change {}", self.to, escape(&self.path.to_string_lossy()))
    }
}

impl Host {
    /// The users, apart from root and this user, who may change a file or
    /// replace it. What cannot be read is skipped.
    pub fn exposed_file(&self, path: &Path) -> Option<Exposed> {
        let path = fs::canonicalize(self.path(path)).ok()?;
        path.ancestors().find_map(exposed_to_some)
    }

    /// The directory on a socket's path that any user may change. The VM's own
    /// user or group has to be able to change it, so that is not reported.
    pub fn exposed_socket(&self, path: &Path) -> Option<Exposed> {
        let path = self.path(path);
        let nearest = path.ancestors().skip(1).find_map(|path| fs::canonicalize(path).ok())?;
        // In a directory with the sticky bit, any user may create what does not
        // exist yet. A socket does not exist while its VM does not run.
        let is_exposed = |path: &Path| {
            let found = fs::symlink_metadata(path).ok()?;
            let protects = found.mode() & 0o1000 != 0 && path != nearest;
            Some(found.mode() & 0o002 != 0 && !protects)
        };
        let directory = nearest.ancestors().find(|path| is_exposed(path) == Some(true))?;
        Some(Exposed { path: directory.to_owned(), to: "any user".into() })
    }
}

fn exposed_to_some(path: &Path) -> Option<Exposed> {
    let found = fs::symlink_metadata(path).ok()?;
    let this = rustix::process::geteuid().as_raw();
    let exposed = |to: String| Some(Exposed { path: path.to_owned(), to });
    // The sticky bit protects existing files from other users (inode(7)).
    let is_sticky = found.is_dir() && found.mode() & 0o1000 != 0;
    if ![0, this].contains(&found.uid()) {
        return exposed(format!("user {}", found.uid()));
    }
    if found.mode() & 0o002 != 0 && !is_sticky {
        return exposed("any user".into());
    }
    if found.mode() & 0o020 != 0 && found.gid() != 0 && !is_sticky {
        return exposed(format!("group {}", found.gid()));
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, chown};

    #[test]
    fn what_others_may_change_is_told() {
        let root = tempfile::tempdir().unwrap();
        let directory = root.path().join("vm");
        let file = directory.join("file");
        fs::create_dir(&directory).unwrap();
        fs::write(&file, "").unwrap();
        let host = Host::at(root.path());
        let mode = |path: &Path, mode| {
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        };
        let told = |found: Option<Exposed>| found.map(|found| (found.path, found.to));
        // A directory above with the sticky bit, like /tmp, protects what is in
        // it.
        mode(root.path(), 0o1777);
        assert_eq!(told(host.exposed_file(Path::new("/vm/file"))), None);
        assert_eq!(told(host.exposed_socket(Path::new("/vm/a.qmp"))), None);
        let any = Some((fs::canonicalize(root.path()).unwrap(), "any user".to_owned()));
        assert_eq!(told(host.exposed_socket(Path::new("/a.qmp"))), any);
        assert_eq!(told(host.exposed_socket(Path::new("/not/there/a.qmp"))), any);
        mode(&directory, 0o777);
        let any = Some((fs::canonicalize(&directory).unwrap(), "any user".to_owned()));
        assert_eq!(told(host.exposed_file(Path::new("/vm/file"))), any);
        assert_eq!(told(host.exposed_socket(Path::new("/vm/not-there.qmp"))), any);
        mode(&directory, 0o755);
        mode(&file, 0o666);
        let any = Some((fs::canonicalize(&file).unwrap(), "any user".to_owned()));
        assert_eq!(told(host.exposed_file(Path::new("/vm/file"))), any);
        mode(&file, 0o644);
        if chown(&file, Some(65534), None).is_ok() {
            let found = host.exposed_file(Path::new("/vm/file")).unwrap();
            assert!(found.to_string().starts_with("user 65534 may change "), "{found}");
        }
    }
}
