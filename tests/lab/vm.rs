//! A virtual machine inside the machine: the QEMU that devices are attached to.

use crate::hardware::Plugged;
use crate::qmp::Qmp;
use crate::wait::{wait_for, wait_until};
use rustix::net::sockopt::socket_peercred;
use rustix::process::{
    Pid, PidfdFlags, PidfdGetfdFlags, Signal, kill_process, pidfd_getfd, pidfd_open,
};
use serde_json::{Value, json};
use std::cell::RefCell;
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

const DIRECTORY: &str = "/run/vm";
const FULL_SANDBOX: &str =
    "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny";

/// How a QEMU is to be started.
pub struct Builder {
    name: String,
    wrapper: Vec<String>,
    arguments: Vec<String>,
    controller: bool,
    boots: bool,
}

pub struct Vm {
    name: String,
    pid: Pid,
    /// Who started it, where that is the test.
    child: Option<Child>,
    qmp: RefCell<Qmp<UnixStream>>,
}

impl Vm {
    /// A VM that has an xHCI controller `xhci` and nothing else. It runs, but all its processor does is to halt.
    #[allow(clippy::new_ret_no_self, reason = "reads as the thing that is built")]
    pub fn new(name: &str) -> Builder {
        Builder {
            name: name.to_owned(),
            wrapper: Vec::new(),
            arguments: Vec::new(),
            controller: true,
            boots: false,
        }
    }
}

impl Builder {
    pub fn argument(mut self, option: &str, value: &str) -> Builder {
        self.arguments.extend([option.to_owned(), value.to_owned()]);
        self
    }

    /// Leaves out the xHCI controller; the test adds its own, or none.
    pub fn without_controller(self) -> Builder {
        Builder { controller: false, ..self }
    }

    /// With firmware that boots from what it finds, once [`Vm::boot`] lets it run.
    pub fn paused(self) -> Builder {
        Builder { boots: true, ..self }
    }

    /// As user and group 65534 under everything QEMU's own sandbox can deny.
    pub fn unprivileged(mut self) -> Builder {
        self.wrapper = words("setpriv --reuid 65534 --regid 65534 --clear-groups --inh-caps=-all");
        self.argument("-sandbox", FULL_SANDBOX)
    }

    /// Besides, in namespaces of its own with an empty /dev and /sys.
    pub fn isolated(self) -> Builder {
        let mut builder = self.unprivileged();
        builder.wrapper.extend(words("unshare --user --map-root-user --mount --net --ipc --uts --pid --fork --kill-child sh -c"));
        let hide = "mount -t tmpfs none /sys && mount -t tmpfs none /dev && exec \"$@\"";
        builder.wrapper.extend([hide.to_owned(), "sh".to_owned()]);
        builder
    }

    pub fn start(self) -> Vm {
        fs::create_dir_all(DIRECTORY).unwrap();
        fs::set_permissions(DIRECTORY, fs::Permissions::from_mode(0o777)).unwrap();
        let file = |kind: &str| format!("{DIRECTORY}/{}.{kind}", self.name);
        let mut words = self.wrapper.clone();
        words.extend(self::words(
            "qemu-system-x86_64 -nodefaults -no-user-config -display none -accel tcg -m 64",
        ));
        let (qmp, check, debug) = (file("qmp"), file("check"), file("debug"));
        for (option, value) in [
            ("-name", self.name.as_str()),
            ("-qmp", &format!("unix:{qmp},server=on,wait=off")),
            ("-qmp", &format!("unix:{check},server=on,wait=off")),
            ("-chardev", &format!("file,id=debug,path={debug}")),
            ("-device", "isa-debugcon,iobase=0x402,chardev=debug"),
        ] {
            words.extend([option.to_owned(), value.to_owned()]);
        }
        if self.controller {
            words.extend(self::words("-device qemu-xhci,id=xhci,p2=15,p3=15"));
        }
        if self.boots {
            words.push("-S".to_owned());
        } else {
            words.extend(["-bios".to_owned(), firmware(&self.name)]);
        }
        words.extend(self.arguments);
        let mut child = Command::new(&words[0])
            .args(&words[1..])
            .stdin(Stdio::null())
            .spawn()
            .expect("QEMU starts");
        let stream = wait_for(&format!("{} listens", self.name), || {
            if let Some(status) = child.try_wait().unwrap() {
                panic!("QEMU ended: {status}: {words:?}");
            }
            UnixStream::connect(&check).ok()
        });
        let pid = socket_peercred(&stream).expect("QEMU's process").pid;
        Vm { name: self.name, pid, child: Some(child), qmp: RefCell::new(Qmp::new(stream)) }
    }
}

