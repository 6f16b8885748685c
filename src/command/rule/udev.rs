//! A udev rule's text (udev(7)).
//!
//! The rule also has to match when a device is unplugged. A `remove` event has
//! the kernel's own variables but no attributes, because sysfs does not have
//! the device any more. DEVPATH, PRODUCT and TYPE are available, and the serial
//! number is not.

use super::serial::pattern;
use super::socket::Socket;
use super::what::What;
use crate::error::Error;
use crate::text::{escape, udev_word};

/// The beginning of every rule. It matches devices, but not their interfaces.
const DEVICE: &str = r#"SUBSYSTEM=="usb", ENV{DEVTYPE}=="usb_device""#;

/// The part of a rule that matches the devices behind a hub, but not the hubs
/// there, which stay with the host. TYPE is class/subclass/protocol. Some hubs
/// have their class only in an interface.
const BELOW: (&str, &str) = ("/*", r#", ENV{TYPE}!="9/*", ENV{ID_USB_INTERFACES}!="*:09*""#);

/// The rule that makes udev run a command.
pub fn rule(what: &What, vm: &str, command: &[String]) -> Result<String, Error> {
    let run = run(command)?;
    let rules = match what {
        What::Port(socket) => at_socket(socket, ("", ""), &run)?,
        What::Below(socket) => at_socket(socket, BELOW, &run)?,
        What::Product(_) => line("add|remove", &product(what), &run),
        What::Serial(_, serial) => {
            let product = product(what);
            let serial = format!("{product}, ATTR{{serial}}==\"{}\"", pattern(serial)?);
            format!(
                "# On add the serial number is known.\n{}{AT_REMOVE}{}",
                line("add", &serial, &run),
                line("remove", &product, &run)
            )
        }
    };
    Ok(format!("{}{}{rules}", comment(what, vm), what.numbers()))
}

/// The comment before the rule for `remove` events.
const AT_REMOVE: &str =
    "# On remove it is not; of what matches, only a device that is in the VM is detached.\n";

/// One rule.
fn line(action: &str, matches: &str, run: &str) -> String {
    format!("{DEVICE}, ACTION==\"{action}\", \\\n    {matches}, \\\n{run}")
}

/// The rules for a socket, or for the ports below it.
fn at_socket(socket: &Socket, (below, and): (&str, &str), run: &str) -> Result<String, Error> {
    let Some(place) = &socket.place else {
        let paths = socket.ports.iter().map(|port| format!("*/{port}{below}"));
        return Ok(line("add|remove", &format!("{}{and}", devpath(paths)), run));
    };
    // The rule works for every number that the bus may get.
    let controller = pattern(&place.controller)?;
    let path = |chain| format!("{controller}/usb*/*-{chain}{below}");
    let mut paths: Vec<String> = place.paths.iter().map(|p| path(p.chain())).collect();
    paths.dedup();
    let any = format!("{}{and}", devpath(paths.into_iter()));
    if place.is_all() {
        return Ok(line("add|remove", &any, run));
    }
    let mut rules = "# On add it is known whether a port is on the controller's bus for USB 2 or \
         for USB 3.\n"
        .to_owned();
    for half in &place.paths {
        let path = devpath(std::iter::once(path(half.chain())));
        let matches = format!("{path}{and}, \\\n    {}", root_hub(half.bus().revision()));
        rules += &line("add", &matches, run);
    }
    Ok(rules + AT_REMOVE + &line("remove", &any, run))
}

/// A pattern for DEVPATH. udev matches the whole of it, and `*` is any text,
/// even with `/`.
fn devpath(paths: impl Iterator<Item = String>) -> String {
    format!("DEVPATH==\"{}\"", paths.collect::<Vec<_>>().join("|"))
}

/// Matches a root hub of this USB revision above the device. udev requires that
/// both keys match the same parent (udev(7), `KERNELS`, `ATTRS`). A root hub
/// for USB 3 has the protocol 3 (USB 3.2 specification, section 10.15.1).
fn root_hub(revision: u8) -> &'static str {
    match revision {
        3 => r#"KERNELS=="usb*", ATTRS{bDeviceProtocol}=="03""#,
        _ => r#"KERNELS=="usb*", ATTRS{bDeviceProtocol}=="00|01|02""#,
    }
}

