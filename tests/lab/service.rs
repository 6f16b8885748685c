//! The daemon as a service of a real systemd, for the machine and for a user: with its unit as it is shipped, but for
//! the time of a conversation.

use crate::host::must;
use crate::tool::PROGRAM;
use crate::udev;
use crate::wait::{wait_for, wait_until};
use std::fs;
use std::os::unix::fs::chown;
use std::path::Path;
use std::process::Command;

const NAME: &str = "usb-qmp-hotplug.service";
const UNIT: &str = include_str!("../../contrib/systemd/usb-qmp-hotplug.service");
const USER_UNIT: &str = include_str!("../../contrib/systemd/user/usb-qmp-hotplug.service");
const OLDER_THAN_253: &str = include_str!("../../contrib/systemd/older-than-253.conf");

/// What the service has for a conversation, in seconds. Its own five are for a machine that is not emulated. A test waits
/// until this is over, so it is less than what the other daemons have.
const SECONDS: &str = "30";

/// The user whose service manager runs, 65534 like the user of [`crate::vm::Builder::unprivileged`].
const AS_USER: &str = "setpriv --reuid 65534 --regid 65534 --clear-groups --inh-caps=-all \
                       env XDG_RUNTIME_DIR=/run/user/65534 systemctl --user";
const USER_HOME: &str = "/run/home";
const USER_MANAGER: &str = "[Service]
Type=notify
User=65534
Environment=HOME=/run/home XDG_RUNTIME_DIR=/run/user/65534
ExecStart=/lib/systemd/systemd --user
Delegate=yes
KillMode=mixed
";

/// Whether systemd is process 1 here, so that its services are running.
pub fn has_systemd() -> bool {
    Path::new("/run/systemd/system").exists()
}

pub struct Service {
    systemctl: &'static str,
    config: String,
}

impl Service {
    /// The service for the whole machine, not started yet.
    pub fn of_the_machine() -> Service {
        install("/run/systemd/system", UNIT);
        let config = "/etc/usb-qmp-hotplug.toml".to_owned();
        Service { systemctl: "systemctl", config }.loaded()
    }

    /// The service of an ordinary user, not started yet.
    pub fn of_a_user() -> Service {
        install(&format!("{USER_HOME}/.config/systemd/user"), USER_UNIT);
        fs::create_dir_all("/run/user/65534").unwrap();
        for path in [USER_HOME, "/run/user/65534"] {
            chown(path, Some(65534), Some(65534)).unwrap();
        }
        fs::write("/run/systemd/system/user-manager.service", USER_MANAGER).unwrap();
        must("systemctl", &["daemon-reload"]);
        must("systemctl", &["start", "user-manager.service"]);
        let config = format!("{USER_HOME}/.config/usb-qmp-hotplug.toml");
        Service { systemctl: AS_USER, config }.loaded()
    }

    fn loaded(self) -> Service {
        self.systemctl(&["daemon-reload"]);
        self.systemctl(&["stop", NAME]);
        self.systemctl(&["reset-failed", NAME]);
        self
    }

    /// Writes its configuration: these VMs, and what else is in it.
    pub fn configure(&self, vms: &[&str], rules: &str) {
        fs::write(&self.config, crate::daemon::configuration(vms, rules)).unwrap();
    }

    /// Writes its configuration, all of it.
    pub fn configure_all(&self, text: &str) {
        fs::write(&self.config, text).unwrap();
    }

    /// Starts it once udevd has looked at every disk, as [`crate::daemon::Daemon::start`]; it is ready then.
    pub fn start(&self) {
        udev::settle();
        self.systemctl(&["start", NAME]);
        assert_eq!(self.property("ActiveState"), "active");
    }

    /// Has it read its configuration again.
    pub fn reload(&self) {
        self.systemctl(&["reload", NAME]);
    }

    #[track_caller]
    pub fn wait_for_status(&self, status: &str) {
        let text = || self.property("StatusText");
        wait_until(&format!("status {status}; so far {}", text()), || text() == status);
    }

    /// The first line of its log that has all these parts, once it is there.
    #[track_caller]
    pub fn wait_for_log(&self, parts: &[&str]) -> String {
        wait_for(&format!("{parts:?} in the journal:\n{}", self.log()), || {
            let log = self.log();
            log.lines().find(|line| parts.iter().all(|p| line.contains(p))).map(str::to_owned)
        })
    }

    /// What it has said to the journal.
    pub fn log(&self) -> String {
        let process = format!("_PID={}", self.property("MainPID"));
        let output = Command::new("journalctl").args(["-o", "cat", &process]).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    }

    pub fn property(&self, name: &str) -> String {
        self.systemctl(&["show", "--property", name, "--value", NAME]).trim().to_owned()
    }

    fn systemctl(&self, arguments: &[&str]) -> String {
        let mut words = self.systemctl.split_whitespace();
        let mut command = Command::new(words.next().unwrap());
        let output = command.args(words).args(arguments).output().unwrap();
        // `reset-failed` fails for a unit that never ran.
        let is_good = output.status.success() || arguments[0] == "reset-failed";
        assert!(is_good, "{arguments:?}: {output:?}\n{}", journal());
        String::from_utf8(output.stdout).unwrap()
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- the journal\n{}", journal());
        }
        self.systemctl(&["stop", NAME]);
        let _ = Command::new("systemctl").args(["stop", "user-manager.service"]).output();
    }
}

/// What a shell, run once with all that the machine's unit denies, says.
pub fn in_the_sandbox(script: &str) -> String {
    const PROBE: &str = "/run/systemd/system/probe.service";
    let sandbox = UNIT.lines().filter(|line| {
        let other = ["Type=", "ExecStart=", "Restart", "WatchdogSec="];
        !other.iter().any(|name| line.starts_with(name))
    });
    let unit: String = sandbox.map(|line| format!("{line}\n")).collect();
    let probe = "[Service]\nType=oneshot\nStandardOutput=file:/run/probe\nExecStart=/bin/sh /run/probe.sh\n";
    let unit = unit.replace("[Service]\n", probe);
    fs::write(PROBE, unit).unwrap();
    fs::write("/run/probe.sh", script).unwrap();
    fs::write("/run/probe", "").unwrap();
    must("systemctl", &["daemon-reload"]);
    must("systemctl", &["start", "probe.service"]);
    fs::read_to_string("/run/probe").unwrap()
}

/// A unit of somebody else's.
pub fn other_unit(name: &str, text: &str) {
    fs::write(format!("/run/systemd/system/{name}"), text).unwrap();
    must("systemctl", &["daemon-reload"]);
}

fn install(directory: &str, unit: &str) {
    // Where it belongs; the build's directory may be one that not everybody may enter.
    fs::copy(PROGRAM, "/usr/bin/usb-qmp-hotplug").unwrap();
    let drop_ins = format!("{directory}/{NAME}.d");
    fs::create_dir_all(&drop_ins).unwrap();
    let patient = unit.replace(" watch\n", &format!(" --timeout {SECONDS} watch\n"));
    assert_ne!(patient, unit);
    fs::write(format!("{directory}/{NAME}"), patient).unwrap();
    if version() < 253 {
        fs::write(format!("{drop_ins}/older-than-253.conf"), OLDER_THAN_253).unwrap();
    }
}

fn version() -> u32 {
    let output = Command::new("systemctl").arg("--version").output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    text.split_whitespace().nth(1).and_then(|version| version.parse().ok()).expect("a version")
}

fn journal() -> String {
    let output = Command::new("journalctl").args(["-b", "-n", "60"]).output().unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}