impl Vm {
    /// One that somebody else has started, with its monitor for the tests.
    pub fn attach_to(name: &str) -> Vm {
        let check = format!("{DIRECTORY}/{name}.check");
        let stream = wait_for(&format!("{name} listens"), || UnixStream::connect(&check).ok());
        let qmp = RefCell::new(Qmp::new(stream));
        // The socket's own process may be another one.
        let pid = fs::read_dir("/proc").unwrap().flatten().find_map(|process| {
            let line = fs::read_to_string(process.path().join("cmdline")).ok()?;
            line.contains(&check).then(|| process.file_name().to_str()?.parse().ok())?
        });
        let pid = pid.and_then(Pid::from_raw).expect("its process");
        Vm { name: name.to_owned(), pid, child: None, qmp }
    }

    /// The monitor for the program under test.
    pub fn socket(&self) -> String {
        format!("{DIRECTORY}/{}.qmp", self.name)
    }

    pub fn pid(&self) -> i32 {
        self.pid.as_raw_nonzero().get()
    }

    /// On a second monitor, so the first stays free.
    pub fn qmp(&self, command: &str, arguments: Value) -> Value {
        self.qmp.borrow_mut().must(command, arguments)
    }

    pub fn try_qmp(&self, command: &str, arguments: Value) -> Result<Value, String> {
        self.qmp.borrow_mut().execute(command, arguments)
    }

    /// The lines of `info usb`, one a device.
    pub fn usb_devices(&self) -> Vec<String> {
        let text = self.qmp("human-monitor-command", json!({"command-line": "info usb"}));
        text.as_str()
            .unwrap()
            .lines()
            .map(str::trim)
            .filter(|line| line.starts_with("Device "))
            .map(str::to_owned)
            .collect()
    }

    /// The ids of the host devices in the VM.
    pub fn ids(&self) -> Vec<String> {
        let children = self.qmp("qom-list", json!({"path": "/machine/peripheral"}));
        let mut ids: Vec<String> = children
            .as_array()
            .unwrap()
            .iter()
            .filter(|child| child["type"] == "child<usb-host>")
            .map(|child| child["name"].as_str().unwrap().to_owned())
            .collect();
        ids.sort();
        ids
    }

    /// The USB nodes that QEMU has open.
    pub fn open_nodes(&self) -> Vec<PathBuf> {
        let descriptors = fs::read_dir(format!("/proc/{}/fd", self.pid())).expect("QEMU runs");
        descriptors
            .flatten()
            .filter_map(|entry| fs::read_link(entry.path()).ok())
            .filter(|path| path.starts_with("/dev/bus/usb"))
            .collect()
    }

    /// QEMU's own open node of a device: open, and locked, as long as this is.
    pub fn copy_of(&self, device: &Plugged) -> OwnedFd {
        let process = pidfd_open(self.pid, PidfdFlags::empty()).expect("QEMU runs");
        let descriptors = fs::read_dir(format!("/proc/{}/fd", self.pid())).expect("QEMU runs");
        let is_node =
            |entry: &fs::DirEntry| fs::read_link(entry.path()).ok() == Some(device.node());
        let its = descriptors.flatten().find(is_node).expect("QEMU has it open");
        let number = its.file_name().to_str().unwrap().parse().unwrap();
        pidfd_getfd(process, number, PidfdGetfdFlags::empty()).expect("root may")
    }

    /// How many descriptors QEMU has open, of whatever kind, once the monitor has no client: QEMU closes its end a moment
    /// after the client has gone.
    pub fn descriptors(&self) -> usize {
        let socket = self.socket();
        let is_monitor = |chardev: &&Value| chardev["filename"].as_str().unwrap().contains(&socket);
        wait_until("its monitor is free", || {
            let all = self.qmp("query-chardev", json!({}));
            let monitor = all.as_array().unwrap().iter().find(is_monitor).expect("the monitor");
            monitor["filename"].as_str().unwrap().starts_with("disconnected:")
        });
        fs::read_dir(format!("/proc/{}/fd", self.pid())).expect("QEMU runs").count()
    }

    /// Waits until it has exactly these host devices.
    #[track_caller]
    pub fn gets(&self, devices: &[&Plugged]) {
        let mut ids: Vec<String> = devices.iter().map(|device| device.id_in_vm()).collect();
        ids.sort();
        // One that came too late may be taken out and given again.
        let has_all = || self.ids() == ids && devices.iter().all(|device| self.has(device));
        wait_until(&format!("{} gets {ids:?}", self.name), has_all);
        for device in devices {
            self.must_have(device);
        }
    }

