//! Each mistake, and the complaint about it, word for word.

use super::*;

fn check(cases: &[(&str, &str)]) {
    for (text, expected) in cases {
        assert_eq!(&complaints(text), expected, "{text}");
    }
}

#[test]
fn what_is_not_toml_is_told_with_its_place() {
    check(&[
        (
            "[[rule]\nx",
            "1:8: unclosed array table, expected `]`\n2:2: key with no value, expected `=`",
        ),
        ("[vm.a]\nqmp = '/a'\nqmp = '/b'", "3:1: `qmp`: duplicate key"),
        (
            "a = 1\r\n  é = 1\r\n",
            "2:3: `é`: invalid unquoted key, expected letters, numbers, `-`, `_`",
        ),
        (
            "a = win11\nb = 1-1",
            "1:5: `win11`: string values must be quoted, expected literal string\n\
             2:5: `1-1`: invalid date, expected `-` (MM-DD); text must be in quotes",
        ),
        ("a = [[", "1:7: unclosed array, expected `]`"),
        ("\u{feff}x", "1:2: key with no value, expected `=`"),
    ]);
}

#[test]
fn every_mistake_at_the_top_is_told() {
    check(&[
        ("rules = 1", "1:1: key `rules`: unknown key; did you mean `rule`?"),
        ("\u{feff}x = 1", "1:1: key `x`: unknown key; known are `vm`, `rule`, `detach_at_stop`"),
        ("vm = 3", "1:6: key `vm`: `3` is not a table of VMs; begin each with `[vm.NAME]`"),
        (
            "[rule]",
            "1:1: key `rule`: a table is not a list of rules; begin each with `[[rule]]`, in two pairs of brackets",
        ),
        ("rule = [1.5]", "1:9: rule 1: `1.5` is not a table; begin each rule with `[[rule]]`"),
    ]);
    let huge = " ".repeat(MAX_FILE + 1);
    assert_eq!(complaints(&huge), "1:1: the file has more than 1 MiB");
    assert_eq!(complaints(&huge[1..]), "");
}

#[test]
fn every_mistake_in_a_vm_is_told() {
    const SOCKET: &str =
        "is not the absolute path of a socket in quotes, like `\"/run/qemu/win11.qmp\"`";
    const NAME: &str = "a VM's name is letters, digits, `.`, `_` and `-`, at most 64 of them, the first a letter or digit";
    check(&[
        (
            "[vm]\na = '/a'",
            "2:5: vm `a`: `\"/a\"` is not a table; write `[vm.NAME]` and below it `qmp = \"PATH\"` or `libvirt = \"NAME\"`",
        ),
        (
            "\n [vm.a]\n",
            "2:2: vm `a`: it is not said where it is; add `qmp = \"PATH\"`, the path of its socket, or `libvirt = \"NAME\"`, the name of its domain",
        ),
        ("[vm.a]\nqpm = 1\nqmp = '/a'", "2:1: vm `a`, key `qpm`: unknown key; did you mean `qmp`?"),
        ("[vm]\na.qmp = 'a.qmp'", &format!("2:9: vm `a`, key `qmp`: `\"a.qmp\"` {SOCKET}")),
        ("[vm.a]\nqmp = '/a/..'", &format!("2:7: vm `a`, key `qmp`: `\"/a/..\"` {SOCKET}")),
        (
            "[vm.a]\nqmp = \"/\\u0000\"",
            &format!("2:7: vm `a`, key `qmp`: `\"/\\u{{0}}\"` {SOCKET}"),
        ),
        (
            &format!("[vm.a]\nqmp = '/{}'", "é".repeat(54)),
            "2:7: vm `a`, key `qmp`: the path has 109 bytes; a socket's has at most 107",
        ),
        (&format!("[vm.a]\nqmp = '/{}'", "a".repeat(106)), ""),
        (
            "[vm.z]\nqmp = '/a'\n[vm.b]\nqmp = '//a'",
            "4:7: vm `b`, key `qmp`: VM `z` has this socket too; give each VM one of its own",
        ),
        (
            "[vm.a]\nqmp = '/a'\nlibvirt = 'a'",
            "3:1: vm `a`, key `libvirt`: `qmp` says where the VM is, too; keep one of them",
        ),
        (
            "[vm.a]\nlibvirt = 'x/y'",
            "2:11: vm `a`, key `libvirt`: `\"x/y\"` is not the name of a libvirt domain in quotes, like `\"win11\"`; of a user's own, `\"USER@session/win11\"`",
        ),
        (
            "[vm.z]\nlibvirt = 'a'\n[vm.b]\nlibvirt = 'a'",
            "4:11: vm `b`, key `libvirt`: VM `z` has this domain too; give each VM one of its own",
        ),
        ("vm = { '../a' = { qmp = '/a' } }", &format!("1:8: key `vm.../a`: {NAME}")),
        ("[vm.\"\\u001b\"]\nqmp = '/a'", &format!("1:5: key `vm.\\u{{1b}}`: {NAME}")),
    ]);
    for name in ["", ".", "..", "-a", "a b", "ä", &"a".repeat(65)] {
        assert!(complaints(&format!("[vm.'{name}']\nqmp = '/a'")).ends_with(NAME), "{name}");
    }
}

