//! Attach, detach and inspect against a QEMU that is played by a thread, for what a real one does not do
//! on demand. The host is a directory; its one device's node may not be opened, so that whoever runs these
//! tests needs no USB hardware.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

mod peer;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::thread::JoinHandle;
use std::time::Duration;

use peer::{Command, Peer};
use serde_json::{Map, Value, json};
use tempfile::TempDir;
use tokio::task::JoinSet;
use usb_qmp_hotplug::Error;
use usb_qmp_hotplug::attach::{self, Attached, Detached, Open, Options};
use usb_qmp_hotplug::host::Host;
use usb_qmp_hotplug::presence::Leftover;
use usb_qmp_hotplug::qemu::qmp::ErrorKind;
use usb_qmp_hotplug::qemu::{
    Access, Attachment, Controller, ControllerKind, GuestPort, Layout, Placement, Vm,
};
use usb_qmp_hotplug::text::chain;
use usb_qmp_hotplug::usb::{Address, Device, DeviceId};

const ENOUGH: Duration = Duration::from_secs(10);

/// A QEMU with one xHCI controller, `xhci.0`.
struct Qemu {
    version: [u32; 3],
    status: &'static str,
    ports: u32,
    /// The host devices that it has: id, bus and address, port.
    devices: BTreeMap<String, (u64, u64, String)>,
    /// Whether it got those as descriptors.
    by_descriptor: bool,
    /// Ports in use by something that it does not tell of.
    in_use: Vec<&'static str>,
    /// It keeps the id of what it removed until it has told that it did, once (QEMU before 6.0).
    frees_late: bool,
    /// A command that it refuses, and its words.
    refuses: Option<(&'static str, &'static str)>,
    /// The command from which on it says nothing any more.
    silent_from: Option<&'static str>,
    /// The command at which it dies.
    dies_at: Option<&'static str>,
    /// What changed something, or was to, in order.
    changes: Vec<String>,
    /// The arguments of each `device_add`.
    added: Vec<Value>,
    /// How many descriptors each set has.
    sets: BTreeMap<i64, usize>,
}

impl Default for Qemu {
    fn default() -> Self {
        Qemu {
            version: [10, 0, 2],
            status: "running",
            ports: 4,
            devices: BTreeMap::new(),
            by_descriptor: true,
            in_use: Vec::new(),
            frees_late: false,
            refuses: None,
            silent_from: None,
            dies_at: None,
            changes: Vec::new(),
            added: Vec::new(),
            sets: BTreeMap::new(),
        }
    }
}

impl Qemu {
    fn with_device(id: &str, bus: u64, address: u64, port: &str) -> Self {
        let devices = BTreeMap::from([(id.to_owned(), (bus, address, port.to_owned()))]);
        Qemu { devices, ..Qemu::default() }
    }

    /// Answers until the client leaves.
    fn serve(mut self, mut peer: Peer) -> Self {
        peer.greet(self.version);
        while let Some(command) = peer.command() {
            if self.dies_at == Some(command.name.as_str()) {
                return self;
            }
            // What follows a passed descriptor must be here already: the client may die at any moment.
            let mut commands = vec![command];
            if commands[0].name == "add-fd" {
                commands.push(peer.next("device_add"));
                commands.push(peer.next("remove-fd"));
            }
            for command in commands {
                if self.silent_from == Some(command.name.as_str()) {
                    peer.rest();
                    return self;
                }
                let descriptor = match command.name.as_str() {
                    "add-fd" => peer.take_descriptor(),
                    _ => None,
                };
                let is_freed = command.name == "device_add" && self.frees_late;
                match self.answer(&command, descriptor.is_some()) {
                    Ok(result) => peer.answer(&command, result),
                    Err((class, desc)) => peer.refuse(&command, class, &desc),
                };
                if is_freed {
                    self.frees_late = false;
                    let data = json!({"device": command.arguments["id"], "path": "/x"});
                    peer.write(format!("{}\r\n", json!({"event": "DEVICE_DELETED", "data": data})));
                }
            }
        }
        self
    }