/// The comment that says what the rule is for. It also identifies a rule that
/// was installed.
pub fn comment(what: &What, vm: &str) -> String {
    format!("# usb-qmp-hotplug: to VM {}, {what}\n", escape(vm))
}

/// The pattern for PRODUCT. The kernel writes it in hexadecimal without
/// padding: `627/1/0` (Linux, drivers/usb/core/driver.c, `usb_uevent`).
fn product(what: &What) -> String {
    match what {
        What::Product(id) | What::Serial(id, _) => {
            format!("ENV{{PRODUCT}}==\"{:x}/{:x}/*\"", id.vendor, id.product)
        }
        What::Port(_) | What::Below(_) => String::new(),
    }
}

/// The last line of a rule.
fn run(command: &[String]) -> Result<String, Error> {
    let words: Vec<String> = command.iter().map(|word| quoted(word)).collect::<Result<_, _>>()?;
    Ok(format!("    RUN+=\"{}\"\n", words.join(" ")))
}

fn quoted(word: &str) -> Result<String, Error> {
    udev_word(word).ok_or_else(|| {
        let word = escape(word);
        Error::Usage(format!(
            "`{word}` cannot be written in a udev rule: it has quotes, backslashes or control \
             characters; name the VM in the configuration, and give its name"
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::super::socket::Place;
    use super::*;
    use crate::usb::{Port, PortPath};
    use proptest::prelude::*;

    fn shown(what: &What) -> String {
        let command = ["/usr/bin/usb-qmp-hotplug", "udev", "/run/vm.qmp"].map(str::to_owned);
        rule(what, "/run/vm.qmp", &command).unwrap()
    }

    fn by_number(names: &[&str]) -> Socket {
        let ports = names.iter().map(|name| name.parse().unwrap()).collect();
        Socket { ports, place: None }
    }

    /// Ports of the controller 0000:00:14.0, which has buses for USB 2 and USB
    /// 3.
    fn by_place(paths: &[&str]) -> Socket {
        let paths: Vec<_> =
            paths.iter().map(|path| format!("pci-0000:00:14.0-{path}").parse().unwrap()).collect();
        let controller = "/devices/pci0000:00/0000:00:14.0".to_owned();
        let ports =
            (1..).zip(&paths).map(|(bus, p): (u16, &PortPath)| Port::new(bus, p.chain().clone()));
        Socket {
            ports: ports.collect(),
            place: Some(Place { paths, controller, revisions: vec![2, 3] }),
        }
    }

    #[test]
    fn a_port_is_the_path_of_its_controller_and_the_ports_behind_it() {
        assert_eq!(
            shown(&What::Port(by_place(&["usbv2-0:1.2", "usbv3-0:1.2"]))),
            "# usb-qmp-hotplug: to VM /run/vm.qmp, whatever is plugged into port \
             pci-0000:00:14.0-usbv2-0:1.2 or its other half pci-0000:00:14.0-usbv3-0:1.2\n\
             # When this was written, that was 1-1.2 and 2-1.2.\n\
             SUBSYSTEM==\"usb\", ENV{DEVTYPE}==\"usb_device\", ACTION==\"add|remove\", \\\n    \
             DEVPATH==\"/devices/pci0000:00/0000:00:14.0/usb*/*-1.2\", \\\n    \
             RUN+=\"/usr/bin/usb-qmp-hotplug udev /run/vm.qmp\"\n"
        );
    }

    #[test]
    fn halves_with_other_numbers_are_told_apart_by_their_root_hubs() {
        let controller = "/devices/pci0000:00/0000:00:14.0/usb*/";
        let rule = shown(&What::Port(by_place(&["usbv2-0:3", "usbv3-0:1"])));
        let rules: Vec<&str> = rule.split("SUBSYSTEM").skip(1).collect();
        let [usb2, usb3, remove] = rules[..] else { panic!("{rule}") };
        let add = |rule: &str| rule.contains("ACTION==\"add\"");
        assert!(add(usb2) && usb2.contains(&format!("DEVPATH==\"{controller}*-3\"")), "{rule}");
        assert!(usb2.contains(r#"KERNELS=="usb*", ATTRS{bDeviceProtocol}=="00|01|02""#), "{rule}");
        assert!(add(usb3) && usb3.contains(&format!("DEVPATH==\"{controller}*-1\"")), "{rule}");
        assert!(usb3.contains(r#"KERNELS=="usb*", ATTRS{bDeviceProtocol}=="03""#), "{rule}");
        let both = format!("DEVPATH==\"{controller}*-3|{controller}*-1\", \\\n    RUN");
        assert!(remove.contains("ACTION==\"remove\"") && remove.contains(&both), "{rule}");
        // A port without another half differs from the port of the same number
        // on the other bus.
        let rule = shown(&What::Port(by_place(&["usbv2-0:3"])));
        assert!(rule.matches("ATTRS{").count() == 1 && rule.contains("00|01|02"), "{rule}");
    }

    #[test]
    fn by_bus_number_a_port_is_the_end_of_its_path() {
        let rule = shown(&What::Port(by_number(&["1-1.2", "2-1.2"])));
        assert!(rule.contains(r#"ACTION=="add|remove", \"#), "{rule}");
        assert!(rule.contains(r#"DEVPATH=="*/1-1.2|*/2-1.2", "#), "{rule}");
    }

    #[test]
    fn what_is_below_a_hub_has_it_in_its_path() {
        let hubs = r#", ENV{TYPE}!="9/*", ENV{ID_USB_INTERFACES}!="*:09*", "#;
        let rule = shown(&What::Below(by_number(&["1-1"])));
        assert!(rule.contains(&format!(r#"DEVPATH=="*/1-1/*"{hubs}"#)), "{rule}");
        let rule = shown(&What::Below(by_place(&["usbv3-0:1", "usbv2-0:1"])));
        let path = "/devices/pci0000:00/0000:00:14.0/usb*/*-1/*";
        assert!(rule.contains(&format!("DEVPATH==\"{path}\"{hubs}")), "{rule}");
    }

    #[test]
    fn a_product_is_written_as_the_kernel_writes_it() {
        let rule = shown(&What::Product("0627:0001".parse().unwrap()));
        assert!(rule.contains(r#"ENV{PRODUCT}=="627/1/*""#), "{rule}");
        let rule = shown(&What::Product("152D:A0B0".parse().unwrap()));
        assert!(rule.contains(r#"ENV{PRODUCT}=="152d/a0b0/*""#), "{rule}");
    }

    #[test]
    fn a_serial_number_attaches_and_the_port_detaches() {
        let rule = shown(&What::Serial("0627:0001".parse().unwrap(), "01 2".into()));
        let rules: Vec<&str> = rule.split("# On remove").collect();
        assert!(rules[0].contains(r#"ACTION=="add""#) && rules[0].contains(r#"{serial}=="01 2""#));
        assert!(rules[1].contains(r#"ACTION=="remove""#) && !rules[1].contains("serial}"));
        assert!(rule.matches("RUN+=").count() == 2 && rule.matches("627/1/*").count() == 2);
    }

    #[test]
    fn words_reach_the_program_as_they_are() {
        assert_eq!(quoted("/run/a b%c$d.qmp").unwrap(), "'/run/a b%%c$$d.qmp'");
        assert_eq!(quoted("").unwrap(), "''");
        for word in ["/run/a'b", "/run/a\"b", "/run/a\\b", "/run/a\nb"] {
            assert_eq!(quoted(word).unwrap_err().exit_code(), 2, "{word}");
        }
    }

    proptest! {
        #[test]
        fn no_serial_number_leaves_its_place(serial in any::<String>()) {
            prop_assume!(pattern(&serial).is_ok());
            let what = What::Serial("0627:0001".parse().unwrap(), serial);
            let rule = shown(&what);
            // There are two comments inside, and three lines for each of the
            // two rules.
            prop_assert_eq!(rule.lines().count(), 9);
            prop_assert_eq!(rule.matches("RUN+=\"/").count(), 2);
            let value = rule.split("ATTR{serial}==\"").nth(1).unwrap().split('\n').next().unwrap();
            let (value, rest) = value.split_once('"').unwrap();
            prop_assert_eq!(rest, ", \\");
            prop_assert!(!value.contains(['|', '\\', '$', '%']));
        }
    }
}
