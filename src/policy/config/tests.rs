use proptest::prelude::*;

use super::*;
use crate::policy::rule::{Effect, Facts, Glob, first_match};
use crate::qemu::VmAddress;

mod mistakes;

const EXAMPLE: &str = include_str!("../../../contrib/examples/usb-qmp-hotplug.toml");

fn parse(text: &str) -> Result<Config, Error> {
    Config::parse(Path::new("f"), text)
}

/// All complaints about a text, one per line and without the file's name.
fn complaints(text: &str) -> String {
    let all = parse(text).err().map(|error| error.to_string()).unwrap_or_default();
    all.lines().map(|line| line.strip_prefix("f:").unwrap()).collect::<Vec<_>>().join("\n")
}

/// Two lines that define VM `a`, and then a rule whose first key is on line 4.
fn rule(keys: &str) -> String {
    format!("[vm.a]\nqmp = '/a'\n[[rule]]\n{keys}")
}

#[test]
fn every_key_arrives() {
    let text = rule(
        "vm = 'a'\nport = '1-1.*'\ntwin = false\nvendor = '152D'\nproduct = '0001'\n\
         serial = 'x?'\nclass = 'fF'\nproperty = { B = 'b', A = '*' }\nguest_bus = 'xhci.0'\n\
         guest_port = '1.2'\nadd_controller = false\nunmount = true\noptions = { guest-reset = false, isobufs = 0x10, pcap = '/p' }\n\
         [[rule]]\ndeny = true\nserial = '*'\n[vm.\"0.b\"]\nqmp = '/b'\n",
    );
    let config = parse(&text).unwrap();
    assert!(!config.detach_at_stop);
    assert!(parse(&format!("detach_at_stop = true\n{text}")).unwrap().detach_at_stop);
    let names: Vec<_> = config.vms.iter().map(|vm| vm.name.as_str()).collect();
    assert_eq!(names, ["a", "0.b"], "in the order of the file");
    assert_eq!(config.address("0.b"), Some(&Path::new("/b").into()));
    assert_eq!(config.address("b"), None);

    let glob = |text| Glob::new(text).unwrap();
    let [first, second] = &config.rules[..] else { panic!("{:?}", config.rules) };
    assert_eq!((first.line, first.twin), (3, false));
    assert_eq!((first.vendor, first.product, first.class), (Some(0x152d), Some(1), Some(0xff)));
    assert_eq!((&first.port, &first.serial), (&Some(glob("1-1.*")), &Some(glob("x?"))));
    assert_eq!(first.properties, [("B".into(), glob("b")), ("A".into(), glob("*"))]);
    let Effect::Attach(target) = &first.effect else { panic!("{first:?}") };
    assert_eq!(target.vm, "a");
    assert_eq!(target.guest_bus.as_deref(), Some("xhci.0"));
    assert_eq!(target.guest_port.as_deref(), Some("1.2"));
    assert!(target.unmount && !target.add_controller);
    let options = serde_json::json!({ "guest-reset": false, "isobufs": 16, "pcap": "/p" });
    assert_eq!(serde_json::Value::from(target.options.clone()), options);
    assert_eq!((second.line, second.twin, &second.effect), (17, true, &Effect::Deny));
}

#[test]
fn a_vm_may_be_a_domain() {
    let config = parse("[vm.a]\nlibvirt = 'win 11'\n[vm.b]\nlibvirt = 'root@session/b'").unwrap();
    let addresses: Vec<String> = config.vms.iter().map(|vm| vm.address.to_string()).collect();
    assert_eq!(addresses, ["libvirt:win 11", "libvirt:root@session/b"]);
}

#[test]
fn a_port_can_have_either_name() {
    let port = |text: &str| parse(&rule(&format!("vm = 'a'\nport = '{text}'"))).map(|_| ());
    for text in ["1-1.2", "[12]-*", "*", "pci-0000:00:14.0-usbv2-0:1.2", "pci-*-usbv?-0:1.*"] {
        port(text).unwrap();
    }
}

#[test]
fn a_user_is_a_name_or_a_number_that_this_host_knows() {
    let user = |user: &str| {
        let config = parse(&format!("[vm.a]\nqmp = '/a'\nuser = {user}\n"));
        config.map(|config| match &config.vms[0].address {
            VmAddress::Socket(socket) => socket.user,
            VmAddress::Libvirt(_) => None,
        })
    };
    assert_eq!(user("'root'").unwrap(), Some(0));
    assert_eq!(user("'64055'").unwrap(), Some(64055));
    assert!(user("'no such user'").unwrap_err().to_string().contains("this host has no user"));
    assert!(user("64055").unwrap_err().to_string().contains("a user in quotes"));
    let error = parse("[vm.a]\nlibvirt = 'a'\nuser = 'root'\n").unwrap_err().to_string();
    assert!(error.contains("3:1: vm `a`, key `user`: it says who listens at `qmp`"), "{error}");
}