    fn answer(
        &mut self,
        command: &Command,
        descriptor: bool,
    ) -> Result<Value, (&'static str, String)> {
        let no = |desc: String| Err(("GenericError", desc));
        let text = |name: &str| command.arguments[name].as_str().unwrap_or_default().to_owned();
        let change = match command.name.as_str() {
            "add-fd" | "remove-fd" => Some(command.name.clone()),
            "device_add" if text("driver") == "qemu-xhci" => {
                Some(format!("device_add {}", text("id")))
            }
            "device_add" => Some(format!("device_add {}", text("port"))),
            "device_del" => Some(format!("device_del {}", text("id"))),
            _ => None,
        };
        self.changes.extend(change);
        if let Some((_, desc)) = self.refuses.filter(|(name, _)| *name == command.name) {
            return no(desc.to_owned());
        }
        match command.name.as_str() {
            "qmp_capabilities" => Ok(json!({})),
            "query-status" => Ok(json!({"running": true, "status": self.status})),
            "query-name" => Ok(json!({"name": "played"})),
            "qom-list-types" => Ok(json!([{"name": "usb-host", "parent": "usb-device"}])),
            "qom-list" => self.list(&text("path")).ok_or(()).or_else(|()| not_found(&text("path"))),
            "qom-get" => {
                let found = self.get(&text("path"), &text("property"));
                found.ok_or(()).or_else(|()| not_found(&text("path")))
            }
            "x-query-usb" => Ok(json!({"human-readable-text": self.info_usb()})),
            "human-monitor-command" => Ok(json!(self.info_usb())),
            "add-fd" => {
                assert!(descriptor, "add-fd without a descriptor");
                let set = command.arguments["fdset-id"].as_i64().unwrap();
                *self.sets.entry(set).or_default() += 1;
                Ok(json!({"fd": 20, "fdset-id": set}))
            }
            "remove-fd" => {
                let set = command.arguments["fdset-id"].as_i64().unwrap();
                match self.sets.get_mut(&set) {
                    Some(descriptors) => *descriptors = 0,
                    None => return no(format!("File descriptor named 'fdset-id:{set}' not found")),
                }
                Ok(json!({}))
            }
            "device_add" if text("driver") == "qemu-xhci" => Ok(json!({})),
            "device_add" => {
                let (id, port) = (text("id"), text("port"));
                self.added.push(command.arguments.clone());
                let number = |name: &str| command.arguments[name].as_u64().unwrap();
                let set = text("hostdevice").strip_prefix("/dev/fdset/").map(str::to_owned);
                let set = set.map(|set| self.sets.get(&set.parse().unwrap()).copied());
                if self.frees_late {
                    return no(format!("Duplicate ID '{id}' for device"));
                }
                if self.devices.contains_key(&id) {
                    return no(format!("Duplicate device ID '{id}'"));
                }
                if self.in_use.contains(&port.as_str()) || self.port_is_taken(&port) {
                    return no(format!("usb port {port} (bus xhci.0) not found (in use?)"));
                }
                if set.is_some_and(|descriptors| descriptors != Some(1)) {
                    return no("Failed to find fdset".to_owned());
                }
                self.devices.insert(id, (number("hostbus"), number("hostaddr"), port));
                Ok(json!({}))
            }
            "device_del" => match self.devices.remove(&text("id")) {
                Some(_) => Ok(json!({})),
                None => not_found(&text("id")),
            },
            other => panic!("{other}"),
        }
    }

    fn port_is_taken(&self, port: &str) -> bool {
        self.devices.values().any(|(_, _, taken)| taken == port)
    }

    fn list(&self, path: &str) -> Option<Value> {
        let child =
            |name: &str, kind: &str| json!({"name": name, "type": format!("child<{kind}>")});
        match path {
            "/machine/peripheral" => {
                let mut children: Vec<Value> =
                    self.devices.keys().map(|id| child(id, "usb-host")).collect();
                children.extend((self.ports > 0).then(|| child("xhci", "qemu-xhci")));
                children.push(json!({"name": "type", "type": "string"}));
                Some(Value::Array(children))
            }
            "/machine/peripheral-anon" | "/machine/unattached" => Some(json!([])),
            "/machine/peripheral/xhci" => Some(json!([child("xhci.0", "usb-bus")])),
            _ => None,
        }
    }

    fn get(&self, path: &str, property: &str) -> Option<Value> {
        let id = path.strip_prefix("/machine/peripheral/")?;
        if id == "xhci" {
            return ["p2", "p3"].contains(&property).then(|| json!(self.ports));
        }
        let (bus, address, port) = self.devices.get(id)?;
        match property {
            "hostbus" => Some(json!(bus)),
            "hostaddr" => Some(json!(address)),
            "port" => Some(json!(port)),
            "hostdevice" => Some(json!(if self.by_descriptor { "/dev/fdset/1" } else { "" })),
            "parent_bus" => Some(json!("/machine/peripheral/xhci/xhci.0")),
            _ => None,
        }
    }

    fn info_usb(&self) -> String {
        let line = |(id, (_, address, port)): (&String, &(u64, u64, String))| {
            format!(
                "  Device 0.{address}, Port {port}, Speed 480 Mb/s, Product Stick, ID: {id}\r\n"
            )
        };
        self.devices.iter().map(line).collect()
    }
}

fn not_found(what: &str) -> Result<Value, (&'static str, String)> {
    Err(("DeviceNotFound", format!("Device '{what}' not found")))
}

/// A QEMU that is asked, and the socket's directory.
async fn vm(qemu: Qemu, time: Duration) -> (Vm, JoinHandle<Qemu>, TempDir) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("vm.qmp");
    let listener = UnixListener::bind(&path).unwrap();
    let served = std::thread::spawn(move || qemu.serve(Peer::new(listener.accept().unwrap().0)));
    (Vm::connect(&path.into(), time).await.unwrap(), served, directory)
}

/// The end of a conversation: what became of the QEMU.
fn end(vm: Vm, served: JoinHandle<Qemu>) -> Qemu {
    drop(vm);
    served.join().unwrap()
}

fn guest_ports(ports: &[&str]) -> Vec<GuestPort> {
    ports.iter().map(|port| GuestPort { bus: "xhci.0".into(), port: (*port).into() }).collect()
}

fn id() -> DeviceId {
    "usb-host-1-1.2".parse().unwrap()
}

fn address() -> Address {
    "1:37".parse().unwrap()
}

