//! The output for people: tables, text for the screen, the progress line,
//! standard output, and the log.

pub mod log;
pub mod output;
pub mod progress;
pub mod screen;
pub mod table;
