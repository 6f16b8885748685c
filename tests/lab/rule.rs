//! `rule`: what it prints, installed as it is, attaches and detaches.

use crate::daemon::{CONFIG, configure, rule};
use crate::hardware::{Device, Hardware, Plugged, Stick, ehci, xhci};
use crate::tool::{self, PROGRAM};
use crate::udev;
use crate::vm::Vm;
use crate::wait::{wait_for, wait_until};
use std::fs;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::process::{Child, Command, Stdio};

crate::tests![
    a_port_rule_attaches_and_detaches_both_halves_of_the_socket: any_qemu,
    a_product_rule_attaches_and_detaches_at_any_port: any_qemu,
    a_serial_rule_attaches_one_of_two_alike_and_detaches_it: any_qemu,
    a_hub_rule_attaches_and_detaches_what_is_behind_it: any_qemu,
    hostile_serials_and_sockets_are_taken_literally: any_qemu,
    a_serial_of_symbols_means_itself_or_is_refused: any_qemu,
    what_is_shown_of_a_serial_number_can_be_typed: any_qemu,
    who_goes_by_a_serial_that_others_have_is_told: any_qemu,
    an_installed_rule_works_at_once_and_says_how_to_undo_it: any_qemu,
    learn_takes_what_is_plugged_in_next: any_qemu,
    the_configuration_it_prints_is_one: any_qemu,
    the_example_rules_attach_and_detach: any_qemu,
    a_rule_without_a_vm_is_for_the_one_that_runs: any_qemu,
];

fn printed<const N: usize>(arguments: [&str; N]) -> String {
    let rule = tool::run(["rule"].iter().chain(&arguments)).succeeds().stdout;
    tool::rules(&rule);
    rule
}

/// Plugs it in, sees it in the VM, and pulls it out again.
#[track_caller]
fn comes_and_goes(hardware: &mut Hardware, vm: &Vm, plugged: &Plugged) {
    let id = format!("usb-host-{}", plugged.port);
    wait_until(&format!("{id} is attached"), || vm.ids() == [id.clone()]);
    hardware.pull(plugged);
    wait_until(&format!("{id} is detached"), || vm.ids().is_empty());
}

fn a_port_rule_attaches_and_detaches_both_halves_of_the_socket() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").start();
    let rule = printed(["1-3", "--vm", &vm.socket()]);
    assert!(rule.contains(r#"=="/devices/pci0000:00/0000:00:14.0/usb*/*-3""#), "{rule}");
    let mouse = hardware.plug(Device::Mouse, xhci(3));
    assert_eq!(mouse.port, "1-3");
    comes_and_goes(&mut hardware, &vm, &mouse);
    let stick = hardware.plug(Stick::new("SN1"), xhci(3));
    assert_eq!(stick.port, "2-3");
    let elsewhere = hardware.plug(Device::Mouse, xhci(13));
    comes_and_goes(&mut hardware, &vm, &stick);
    hardware.pull(&elsewhere);
}

fn a_product_rule_attaches_and_detaches_at_any_port() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").start();
    let mouse = hardware.plug(Device::Mouse, ehci(1));
    printed([&mouse.port, "--by", "product", "--vm", &vm.socket()]);
    hardware.pull(&mouse);
    let stick = hardware.plug(Stick::new("SN1"), xhci(2));
    for socket in [xhci(5), ehci(2)] {
        let mouse = hardware.plug(Device::Mouse, socket);
        comes_and_goes(&mut hardware, &vm, &mouse);
    }
    hardware.pull(&stick);
}

fn a_serial_rule_attaches_one_of_two_alike_and_detaches_it() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").start();
    let stick = hardware.plug(Stick::new("SN1"), xhci(2));
    printed(["serial=SN1", "--by", "serial", "--vm", &vm.socket()]);
    hardware.pull(&stick);
    let other = hardware.plug(Stick::new("SN10"), xhci(2));
    let stick = hardware.plug(Stick::new("SN1"), xhci(7));
    let id = format!("usb-host-{}", stick.port);
    wait_until("it is attached", || vm.ids() == [id.clone()]);
    // The remove of one alike is of no concern to it.
    hardware.pull(&other);
    udev::settle();
    assert_eq!(vm.ids(), [id]);
    comes_and_goes(&mut hardware, &vm, &stick);
}

