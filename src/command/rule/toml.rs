//! Writes the rule for the configuration instead of for udev.

use std::fmt::Write;
use std::path::Path;

use super::what::What;
use super::{Context, RuleVm, text};
use crate::error::Error;
use crate::policy::config::Config;
use crate::policy::rule::MAX_GLOB;
use crate::qemu::VmAddress;
use crate::text::escape;

/// A configuration with the VM and one rule.
pub fn configuration(context: &Context, what: &What, vm: &RuleVm) -> Result<String, Error> {
    // The configuration may already have a name for the VM's socket.
    let config = context.config().unwrap_or_default();
    let known = config.vms.iter().find(|known| known.address == vm.address);
    let name = match known {
        Some(known) => known.name.clone(),
        None => name_of(&vm.address),
    };
    let mut toml = String::new();
    if known.is_some() {
        let file = context.config.to_string_lossy();
        toml += &format!("# {} has this VM already; add only the rule.\n", escape(&file));
    }
    let (place, value) = match &vm.address {
        VmAddress::Socket(socket) => ("qmp", text(socket)?),
        VmAddress::Libvirt(domain) => ("libvirt", domain.to_string()),
    };
    toml += &format!("[vm.{}]\n{place} = {}\n\n", key(&name), string(&value));
    let mut comment = what.to_string();
    if let Some(first) = comment.get(..1).map(str::to_uppercase) {
        comment.replace_range(..1, &first);
    }
    toml += &format!("# {comment}.\n{}[[rule]]\nvm = {}\n", what.numbers(), string(&name));
    // Writing to a String cannot fail.
    let _ = match what {
        What::Port(socket) => writeln!(toml, "port = \"{}\"", socket.name()),
        What::Below(socket) => writeln!(toml, "port = \"{}.*\"", socket.name()),
        What::Product(id) => {
            writeln!(toml, "vendor = \"{:04x}\"\nproduct = \"{:04x}\"", id.vendor, id.product)
        }
        What::Serial(id, serial) => {
            let serial = string(&glob(serial.trim()));
            writeln!(
                toml,
                "vendor = \"{:04x}\"\nproduct = \"{:04x}\"\nserial = {serial}",
                id.vendor, id.product
            )
        }
    };
    // Check that the printed text can be used. For example, a path may be too
    // long for a socket.
    Config::parse(Path::new("the configuration to print"), &toml)?;
    Ok(toml)
}

/// Creates a name for a VM that has none.
fn name_of(address: &VmAddress) -> String {
    let stem = match address {
        VmAddress::Socket(socket) => socket.file_stem().unwrap_or_default().to_string_lossy(),
        VmAddress::Libvirt(domain) => domain.name().into(),
    };
    let legal = |c: char| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '-' };
    let name: String = stem.chars().map(legal).take(64).collect();
    let name = name.trim_start_matches(|c: char| !c.is_ascii_alphanumeric());
    if name.is_empty() { "vm".to_owned() } else { name.to_owned() }
}

/// A key for TOML. It needs quotes if it contains a dot, because a dot would
/// split it.
fn key(name: &str) -> String {
    if name.contains('.') { string(name) } else { name.to_owned() }
}

/// A glob that matches only this text, unless that needs too many characters.
fn glob(text: &str) -> String {
    let exact: String = text
        .chars()
        .flat_map(|c| match c {
            '*' | '?' | '[' => vec!['[', c, ']'],
            c => vec![c],
        })
        .collect();
    if exact.chars().nth(MAX_GLOB).is_none() {
        return exact;
    }
    text.chars().map(|c| if "*?[".contains(c) { '?' } else { c }).take(MAX_GLOB).collect()
}

/// A basic string (TOML 1.0, section String).
fn string(text: &str) -> String {
    let mut string = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => string.extend(['\\', c]),
            // This also escapes characters that a terminal would not show.
            c if escape(c.encode_utf8(&mut [0; 4])) != c.to_string() => {
                // Writing to a String cannot fail.
                let _ = write!(string, "\\U{:08X}", u32::from(c));
            }
            c => string.push(c),
        }
    }
    string + "\""
}

