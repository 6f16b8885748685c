//! Rules for the real udevd, and waiting for it.

use std::fs;
use std::path::Path;
use std::process::Command;

const DIRECTORY: &str = "/etc/udev/rules.d";
const RULES: &str = "/etc/udev/rules.d/90-test.rules";

/// Makes these the rules. First udevd is to be done: of what it does while it reads new rules, and shortly after, an
/// event may get lost (seen with systemd 257).
pub fn rules(text: &str) {
    settle();
    fs::write(RULES, text).expect("udev's rules");
    udevadm(&["control", "--reload"]);
}

/// Removes whatever rules an earlier test has left.
pub fn forget_rules() {
    let rules: Vec<_> = fs::read_dir(DIRECTORY).expect("udev's rules").flatten().collect();
    if rules.is_empty() {
        return;
    }
    // What udevd has begun by the old rules must not end in the next test.
    settle();
    for file in &rules {
        fs::remove_file(file.path()).expect("a rule");
    }
    udevadm(&["control", "--reload"]);
}

/// Waits until udevd has dealt with every event so far, RUN programs included.
pub fn settle() {
    udevadm(&["settle", "--timeout=180"]);
}

/// Replays an event for a device.
pub fn trigger(action: &str, sysfs: &Path) {
    udevadm(&["trigger", "--action", action, sysfs.to_str().unwrap()]);
}

fn udevadm(arguments: &[&str]) {
    let status = Command::new("udevadm").args(arguments).status().expect("udevadm");
    assert!(status.success(), "udevadm {arguments:?}: {status}");
}

/// Has udev know nothing of a device, as before it has got to it.
pub fn forget_device(sysfs: &Path) {
    let number = fs::read_to_string(sysfs.join("dev")).unwrap();
    fs::remove_file(format!("/run/udev/data/c{}", number.trim())).unwrap();
}
