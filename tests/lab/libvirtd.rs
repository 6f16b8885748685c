//! A real libvirtd in the machine, and domains that are as small as they can be.

use crate::vm::{self, Vm};
use crate::wait::wait_until;
use rustix::process::{Pid, Signal, kill_process};
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
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

const LOG: &str = "/run/libvirtd.log";

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
    pub fn start(whose: Whose) -> Libvirtd {
        prepare();
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
        let uri = match self.whose {
            Whose::System => "qemu:///system",
            Whose::Persons => "qemu:///session",
        };
        let output = self.whose.command(&["virsh", "-c", uri]).args(arguments).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let log = || fs::read_to_string(LOG).unwrap_or_default();
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "virsh {arguments:?}: {error}\n{}", log());
        text
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
}
