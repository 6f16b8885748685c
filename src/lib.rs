//! A USB port, or a USB device, belongs to a virtual machine: plug something
//! in and it is in the guest, pull it out and it is gone. The tool talks QMP
//! to QEMU itself.
//!
//! The map of the house, from the inside out:
//!
//! - [`usb`]: ports, addresses, devices and ids, parsed and printed. Pure.
//! - [`guest`]: a VM's USB controllers and the choice of a free port. Pure.
//! - [`text`]: how untrusted strings and tables are shown. Pure.
//! - [`error`]: what can go wrong, and the exit codes.
//! - [`config`]: the configuration file; [`rule`]: which device a rule means.
//! - [`rulebook`]: the configuration, applied to the host's devices.
//! - [`plan`]: what a VM lacks, and what it has too many. Pure.
//! - [`event`]: a udev event, from its variables.
//! - [`host`]: the edge to sysfs, `/proc` and the device nodes.
//! - [`qmp`]: the edge to a QMP socket; it knows nothing of USB.
//! - [`vm`]: one VM's USB over a [`qmp::Session`]: inspect, attach, detach.
//! - [`plug`]: the two operations, attach and detach.
//! - [`apart`]: what may wait for hardware, on a thread of its own.
//! - [`log`]: the journal, syslog, or standard error; [`progress`]: the line
//!   that says what is waited for.
//! - [`cli`]: the command line's types; [`command`]: one file per command.
//!
//! The port names the device (a device at port `1-1.2` has the QEMU id
//! `usb-host-1-1.2` in every VM), an open descriptor of the device node is the
//! permission that QEMU gets, and a `flock` on that descriptor keeps every
//! other VM out. Nothing is ever written to disk.

pub mod apart;
pub mod cli;
pub mod command;
pub mod config;
pub mod error;
pub mod event;
pub mod guest;
pub mod host;
pub mod log;
pub mod plan;
pub mod plug;
pub mod progress;
pub mod qmp;
pub mod rule;
pub mod rulebook;
pub mod text;
pub mod usb;
pub mod vm;

pub use error::Error;
