//! Writes results to standard output, and errors to the log.

use std::io::Write;

use tracing::{error, warn};

use crate::error::Error;
use crate::text::{chain, escape_json};

/// Writes to standard output. It is no error if the reader closes the pipe.
pub fn print(text: &str) -> Result<(), Error> {
    print_more(text).map(drop)
}

/// Like [`print()`]. Returns false if nobody reads any more.
pub fn print_more(text: &str) -> Result<bool, Error> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(false),
        Err(source) => Err(Error::Write { what: "standard output", source }),
    }
}

/// A JSON document, with indentation for people.
pub fn json(document: &impl serde::Serialize) -> Result<String, Error> {
    serde_json::to_string_pretty(document)
        .map(|json| escape_json(json) + "\n")
        .map_err(|error| Error::Write { what: "the JSON document", source: error.into() })
}

/// Writes an error to the log. If udev called the program for a hub, that is no
/// failure: a rule for everything behind a hub also matches the hubs there.
pub fn report(error: &Error, in_background: bool) {
    match error {
        Error::Several { errors, .. } => {
            errors.iter().for_each(|error| report(error, in_background));
            error!("{error}");
        }
        Error::Hub(_) if in_background => warn!("{error}"),
        _ => error!("{}", chain(error)),
    }
}

/// Returns one error, or combines several into one.
pub fn together(mut errors: Vec<Error>, of: usize) -> Result<(), Error> {
    if errors.len() > 1 {
        return Err(Error::Several { errors, of });
    }
    errors.pop().map_or(Ok(()), Err)
}
