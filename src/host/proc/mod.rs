//! What `/proc` tells of other processes: the QEMUs that run, their command
//! lines and sockets, and who has a device open.

pub mod cmdline;
mod holders;
mod qemus;
mod sockets;

pub use holders::Holder;
pub(in crate::host) use holders::address_of;
pub use qemus::Qemu;
pub use sockets::{Reach, UnixSockets};
