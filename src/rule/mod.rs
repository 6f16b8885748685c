//! Whether a rule matches a device. Pure: the facts come from elsewhere.

mod glob;

pub use self::glob::{Glob, GlobError, MAX_GLOB};
