//! Complaints about a file, with their place in the file.

use std::fmt;
use std::path::{Path, PathBuf};

use crate::text::escape;

/// The most complaints that are reported at once. A longer list shows the first
/// ones.
pub(super) const MOST: usize = 100;

/// One mistake in a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Complaint {
    /// The line, counted from 1.
    pub line: usize,
    /// The column, in characters, counted from 1.
    pub column: usize,
    /// The mistake and its correction, on one line.
    pub message: String,
}

/// All mistakes in a file, in the order of the file. There is at least one.
/// Each is displayed on its own line: `FILE:LINE:COLUMN: message`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Complaints {
    path: PathBuf,
    list: Vec<Complaint>,
    more: usize,
}

impl Complaints {
    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The complaints, at most the first 100.
    pub fn list(&self) -> &[Complaint] {
        &self.list
    }
}

impl fmt::Display for Complaints {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = self.path.to_string_lossy();
        let path = escape(&path);
        for (number, Complaint { line, column, message }) in self.list.iter().enumerate() {
            let turn = if number == 0 { "" } else { "\n" };
            write!(f, "{turn}{path}:{line}:{column}: {message}")?;
        }
        match self.more {
            0 => Ok(()),
            more => write!(f, "\n{path}: and {more} more"),
        }
    }
}

impl std::error::Error for Complaints {}

/// Collects complaints about one text.
pub(super) struct Sink {
    text: String,
    /// Where each line begins.
    lines: Vec<usize>,
    found: Vec<(usize, String)>,
}

impl Sink {
    pub(super) fn new(text: &str) -> Self {
        let turns = text.bytes().enumerate().filter(|(_, byte)| *byte == b'\n');
        let lines = std::iter::once(0).chain(turns.map(|(at, _)| at + 1)).collect();
        Sink { text: text.to_owned(), lines, found: Vec::new() }
    }

    /// Adds a complaint about the text at a byte offset.
    pub(super) fn add(&mut self, at: usize, message: String) {
        self.found.push((at, message));
    }

    /// How many complaints there are so far.
    pub(super) fn len(&self) -> usize {
        self.found.len()
    }

    /// The line of a byte offset, counted from 1.
    pub(super) fn line(&self, at: usize) -> usize {
        self.lines.partition_point(|start| *start <= at)
    }

    fn column(&self, at: usize) -> usize {
        let start = self.lines.get(self.line(at) - 1).copied().unwrap_or(0);
        let line = self.text.get(start..).unwrap_or("");
        // A byte order mark does not count as a character of the first line.
        let mark = usize::from(start == 0 && at > 0 && line.starts_with('\u{feff}'));
        line.char_indices().take_while(|(index, _)| start + index < at).count() + 1 - mark
    }

    /// Returns an error with all complaints in the order of the text, if there
    /// are any.
    pub(super) fn finish(mut self, path: &Path) -> Result<(), Complaints> {
        let mut found = std::mem::take(&mut self.found);
        found.sort();
        found.dedup();
        if found.is_empty() {
            return Ok(());
        }
        let more = found.len().saturating_sub(MOST);
        found.truncate(MOST);
        let place = |(at, message)| {
            let (line, column) = (self.line(at), self.column(at));
            Complaint { line, column, message }
        };
        let list = found.into_iter().map(place).collect();
        Err(Complaints { path: path.to_owned(), list, more })
    }
}
