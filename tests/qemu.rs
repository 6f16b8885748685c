//! The program and its library against a real QEMU with emulated devices. No root and no USB hardware is
//! needed, only a `qemu-system-x86_64`, or another one that `QEMU` names; without it, the tests are
//! reported as ignored.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

mod tool;

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use libtest_mimic::{Arguments, Trial};
use qapi::qmp::{cont, qom_get, query_fdsets};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Map, Value};
use tempfile::TempDir;
use tool::{Outcome, PROGRAM, outcome_of, program};
use usb_qmp_hotplug::Error;
use usb_qmp_hotplug::qemu::{Access, Attachment, Vm};
use usb_qmp_hotplug::qemu::{GuestPort, NoGuestPort, Placement};
use usb_qmp_hotplug::usb::DeviceId;

/// How long anything may take: only what fails takes so long.
const PATIENCE: Duration = Duration::from_secs(60);

/// Runs the program, and gives QEMU a minute, not the usual 5 s, unless the test says otherwise.
#[track_caller]
fn run<'a>(arguments: impl IntoIterator<Item = &'a str>) -> Outcome {
    let mut arguments: Vec<&str> = arguments.into_iter().collect();
    if !arguments.contains(&"--timeout") {
        arguments.extend(["--timeout", "60"]);
    }
    tool::run(arguments)
}

/// `tests![a, b]`: the functions `a` and `b`, and their names.
macro_rules! tests {
    ($($name:ident),+ $(,)?) => { [$((stringify!($name), $name as fn())),+] };
}

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let no_qemu = missing(&qemu());
    if let Some(error) = &no_qemu {
        eprintln!("qemu: tests are ignored: cannot run {:?}: {error}", qemu());
    }
    let no_strace = missing("strace".as_ref());
    let tests = tests![
        inspect_shows_controllers_hubs_and_devices_of_all_kinds,
        inspect_names_each_device_where_qemu_added_a_hub,
        inspect_names_each_device_where_qemu_added_one_of_its_own,
        inspect_does_not_guess_where_nothing_tells_the_buses_apart,
        inspect_of_no_controller_says_so,
        inspect_of_no_device_says_so,
        inspect_copes_with_sixty_devices,
        inspect_reads_a_pretty_printing_monitor,
        inspect_shows_a_hostile_name_without_its_control_characters,
        a_vm_that_runs_is_meant_by_its_name,
        a_name_that_two_vms_have_means_neither,
        a_name_means_nothing_to_udev,
        a_monitor_in_a_file_of_options_is_found,
        eight_inspects_at_once_take_turns,
        a_monitor_that_another_client_holds_is_exit_5_with_advice,
        a_stopped_qemu_is_exit_5_and_answers_when_it_runs_again,
        a_killed_qemu_is_exit_4_and_nothing_to_do_for_udev,
        what_qemu_refuses_is_exit_6_in_its_words,
        a_port_in_use_is_passed_over_for_the_next,
        a_failed_attach_leaves_no_descriptor_in_a_set,
        a_survey_finds_the_free_ports_of_all_controllers,
        a_survey_finds_the_controller_of_the_board,
        a_vm_without_a_port_gets_a_controller,
        a_controller_goes_to_a_free_slot_of_a_q35_machine,
        a_machine_without_a_slot_gets_no_controller,
        only_devices_of_the_host_can_be_detached,
        a_removal_of_what_the_vm_does_not_have_is_nothing_to_do,
        a_closed_standard_output_is_no_failure,
        a_full_standard_output_is_a_failure,
        udev_opens_nothing_it_does_not_need_and_starts_no_thread,
    ];
    let trials = tests.into_iter().map(|(name, test)| {
        let is_ignored = no_qemu.is_some() || (name.starts_with("udev_") && no_strace.is_some());
        Trial::test(name, move || {
            test();
            Ok(())
        })
        .with_ignored_flag(is_ignored)
    });
    libtest_mimic::run(&arguments, trials.collect()).exit_code()
}

fn qemu() -> OsString {
    std::env::var_os("QEMU").unwrap_or_else(|| "qemu-system-x86_64".into())
}

