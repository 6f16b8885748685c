use std::cell::Cell;

use proptest::prelude::*;

use super::*;

fn rule() -> Rule {
    Rule {
        line: 1,
        port: None,
        twin: true,
        vendor: None,
        product: None,
        serial: None,
        class: None,
        properties: Vec::new(),
        effect: Effect::Deny,
    }
}

fn glob(text: &str) -> Option<Glob> {
    Some(Glob::new(text).unwrap())
}

fn on(port: &str) -> Rule {
    Rule { port: glob(port), ..rule() }
}

fn property(name: &str, value: &str) -> Rule {
    Rule { properties: vec![(name.into(), Glob::new(value).unwrap())], ..rule() }
}

/// A USB stick in a USB 3 socket, with a storage interface and a keyboard
/// interface.
fn stick<'a>() -> Facts<'a> {
    let (port, twin) = ("2-1.2".parse().unwrap(), "1-1.2".parse().unwrap());
    let path = "pci-0000:00:14.0-usbv3-0:1.2".parse().unwrap();
    let twin_path = "pci-0000:00:14.0-usbv2-0:1.2".parse().unwrap();
    Facts::new(&port, Some(&twin), "152d:2338".parse().unwrap())
        .with_paths(Some(&path), Some(&twin_path))
        .with_serial(&|| Some("0123456789").into())
        .with_classes(&[0x00, 0x08, 0x03])
        .with_properties(&|name| (name == "ID_PATH").then_some("pci-0000:00:1a.0-usb-0:1.2").into())
}

fn is_match(rule: &Rule, facts: &Facts) -> bool {
    rule.matches(facts) == Match::Yes
}

#[test]
fn each_key_matches_what_it_names() {
    let twinless = |port| Rule { twin: false, ..on(port) };
    let cases = [
        ("nothing set", rule(), true),
        ("port", on("2-1.2"), true),
        ("twin", on("1-1.2"), true),
        ("glob on twin", on("1-1.*"), true),
        ("neither half", on("3-1.2"), false),
        ("twin = false, own half", twinless("2-1.*"), true),
        ("twin = false, other half", twinless("1-1.2"), false),
        ("stable name", on("pci-0000:00:14.0-usbv3-0:1.2"), true),
        ("stable name of the twin", on("pci-0000:00:14.0-usbv2-0:1.2"), true),
        ("glob on a stable name", on("pci-0000:00:14.0-usbv2-0:1.*"), true),
        ("glob on both halves", on("pci-0000:00:14.0-usbv?-0:1.2"), true),
        ("another controller", on("pci-0000:00:15.0-usbv3-0:1.2"), false),
        ("another port", on("pci-0000:00:14.0-usbv3-0:1.2.1"), false),
        ("twin = false, own stable name", twinless("pci-*-usbv3-0:1.2"), true),
        ("twin = false, the other's stable name", twinless("pci-*-usbv2-0:1.2"), false),
        ("vendor", Rule { vendor: Some(0x152d), ..rule() }, true),
        ("other vendor", Rule { vendor: Some(0x152e), ..rule() }, false),
        ("product", Rule { product: Some(0x2338), ..rule() }, true),
        ("other product", Rule { product: Some(1), ..rule() }, false),
        ("serial", Rule { serial: glob("0123*"), ..rule() }, true),
        ("other serial", Rule { serial: glob("123*"), ..rule() }, false),
        ("device's class", Rule { class: Some(0), ..rule() }, true),
        ("an interface's class", Rule { class: Some(3), ..rule() }, true),
        ("no such class", Rule { class: Some(7), ..rule() }, false),
        ("property", property("ID_PATH", "pci-0000:00:1a.0-*"), true),
        ("other value", property("ID_PATH", "pci-1*"), false),
        ("no such property", property("ID_BUS", "*"), false),
        ("all but one", Rule { vendor: Some(0x152d), class: Some(7), ..on("2-1.2") }, false),
        ("all", Rule { vendor: Some(0x152d), class: Some(8), ..on("2-1.2") }, true),
    ];
    for (name, rule, matches) in cases {
        assert_eq!(is_match(&rule, &stick()), matches, "{name}");
    }
}

