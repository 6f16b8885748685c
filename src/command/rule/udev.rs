//! A udev rule's text (udev(7)).
//!
//! The rule has to match when a device goes, too. A `remove` event carries the
//! kernel's own variables and no attributes, since sysfs has forgotten the
//! device: DEVPATH, PRODUCT and TYPE are there; the serial number is not.

use super::what::What;
use crate::error::Error;
use crate::text::escape;
use crate::usb::Port;

/// Every rule begins like this: whole devices, not their interfaces.
const DEVICE: &str = r#"SUBSYSTEM=="usb", ENV{DEVTYPE}=="usb_device""#;

/// The rule that has udev run a command.
pub fn rule(what: &What, vm: &str, command: &[String]) -> Result<String, Error> {
    let run = run(command)?;
    let both = r#"ACTION=="add|remove""#;
    let lines = match what {
        What::Port(ports) => format!("{DEVICE}, {both}, \\\n    {}, \\\n", paths(ports, "")),
        // Hubs down there stay with the host; TYPE is class/subclass/protocol.
        What::Below(ports) => {
            format!("{DEVICE}, {both}, \\\n    {}, ENV{{TYPE}}!=\"9/*\", \\\n", paths(ports, "/*"))
        }
        What::Product(_) => format!("{DEVICE}, {both}, \\\n    {}, \\\n", product(what)),
        What::Serial(_, serial) => {
            let (product, serial) = (product(what), pattern(serial));
            return Ok(format!(
                "{}# On add the serial number is known.\n\
                 {DEVICE}, ACTION==\"add\", \\\n    {product}, ATTR{{serial}}==\"{serial}\", \\\n{run}\
                 # On remove it is not; of what matches, only a device that is in the VM is detached.\n\
                 {DEVICE}, ACTION==\"remove\", \\\n    {product}, \\\n{run}",
                comment(what, vm),
            ));
        }
    };
    Ok(format!("{}{lines}{run}", comment(what, vm)))
}

/// What the rule is for; a rule that was installed is known by this line.
pub fn comment(what: &What, vm: &str) -> String {
    format!("# usb-qmp-hotplug: to VM {}, {what}\n", escape(vm))
}

/// udev matches all of DEVPATH, and its `*` is any text, also across `/`.
fn paths(ports: &[Port], below: &str) -> String {
    let paths: Vec<String> = ports.iter().map(|port| format!("*/{port}{below}")).collect();
    format!("DEVPATH==\"{}\"", paths.join("|"))
}

/// The kernel writes PRODUCT in hexadecimal without padding: `627/1/0` (Linux,
/// drivers/usb/core/driver.c, `usb_uevent`).
fn product(what: &What) -> String {
    match what {
        What::Product(id) | What::Serial(id, _) => {
            format!("ENV{{PRODUCT}}==\"{:x}/{:x}/*\"", id.vendor, id.product)
        }
        What::Port(_) | What::Below(_) => String::new(),
    }
}

/// A pattern that fits a text from a device. What udev could take for more than
/// text, a rule cannot hold, or a terminal would not show becomes a wildcard:
/// `"` ends the value, `|` parts alternatives even within brackets, `\` may
/// escape, `$` and `%` may be substituted.
fn pattern(text: &str) -> String {
    let mut pattern = String::new();
    // udev takes blanks off the end of an attribute.
    for c in text.trim_end().chars() {
        match c {
            '*' | '?' | '[' => pattern.extend(['[', c, ']']),
            _ if c.is_alphanumeric() || " -_.,:;/+=@#()".contains(c) => pattern.push(c),
            // One byte in every character encoding.
            _ if c.is_ascii() => pattern.push('?'),
            _ if !pattern.ends_with('*') => pattern.push('*'),
            _ => {}
        }
    }
    pattern
}

/// The last line of a rule. udev substitutes `$` and `%`, then parts the words
/// at blanks outside quotes.
fn run(command: &[String]) -> Result<String, Error> {
    let words: Vec<String> = command.iter().map(|word| quoted(word)).collect::<Result<_, _>>()?;
    Ok(format!("    RUN+=\"{}\"\n", words.join(" ")))
}

fn quoted(word: &str) -> Result<String, Error> {
    if word.chars().any(|c| c.is_control() || "'\"\\".contains(c)) {
        let word = escape(word);
        return Err(Error::Usage(format!(
            "`{word}` cannot be written in a udev rule: it has quotes, backslashes or control \
             characters; name the VM in the configuration, and give its name"
        )));
    }
    let substituted = word.replace('$', "$$").replace('%', "%%");
    let plain = |c: char| c.is_alphanumeric() || "/._-+:,@=".contains(c);
    Ok(if word.chars().all(plain) { substituted } else { format!("'{substituted}'") })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn shown(what: &What) -> String {
        let command = ["/usr/bin/usb-qmp-hotplug", "udev", "/run/vm.qmp"].map(str::to_owned);
        rule(what, "/run/vm.qmp", &command).unwrap()
    }

    fn ports(names: &[&str]) -> Vec<Port> {
        names.iter().map(|name| name.parse().unwrap()).collect()
    }

    #[test]
    fn a_port_is_its_device_path() {
        assert_eq!(
            shown(&What::Port(ports(&["1-1.2", "2-1.2"]))),
            "# usb-qmp-hotplug: to VM /run/vm.qmp, whatever is plugged into port 1-1.2 \
             or its other half 2-1.2\n\
             SUBSYSTEM==\"usb\", ENV{DEVTYPE}==\"usb_device\", ACTION==\"add|remove\", \\\n    \
             DEVPATH==\"*/1-1.2|*/2-1.2\", \\\n    \
             RUN+=\"/usr/bin/usb-qmp-hotplug udev /run/vm.qmp\"\n"
        );
    }

    #[test]
    fn what_is_below_a_hub_has_it_in_its_path() {
        let rule = shown(&What::Below(ports(&["1-1"])));
        assert!(rule.contains(r#"DEVPATH=="*/1-1/*", ENV{TYPE}!="9/*", "#), "{rule}");
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
    fn a_serial_number_means_itself() {
        assert_eq!(pattern("0123-AB"), "0123-AB");
        assert_eq!(pattern("a*b?[c]"), "a[*]b[?][[]c?");
        assert_eq!(pattern("\", RUN+=\"x"), "?, RUN+=?x");
        assert_eq!(pattern("a|b$c%d\\e\nf"), "a?b?c?d?e?f");
        assert_eq!(pattern("Größe\u{202e}\u{200b}x  "), "Größe*x");
    }

    #[test]
    fn words_reach_the_program_as_they_are() {
        assert_eq!(quoted("/run/a b%c$d.qmp").unwrap(), "'/run/a b%%c$$d.qmp'");
        for word in ["/run/a'b", "/run/a\"b", "/run/a\\b", "/run/a\nb"] {
            assert_eq!(quoted(word).unwrap_err().exit_code(), 2, "{word}");
        }
    }

    proptest! {
        #[test]
        fn no_serial_number_leaves_its_place(serial in any::<String>()) {
            let what = What::Serial("0627:0001".parse().unwrap(), serial);
            let rule = shown(&what);
            // Two comments within, and three lines for each of the two rules.
            prop_assert_eq!(rule.lines().count(), 9);
            prop_assert_eq!(rule.matches("RUN+=\"/").count(), 2);
            let pattern = rule.split("ATTR{serial}==\"").nth(1).unwrap().split('\n').next().unwrap();
            let (pattern, rest) = pattern.split_once('"').unwrap();
            prop_assert_eq!(rest, ", \\");
            prop_assert!(!pattern.contains(['|', '\\', '$', '%']));
        }
    }
}
