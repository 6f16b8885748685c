//! Checks single values. Each function returns the value, or a message that
//! says what is wrong with it.

use std::path::{Path, PathBuf};

use serde_json::Value;
use toml::de::DeValue;

use crate::policy::rule::Glob;
use crate::qemu::qmp::{Domain, user_id};
use crate::text::escape;
use crate::usb::{NO_REVISION, Port, PortPath};

/// The longest path of a Unix socket, in bytes: `sun_path` without the final
/// zero (Linux, include/uapi/linux/un.h).
const MAX_SOCKET: usize = 107;

/// The longest port on a guest's bus, in bytes: `USBPort.path` without the
/// final zero (QEMU, include/hw/usb.h).
const MAX_GUEST_PORT: usize = 15;

/// The longest name of a VM or a bus, in bytes.
const MAX_NAME: usize = 64;

/// The beginning of a text from the file, escaped for a message.
pub(super) fn shown(text: &str) -> String {
    const MOST: usize = 80;
    let rest = if text.chars().nth(MOST).is_some() { "..." } else { "" };
    let start: String = text.chars().take(MOST).collect();
    format!("{}{rest}", escape(&start))
}

/// The message that a value is not what it should be.
pub(super) fn not(value: &DeValue, expected: &str) -> String {
    let value = match value {
        DeValue::String(text) => format!("`\"{}\"`", shown(text)),
        DeValue::Integer(number) => format!("`{}`", shown(&number.to_string())),
        DeValue::Float(number) => format!("`{}`", shown(&number.to_string())),
        DeValue::Boolean(flag) => format!("`{flag}`"),
        DeValue::Datetime(_) => "a date or time".into(),
        DeValue::Array(_) => "an array".into(),
        DeValue::Table(_) => "a table".into(),
    };
    format!("{value} is not {expected}")
}

/// A string that passes the test.
fn text<'t>(
    value: &'t DeValue,
    expected: &str,
    fits: impl Fn(&str) -> bool,
) -> Result<&'t str, String> {
    value.as_str().filter(|text| fits(text)).ok_or_else(|| not(value, expected))
}

pub(super) fn boolean(value: &DeValue) -> Result<bool, String> {
    value.as_bool().ok_or_else(|| not(value, "`true` or `false`, without quotes"))
}

pub(super) fn vendor_or_product(value: &DeValue) -> Result<u16, String> {
    hex(value, 4, "four hexadecimal digits in quotes, like `\"152d\"`")
}

pub(super) fn class(value: &DeValue) -> Result<u8, String> {
    let expected = "two hexadecimal digits in quotes, like `\"08\"`";
    u8::try_from(hex(value, 2, expected)?).map_err(|_| not(value, expected))
}

fn hex(value: &DeValue, digits: usize, expected: &str) -> Result<u16, String> {
    let fits = |text: &str| text.len() == digits && text.bytes().all(|b| b.is_ascii_hexdigit());
    let digits = text(value, expected, fits)?;
    u16::from_str_radix(digits, 16).map_err(|_| not(value, expected))
}

pub(super) fn glob(value: &DeValue) -> Result<Glob, String> {
    let text = text(value, "a glob in quotes, like `\"0123*\"`", |_| true)?;
    Glob::new(text).map_err(|error| error.to_string())
}

/// A glob that can match a port by at least one of its names.
pub(super) fn port(value: &DeValue) -> Result<Glob, String> {
    let expected = "a port in quotes, like `\"pci-0000:00:14.0-usbv2-0:1.2\"` or `\"1-1.2\"`, or a \
         glob of ports, like `\"1-1.*\"`";
    let no_revision = value.as_str().is_some_and(|text| text.contains("-usb-0:"));
    let expected = if no_revision { NO_REVISION } else { expected };
    let by_number = |text: &str| text.chars().all(|c| "0123456789-.*?[!]".contains(c));
    let by_place = |text: &str| text.contains('-') && text.chars().all(|c| c.is_ascii_graphic());
    let letters = |text: &str| text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '*');
    text(value, expected, |text| {
        !no_revision && (by_number(text) || (letters(text) && by_place(text)))
    })?;
    let glob = glob(value)?;
    let is_port = |text: &str| text.parse::<Port>().is_ok() || text.parse::<PortPath>().is_ok();
    if glob.is_literal() && !is_port(glob.as_str()) {
        return Err(not(value, expected));
    }
    Ok(glob)
}