#[test]
fn every_mistake_in_what_a_rule_matches_is_told() {
    const FOUR: &str = "is not four hexadecimal digits in quotes, like `\"152d\"`";
    const TWO: &str = "is not two hexadecimal digits in quotes, like `\"08\"`";
    const PORT: &str = "is not a port in quotes, like `\"pci-0000:00:14.0-usbv2-0:1.2\"` or `\"1-1.2\"`, or a glob \
         of ports, like `\"1-1.*\"`";
    let cases = [
        ("vendro = '152d'", "1: rule 1, key `vendro`: unknown key; did you mean `vendor`?".into()),
        ("guest-port = '1'", "1: rule 1, key `guest-port`: unknown key; did you mean `guest_port`?".into()),
        ("vendor = '152'", format!("10: rule 1, key `vendor`: `\"152\"` {FOUR}")),
        ("vendor = '0x152d'", format!("10: rule 1, key `vendor`: `\"0x152d\"` {FOUR}")),
        ("product = 2338", format!("11: rule 1, key `product`: `2338` {FOUR}")),
        ("product = '+152'", format!("11: rule 1, key `product`: `\"+152\"` {FOUR}")),
        ("class = '8'", format!("9: rule 1, key `class`: `\"8\"` {TWO}")),
        ("class = ['08']", format!("9: rule 1, key `class`: an array {TWO}")),
        ("port = '1:2'", format!("8: rule 1, key `port`: `\"1:2\"` {PORT}")),
        ("port = 'pci-0000:00:14.0-usbv2'", format!("8: rule 1, key `port`: `\"pci-0000:00:14.0-usbv2\"` {PORT}")),
        ("port = 'pci-0000:00:14.0-usb-0:1'", format!("8: rule 1, key `port`: `\"pci-0000:00:14.0-usb-0:1\"` is not {}", crate::usb::NO_REVISION)),
        ("port = '1-01'", format!("8: rule 1, key `port`: `\"1-01\"` {PORT}")),
        ("port = 1-1", "8: `1-1`: invalid date, expected `-` (MM-DD); text must be in quotes".into()),
        ("port = '1-[12'", "8: rule 1, key `port`: the `[` at character 3 of the glob has no `]`; a plain `[` is written `[[]`".into()),
        ("serial = ''", "10: rule 1, key `serial`: an empty glob matches nothing; `*` matches everything".into()),
        ("serial = 'a**'", "10: rule 1, key `serial`: write `*` instead of `**`: it is any text, also across `.` and `/`".into()),
        ("serial = 1979-05-27", "10: rule 1, key `serial`: a date or time is not a glob in quotes, like `\"0123*\"`".into()),
        ("twin = 'true'\nport = '1-1'", "8: rule 1, key `twin`: `\"true\"` is not `true` or `false`, without quotes".into()),
        ("property = 'A'", "12: rule 1, key `property`: `\"A\"` is not a table of globs, like `{ ID_PATH = \"pci-0000:00:1a.0-*\" }`".into()),
        ("property = {}", "1: rule 1, key `property`: it is empty; name a property of udev, or remove it".into()),
        ("property.A = '['", "14: rule 1, key `property.A`: the `[` at character 1 of the glob has no `]`; a plain `[` is written `[[]`".into()),
    ];
    for (keys, expected) in cases {
        let text = rule(&format!("{keys}\nvm = 'a'"));
        assert_eq!(complaints(&text), format!("4:{expected}"), "{keys}");
    }
}