fn a_hub_rule_attaches_and_detaches_what_is_behind_it() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").start();
    let hub = hardware.plug(Device::Hub, xhci(4));
    let rule = printed([&hub.port, "--vm", &vm.socket()]);
    assert!(rule.contains(r#"/0000:00:14.0/usb*/*-4/*""#), "{rule}");
    let beside = hardware.plug(Device::Mouse, xhci(14));
    let inner = hardware.plug(Device::Hub, xhci(4).below(2));
    for socket in [xhci(4).below(1), xhci(4).below(2).below(3)] {
        let mouse = hardware.plug(Device::Mouse, socket);
        comes_and_goes(&mut hardware, &vm, &mouse);
    }
    // With the hub goes all that is behind it.
    hardware.plug(Device::Mouse, xhci(4).below(1));
    wait_until("it is attached", || vm.ids() == ["usb-host-1-4.1"]);
    hardware.pull_all(&[inner, hub]);
    wait_until("it is detached", || vm.ids().is_empty());
    hardware.pull(&beside);
}

fn hostile_serials_and_sockets_are_taken_literally() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a $env{ACTION} %n").start();
    for serial in [r#"a*?[b]", GOTO="x"#, r"\|$env{ID}%n 'x'", "two\nlines", "Gr\u{f6}\u{df}e "] {
        let stick = hardware.plug(Stick::new(serial), xhci(2));
        let rule = printed([&stick.port, "--by", "serial", "--vm", &vm.socket()]);
        assert!(rule.is_ascii() || serial.contains('\u{f6}'), "{rule}");
        hardware.pull(&stick);
        let near = Stick::new(&serial.replace(['a', 'x', 't', 'G'], "Z"));
        let near = hardware.plug(near, xhci(8));
        let stick = hardware.plug(Stick::new(serial), xhci(6));
        comes_and_goes(&mut hardware, &vm, &stick);
        hardware.pull(&near);
    }
}

