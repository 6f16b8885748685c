//! Devices that somebody else has, who takes no lock of ours: another QEMU, a program.

use crate::daemon::{Daemon, configure, rule};
use crate::hardware::{Device, Hardware, Plugged, Stick, xhci};
use crate::journal::Journal;
use crate::tool::{self, SECONDS, run};
use crate::udev;
use crate::vm::Vm;
use crate::wait::{wait_for, wait_until};
use serde_json::json;
use std::fs;
use std::process::{Child, Command, Stdio};

crate::tests![
    what_another_qemu_took_by_itself_is_refused_and_named: every_qemu,
    what_another_guest_has_not_got_to_yet_is_refused_by_hand: any_qemu,
    what_a_program_has_claimed_is_refused_and_named: any_qemu,
    a_program_that_only_has_it_open_is_no_owner: any_qemu,
    a_rule_and_the_daemon_refuse_what_is_claimed: any_qemu,
    what_is_not_authorized_is_refused_until_it_is: any_qemu,
    a_rule_and_the_daemon_attach_what_is_authorized_later: any_qemu,
    what_the_vm_has_under_another_id_is_there_already: any_qemu,
    what_the_vm_has_found_by_itself_is_there_already: every_qemu,
    every_name_finds_what_the_vm_has_whatever_its_id: any_qemu,
];

const UNSEEN: &str = "a program or a VM that cannot be seen from here";

fn what_another_qemu_took_by_itself_is_refused_and_named() {
    let mut hardware = Hardware::open();
    let stick = hardware.plug(Stick::bootable("SN1", "booted from SN1"), xhci(3));
    let own = Vm::new("own").paused().argument("-device", "usb-host,vendorid=0x46f4,productid=1");
    let own = own.start();
    own.boot();
    own.wait_for_debug("booted from SN1");
    assert_eq!(stick.driver().as_deref(), Some("usbfs"));
    let vm = Vm::new("a").start();
    let refused = run(["attach", &vm.socket(), &stick.port]).exits(7).stderr;
    let owner = format!("is in use by VM own (process {})", own.pid());
    assert!(refused.contains(&owner) && refused.contains("--take"), "{refused}");
    // Who may not look into that QEMU says what he knows.
    let refused = tool::run_as_nobody(["attach", &vm.socket(), &stick.port]);
    assert!(refused.status != 0, "{refused:?}");
    vm.loses_all();
    own.kill();
    run(["attach", &vm.socket(), &stick.port]).succeeds();
    vm.gets(&[&stick]);
}

fn what_another_guest_has_not_got_to_yet_is_refused_by_hand() {
    let mut hardware = Hardware::open();
    let stick = hardware.plug(Stick::new("SN1"), xhci(3));
    let own = Vm::new("own").start();
    own.qmp(
        "device_add",
        json!({"driver": "usb-host", "hostbus": stick.bus, "hostaddr": stick.address}),
    );
    assert_eq!(stick.driver(), None);
    let vm = Vm::new("a").start();
    let refused = run(["attach", &vm.socket(), &stick.port]).exits(7).stderr;
    assert!(refused.contains("in use by VM own"), "{refused}");
    vm.loses_all();
    // What a VM of ours had and could not use is no reason.
    own.kill();
    run(["attach", &vm.socket(), &stick.port]).succeeds();
    run(["detach", &vm.socket(), &stick.port]).succeeds();
}

fn what_a_program_has_claimed_is_refused_and_named() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").start();
    let mouse = hardware.plug(Device::Mouse, xhci(3));
    let program = claim(&mouse);
    let refused = run(["attach", &vm.socket(), &mouse.port]).exits(7).stderr;
    let owner = format!("is in use by process {} (perl)", program.0.id());
    assert!(refused.contains(&owner) && refused.contains("let go"), "{refused}");
    vm.loses_all();
    assert_eq!(mouse.driver().as_deref(), Some("usbfs"));
    drop(program);
    run(["attach", &vm.socket(), &mouse.port]).succeeds();
    vm.gets(&[&mouse]);
}

