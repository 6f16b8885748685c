//! `contrib/demo`, from where it is in the machine.

use crate::journal;
use std::process::Command;

crate::tests![it_shows_what_it_says: every_qemu];

fn it_shows_what_it_says() {
    // It shows what goes to its own syslog.
    journal::forget();
    let demo = concat!(env!("CARGO_MANIFEST_DIR"), "/contrib/demo");
    let output = Command::new(demo)
        .arg("inside")
        .env("DEMO_COLOUR", "no")
        .output()
        .expect("the demo starts");
    let shown = String::from_utf8(output.stdout).unwrap();
    let complaints = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{shown}\n{complaints}");
    assert_eq!(complaints, "", "{shown}");
    let parts = [
        "no USB devices",
        "attached 2-3",
        "QEMU USB HARDDRIVE",
        "hello from the stick",
        "detached 2-3",
        "demo.qmp",
    ];
    let mut rest = shown.as_str();
    for part in parts {
        rest = rest.split_once(part).unwrap_or_else(|| panic!("{part} is missing:\n{shown}")).1;
    }
}