/// Attaches by a descriptor (of something else, which a played QEMU does not mind).
async fn attach_descriptor(vm: &mut Vm, ports: &[&str]) -> Result<GuestPort, Error> {
    let null = File::open("/dev/null").unwrap().into();
    let access = Access::Descriptor(&null);
    let (id, options) = (id(), Map::new());
    let attachment = Attachment { id: &id, address: address(), options: &options };
    Ok(vm.attach(&attachment, &access, &guest_ports(ports)).await?.unwrap())
}

// The descriptor.

#[tokio::test]
async fn a_device_is_added_by_descriptor_and_none_is_left_in_its_set() {
    let (mut vm, served, _directory) = vm(Qemu::default(), ENOUGH).await;
    let guest_port = attach_descriptor(&mut vm, &["3", "4"]).await.unwrap();
    assert_eq!(guest_port.to_string(), "xhci.0 port 3");
    let qemu = end(vm, served);
    assert_eq!(qemu.changes, ["add-fd", "device_add 3", "remove-fd"]);
    let set = *qemu.sets.keys().next().unwrap();
    let expected = json!({
        "driver": "usb-host", "id": "usb-host-1-1.2", "bus": "xhci.0", "port": "3",
        "hostbus": 1, "hostaddr": 37, "hostdevice": format!("/dev/fdset/{set}"),
    });
    assert_eq!(qemu.added, [expected]);
    assert!(set > 0 && qemu.sets[&set] == 0, "{:?}", qemu.sets);
}

#[tokio::test]
async fn one_set_serves_all_attaches_through_a_socket() {
    let (mut vm, served, _directory) = vm(Qemu::default(), ENOUGH).await;
    for _ in 0..3 {
        attach_descriptor(&mut vm, &["1"]).await.unwrap();
        assert!(vm.detach(&id()).await.unwrap());
    }
    assert_eq!(end(vm, served).sets.len(), 1);
}

#[tokio::test]
async fn it_is_the_same_set_however_the_sockets_path_is_written() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("vm.qmp");
    let listener = UnixListener::bind(&path).unwrap();
    let link = directory.path().join("link.qmp");
    std::os::unix::fs::symlink("vm.qmp", &link).unwrap();
    let served = std::thread::spawn(move || {
        let serve = |qemu: Qemu, _| qemu.serve(Peer::new(listener.accept().unwrap().0));
        (0..3).fold(Qemu::default(), serve)
    });
    for path in [path.clone(), link, directory.path().join("./vm.qmp")] {
        let mut vm = Vm::connect(&path.into(), ENOUGH).await.unwrap();
        attach_descriptor(&mut vm, &["1"]).await.unwrap();
        assert!(vm.detach(&id()).await.unwrap());
    }
    assert_eq!(served.join().unwrap().sets.len(), 1);
}

#[tokio::test]
async fn a_port_in_use_is_passed_over() {
    let qemu = Qemu { in_use: vec!["1", "2"], ..Qemu::default() };
    let (mut vm, served, _directory) = vm(qemu, ENOUGH).await;
    let guest_port = attach_descriptor(&mut vm, &["1", "2", "3", "4"]).await.unwrap();
    assert_eq!(guest_port.port, "3");
    let qemu = end(vm, served);
    let each = ["1", "2", "3"].map(|port| format!("add-fd device_add {port} remove-fd"));
    assert_eq!(qemu.changes.join(" "), each.join(" "));
    assert!(qemu.sets.values().all(|descriptors| *descriptors == 0));
}

#[tokio::test]
async fn where_every_port_is_in_use_qemu_has_the_last_word() {
    let qemu = Qemu { in_use: vec!["1", "2"], ..Qemu::default() };
    let (mut vm, served, _directory) = vm(qemu, ENOUGH).await;
    let error = attach_descriptor(&mut vm, &["1", "2"]).await.unwrap_err();
    assert_eq!(error.exit_code(), 6);
    assert!(chain(&error).contains("usb port 2 (bus xhci.0) not found (in use?)"), "{error}");
    end(vm, served);
}

#[tokio::test]
async fn a_refused_device_leaves_no_descriptor_and_the_vm_usable() {
    let desc = "failed to open host usb device /dev/fdset/1";
    let qemu = Qemu { refuses: Some(("device_add", desc)), ..Qemu::default() };
    let (mut vm, served, _directory) = vm(qemu, ENOUGH).await;
    let error = attach_descriptor(&mut vm, &["1", "2"]).await.unwrap_err();
    assert_eq!(error.exit_code(), 6);
    assert!(error.to_string().contains(desc), "{error}");
    assert_eq!(vm.host_devices().await.unwrap(), []);
    let qemu = end(vm, served);
    assert_eq!(qemu.changes, ["add-fd", "device_add 1", "remove-fd"], "tried elsewhere, too");
    assert!(qemu.sets.values().all(|descriptors| *descriptors == 0));
}

#[tokio::test]
async fn a_refused_descriptor_is_the_error_and_leaves_the_vm_usable() {
    let desc = "No file descriptor supplied via SCM_RIGHTS";
    let qemu = Qemu { refuses: Some(("add-fd", desc)), ..Qemu::default() };
    let (mut vm, served, _directory) = vm(qemu, ENOUGH).await;
    let error = attach_descriptor(&mut vm, &["1", "2"]).await.unwrap_err();
    assert_eq!(error.exit_code(), 6);
    assert!(error.to_string().contains(desc), "{error}");
    assert_eq!(vm.host_devices().await.unwrap(), []);
    assert_eq!(end(vm, served).changes, ["add-fd", "device_add 1", "remove-fd"]);
}

