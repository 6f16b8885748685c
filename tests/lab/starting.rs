//! Devices whose drivers take long to start, or never end: the kernel makes whoever reads or opens them wait, and
//! nobody else is to.

use crate::daemon::{CONFIG, Daemon, configure, rule};
use crate::hardware::{Device, Hardware, xhci};
use crate::host::must;
use crate::remote::{self, Remotes};
use crate::tool::{Outcome, PROGRAM, run};
use crate::truth::open_locked;
use crate::vm::Vm;
use crate::wait::{wait_at_most, wait_for};
use rustix::process::Signal;
use serde_json::json;
use std::fs;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

crate::tests![
    the_daemon_serves_the_other_vms_meanwhile: waits,
    a_daemon_that_starts_meanwhile_serves_the_other_vms: waits,
    it_ends_at_once_meanwhile: waits,
    it_goes_where_its_serial_number_says_when_that_can_be_read: waits,
    a_device_that_falls_silent_delays_no_other_vm: waits,
    an_event_keeps_its_time_whoever_starts_the_driver: waits,
    commands_show_what_is_known_and_keep_their_time: waits,
];

/// The driver gives up after 20 s for each interface, and whoever waits for the device waits for all of them.
const INTERFACES: u32 = 6;
const HANGS: Duration = Duration::from_secs(20 * INTERFACES as u64);

/// How long anything else may take: a part of it.
const MEANWHILE: Duration = Duration::from_secs(40);

/// Plugs in a device whose probe takes two minutes, and waits until the kernel is in it.
fn hanging(remotes: &mut Remotes) -> (String, String) {
    let id = remotes.insert(remote::Device::hangs_in_probe(INTERFACES as usize), 2);
    let port = wait_for("the device to be there", || {
        let devices = fs::read_dir("/sys/bus/usb/devices").unwrap().flatten();
        let is_it = |path: &std::path::Path| {
            fs::read_to_string(path.join("idVendor")).is_ok_and(|id| id.trim() == "1209")
        };
        let mut paths = devices.map(|entry| entry.path()).filter(|path| is_it(path));
        Some(paths.next()?.file_name()?.to_str()?.to_owned())
    });
    let interface = format!("/sys/bus/usb/devices/{port}/{port}:1.0");
    wait_for("its driver to start", || fs::metadata(format!("{interface}/driver")).ok());
    (id, port)
}

fn meanwhile<T>(what: &str, condition: impl FnMut() -> Option<T>) -> T {
    wait_at_most(MEANWHILE, what, condition)
}

/// Three VMs, the first of which has had a device: with its first one, QEMU looks at all devices of the host, and
/// waits for those that hang (libusb, linux_usbfs.c, `initialize_device`).
fn three_vms(hardware: &mut Hardware) -> [Vm; 3] {
    let vms = ["a", "b", "c"].map(|name| Vm::new(name).start());
    let first = hardware.plug(Device::Tablet, xhci(5));
    run(["attach", &vms[0].socket(), &first.port]).succeeds();
    run(["detach", &vms[0].socket(), &first.port]).succeeds();
    vms
}

/// A rule with a serial number anywhere made the daemon wait for every device.
fn rules() -> String {
    rule("a", "port = \"1-3\"") + &rule("b", "serial = \"HANGS\"") + &rule("c", "class = \"03\"")
}

/// Another VM gets and loses its device, and systemd hears of the daemon.
fn a_works(hardware: &mut Hardware, daemon: &Daemon, a: &Vm) {
    let mouse = hardware.plug(Device::Mouse, xhci(3));
    meanwhile("a gets its mouse", || (a.ids() == [mouse.id_in_vm()]).then_some(()));
    let told = || daemon.said().iter().filter(|line| *line == "WATCHDOG=1").count();
    let before = told();
    meanwhile("the watchdog is told", || (told() > before + 1).then_some(()));
    hardware.pull(&mouse);
    meanwhile("a loses its mouse", || a.ids().is_empty().then_some(()));
}

fn the_daemon_serves_the_other_vms_meanwhile() {
    let mut hardware = Hardware::open();
    let mut remotes = Remotes::load();
    // The third has a tablet all the time.
    let [a, b, _c] = three_vms(&mut hardware);
    configure(&["a", "b", "c"], &rules());
    let watchdog = [("WATCHDOG_USEC", "3000000")];
    let daemon = Daemon::launch(&["--timeout", "15"], &watchdog);
    daemon.wait_until_it_says("READY=1");
    let start = Instant::now();
    let (id, _) = hanging(&mut remotes);
    a_works(&mut hardware, &daemon, &a);
    daemon.wait_for_log(&["is starting"]);
    daemon.wait_for_status("3 VMs, 3 running, 1 device attached, 1 waiting");
    daemon.reload();
    let mouse = hardware.plug(Device::Mouse, xhci(3));
    meanwhile("a gets its mouse", || (a.ids() == [mouse.id_in_vm()]).then_some(()));
    assert!(start.elapsed() < HANGS, "{:?}: it hangs no more", start.elapsed());
    assert!(b.ids().is_empty(), "nobody knows yet where it belongs");
    remotes.remove(&id);
    daemon.wait_for_status("3 VMs, 3 running, 2 devices attached");
}