fn a_serial_of_symbols_means_itself_or_is_refused() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").start();
    let stick = hardware.plug(Stick::new("!{~}"), xhci(2));
    let rule = printed([&stick.port, "--by", "serial", "--vm", &vm.socket()]);
    assert!(rule.contains(r#"ATTR{serial}=="!{~}""#), "{rule}");
    hardware.pull(&stick);
    let other = hardware.plug(Stick::new("!{!}"), xhci(8));
    let stick = hardware.plug(Stick::new("!{~}"), xhci(6));
    comes_and_goes(&mut hardware, &vm, &stick);
    hardware.pull(&other);
    let stick = hardware.plug(Stick::new("\"$\""), xhci(2));
    let refused = tool::run(["rule", &stick.port, "--by", "serial", "--vm", &vm.socket()]);
    assert!(refused.exits(2).stderr.contains("--by port"));
    hardware.pull(&stick);
}

fn what_is_shown_of_a_serial_number_can_be_typed() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").start();
    let stick = hardware.plug(Stick::new(" S\u{1b}N1 "), xhci(2));
    let flat = tool::run(["list", "--flat"]).succeeds().stdout;
    let line = flat.lines().find(|line| line.starts_with(&stick.port)).unwrap();
    let serial = line.split('\t').nth(6).unwrap();
    assert_eq!(serial, r"S\u{1b}N1");
    tool::run(["attach", &vm.socket(), &format!("serial={serial}")]).succeeds();
    let inspected = tool::run(["inspect", &vm.socket(), "--json"]).succeeds().stdout;
    assert!(inspected.contains(r#""serial": "S\u001bN1""#), "{inspected}");
    tool::run(["detach", &vm.socket(), &format!("serial={serial}")]).succeeds();
    configure(&["a"], &rule("a", &format!("serial = '{serial}'")));
    tool::run(["--config", CONFIG, "sync"]).succeeds();
    vm.gets(&[&stick]);
}

fn who_goes_by_a_serial_that_others_have_is_told() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").start();
    let told = |port: &str| {
        let told = tool::run(["rule", port, "--by", "serial", "--vm", &vm.socket()]);
        told.succeeds().stderr
    };
    let stick = hardware.plug(Stick::new("SN1"), xhci(2));
    let alone = told(&stick.port);
    assert!(!alone.contains("serial number"), "{alone}");
    let alike = hardware.plug(Stick::new("SN1"), xhci(3));
    let both = told(&stick.port);
    assert!(both.contains("2 devices 46f4:0001 have the serial number SN1, at 2-2, 2-3"), "{both}");
    hardware.pull_all(&[stick, alike]);
    let stick = hardware.plug(Stick::new("0123456789ABCDEF"), xhci(2));
    let shared = told(&stick.port);
    assert!(shared.contains("many devices have the serial number 0123456789ABCDEF"), "{shared}");
}

fn an_installed_rule_works_at_once_and_says_how_to_undo_it() {
    const FILE: &str = "/etc/udev/rules.d/90-usb-qmp-hotplug-a-pci-0000_00_14.0-usbv2-0_3.rules";
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").start();
    // Where only root may change it.
    let program = "/usr/bin/usb-qmp-hotplug";
    fs::copy(PROGRAM, program).unwrap();
    let install =
        || tool::run_in(&["env"], program, ["rule", "1-3", "--vm", &vm.socket(), "--install"]);
    fs::set_permissions(program, fs::Permissions::from_mode(0o757)).unwrap();
    let refused = install().exits(1);
    assert!(refused.stderr.contains("any user may change /usr/bin/usb-qmp-hotplug"), "{refused:?}");
    assert!(!fs::exists(FILE).unwrap(), "it was written before it was refused");
    fs::set_permissions(program, fs::Permissions::from_mode(0o755)).unwrap();
    // A udevd that is told of rules while it is busy may miss the next event.
    udev::settle();
    let said = install().succeeds().stdout;
    assert!(said.contains(&format!("rm {FILE} && udevadm control --reload")), "{said}");
    let mouse = hardware.plug(Device::Mouse, xhci(3));
    comes_and_goes(&mut hardware, &vm, &mouse);

    let rule = fs::read_to_string(FILE).unwrap();
    assert!(install().succeeds().stdout.contains("before"));
    assert_eq!(fs::read_to_string(FILE).unwrap(), rule);
    fs::write(FILE, "# mine\n").unwrap();
    let refused = install().exits(2);
    assert!(refused.stderr.contains("is there already"), "{}", refused.stderr);
    assert_eq!(fs::read_to_string(FILE).unwrap(), "# mine\n");
    let files = fs::read_dir("/etc/udev/rules.d").unwrap().count();
    assert_eq!(files, 1, "nothing else is left behind");
    fs::remove_file(FILE).unwrap();
    tool::rules("");
}

/// The program with `--learn`, once it waits.
fn learning(arguments: &[&str]) -> Child {
    let mut child = Command::new(PROGRAM)
        .args(["rule", "--learn"])
        .args(arguments)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = [0; 512];
    let length = child.stderr.as_mut().unwrap().read(&mut said).unwrap();
    let said = String::from_utf8_lossy(&said[..length]);
    assert!(said.contains("Plug the device into the port"), "{said}");
    child
}

fn learn_takes_what_is_plugged_in_next() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").start();
    let learnt = |child: &mut Child| {
        let status = wait_for("the program's end", || child.try_wait().unwrap());
        assert!(status.success(), "{status}");
        let read = |stream: &mut dyn Read| {
            let mut text = String::new();
            stream.read_to_string(&mut text).unwrap();
            text
        };
        (read(child.stdout.as_mut().unwrap()), read(child.stderr.as_mut().unwrap()))
    };
    let mut child = learning(&["--vm", &vm.socket()]);
    let stick = hardware.plug(Stick::new("SN1"), xhci(3));
    let (rule, said) = learnt(&mut child);
    assert!(
        said.contains("plugged in: 2-3 (46f4:0001, ")
            && said.contains("), QEMU USB HARDDRIVE, serial SN1\n"),
        "{said}"
    );
    hardware.pull(&stick);
    tool::rules(&rule);
    let mouse = hardware.plug(Device::Mouse, xhci(3));
    comes_and_goes(&mut hardware, &vm, &mouse);

    let mut child = learning(&["--vm", &vm.socket()]);
    let hub = hardware.plug(Device::Hub, xhci(5));
    let (rule, said) = learnt(&mut child);
    assert!(said.contains("behind the hub at port pci-0000:00:14.0-usbv2-0:5"), "{said}");
    tool::rules(&rule);
    let mouse = hardware.plug(Device::Mouse, xhci(5).below(1));
    comes_and_goes(&mut hardware, &vm, &mouse);
    hardware.pull(&hub);

    let nothing = tool::run(["rule", "--learn", "--wait", "0.2", "--vm", &vm.socket()]).exits(3);
    assert!(nothing.stdout.is_empty() && nothing.stderr.contains("nothing was plugged in"));
}

