//! Serial numbers that do not identify one device, and the pattern for a serial
//! number in a udev rule.

use tracing::warn;

use crate::error::Error;
use crate::host::Host;
use crate::text::escape;
use crate::usb::Device;

/// The serial numbers of manufacturers that give the same one to all their
/// devices.
const SHARED: [&str; 6] =
    ["0123456789ABCDEF", "0123456789", "1234567890", "123456789ABCDEF", "12345678", "123456789"];

/// Warns if the rule for a serial number will match more than this one device.
pub fn warn_of_others(host: &Host, device: &Device, serial: &str) {
    let shown = escape(serial);
    let help = "--by port tells them apart";
    let devices = host.devices().unwrap_or_default();
    let devices = devices.into_iter().filter(|other| other.id == device.id).collect();
    let is_alike =
        |its: &Option<Option<String>>| its.as_ref().and_then(Option::as_deref) == Some(serial);
    let serials =
        host.serials(devices).unwrap_or_default().into_iter().filter(|(_, its)| is_alike(its));
    let alike: Vec<String> = serials.map(|(other, _)| other.port.to_string()).collect();
    if alike.len() > 1 {
        let (count, ports) = (alike.len(), alike.join(", "));
        warn!("{count} devices {} have the serial number {shown}, at {ports}; {help}", device.id);
    } else if is_shared(serial) {
        warn!("many devices have the serial number {shown}; {help}");
    }
}

fn is_shared(serial: &str) -> bool {
    let first = serial.chars().next();
    SHARED.contains(&&*serial.to_ascii_uppercase()) || serial.chars().all(|c| Some(c) == first)
}

/// The pattern for a serial number in a udev rule. A visible character stands
/// for itself. A character becomes a wildcard if udev could give it a meaning,
/// if a rule cannot contain it, or if a terminal would not show it. In udev,
/// `"` ends the value, `|` separates alternatives even within brackets, `\` may
/// escape, and `$` and `%` may be substituted.
///
/// # Errors
///
/// [`Error::Usage`] if the pattern would have only wildcards, because it would
/// match every device.
pub fn pattern(text: &str) -> Result<String, Error> {
    let mut pattern = String::new();
    let mut says_something = false;
    // udev removes blanks from the end of an attribute.
    for c in text.trim_end_matches(|c: char| c.is_ascii_whitespace()).chars() {
        let is_plain = escape(c.encode_utf8(&mut [0; 4])) == c.to_string();
        match c {
            '*' | '?' | '[' => pattern.extend(['[', c, ']']),
            '"' | '|' | '\\' | '$' | '%' => pattern.push('?'),
            _ if is_plain => pattern.push(c),
            // An ASCII character is one byte in every character encoding.
            _ if c.is_ascii() => pattern.push('?'),
            _ if !pattern.ends_with('*') => pattern.push('*'),
            _ => {}
        }
        says_something |= !pattern.ends_with(['*', '?']) && c != ' ';
    }
    if says_something {
        return Ok(pattern);
    }
    let serial = escape(text.trim());
    Err(Error::Usage(format!(
        "a udev rule cannot hold the serial number \"{serial}\", and would take every such device; use \
         --toml, --by product or --by port"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_serial_number_means_itself() {
        for (serial, expected) in [
            ("0123-AB", "0123-AB"),
            ("a*b?[c]", "a[*]b[?][[]c]"),
            ("\", RUN+=\"x", "?, RUN+=?x"),
            ("a|b$c%d\\e\nf", "a?b?c?d?e?f"),
            ("Größe\u{202e}\u{200b}x  ", "Größe*x"),
            ("№ 5 – «日本»!{}~^&<>'", "№ 5 – «日本»!{}~^&<>'"),
            ("***", "[*][*][*]"),
        ] {
            assert_eq!(pattern(serial).unwrap(), expected);
        }
    }

    #[test]
    fn what_would_fit_every_device_is_refused() {
        for serial in [
            "\"",
            "$|%",
            "\u{202e}",
            " \\ \\ ",
            "\u{a0}\u{a0}x\u{a0}".trim_end_matches(['x', '\u{a0}']),
        ] {
            let error = pattern(serial).unwrap_err();
            assert_eq!(error.exit_code(), 2);
            assert!(error.to_string().contains("--by port"), "{error}");
        }
    }

    #[test]
    fn well_known_numbers_are_known() {
        for serial in ["0123456789ABCDEF", "0123456789abcdef", "000000000000", "0", "FFFF"] {
            assert!(is_shared(serial), "{serial}");
        }
        assert!(!is_shared("0123") && !is_shared("4C530001"));
    }
}
