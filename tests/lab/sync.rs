//! `sync`, as a person or a script runs it, and the names of the configuration.

use crate::daemon::{CONFIG, Daemon, configure, rule};
use crate::hardware::{Device, Hardware, Stick, xhci};
use crate::tool::{Outcome, run, run_hastily};
use crate::vm::Vm;
use serde_json::{Value, json};
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;

crate::tests![
    what_matches_is_attached_and_what_was_left_behind_is_detached: any_qemu,
    a_dry_run_says_what_and_why_and_changes_nothing: any_qemu,
    every_vm_gets_what_it_can_and_the_worst_failure_counts: any_qemu,
    the_names_of_the_configuration_work_in_every_command: any_qemu,
    what_others_may_change_is_told_by_sync_and_watch_and_rule: any_qemu,
];

fn sync(arguments: &[&str]) -> Outcome {
    run(["--config", CONFIG, "sync"].iter().chain(arguments))
}

fn what_matches_is_attached_and_what_was_left_behind_is_detached() {
    let mut hardware = Hardware::open();
    let (a, b) = (Vm::new("a").start(), Vm::new("b").start());
    let gone = hardware.plug(Stick::new("SN1"), xhci(3));
    let replaced = hardware.plug(Stick::new("SN2"), xhci(4));
    let by_hand = hardware.plug(Device::Mouse, xhci(5));
    run(["attach", &a.socket(), &gone.port, &replaced.port, &by_hand.port]).succeeds();
    // Somebody else's, at a place where a rule's device is.
    let foreign = hardware.plug(Device::Tablet, xhci(6));
    b.qmp("device_add", json!({"driver": "usb-host", "id": "mine", "hostbus": foreign.bus, "hostaddr": foreign.address}));
    hardware.pull_all(&[gone, replaced]);
    let new = hardware.plug(Stick::new("SN3"), xhci(4));
    configure(&["a", "b", "c"], &rule("b", "serial = \"SN3\""));

    let would = sync(&["--dry-run"]).succeeds().stdout;
    assert_eq!(a.ids().len(), 3);
    let done = sync(&[]).succeeds().stdout;
    let done_too = would.replace("would detach", "detached").replace("would attach", "attached");
    assert_eq!(done_too, done);
    assert_eq!(a.ids(), [by_hand.id_in_vm()]);
    a.must_have(&by_hand);
    assert_eq!(b.ids(), ["mine".to_owned(), new.id_in_vm()]);
    b.must_have(&new);
    let mut lines: Vec<&str> = done.lines().collect();
    lines.sort_unstable();
    assert_eq!(
        lines,
        [
            "a: detached usb-host-2-3 (its device is gone)",
            "a: detached usb-host-2-4 (another device is at its port)",
            "b: attached usb-host-2-4 (the rule at line 7)",
        ]
    );
    let again = sync(&["b", "a", "b"]).succeeds().stdout;
    assert_eq!(again, "b: nothing to do\na: nothing to do\n");
}

fn a_dry_run_says_what_and_why_and_changes_nothing() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").start();
    let stick = hardware.plug(Stick::new("SN1"), xhci(3));
    let kept = hardware.plug(Stick::new("SN2"), xhci(4));
    let rules =
        "[[rule]]\ndeny = true\nserial = \"SN2\"\n".to_owned() + &rule("a", "class = \"08\"");
    configure(&["a", "b"], &rules);
    let would = sync(&["--dry-run"]).succeeds().stdout;
    assert_eq!(would, "a: would attach usb-host-2-3 (the rule at line 8)\n");
    let json = sync(&["--dry-run", "--json"]).succeeds().stdout;
    let action = |done| {
        json!({"action": "attach", "id": "usb-host-2-3", "port": "2-3", "rule_line": 8,
            "why": "the rule at line 8", "done": done, "error": null})
    };
    let report = |actions: &[Value]| {
        let vm = |name: &str, running, actions: &[Value]| {
            json!({"vm": name, "socket": format!("/run/vm/{name}.qmp"), "running": running,
                "actions": actions, "error": null})
        };
        json!({"vms": [vm("a", true, actions), vm("b", false, &[])]})
    };
    assert_eq!(serde_json::from_str::<Value>(&json).unwrap(), report(&[action(false)]));
    assert!(vm.ids().is_empty());
    assert_eq!(stick.driver().as_deref(), Some("usb-storage"));

    let json = sync(&["--json"]).succeeds().stdout;
    assert_eq!(serde_json::from_str::<Value>(&json).unwrap(), report(&[action(true)]));
    vm.gets(&[&stick]);
    assert_eq!(kept.driver().as_deref(), Some("usb-storage"));
}