fn a_rule_without_a_vm_is_for_the_one_that_runs() {
    let rule = ["rule", "1-3"];
    let none = tool::run(rule).exits(2).stderr;
    assert!(none.contains("no VM runs here"), "{none}");
    let one = Vm::new("a").start();
    let by_one = tool::run(rule).succeeds();
    assert!(by_one.stdout.contains(&format!(" udev {}\"", one.socket())), "{by_one:?}");
    let took = format!("for VM a ({}), which alone runs here", one.socket());
    assert!(by_one.stderr.contains(&took), "{by_one:?}");
    // Anybody can call a process a VM.
    let theirs = Vm::new("b").unprivileged().start();
    assert_eq!(tool::run(rule).succeeds().stdout, by_one.stdout);
    let named = tool::run(["inspect", "b"]).exits(4).stderr;
    assert!(named.contains("calls itself b, and anybody's process can"), "{named}");
    drop(theirs);
    let other = Vm::new("c").start();
    let several = tool::run(rule).exits(2).stderr;
    for vm in [&one, &other] {
        assert!(several.contains(&vm.socket()), "{several}");
    }
}

fn the_configuration_it_prints_is_one() {
    const FILE: &str = "/run/rule.toml";
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").start();
    let hub = hardware.plug(Device::Hub, xhci(4));
    let mouse = hardware.plug(Device::Mouse, xhci(4).below(1));
    let stick = hardware.plug(Stick::new("a*\"b\n"), xhci(6));
    for (device, by, port) in [
        (&mouse, "port", &mouse.port),
        (&stick, "product", &stick.port),
        (&stick, "serial", &stick.port),
        (&hub, "port", &mouse.port),
    ] {
        let toml = tool::run(["rule", &device.port, "--toml", "--by", by, "--vm", &vm.socket()]);
        fs::write(FILE, toml.succeeds().stdout).unwrap();
        tool::run(["--config", FILE, "sync"]).succeeds();
        assert_eq!(vm.ids(), [format!("usb-host-{port}")], "{by}");
        tool::run(["--config", FILE, "detach", "a", port]).succeeds();
    }
    let named = tool::run(["--config", FILE, "rule", "1-3", "--vm", "a"]).succeeds().stdout;
    assert!(named.contains(&format!("--config {FILE} udev a\"")), "{named}");
    tool::rules(&named);
    let mouse = hardware.plug(Device::Mouse, xhci(3));
    comes_and_goes(&mut hardware, &vm, &mouse);
}

/// `contrib/udev`, with the hashes taken away and this machine's names put in.
fn the_example_rules_attach_and_detach() {
    let example = include_str!("../../contrib/udev/90-usb-qmp-hotplug.rules");
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").start();
    let hub = hardware.plug(Device::Hub, xhci(1));
    let rule = |line: &str| line.starts_with("#SUBSYSTEM") || line.starts_with("#    ");
    let rules: String = example
        .lines()
        .filter(|line| rule(line))
        .map(|line| line.trim_start_matches('#').to_owned() + "\n")
        .collect();
    for name in ["/usr/bin/usb-qmp-hotplug", "/run/vm.qmp", "152d/578/*"] {
        assert!(rules.contains(name), "{name}");
    }
    tool::rules(
        &rules
            .replace("/usr/bin/usb-qmp-hotplug", PROGRAM)
            .replace("/run/vm.qmp", &vm.socket())
            .replace("152d/578/*", "627/1/*"),
    );
    let other = hardware.plug(Stick::new("SN0"), ehci(3));
    for (device, socket) in [
        (Stick::new("SN1").into(), xhci(2)),
        (Stick::new("SN2").into(), xhci(1).below(1)),
        (Device::Mouse, ehci(1)),
    ] {
        let plugged = hardware.plug(device, socket);
        comes_and_goes(&mut hardware, &vm, &plugged);
    }
    hardware.pull_all(&[hub, other]);
}
