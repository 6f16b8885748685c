//! Reads the options in one argument of QEMU (QEMU, util/qemu-option.c). There
//! is no I/O here.

use serde_json::Value;

/// The pairs of name and value in one argument.
pub type Pairs = Vec<(String, String)>;

/// The value of a name. If the name occurs more than once, the last one counts.
pub fn get<'a>(options: &'a Pairs, name: &str) -> Option<&'a str> {
    options.iter().rev().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
}

/// Reads `NAME=VALUE,...`. The first part may be only the value of `first`. A
/// name without a value is `on`, `noNAME` is `off`, and a comma in a value is
/// doubled. The text may also be JSON. Then each innermost value is an option
/// with its own name.
pub fn options(text: &str, first: &str) -> Pairs {
    if text.starts_with('{') {
        let mut options = Pairs::new();
        leaves("", &serde_json::from_str(text).unwrap_or_default(), &mut options);
        return options;
    }
    let split = |(place, word): (usize, String)| match word.split_once('=') {
        Some((name, value)) => (name.to_owned(), value.to_owned()),
        None if place == 0 => (first.to_owned(), word),
        None => match word.strip_prefix("no") {
            Some(name) => (name.to_owned(), "off".to_owned()),
            None => (word, "on".to_owned()),
        },
    };
    words(text).into_iter().enumerate().map(split).collect()
}

/// Splits at single commas. A double comma is part of the text.
fn words(text: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match words.last_mut() {
            Some(word) if c != ',' || chars.next_if_eq(&',').is_some() => word.push(c),
            _ => words.push(String::new()),
        }
    }
    words
}

fn leaves(name: &str, value: &Value, options: &mut Pairs) {
    match value {
        Value::Object(members) => members.iter().for_each(|(n, v)| leaves(n, v, options)),
        Value::Bool(on) => options.push((name.into(), if *on { "on" } else { "off" }.into())),
        Value::String(text) => options.push((name.into(), text.clone())),
        Value::Number(number) => options.push((name.into(), number.to_string())),
        Value::Array(_) | Value::Null => {}
    }
}
