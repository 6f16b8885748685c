//! Shows text from outside safely. A device, a guest or a file name may contain
//! anything. A terminal or a log gets only printable text on one line.

use std::borrow::Cow;

use unicode_width::UnicodeWidthStr;

/// The text with an escape for every character that is not clearly visible:
/// control characters, line and paragraph separators, invisible marks that
/// reorder text, and unusual blanks.
///
/// # Examples
///
/// ```
/// use usb_qmp_hotplug::text::escape;
/// assert_eq!(escape("Tablet"), "Tablet");
/// assert_eq!(escape("a\x1b[2Jb"), "a\\u{1b}[2Jb");
/// ```
pub fn escape(text: &str) -> Cow<'_, str> {
    if !text.contains(hidden) {
        return Cow::Borrowed(text);
    }
    let mut shown = String::with_capacity(text.len() + 8);
    for c in text.chars() {
        if hidden(c) {
            shown.extend(c.escape_default());
        } else {
            shown.push(c);
        }
    }
    Cow::Owned(shown)
}

/// A word of a command as it stands in a udev rule's `RUN` (udev(7)): udev
/// substitutes `$` and `%`, and then splits the text at blanks outside quotes.
/// `None` if the word has quotes, backslashes or control characters, which
/// cannot be written there.
///
/// # Examples
///
/// ```
/// use usb_qmp_hotplug::text::udev_word;
/// assert_eq!(udev_word("/run/a b%c.qmp").as_deref(), Some("'/run/a b%%c.qmp'"));
/// assert_eq!(udev_word("it's"), None);
/// ```
pub fn udev_word(word: &str) -> Option<String> {
    if word.chars().any(|c| c.is_control() || "'\"\\".contains(c)) {
        return None;
    }
    let substituted = word.replace('$', "$$").replace('%', "%%");
    let plain = |c: char| c.is_alphanumeric() || "/._-+:,@=".contains(c);
    let is_plain = !word.is_empty() && word.chars().all(plain);
    Some(if is_plain { substituted } else { format!("'{substituted}'") })
}

/// A JSON document with JSON's own escapes for every character that is not
/// clearly visible. Its meaning is the same, and it cannot control a terminal.
///
/// # Examples
///
/// ```
/// use usb_qmp_hotplug::text::escape_json;
/// assert_eq!(escape_json("[\"\u{9b}31m\"]\n".into()), "[\"\\u009b31m\"]\n");
/// ```
pub fn escape_json(json: String) -> String {
    // Characters below the blank are only layout, because they are escaped
    // already in strings (RFC 8259, section 7).
    let hidden = |c: char| c > ' ' && hidden(c);
    if !json.contains(hidden) {
        return json;
    }
    let mut shown = String::with_capacity(json.len() + 8);
    for c in json.chars() {
        if hidden(c) {
            for unit in c.encode_utf16(&mut [0; 2]) {
                shown += &format!("\\u{unit:04x}");
            }
        } else {
            shown.push(c);
        }
    }
    shown
}

/// Control characters, unusual blanks, letters without a shape, and format
/// characters of Unicode that change how the text around them looks (Unicode
/// Standard Annex #9, section 2; zero-width characters, separators and the byte
/// order mark).
fn hidden(c: char) -> bool {
    c.is_control()
        || (c.is_whitespace() && c != ' ')
        || matches!(c, '\u{115f}' | '\u{1160}' | '\u{2800}' | '\u{3164}' | '\u{ffa0}')
        || matches!(c, '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}'
            | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}'
            | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}')
}

/// The most characters of a text from outside in a message or a line of the
/// log.
const MOST_WORDS: usize = 500;

/// The beginning of a text, with `…` for the rest if there is one. The text of
/// a peer appears in messages and in the log, and it must not fill them.
///
/// # Examples
///
/// ```
/// use usb_qmp_hotplug::text::words;
/// assert_eq!(words("Duplicate device ID 'tab0'"), "Duplicate device ID 'tab0'");
/// assert_eq!(words(&"x".repeat(1000)).chars().count(), 501);
/// ```
pub fn words(text: &str) -> Cow<'_, str> {
    match text.char_indices().nth(MOST_WORDS) {
        Some((end, _)) => Cow::Owned(format!("{}…", text.get(..end).unwrap_or_default())),
        None => Cow::Borrowed(text),
    }
}

/// The text, or as much of its beginning as fits into so many columns of a
/// terminal, with `…` for the rest.
///
/// # Examples
///
/// ```
/// use usb_qmp_hotplug::text::fit;
/// assert_eq!(fit("Tablet", 6), "Tablet");
/// assert_eq!(fit("Tablet", 4), "Tab…");
/// assert_eq!(fit("日本語", 4), "日…");
/// ```
pub fn fit(text: &str, columns: usize) -> Cow<'_, str> {
    // No name needs more combining marks than this. A terminal is slow with
    // many more.
    let most = columns.saturating_mul(4).saturating_add(64);
    let is_bounded = text.char_indices().nth(most).is_none();
    if is_bounded && text.width() <= columns {
        return Cow::Borrowed(text);
    }
    if columns == 0 {
        return Cow::Borrowed("");
    }
    // Some characters join, so the width of a text is not the sum of the widths
    // of its characters. It is measured only some twenty times, and not once
    // for each character.
    let ends: Vec<usize> =
        text.char_indices().take(most).map(|(start, c)| start + c.len_utf8()).collect();
    let beginning = |end: &usize| text.get(..*end).unwrap_or_default();
    let fitting = ends.partition_point(|end| beginning(end).width() < columns);
    let end = fitting.checked_sub(1).and_then(|last| ends.get(last)).unwrap_or(&0);
    Cow::Owned(format!("{}…", beginning(end)))
}

