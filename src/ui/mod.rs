//! What people see: tables and screens, the line that says what is waited
//! for, standard output, and the log.

pub mod log;
pub mod output;
pub mod progress;
pub mod screen;
pub mod table;