fn a_program_that_only_has_it_open_is_no_owner() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").start();
    let mouse = hardware.plug(Device::Mouse, xhci(3));
    let _open = Program::start("sleep 1000 <>\"$0\"", &mouse);
    let reads = Program::start("sleep 1000 <\"$0\"", &mouse);
    run(["attach", &vm.socket(), &mouse.port]).succeeds();
    vm.gets(&[&mouse]);
    run(["detach", &vm.socket(), &mouse.port]).succeeds();
    // Nor is it named beside the one that has claimed it.
    let program = claim(&mouse);
    let refused = run(["attach", &vm.socket(), &mouse.port]).exits(7).stderr;
    assert!(refused.contains(&program.0.id().to_string()), "{refused}");
    assert!(!refused.contains(&reads.0.id().to_string()), "{refused}");
}

fn a_rule_and_the_daemon_refuse_what_is_claimed() {
    let mut hardware = Hardware::open();
    let journal = Journal::journald();
    let vm = Vm::new("a").start();
    let mouse = hardware.plug(Device::Mouse, xhci(3));
    let program = claim(&mouse);
    tool::rules(&tool::rule(r#"DEVPATH=="*/1-3""#, &vm));
    udev::trigger("add", &mouse.sysfs);
    let entry = journal.wait_for("is in use by");
    assert!(entry["MESSAGE"].contains(&format!("process {} (perl)", program.0.id())), "{entry:?}");
    tool::rules("");
    configure(&["a"], &rule("a", "port = \"1-3\""));
    let daemon = Daemon::launch(&["--timeout", tool::SECONDS], &[]);
    daemon.wait_for_log(&["1-3", "is in use by", UNSEEN]);
    vm.loses_all();
    assert_eq!(mouse.driver().as_deref(), Some("usbfs"));
}

fn what_is_not_authorized_is_refused_until_it_is() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").start();
    let mouse = hardware.plug(Device::Mouse, xhci(3));
    let authorized = mouse.sysfs.join("authorized");
    fs::write(&authorized, "0").unwrap();
    let refused = run(["attach", &vm.socket(), &mouse.port]).exits(7).stderr;
    let next = "write 1 to /sys/bus/usb/devices/1-3/authorized";
    assert!(refused.contains("not authorized") && refused.contains(next), "{refused}");
    vm.loses_all();
    run(["attach", "--force", &vm.socket(), &mouse.port]).succeeds();
    run(["detach", &vm.socket(), &mouse.port]).succeeds();
    fs::write(&authorized, "1").unwrap();
    run(["attach", &vm.socket(), &mouse.port]).succeeds();
    vm.gets(&[&mouse]);
}

fn a_rule_and_the_daemon_attach_what_is_authorized_later() {
    let mut hardware = Hardware::open();
    let journal = Journal::journald();
    let (a, b) = (Vm::new("a").start(), Vm::new("b").start());
    let default = |value| fs::write("/sys/bus/usb/devices/usb1/authorized_default", value).unwrap();
    default("0");
    tool::rules(&tool::rule(r#"DEVPATH=="*/1-3""#, &a));
    configure(&["b"], &rule("b", "port = \"1-4\""));
    let daemon = Daemon::start();
    let [by_rule, by_daemon] = [3, 4].map(|port| hardware.plug(Device::Mouse, xhci(port)));
    default("1");
    let hint = &journal.wait_for("once it is authorized, add a rule: ")["MESSAGE"];
    daemon.wait_for_log(&["1-4", "not authorized"]);
    a.loses_all();
    b.loses_all();
    // The rule as it was printed, with the options of the one that was called.
    let added = hint.split_once("add a rule: ").unwrap().1;
    assert!(added.contains(&format!(" --timeout {SECONDS} udev ")), "{added}");
    tool::rules(&format!("{}{added}\n", tool::rule(r#"DEVPATH=="*/1-3""#, &a)));
    for mouse in [&by_rule, &by_daemon] {
        fs::write(mouse.sysfs.join("authorized"), "1").unwrap();
    }
    a.gets(&[&by_rule]);
    b.gets(&[&by_daemon]);
    // A detach adds no interface: it stays with the host.
    run(["detach", &a.socket(), "1-3"]).succeeds();
    udev::settle();
    a.loses_all();
}

fn what_the_vm_has_under_another_id_is_there_already() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").start();
    let stick = hardware.plug(Stick::new("SN1"), xhci(3));
    theirs(&vm, &stick, "theirs");
    let said = run(["attach", &vm.socket(), &stick.port]).succeeds().stdout;
    assert!(said.contains("2-3") && said.contains("already, as theirs"), "{said}");
    assert_eq!(vm.ids(), ["theirs"]);
    assert_eq!(vm.open_nodes().len(), 1);
    configure(&["a"], &rule("a", "port = \"2-3\""));
    let synced = run(["--config", crate::daemon::CONFIG, "sync"]).succeeds().stdout;
    assert_eq!(synced, "a: nothing to do\n");
    assert_eq!(vm.ids(), ["theirs"]);
}

fn what_the_vm_has_found_by_itself_is_there_already() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").argument("-device", "usb-host,vendorid=0x46f4,hostport=3").start();
    let other = hardware.plug(Stick::new("SN1"), xhci(4));
    let stick = hardware.plug(Stick::new("SN2"), xhci(3));
    wait_until("QEMU has found it", || vm.open_nodes() == [stick.node()]);
    let said = run(["attach", &vm.socket(), &stick.port]).succeeds().stdout;
    assert!(said.contains("already, as /machine/peripheral-anon/device["), "{said}");
    assert_eq!(vm.open_nodes(), [stick.node()]);
    run(["attach", &vm.socket(), &other.port]).succeeds();
    assert_eq!(vm.open_nodes().len(), 2);
    // Although QEMU has no id for it.
    run(["detach", &vm.socket(), "serial=SN2"]).succeeds();
    wait_until("its driver is back", || stick.driver().as_deref() == Some("usb-storage"));
    assert_eq!(vm.open_nodes(), [other.node()]);
}

fn every_name_finds_what_the_vm_has_whatever_its_id() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").start();
    let stick = hardware.plug(Stick::new("SN1"), xhci(3));
    let (bus, address) = (stick.bus, stick.address);
    let numbers = [format!("{bus}:{address}"), format!("{bus:03}:{address:03}")];
    let names = [
        "2-3",
        "pci-0000:00:14.0-usbv3-0:3",
        &numbers[0],
        &numbers[1],
        "46f4:0001",
        "serial=SN1",
        stick.node().to_str().unwrap(),
        &format!("/sys{}", stick.devpath()),
        "hostdev0",
    ]
    .map(str::to_owned);
    for name in &names {
        theirs(&vm, &stick, "hostdev0");
        run(["detach", &vm.socket(), name]).succeeds();
        vm.loses_all();
    }
    run(["detach", &vm.socket(), "2-3"]).exits(3);
}

/// A host device in a VM that this tool did not put there.
pub fn theirs(vm: &Vm, device: &Plugged, id: &str) {
    let (bus, address) = (device.bus, device.address);
    let theirs = json!({"driver": "usb-host", "id": id, "hostbus": bus, "hostaddr": address});
    // QEMU before 6.0 frees an id a moment after its device is gone.
    wait_for("the id is free", || match vm.try_qmp("device_add", theirs.clone()) {
        Ok(added) => Some(added),
        Err(error) if error.starts_with("Duplicate ID") => None,
        Err(error) => panic!("{error}"),
    });
}

/// A program that runs until it is dropped.
pub struct Program(pub Child);

impl Program {
    /// Runs a line of shell with the device's node as `$0`.
    fn start(line: &str, device: &Plugged) -> Program {
        let node = device.node();
        let line = format!("exec {line}");
        let child = Command::new("sh").args(["-c", &line]).arg(&node).spawn().unwrap();
        let program = Program(child);
        program.wait_until_open(&node);
        program
    }

    fn wait_until_open(&self, node: &std::path::Path) {
        wait_until("the program has opened the node", || {
            let open = fs::read_dir(format!("/proc/{}/fd", self.0.id())).unwrap().flatten();
            open.filter_map(|fd| fs::read_link(fd.path()).ok()).any(|path| path == node)
        });
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What libusb does for a program: takes the driver off interface 0 and claims it (USBDEVFS_DISCONNECT_CLAIM).
pub fn claim(device: &Plugged) -> Program {
    const SCRIPT: &str = r#"use Fcntl;
        sysopen(my $node, $ARGV[0], O_RDWR) or die "open: $!";
        ioctl($node, 0x8108551b, my $interface = pack("LLa256", 0, 0, "")) or die "claim: $!";
        print "claimed\n"; close STDOUT; sleep;"#;
    let mut perl = Command::new("perl")
        .args(["-e", SCRIPT])
        .arg(device.node())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = String::new();
    std::io::Read::read_to_string(perl.stdout.as_mut().unwrap(), &mut said).unwrap();
    assert_eq!(said, "claimed\n");
    assert_eq!(device.driver().as_deref(), Some("usbfs"));
    Program(perl)
}