/// Why a program cannot be run.
fn missing(name: &std::ffi::OsStr) -> Option<std::io::Error> {
    Command::new(name).arg("--version").output().err()
}

/// A QEMU whose machine does not start, so that it costs next to no time.
struct Qemu {
    child: Child,
    directory: TempDir,
}

impl Qemu {
    /// With a monitor at [`Qemu::socket`].
    fn start(arguments: &str) -> Self {
        Qemu::with(|socket| format!("-qmp unix:{socket},server=on,wait=off {arguments}"))
    }

    /// With a monitor that the arguments put at the path they are given.
    fn with(arguments: impl FnOnce(&str) -> String) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let log = File::create(directory.path().join("log")).unwrap();
        let socket = directory.path().join("vm.qmp");
        let machine = "-machine pc,accel=tcg -m 16 -S -display none -nodefaults -no-user-config";
        let child = Command::new(qemu())
            .args(machine.split(' '))
            .args(arguments(socket.to_str().unwrap()).split_whitespace())
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let mut qemu = Qemu { child, directory };
        qemu.wait_for("its greeting", |qemu| {
            let mut monitor = UnixStream::connect(qemu.socket()).ok()?;
            monitor.set_read_timeout(Some(PATIENCE)).unwrap();
            monitor.read_exact(&mut [0]).ok()
        });
        qemu
    }

    fn wait_for<T>(&mut self, what: &str, mut condition: impl FnMut(&Qemu) -> Option<T>) -> T {
        let start = Instant::now();
        loop {
            if let Some(value) = condition(self) {
                return value;
            }
            let log = || fs::read_to_string(self.directory.path().join("log")).unwrap();
            let ended = self.child.try_wait().unwrap();
            assert!(ended.is_none(), "QEMU has ended ({ended:?}) before {what}: {}", log());
            assert!(start.elapsed() < PATIENCE, "not in time: {what}: {}", log());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("vm.qmp")
    }

    fn path(&self) -> String {
        self.socket().to_str().unwrap().to_owned()
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// What `inspect --json` says of it.
    fn inspect(&self) -> Value {
        let outcome = run(["inspect", &self.path(), "--json"]);
        assert_eq!((outcome.code, outcome.stderr.as_str()), (0, ""));
        serde_json::from_str(&outcome.stdout).unwrap()
    }

    /// Each of its devices in a line: bus, port, speed, id, driver, product.
    fn devices(&self) -> Vec<String> {
        let report = self.inspect();
        let columns = ["guest_bus", "guest_port", "speed_mbps", "id", "driver", "product"];
        let line = |device: &Value| {
            let cell = |name: &&str| match &device[*name] {
                Value::String(text) => text.clone(),
                Value::Null => "-".to_owned(),
                other => other.to_string(),
            };
            columns.iter().map(cell).collect::<Vec<_>>().join(" ")
        };
        report["devices"].as_array().unwrap().iter().map(line).collect()
    }

    /// A conversation with it through the library.
    fn talk<T>(&self, talk: impl AsyncFnOnce(&mut Vm) -> T) -> T {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let mut vm = Vm::connect(&self.socket().into(), PATIENCE).await.unwrap();
            talk(&mut vm).await
        })
    }

    /// Attaches something that is no USB device, by descriptor.
    fn attach_nonsense(&self, guest_ports: &[GuestPort]) -> Error {
        self.talk(async |vm| {
            let file = File::options().read(true).write(true).open("/dev/null").unwrap();
            let node = file.into();
            let access = Access::Descriptor(&node);
            let (id, options) = (id(), Map::new());
            let address = "1:37".parse().unwrap();
            let attachment = Attachment { id: &id, address, options: &options };
            let error = vm.attach(&attachment, &access, guest_ports).await.unwrap_err();
            assert_eq!(vm.host_devices().await.unwrap(), []);
            error.into()
        })
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn id() -> DeviceId {
    "usb-host-1-1.2".parse().unwrap()
}

fn guest_port(bus: &str, port: &str) -> GuestPort {
    GuestPort { bus: bus.into(), port: port.into() }
}

// inspect

fn inspect_shows_controllers_hubs_and_devices_of_all_kinds() {
    let qemu = Qemu::start(
        "-name one -device qemu-xhci,id=xhci,p2=8,p3=4 \
         -device ich9-usb-ehci1,id=ehci -device ich9-usb-uhci1,masterbus=ehci.0,firstport=0 \
         -device piix3-usb-uhci,id=uhci \
         -device usb-hub,id=hub,bus=xhci.0,port=2 -device usb-hub,bus=xhci.0,port=2.1 \
         -device usb-tablet,bus=xhci.0,port=2.1.3 -device usb-mouse,id=mouse,bus=xhci.0 \
         -device usb-kbd,bus=ehci.0,port=1 -device usb-tablet,id=tablet,bus=ehci.0 \
         -device usb-mouse,bus=uhci.0,port=2",
    );
    let expected = [
        "ehci.0 1 480 - usb-kbd QEMU USB Keyboard",
        "ehci.0 2 480 tablet usb-tablet QEMU USB Tablet",
        "uhci.0 2 12 - usb-mouse QEMU USB Mouse",
        "xhci.0 1 480 mouse usb-mouse QEMU USB Mouse",
        "xhci.0 2 12 hub usb-hub QEMU USB Hub",
        "xhci.0 2.1 12 - usb-hub QEMU USB Hub",
        "xhci.0 2.1.3 12 - usb-tablet QEMU USB Tablet",
    ];
    assert_eq!(qemu.devices(), expected);
    let report = qemu.inspect();
    assert_eq!(report["vm"]["name"], "one");
    assert_eq!(report["vm"]["status"], "prelaunch");
    assert_eq!(report["vm"]["socket"], qemu.path());
    assert_eq!(report["devices"][1]["qom_path"], "/machine/peripheral/tablet");
    assert_eq!(report["devices"][1]["host"], Value::Null);
    let table = run(["inspect", &qemu.path()]);
    assert_eq!((table.code, table.stderr.as_str()), (0, ""));
    let lines: Vec<&str> = table.stdout.lines().collect();
    assert!(
        lines[0].starts_with("VM one: QEMU ") && lines[0].ends_with(", prelaunch"),
        "{lines:?}"
    );
    assert_eq!(lines.len(), 2 + expected.len());
    let words: Vec<&str> = lines[6].split_whitespace().collect();
    assert_eq!(words, ["xhci.0", "2", "12", "hub", "QEMU", "USB", "Hub"]);
}

fn inspect_names_each_device_where_qemu_added_a_hub() {
    let qemu = Qemu::start(
        "-device qemu-xhci,id=xhci,p2=2,p3=2 \
         -device usb-tablet -device usb-mouse -device usb-kbd",
    );
    let expected = [
        "xhci.0 1 480 - usb-tablet QEMU USB Tablet",
        "xhci.0 2 12 - usb-hub QEMU USB Hub",
        "xhci.0 2.1 12 - usb-mouse QEMU USB Mouse",
        "xhci.0 2.2 12 - usb-kbd QEMU USB Keyboard",
    ];
    assert_eq!(qemu.devices(), expected);
}

fn inspect_names_each_device_where_qemu_added_one_of_its_own() {
    let qemu = Qemu::start("-usb -device usb-kbd -usbdevice tablet");
    let expected = [
        "usb-bus.0 1 12 - usb-tablet QEMU USB Tablet",
        "usb-bus.0 2 12 - usb-hub QEMU USB Hub",
        "usb-bus.0 2.1 12 - usb-kbd QEMU USB Keyboard",
    ];
    assert_eq!(qemu.devices(), expected);
}

fn inspect_does_not_guess_where_nothing_tells_the_buses_apart() {
    let qemu = Qemu::start(
        "-device piix3-usb-uhci,id=one -device piix3-usb-uhci,id=two \
         -device usb-kbd,bus=one.0,port=1 -device usb-mouse,bus=two.0",
    );
    for device in qemu.devices() {
        let is_known = device == "one.0 1 12 - usb-kbd QEMU USB Keyboard"
            || device == "two.0 1 12 - usb-mouse QEMU USB Mouse";
        let is_left_open = device == "one.0 1 - - usb-kbd -" || device == "two.0 - - - usb-mouse -";
        assert!(is_known || is_left_open, "{device}");
    }
}

fn inspect_of_no_controller_says_so() {
    let qemu = Qemu::start("");
    assert_eq!(qemu.devices(), [""; 0]);
    let outcome = run(["inspect", &qemu.path()]);
    assert_eq!(outcome.code, 0);
    assert!(outcome.stdout.contains("this VM has no USB controller"), "{}", outcome.stdout);
    assert!(outcome.stdout.contains(&qemu.path()), "a VM without name is shown by its socket");
}

fn inspect_of_no_device_says_so() {
    let qemu = Qemu::start("-device qemu-xhci");
    assert_eq!(qemu.devices(), [""; 0]);
    let outcome = run(["inspect", &qemu.path()]);
    assert_eq!(outcome.code, 0);
    assert!(outcome.stdout.ends_with("no USB devices\n"), "{}", outcome.stdout);
}

fn inspect_copes_with_sixty_devices() {
    let mut arguments = "-device qemu-xhci,id=xhci,p2=15,p3=15".to_owned();
    for hub in 1..=8 {
        arguments += &format!(" -device usb-hub,id=hub{hub},bus=xhci.0,port={hub}");
        for port in 1..=7 {
            let id = if port % 2 == 0 { format!("id=d{hub}-{port},") } else { String::new() };
            arguments += &format!(" -device usb-mouse,{id}bus=xhci.0,port={hub}.{port}");
        }
    }
    let devices = Qemu::start(&arguments).devices();
    assert_eq!(devices.len(), 64);
    for hub in 1..=8 {
        assert!(devices.contains(&format!("xhci.0 {hub} 12 hub{hub} usb-hub QEMU USB Hub")));
        for port in 1..=7 {
            let id = if port % 2 == 0 { format!("d{hub}-{port}") } else { "-".to_owned() };
            let line = format!("xhci.0 {hub}.{port} 12 {id} usb-mouse QEMU USB Mouse");
            assert!(devices.contains(&line), "{line}: {devices:#?}");
        }
    }
}

fn inspect_reads_a_pretty_printing_monitor() {
    let qemu = Qemu::with(|socket| {
        format!(
            "-chardev socket,id=qmp,path={socket},server=on,wait=off \
             -mon chardev=qmp,mode=control,pretty=on \
             -device qemu-xhci,id=xhci -device usb-tablet,id=tablet"
        )
    });
    assert_eq!(qemu.devices(), ["xhci.0 1 480 tablet usb-tablet QEMU USB Tablet"]);
}

fn a_vm_that_runs_is_meant_by_its_name() {
    let name = format!("by-name-{}", std::process::id());
    let qemu = Qemu::start(&format!("-name {name}"));
    let shown = run(["inspect", &name, "--json"]);
    assert_eq!((shown.code, shown.stderr.as_str()), (0, ""));
    let report: Value = serde_json::from_str(&shown.stdout).unwrap();
    assert_eq!(report["vm"]["socket"], qemu.path());
    // A name that is nearly right.
    let nearly = run(["inspect", &name.replace("by-", "bye-")]);
    assert!(
        nearly.code == 4 && nearly.stderr.contains(&format!("did you mean `{name}`?")),
        "{nearly:?}"
    );
    // One that the configuration has is its.
    let config = qemu.directory.path().join("c.toml");
    fs::write(&config, format!("[vm.{name}]\nqmp = '/nowhere/x.qmp'\n")).unwrap();
    let configured = run(["inspect", &name, "--config", config.to_str().unwrap()]);
    assert!(configured.stderr.contains("/nowhere/x.qmp"), "{configured:?}");
    // A rule has the path.
    let rule = run(["rule", "152d:2338", "--by", "product", "--vm", &name]);
    assert!(rule.stdout.contains(&format!(" udev {}\"", qemu.path())), "{rule:?}");
}

fn a_name_that_two_vms_have_means_neither() {
    let name = format!("twice-{}", std::process::id());
    let (one, other) =
        (Qemu::start(&format!("-name {name}")), Qemu::start(&format!("-name {name}")));
    let outcome = run(["inspect", &name]);
    assert_eq!(outcome.code, 2);
    for path in [one.path(), other.path()] {
        assert!(outcome.stderr.contains(&path), "{}", outcome.stderr);
    }
}

fn a_name_means_nothing_to_udev() {
    let name = format!("not-udevs-{}", std::process::id());
    let _qemu = Qemu::start(&format!("-name {name}"));
    let mut udev = Command::new(env!("CARGO_BIN_EXE_usb-qmp-hotplug"));
    udev.args(["udev", &name]).envs([("ACTION", "add"), ("BUSNUM", "1"), ("DEVNUM", "1")]);
    assert_eq!(udev.output().unwrap().status.code(), Some(4));
}

fn a_monitor_in_a_file_of_options_is_found() {
    let name = format!("in-a-file-{}", std::process::id());
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("vm.conf");
    let qemu = Qemu::with(|socket| {
        let text = format!(
            "[chardev \"m\"]\nbackend = \"socket\"\npath = \"{socket}\"\nserver = \"on\"\nwait = \"off\"\n\
             [mon]\nchardev = \"m\"\nmode = \"control\"\n"
        );
        fs::write(&file, text).unwrap();
        format!("-name {name} -readconfig {}", file.display())
    });
    let shown = run(["inspect", &name]);
    assert_eq!((shown.code, shown.stderr.as_str()), (0, ""));
    let vms: Value = serde_json::from_str(&run(["vms", "--json"]).stdout).unwrap();
    let vm = vms["vms"].as_array().unwrap().iter().find(|vm| vm["name"] == name.as_str()).unwrap();
    assert_eq!(vm["monitors"][0]["socket"], qemu.path());
    assert_eq!((&vm["monitors"][0]["state"], &vm["reads_config"]), (&"free".into(), &false.into()));
}

fn inspect_shows_a_hostile_name_without_its_control_characters() {
    let name = "evil\u{1b}[2J\u{202e}";
    let qemu = Qemu::start(&format!("-name {name}"));
    assert_eq!(qemu.inspect()["vm"]["name"], name);
    let outcome = run(["inspect", &qemu.path()]);
    assert!(outcome.stdout.starts_with("VM evil\\u{1b}[2J\\u{202e}: QEMU "), "{}", outcome.stdout);
}

// Who holds the monitor

fn eight_inspects_at_once_take_turns() {
    let qemu = Qemu::start("-device qemu-xhci,id=xhci -device usb-tablet,id=tablet");
    let start = || {
        let mut command = program(["inspect", &qemu.path(), "--json", "--timeout", "60"]);
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let children: Vec<Child> = (0..8).map(|_| start()).collect();
    for child in children {
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(report["devices"][0]["id"], "tablet");
    }
}

fn a_monitor_that_another_client_holds_is_exit_5_with_advice() {
    let qemu = Qemu::start("");
    let mut other = UnixStream::connect(qemu.socket()).unwrap();
    other.read_exact(&mut [0]).unwrap();
    let advice = ["another client holds this monitor", "-qmp unix:PATH,server=on,wait=off"];
    run(["inspect", &qemu.path(), "--timeout", "0.2"]).fails(5, &advice);
    drop(other);
    assert_eq!(run(["inspect", &qemu.path()]).code, 0);
}

fn a_stopped_qemu_is_exit_5_and_answers_when_it_runs_again() {
    let qemu = Qemu::start("-device qemu-xhci");
    qemu.signal(Signal::STOP);
    let start = Instant::now();
    run(["inspect", &qemu.path(), "--timeout", "0.2"]).fails(5, &["200ms", "QEMU is stopped"]);
    run(["detach", &qemu.path(), "1-1", "--timeout", "0.2"]).fails(5, &["QEMU is stopped"]);
    assert!(start.elapsed() < PATIENCE / 2);
    qemu.signal(Signal::CONT);
    assert_eq!(run(["inspect", &qemu.path()]).code, 0);
}

fn a_killed_qemu_is_exit_4_and_nothing_to_do_for_udev() {
    let mut qemu = Qemu::start("");
    qemu.child.kill().unwrap();
    qemu.child.wait().unwrap();
    assert!(qemu.socket().exists(), "it left its socket behind");
    run(["inspect", &qemu.path()]).fails(4, &[&qemu.path(), "nobody listens"]);
    let outcome = outcome_of(&mut removal(&qemu));
    assert_eq!((outcome.code, outcome.stdout.as_str()), (0, ""));
    assert!(outcome.stderr.contains("not running"), "{}", outcome.stderr);
}

// What QEMU says to an attach

fn what_qemu_refuses_is_exit_6_in_its_words() {
    let qemu = Qemu::start("-device qemu-xhci,id=xhci");
    let error = qemu.attach_nonsense(&[guest_port("nope.0", "1")]);
    assert_eq!(error.exit_code(), 6);
    assert!(error.to_string().contains("Bus 'nope.0' not found"), "{error}");
    let error = qemu.attach_nonsense(&[guest_port("xhci.0", "77")]);
    assert!(error.to_string().contains("usb port 77 (bus xhci.0) not found (in use?)"), "{error}");
}

fn a_port_in_use_is_passed_over_for_the_next() {
    let qemu = Qemu::start("-device qemu-xhci,id=xhci -device usb-mouse,port=1");
    let error = qemu.attach_nonsense(&[guest_port("xhci.0", "1")]);
    assert!(error.to_string().contains("(in use?)"), "{error}");
    let error = qemu.attach_nonsense(&[guest_port("xhci.0", "1"), guest_port("xhci.0", "2")]);
    assert!(error.to_string().contains("failed to open host usb device"), "{error}");
}

fn a_failed_attach_leaves_no_descriptor_in_a_set() {
    let qemu = Qemu::start("-device qemu-xhci,id=xhci");
    // While the machine does not run, QEMU before 9.1 only marks descriptors as removed.
    qemu.talk(async |vm| vm.session().execute(&cont {}).await.unwrap());
    for _ in 0..2 {
        let error = qemu.attach_nonsense(&[guest_port("xhci.0", "1")]);
        assert!(error.to_string().contains("failed to open host usb device"), "{error}");
    }
    let sets = qemu.talk(async |vm| vm.session().execute(&query_fdsets {}).await.unwrap());
    assert!(sets.len() <= 1, "{sets:?}");
    assert!(sets.iter().all(|set| set.fds.is_empty()), "{sets:?}");
}

fn a_survey_finds_the_free_ports_of_all_controllers() {
    let qemu = Qemu::start(
        "-device ich9-usb-ehci1,id=ehci -device ich9-usb-uhci1,masterbus=ehci.0,firstport=0 \
         -device qemu-xhci,id=xhci,p2=3,p3=2 -device piix3-usb-uhci -device pci-ohci,num-ports=2 \
         -device usb-mouse,id=mouse,bus=xhci.0,port=2 -device usb-mouse,bus=xhci.0,port=3 \
         -device usb-mouse,id=other,bus=ehci.0,port=1",
    );
    let guest_ports = |speed: &str| -> Vec<String> {
        let speed = Some(speed.parse().unwrap());
        let probe = qemu.talk(async |vm| vm.probe(&id(), speed, &Placement::default()).await);
        let probe = probe.unwrap();
        assert_eq!(probe.present, None);
        probe.guest_ports.unwrap().iter().map(ToString::to_string).collect()
    };
    let fast = guest_ports("480");
    assert_eq!(fast[..2], ["xhci.0 port 1", "ehci.0 port 6"]);
    assert_eq!(fast.len(), 1 + 5 + 2 + 2);
    let slow = guest_ports("1.5");
    assert_eq!(slow[0], "xhci.0 port 1");
    assert!(slow.contains(&"usb-bus.0 port 2".to_owned()), "{slow:?}");
    let on_ehci: Vec<&String> = slow.iter().filter(|port| port.starts_with("ehci")).collect();
    assert_eq!(on_ehci, ["ehci.0 port 2"], "what the companion serves, and is free");
    assert!(slow.contains(&"usb-bus.1 port 2".to_owned()), "{slow:?}");
}

fn a_survey_finds_the_controller_of_the_board() {
    for board in ["-usb", "-machine usb=on", "-machine q35 -usb"] {
        let qemu = Qemu::start(board);
        let speed = Some("480".parse().unwrap());
        let probe = qemu.talk(async |vm| vm.probe(&id(), speed, &Placement::default()).await);
        let guest_ports = probe.unwrap().guest_ports.unwrap();
        let ports = if board.contains("q35") { ["6", "5"] } else { ["2", "1"] };
        assert_eq!(guest_ports[..2], ports.map(|port| guest_port("usb-bus.0", port)), "{board}");
    }
}

// A controller more

/// The places that a controller more gives for a device, as `port` says or not.
fn add_controller(qemu: &Qemu, dry_run: bool) -> Result<Vec<GuestPort>, NoGuestPort> {
    let (speed, placement) = (Some("480".parse().unwrap()), Placement::default());
    qemu.talk(async |vm| {
        let lacks = vm.probe(&id(), speed, &placement).await.unwrap().guest_ports.unwrap_err();
        vm.add_controller(lacks, speed, &placement, dry_run).await.unwrap()
    })
}

fn first_place(qemu: &Qemu) -> Option<GuestPort> {
    let (speed, placement) = (Some("480".parse().unwrap()), Placement::default());
    let probe = qemu.talk(async |vm| vm.probe(&id(), speed, &placement).await.unwrap());
    probe.guest_ports.ok().map(|guest_ports| guest_ports[0].clone())
}

fn a_vm_without_a_port_gets_a_controller() {
    let full = "-device qemu-xhci,id=xhci,p2=1,p3=1 -device usb-tablet,bus=xhci.0,port=1";
    for board in ["", full] {
        let qemu = Qemu::start(board);
        let place = guest_port("usb-qmp-hotplug-xhci.0", "15");
        assert_eq!(add_controller(&qemu, true).unwrap()[0], place);
        assert_eq!(first_place(&qemu), None, "a dry run adds nothing");
        assert_eq!(add_controller(&qemu, false).unwrap()[0], place);
        assert_eq!(first_place(&qemu), Some(place), "the next device finds it");
    }
}

fn a_controller_goes_to_a_free_slot_of_a_q35_machine() {
    let ports: Vec<String> =
        (1..=3).map(|n| format!("-device pcie-root-port,id=rp{n},chassis={n}")).collect();
    let more = "-device virtio-rng-pci,bus=rp3 -device usb-tablet,bus=xhci.0,port=1";
    let xhci = "-device qemu-xhci,id=xhci,p2=1,p3=1";
    let qemu = Qemu::start(&format!("-machine q35 {} {xhci} {more}", ports.join(" ")));
    add_controller(&qemu, false).unwrap();
    let bus = qemu.talk(async |vm| {
        let path = "/machine/peripheral/usb-qmp-hotplug-xhci".to_owned();
        vm.session().execute(&qom_get { path, property: "parent_bus".into() }).await.unwrap()
    });
    assert_eq!(bus, "/machine/peripheral/rp2/rp2", "the highest that is free");
}

fn a_machine_without_a_slot_gets_no_controller() {
    let qemu = Qemu::start("-machine q35");
    let error = add_controller(&qemu, false).unwrap_err().to_string();
    for part in [
        "this VM has no USB controller",
        "Bus 'pcie.0' does not support hotplugging",
        "add `-device qemu-xhci,id=xhci,p2=15,p3=15` to its QEMU",
    ] {
        assert!(error.contains(part), "{error}");
    }
    assert!(!error.contains("--add-controller"), "{error}");
}

// detach and udev

fn only_devices_of_the_host_can_be_detached() {
    let qemu = Qemu::start("-device qemu-xhci,id=xhci -device usb-tablet,id=tablet");
    for device in ["tablet", "nothing", "900-1", "900:100"] {
        run(["detach", &qemu.path(), device]).fails(3, &[&qemu.path(), device, "inspect"]);
    }
    assert_eq!(qemu.devices().len(), 1);
}

/// The program, run for the removal of a device.
fn removal(qemu: &Qemu) -> Command {
    let mut command = program(["udev", &qemu.path()]);
    command.envs([
        ("ACTION", "remove"),
        ("SUBSYSTEM", "usb"),
        ("DEVTYPE", "usb_device"),
        ("DEVPATH", "/devices/pci0000:00/0000:00:04.0/usb900/900-1/900-1.2"),
        ("BUSNUM", "900"),
        ("DEVNUM", "037"),
        ("DEVNAME", "/dev/bus/usb/900/037"),
        ("PRODUCT", "152d/2338/100"),
        ("TYPE", "0/0/0"),
    ]);
    command
}

fn a_removal_of_what_the_vm_does_not_have_is_nothing_to_do() {
    let qemu = Qemu::start("-device qemu-xhci,id=xhci -device usb-tablet,id=tablet");
    let mut by_hand = program(["udev", &qemu.path()]);
    by_hand.envs([("ACTION", "remove"), ("BUSNUM", "900"), ("DEVNUM", "037")]);
    for command in [&mut removal(&qemu), &mut by_hand] {
        let outcome = outcome_of(command);
        assert_eq!((outcome.code, outcome.stdout.as_str()), (0, ""), "{}", outcome.stderr);
        assert!(outcome.stderr.contains("nothing to do, 900"), "{}", outcome.stderr);
    }
    assert_eq!(qemu.devices().len(), 1);
}

// Standard output

fn a_closed_standard_output_is_no_failure() {
    let qemu = Qemu::start("-device qemu-xhci,id=xhci -device usb-tablet,id=tablet");
    for more in [None, Some("--json")] {
        let (reader, writer) = UnixStream::pair().unwrap();
        drop(reader);
        let mut command = program(["inspect", &qemu.path()].into_iter().chain(more));
        let child = command.stdout(OwnedFd::from(writer)).stderr(Stdio::piped()).spawn().unwrap();
        let output = child.wait_with_output().unwrap();
        assert_eq!((output.status.code(), output.stderr.as_slice()), (Some(0), &b""[..]));
    }
}

fn a_full_standard_output_is_a_failure() {
    let qemu = Qemu::start("");
    let full = File::options().write(true).open("/dev/full").unwrap();
    let mut command = program(["inspect", &qemu.path()]);
    let child = command.stdout(full).stderr(Stdio::piped()).spawn().unwrap();
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("cannot write standard output: No space left"), "{text}");
}

fn udev_opens_nothing_it_does_not_need_and_starts_no_thread() {
    let qemu = Qemu::start("-device qemu-xhci");
    let trace = qemu.directory.path().join("trace");
    let event = removal(&qemu);
    let mut command = Command::new("strace");
    command.args(["-f", "-e", "trace=openat,open,clone,clone3,fork,vfork,execve", "-o"]);
    command.arg(&trace).arg(PROGRAM).args(event.get_args()).env_clear();
    command.envs(event.get_envs().filter_map(|(name, value)| Some((name, value?))));
    let outcome = outcome_of(&mut command);
    assert_eq!(outcome.code, 0, "{}", outcome.stderr);
    let trace = fs::read_to_string(trace).unwrap();
    // The dynamic loader's, the runtime's (where its stack is) and syslog's.
    let others = [".so", "/proc/self/maps", "/etc/localtime", "+++ exited", "execve("];
    let is_ours = |line: &&str| !others.iter().any(|part| line.contains(part));
    let rest: Vec<&str> = trace.lines().filter(is_ours).collect();
    assert!(rest.is_empty(), "{rest:#?}");
}
