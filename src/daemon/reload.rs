//! Reads the configuration again. A thread reads it, because its disk may not
//! answer.

use std::pin::Pin;

use tokio::time::timeout;

use super::Settings;
use crate::error::Error;
use crate::host::blocking;
use crate::policy::config::{self, Config};

/// A configuration that is being read.
type Reading = Pin<Box<dyn Future<Output = Result<Config, Error>>>>;

/// The configuration that a thread is reading now, if there is one.
#[derive(Default)]
pub struct Reload(Option<Reading>);

impl Reload {
    /// Begins to read the configuration. If one is being read, it does not
    /// count any more.
    pub fn begin(&mut self, settings: &Settings) {
        let (path, limit) = (settings.config.clone(), settings.timeout);
        self.0 = Some(Box::pin(async move {
            let failed = |source| config::Error::Io { path: path.clone(), source };
            let file = path.clone();
            // A pipe was read at the start and has no content any more.
            let read = move || match std::fs::metadata(&file) {
                Ok(found) if !found.is_file() => {
                    let source = std::io::Error::other("it is no regular file, as a reload needs");
                    Err(config::Error::Io { path: file, source })
                }
                _ => Config::read(&file),
            };
            match timeout(limit, blocking(read)).await {
                Ok(config) => Ok(config.map_err(failed)??),
                Err(_) => Err(failed(std::io::ErrorKind::TimedOut.into()).into()),
            }
        }));
    }

    /// Waits until the configuration has been read. If none is being read, it
    /// waits for ever.
    pub async fn end(&mut self) -> Result<Config, Error> {
        let Some(reading) = &mut self.0 else { return std::future::pending().await };
        let config = reading.await;
        self.0 = None;
        config
    }
}
