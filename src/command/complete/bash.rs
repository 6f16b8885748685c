//! Undoes what bash does to words before a completion gets them (bash(1),
//! Programmable Completion). The words have their quotes, as they were typed.
//! They are split at `:` and `=` (COMP_WORDBREAKS), and these characters are
//! separate words.

/// The words as a program would get them, and the beginning of the last word
/// that the candidates must leave out, because bash replaces only the last part
/// of the word.
pub fn words(parts: &[String]) -> (Vec<String>, String) {
    let is_break = |part: &String| !part.is_empty() && part.chars().all(|c| ":=".contains(c));
    let mut words: Vec<String> = Vec::new();
    let mut glue = false;
    let mut kept = String::new();
    for part in parts {
        let breaks = is_break(part);
        match words.last_mut() {
            Some(word) if glue || (breaks && !word.is_empty()) => {
                kept = if breaks { format!("{word}{part}") } else { word.clone() };
                word.push_str(part);
            }
            _ => {
                kept = String::new();
                words.push(part.clone());
            }
        }
        glue = breaks;
    }
    (words.iter().map(|word| unquoted(word)).collect(), unquoted(&kept))
}

/// A word without its quotes. The last quote may have no end.
fn unquoted(word: &str) -> String {
    let mut text = String::new();
    let mut quote = None;
    let mut characters = word.chars();
    while let Some(c) = characters.next() {
        match (quote, c) {
            (None, '\'' | '"') => quote = Some(c),
            (Some(open), c) if c == open => quote = None,
            (None | Some('"'), '\\') => text.extend(characters.next()),
            (_, c) => text.push(c),
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(parts: &[&str]) -> (Vec<String>, String) {
        words(&parts.iter().map(|part| (*part).to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn what_bash_parted_is_one_word_again() {
        assert_eq!(
            read(&["attach", "vm", ""]),
            (vec!["attach".into(), "vm".into(), "".into()], "".into())
        );
        assert_eq!(read(&["vm", "152d", ":", "23"]).0, ["vm", "152d:23"]);
        assert_eq!(read(&["vm", "152d", ":", "23"]).1, "152d:");
        assert_eq!(read(&["vm", "152d", ":"]), (vec!["vm".into(), "152d:".into()], "152d:".into()));
        assert_eq!(read(&["--config", "=", "/etc", "attach"]).0, ["--config=/etc", "attach"]);
        assert_eq!(read(&["--config", "=", "/etc", "attach"]).1, "");
    }

    #[test]
    fn quotes_are_taken_off() {
        assert_eq!(read(&[r"/my\ vm", r#""a b"#, r"'c\d'"]).0, ["/my vm", "a b", r"c\d"]);
    }
}
