//! Uses of a device that have nothing to do with disks: its network, a program,
//! or the person who types. No data is lost when the device leaves, but the
//! user should know about it.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use super::disk::{directories, name, number_of};
use super::{Holder, Host, Look, read_if_there};
use crate::usb::Port;

/// The most levels between the directory of a device and that of its node.
const MAX_DEPTH: usize = 8;

/// The most bridges, bonds and VLANs that are followed upwards from an adapter.
const MAX_STACK: usize = 4;

/// A use of a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OtherUse {
    /// The network adapter of this name has the default route. The route may
    /// belong to a bridge that the adapter is in.
    DefaultRoute(String),
    /// The network adapter of this name has an address, or its bridge has one.
    Address(String),
    /// This program has the node of this name open: a serial port, a sound
    /// device, a printer or a camera.
    Program(String, Holder),
    /// It is the only keyboard of the host.
    OnlyKeyboard,
}

impl OtherUse {
    /// The word for it in the JSON documents.
    pub fn word(&self) -> &'static str {
        match self {
            OtherUse::DefaultRoute(_) => "default-route",
            OtherUse::Address(_) => "address",
            OtherUse::Program(..) => "program",
            OtherUse::OnlyKeyboard => "only-keyboard",
        }
    }
}

/// All uses on one line: `eth1 has an address; it is the only keyboard`. `None`
/// if there is no use.
pub fn listed(uses: &[OtherUse]) -> Option<String> {
    let shown: Vec<String> = uses.iter().map(ToString::to_string).collect();
    (!shown.is_empty()).then(|| shown.join("; "))
}

impl fmt::Display for OtherUse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            OtherUse::DefaultRoute(name) => write!(f, "{name} has the default route"),
            OtherUse::Address(name) => write!(f, "{name} has an address"),
            OtherUse::Program(node, holder) => write!(f, "{node} is open in {holder}"),
            OtherUse::OnlyKeyboard => f.write_str("it is the only keyboard"),
        }
    }
}

/// The parts of a device that the host can use, as directories of sysfs.
#[derive(Debug, Default)]
struct Functions {
    adapters: Vec<PathBuf>,
    nodes: Vec<PathBuf>,
    keyboards: usize,
}

impl Host {
    /// What the host uses the device at a port for, besides its disks. With a
    /// thorough look, it also finds the programs that have it open, as far as
    /// this process may see that.
    pub fn other_uses(&self, port: &Port, look: Look) -> Vec<OtherUse> {
        let functions = self.functions(port);
        let mut uses = Vec::new();
        if !functions.adapters.is_empty() {
            let routes = Routes::read(self);
            uses.extend(
                functions.adapters.iter().filter_map(|adapter| self.network(adapter, &routes)),
            );
        }
        let number = |node: &PathBuf| Some((false, number_of(node)?, name(node)));
        let nodes: Vec<_> = functions.nodes.iter().filter_map(number).collect();
        if look == Look::Thorough && !nodes.is_empty() {
            let open = self.open_in(&nodes).0.into_iter();
            uses.extend(open.map(|(node, pid)| OtherUse::Program(node, self.holder(pid))));
        }
        if functions.keyboards > 0 && self.keyboards() == functions.keyboards {
            uses.push(OtherUse::OnlyKeyboard);
        }
        uses
    }

    fn functions(&self, port: &Port) -> Functions {
        let mut functions = Functions::default();
        let mut todo = vec![(self.directory(port), 0)];
        while let Some((directory, depth)) = todo.pop() {
            for child in directories(&directory) {
                let its_name = name(&child);
                match subsystem(&child).as_deref() {
                    Some("net") => functions.adapters.push(child),
                    // Every desktop has the mixer of a sound device open.
                    Some("tty" | "sound" | "usbmisc" | "video4linux")
                        if child.join("dev").exists() && !its_name.starts_with("control") =>
                    {
                        functions.nodes.push(child);
                    }
                    Some("input") if is_keyboard(&child) => functions.keyboards += 1,
                    _ if depth < MAX_DEPTH
                        && its_name.parse::<Port>().is_err()
                        && !its_name.starts_with("ep_")
                        && its_name != "power" =>
                    {
                        todo.push((child, depth + 1));
                    }
                    _ => {}
                }
            }
        }
        functions
    }

