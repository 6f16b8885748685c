//! Rules for the real udevd, and waiting for it.

use crate::wait::wait_until;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

const DIRECTORY: &str = "/etc/udev/rules.d";
const RULES: &str = "/etc/udev/rules.d/90-test.rules";

/// Makes these the rules, and waits until udevd goes by them. What it still has to do comes first: systemd 257 may lose
/// an event that comes while it reads rules.
pub fn rules(text: &str) {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let sign = format!("lab-rules-{}-{count}", std::process::id());
    settle();
    let with_sign = format!("{text}\nSUBSYSTEM==\"mem\", KERNEL==\"null\", SYMLINK+=\"{sign}\"\n");
    fs::write(RULES, with_sign).expect("udev's rules");
    wait_until("udevd goes by the new rules", || {
        reload();
        trigger("change", Path::new("/sys/class/mem/null"));
        settle();
        Path::new("/dev").join(&sign).exists()
    });
}

fn reload() {
    must_be_done(&["control", "--reload"]);
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
    reload();
}

/// Waits until udevd has dealt with every event so far, RUN programs included.
pub fn settle() {
    must_be_done(&["settle", "--timeout=180"]);
}

/// Replays an event for a device.
pub fn trigger(action: &str, sysfs: &Path) {
    let path = sysfs.to_str().unwrap();
    assert!(udevadm(&["trigger", "--action", action, path]), "an event is replayed for {path}");
}

/// Has udevd do something. systemd 257 may hang up on who asks ("Broken pipe"): then it is asked again.
fn must_be_done(arguments: &[&str]) {
    wait_until(&format!("udevadm {arguments:?}"), || udevadm(arguments));
}

fn udevadm(arguments: &[&str]) -> bool {
    Command::new("udevadm").args(arguments).status().expect("udevadm").success()
}

/// Has udev know nothing of a device, as before it has got to it. Its node is of a kind: `b` for a disk, `c` for others.
pub fn forget_device(kind: char, sysfs: &Path) {
    let number = fs::read_to_string(sysfs.join("dev")).unwrap();
    fs::remove_file(format!("/run/udev/data/{kind}{}", number.trim())).unwrap();
}
