//! The VM's side: the conversation with its monitor, and the VM's USB devices.
//!
//! - [`qmp`]: the protocol and its connection; it has no code for USB.
//! - `vm`: one VM's objects and host devices, over a [`qmp::Session`].
//! - `layout`: the VM's controllers, and QEMU's own list of USB devices.
//! - `device`: attaches a host device to the VM.
//! - `controller`: adds a controller if the VM has no port for a device.
//! - `usb_host`: the host devices in a VM, whoever attached them.
//! - `inspect`: all USB controllers and devices of the VM.
//! - `ports`, `no_guest_port`: the choice of a free port, or why there is none. No I/O.
//! - `info_usb`: the text of QEMU's own list. No I/O.

mod controller;
mod device;
mod info_usb;
mod inspect;
mod layout;
mod no_guest_port;
mod ports;
pub mod qmp;
mod qom;
mod usb_host;
mod vm;

pub use device::{Access, Attachment, Probe, Status, is_misplaced};
pub use info_usb::{InfoLine, parse_info_usb};
pub use inspect::{GuestDevice, Inventory};
pub use no_guest_port::{CONTROLLER_XML, NoGuestPort};
pub use ports::{Controller, ControllerKind, GuestPort, Layout, Placement, guest_ports};
pub use qmp::{Socket, VmAddress};
pub use usb_host::{UsbHost, Wanted};
pub use vm::{Given, Vm};
