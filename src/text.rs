//! How text from outside is shown. A device, a guest or a file name may hold
//! anything; what a terminal or a log gets is printable and on one line.

use std::borrow::Cow;

use unicode_width::UnicodeWidthStr;

/// The text with everything that is not plainly visible written as an escape:
/// control characters, line and paragraph separators, and the invisible marks
/// that reorder text.
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

/// Control characters, and those of Unicode's format characters that change
/// how the text around them looks (Unicode Standard Annex #9, section 2;
/// zero-width characters, separators and the byte order mark).
fn hidden(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}'
            | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}'
            | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}')
}

/// Rows as lines of aligned columns, two blanks apart; the last column is not
/// padded. The cells must be escaped already.
pub fn table(rows: &[Vec<String>]) -> String {
    let mut widths: Vec<usize> = Vec::new();
    for row in rows {
        for (i, cell) in row.iter().enumerate() {
            let width = cell.width();
            match widths.get_mut(i) {
                Some(widest) => *widest = width.max(*widest),
                None => widths.push(width),
            }
        }
    }
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (cell, widest) in row.iter().zip(&widths) {
            let padding = widest - cell.width() + 2;
            line.push_str(cell);
            line.extend(std::iter::repeat_n(' ', padding));
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
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
    }

    #[test]
    fn columns_are_aligned_by_what_a_terminal_shows() {
        let rows = [
            vec!["a".into(), "日本".into(), "x".into()],
            vec!["bb".into(), "c".into(), String::new()],
        ];
        assert_eq!(table(&rows), "a   日本  x\nbb  c\n");
    }

    proptest! {
        #[test]
        fn nothing_hidden_is_left(text in any::<String>()) {
            prop_assert!(!escape(&text).contains(hidden));
        }
    }
}
