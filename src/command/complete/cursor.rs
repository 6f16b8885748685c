//! Finds out what the cursor in a command line stands on. clap's description of
//! the command line decides. There is no I/O here.

use clap::{Arg, ArgAction, Command};

/// A command line up to the cursor.
#[derive(Debug)]
pub struct Cursor<'c> {
    /// The command that the earlier words have chosen.
    pub command: &'c Command,
    /// What the last word can be.
    pub expected: Expected<'c>,
    /// The text of the last word so far.
    pub current: String,
    /// The values of the earlier arguments, by the argument's id.
    given: Vec<(&'c str, String)>,
}

/// What a word can be.
#[derive(Debug)]
pub enum Expected<'c> {
    /// A subcommand of this command.
    Command(&'c Command),
    /// An option of this command.
    Option(&'c Command),
    /// A value of this argument, and the text before the value in the same
    /// word: `--config=`.
    Value(&'c Arg, String),
    /// Nothing is known about it.
    Nothing,
}

impl<'c> Cursor<'c> {
    /// Reads the words after the program's name. The last one is unfinished.
    /// Returns `None` if the words fit no command.
    pub fn read(root: &'c Command, words: &[String]) -> Option<Self> {
        let (current, before) = words.split_last()?;
        let mut line = Cursor {
            command: root,
            expected: Expected::Nothing,
            current: current.clone(),
            given: Vec::new(),
        };
        let mut place = 0;
        let mut options_ended = false;
        let mut waiting: Option<&Arg> = None;
        for word in before {
            if let Some(option) = waiting.take() {
                line.given.push((option.get_id().as_str(), word.clone()));
            } else if word == "--" && !options_ended {
                options_ended = true;
            } else if !options_ended && is_option(word) {
                waiting = line.option(word);
            } else if line.command.has_subcommands() {
                line.command = line.command.find_subcommand(word)?;
            } else {
                if let Some(argument) = positional(line.command, place) {
                    line.given.push((argument.get_id().as_str(), word.clone()));
                }
                place += 1;
            }
        }
        line.expected = match waiting {
            Some(option) => Expected::Value(option, String::new()),
            None if !options_ended && current.starts_with('-') => line.option_or_value(),
            None if line.command.has_subcommands() => Expected::Command(line.command),
            None => positional(line.command, place)
                .map_or(Expected::Nothing, |argument| Expected::Value(argument, String::new())),
        };
        Some(line)
    }

    /// The last value of an argument, if it was given.
    pub fn given(&self, id: &str) -> Option<&str> {
        self.given.iter().rev().find(|(known, _)| *known == id).map(|(_, value)| value.as_str())
    }

    /// The text of the value so far.
    pub fn typed(&self) -> &str {
        let before = match &self.expected {
            Expected::Value(_, before) => before.len(),
            _ => 0,
        };
        self.current.get(before..).unwrap_or_default()
    }

    /// Reads a word that is an option, or several short options. Returns the
    /// option whose value is the next word.
    fn option(&mut self, word: &str) -> Option<&'c Arg> {
        let (option, value) = match word.strip_prefix("--") {
            Some(long) => {
                let (name, value) = match long.split_once('=') {
                    Some((name, value)) => (name, Some(value)),
                    None => (long, None),
                };
                (self.long(name)?, value)
            }
            None => word.char_indices().skip(1).find_map(|(at, c)| {
                let mut options = self.command.get_arguments();
                let option = options.find(|option| option.get_short() == Some(c))?;
                let value = word.get(at + c.len_utf8()..).filter(|value| !value.is_empty());
                takes_value(option).then_some((option, value))
            })?,
        };
        if !takes_value(option) {
            return None;
        }
        match value {
            Some(value) => {
                self.given.push((option.get_id().as_str(), value.to_owned()));
                None
            }
            None => Some(option),
        }
    }

    fn option_or_value(&self) -> Expected<'c> {
        let value = self.current.strip_prefix("--").and_then(|long| {
            let option = self.long(long.split_once('=')?.0).filter(|o| takes_value(o))?;
            Some(Expected::Value(option, format!("--{}=", option.get_long()?)))
        });
        value.unwrap_or(Expected::Option(self.command))
    }

    fn long(&self, name: &str) -> Option<&'c Arg> {
        self.command.get_arguments().find(|option| option.get_long() == Some(name))
    }
}

fn is_option(word: &str) -> bool {
    word.starts_with('-') && word != "-"
}

fn takes_value(option: &Arg) -> bool {
    option.get_action().takes_values()
}

/// The positional argument at this place. The last one may take all words that
/// follow.
fn positional(command: &Command, place: usize) -> Option<&Arg> {
    let many = |argument: &&Arg| matches!(argument.get_action(), ArgAction::Append);
    let mut arguments = command.get_positionals();
    arguments.nth(place).or_else(|| command.get_positionals().last().filter(many))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::Cli;
    use clap::CommandFactory;
    use proptest::prelude::*;

    /// A description of what is expected at the end.
    fn expected(words: &str) -> String {
        let mut root = Cli::command();
        root.build();
        let words: Vec<String> = words.split(' ').map(str::to_owned).collect();
        let Some(line) = Cursor::read(&root, &words) else { return "no line".into() };
        match &line.expected {
            Expected::Command(command) => format!("command of {}", command.get_name()),
            Expected::Option(command) => format!("option of {}", command.get_name()),
            Expected::Value(argument, before) => format!("{before}{}", argument.get_id()),
            Expected::Nothing => "nothing".into(),
        }
    }

    #[test]
    fn the_cursor_is_found() {
        for (words, place) in [
            ("", "command of usb-qmp-hotplug"),
            ("att", "command of usb-qmp-hotplug"),
            ("-", "option of usb-qmp-hotplug"),
            ("--config", "option of usb-qmp-hotplug"),
            ("--config ", "config"),
            ("--config=/etc", "--config=config"),
            ("--config /x -q attach ", "vm"),
            ("attach vm ", "devices"),
            ("attach vm 1-1 1-2 ", "devices"),
            ("attach vm --force -o guest-reset=off ", "devices"),
            ("attach vm -o ", "options"),
            ("attach -vo x vm ", "devices"),
            ("attach vm --open=", "--open=open"),
            ("attach vm -- -", "devices"),
            ("rule --vm a --by ", "by"),
            ("rule --vm a ", "device"),
            ("rule 1-1 ", "nothing"),
            ("watch ", "nothing"),
            ("nonsense ", "no line"),
        ] {
            assert_eq!(expected(words), place, "{words:?}");
        }
    }

    #[test]
    fn what_was_given_is_known() {
        let mut root = Cli::command();
        root.build();
        let words = ["--config=/a", "detach", "vm", "--timeout", "3", ""].map(str::to_owned);
        let line = Cursor::read(&root, &words).unwrap();
        assert_eq!((line.given("config"), line.given("vm")), (Some("/a"), Some("vm")));
    }

    proptest! {
        #[test]
        fn no_words_panic(words in proptest::collection::vec("\\PC{0,8}|-[a-zé]{0,3}|--[a-z=]{0,9}|attach|rule", 0..6)) {
            let mut root = Cli::command();
            root.build();
            if let Some(line) = Cursor::read(&root, &words) {
                let _ = line.typed();
            }
        }
    }
}
