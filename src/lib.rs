//! A USB port or a USB device belongs to a virtual machine. A device that is
//! plugged in appears in the guest, and a device that is unplugged leaves it.
//! The tool speaks QMP with QEMU directly.
//!
//! The modules, from the inside to the outside. None imports a module below it:
//!
//! - [`text`]: shows untrusted text safely, without I/O.
//! - [`usb`]: parses and prints ports, addresses, devices, ids and events,
//!   without I/O.
//! - [`host`]: the host's side: sysfs, `/proc`, device nodes, disks, events.
//! - [`qemu`]: the VM's side: the QMP session, a VM's devices, adding and removing.
//! - [`policy`]: the configuration, its rules, and the VM that each device belongs to.
//! - [`error`]: the errors, and the exit codes.
//! - [`presence`]: whether a VM still has a device that it was given.
//! - [`passed`]: the host's devices in a VM, and the VM's objects for them.
//! - [`attach`]: the two operations, attach and detach.
//! - [`reconcile`]: decides what to attach and detach at each port, and does it.
//! - [`ui`]: tables, the progress line, the log.
//! - [`daemon`]: the `watch` command.
//! - [`cli`]: the command line's types; [`command`]: the commands.
//!
//! The port names the device: a device at port `1-1.2` has the QEMU id
//! `usb-host-1-1.2` in every VM. An open descriptor of the device node allows
//! QEMU to use the device, and a `flock` on that descriptor keeps other VMs
//! from it. No state is ever written to disk.

pub mod attach;
pub mod cli;
pub mod command;
pub mod daemon;
pub mod error;
pub mod host;
pub mod passed;
pub mod policy;
pub mod presence;
pub mod qemu;
pub mod reconcile;
pub mod text;
pub mod ui;
pub mod usb;

pub use error::Error;
