//! Who takes part, and how each is made ready for its turn.

use crate::kernel::now;
use crate::options::Options;
use crate::vm::Vm;
use crate::wait::{wait_at_most, wait_until};
use crate::{floor, udev};
use serde_json::json;
use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::process::{Child, Command, Stdio};
use std::rc::Rc;
use std::thread;
use std::time::Duration;

/// Everything of the bench's own, on a disk of memory as a program that runs often is.
pub const DIRECTORY: &str = "/run/bench";

/// How long a program may take to be ready; that of an interpreter is long.
const START: Duration = Duration::from_secs(180);

/// The id of QEMU's own scan.
const SCAN: &str = "scan";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Contender {
    /// Nobody: what a plug costs the machine anyway.
    Nobody,
    Floor,
    /// A rule that runs a program which does nothing.
    Stamp,
    Rule,
    Watch,
    HostPort,
    Script,
    Vhotplug,
}

use Contender::{Floor, HostPort, Nobody, Rule, Script, Stamp, Vhotplug, Watch};

impl Contender {
    pub fn all(options: &Options) -> Vec<Contender> {
        let mut all = vec![Nobody, Floor, Stamp, Rule, Watch, HostPort, Script];
        all.extend(options.vhotplug.is_some().then_some(Vhotplug));
        all
    }

    pub fn name(self) -> &'static str {
        match self {
            Nobody => "nobody",
            Floor => "floor",
            Stamp => "stamp",
            Rule => "rule",
            Watch => "watch",
            HostPort => "hostport",
            Script => "script",
            Vhotplug => "vhotplug",
        }
    }

    pub fn attaches(self) -> bool {
        !matches!(self, Nobody | Stamp)
    }

    /// Whether it runs all the time, so that what counts is not its first plug, for which the emulator has yet to
    /// translate its code.
    pub fn stays(self) -> bool {
        matches!(self, Floor | Watch | Vhotplug)
    }

    /// QEMU's own scan is told one port, and takes part in no burst.
    pub fn takes_bursts(self) -> bool {
        self != HostPort
    }

    /// How long its slowest may take.
    pub fn patience(self) -> Duration {
        Duration::from_secs(if self == HostPort { 5 } else { 60 })
    }

    /// The id of a device in the VM.
    pub fn id(self, port: &str, bus: u32, device: u32) -> String {
        match self {
            Floor => floor::id(port),
            HostPort => SCAN.to_owned(),
            Vhotplug => format!("usb{bus}{device}"),
            _ => format!("usb-host-{port}"),
        }
    }
}

/// A contender that is ready, until this is dropped.
pub struct Turn {
    contender: Contender,
    vm: Rc<Vm>,
    daemon: Option<Child>,
}

fn file(name: &str) -> String {
    format!("{DIRECTORY}/{name}")
}

/// Puts the programs in place, and the rules, each of which holds while a file of its name is there.
pub fn prepare(options: &Options, vm: &Vm) {
    fs::create_dir_all(DIRECTORY).unwrap();
    for (from, to) in
        [(&options.tool, "tool"), (&options.stamp, "stamp.run"), (&options.script, "script.run")]
    {
        fs::copy(from, file(to)).expect("the program to measure");
        fs::set_permissions(file(to), fs::Permissions::from_mode(0o755)).unwrap();
    }
    File::create(file("stamps")).unwrap();
    let rule = |contender: Contender, run: &str| {
        let switch = file(contender.name());
        format!(
            "SUBSYSTEM==\"usb\", ENV{{DEVTYPE}}==\"usb_device\", ACTION==\"add|remove\", \
             TEST==\"{switch}\", RUN+=\"{run}\"\n"
        )
    };
    let socket = vm.socket();
    udev::rules(&format!(
        "{}{}{}",
        rule(Rule, &format!("{DIRECTORY}/tool udev {socket}")),
        rule(Script, &format!("{DIRECTORY}/script.run {socket}")),
        rule(Stamp, &format!("{DIRECTORY}/stamp.run {DIRECTORY}/stamps")),
    ));
    fs::write(
        file("watch.toml"),
        format!("[vm.a]\nqmp = \"{socket}\"\n[[rule]]\nvm = \"a\"\nport = \"1-*\"\ntwin = false\n"),
    )
    .unwrap();
    let vhotplug = json!({
        "usbPassthrough": [{"description": "mice", "targetVm": "a",
                            "allow": [{"vendorId": "0627", "productId": "0001"}]}],
        "vms": [{"name": "a", "type": "qemu", "socket": socket}],
    });
    fs::write(file("vhotplug.json"), vhotplug.to_string()).unwrap();
}

