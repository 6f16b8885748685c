//! x
pub mod rule;
pub mod text;
pub mod usb;
