//! The program's contract with scripts: exit codes, what goes to which stream, and what a message says.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

mod tool;

use std::ffi::OsStr;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;

use tool::{Outcome, outcome_of, program, run};

/// A VM that is not there, and a device that no host has.
const NO_VM: &str = "/nonexistent/vm.qmp";
const NO_DEVICE: &str = "900-1.2";

/// The program's subcommands, as its help lists them.
fn subcommands() -> Vec<String> {
    let help = run(["--help"]).stdout;
    let listed = help.split("Commands:").nth(1).unwrap().split("Options:").next().unwrap();
    let name = |line: &str| {
        let name = line.strip_prefix("  ").filter(|line| !line.starts_with(' '))?;
        Some(name.split_whitespace().next()?.to_owned())
    };
    listed.lines().filter_map(name).collect()
}

// Help and usage

#[test]
fn every_command_has_help_on_standard_output() {
    let commands = subcommands();
    for known in ["inspect", "attach", "detach", "udev", "sync", "watch", "list", "vms", "help"] {
        assert!(commands.iter().any(|command| command == known), "{known}: {commands:?}");
    }
    let each = commands.iter().map(|command| vec![command.as_str(), "--help"]);
    let short = [vec!["--help"], vec!["-h"], vec!["--version"], vec!["help", "attach"]];
    for arguments in each.chain(short).filter(|arguments| arguments != &["help", "--help"]) {
        let outcome = run(&arguments);
        assert_eq!((outcome.code, outcome.stderr.as_str()), (0, ""), "{arguments:?}");
        assert!(outcome.stdout.contains("usb-qmp-hotplug"), "{arguments:?}: {}", outcome.stdout);
    }
    let help = run(["--help"]).stdout;
    assert!(help.contains("Exit codes: 0 done"), "{help}");
}

#[test]
fn a_wrong_command_line_is_exit_2_and_says_how_to_get_help() {
    let wrong: [&[&str]; 9] = [
        &[],
        &["atach", NO_VM, NO_DEVICE],
        &["attach"],
        &["attach", NO_VM],
        &["detach", NO_VM],
        &["inspect"],
        &["inspect", NO_VM, "--nonsense"],
        &["inspect", NO_VM, "-q", "-v"],
        &["attach", NO_VM, NO_DEVICE, "--open", "nonsense"],
    ];
    for arguments in wrong {
        let outcome = run(arguments);
        assert_eq!((outcome.code, outcome.stdout.as_str()), (2, ""), "{arguments:?}");
        assert!(outcome.stderr.contains("--help"), "{arguments:?}: {}", outcome.stderr);
    }
}

#[test]
fn a_wrong_option_of_a_device_is_exit_2_and_says_what_is_right() {
    for (option, words) in [
        ("guest-reset", "NAME=VALUE"),
        ("port=3", "--guest-port"),
        ("hostbus=1", "DEVICE"),
        ("=1", "no name of a property"),
    ] {
        run(["attach", NO_VM, NO_DEVICE, "-o", option]).fails(2, &[words]);
    }
}

#[test]
fn a_wrong_timeout_is_exit_2() {
    for timeout in ["0", "-1", "nan", "inf", "1e9", "five", ""] {
        let timeout = format!("--timeout={timeout}");
        run(["inspect", NO_VM, &timeout]).fails(2, &["--timeout", "seconds"]);
    }
    run(["inspect", NO_VM, "--timeout", "0.5"]).fails(4, &[]);
    run(["--timeout", "86400", "inspect", NO_VM]).fails(4, &[]);
}

#[test]
fn what_is_no_name_of_a_device_is_exit_2_and_shows_the_forms() {
    for device in ["", "1-", "/dev/sda", "serial=", "152d:23388", "1 2"] {
        for command in ["attach", "detach"] {
            run([command, NO_VM, device]).fails(2, &[device]);
        }
    }
    let forms = ["1-1.2", "1:37", "152d:2338", "serial=XYZ", "/dev/bus/usb", "/sys"];
    run(["attach", NO_VM, "?"]).fails(2, &forms);
}

// What is not there

#[test]
fn a_device_that_is_not_there_is_exit_3() {
    for device in
        [NO_DEVICE, "900:120", "/dev/bus/usb/900/120", "/sys/nonexistent", "usb-host-900-1"]
    {
        run(["attach", NO_VM, device]).fails(3, &["no USB device"]);
    }
    run(["attach", NO_VM, "serial=no such serial"]).fails(3, &["serial no such serial"]);
    run(["attach", NO_VM, NO_DEVICE, "900-1.3"]).fails(3, &[NO_DEVICE, "900-1.3", "2 of 2 failed"]);
}

