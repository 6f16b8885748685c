//! A USB port or a USB device belongs to a virtual machine. A device that is
//! plugged in appears in the guest, and a device that is unplugged leaves it.
//! The tool speaks QMP with QEMU directly.
//!
//! The modules, from the inside to the outside. None imports a module below it:
//!
//! - [`text`]: how untrusted text is shown. Pure.
//! - [`usb`]: ports, addresses, devices, ids and events, parsed and printed. Pure.
//! - [`host`]: the host's side: sysfs, `/proc`, device nodes, disks, events.
//! - [`qemu`]: the VM's side: the QMP session, what a VM has, a device in and out.
//! - [`policy`]: the configuration, its rules, and which device belongs where.
//! - [`error`]: what can go wrong, and the exit codes.
//! - [`presence`]: whether a VM still has a device that it was given.
//! - [`passed`]: which devices of the host a VM has, and by which of its objects.
//! - [`attach`]: the two operations, attach and detach.
//! - [`reconcile`]: what a VM lacks, and what it has too many: decided and carried out.
//! - [`ui`]: tables, the line that says what is waited for, the log.
//! - [`daemon`]: the `watch` command.
//! - [`cli`]: the command line's types; [`command`]: the commands.
//!
//! The port names the device (a device at port `1-1.2` has the QEMU id
//! `usb-host-1-1.2` in every VM), an open descriptor of the device node is the
//! permission that QEMU gets, and a `flock` on that descriptor keeps every
//! other VM out. Nothing is ever written to disk.

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