// Time, and the end.

/// Time enough to connect and to begin, on a busy machine too.
const SHORT: Duration = Duration::from_secs(1);

#[tokio::test]
async fn a_qemu_that_falls_silent_in_an_attach_did_not_answer_in_time() {
    let mut cases = JoinSet::new();
    for from in ["add-fd", "device_add", "remove-fd"] {
        cases.spawn(async move {
            let qemu = Qemu { silent_from: Some(from), ..Qemu::default() };
            let (mut vm, served, _directory) = vm(qemu, SHORT).await;
            let error = attach_descriptor(&mut vm, &["1", "2"]).await.unwrap_err();
            assert_eq!(error.exit_code(), 5, "{from}: {}", chain(&error));
            end(vm, served);
        });
    }
    cases.join_all().await;
}

#[tokio::test]
async fn a_qemu_that_dies_in_an_attach_is_a_lost_connection() {
    let qemu = Qemu { dies_at: Some("add-fd"), ..Qemu::default() };
    let (mut vm, served, _directory) = vm(qemu, ENOUGH).await;
    let error = attach_descriptor(&mut vm, &["1", "2"]).await.unwrap_err();
    assert!(chain(&error).contains("connection was lost"), "{}", chain(&error));
    end(vm, served);
}

#[tokio::test]
async fn a_qemu_that_falls_silent_in_an_inspect_did_not_answer_in_time() {
    let mut cases = JoinSet::new();
    for from in ["qmp_capabilities", "query-status", "query-name", "qom-list", "qom-get"] {
        cases.spawn(async move {
            let qemu = Qemu::with_device("usb-host-1-1.2", 1, 37, "1");
            let qemu = Qemu { silent_from: Some(from), ..qemu };
            let (mut vm, served, _directory) = vm(qemu, SHORT).await;
            let error = vm.inspect().await.unwrap_err();
            assert!(matches!(error.kind, ErrorKind::NoReply { .. }), "{from}: {error:?}");
            end(vm, served);
        });
    }
    cases.join_all().await;
}

#[tokio::test]
async fn inspect_passes_over_what_a_qemu_does_not_have() {
    for without in ["query-status", "query-name", "x-query-usb", "qom-get"] {
        let qemu = Qemu::with_device("usb-host-1-1.2", 1, 37, "1");
        let qemu = Qemu { refuses: Some((without, "not here")), ..qemu };
        let (mut vm, served, _directory) = vm(qemu, ENOUGH).await;
        let inventory = vm.inspect().await.unwrap();
        assert_eq!(inventory.devices.len(), 1, "{without}");
        assert_eq!(inventory.devices[0].id.as_deref(), Some("usb-host-1-1.2"));
        end(vm, served);
    }
}

#[tokio::test]
async fn the_real_ports_are_asked_of_whatever_command_a_qemu_has() {
    for (version, without) in [
        ([11, 1, 0], "human-monitor-command"),
        ([6, 2, 0], "human-monitor-command"),
        ([6, 1, 0], "x-query-usb"),
    ] {
        let qemu = Qemu::with_device("usb-host-1-1.2", 1, 37, "1");
        let qemu = Qemu { refuses: Some((without, "not here")), version, ..qemu };
        let (mut vm, served, _directory) = vm(qemu, ENOUGH).await;
        let inventory = vm.inspect().await.unwrap();
        assert!(inventory.devices[0].speed.is_some(), "{version:?}: {:?}", inventory.devices);
        end(vm, served);
    }
}

#[tokio::test]
async fn inspect_takes_a_run_state_that_nobody_knows_yet() {
    let qemu = Qemu { status: "levitating", ..Qemu::default() };
    let (mut vm, served, _directory) = vm(qemu, ENOUGH).await;
    vm.inspect().await.unwrap();
    end(vm, served);
}

// The host: a directory.

struct Machine {
    root: TempDir,
}

impl Machine {
    /// With a stick at port 1-1.2, whose node nobody may open.
    fn new() -> Self {
        let machine = Machine { root: tempfile::tempdir().unwrap() };
        machine.stick_at("37");
        machine.write("sys/bus/usb/devices/1-1.2/speed", "480\n");
        let node = machine.write("dev/bus/usb/001/037", "");
        fs::set_permissions(node, fs::Permissions::from_mode(0o000)).unwrap();
        obey_permissions();
        machine
    }

    fn write(&self, path: &str, text: &str) -> PathBuf {
        let path = self.root.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
        path
    }

    fn stick_at(&self, address: &str) {
        let numbers =
            [("busnum", "1"), ("devnum", address), ("idVendor", "152d"), ("idProduct", "2338")];
        for (name, value) in numbers.into_iter().chain([("bDeviceClass", "00")]) {
            self.write(&format!("sys/bus/usb/devices/1-1.2/{name}"), &format!("{value}\n"));
        }
    }

    /// The kernel lists all locks, and they are these.
    fn locks(&self, locks: &str) {
        self.write("proc/locks", locks);
        let namespace = self.root.path().join("proc/self/ns/pid");
        fs::create_dir_all(namespace.parent().unwrap()).unwrap();
        std::os::unix::fs::symlink("pid:[4026531836]", namespace).unwrap();
    }

