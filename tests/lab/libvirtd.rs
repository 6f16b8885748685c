//! A real libvirtd in the machine, and domains that are as small as they can be.

use crate::host::must;
use crate::vm::{self, Vm};
use crate::wait::wait_until;
use rustix::process::{Pid, Signal, kill_process};
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// The user that libvirt's QEMUs run as, and one of the machine's people.
const QEMU_USER: u32 = 64055;
pub const PERSON: u32 = 1000;
const PEOPLE: &str = "libvirt-qemu:x:64055:64055::/var/lib/libvirt:/bin/false\n\
                      person:x:1000:1000::/run/person:/bin/sh\n";
const GROUPS: &str = "libvirt-qemu:x:64055:\nperson:x:1000:\nlibvirt:x:64056:\n";

/// No virtlogd and no cgroups are here.
const QEMU_CONF: &str =
    "stdio_handler = \"file\"\nsecurity_driver = \"none\"\ncgroup_controllers = [ ]\n";

/// AppArmor and the profiles of libvirt, unpacked by `contrib/setup`.
const APPARMOR: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/target/lab/apparmor");
const PROFILES: [&str; 2] =
    ["/etc/apparmor.d/usr.sbin.libvirtd", "/etc/apparmor.d/usr.lib.libvirt.virt-aa-helper"];

/// Where the lab's QEMU has its libraries, and the tests a monitor of their own.
const LOCAL: &str = "/usr/lib/lab-qemu/** mr,\n/run/vm/*.check rw,\n";

const LOG: &str = "/run/libvirtd.log";

/// What `virsh` has somebody edit with.
pub const EDITOR: &str = "/run/editor";

/// Whose libvirtd it is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Whose {
    System,
    /// [`PERSON`]'s own.
    Persons,
}

pub struct Libvirtd {
    whose: Whose,
    child: Child,
}

impl Libvirtd {
    /// The system's, confined by AppArmor, as are its domains.
    pub fn start_confined() -> Libvirtd {
        prepare();
        confine();
        let config = fs::read_to_string("/etc/libvirt/qemu.conf").unwrap();
        let config = config.replace("security_driver = \"none\"", "security_driver = \"apparmor\"");
        fs::write("/etc/libvirt/qemu.conf", config).unwrap();
        Libvirtd::launch(Whose::System)
    }

    pub fn start(whose: Whose) -> Libvirtd {
        prepare();
        Libvirtd::launch(whose)
    }

    fn launch(whose: Whose) -> Libvirtd {
        let _ = fs::remove_file(whose.socket());
        let log = File::options().create(true).append(true).open(LOG).unwrap();
        let child = whose
            .command(&["setpriv", "--pdeathsig", "KILL", "libvirtd"])
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .expect("libvirtd is installed");
        let libvirtd = Libvirtd { whose, child };
        wait_until("libvirtd listens", || UnixStream::connect(whose.socket()).is_ok());
        libvirtd
    }

    /// Defines and starts a domain with an xHCI controller, and nothing else that counts.
    pub fn domain(&self, name: &str) -> Vm {
        self.define(name, "");
        self.start_domain(name)
    }

    /// Defines a domain with more devices.
    pub fn define(&self, name: &str, devices: &str) {
        let file = format!("{}/{name}.xml", vm::directory());
        fs::write(&file, xml(name, devices)).unwrap();
        self.virsh(&["define", &file]);
    }

    pub fn start_domain(&self, name: &str) -> Vm {
        self.virsh(&["start", name]);
        Vm::attach_to(name)
    }

    /// Ends it, as an administrator does; its domains run on.
    pub fn stop(mut self) {
        self.signal(Signal::TERM);
        self.child.wait().unwrap();
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    #[track_caller]
    pub fn virsh(&self, arguments: &[&str]) -> String {
        let log = || fs::read_to_string(LOG).unwrap_or_default();
        match self.try_virsh(arguments) {
            Ok(text) => text,
            Err(error) => panic!("virsh {arguments:?}: {error}\n{}", log()),
        }
    }

    pub fn try_virsh(&self, arguments: &[&str]) -> Result<String, String> {
        let uri = match self.whose {
            Whose::System => "qemu:///system",
            Whose::Persons => "qemu:///session",
        };
        let mut command = self.whose.command(&["virsh", "-c", uri]);
        let output = command.args(arguments).env("EDITOR", EDITOR).output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
    }
}

impl Drop for Libvirtd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Whose {
    fn socket(self) -> PathBuf {
        match self {
            Whose::System => "/run/libvirt/libvirt-sock".into(),
            Whose::Persons => format!("/run/user/{PERSON}/libvirt/libvirt-sock").into(),
        }
    }

