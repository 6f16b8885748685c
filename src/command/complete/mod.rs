//! `complete SHELL -- WORDS` is hidden. It prints the candidates for the last
//! word: each on its own line, with a tab and a description. It prints `:files`
//! or `:directories` if the shell is to complete a path. The scripts in
//! contrib/completions read this output.
//!
//! This is our own code and not clap_complete's, for two reasons. Its stable
//! generator writes scripts that know only commands, options and fixed values,
//! but the candidates here come from the running system: ports, serial numbers,
//! VMs, and the devices in the VM that an earlier word names. Its engine that
//! can ask the program needs the feature `unstable-dynamic`.

mod bash;
mod cursor;
mod values;

use std::time::Duration;

use clap::{Arg, CommandFactory, ValueHint};

use super::Context;
use crate::cli::{Cli, Complete, Shell};
use crate::error::Error;
use crate::text::{escape, fit};
use crate::ui::output::print;
use cursor::{Cursor, Expected};

/// How long a VM may take to answer, because a person is waiting.
const PATIENCE: Duration = Duration::from_secs(1);

/// The longest description, in columns.
const LONGEST_HELP: usize = 60;

/// A text that the user may type, and its description.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Candidate {
    value: String,
    help: String,
}

impl Candidate {
    fn new(value: impl Into<String>, help: impl Into<String>) -> Self {
        Candidate { value: value.into(), help: help.into() }
    }
}

/// The answer for the shell.
#[derive(Debug, Default, PartialEq, Eq)]
struct Answer {
    candidates: Vec<Candidate>,
    /// The kind of path that the shell is to complete itself.
    files: Option<&'static str>,
}

/// Prints the candidates for the last word. If nothing is known, it prints
/// nothing.
pub async fn run(context: &Context, arguments: &Complete) -> Result<(), Error> {
    let (words, hidden) = match arguments.shell {
        Shell::Bash => bash::words(&arguments.words),
        Shell::Zsh | Shell::Fish => (arguments.words.clone(), String::new()),
    };
    let mut root = Cli::command();
    root.build();
    let Some(line) = Cursor::read(&root, &words) else { return Ok(()) };
    let answer = answer(context, &line).await;
    let mut text = String::new();
    for Candidate { value, help } in &answer.candidates {
        // A word with invisible characters or blanks cannot be a candidate.
        if !value.starts_with(&line.current) || escape(value) != value.as_str() {
            continue;
        }
        let Some(value) = value.strip_prefix(&hidden) else { continue };
        let help = escape(help);
        let help = fit(&help, LONGEST_HELP);
        text += &format!("{value}\t{help}\n");
    }
    if let Some(files) = answer.files {
        text += &format!(":{files}\n");
    }
    print(&text)
}

async fn answer(context: &Context, line: &Cursor<'_>) -> Answer {
    match &line.expected {
        Expected::Command(command) => {
            let commands = command.get_subcommands().filter(|command| !command.is_hide_set());
            let candidates = commands.map(|c| Candidate::new(c.get_name(), first(c.get_about())));
            Answer { candidates: candidates.collect(), files: None }
        }
        Expected::Option(command) => {
            let options = command.get_arguments().filter(|option| !option.is_hide_set());
            let option = |option: &Arg| {
                Some(Candidate::new(format!("--{}", option.get_long()?), first(option.get_help())))
            };
            Answer { candidates: options.filter_map(option).collect(), files: None }
        }
        Expected::Value(option, before) => {
            let mut answer = of_value(context, line, option).await;
            for candidate in &mut answer.candidates {
                candidate.value.insert_str(0, before);
            }
            answer
        }
        Expected::Nothing => Answer::default(),
    }
}

async fn of_value(context: &Context, line: &Cursor<'_>, argument: &Arg) -> Answer {
    let possible = argument.get_possible_values();
    if !possible.is_empty() {
        let candidate = |value: &clap::builder::PossibleValue| {
            Candidate::new(value.get_name(), first(value.get_help()))
        };
        return Answer { candidates: possible.iter().map(candidate).collect(), files: None };
    }
    let context = Context {
        host: context.host.clone(),
        timeout: context.timeout.min(PATIENCE),
        config: line.given("config").map_or_else(|| context.config.clone(), Into::into),
        quiet: context.quiet,
    };
    let candidates = match (argument.get_id().as_str(), line.command.get_name()) {
        ("vm" | "vms", command) => {
            let vms = values::vms(&context, !matches!(command, "udev" | "sync"));
            let is_path = line.typed().contains('/') || line.typed().starts_with(['.', '~']);
            let files = (is_path || vms.is_empty()).then_some("files");
            let candidates = if is_path && !line.typed().starts_with('/') { vec![] } else { vms };
            return Answer { candidates, files };
        }
        ("devices", "detach") => match line.given("vm") {
            Some(vm) => values::in_vm(&context, vm, line.typed()).await,
            None => Vec::new(),
        },
        ("devices", _) => values::devices(&context, line.typed(), false),
        ("device", _) => values::devices(&context, line.typed(), true),
        _ => Vec::new(),
    };
    let files = match argument.get_value_hint() {
        ValueHint::FilePath => Some("files"),
        ValueHint::DirPath => Some("directories"),
        _ => None,
    };
    Answer { candidates, files }
}

/// The first line of a help text.
fn first(help: Option<&clap::builder::StyledStr>) -> String {
    let help = help.map(ToString::to_string).unwrap_or_default();
    help.lines().next().unwrap_or_default().trim_end_matches('.').to_owned()
}
