//! One table of the file: its keys read one by one, and complaints that name
//! table and key.

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::complaint::{MOST, Sink};
use super::value::{not, shown};
use crate::text::nearest;

/// A table, and where complaints about it go.
pub(super) struct Section<'t, 's> {
    /// What stands before the key in a complaint: ``rule 2, ``.
    who: String,
    /// The keys that lead from there to this table: `options.`.
    within: String,
    /// Where the table begins in the text.
    at: usize,
    table: &'t DeTable<'t>,
    sink: &'s mut Sink,
}

/// A key, where it stands, and its value.
pub(super) type Entry<'t> = (&'t str, usize, &'t Spanned<DeValue<'t>>);

impl<'t, 's> Section<'t, 's> {
    /// The file itself.
    pub(super) fn top(table: &'t DeTable<'t>, sink: &'s mut Sink) -> Self {
        Section { who: String::new(), within: String::new(), at: 0, table, sink }
    }

    /// A table that has a name of its own, like `rule 2`. Complains, as about
    /// the table, if it is something `expected` does not describe.
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

    /// Where the table begins in the text.
    pub(super) fn at(&self) -> usize {
        self.at
    }

    /// The line the table begins on.
    pub(super) fn line(&self) -> usize {
        self.sink.line(self.at)
    }

    /// How many complaints there are so far, about this table or others.
    pub(super) fn complaints(&self) -> usize {
        self.sink.len()
    }

    /// Where complaints go.
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

    /// The value of a key, if it is there and right.
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

    /// A complaint about a key.
    pub(super) fn complain(&mut self, key: &str, at: usize, message: &str) {
        let (who, within) = (&self.who, &self.within);
        self.sink.add(at, format!("{who}key `{within}{}`: {message}", shown(key)));
    }

    /// A complaint about a key, at the key; nothing if it is not there.
    pub(super) fn complain_at_key(&mut self, key: &str, message: &str) {
        if let Some((known, _)) = self.table.get_key_value(key) {
            self.complain(key, known.span().start, message);
        }
    }

    /// A complaint about a key, at its value; nothing if it is not there.
    pub(super) fn complain_at_value(&mut self, key: &str, message: &str) {
        if let Some(value) = self.table.get(key) {
            self.complain(key, value.span().start, message);
        }
    }

    /// A complaint about the table as a whole.
    pub(super) fn complain_here(&mut self, message: &str) {
        let who = self.who.trim_end_matches(", ");
        self.sink.add(self.at, format!("{who}: {message}"));
    }

    /// What a word that is not known probably meant. Beyond the complaints that
    /// are told, it is not worth the search.
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