#[test]
fn what_a_device_lacks_does_not_match() {
    let bare = Facts::new(&"1-1".parse().unwrap(), None, "152d:2338".parse().unwrap());
    assert!(is_match(&on("1-1"), &bare));
    assert!(!is_match(&on("1-1.*"), &bare), "below is not at");
    assert!(!is_match(&Rule { serial: glob("*"), ..rule() }, &bare));
    assert!(!is_match(&Rule { class: Some(0), ..rule() }, &bare));
    assert!(!is_match(&property("ID_PATH", "*"), &bare));
}

#[test]
fn what_nobody_can_say_yet_decides_nothing() {
    let facts = Facts::new(&"1-1".parse().unwrap(), None, "152d:2338".parse().unwrap())
        .with_serial(&|| Fact::Unknown)
        .with_properties(&|_| Fact::Unknown);
    let serial = Rule { serial: glob("S*"), ..on("1-1") };
    let elsewhere = Rule { serial: glob("S*"), ..on("1-2") };
    let rules = [on("1-1"), serial.clone(), elsewhere.clone(), property("A", "*")];
    let [decided, asked, other, of_udev] = &rules;
    let decision = |rules: &[&Rule]| {
        let rules: Vec<Rule> = rules.iter().map(|rule| (*rule).clone()).collect();
        match first_match(&rules, &facts) {
            Decision::Rule(place, _) => Ok(Some(place)),
            Decision::NoRule => Ok(None),
            Decision::Unknown => Err(()),
        }
    };
    assert_eq!(decision(&[decided, asked]), Ok(Some(0)), "a rule before it decides");
    assert_eq!(decision(&[asked, decided]), Err(()), "a rule after it does not");
    assert_eq!(decision(&[other, decided]), Ok(Some(1)), "it cannot match anyway");
    assert_eq!(decision(&[of_udev]), Err(()));
    let both = Rule { serial: glob("S*"), ..property("A", "*") };
    let lacking = Facts::new(&"1-1".parse().unwrap(), None, "152d:2338".parse().unwrap())
        .with_serial(&|| Fact::Unknown);
    assert_eq!(both.matches(&lacking), Match::No, "one key is known not to match");
}

#[test]
fn a_serial_number_can_be_written_as_it_is_shown() {
    let (port, serial) = ("1-1".parse().unwrap(), || Fact::Is("A\u{1b}1".into()));
    let facts = Facts::new(&port, None, "152d:2338".parse().unwrap()).with_serial(&serial);
    for (written, matches) in
        [("A\u{1b}1", true), (r"A\u{1b}1", true), (r"A\u{1b}*", true), (r"A\u{1c}1", false)]
    {
        assert_eq!(
            is_match(&Rule { serial: glob(written), ..rule() }, &facts),
            matches,
            "{written}"
        );
    }
}

#[test]
fn the_first_rule_that_matches_decides() {
    let rules = [on("9-9"), Rule { line: 7, ..on("1-1.*") }, rule()];
    let (place, rule) = first_match(&rules, &stick()).rule().unwrap();
    assert_eq!((place, rule.to_string()), (1, "rule at line 7".into()));
    assert_eq!(first_match(&rules[..1], &stick()), Decision::NoRule);
}

#[test]
fn properties_are_asked_for_last_and_only_if_a_rule_does() {
    let asked = Cell::new(0);
    let count = |_: &str| {
        asked.set(asked.get() + 1);
        Fact::Lacking
    };
    let id = "152d:2338".parse().unwrap();
    let facts = Facts::new(&"1-1".parse().unwrap(), None, id).with_properties(&count);
    first_match(&[on("1-2"), Rule { vendor: Some(1), ..property("A", "*") }], &facts);
    assert_eq!(asked.get(), 0);
    first_match(&[property("A", "*")], &facts);
    assert_eq!(asked.get(), 1);
}