    /// The stick's node is locked.
    fn lock(&self) {
        let node = fs::metadata(self.root.path().join("dev/bus/usb/001/037")).unwrap();
        let (major, minor) = (rustix::fs::major(node.dev()), rustix::fs::minor(node.dev()));
        let file = format!("{major:02x}:{minor:02x}:{}", node.ino());
        self.locks(&format!("1: FLOCK  ADVISORY  WRITE 77 {file} 0 EOF\n"));
    }

    /// The stick's disk is mounted.
    fn mount(&self) {
        let disk = "sys/bus/usb/devices/1-1.2/1-1.2:1.0/host2/target2:0:0/2:0:0:0/block/sdb";
        self.write(&format!("{disk}/dev"), "8:16\n");
        self.write("proc/self/mountinfo", "40 21 8:16 / /media/stick rw - vfat /dev/sdb rw\n");
    }

    fn host(&self) -> Host {
        Host::at(self.root.path())
    }

    fn device(&self) -> Device {
        self.host().device(&"1-1.2".parse().unwrap()).unwrap().unwrap()
    }
}

/// Lets this thread open only what permissions say: root may open everything otherwise.
fn obey_permissions() {
    use rustix::thread::{CapabilitySet, capabilities, set_capabilities};
    let mut sets = capabilities(None).unwrap();
    sets.effective.remove(CapabilitySet::DAC_OVERRIDE);
    set_capabilities(None, sets).unwrap();
}

async fn attach(
    machine: &Machine,
    qemu: Qemu,
    options: &Options,
) -> (Result<Attached, Error>, Qemu) {
    let (mut vm, served, _directory) = vm(qemu, ENOUGH).await;
    let attached = attach::attach(&machine.host(), &mut vm, &machine.device(), options).await;
    (attached, end(vm, served))
}

/// What is known of a VM after an earlier conversation with it.
fn known(taken: &[&str]) -> Layout {
    let controller = Controller {
        bus: "xhci.0".into(),
        bus_path: "/machine/peripheral/xhci/xhci.0".into(),
        kind: ControllerKind::Xhci,
        usb2_ports: 4,
        usb3_ports: 4,
        companion_ports: BTreeSet::new(),
    };
    let (controllers, taken) = (vec![controller], guest_ports(taken));
    Layout { controllers, taken, by_id: BTreeMap::new() }
}

#[tokio::test]
async fn a_vm_that_is_known_is_asked_nothing_before_it_gets_a_device() {
    let machine = Machine::new();
    // It would answer no question.
    let qemu = Qemu { refuses: Some(("qom-list", "not now")), ..Qemu::default() };
    let (mut vm, served, _directory) = vm(qemu, ENOUGH).await;
    vm.layout = Some(known(&["4"]));
    let attached =
        attach::attach(&machine.host(), &mut vm, &machine.device(), &Options::default()).await;
    let [guest_port] = guest_ports(&["3"]).try_into().unwrap();
    assert_eq!(attached.unwrap(), Attached::There(guest_port.clone()));
    // From then on that port is known to be in use, and free again when it is.
    assert_eq!(vm.layout.as_ref().unwrap().taken, guest_ports(&["4", "3"]));
    assert!(vm.detach(&id()).await.unwrap());
    assert_eq!(vm.layout.as_ref().unwrap().taken, guest_ports(&["4"]));
    assert_eq!(end(vm, served).changes, ["device_add 3", "device_del usb-host-1-1.2", "remove-fd"]);
}

#[tokio::test]
async fn a_vm_that_is_not_as_it_was_known_is_asked_and_gets_the_device_elsewhere() {
    let machine = Machine::new();
    let (device, host) = (machine.device(), machine.host());
    let cases = [
        // Somebody else has the port by now.
        Qemu { in_use: vec!["4"], ..Qemu::default() },
        Qemu::with_device("other", 1, 99, "4"),
        // An earlier device of this port was not detached.
        Qemu::with_device("usb-host-1-1.2", 1, 36, "3"),
    ];
    for (qemu, port) in cases.into_iter().zip(["3", "3", "4"]) {
        let (mut vm, served, _directory) = vm(qemu, ENOUGH).await;
        vm.layout = Some(known(&[]));
        let attached = attach::attach(&host, &mut vm, &device, &Options::default()).await;
        let [guest_port] = guest_ports(&[port]).try_into().unwrap();
        assert_eq!(attached.unwrap(), Attached::There(guest_port));
        assert_eq!(end(vm, served).changes[0], "device_add 4");
    }
}

#[tokio::test]
async fn a_node_that_only_qemu_may_open_is_named_to_it() {
    let machine = Machine::new();
    let (attached, qemu) = attach(&machine, Qemu::default(), &Options::default()).await;
    let [guest_port] = guest_ports(&["4"]).try_into().unwrap();
    assert_eq!(attached.unwrap(), Attached::There(guest_port));
    assert_eq!(qemu.added[0]["hostdevice"], "/dev/bus/usb/001/037");
    assert_eq!(qemu.changes, ["device_add 4"]);
}