/// Starts a program and waits until `word` stands in `log`, where its standard error goes, too.
fn daemon(program: &str, arguments: &[&str], log: &str, word: &str) -> Child {
    let output = File::create(file("errors")).unwrap();
    let log = file(log);
    fs::write(&log, "").unwrap();
    let child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(output)
        .spawn()
        .unwrap_or_else(|error| panic!("{program}: {error}"));
    wait_at_most(START, &format!("{program} is ready"), || {
        fs::read_to_string(&log).unwrap_or_default().contains(word).then_some(())
    });
    child
}

impl Turn {
    pub fn start(
        contender: Contender,
        options: &Options,
        vm: &Rc<Vm>,
        floor_socket: &str,
        port: &str,
    ) -> Turn {
        let mut turn = Turn { contender, vm: Rc::clone(vm), daemon: None };
        match contender {
            Nobody => {}
            Rule | Script | Stamp => {
                File::create(file(contender.name())).unwrap();
            }
            Floor => {
                let bench = std::env::current_exe().unwrap();
                let arguments = ["floor", floor_socket, &file("floor.log")];
                turn.daemon =
                    Some(daemon(bench.to_str().unwrap(), &arguments, "floor.log", "ready"));
            }
            Watch => {
                let arguments = ["--config", &file("watch.toml"), "watch"];
                turn.daemon = Some(daemon(&file("tool"), &arguments, "errors", "ready"));
            }
            HostPort => {
                let (bus, port) = port.split_once('-').expect("a port");
                let device = json!({"driver": "usb-host", "id": SCAN, "hostport": port,
                                    "hostbus": bus.parse::<u32>().unwrap()});
                vm.qmp("device_add", device);
                // Its scans come every two seconds; the plug may come at any time between them.
                thread::sleep(Duration::from_millis(now() / 1_000_000 % 2000));
            }
            Vhotplug => {
                let program = options.vhotplug.as_deref().expect("it takes part");
                let arguments = ["-c", &file("vhotplug.json")];
                turn.daemon =
                    Some(daemon(program, &arguments, "errors", "Waiting for new devices"));
                // It says so before it listens.
                thread::sleep(Duration::from_millis(500));
            }
        }
        turn
    }

    /// What the contender measured itself since the last call, in nanoseconds: when the program of the rule
    /// began to run, or how long the floor's commands took.
    pub fn noted(&self) -> Vec<(String, u64)> {
        let name = match self.contender {
            Stamp => "stamps",
            Floor => "floor.log",
            _ => return Vec::new(),
        };
        let mut text = String::new();
        wait_until("a line in its log", || {
            text = fs::read_to_string(file(name)).unwrap();
            !text.is_empty()
        });
        if self.contender == Stamp {
            File::create(file(name)).unwrap();
        }
        let noted = |line: &str| {
            let (what, time) = line.split_once(' ').unwrap_or(("began", line));
            Some((what.to_owned(), time.parse().ok()?))
        };
        text.lines().filter_map(noted).collect()
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        if let Some(daemon) = &mut self.daemon {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
        let _ = fs::remove_file(file(self.contender.name()));
        for id in self.vm.ids() {
            let _ = self.vm.try_qmp("device_del", json!({"id": id}));
        }
    }
}