#[cfg(test)]
mod tests {
    use super::super::socket::{Place, Socket};
    use super::*;
    use crate::host::Host;
    use crate::policy::rule::{Effect, Facts, Match};
    use proptest::prelude::*;
    use std::time::Duration;

    fn context(config: &Path) -> Context {
        let config = config.to_owned();
        Context { host: Host::default(), timeout: Duration::ZERO, config, quiet: false }
    }

    fn made(what: &What, socket: &str) -> (String, Config) {
        let vm =
            RuleVm { name: socket.into(), address: Path::new(socket).into(), configured: false };
        let text = configuration(&context(Path::new("/nonexistent")), what, &vm).unwrap();
        let config = Config::parse(Path::new("x"), &text).unwrap();
        assert_eq!(config.vms[0].address, Path::new(socket).into());
        (text, config)
    }

    #[test]
    fn it_is_a_configuration_with_one_rule() {
        let socket = Socket {
            ports: ["1-1.2", "2-1.2"].map(|port| port.parse().unwrap()).to_vec(),
            place: Some(Place {
                paths: ["2", "3"]
                    .map(|half| format!("pci-0000:00:14.0-usbv{half}-0:1.2").parse().unwrap())
                    .to_vec(),
                controller: "/devices/pci0000:00/0000:00:14.0".into(),
                revisions: vec![2, 3],
            }),
        };
        let (text, config) = made(&What::Port(socket), "/run/qemu/win11.qmp");
        assert_eq!(
            text,
            "[vm.win11]\nqmp = \"/run/qemu/win11.qmp\"\n\n\
             # Whatever is plugged into port pci-0000:00:14.0-usbv2-0:1.2 or its other half \
             pci-0000:00:14.0-usbv3-0:1.2.\n# When this was written, that was 1-1.2 and 2-1.2.\n\
             [[rule]]\nvm = \"win11\"\nport = \"pci-0000:00:14.0-usbv2-0:1.2\"\n"
        );
        assert!(matches!(&config.rules[0].effect, Effect::Attach(target) if target.vm == "win11"));
        let hub = Socket { ports: vec!["1-1".parse().unwrap()], place: None };
        let (text, _) = made(&What::Below(hub), "/run/a.b c.qmp");
        assert!(text.contains("port = \"1-1.*\"") && text.contains("[vm.\"a.b-c\"]"), "{text}");
    }

    #[test]
    fn a_vm_that_has_a_name_keeps_it() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "[vm.win]\nqmp = \"/run/x.qmp\"\n").unwrap();
        let vm = RuleVm {
            name: "/run/x.qmp".into(),
            address: Path::new("/run/x.qmp").into(),
            configured: false,
        };
        let what = What::Product("0627:0001".parse().unwrap());
        let text = configuration(&context(file.path()), &what, &vm).unwrap();
        assert!(text.contains("has this VM already") && text.contains("[vm.win]"), "{text}");
    }

    #[test]
    fn what_would_be_no_configuration_is_refused() {
        let long = format!("/{}", "x".repeat(108));
        let vm = RuleVm { name: long.clone(), address: Path::new(&long).into(), configured: false };
        let what = What::Product("0627:0001".parse().unwrap());
        let error = configuration(&context(Path::new("/nonexistent")), &what, &vm).unwrap_err();
        assert_eq!(error.exit_code(), 2);
    }

    proptest! {
        #[test]
        fn any_serial_number_matches_itself(serial in "\\PC{1,126}|[*?\\[\\]\"\\\\\n]{1,126}") {
            let id = "0627:0001".parse().unwrap();
            prop_assume!(!serial.trim().is_empty());
            let (_, config) = made(&What::Serial(id, serial.clone()), "/run/vm.qmp");
            let port = "1-1".parse().unwrap();
            let serial = || Some(serial.trim()).into();
            let facts = Facts::new(&port, None, id).with_serial(&serial);
            prop_assert_eq!(config.rules[0].matches(&facts), Match::Yes);
        }

        #[test]
        fn any_socket_can_be_written(socket in "/[^/\0]{1,20}") {
            prop_assume!(!socket.ends_with("/.") && !socket.ends_with("/..") && socket.len() < 108);
            made(&What::Product("0627:0001".parse().unwrap()), &socket);
        }
    }
}