    fn network(&self, adapter: &Path, routes: &Routes) -> Option<OtherUse> {
        let mut stack = vec![name(adapter)];
        let mut next = 0;
        while let Some(lower) = stack.get(next).filter(|_| next < MAX_STACK) {
            // There is a link for each bridge, bond or VLAN (Linux,
            // net/core/dev.c, `netdev_adjacent_sysfs_add`).
            let links = fs::read_dir(self.path(format!("/sys/class/net/{lower}")));
            let upper = |entry: fs::DirEntry| {
                entry.file_name().to_str()?.strip_prefix("upper_").map(str::to_owned)
            };
            stack.extend(
                links.into_iter().flatten().flatten().filter_map(upper).collect::<Vec<_>>(),
            );
            next += 1;
        }
        if stack.iter().any(|name| routes.default.contains(name)) {
            Some(OtherUse::DefaultRoute(name(adapter)))
        } else if stack.iter().any(|name| routes.all.contains(name)) {
            Some(OtherUse::Address(name(adapter)))
        } else {
            None
        }
    }

    /// How many keyboards the host has, without those that programs simulate
    /// (Linux, drivers/input/misc/uinput.c).
    fn keyboards(&self) -> usize {
        let inputs = fs::read_dir(self.path("/sys/class/input")).into_iter().flatten().flatten();
        let is_real = |input: &PathBuf| {
            let virtual_ones = self.path("/sys/devices/virtual/input");
            !input.canonicalize().is_ok_and(|real| real.starts_with(&virtual_ones))
        };
        let inputs =
            inputs.map(|entry| entry.path()).filter(|input| name(input).starts_with("input"));
        inputs.filter(|input| is_keyboard(input) && is_real(input)).count()
    }
}

/// The class or bus of a directory of sysfs.
fn subsystem(directory: &Path) -> Option<String> {
    Some(name(&fs::read_link(directory.join("subsystem")).ok()?))
}

/// Whether an input device has the keys from Esc to S, which are the first 31.
/// udev recognizes a keyboard by them (systemd,
/// src/udev/udev-builtin-input_id.c, `test_key`). The last word contains the
/// first keys (Linux, drivers/input/input.c, `input_print_bitmap`).
fn is_keyboard(input: &Path) -> bool {
    const FIRST: u64 = 0xffff_fffe;
    let keys = read_if_there(&input.join("capabilities/key")).ok().flatten().unwrap_or_default();
    let last = keys.split_whitespace().next_back();
    let last = last.and_then(|word| u64::from_str_radix(word, 16).ok()).unwrap_or_default();
    last & FIRST == FIRST
}

/// The network adapters with routes, by name.
#[derive(Debug, Default)]
struct Routes {
    /// The adapters with a default route.
    default: Vec<String>,
    /// The adapters with any route. An adapter with an address always has one.
    /// An adapter with an IPv6 address counts if the address is valid beyond
    /// its own link.
    all: Vec<String>,
}

