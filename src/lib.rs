//! x
pub mod text;
pub mod usb;
