//! Finds rules that name a port by the number of its bus, and the stable names
//! to write instead.

use std::fmt;

use super::rule::{Glob, Rule};
use crate::host::Host;

/// The most replacements that one message shows.
const MOST: usize = 3;

/// The ports of a configuration that have bus numbers in their names, and the
/// names to write instead. Its text is one line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ByNumber {
    /// The line of the rule, its port, and the port's stable name if the bus
    /// exists now.
    ports: Vec<(usize, Glob, Option<String>)>,
}

impl ByNumber {
    /// Looks for such rules. Returns `None` if there is none.
    pub fn of(rules: &[Rule], host: &Host) -> Option<Self> {
        let ports: Vec<_> = rules
            .iter()
            .filter_map(|rule| Some((rule.line, rule.bus_number()?.clone())))
            .map(|(line, port)| (line, port.clone(), instead(&port, host)))
            .collect();
        (!ports.is_empty()).then_some(ByNumber { ports })
    }
}

/// The same port or ports by their stable name. Only the part for the bus
/// differs.
fn instead(port: &Glob, host: &Host) -> Option<String> {
    let (bus, chain) = port.as_str().split_once('-')?;
    let bus = host.bus_path(bus.parse().ok()?)?;
    Some(format!("{bus}-0:{chain}"))
}

impl fmt::Display for ByNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ports by bus number may be other ports after the next boot: write ")?;
        let rest = self.ports.len().saturating_sub(MOST);
        for (place, (line, port, instead)) in self.ports.iter().take(MOST).enumerate() {
            let comma = if place == 0 { "" } else { ", " };
            match instead {
                Some(instead) => {
                    write!(f, "{comma}`{instead}` in place of `{port}` (line {line})")?;
                }
                None => write!(f, "{comma}a stable name in place of `{port}` (line {line})")?,
            }
        }
        if rest > 0 {
            write!(f, ", and so for {rest} more")?;
        }
        f.write_str("; `usb-qmp-hotplug list` shows the stable names")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::config::Config;
    use std::fs;
    use std::os::unix::fs::symlink;
    use std::path::Path;

    fn told(ports: &[&str]) -> Option<String> {
        let root = tempfile::tempdir().unwrap();
        let controller = root.path().join("sys/devices/pci0000:00/0000:00:14.0");
        fs::create_dir_all(controller.join("usb1")).unwrap();
        fs::create_dir_all(root.path().join("sys/bus/usb/devices")).unwrap();
        symlink("/sys/bus/pci", controller.join("subsystem")).unwrap();
        fs::write(controller.join("usb1/bDeviceProtocol"), "01\n").unwrap();
        symlink(controller.join("usb1"), root.path().join("sys/bus/usb/devices/usb1")).unwrap();
        let rule = |port: &&str| format!("[[rule]]\nvm = \"a\"\nport = \"{port}\"\n");
        let rules: String = ports.iter().map(rule).collect();
        let text = format!("[vm.a]\nqmp = \"/a\"\n{rules}");
        let config = Config::parse(Path::new("f"), &text).unwrap();
        Some(ByNumber::of(&config.rules, &Host::at(root.path()))?.to_string())
    }

    #[test]
    fn what_to_write_instead_is_told_on_one_line() {
        assert_eq!(
            told(&["1-1.2", "pci-0000:00:14.0-usbv2-0:1.3", "1-3.*", "7-1"]).unwrap(),
            "ports by bus number may be other ports after the next boot: write \
             `pci-0000:00:14.0-usbv2-0:1.2` in place of `1-1.2` (line 3), \
             `pci-0000:00:14.0-usbv2-0:3.*` in place of `1-3.*` (line 9), \
             a stable name in place of `7-1` (line 12); \
             `usb-qmp-hotplug list` shows the stable names"
        );
        let many = told(&["1-1", "1-2", "1-3", "1-4", "[12]-5"]).unwrap();
        assert!(many.contains("`1-3` (line 9), and so for 2 more; "), "{many}");
    }

    #[test]
    fn where_no_bus_is_named_nothing_is_told() {
        assert_eq!(told(&["pci-0000:00:14.0-usbv2-0:1.3", "*"]), None);
    }
}
