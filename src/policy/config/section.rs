//! Reads one table of the file key by key. Its complaints name the table and
//! the key.

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::complaint::{MOST, Sink};
use super::value::{not, shown};
use crate::text::nearest;

/// A table, and the sink for complaints about it.
pub(super) struct Section<'t, 's> {
    /// The text before the key in a complaint: ``rule 2, ``.
    who: String,
    /// The keys that lead from the named table to this one: `options.`.
    within: String,
    /// The byte offset where the table begins.
    at: usize,
    table: &'t DeTable<'t>,
    sink: &'s mut Sink,
}

/// A key, its byte offset, and its value.
pub(super) type Entry<'t> = (&'t str, usize, &'t Spanned<DeValue<'t>>);

impl<'t, 's> Section<'t, 's> {
    /// The file itself.
    pub(super) fn top(table: &'t DeTable<'t>, sink: &'s mut Sink) -> Self {
        Section { who: String::new(), within: String::new(), at: 0, table, sink }
    }

    /// A table with its own name, like `rule 2`. If the value is not a table,
    /// it complains and says what was `expected`.
    pub(super) fn named(
        who: String,
        item: &'t Spanned<DeValue<'t>>,
        expected: &str,
        sink: &'s mut Sink,
    ) -> Option<Self> {
        let at = item.span().start;
        match item.get_ref().as_table() {
            Some(table) => {
                Some(Section { who: format!("{who}, "), within: String::new(), at, table, sink })
            }
            None => {
                sink.add(at, format!("{who}: {}", not(item.get_ref(), expected)));
                None
            }
        }
    }

    /// A table that is the value of a key of this one.
    pub(super) fn inner(&mut self, key: &str, expected: &str) -> Option<Section<'t, '_>> {
        let at = self.table.get(key)?.span().start;
        let table = self.read(key, |value| value.as_table().ok_or_else(|| not(value, expected)))?;
        let (who, within) = (self.who.clone(), format!("{}{key}.", self.within));
        Some(Section { who, within, at, table, sink: self.sink })
    }

    /// The byte offset where the table begins.
    pub(super) fn at(&self) -> usize {
        self.at
    }

    /// The line where the table begins.
    pub(super) fn line(&self) -> usize {
        self.sink.line(self.at)
    }

    /// How many complaints there are so far, about this table or others.
    pub(super) fn complaints(&self) -> usize {
        self.sink.len()
    }

    /// The sink for complaints.
    pub(super) fn sink(&mut self) -> &mut Sink {
        self.sink
    }

    pub(super) fn has(&self, key: &str) -> bool {
        self.table.contains_key(key)
    }

    /// All entries, in the order of the file.
    pub(super) fn entries(&self) -> Vec<Entry<'t>> {
        let mut entries: Vec<Entry> = Vec::with_capacity(self.table.len());
        for (key, value) in self.table {
            entries.push((key.get_ref(), key.span().start, value));
        }
        entries.sort_by_key(|(_, at, _)| *at);
        entries
    }

    /// Reads the value of a key, if the key exists and the value is correct.
    pub(super) fn read<T>(
        &mut self,
        key: &str,
        parse: impl FnOnce(&'t DeValue<'t>) -> Result<T, String>,
    ) -> Option<T> {
        let value = self.table.get(key)?;
        match parse(value.get_ref()) {
            Ok(value) => Some(value),
            Err(message) => {
                self.complain(key, value.span().start, &message);
                None
            }
        }
    }

    /// Adds a complaint about a key.
    pub(super) fn complain(&mut self, key: &str, at: usize, message: &str) {
        let (who, within) = (&self.who, &self.within);
        self.sink.add(at, format!("{who}key `{within}{}`: {message}", shown(key)));
    }

    /// Adds a complaint about a key, at the key. Does nothing if the key does
    /// not exist.
    pub(super) fn complain_at_key(&mut self, key: &str, message: &str) {
        if let Some((known, _)) = self.table.get_key_value(key) {
            self.complain(key, known.span().start, message);
        }
    }

    /// Adds a complaint about a key, at its value. Does nothing if the key does
    /// not exist.
    pub(super) fn complain_at_value(&mut self, key: &str, message: &str) {
        if let Some(value) = self.table.get(key) {
            self.complain(key, value.span().start, message);
        }
    }

    /// Adds a complaint about the table as a whole.
    pub(super) fn complain_here(&mut self, message: &str) {
        let who = self.who.trim_end_matches(", ");
        self.sink.add(self.at, format!("{who}: {message}"));
    }

    /// The word that the user probably meant by an unknown one. It does not
    /// search when there are more complaints than are reported.
    pub(super) fn nearest<'c>(
        &self,
        word: &str,
        known: impl IntoIterator<Item = &'c str>,
    ) -> Option<&'c str> {
        if self.sink.len() < MOST { nearest(word, known) } else { None }
    }

    /// Complains about every key that is not one of these.
    pub(super) fn allow(&mut self, known: &[&str]) {
        for (key, at, _) in self.entries() {
            if known.contains(&key) {
                continue;
            }
            let hint = match self.nearest(key, known.iter().copied()) {
                Some(meant) => format!("did you mean `{meant}`?"),
                None => format!("known are `{}`", known.join("`, `")),
            };
            self.complain(key, at, &format!("unknown key; {hint}"));
        }
    }
}
