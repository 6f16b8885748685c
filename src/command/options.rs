//! The options of an attach, from the command line.

use serde_json::{Map, Value};

use crate::attach::{Open, Options};
use crate::cli::{self, How};
use crate::error::Error;
use crate::host::Look;
use crate::policy::rule::reserved_option;
use crate::qemu::Placement;
use crate::text::escape;

/// The properties of usb-host that take text, even if the text looks like a
/// number (QEMU, hw/usb/host-libusb.c, `usb_host_dev_properties`, and
/// hw/usb/bus.c, `usb_props`).
const TEXT: [&str; 2] = ["pcap", "serial"];

/// Reads the options.
///
/// # Errors
///
/// [`Error::Usage`] with the name of the option that is wrong.
pub fn options(how: &How, dry_run: bool, look: Look) -> Result<Options, Error> {
    let mut properties = Map::new();
    for option in &how.options {
        let (name, value) = property(option)?;
        properties.insert(name, value);
    }
    let open = match how.open {
        cli::Open::Descriptor => Open::Descriptor,
        cli::Open::Address => Open::Address,
    };
    let placement = Placement { bus: how.guest_bus.clone(), port: how.guest_port.clone() };
    Ok(Options {
        placement,
        properties,
        open,
        add_controller: how.add_controller,
        force: how.force,
        look,
        dry_run,
        blocking: false,
    })
}

fn property(option: &str) -> Result<(String, Value), Error> {
    let usage = |what: &str| Error::Usage(format!("-o {}: {what}", escape(option)));
    let (name, value) = option.split_once('=').ok_or_else(|| usage("give NAME=VALUE"))?;
    if reserved_option(name).is_some() {
        let instead = match name {
            "bus" => "use --guest-bus",
            "port" => "use --guest-port",
            _ => "name the device as DEVICE",
        };
        return Err(usage(&format!("this tool sets `{name}` itself; {instead}")));
    }
    let legal = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    if name.is_empty() || !name.chars().all(legal) {
        return Err(usage("this is no name of a property"));
    }
    // QEMU 10 accepts numbers only as JSON numbers, and switches only as JSON
    // booleans.
    let value = match value {
        value if TEXT.contains(&name) => Value::from(value),
        "on" | "true" | "yes" => Value::from(true),
        "off" | "false" | "no" => Value::from(false),
        value => value.parse::<i64>().map_or_else(|_| Value::from(value), Value::from),
    };
    Ok((name.to_owned(), value))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn values_have_the_types_that_qemu_wants() {
        let value = |option| property(option).unwrap().1;
        assert_eq!(value("guest-reset=off"), json!(false));
        assert_eq!(value("msos-desc=true"), json!(true));
        assert_eq!(value("isobufs=8"), json!(8));
        assert_eq!(value("serial=1234"), json!("1234"));
        assert_eq!(value("pcap=/tmp/a=b"), json!("/tmp/a=b"));
    }

    #[test]
    fn what_the_tool_sets_itself_is_refused() {
        let error = property("port=3").unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().contains("--guest-port"), "{error}");
        assert!(property("guest-reset").is_err());
        assert!(property("=x").is_err());
        assert!(property("a b=x").is_err());
    }
}