#[test]
fn an_empty_file_is_a_configuration() {
    assert_eq!(parse("# nothing yet\n").unwrap(), Config::default());
}

#[test]
fn the_example_is_right_and_does_what_it_says() {
    let config = parse(EXAMPLE).unwrap();
    let goes_to = |path: &str, id: &str| {
        let port = "7-7".parse().unwrap();
        let path = format!("pci-0000:00:14.0-{path}").parse().unwrap();
        let facts = Facts::new(&port, None, id.parse().unwrap()).with_paths(Some(&path), None);
        match &first_match(&config.rules, &facts).rule()?.1.effect {
            Effect::Deny => Some("the host"),
            Effect::Attach(target) => Some(target.vm.as_str()),
        }
    };
    assert_eq!(goes_to("usbv2-0:1.2", "1050:0407"), Some("the host"));
    assert_eq!(goes_to("usbv2-0:1.2", "0627:0001"), Some("win11"));
    assert_eq!(goes_to("usbv3-0:4.1.3", "0627:0001"), Some("desktop"));
    assert_eq!(goes_to("usbv2-0:5", "0627:0001"), None);
}

#[test]
fn of_very_many_complaints_the_first_are_told() {
    let Err(Error::Complaints(all)) = parse(&"=\n".repeat(1000)) else { panic!() };
    assert_eq!(all.list().len(), 100);
    assert_eq!(all.path(), Path::new("f"));
    assert!(all.to_string().ends_with(" more"), "{all}");
}

#[test]
fn a_file_that_cannot_be_read_says_why() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("c\n.toml");
    let error = Config::read(&file).unwrap_err();
    assert!(error.to_string().ends_with("c\\n.toml"), "{error}");
    assert!(std::error::Error::source(&error).is_some());

    let error = |bytes: &[u8]| {
        std::fs::write(&file, bytes).unwrap();
        Config::read(&file).unwrap_err().to_string()
    };
    let latin1 = error(b"# a\n# \xc3\xa9 \xe9 \xe9\n");
    assert!(
        latin1.ends_with("c\\n.toml:2:5: not UTF-8; save the file in that encoding"),
        "{latin1}"
    );
    let huge = error(&vec![0xff; MAX_FILE + 7]);
    assert!(huge.ends_with(":1:1: the file has more than 1 MiB"), "{huge}");

    std::fs::write(&file, EXAMPLE).unwrap();
    assert_eq!(Config::read(&file).unwrap(), parse(EXAMPLE).unwrap());
}

/// Pieces of configuration files, correct ones and incorrect ones.
fn scraps() -> impl Strategy<Value = String> {
    let keys =
        "(vm|deny|port|twin|vendor|class|property|options|guest_bus|qmp|x|'\u{e9}')([.]a)? = ";
    let values = "'1-1.[*]'|'[0-9a-f*\\[]{0,5}'|true|-?[0-9]{1,20}|\\[\\]|[{] a = 'b' [}]|1e9|\"\\\\u0000\"|'/a'";
    let heads = "\\[vm[.][ab]\\]|\\[\\[rule\\]\\]|\\[rule\\]|\\[vm\\]|vm|\r|=|\\[\\[|\u{feff}";
    let line = prop_oneof![
        4 => (keys, values).prop_map(|(key, value)| key + &value),
        3 => heads.prop_map(String::from),
    ];
    prop::collection::vec(line, 0..12).prop_map(|lines| lines.join("\n"))
}

proptest! {
    #[test]
    fn no_text_panics_and_every_complaint_has_its_place(text in prop_oneof![any::<String>(), scraps()]) {
        if let Err(Error::Complaints(all)) = parse(&text) {
            let places: Vec<_> = all.list().iter().map(|found| (found.line, found.column)).collect();
            prop_assert!(places.is_sorted());
            for (line, column) in places {
                let length = text.split('\n').nth(line - 1).map(|line| line.chars().count());
                prop_assert!(length.is_some_and(|length| (1..=length + 1).contains(&column)));
            }
        }
    }
}