fn a_daemon_that_starts_meanwhile_serves_the_other_vms() {
    let mut hardware = Hardware::open();
    let mut remotes = Remotes::load();
    let [a, _b, _c] = three_vms(&mut hardware);
    let mouse = hardware.plug(Device::Mouse, xhci(3));
    configure(&["a", "b", "c"], &rules());
    let (id, _) = hanging(&mut remotes);
    let start = Instant::now();
    let daemon = Daemon::launch(&["--timeout", "15"], &[]);
    meanwhile("it is ready", || daemon.said().iter().any(|l| l == "READY=1").then_some(()));
    a.gets(&[&mouse]);
    assert!(start.elapsed() < HANGS, "{:?}", start.elapsed());
    remotes.remove(&id);
}

fn it_ends_at_once_meanwhile() {
    let mut hardware = Hardware::open();
    let mut remotes = Remotes::load();
    let _vms = three_vms(&mut hardware);
    configure(&["a", "b", "c"], &(rule("a", "vendor = \"1209\"") + &rules()));
    let mut daemon = Daemon::start();
    let (id, _) = hanging(&mut remotes);
    daemon.reload();
    daemon.signal(Signal::TERM);
    let start = Instant::now();
    assert!(daemon.wait().success());
    assert!(start.elapsed() < MEANWHILE, "{:?}", start.elapsed());
    remotes.remove(&id);
}

fn it_goes_where_its_serial_number_says_when_that_can_be_read() {
    let mut hardware = Hardware::open();
    let mut remotes = Remotes::load();
    let [_a, b, _c] = three_vms(&mut hardware);
    configure(&["a", "b", "c"], &rules());
    let daemon = Daemon::launch(&["--timeout", "15"], &[]);
    daemon.wait_until_it_says("READY=1");
    let id = remotes.insert(remote::Device::hangs_in_probe(1), 2);
    wait_at_most(HANGS, "b gets it", || (b.ids().len() == 1).then_some(()));
    remotes.remove(&id);
    b.loses_all();
}

fn a_device_that_falls_silent_delays_no_other_vm() {
    let mut hardware = Hardware::open();
    let mut remotes = Remotes::load();
    let [a, b, _c] = three_vms(&mut hardware);
    configure(&["a", "b", "c"], &(rule("a", "port = \"1-3\"") + &rule("b", "vendor = \"1209\"")));
    let mut daemon = Daemon::launch(&["--timeout", "15"], &[("WATCHDOG_USEC", "3000000")]);
    daemon.wait_until_it_says("READY=1");
    // QEMU asks it for its name, and waits.
    let silent = remotes.plug(remote::Device::falls_silent(), 2);
    a_works(&mut hardware, &daemon, &a);
    wait_for("b has it", || (b.ids() == [silent.id_in_vm()]).then_some(()));
    daemon.reload();
    a_works(&mut hardware, &daemon, &a);
    briefly(&["list"]).succeeds();
    // QEMU resets it, and the kernel waits for each answer.
    let detach = ["--timeout", "2", "detach", &b.socket(), &silent.port];
    let mut detach = Command::new(PROGRAM).args(detach).stderr(Stdio::null()).spawn().unwrap();
    a_works(&mut hardware, &daemon, &a);
    briefly(&["list"]).succeeds();
    wait_for("the end of the detach", || detach.try_wait().unwrap());
    // A daemon that starts now serves the others, too.
    drop(daemon);
    daemon = Daemon::launch(&["--timeout", "15"], &[("WATCHDOG_USEC", "3000000")]);
    meanwhile("it is ready", || daemon.said().iter().any(|l| l == "READY=1").then_some(()));
    a_works(&mut hardware, &daemon, &a);
    daemon.signal(Signal::TERM);
    let start = Instant::now();
    assert!(daemon.wait().success());
    assert!(start.elapsed() < MEANWHILE, "{:?}", start.elapsed());
    remotes.remove(&silent.id);
}

