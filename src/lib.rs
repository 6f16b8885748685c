//! x
pub mod config;
pub mod rule;
pub mod text;
pub mod usb;