fn every_vm_gets_what_it_can_and_the_worst_failure_counts() {
    let mut hardware = Hardware::open();
    let (a, b) = (Vm::new("a").start(), Vm::new("b").start());
    let sticks = hardware
        .plug_all(vec![(Stick::new("SN1").into(), xhci(3)), (Stick::new("SN2").into(), xhci(4))]);
    // No such port in the guest.
    let refused = rule("a", "serial = \"SN1\"\nguest_port = \"16\"");
    configure(&["a", "b", "c"], &(refused + &rule("a", "port = \"2-4\"")));
    let partly = sync(&[]).exits(6);
    assert!(partly.stderr.contains("16"), "{}", partly.stderr);
    a.gets(&[&sticks[1]]);
    let json = sync(&["--json"]).exits(6).stdout;
    let vms = &serde_json::from_str::<Value>(&json).unwrap()["vms"];
    let [action] = &vms[0]["actions"].as_array().unwrap()[..] else { panic!("{json}") };
    assert_eq!((&action["port"], &action["done"]), (&json!("2-3"), &json!(false)));
    assert!(action["error"].as_str().unwrap().contains("16"), "{json}");
    assert_eq!((&vms[1]["running"], &vms[2]["running"]), (&json!(true), &json!(false)));
    // One that is named ought to run.
    assert!(sync(&["c"]).exits(4).stderr.contains("/run/vm/c.qmp"));

    configure(&["a", "b", "c"], "");
    let holder = UnixStream::connect(b.socket()).unwrap();
    let held = run_hastily(["--config", CONFIG, "sync", "c", "b"]).exits(5);
    assert!(held.stderr.contains("2 of 2 failed"), "{}", held.stderr);
    drop(holder);
}

fn the_names_of_the_configuration_work_in_every_command() {
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").start();
    let stick = hardware.plug(Stick::new("SN1"), xhci(3));
    configure(&["a"], "");
    let named = |arguments: &[&str]| run(["--config", CONFIG].iter().chain(arguments));
    named(&["attach", "a", &stick.port]).succeeds();
    vm.gets(&[&stick]);
    assert!(named(&["inspect", "a"]).succeeds().stdout.contains(&stick.port));
    named(&["detach", "a", &stick.port]).succeeds();
    vm.loses_all();
    let [bus, device] = [stick.bus, stick.address].map(|number| number.to_string());
    let event = [("ACTION", "add"), ("BUSNUM", &*bus), ("DEVNUM", &*device)];
    crate::tool::run_with(["--config", CONFIG, "udev", "a"], event).succeeds();
    vm.gets(&[&stick]);
    assert_eq!(sync(&["a"]).succeeds().stdout, "a: nothing to do\n");
    let unknown = named(&["inspect", "aa"]).exits(4).stderr;
    assert!(unknown.contains("`a`"), "{unknown}");
}

fn what_others_may_change_is_told_by_sync_and_watch_and_rule() {
    let _vm = Vm::new("a").start();
    configure(&["a"], "");
    let mode = |path: &str, mode| fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
    mode("/run/vm", 0o777);
    mode(CONFIG, 0o666);
    let told = [
        format!("any user may change {CONFIG}, and so which VM gets which device"),
        "any user may change /run/vm, and listen in the place of VM a;".to_owned(),
    ];
    let must_tell = |by: &str, said: &str| {
        for told in &told {
            assert!(said.contains(told), "{by}: {said}");
        }
    };
    must_tell("sync", &sync(&[]).succeeds().stderr);
    let rule = ["--config", CONFIG, "rule", "1-3", "--vm", "a"];
    must_tell("rule", &run(rule).succeeds().stderr);
    must_tell("rule --toml", &run(rule.iter().chain(&["--toml"])).succeeds().stderr);
    must_tell("watch", &Daemon::start().log());
    mode("/run/vm", 0o755);
    mode(CONFIG, 0o644);
    for said in [sync(&[]).succeeds().stderr, run(rule).succeeds().stderr] {
        assert!(!said.contains("/run/vm, and") && !said.contains("which VM gets"), "{said}");
    }
}