fn an_event_keeps_its_time_whoever_starts_the_driver() {
    let mut hardware = Hardware::open();
    let mut remotes = Remotes::load();
    let [a, ..] = three_vms(&mut hardware);
    let udev = |port: &str| {
        let variables = [("ACTION", "add"), ("DEVTYPE", "usb_device"), ("SUBSYSTEM", "usb")];
        let real = fs::canonicalize(format!("/sys/bus/usb/devices/{port}")).unwrap();
        let devpath = real.to_str().unwrap().trim_start_matches("/sys").to_owned();
        let number = |name| fs::read_to_string(real.join(name)).unwrap().trim().to_owned();
        let numbers = [("BUSNUM", number("busnum")), ("DEVNUM", number("devnum"))];
        let mut command = program("2");
        command.args(["udev", &a.socket()]).envs(variables).envs(numbers);
        let refused = within_meanwhile(command.env("DEVPATH", devpath)).exits(1).stderr;
        assert!(refused.contains("drivers are still starting"), "{refused}");
    };
    // The kernel starts it at the plug.
    let (id, port) = hanging(&mut remotes);
    udev(&port);
    assert!(a.ids().is_empty());
    remotes.remove(&id);
    wait_for("it is gone", || {
        (!fs::exists(format!("/sys/bus/usb/devices/{port}")).unwrap()).then_some(())
    });
    // udev loads it later.
    must("rmmod", &["usbhid"]);
    let (id, port) = hanging(&mut remotes);
    udev(&port);
    remotes.remove(&id);
}

/// The program with so many seconds for each conversation.
fn program(seconds: &str) -> Command {
    let mut program = Command::new(PROGRAM);
    program.args(["--timeout", seconds, "--config", CONFIG]);
    program
}

/// Runs the program with two seconds for what it does on the host.
fn briefly(arguments: &[&str]) -> Outcome {
    within_meanwhile(program("2").args(arguments))
}

/// Runs the program with more time: what QEMU does takes longer, above all on a busy machine.
fn patiently(arguments: &[&str]) -> Outcome {
    within_meanwhile(program("15").args(arguments))
}

fn within_meanwhile(command: &mut Command) -> Outcome {
    let start = Instant::now();
    let output = command.stdin(Stdio::null()).output().unwrap();
    let took = start.elapsed();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    let outcome = Outcome {
        status: output.status.code().unwrap(),
        stdout: text(output.stdout),
        stderr: text(output.stderr),
    };
    eprintln!("{command:?} took {took:?}: {outcome:?}");
    assert!(took < MEANWHILE, "{command:?} took {took:?}");
    outcome
}

fn commands_show_what_is_known_and_keep_their_time() {
    let mut hardware = Hardware::open();
    let mut remotes = Remotes::load();
    let vm = Vm::new("a").start();
    let mouse = hardware.plug(Device::Mouse, xhci(3));
    // QEMU looks at all devices of the host with its first one.
    run(["attach", &vm.socket(), &mouse.port]).succeeds();
    run(["detach", &vm.socket(), &mouse.port]).succeeds();
    configure(&["a"], &(rule("a", "serial = \"HANGS\"") + &rule("a", "port = \"1-3\"")));
    let (id, port) = hanging(&mut remotes);
    let start = Instant::now();
    let list = briefly(&["list"]).succeeds().stdout;
    let line = list.lines().find(|line| line.contains("1209:0020")).unwrap();
    assert!(line.contains("(starting)"), "{list}");
    assert!(list.contains("QEMU USB Mouse"), "{list}");
    let refused = patiently(&["attach", "a", &port]).exits(1).stderr;
    assert!(refused.contains("drivers are still starting"), "{refused}");
    let refused = briefly(&["attach", "a", "serial=HANGS"]).exits(1).stderr;
    assert!(refused.contains(&port), "{refused}");
    let synced = patiently(&["sync"]).exits(1);
    assert!(synced.stderr.contains(&port), "{}", synced.stderr);
    vm.gets(&[&mouse]);
    let detached = patiently(&["detach", "a", "1-3"]).succeeds();
    assert!(detached.stdout.contains("usb-host-1-3"), "{}", detached.stdout);
    briefly(&["rule", "--vm", "a", &port]).succeeds();
    briefly(&["rule", "--vm", "a", "--by", "serial", &port]).exits(1);
    // An object for it, whose descriptor is another one's, so that QEMU does not wait itself.
    let number = |name: &str| -> u32 {
        let text = fs::read_to_string(format!("/sys/bus/usb/devices/{port}/{name}")).unwrap();
        text.trim().parse().unwrap()
    };
    vm.pass_descriptor(77, &open_locked(&mouse));
    let object = json!({
        "driver": "usb-host", "id": format!("usb-host-{port}"), "bus": "xhci.0", "port": "2",
        "hostbus": number("busnum"), "hostaddr": number("devnum"), "hostdevice": "/dev/fdset/77",
    });
    vm.qmp("device_add", object);
    let shown = patiently(&["inspect", "a"]).succeeds().stdout;
    assert!(shown.contains(&format!("usb-host-{port}")), "{shown}");
    assert!(start.elapsed() < HANGS, "{:?}: it hangs no more", start.elapsed());
    remotes.remove(&id);
    run(["list"]).succeeds();
}
