//! Tells of files that other users may change, and that decide who gets a
//! device or what root runs. Nothing is refused for it: what worked like this
//! before still works.

use std::path::Path;

use crate::host::Host;
use crate::qemu::VmAddress;
use crate::text::escape;

/// What other users may do, a sentence each: to the program, if root runs it;
/// to the configuration; and to the directories of the VMs' sockets.
pub fn exposed<'a>(
    host: &Host,
    program: Option<&Path>,
    config: Option<&Path>,
    vms: impl IntoIterator<Item = (&'a str, &'a VmAddress)>,
) -> Vec<String> {
    let mut told = Vec::new();
    if let Some(exposed) = program.and_then(|program| host.exposed_file(program)) {
        told.push(format!(
            "{exposed}, and so be root when it runs; install the program in /usr/bin first"
        ));
    }
    if let Some(exposed) = config.and_then(|config| host.exposed_file(config)) {
        told.push(format!("{exposed}, and so which VM gets which device; take that right away"));
    }
    for (name, address) in vms {
        let VmAddress::Socket(socket) = address else { continue };
        // The kernel tells whose process listens.
        let exposed = host.exposed_socket(&socket.path).filter(|_| socket.user.is_none());
        if let Some(exposed) = exposed {
            told.push(format!(
                "{exposed}, and listen in the place of VM {}; use another directory, or set the \
                 VM's `user` in the configuration",
                escape(name)
            ));
        }
    }
    told
}

/// This program, if root runs it.
pub fn roots_program() -> Option<std::path::PathBuf> {
    std::env::current_exe().ok().filter(|_| rustix::process::geteuid().is_root())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qemu::Socket;
    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn everything_that_others_may_change_is_told_and_nothing_else() {
        let root = tempfile::tempdir().unwrap();
        let host = Host::at(root.path());
        let mode = |path: &str, mode| {
            fs::set_permissions(root.path().join(path), Permissions::from_mode(mode)).unwrap();
        };
        for directory in ["open", "closed"] {
            fs::create_dir(root.path().join(directory)).unwrap();
        }
        for file in ["program", "config"] {
            fs::write(root.path().join(file), "").unwrap();
            mode(file, 0o644);
        }
        let open: VmAddress = Path::new("/open/a.qmp").into();
        let closed: VmAddress = Path::new("/closed/b.qmp").into();
        let users = VmAddress::Socket(Socket { path: "/open/c.qmp".into(), user: Some(1000) });
        let vms = [("a\n", &open), ("b", &closed), ("c", &users)];
        let told = || {
            exposed(&host, Some(Path::new("/program")), Some(Path::new("/config")), vms)
                .iter()
                .map(|told| told.split(", and ").nth(1).unwrap().to_owned())
                .collect::<Vec<_>>()
        };
        mode("open", 0o755);
        assert_eq!(told(), [""; 0]);
        for path in ["open", "program", "config"] {
            mode(path, 0o777);
        }
        let told = told();
        let starts = ["so be root", "so which VM", "listen in the place of VM a\\n;"];
        assert_eq!(told.len(), starts.len(), "{told:?}");
        for (told, start) in told.iter().zip(starts) {
            assert!(told.starts_with(start), "{told}");
        }
    }
}