#[tokio::test]
async fn an_old_qemu_gets_the_address_alone() {
    for version in [[4, 2, 0], [5, 1, 0]] {
        let machine = Machine::new();
        let qemu = Qemu { version, ..Qemu::default() };
        let (attached, qemu) = attach(&machine, qemu, &Options::default()).await;
        attached.unwrap();
        let expected = json!({
            "driver": "usb-host", "id": "usb-host-1-1.2", "bus": "xhci.0", "port": "4",
            "hostbus": 1, "hostaddr": 37,
        });
        assert_eq!((qemu.changes, qemu.added), (vec!["device_add 4".into()], vec![expected]));
    }
}

#[tokio::test]
async fn the_address_alone_is_what_open_address_means() {
    let machine = Machine::new();
    let options = Options { open: Open::Address, ..Options::default() };
    let (attached, qemu) = attach(&machine, Qemu::default(), &options).await;
    attached.unwrap();
    assert_eq!(qemu.added[0].get("hostdevice"), None);
}

#[tokio::test]
async fn properties_of_the_user_reach_qemu() {
    let machine = Machine::new();
    let properties = Map::from_iter([("guest-reset".to_owned(), json!(false))]);
    let options = Options { properties, ..Options::default() };
    let (attached, qemu) = attach(&machine, Qemu::default(), &options).await;
    attached.unwrap();
    assert_eq!(qemu.added[0]["guest-reset"], json!(false));
}

#[tokio::test]
async fn what_an_earlier_device_left_behind_is_replaced() {
    let machine = Machine::new();
    let qemu = Qemu::with_device("usb-host-1-1.2", 1, 36, "4");
    let (attached, qemu) = attach(&machine, qemu, &Options::default()).await;
    let [guest_port] = guest_ports(&["4"]).try_into().unwrap();
    assert_eq!(attached.unwrap(), Attached::There(guest_port), "its port is free again");
    assert_eq!(qemu.changes, REPLACED);
}

/// Out with the old device, and with what its attach may have left; in with the new one.
const REPLACED: [&str; 3] = ["device_del usb-host-1-1.2", "remove-fd", "device_add 4"];

#[tokio::test]
async fn a_leftover_stays_where_another_device_came_since_it_was_looked_for() {
    let machine = Machine::new();
    let (device, host) = (machine.device(), machine.host());
    machine.stick_at("38");
    let qemu = Qemu::with_device("usb-host-1-1.2", 1, 38, "1");
    let (mut vm, served, _directory) = vm(qemu, ENOUGH).await;
    let error = attach::attach(&host, &mut vm, &device, &Options::default()).await.unwrap_err();
    assert_eq!(error.exit_code(), 3, "{error}");
    assert_eq!(end(vm, served).changes, [""; 0]);
}

#[tokio::test]
async fn a_device_that_is_there_already_stays_as_it_is_and_nothing_is_left_in_its_set() {
    let machine = Machine::new();
    machine.lock();
    let qemu = Qemu::with_device("usb-host-1-1.2", 1, 37, "1");
    // What this process may not see (/proc/PID/fd of another user's QEMU) is believed.
    let (attached, qemu) = attach(&machine, qemu, &Options::default()).await;
    assert_eq!(attached.unwrap(), Attached::Already);
    assert_eq!(qemu.changes, ["remove-fd"]);
}

#[tokio::test]
async fn what_cannot_be_known_is_not_detached() {
    let machine = Machine::new();
    // Without a list of locks, and where QEMU opened the node itself.
    for by_descriptor in [true, false] {
        let qemu = Qemu { by_descriptor, ..Qemu::with_device("usb-host-1-1.2", 1, 37, "1") };
        let (attached, qemu) = attach(&machine, qemu, &Options::default()).await;
        assert_eq!(attached.unwrap(), Attached::Already);
        assert_eq!(qemu.changes, ["remove-fd"]);
    }
}

#[tokio::test]
async fn what_is_not_locked_any_more_is_replaced() {
    let machine = Machine::new();
    machine.locks("");
    let qemu = Qemu::with_device("usb-host-1-1.2", 1, 37, "1");
    let (attached, qemu) = attach(&machine, qemu, &Options::default()).await;
    assert!(matches!(attached.unwrap(), Attached::There(_)));
    assert_eq!(qemu.changes, [&["remove-fd"], &REPLACED[..]].concat());
}

#[tokio::test]
async fn what_qemu_opened_itself_is_replaced_when_the_host_drives_it_again() {
    let machine = Machine::new();
    let interface = machine.root.path().join("sys/bus/usb/devices/1-1.2/1-1.2:1.0");
    fs::create_dir(&interface).unwrap();
    std::os::unix::fs::symlink("../drivers/usb-storage", interface.join("driver")).unwrap();
    let qemu = Qemu { by_descriptor: false, ..Qemu::with_device("usb-host-1-1.2", 1, 37, "1") };
    let (attached, qemu) = attach(&machine, qemu, &Options::default()).await;
    assert!(matches!(attached.unwrap(), Attached::There(_)));
    assert_eq!(qemu.changes, [&["remove-fd"], &REPLACED[..]].concat());
}

