//! Lines for a terminal. They are cut to its width, they never wrap, and their
//! colours have a meaning.

use std::io::IsTerminal;

use unicode_width::UnicodeWidthStr;

use crate::text::fit;

/// The properties of the screen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Screen {
    /// The most columns of a line.
    pub columns: usize,
    /// Whether colours are wanted.
    pub colour: bool,
}

/// The meaning of a word, which decides its colour.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Style {
    /// Ordinary text.
    Plain,
    /// The text that a reader looks for first.
    Bold,
    /// The text that connects the other words.
    Dim,
    /// The device is where it belongs, or it may be used.
    Good,
    /// It is in use, so it should not be taken without a question.
    Busy,
    /// It was refused, or it does not work.
    Bad,
    /// The text comes from the configuration.
    Rule,
}

impl Style {
    /// The code that starts the style (ECMA-48, Select Graphic Rendition).
    fn code(self) -> &'static str {
        match self {
            Style::Plain => "",
            Style::Bold => "\x1b[1m",
            Style::Dim => "\x1b[2m",
            Style::Good => "\x1b[32m",
            Style::Busy => "\x1b[33m",
            Style::Bad => "\x1b[31m",
            Style::Rule => "\x1b[36m",
        }
    }
}

impl Screen {
    /// The properties of standard output. The width is that of the terminal, or
    /// else `COLUMNS`, or else 80. There are no colours with `NO_COLOR`
    /// (no-color.org), nor on a terminal without colours.
    pub fn of_stdout() -> Self {
        let set = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
        let stdout = std::io::stdout();
        let is_terminal = stdout.is_terminal();
        let terminal = rustix::termios::tcgetwinsize(&stdout).ok().filter(|_| is_terminal);
        let columns = terminal.map(|size| usize::from(size.ws_col)).filter(|columns| *columns > 0);
        let columns = columns.or_else(|| set("COLUMNS")?.parse().ok()).unwrap_or(80);
        let dumb = set("TERM").is_none_or(|term| term == "dumb");
        Screen { columns, colour: is_terminal && !dumb && set("NO_COLOR").is_none() }
    }
}

/// A line, made of words. The text of a word must be escaped already.
#[derive(Debug, Clone, Default)]
pub struct Line {
    words: Vec<(Style, String)>,
    columns: usize,
}

impl Line {
    /// Adds text without a change.
    pub fn add(&mut self, style: Style, text: impl Into<String>) -> &mut Self {
        let text = text.into();
        self.columns += text.width();
        self.words.push((style, text));
        self
    }

    /// Adds blanks up to a column, counted from 0.
    pub fn pad_to(&mut self, column: usize) -> &mut Self {
        let missing = column.saturating_sub(self.columns);
        self.add(Style::Plain, " ".repeat(missing))
    }

    /// How many columns the whole line takes.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// The line with its newline, as it is written to the screen.
    pub fn shown(&self, screen: Screen) -> String {
        let mut text = String::new();
        let (mut left, mut fits) = (screen.columns, self.columns <= screen.columns);
        for (style, word) in &self.words {
            // The mark `…` for missing text needs one column.
            let is_cut = !fits && word.width() >= left;
            let word = if is_cut { fit_marked(word, left) } else { word.clone() };
            left = left.saturating_sub(word.width());
            match style.code() {
                code if screen.colour && !code.is_empty() && !word.trim().is_empty() => {
                    text += code;
                    text += &word;
                    text += "\x1b[0m";
                }
                _ => text += &word,
            }
            if is_cut {
                fits = true;
                break;
            }
        }
        debug_assert!(fits, "a line that does not fit is cut");
        let end = text.trim_end_matches(' ').len();
        text.truncate(end);
        text + "\n"
    }
}

/// The beginning of a word with `…`, even if the word fits, because more text
/// follows.
fn fit_marked(word: &str, columns: usize) -> String {
    fit(&format!("{word}…"), columns).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PLAIN: Screen = Screen { columns: 10, colour: false };

    #[test]
    fn a_line_is_cut_where_the_screen_ends() {
        let mut line = Line::default();
        line.add(Style::Bold, "abcd").pad_to(6).add(Style::Dim, "efgh");
        assert_eq!(line.shown(PLAIN), "abcd  efgh\n");
        line.add(Style::Good, "i");
        assert_eq!(line.shown(PLAIN), "abcd  efg…\n");
        let colour = Screen { colour: true, ..PLAIN };
        assert_eq!(line.shown(colour), "\x1b[1mabcd\x1b[0m  \x1b[2mefg…\x1b[0m\n");
        assert_eq!(line.shown(Screen { columns: 5, colour: false }), "abcd…\n");
    }

    #[test]
    fn no_line_ends_in_blanks() {
        let mut line = Line::default();
        line.add(Style::Plain, "a").pad_to(5);
        assert_eq!(line.shown(PLAIN), "a\n");
    }

    proptest! {
        #[test]
        fn every_line_fits(words in proptest::collection::vec("[a日 ]{0,6}", 0..6), columns in 1usize..20) {
            let mut line = Line::default();
            for word in words {
                line.add(Style::Plain, word);
            }
            let screen = Screen { columns, colour: false };
            let shown = line.shown(screen);
            prop_assert!(shown.trim_end().width() <= columns);
        }
    }
}