impl Routes {
    /// Reads the kernel's tables of the host's network (Linux,
    /// net/ipv4/fib_trie.c, `fib_route_seq_show`; net/ipv6/route.c,
    /// `rt6_info_route`; net/ipv6/addrconf.c, `if6_seq_show`). This process may
    /// have a network of its own, process 1 has the host's.
    fn read(host: &Host) -> Self {
        let read = |name| {
            let in_process = |process| {
                let table = host.path(format!("/proc/{process}/net/{name}"));
                read_if_there(&table).ok().flatten()
            };
            in_process("1").or_else(|| in_process("self")).unwrap_or_default()
        };
        let mut routes = Routes::default();
        for line in read("route").lines().skip(1) {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let [name, target, _, _, _, _, _, mask, ..] = fields.as_slice() else { continue };
            routes.all.push((*name).to_owned());
            if (*target, *mask) == ("00000000", "00000000") {
                routes.default.push((*name).to_owned());
            }
        }
        for line in read("ipv6_route").lines() {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let [target, length, .., flags, name] = fields.as_slice() else { continue };
            // The route needs RTF_UP and must not have RTF_REJECT (Linux,
            // include/uapi/linux/route.h).
            let flags = u32::from_str_radix(flags, 16).unwrap_or_default();
            let is_up = flags & 0x201 == 1;
            if is_up && *length == "00" && target.bytes().all(|byte| byte == b'0') {
                routes.default.push((*name).to_owned());
            }
        }
        for line in read("if_inet6").lines() {
            let fields: Vec<&str> = line.split_whitespace().collect();
            // Every adapter that is up has an address with the scope of its
            // link.
            if let [_, _, _, scope, _, name] = fields.as_slice() {
                if *scope != "20" {
                    routes.all.push((*name).to_owned());
                }
            }
        }
        routes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    const KEYS: &str = "1000000000007 ff9f207ac14057ff febeffdfffefffff fffffffffffffffe\n";

    struct Root(tempfile::TempDir);

    impl Root {
        fn new() -> Root {
            Root(tempfile::tempdir().unwrap())
        }

        fn file(&self, path: &str, text: &str) {
            let path = self.0.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }

        fn kind(&self, path: &str, kind: &str) {
            let path = self.0.path().join(path);
            fs::create_dir_all(&path).unwrap();
            symlink(format!("/sys/class/{kind}"), path.join("subsystem")).unwrap();
        }

        fn uses(&self) -> Vec<String> {
            let uses = Host::at(self.0.path()).other_uses(&"1-1".parse().unwrap(), Look::Thorough);
            uses.iter().map(ToString::to_string).collect()
        }
    }

    #[test]
    fn an_adapter_is_used_by_its_routes_and_addresses() {
        let root = Root::new();
        root.kind("sys/bus/usb/devices/1-1/1-1:1.0/net/eth1", "net");
        assert_eq!(root.uses(), [""; 0]);
        let head = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\n";
        let local = "eth1\t0000A8C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\n";
        root.file("proc/1/net/route", &format!("{head}{local}"));
        assert_eq!(root.uses(), ["eth1 has an address"]);
        let default = "eth1\t00000000\t0100A8C0\t0003\t0\t0\t0\t00000000\t0\n";
        root.file("proc/1/net/route", &format!("{head}{local}{default}"));
        assert_eq!(root.uses(), ["eth1 has the default route"]);
        root.file("proc/1/net/route", head);
        let zero = "0".repeat(32);
        let hop = "fe800000000000000000000000000001";
        root.file(
            "proc/1/net/ipv6_route",
            &format!("{zero} 00 {zero} 00 {hop} 00000400 00000001 00000000 00000003 eth1\n"),
        );
        assert_eq!(root.uses(), ["eth1 has the default route"]);
        root.file(
            "proc/1/net/ipv6_route",
            &format!("{zero} 00 {zero} 00 {zero} ffffffff 00000001 00000000 00200200 lo\n"),
        );
        let address =
            |scope| format!("20010db8000000000000000000000001 02 40 {scope} 80     eth1\n");
        root.file("proc/1/net/if_inet6", &address("20"));
        assert_eq!(root.uses(), [""; 0], "every adapter has such an address");
        root.file("proc/1/net/if_inet6", &address("00"));
        assert_eq!(root.uses(), ["eth1 has an address"]);
    }

    #[test]
    fn an_adapter_in_a_bridge_has_the_bridges_route() {
        let root = Root::new();
        root.kind("sys/bus/usb/devices/1-1/1-1:1.0/net/eth1", "net");
        fs::create_dir_all(root.0.path().join("sys/class/net/eth1")).unwrap();
        symlink("../br0", root.0.path().join("sys/class/net/eth1/upper_br0")).unwrap();
        let default = "br0\t00000000\t0100A8C0\t0003\t0\t0\t0\t00000000\t0\n";
        root.file("proc/1/net/route", &format!("head\n{default}"));
        assert_eq!(root.uses(), ["eth1 has the default route"]);
    }

    #[test]
    fn the_only_keyboard_is_the_only_one_of_all_that_are_real() {
        let root = Root::new();
        let input = |path: &str, number: u32| {
            root.kind(&format!("{path}/input/input{number}"), "input");
            root.file(&format!("{path}/input/input{number}/capabilities/key"), KEYS);
            let class = root.0.path().join("sys/class/input");
            fs::create_dir_all(&class).unwrap();
            let target = root.0.path().join(format!("{path}/input/input{number}"));
            symlink(target, class.join(format!("input{number}"))).unwrap();
        };
        input("sys/bus/usb/devices/1-1/1-1:1.0/0003:0627:0001.0001", 4);
        assert_eq!(root.uses(), ["it is the only keyboard"]);
        fs::create_dir_all(root.0.path().join("sys/devices/virtual/input/input9/capabilities"))
            .unwrap();
        input("sys/devices/virtual", 9);
        assert_eq!(root.uses(), ["it is the only keyboard"]);
        input("sys/devices/platform/i8042/serio0", 1);
        assert_eq!(root.uses(), [""; 0]);
    }

    #[test]
    fn a_mouse_is_no_keyboard() {
        let root = Root::new();
        root.kind("sys/bus/usb/devices/1-1/1-1:1.0/x/input/input4", "input");
        root.file(
            "sys/bus/usb/devices/1-1/1-1:1.0/x/input/input4/capabilities/key",
            "1f0000 0 0 0 0\n",
        );
        assert_eq!(root.uses(), [""; 0]);
    }
}
