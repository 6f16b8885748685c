//! Warnings about rules that take a keyboard from the host.

use tracing::warn;

use super::what::What;
use crate::host::{Host, Look, OtherUse};
use crate::usb::Device;

/// Warns if a rule takes a keyboard that is plugged in, or if it matches so
/// many devices that it will take some keyboard.
pub fn warn_of_keyboards(host: &Host, what: &What) {
    let devices = host.devices().unwrap_or_default();
    let is_meant = |device: &&Device| match what {
        What::Port(socket) => socket.ports.contains(&device.port),
        What::Below(socket) => socket.ports.iter().any(|hub| device.port.is_behind(hub)),
        What::Product(id) | What::Serial(id, _) => device.id == *id,
    };
    let is_only = |device: &&&Device| {
        host.other_uses(&device.port, Look::Quick).contains(&OtherUse::OnlyKeyboard)
    };
    let is_keyboard = |device: &&Device| host.is_keyboard(&device.port);
    let keyboards: Vec<&Device> = devices.iter().filter(is_meant).filter(is_keyboard).collect();
    if let Some(only) = keyboards.iter().find(is_only) {
        warn!("{only} is the only keyboard of this host, and the rule gives it to the VM");
    } else if let What::Below(_) = what {
        warn!("the rule gives every keyboard to the VM that is plugged in behind the hub");
    } else if let Some(keyboard) = keyboards.first() {
        warn!("{keyboard} is a keyboard, and the rule gives it to the VM");
    }
}