#[tokio::test]
async fn an_address_that_came_round_again_does_not_hide_a_new_device() {
    let machine = Machine::new();
    // The process at the other end of the socket is this one, and has no USB device open.
    machine.write(&format!("proc/{}/fd/x", std::process::id()), "");
    let qemu = Qemu::with_device("usb-host-1-1.2", 1, 37, "1");
    let (attached, qemu) = attach(&machine, qemu, &Options::default()).await;
    assert!(matches!(attached.unwrap(), Attached::There(_)));
    assert_eq!(qemu.changes, [&["remove-fd"], &REPLACED[..]].concat());
}

#[tokio::test]
async fn a_vm_that_waits_for_its_state_gets_nothing() {
    let machine = Machine::new();
    for dry_run in [false, true] {
        let options = Options { dry_run, ..Options::default() };
        let qemu = Qemu { status: "inmigrate", ..Qemu::with_device("usb-host-1-1.2", 1, 36, "1") };
        let (attached, qemu) = attach(&machine, qemu, &options).await;
        let error = attached.unwrap_err();
        assert!(matches!(error, Error::Incoming { .. }), "{error}");
        assert_eq!((error.exit_code(), qemu.changes), (7, Vec::new()));
    }
}

#[tokio::test]
async fn an_id_that_an_old_qemu_frees_a_moment_later_is_waited_for() {
    let machine = Machine::new();
    let qemu = Qemu {
        version: [5, 2, 0],
        frees_late: true,
        ..Qemu::with_device("usb-host-1-1.2", 1, 36, "1")
    };
    let (attached, qemu) = attach(&machine, qemu, &Options::default()).await;
    assert!(matches!(attached.unwrap(), Attached::There(_)));
    assert_eq!(qemu.changes, [&REPLACED[..], &["device_add 4"]].concat());
}

#[tokio::test]
async fn an_id_that_is_never_freed_is_qemus_refusal() {
    let refuses = Some(("device_add", "Duplicate ID 'usb-host-1-1.2' for device"));
    let (mut vm, served, _directory) = vm(Qemu { refuses, ..Qemu::default() }, ENOUGH).await;
    let error = attach_descriptor(&mut vm, &["1"]).await.unwrap_err();
    assert_eq!(error.exit_code(), 6, "{error}");
    assert_eq!(vm.host_devices().await.unwrap(), []);
    end(vm, served);
}

#[tokio::test]
async fn a_dry_run_changes_nothing() {
    let options = Options { dry_run: true, ..Options::default() };
    for address in [36, 37] {
        let machine = Machine::new();
        let qemu = Qemu::with_device("usb-host-1-1.2", 1, address, "1");
        let (attached, qemu) = attach(&machine, qemu, &options).await;
        attached.unwrap();
        assert!(qemu.changes.is_empty(), "{:?}", qemu.changes);
    }
}

#[tokio::test]
async fn a_dry_run_sees_the_port_that_a_leftover_would_give_back() {
    let machine = Machine::new();
    let options = Options { dry_run: true, ..Options::default() };
    let qemu = Qemu { ports: 1, ..Qemu::with_device("usb-host-1-1.2", 1, 36, "1") };
    let (attached, qemu) = attach(&machine, qemu, &options).await;
    let [guest_port] = guest_ports(&["1"]).try_into().unwrap();
    assert_eq!(attached.unwrap(), Attached::There(guest_port));
    assert!(qemu.changes.is_empty(), "{:?}", qemu.changes);
}

#[tokio::test]
async fn a_leftover_stays_where_its_device_is_gone_too() {
    let machine = Machine::new();
    fs::remove_file(machine.root.path().join("dev/bus/usb/001/037")).unwrap();
    let qemu = Qemu::with_device("usb-host-1-1.2", 1, 36, "4");
    let (attached, qemu) = attach(&machine, qemu, &Options::default()).await;
    assert_eq!(attached.unwrap_err().exit_code(), 3);
    assert!(qemu.changes.is_empty(), "{:?}", qemu.changes);
}

#[tokio::test]
async fn a_mounted_disk_stays_with_the_host_unless_forced() {
    let machine = Machine::new();
    machine.mount();
    let (attached, qemu) = attach(&machine, Qemu::default(), &Options::default()).await;
    let error = attached.unwrap_err();
    assert_eq!(error.exit_code(), 7);
    assert!(error.to_string().contains("/media/stick"), "{error}");
    assert!(qemu.changes.is_empty(), "{:?}", qemu.changes);
    let options = Options { force: true, ..Options::default() };
    let (attached, qemu) = attach(&machine, Qemu::default(), &options).await;
    attached.unwrap();
    assert_eq!(qemu.changes, ["device_add 4"]);
}

#[tokio::test]
async fn a_hub_stays_with_the_host_even_if_forced() {
    let machine = Machine::new();
    machine.write("sys/bus/usb/devices/1-1.2/bDeviceClass", "09\n");
    let options = Options { force: true, ..Options::default() };
    let (attached, qemu) = attach(&machine, Qemu::default(), &options).await;
    let error = attached.unwrap_err();
    assert_eq!(error.exit_code(), 7);
    assert!(error.to_string().contains("is a hub"), "{error}");
    assert!(qemu.changes.is_empty(), "{:?}", qemu.changes);
}

#[tokio::test]
async fn a_taken_port_is_not_even_tried() {
    let machine = Machine::new();
    let qemu = Qemu::with_device("usb-host-1-1.3", 1, 38, "4");
    let (attached, qemu) = attach(&machine, qemu, &Options::default()).await;
    attached.unwrap();
    assert_eq!(qemu.changes, ["device_add 3"]);
}