#[test]
fn every_mistake_in_what_a_rule_does_is_told() {
    const OPTION: &str = "is not a boolean, a string or an integer of at most 64 bits";
    let cases = [
        ("vm = 'A1'", "4:6: rule 1, key `vm`: there is no VM `A1`; did you mean `a`?".into()),
        ("vm = 'other'", "4:6: rule 1, key `vm`: there is no VM `other`; define it with `[vm.NAME]`".into()),
        ("vm = 1", "4:6: rule 1, key `vm`: `1` is not the name of a VM in quotes, like `\"win11\"`".into()),
        ("deny = 1", "4:8: rule 1, key `deny`: `1` is not `true` or `false`, without quotes".into()),
        ("", "3:1: rule 1: it has neither `vm` nor `deny = true`; add one of them".into()),
        ("deny = false", "3:1: rule 1: it has neither `vm` nor `deny = true`; add one of them".into()),
        ("deny = false\nvm = 'a'", String::new()),
        ("vm = 'a'\ndeny = true\noptions = {}", "5:1: rule 1, key `deny`: it excludes `vm`; keep one of them".into()),
        ("deny = true\noptions = {}", "5:1: rule 1, key `options`: it has no meaning with `deny`; remove it".into()),
        ("deny = true\nguest_port = '1'", "5:1: rule 1, key `guest_port`: it has no meaning with `deny`; remove it".into()),
        ("vm = 'a'\nguest_bus = ''", "5:13: rule 1, key `guest_bus`: `\"\"` is not the name of a USB bus in the guest in quotes, like `\"xhci.0\"`".into()),
        ("vm = 'a'\nguest_port = '01'", "5:14: rule 1, key `guest_port`: `\"01\"` is not a port on a guest's bus in quotes, like `\"3\"`, or `\"1.2\"` behind a hub".into()),
        ("vm = 'a'\nguest_bus = 'x.0'\nadd_controller = true", "6:1: rule 1, key `add_controller`: it adds a bus of its own; remove it, or `guest_bus`".into()),
        ("deny = true\nunmount = true", "5:1: rule 1, key `unmount`: it has no meaning with `deny`; remove it".into()),
        ("deny = true\nadd_controller = true", "5:1: rule 1, key `add_controller`: it has no meaning with `deny`; remove it".into()),
        ("vm = 'a'\nguest_port = 3", "5:14: rule 1, key `guest_port`: `3` is not a port on a guest's bus in quotes, like `\"3\"`, or `\"1.2\"` behind a hub".into()),
        ("vm = 'a'\noptions = 1", "5:11: rule 1, key `options`: `1` is not a table of properties of `usb-host`, like `{ guest-reset = false }`".into()),
        ("vm = 'a'\noptions = { a = 1.5 }", format!("5:17: rule 1, key `options.a`: `1.5` {OPTION}")),
        ("vm = 'a'\noptions.a = 9223372036854775808", format!("5:13: rule 1, key `options.a`: `9223372036854775808` {OPTION}")),
        ("vm = 'a'\noptions = { bus = 'x' }", "5:13: rule 1, key `options.bus`: it cannot be set here; use `guest_bus`".into()),
    ];
    for (keys, expected) in cases {
        let text = rule(&format!("{keys}\nserial = '1'"));
        assert_eq!(complaints(&text), expected, "{keys}");
    }
    for name in
        "hostbus hostaddr hostdevice hostport vendorid productid id bus port driver attached"
            .split(' ')
    {
        let text = rule(&format!("vm = 'a'\nserial = '1'\noptions.{name} = 1"));
        assert!(complaints(&text).starts_with("6:9: rule 1, key `options"), "{name}");
    }
}

#[test]
fn a_rule_that_takes_everything_has_to_say_so() {
    let expected = "3:1: rule 1: it would match every device; say which with `port`, `vendor`, \
         `product`, `serial`, `class`, `property` (`port = \"*\"` if all are meant)";
    assert_eq!(
        complaints(&rule("vm = 'a'\ntwin = false\n[[rule]]\nvm = 'a'\nport = '*'")),
        expected
    );
}

#[test]
fn a_rule_that_an_earlier_one_hides_is_told() {
    let text = rule(
        "vm = 'a'\nport = '1-1.*'\n[[rule]]\ndeny = true\nport = '1-1.2'\nclass = '08'\n\
         [[rule]]\nvm = 'b'\nport = '1-1.2.*'\n[[rule]]\nvm = 'a'\nport = '1-1'",
    );
    let expected = "6:1: rule 2: it can never match, because rule 1 (line 3) matches the same devices \
         first; move it up, or remove it\n\
         10:1: rule 3: it can never match, because rule 1 (line 3) matches the same devices first; \
         move it up, or remove it\n\
         11:6: rule 3, key `vm`: there is no VM `b`; define it with `[vm.NAME]`";
    assert_eq!(complaints(&text), expected);
}

#[test]
fn a_rule_that_is_not_clear_hides_no_other() {
    let text = rule("vm = 'a'\nport = '*'\nvendro = '152d'\n[[rule]]\nvm = 'a'\nport = '1-1.2'");
    assert_eq!(complaints(&text), "6:1: rule 1, key `vendro`: unknown key; did you mean `vendor`?");
}

#[test]
fn complaints_come_all_at_once_in_the_order_of_the_file() {
    let text = "[[rule]]\nvm = 'win1'\nprot = '1-1'\n[vm.win11]\nqmp = 'x'\n[[rule]]\nclass = 8\n";
    let expected = "2:6: rule 1, key `vm`: there is no VM `win1`; did you mean `win11`?\n\
         3:1: rule 1, key `prot`: unknown key; did you mean `port`?\n\
         5:7: vm `win11`, key `qmp`: `\"x\"` is not the absolute path of a socket in quotes, like `\"/run/qemu/win11.qmp\"`\n\
         6:1: rule 2: it has neither `vm` nor `deny = true`; add one of them\n\
         7:9: rule 2, key `class`: `8` is not two hexadecimal digits in quotes, like `\"08\"`";
    assert_eq!(complaints(text), expected);
}