    /// A program as the one whose libvirtd it is.
    pub fn command(self, words: &[&str]) -> Command {
        let mut command = Command::new("setpriv");
        if self == Whose::Persons {
            command
                .args(["--reuid", "1000", "--regid", "1000", "--clear-groups", "--inh-caps=-all"])
                .env("HOME", "/run/person")
                .env("XDG_RUNTIME_DIR", format!("/run/user/{PERSON}"));
        }
        command.args(words);
        command
    }
}

/// What libvirt's packages, and a login, would have set up.
fn prepare() {
    add("/etc/passwd", PEOPLE);
    add("/etc/group", GROUPS);
    fs::write("/etc/libvirt/qemu.conf", QEMU_CONF).unwrap();
    for directory in ["/run/person".to_owned(), format!("/run/user/{PERSON}")] {
        fs::create_dir_all(&directory).unwrap();
        fs::set_permissions(&directory, fs::Permissions::from_mode(0o700)).unwrap();
        chown(&directory, Some(PERSON), Some(PERSON)).unwrap();
    }
    fs::create_dir_all(vm::directory()).unwrap();
    fs::set_permissions(vm::directory(), fs::Permissions::from_mode(0o777)).unwrap();
}

/// Loads AppArmor's profiles, which are enforced from then on.
fn confine() {
    assert!(Path::new(APPARMOR).exists(), "run contrib/setup: it has been changed");
    if !Path::new("/sys/kernel/security/apparmor").exists() {
        must("mount", &["-t", "securityfs", "securityfs", "/sys/kernel/security"]);
    }
    for directory in ["etc/apparmor", "etc/apparmor.d", "usr/share/apparmor-features"] {
        let (from, to) = (format!("{APPARMOR}/{directory}"), format!("/{directory}"));
        must("cp", &["--recursive", "--no-target-directory", &from, &to]);
    }
    must("cp", &[&format!("{APPARMOR}/sbin/apparmor_parser"), "/usr/sbin"]);
    fs::create_dir_all("/etc/apparmor.d/local/abstractions").unwrap();
    fs::write("/etc/apparmor.d/local/abstractions/libvirt-qemu", LOCAL).unwrap();
    for profile in PROFILES {
        // The package makes an empty one when it is installed.
        let local = profile.replace("/etc/apparmor.d/", "/etc/apparmor.d/local/");
        File::options().create(true).append(true).open(local).unwrap();
        must("apparmor_parser", &["--replace", profile]);
    }
}

fn set_free() {
    // The files stay: on Debian 13 they are the system's own.
    if Path::new("/sys/kernel/security/apparmor").exists() {
        for profile in PROFILES {
            let _ = Command::new("apparmor_parser").args(["--remove", profile]).output();
        }
    }
}

fn add(file: &str, lines: &str) {
    if !fs::read_to_string(file).unwrap().contains(lines) {
        File::options().append(true).open(file).unwrap().write_all(lines.as_bytes()).unwrap();
    }
}

fn xml(name: &str, devices: &str) -> String {
    let firmware = vm::firmware(name);
    let check = format!("{}/{name}.check", vm::directory());
    format!(
        "<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
           <name>{name}</name>
           <memory unit='MiB'>64</memory>
           <os><type arch='x86_64' machine='pc'>hvm</type><loader type='rom'>{firmware}</loader></os>
           <devices>
             <emulator>/usr/bin/qemu-system-x86_64</emulator>
             <controller type='usb' model='qemu-xhci' ports='15'/>
             <memballoon model='none'/>
             {devices}
           </devices>
           <qemu:commandline>
             <qemu:arg value='-qmp'/><qemu:arg value='unix:{check},server=on,wait=off'/>
           </qemu:commandline>
         </domain>"
    )
}

/// Ends what an earlier test has left running, and forgets its domains.
pub fn clear() {
    for process in fs::read_dir("/proc").unwrap().flatten() {
        let is_libvirtd = fs::read_to_string(process.path().join("comm"))
            .is_ok_and(|name| name.trim_end() == "libvirtd");
        let pid =
            process.file_name().to_str().and_then(|name| name.parse().ok()).and_then(Pid::from_raw);
        if let (true, Some(pid)) = (is_libvirtd, pid) {
            let _ = kill_process(pid, Signal::KILL);
            wait_until("a libvirtd that was left ends", || !process.path().join("exe").exists());
        }
    }
    for directory in [
        "/run/libvirt",
        "/etc/libvirt/qemu",
        "/var/lib/libvirt/qemu/save",
        "/run/person",
        "/run/user",
    ] {
        let _ = fs::remove_dir_all(directory);
    }
    let _ = fs::remove_file(LOG);
    set_free();
}