#[tokio::test]
async fn a_port_that_the_user_chose_is_the_only_one_tried() {
    let machine = Machine::new();
    let placement = Placement { bus: Some("xhci.0".into()), port: Some("1".into()) };
    let options = Options { placement, ..Options::default() };
    let qemu = Qemu::with_device("usb-host-1-1.3", 1, 38, "1");
    let (attached, qemu) = attach(&machine, qemu, &options).await;
    assert_eq!(attached.unwrap_err().exit_code(), 6);
    assert_eq!(qemu.changes, ["device_add 1"]);
}

#[tokio::test]
async fn a_vm_without_room_says_what_to_add() {
    let machine = Machine::new();
    let full = Qemu { ports: 1, ..Qemu::with_device("usb-host-1-1.3", 1, 38, "1") };
    let none = Qemu { ports: 0, ..Qemu::default() };
    for (qemu, words) in [(full, "no free port on xhci.0"), (none, "no USB controller")] {
        let (attached, qemu) = attach(&machine, qemu, &Options::default()).await;
        let error = attached.unwrap_err();
        assert_eq!(error.exit_code(), 6);
        let text = chain(&error);
        assert!(text.contains(words) && text.contains("-device qemu-xhci,id="), "{text}");
        assert!(qemu.changes.is_empty(), "{:?}", qemu.changes);
    }
}

#[tokio::test]
async fn a_vm_without_room_gets_a_controller_if_the_user_wants_it() {
    let machine = Machine::new();
    let full = || Qemu { ports: 1, ..Qemu::with_device("usb-host-1-1.3", 1, 38, "1") };
    for (qemu, dry_run) in [(full(), false), (Qemu { ports: 0, ..Qemu::default() }, true)] {
        let options = Options { add_controller: true, dry_run, ..Options::default() };
        let (attached, qemu) = attach(&machine, qemu, &options).await;
        let place = GuestPort { bus: "usb-qmp-hotplug-xhci.0".into(), port: "15".into() };
        assert_eq!(attached.unwrap(), Attached::There(place));
        let changes = ["device_add usb-qmp-hotplug-xhci", "device_add 15"];
        assert_eq!(qemu.changes, if dry_run { &[] } else { &changes[..] });
    }
    let placement = Placement { bus: Some("xhci.0".into()), port: None };
    let options = Options { add_controller: true, placement, ..Options::default() };
    let (attached, qemu) = attach(&machine, full(), &options).await;
    assert!(chain(&attached.unwrap_err()).contains("no free port on xhci.0"));
    assert!(qemu.changes.is_empty(), "{:?}", qemu.changes);
}

// Detach.

#[tokio::test]
async fn a_device_that_is_not_there_is_no_error_to_detach() {
    let (mut vm, served, _directory) = vm(Qemu::default(), ENOUGH).await;
    assert!(!vm.detach(&id()).await.unwrap());
    assert_eq!(clear(&Machine::new(), &mut vm, None).await, Detached::NotThere);
    // What an attach may have left goes in any case.
    assert_eq!(end(vm, served).changes, ["device_del usb-host-1-1.2", "remove-fd", "remove-fd"]);
}

#[tokio::test]
async fn the_removal_of_an_old_device_leaves_a_newer_one_at_its_port() {
    let machine = Machine::new();
    let qemu = Qemu::with_device("usb-host-1-1.2", 1, 38, "1");
    let (mut vm, served, _directory) = vm(qemu, ENOUGH).await;
    assert_eq!(clear(&machine, &mut vm, Some(address())).await, Detached::NotThere);
    let newer = Some("1:38".parse().unwrap());
    assert_eq!(clear(&machine, &mut vm, newer).await, Detached::Leftover(Leftover::Replaced));
    assert_eq!(end(vm, served).changes, ["device_del usb-host-1-1.2", "remove-fd"]);
}

async fn clear(machine: &Machine, vm: &mut Vm, address: Option<Address>) -> Detached {
    attach::detach_leftover(&machine.host(), vm, &id(), address).await.unwrap()
}

#[tokio::test]
async fn what_is_still_there_stays_whatever_is_said_of_it() {
    let machine = Machine::new();
    let qemu = Qemu::with_device("usb-host-1-1.2", 1, 37, "1");
    let (mut vm, served, _directory) = vm(qemu, ENOUGH).await;
    // The kernel resets it: for a moment it has no address.
    machine.stick_at("0");
    assert_eq!(clear(&machine, &mut vm, Some(address())).await, Detached::Stays);
    machine.stick_at("37");
    machine.lock();
    assert_eq!(clear(&machine, &mut vm, Some(address())).await, Detached::Stays);
    assert_eq!(clear(&machine, &mut vm, None).await, Detached::Stays);
    // A host that shows no devices shows none that is gone.
    fs::remove_dir_all(machine.root.path().join("sys")).unwrap();
    assert_eq!(clear(&machine, &mut vm, None).await, Detached::Stays);
    machine.write("sys/bus/usb/devices/usb1/uevent", "");
    assert_eq!(clear(&machine, &mut vm, None).await, Detached::Leftover(Leftover::Gone));
    assert_eq!(end(vm, served).changes, ["device_del usb-host-1-1.2", "remove-fd"]);
}
