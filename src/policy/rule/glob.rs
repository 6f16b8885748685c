//! Text patterns with the wildcards of a shell, but without its special
//! treatment of paths.

use std::fmt;

use glob::Pattern;

/// The longest pattern, in characters. A match takes at most this many steps
/// for each character of the text.
pub const MAX_GLOB: usize = 255;

const WILDCARDS: [char; 3] = ['*', '?', '['];

/// A pattern that the whole text must fit. Upper and lower case are different:
///
/// - `*` is any text, even an empty one, and includes `.` and `/`;
/// - `?` is any one character;
/// - `[a-f0]` is any one of these characters, and `[!a-f0]` is any other
///   character. A `]` at the beginning and a `-` at either end stand for
///   themselves, and so do all wildcards inside: `[*]` is a star;
/// - every other character stands for itself.
///
/// # Examples
///
/// ```
/// use usb_qmp_hotplug::policy::rule::Glob;
/// let below = Glob::new("1-1.*")?;
/// assert!(below.matches("1-1.2") && below.matches("1-1.2.4"));
/// assert!(!below.matches("1-1") && !below.matches("1-10"));
/// # Ok::<(), usb_qmp_hotplug::policy::rule::GlobError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Glob {
    pattern: Pattern,
    /// Whether there are no wildcards. This is the usual case, and then a
    /// comparison is enough.
    literal: bool,
}

/// The mistakes that a pattern can have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GlobError {
    /// It has no characters.
    #[error("an empty glob matches nothing; `*` matches everything")]
    Empty,
    /// It has more than [`MAX_GLOB`] characters.
    #[error("the glob has more than {MAX_GLOB} characters")]
    TooLong,
    /// It has two stars next to each other, which have a special meaning in
    /// other tools.
    #[error("write `*` instead of `**`: it is any text, also across `.` and `/`")]
    DoubleStar,
    /// A `[` has no `]`. The number is its place in characters, counted from 1.
    #[error("the `[` at character {0} of the glob has no `]`; a plain `[` is written `[[]`")]
    Open(usize),
}

impl Glob {
    /// Creates a glob from its text.
    ///
    /// # Errors
    ///
    /// The text is empty, is too long, or is not a glob.
    pub fn new(text: &str) -> Result<Self, GlobError> {
        if text.is_empty() {
            return Err(GlobError::Empty);
        }
        if text.chars().nth(MAX_GLOB).is_some() {
            return Err(GlobError::TooLong);
        }
        if text.contains("**") {
            return Err(GlobError::DoubleStar);
        }
        // `**` was excluded above, so an open `[` is the only possible mistake.
        let pattern = Pattern::new(text).map_err(|error| GlobError::Open(error.pos + 1))?;
        Ok(Glob { pattern, literal: !text.contains(WILDCARDS) })
    }

    /// Whether the whole text fits. The time is at most proportional to the
    /// length of the glob multiplied by the length of the text.
    pub fn matches(&self, text: &str) -> bool {
        if self.literal { self.as_str() == text } else { self.pattern.matches(text) }
    }

    /// Whether it is certain that every text that fits `other` fits this glob,
    /// too. `false` means that this is not known.
    pub fn covers(&self, other: &Glob) -> bool {
        let start = self.as_str().strip_suffix('*').filter(|start| !start.contains(WILDCARDS));
        self == other
            || (other.literal && self.matches(other.as_str()))
            || start.is_some_and(|start| other.as_str().starts_with(start))
    }

    /// The glob as it was written.
    pub fn as_str(&self) -> &str {
        self.pattern.as_str()
    }

    /// Whether there is no wildcard in it.
    pub fn is_literal(&self) -> bool {
        self.literal
    }
}