/// Whether the text is a name of ASCII letters, digits, `.`, `_` and `-`, and
/// does not begin with a sign. Such a name is neither a path nor an option, and
/// it is neither `.` nor `..`.
pub(super) fn is_name(text: &str) -> bool {
    text.len() <= MAX_NAME
        && text.starts_with(|c: char| c.is_ascii_alphanumeric())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c))
}

/// The description of [`is_name`] for messages.
pub(super) const NAME: &str =
    "letters, digits, `.`, `_` and `-`, at most 64 of them, the first a letter or digit";

pub(super) fn vm<'t>(value: &'t DeValue) -> Result<&'t str, String> {
    text(value, "the name of a VM in quotes, like `\"win11\"`", |_| true)
}

pub(super) fn socket(value: &DeValue) -> Result<PathBuf, String> {
    let expected = "the absolute path of a socket in quotes, like `\"/run/qemu/win11.qmp\"`";
    let fits = |text: &str| {
        text.starts_with('/') && !text.contains('\0') && Path::new(text).file_name().is_some()
    };
    let path = text(value, expected, fits)?;
    if path.len() > MAX_SOCKET {
        let length = path.len();
        return Err(format!("the path has {length} bytes; a socket's has at most {MAX_SOCKET}"));
    }
    Ok(PathBuf::from(path))
}

/// The id of a user. This host must know the user's name.
pub(super) fn user(value: &DeValue) -> Result<u32, String> {
    let expected = "a user in quotes, by name like `\"libvirt-qemu\"`, or by number";
    let user = text(value, expected, |user| !user.is_empty())?;
    user_id(user).ok_or_else(|| {
        format!("this host has no user `{}`; `getent passwd` shows them", shown(user))
    })
}

pub(super) fn domain(value: &DeValue) -> Result<Domain, String> {
    let expected = "the name of a libvirt domain in quotes, like `\"win11\"`; of a user's own, \
                    `\"USER@session/win11\"`";
    let name = text(value, expected, |name| name.parse::<Domain>().is_ok())?;
    name.parse().map_err(|_| not(value, expected))
}

pub(super) fn guest_bus(value: &DeValue) -> Result<String, String> {
    let expected = "the name of a USB bus in the guest in quotes, like `\"xhci.0\"`";
    Ok(text(value, expected, is_name)?.to_owned())
}

pub(super) fn guest_port(value: &DeValue) -> Result<String, String> {
    let expected = "a port on a guest's bus in quotes, like `\"3\"`, or `\"1.2\"` behind a hub";
    // The numbers from the root hub down have the same format as in the host's
    // ports.
    let fits =
        |text: &str| text.len() <= MAX_GUEST_PORT && format!("1-{text}").parse::<Port>().is_ok();
    Ok(text(value, expected, fits)?.to_owned())
}

/// A value for a property of `usb-host`.
pub(super) fn option(value: &DeValue) -> Result<Value, String> {
    let json = match value {
        DeValue::Boolean(flag) => Some(Value::from(*flag)),
        DeValue::String(text) => Some(Value::from(text.as_ref())),
        DeValue::Integer(number) => {
            i64::from_str_radix(number.as_str(), number.radix()).ok().map(Value::from)
        }
        _ => None,
    };
    json.ok_or_else(|| not(value, "a boolean, a string or an integer of at most 64 bits"))
}
