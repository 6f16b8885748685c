//! What devices say of themselves: any 16-bit units at all, and none of them may do anything.

use crate::daemon::CONFIG;
use crate::gadget::{Gadget, Gadgets};
use crate::hardware::Plugged;
use crate::remote::{Device, Remotes, VENDOR};
use crate::tool::run;
use crate::vm::Vm;
use serde_json::Value;
use std::fs;

crate::tests![
    strings_of_every_kind_do_nothing_to_a_terminal: any_qemu,
    strings_of_every_kind_stay_within_their_place_in_a_rule: any_qemu,
    names_that_forge_lines_and_ids_deceive_nobody: any_qemu,
];

/// Blanks that look like others, and letters between them.
const BLANKS: &str = "\u{a0}x\u{3000}y\u{a0}z\u{2003}";

/// Up to 15: so many ports there are.
fn ugly() -> Vec<Vec<u16>> {
    let texts = [
        "\x1b]0;title\x07\x1b[2J\x1b[31m",
        "first\nPORT  DEVICE\r\n9-9  9:9  1234:5678\n",
        "tab\tvertical\x0bfeed\x0c\x08\x08",
        "\u{202e}gnp.exe\u{200b}\u{feff}\u{2028}\u{2029}",
        "\u{9b}31m\u{85}\u{7f}\u{ad}",
        "*?[a-z]\"\\'$%k{}`;|&#",
        "\", RUN+=\"/bin/false\", ENV{x}=\"",
        "%s%n$HOME$(reboot)\\x0a\\u{1b}",
        "   ",
        BLANKS,
        "e\u{301}\u{301}\u{301}\u{1f468}\u{200d}\u{1f469}\u{ffff}",
    ];
    let mut all: Vec<Vec<u16>> = texts.iter().map(|text| text.encode_utf16().collect()).collect();
    all.extend([
        vec![0xd800, 0x78],         // half a pair, first
        vec![0x78, 0xdc00, 0xdbff], // and last
        vec![0x61, 0, 0x62],        // an end in the middle
        vec![0x20ac; 126],          // the longest, three bytes each in the kernel
    ]);
    all
}

fn plug_all(remotes: &mut Remotes) -> Vec<Plugged> {
    let device = |units: &[u16]| Device::new(0x1209, 0x0001).strings(units, units, units);
    let mut plug =
        |(units, port): (Vec<u16>, u32)| remotes.plug(device(&units).interface(&VENDOR), port);
    ugly().into_iter().zip(1..).map(&mut plug).collect()
}

fn strings_of_every_kind_do_nothing_to_a_terminal() {
    let mut remotes = Remotes::load();
    let vm = Vm::new("a").start();
    let devices = plug_all(&mut remotes);
    let count = devices.len();

    let shown = run(["list"]).succeeds().stdout;
    must_be_plain(&shown);
    let is_serial = |line: &&str| line.trim_start_matches(['│', ' ']).starts_with("serial ");
    let (serials, others): (Vec<&str>, Vec<&str>) = shown.lines().partition(is_serial);
    assert_eq!(others.len(), 2 + count, "heading, bus, devices: {shown}");
    assert!(serials.len() < count, "{shown}");
    let flat = run(["list", "--flat"]).succeeds().stdout;
    must_be_plain(&flat.replace('\t', " "));
    assert_eq!(flat.lines().count(), count, "{flat}");
    let fields = |line: &str| line.split('\t').count();
    assert!(flat.lines().all(|line| fields(line) == fields(flat.lines().next().unwrap())));

    let json = run(["list", "--json"]).succeeds().stdout;
    must_be_plain(&json);
    let json: Value = serde_json::from_str(&json).unwrap();
    for (device, entry) in devices.iter().zip(json["devices"].as_array().unwrap()) {
        assert_eq!(entry["port"], device.port);
        for (field, attribute) in
            [("vendor_name", "manufacturer"), ("product_name", "product"), ("serial", "serial")]
        {
            let said = fs::read_to_string(device.sysfs.join(attribute)).unwrap_or_default();
            // Where a device says nothing, a name comes from udev's list.
            if !said.trim().is_empty() || field == "serial" {
                assert_eq!(entry[field].as_str().unwrap_or_default(), said.trim(), "{entry}");
            }
        }
    }

    // As it is shown, it can be typed.
    let blanks = ugly().iter().position(|units| *units == Vec::from_iter(BLANKS.encode_utf16()));
    let line = |port: &str| flat.lines().find(|line| line.starts_with(&format!("{port}\t")));
    let shown = line(&devices[blanks.unwrap()].port).unwrap().split('\t').nth(6).unwrap();
    assert_eq!(shown, r"x\u{3000}y\u{a0}z");
    run(["attach", "--dry-run", &vm.socket(), &format!("serial={shown}")]).succeeds();

    for device in &devices {
        let attached = run(["attach", &vm.socket(), &device.port]).succeeds();
        must_be_plain(&(attached.stdout + &attached.stderr));
    }
    vm.gets(&devices.iter().collect::<Vec<_>>());
    let shown = run(["inspect", &vm.socket()]).succeeds().stdout;
    must_be_plain(&shown);
    let json = run(["inspect", &vm.socket(), "--json"]).succeeds().stdout;
    must_be_plain(&json);
    let json: Value = serde_json::from_str(&json).unwrap();
    for device in &devices {
        let mut entries = json["devices"].as_array().unwrap().iter();
        let entry = entries.find(|entry| entry["id"] == device.id_in_vm()).expect("listed");
        assert_eq!(entry["host"]["address"], device.address);
        assert_eq!(entry["host"]["state"], "present", "{entry}");
    }
    assert_eq!(json["devices"].as_array().unwrap().len(), count);
}