    /// Waits until it has no device any more, and asserts that QEMU keeps nothing of them.
    #[track_caller]
    pub fn loses_all(&self) {
        wait_until(&format!("{} loses its devices", self.name), || self.ids().is_empty());
        self.must_be_clean();
    }

    /// Whether this very device is in the VM.
    pub fn has(&self, device: &Plugged) -> bool {
        let path = format!("/machine/peripheral/{}", device.id_in_vm());
        let address = self.try_qmp("qom-get", json!({"path": path, "property": "hostaddr"}));
        address == Ok(device.address.into())
    }

    /// Asserts that this very device is in the VM, under the id of its port and with its node open.
    #[track_caller]
    pub fn must_have(&self, device: &Plugged) {
        let get = |property: &str| {
            let path = format!("/machine/peripheral/{}", device.id_in_vm());
            self.qmp("qom-get", json!({"path": path, "property": property}))
        };
        assert_eq!((get("hostbus"), get("hostaddr")), (device.bus.into(), device.address.into()));
        assert!(self.open_nodes().contains(&device.node()), "{:?}", self.open_nodes());
        // `usbfs` is whoever has the node open.
        let driver = device.driver();
        assert!(driver.as_deref().is_none_or(|driver| driver == "usbfs"), "{driver:?}");
    }

    /// Asserts that QEMU keeps nothing of the devices it had.
    #[track_caller]
    pub fn must_be_clean(&self) {
        assert_eq!(self.open_nodes(), [""; 0].map(PathBuf::from));
        self.must_have_no_spare_descriptors();
    }

    /// Asserts that no descriptor waits in QEMU for a device that is to use it.
    #[track_caller]
    pub fn must_have_no_spare_descriptors(&self) {
        let sets = self.qmp("query-fdsets", json!({}));
        let is_empty = |set: &Value| set["fds"].as_array().is_some_and(Vec::is_empty);
        assert!(sets.as_array().unwrap().iter().all(is_empty), "{sets}");
    }

    /// Has QEMU keep a descriptor in a set, as a client does that is about to attach something.
    pub fn pass_descriptor(&self, set: i64, descriptor: &OwnedFd) {
        self.qmp.borrow_mut().with_descriptor(descriptor, "add-fd", &json!({"fdset-id": set}));
    }

    /// Lets a paused VM run.
    pub fn boot(&self) {
        self.qmp("cont", json!({}));
    }

    /// What the guest's firmware, or the boot sector, has written to the debug port.
    pub fn wait_for_debug(&self, text: &str) {
        let file = Path::new(DIRECTORY).join(format!("{}.debug", self.name));
        wait_until(&format!("{text:?} from the guest"), || {
            fs::read_to_string(&file).unwrap_or_default().contains(text)
        });
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(self.pid, signal).expect("QEMU runs");
    }

    /// Ends QEMU as a crash would.
    pub fn kill(mut self) {
        self.end();
    }

    fn end(&mut self) {
        let _ = kill_process(self.pid, Signal::KILL);
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.end();
    }
}

/// Where the VMs' files are.
pub fn directory() -> &'static str {
    DIRECTORY
}

/// The file with the firmware that a VM of this name has.
pub fn firmware(name: &str) -> String {
    let file = format!("{DIRECTORY}/{name}.firmware");
    fs::write(&file, halting_firmware()).unwrap();
    file
}

/// Firmware that does nothing, and costs no time under emulation.
fn halting_firmware() -> Vec<u8> {
    let mut image = vec![0; 1 << 16];
    // Where a processor starts: cli; hlt; jmp to the hlt.
    image[0xfff0..0xfff4].copy_from_slice(&[0xfa, 0xf4, 0xeb, 0xfd]);
    image
}

/// Ends what an earlier test has left running, and removes its sockets.
pub fn clear() {
    for process in fs::read_dir("/proc").unwrap().flatten() {
        let is_qemu = fs::read_to_string(process.path().join("comm"))
            .is_ok_and(|name| name.starts_with("qemu-system"));
        let pid =
            process.file_name().to_str().and_then(|name| name.parse().ok()).and_then(Pid::from_raw);
        if let (true, Some(pid)) = (is_qemu, pid) {
            let _ = kill_process(pid, Signal::KILL);
            wait_until("a QEMU that was left ends", || !process.path().join("exe").exists());
        }
    }
    let _ = fs::remove_dir_all(DIRECTORY);
}

fn words(text: &str) -> Vec<String> {
    text.split(' ').map(str::to_owned).collect()
}
