//! x
pub mod qmp;
pub mod text;
pub mod usb;