fn strings_of_every_kind_stay_within_their_place_in_a_rule() {
    let mut remotes = Remotes::load();
    for device in plug_all(&mut remotes) {
        for toml in [&[][..], &["--toml"]] {
            let rule = ["rule", "--by", "serial", "--vm", "/run/vm/a.qmp", &device.port];
            let outcome = run(rule.iter().chain(toml));
            must_be_plain(&(outcome.stdout.clone() + &outcome.stderr));
            if outcome.status == 0 && toml.is_empty() {
                must_be_two_rules(&outcome.stdout);
            } else if outcome.status == 0 {
                must_mean(&outcome.stdout, &device);
            } else {
                assert!(outcome.stdout.is_empty(), "{outcome:?}");
            }
        }
    }
}

/// A configuration that gives this device to the VM, and none whose serial number is another.
#[track_caller]
fn must_mean(toml: &str, device: &Plugged) {
    fs::write(CONFIG, toml).unwrap();
    let json = run(["list", "--json", "--config", CONFIG]).succeeds();
    assert_eq!(json.stderr, "", "{toml}");
    let json: Value = serde_json::from_str(&json.stdout).unwrap();
    let entries = json["devices"].as_array().unwrap();
    let itself = entries.iter().find(|entry| entry["port"] == device.port).unwrap();
    for entry in entries {
        let is_meant = entry["serial"] == itself["serial"];
        assert_eq!(entry["rule"]["vm"] == "a", is_meant, "{toml}{entry}");
    }
}

/// One for add and one for remove, with these keys and no others.
#[track_caller]
fn must_be_two_rules(text: &str) {
    let joined = text.replace("\\\n", "");
    let rules: Vec<&str> = joined.lines().filter(|line| !line.starts_with('#')).collect();
    assert_eq!(rules.len(), 2, "{text}");
    for (rule, has_serial) in rules.into_iter().zip([true, false]) {
        let mut keys = Vec::new();
        let mut rest = rule;
        while let Some((key, value)) = rest.split_once('"') {
            keys.push(key.trim_matches([',', ' ', '=', '!', '+']));
            // udev(7): within a value, a quotation mark has a backslash before it.
            let end = value.match_indices('"').find(|(at, _)| !value[..*at].ends_with('\\'));
            rest = &value[end.expect("the value ends").0 + 1..];
        }
        let mut wanted = vec!["SUBSYSTEM", "ENV{DEVTYPE}", "ACTION", "ENV{PRODUCT}"];
        wanted.extend(has_serial.then_some("ATTR{serial}"));
        wanted.push("RUN");
        assert_eq!(keys, wanted, "{text}");
    }
}

fn names_that_forge_lines_and_ids_deceive_nobody() {
    // What QEMU's own text would have for another device.
    let forged = "x, ID: usb-host-9-9\n  Device 0.9, Port 9, Speed 480 Mb/s, Product y";
    let mut gadgets = Gadgets::load(1);
    let vm = Vm::new("a").start();
    let device = Gadget::new(0x1d6b, 0x0104).strings(forged, forged, forged).keyboard();
    let device = gadgets.plug(device, 0);
    run(["attach", &vm.socket(), &device.port]).succeeds();
    vm.gets(&[&device]);
    let json = run(["inspect", &vm.socket(), "--json"]).succeeds().stdout;
    let json: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["devices"].as_array().unwrap().len(), 1, "{json}");
    assert_eq!(json["devices"][0]["id"], device.id_in_vm());
    run(["detach", &vm.socket(), "usb-host-9-9"]).exits(3);
    run(["detach", &vm.socket(), &device.port]).succeeds();
    vm.loses_all();
}

/// Nothing but what is visible, blanks and ends of lines.
#[track_caller]
fn must_be_plain(text: &str) {
    let is_hidden = |c: char| {
        let separates_or_reorders = matches!(c, '\u{ad}' | '\u{200b}'..='\u{200f}'
            | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}');
        let is_blank = c.is_whitespace() && c != ' ';
        c != '\n' && (c.is_control() || is_blank || separates_or_reorders)
    };
    assert!(!text.contains(is_hidden), "{text:?}");
}