#[test]
fn a_vm_that_is_not_there_is_exit_4_and_says_how_to_start_it() {
    let advice = format!("-qmp unix:{NO_VM},server=on,wait=off");
    run(["inspect", NO_VM]).fails(4, &[NO_VM, "no such socket", &advice]);
    run(["inspect", NO_VM, "--json"]).fails(4, &[NO_VM]);
    run(["detach", NO_VM, NO_DEVICE]).fails(4, &[NO_VM]);
    run(["detach", NO_VM, NO_DEVICE, "--dry-run"]).fails(4, &[NO_VM]);
}

#[test]
fn a_name_that_the_configuration_lacks_is_exit_4_and_says_that_a_path_does() {
    let config = "--config=/nonexistent/config.toml";
    run(["inspect", "win11", config]).fails(4, &["win11", "/nonexistent/config.toml", "has a `/`"]);
}

#[test]
fn quiet_still_says_what_failed() {
    run(["-q", "inspect", NO_VM]).fails(4, &[NO_VM]);
    run(["attach", NO_VM, NO_DEVICE, "--quiet"]).fails(3, &[NO_DEVICE]);
}

// udev

fn udev(variables: &[(&str, &str)]) -> Outcome {
    outcome_of(program(["udev", NO_VM]).envs(variables.iter().copied()))
}

#[test]
fn udev_without_an_event_is_exit_2_and_says_what_to_type() {
    let typed = ["ACTION=add BUSNUM=001 DEVNUM=037 usb-qmp-hotplug udev VM"];
    run(["udev", NO_VM]).fails(2, &typed);
    udev(&[("ACTION", "add")]).fails(2, &typed);
    udev(&[("ACTION", "remove"), ("BUSNUM", "1")]).fails(2, &typed);
    udev(&[("BUSNUM", "1"), ("DEVNUM", "2")]).fails(2, &typed);
}

const EVENT: [(&str, &str); 9] = [
    ("ACTION", "remove"),
    ("SUBSYSTEM", "usb"),
    ("DEVTYPE", "usb_device"),
    ("DEVPATH", "/devices/pci0000:00/0000:00:04.0/usb900/900-1/900-1.2"),
    ("BUSNUM", "900"),
    ("DEVNUM", "120"),
    ("DEVNAME", "/dev/bus/usb/900/120"),
    ("PRODUCT", "152d/2338/100"),
    ("TYPE", "0/0/0"),
];

/// The event, with other values of some variables.
fn event(changes: &[(&'static str, &'static str)]) -> Outcome {
    udev(&[&EVENT[..], changes].concat())
}

#[test]
fn udev_for_a_vm_that_is_not_running_is_exit_0_and_says_so() {
    for action in ["add", "remove"] {
        let outcome = event(&[("ACTION", action)]);
        assert_eq!((outcome.code, outcome.stdout.as_str()), (0, ""), "{}", outcome.stderr);
        assert!(outcome.stderr.contains("not running"), "{}", outcome.stderr);
        assert!(outcome.stderr.contains(NO_VM), "{}", outcome.stderr);
        assert_eq!(outcome.stderr.lines().count(), 1, "{}", outcome.stderr);
    }
}

#[test]
fn udev_passes_over_other_events_without_a_word() {
    for change in [
        ("ACTION", "change"),
        ("ACTION", "bind"),
        ("ACTION", "unbind"),
        ("DEVTYPE", "usb_interface"),
        ("SUBSYSTEM", "block"),
        ("DEVPATH", "/devices/pci0000:00/0000:00:04.0/usb900"),
    ] {
        let outcome = event(&[change]);
        let streams = (outcome.stdout.as_str(), outcome.stderr.as_str());
        assert_eq!((outcome.code, streams), (0, ("", "")), "{change:?}");
    }
}

#[test]
fn udev_refuses_a_hub_before_it_asks_the_vm() {
    event(&[("ACTION", "add"), ("TYPE", "9/0/1")]).fails(7, &["900-1.2", "is a hub"]);
}

#[test]
fn udev_typed_by_hand_for_a_device_that_is_not_there_is_exit_3() {
    udev(&[("ACTION", "add"), ("BUSNUM", "900"), ("DEVNUM", "120")]).fails(3, &["900:120"]);
}

#[test]
fn udev_with_nonsense_in_a_variable_is_exit_2_and_shows_it() {
    for (name, value) in [
        ("BUSNUM", "x\u{1b}[2J"),
        ("DEVPATH", "/devices/x\u{7}"),
        ("PRODUCT", "a"),
        ("TYPE", "hub"),
    ] {
        let outcome = event(&[("ACTION", "add"), (name, value)]);
        assert_eq!(outcome.code, 2, "{name}: {}", outcome.stderr);
        assert!(!outcome.stderr.trim_end().contains(char::is_control), "{:?}", outcome.stderr);
    }
    let mut command = program(["udev", NO_VM]);
    command.envs(EVENT).env("DEVPATH", OsStr::from_bytes(b"/devices/\xff\xfe"));
    assert_eq!(outcome_of(&mut command).code, 2);
}

