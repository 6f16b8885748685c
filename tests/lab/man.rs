//! The JSON documents are what the manual pages say.

use crate::hardware::{Hardware, Stick, xhci};
use crate::tool;
use crate::vm::Vm;
use serde_json::Value;
use std::collections::BTreeSet;
use std::fs;

crate::tests![the_documents_have_the_names_that_the_pages_say: any_qemu];

/// Every name in a document, with those around it.
fn names(value: &Value, within: &str, names_so_far: &mut BTreeSet<String>) {
    match value {
        Value::Object(fields) => {
            for (name, value) in fields {
                let path = format!("{within}.{name}");
                names(value, &path, names_so_far);
                names_so_far.insert(path);
            }
        }
        Value::Array(items) => items.iter().for_each(|item| names(item, within, names_so_far)),
        _ => {}
    }
}

fn the_documents_have_the_names_that_the_pages_say() {
    const CONFIG: &str = "/run/man.toml";
    let mut hardware = Hardware::open();
    let vm = Vm::new("a").start();
    let stick = hardware.plug(Stick::new("SN1"), xhci(3));
    let rule = tool::run(["rule", &stick.port, "--toml", "--vm", &vm.socket()]).succeeds().stdout;
    fs::write(CONFIG, rule).unwrap();
    for (command, example) in [
        (&["sync", "--json"][..], include_str!("../../contrib/man/sync.json")),
        (&["inspect", "a", "--json"], include_str!("../../contrib/man/inspect.json")),
        (&["list", "--json"], include_str!("../../contrib/man/list.json")),
        (&["vms", "--json"], include_str!("../../contrib/man/vms.json")),
    ] {
        let document = tool::run(["--config", CONFIG].iter().chain(command)).succeeds().stdout;
        let (mut real, mut said) = (BTreeSet::new(), BTreeSet::new());
        names(&serde_json::from_str(&document).unwrap(), "", &mut real);
        names(&serde_json::from_str(example).unwrap(), "", &mut said);
        // Nobody uses the stick, and no monitor is held.
        let empty = ["in_use.", "other_use.", "held_by."];
        said.retain(|name| real.contains(name) || !empty.iter().any(|part| name.contains(part)));
        assert_eq!(real, said, "{command:?}");
    }
}