/// An error with its causes, on one line: `what: why: why that`.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {}", escape(&cause.to_string()));
        source = cause.source();
    }
    text
}

/// The longest word that [`nearest`] looks at, in characters.
const LONGEST_WORD: usize = 64;

/// The candidate that a mistyped word probably meant: the one with the fewest
/// changes. A change is a letter that was added, left out or replaced, or two
/// letters that were swapped. Upper and lower case count as the same. If
/// several are equally near, the first one is returned. `None` if more than a
/// third of the word and more than one letter had to change, or if the word has
/// more than 64 characters.
///
/// # Examples
///
/// ```
/// use usb_qmp_hotplug::text::nearest;
/// assert_eq!(nearest("vendro", ["vm", "vendor"]), Some("vendor"));
/// assert_eq!(nearest("colour", ["vm", "vendor"]), None);
/// ```
pub fn nearest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let length = word.chars().take(LONGEST_WORD + 1).count();
    if length > LONGEST_WORD {
        return None;
    }
    let most = (length / 3).max(1);
    let word = word.to_lowercase();
    candidates
        .into_iter()
        .filter(|candidate| candidate.chars().nth(LONGEST_WORD).is_none())
        .map(|candidate| (strsim::osa_distance(&word, &candidate.to_lowercase()), candidate))
        // If every letter differs, the words are not similar.
        .filter(|(changes, _)| *changes <= most && (*changes < length || *changes == 0))
        .min_by_key(|(changes, _)| *changes)
        .map(|(_, candidate)| candidate)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_would_move_the_cursor_or_turn_the_line_is_escaped() {
        assert_eq!(escape("a\nb\r\tc\0"), "a\\nb\\r\\tc\\u{0}");
        assert_eq!(escape("x\u{202e}y\u{200b}"), "x\\u{202e}y\\u{200b}");
        assert_eq!(escape("\u{9b}31m"), "\\u{9b}31m");
        assert_eq!(escape("Größe 日本"), "Größe 日本");
        assert_eq!(escape("SN\u{a0}1\u{3000}\u{2800}"), "SN\\u{a0}1\\u{3000}\\u{2800}");
    }

    #[test]
    fn a_mistyped_word_finds_the_one_that_was_meant() {
        let cases = [
            ("vendro", Some("vendor")),
            ("guest-bus", Some("guest_bus")),
            ("VM", Some("vm")),
            ("vn", Some("vm")),
            ("prot", Some("port")),
            ("v", None),
            ("x", None),
            ("", None),
            ("something", None),
        ];
        let known = ["vm", "vendor", "port", "guest_bus"];
        for (word, meant) in cases {
            assert_eq!(nearest(word, known), meant, "{word}");
        }
        assert_eq!(nearest("win", ["wim", "bin"]), Some("wim"), "the first of two");
        assert_eq!(nearest(&"a".repeat(65), [&*"a".repeat(64)]), None);
    }

    #[test]
    fn what_does_not_fit_is_cut_by_what_a_terminal_shows() {
        for (text, columns, shown) in [
            ("", 0, ""),
            ("abc", 0, ""),
            ("abc", 1, "…"),
            ("日本", 4, "日本"),
            ("日本", 3, "日…"),
            ("日本", 2, "…"),
            ("e\u{301}e\u{301}e\u{301}", 2, "e\u{301}…"),
        ] {
            assert_eq!(fit(text, columns), shown, "{text} in {columns}");
        }
    }

    #[test]
    fn a_text_that_is_never_wide_is_cut_all_the_same() {
        let marks = "\u{301}".repeat(60_000);
        let shown = fit(&marks, 10);
        assert_eq!(shown.chars().count(), 10 * 4 + 64 + 1, "the work is bounded by it");
        assert_eq!(fit(&"x".repeat(9_000_000), usize::MAX).len(), 9_000_000);
    }

    #[test]
    fn what_a_peer_says_is_cut() {
        assert_eq!(words(&"ä".repeat(500)), "ä".repeat(500));
        assert_eq!(words(&"ä".repeat(501)), "ä".repeat(500) + "…");
    }

    proptest! {
        #[test]
        fn any_text_fits(text in any::<String>(), columns in 0usize..99) {
            let text = escape(&text);
            prop_assert!(fit(&text, columns).width() <= columns);
        }

        #[test]
        fn any_two_words_can_be_compared(word in any::<String>(), other in any::<String>()) {
            let _ = nearest(&word, [&*other]);
        }

        #[test]
        fn json_stays_what_it_is_and_hides_nothing(text in any::<String>(), tag in 0xe0000u32..0xe007f) {
            let text: String = text.chars().chain(char::from_u32(tag)).collect();
            let json = escape_json(serde_json::to_string_pretty(&[&text]).unwrap());
            prop_assert_eq!(serde_json::from_str::<[String; 1]>(&json).unwrap(), [text]);
            prop_assert!(!json.replace('\n', "").contains(hidden));
        }

        #[test]
        fn nothing_hidden_is_left(text in any::<String>()) {
            prop_assert!(!escape(&text).contains(hidden));
        }
    }
}
