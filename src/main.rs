//! The `usb-qmp-hotplug` program.
fn main() {}