// What a terminal or a script gets

#[test]
fn control_characters_of_arguments_do_not_reach_the_terminal() {
    let evil = "\u{1b}[31m\u{7}\u{202e}x\ny";
    let path = format!("/nonexistent/{evil}");
    let option = format!("{evil}=1");
    let config = format!("--config={path}");
    let timeout = format!("--timeout={evil}");
    let commands: [&[&str]; 11] = [
        &["inspect", &path],
        &["inspect", evil],
        &["inspect", "x", &config],
        &["attach", NO_VM, evil],
        &["attach", NO_VM, &format!("serial={evil}")],
        &["attach", NO_VM, &format!("/sys/{evil}")],
        &["attach", NO_VM, NO_DEVICE, "-o", &option],
        &["inspect", NO_VM, &timeout],
        &[evil],
        &["inspect", NO_VM, evil],
        &["attach", NO_VM, NO_DEVICE, "--open", evil],
    ];
    for arguments in commands {
        let outcome = run(arguments);
        assert_ne!(outcome.code, 0, "{arguments:?}");
        let is_bad = |c: char| c != '\n' && (c.is_control() || c == '\u{202e}');
        assert!(!outcome.stderr.contains(is_bad), "{arguments:?}: {:?}", outcome.stderr);
        assert!(!outcome.stderr.contains("x\ny"), "{arguments:?}: {:?}", outcome.stderr);
    }
}

#[test]
fn bytes_that_are_no_text_are_no_panic() {
    let bytes = OsStr::from_bytes(b"/nonexistent/\xff");
    for arguments in [&[OsStr::new("inspect"), bytes], &[bytes, bytes]] {
        assert_eq!(run(arguments).code, 2);
    }
}

/// Both ends of the program's streams: what it writes there goes nowhere.
fn closed() -> OwnedFd {
    UnixStream::pair().unwrap().0.into()
}

#[test]
fn closed_streams_change_no_exit_code() {
    let commands: [(&[&str], i32); 5] = [
        (&["--help"], 0),
        (&["attach", "--help"], 0),
        (&["nonsense"], 2),
        (&["inspect", NO_VM], 4),
        (&["udev", NO_VM], 2),
    ];
    for (arguments, code) in commands {
        let status = program(arguments).stdout(closed()).stderr(closed()).status().unwrap();
        assert_eq!(status.code(), Some(code), "{arguments:?}");
    }
}

#[test]
fn missing_streams_change_no_exit_code() {
    let sh = Path::new("/bin/sh");
    let script = "exec \"$0\" inspect /nonexistent/vm.qmp <&- >&- 2>&-";
    let status = Command::new(sh).args(["-c", script, tool::PROGRAM]).status().unwrap();
    assert_eq!(status.code(), Some(4));
}

#[test]
fn no_colour_where_nobody_looks() {
    for arguments in [&["--help"][..], &["nonsense"], &["inspect", NO_VM]] {
        let outcome = outcome_of(program(arguments).env("TERM", "xterm-256color"));
        assert!(!(outcome.stdout + &outcome.stderr).contains('\u{1b}'), "{arguments:?}");
    }
}

#[test]
fn a_vm_at_whose_socket_another_user_listens_counts_as_not_running() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("vm.qmp");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let config = directory.path().join("config.toml");
    let text = format!("[vm.a]\nqmp = {socket:?}\nuser = \"4000000000\"\n");
    std::fs::write(&config, text).unwrap();
    let config = config.to_str().unwrap();
    let words = ["a process of user ", "and not one of user 4000000000", "it gets nothing"];
    run(["--config", config, "inspect", "a"]).fails(4, &words);
    let event = [("ACTION", "remove"), ("BUSNUM", "900"), ("DEVNUM", "037")];
    let outcome = outcome_of(program(["--config", config, "udev", "a"]).envs(event));
    assert_eq!(outcome.code, 0, "{}", outcome.stderr);
    assert!(outcome.stderr.contains("counts as not running"), "{}", outcome.stderr);
}

#[test]
fn without_descriptors_it_says_so() {
    let mut refusals = 0;
    for limit in 4..12 {
        let script = format!("ulimit -n {limit}; exec \"$0\" inspect {NO_VM}");
        let mut shell = Command::new("sh");
        shell.args(["-c", &script, tool::PROGRAM]).env_clear();
        let Outcome { code, stderr, .. } = outcome_of(&mut shell);
        match code {
            1 if stderr.contains("Too many open files") => refusals += 1,
            // The linker found no library.
            127 => {}
            _ => assert_eq!(code, 4, "{limit}: {stderr}"),
        }
    }
    assert!(refusals > 0);
}