impl fmt::Display for Glob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&crate::text::escape(self.as_str()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn glob(text: &str) -> Glob {
        Glob::new(text).unwrap()
    }

    #[test]
    fn wildcards_mean_what_the_manual_says() {
        let cases = [
            ("1-1.2", "1-1.2", true),
            ("1-1.2", "1-1.20", false),
            ("1-1.*", "1-1.2.3.4", true),
            ("1-1.*", "1-1", false),
            ("*", "", true),
            ("?", "", false),
            ("?", "é", true),
            ("a*b*c", "a/b.b/c", true),
            ("a*b*c", "acb", false),
            ("[1-3]-1", "2-1", true),
            ("[!1-3]-1", "2-1", false),
            ("[]-]", "-", true),
            ("[]-]", "]", true),
            ("[*]", "*", true),
            ("[*]", "x", false),
            ("a]", "a]", true),
            ("ABC", "abc", false),
        ];
        for (pattern, text, fits) in cases {
            assert_eq!(glob(pattern).matches(text), fits, "{pattern} {text}");
        }
    }

    #[test]
    fn a_bad_glob_says_what_is_wrong() {
        let cases = [
            ("", GlobError::Empty),
            ("1-[", GlobError::Open(3)),
            ("é[]", GlobError::Open(2)),
            ("[!]", GlobError::Open(1)),
            ("1-1.**", GlobError::DoubleStar),
            ("***", GlobError::DoubleStar),
        ];
        for (text, error) in cases {
            assert_eq!(Glob::new(text), Err(error), "{text}");
        }
        assert_eq!(Glob::new(&"?".repeat(256)), Err(GlobError::TooLong));
        assert!(Glob::new(&"é".repeat(255)).is_ok());
    }

    #[test]
    fn one_glob_covers_another_only_when_that_is_clear() {
        let cases = [
            ("*", "a[bc]", true),
            ("1-1.*", "1-1.2", true),
            ("1-1.*", "1-1.2.*", true),
            ("1-1.*", "1-1.[23]", true),
            ("1-1.?", "1-1.2", true),
            ("1-1.?", "1-1.?", true),
            ("1-1.*", "1-1*", false),
            ("1-1.*", "1-?.2", false),
            ("1-1.2", "1-1.*", false),
            ("?-1*", "1-1.2*", false),
        ];
        for (earlier, later, covers) in cases {
            assert_eq!(glob(earlier).covers(&glob(later)), covers, "{earlier} {later}");
        }
    }

    #[test]
    fn many_stars_take_no_time() {
        let many = glob(&format!("{}b", "*a".repeat(127)));
        assert!(!many.matches(&"a".repeat(100_000)));
    }

    /// Tries all possibilities, directly on the text of the pattern.
    fn naive(pattern: &[char], text: &[char]) -> bool {
        match pattern {
            [] => text.is_empty(),
            ['*', rest @ ..] => (0..=text.len()).any(|taken| naive(rest, &text[taken..])),
            ['?', rest @ ..] => !text.is_empty() && naive(rest, &text[1..]),
            ['[', class @ ..] => {
                let negated = class[0] == '!';
                let class = if negated { &class[1..] } else { class };
                let end = 1 + class[1..].iter().position(|c| *c == ']').unwrap();
                !text.is_empty()
                    && naive_class(&class[..end], text[0]) != negated
                    && naive(&class[end + 1..], &text[1..])
            }
            [c, rest @ ..] => text.first() == Some(c) && naive(rest, &text[1..]),
        }
    }

    fn naive_class(class: &[char], c: char) -> bool {
        match class {
            [] => false,
            [from, '-', to, rest @ ..] => (*from <= c && c <= *to) || naive_class(rest, c),
            [one, rest @ ..] => *one == c || naive_class(rest, c),
        }
    }

    proptest! {
        #[test]
        fn a_glob_agrees_with_trying_everything(
            pattern in "([abé/.-]|[*]|[?]|\\[|\\]|!|\\[!?[]ab-]{1,4}\\]){0,8}",
            text in "[abé/.!*\\[\\]-]{0,10}",
        ) {
            if let Ok(glob) = Glob::new(&pattern) {
                let chars = |text: &str| text.chars().collect::<Vec<_>>();
                prop_assert_eq!(glob.matches(&text), naive(&chars(&pattern), &chars(&text)));
            }
        }

        #[test]
        fn a_glob_that_covers_another_matches_all_that_it_does(
            earlier in "[ab]{0,2}([*]|[?]|\\[ab\\]|[ab])[ab*]?",
            later in "[ab]{0,3}([*]|[?]|\\[ab\\]|[ab])[ab*]?",
            text in "[ab]{0,5}",
        ) {
            if let (Ok(earlier), Ok(later)) = (Glob::new(&earlier), Glob::new(&later)) {
                if earlier.covers(&later) && later.matches(&text) {
                    prop_assert!(earlier.matches(&text), "{} {}", earlier, later);
                }
            }
        }

        #[test]
        fn no_text_panics(pattern in any::<String>(), text in any::<String>()) {
            if let Ok(glob) = Glob::new(&pattern) {
                glob.matches(&text);
            }
        }
    }
}
