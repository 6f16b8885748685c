//! Reads the facts about other processes from `/proc`: the running QEMUs, their
//! command lines and sockets, and the processes that have a device open.

pub mod cmdline;
mod holders;
mod options;
mod qemus;
mod sockets;

pub use holders::Holder;
pub(in crate::host) use holders::address_of;
pub use qemus::Qemu;
pub use sockets::{Reach, UnixSockets};