#[test]
fn rules_say_what_they_need() {
    assert_eq!(Needs::of(&[on("1-1")]), Needs::default());
    let rules = [Rule { serial: glob("1"), ..rule() }, Rule { class: Some(8), ..rule() }];
    assert_eq!(Needs::of(&rules), Needs { classes: true, ..Needs::default() });
    for port in ["pci-*", "*", "?-1"] {
        assert!(Needs::of(&[on(port)]).paths, "{port}");
    }
    assert!(!Needs::of(&[on("[12]-*"), on("1-1.*")]).paths);
    assert!(Needs::of(&[property("A", "*")]).properties);
}

#[test]
fn a_rule_covers_a_later_one_that_says_more() {
    let twinless = |port| Rule { twin: false, ..on(port) };
    let vendor = Rule { vendor: Some(1), ..rule() };
    let both = Rule { product: Some(2), ..vendor.clone() };
    let cases = [
        (on("1-1"), on("1-1"), true),
        (on("1-1.*"), on("1-1.2"), true),
        (on("1-1.2"), on("1-1.*"), false),
        (on("1-1"), twinless("1-1"), true),
        (twinless("1-1"), on("1-1"), false),
        (twinless("*"), on("1-1"), true),
        (twinless("*"), vendor.clone(), false),
        (Rule { twin: false, ..vendor.clone() }, both.clone(), true),
        (vendor.clone(), both.clone(), true),
        (both, vendor.clone(), false),
        (vendor, Rule { vendor: Some(2), ..rule() }, false),
        (Rule { class: Some(8), ..rule() }, Rule { class: Some(8), ..on("1-1") }, true),
        (Rule { class: Some(8), ..rule() }, Rule { class: Some(3), ..rule() }, false),
        (Rule { serial: glob("1*"), ..rule() }, Rule { serial: glob("12"), ..rule() }, true),
        (Rule { serial: glob("1*"), ..rule() }, on("1-1"), false),
        (property("A", "x*"), property("A", "xy"), true),
        (property("A", "x*"), property("B", "xy"), false),
        (rule(), property("B", "xy"), true),
    ];
    for (number, (earlier, later, covers)) in cases.into_iter().enumerate() {
        assert_eq!(earlier.covers(&later), covers, "case {number}");
    }
}

prop_compose! {
    fn any_rule()(
        port in prop::option::of("[12]-1([.][12*]|[*])?|[*]"),
        twin in any::<bool>(),
        vendor in prop::option::of(1..=2u16),
        class in prop::option::of(8..=9u8),
        serial in prop::option::of("[ab*]|a[?]"),
        tag in prop::option::of("[ab*]"),
    ) -> Rule {
        let glob = |text: String| Glob::new(&text).unwrap();
        let properties = tag.into_iter().map(|value| ("TAG".into(), glob(value))).collect();
        let (port, serial) = (port.map(glob), serial.map(glob));
        Rule { port, twin, vendor, class, serial, properties, ..rule() }
    }
}

proptest! {
    #[test]
    fn a_rule_that_covers_another_matches_all_that_it_does(
        earlier in any_rule(),
        later in any_rule(),
        ports in ("[12]-1([.][12])?", prop::option::of("[12]-1([.][12])?")),
        vendor in 1..=2u16,
        class in 8..=9u8,
        serial in prop::option::of("[ab]{1,2}"),
        tag in prop::option::of("[ab]"),
    ) {
        let twin = ports.1.map(|twin| twin.parse().unwrap());
        let property = |_: &str| tag.as_deref().into();
        let serial = || serial.as_deref().into();
        let classes = [class];
        let id = VendorProduct { vendor, product: 1 };
        let facts = Facts::new(&ports.0.parse().unwrap(), twin.as_ref(), id)
            .with_serial(&serial)
            .with_classes(&classes)
            .with_properties(&property);
        if earlier.covers(&later) && is_match(&later, &facts) {
            prop_assert!(is_match(&earlier, &facts), "{:?} {:?}", earlier, later);
        }
    }
}
