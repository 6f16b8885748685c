//! `man DIR`: writes the manual pages. Most of the text comes from the types of
//! the command line. The rest is in contrib/man.

mod page;

use std::fs;
use std::path::Path;

use clap::CommandFactory;

use super::Context;
use crate::cli::{Cli, Man};
use crate::error::Error;
use crate::text::escape;

/// The example that packages install. The page about the configuration contains
/// it.
const EXAMPLE: &str = include_str!("../../../contrib/examples/usb-qmp-hotplug.toml");

/// A file's name, and its text.
type Page = (String, String);

/// Writes the pages.
pub fn run(context: &Context, arguments: &Man) -> Result<(), Error> {
    let directory = &arguments.dir;
    let failed = |source| Error::Write { what: "the manual pages", source };
    let pages = pages().map_err(failed)?;
    fs::create_dir_all(directory).map_err(failed)?;
    for (name, text) in &pages {
        fs::write(directory.join(name), text).map_err(failed)?;
    }
    let (count, shown) = (pages.len(), directory.to_string_lossy());
    let first = Path::new(&*shown).join("usb-qmp-hotplug.1");
    let first = first.to_string_lossy();
    context.say(format_args!("{count} pages in {}; man {}", escape(&shown), escape(&first)))
}

fn pages() -> std::io::Result<Vec<Page>> {
    let mut root = Cli::command();
    root.build();
    let commands: Vec<_> = root.get_subcommands().filter(|c| is_shown(c)).cloned().collect();
    let mut pages = vec![page::main(&root)?];
    for command in &commands {
        pages.push(page::command(command)?);
    }
    let example = page::verbatim(EXAMPLE);
    let see = page::see(&["usb-qmp-hotplug(1)", "usb-qmp-hotplug-sync(1)", "udevadm(8)"]);
    let toml =
        format!("{}.SH EXAMPLE\n{example}{see}", include_str!("../../../contrib/man/toml.5"));
    pages.push(("usb-qmp-hotplug.toml.5".to_owned(), toml));
    Ok(pages)
}

/// The hidden command and clap's own `help` have no pages.
fn is_shown(command: &clap::Command) -> bool {
    !command.is_hide_set() && command.get_name() != "help"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_has_a_page() {
        let names: Vec<String> = pages().unwrap().into_iter().map(|(name, _)| name).collect();
        for name in ["usb-qmp-hotplug.1", "usb-qmp-hotplug-rule.1", "usb-qmp-hotplug.toml.5"] {
            assert!(names.iter().any(|known| known == name), "{names:?}");
        }
        assert!(!names.iter().any(|name| name.contains("complete.") || name.contains("help")));
    }

    #[test]
    fn every_page_has_a_title_that_fits_and_the_usage_of_the_help() {
        for (name, text) in pages().unwrap().iter().filter(|(name, _)| name.ends_with(".1")) {
            let title = name.trim_end_matches(".1").len() + "(1)".len();
            assert!(2 * title + "User Commands".len() + 2 <= 78, "{name}");
            assert!(text.starts_with(".TH usb") && text.contains(" 1 \"\" "), "{name}");
        }
        let (_, attach) = pages().unwrap().into_iter().find(|(n, _)| n.contains("attach")).unwrap();
        let usage = ".SH SYNOPSIS\nusb\\-qmp\\-hotplug attach [OPTIONS] <VM> <DEVICE>...\n";
        assert!(attach.contains(usage), "{attach}");
    }

    #[test]
    fn the_pages_are_plain_ascii_roff() {
        for (name, text) in pages().unwrap() {
            assert!(text.is_ascii(), "{name}");
            assert_eq!(text.matches(".nf\n").count(), text.matches(".fi\n").count(), "{name}");
            assert!(text.matches('`').count() == 0, "{name}: {text}");
        }
    }

    #[test]
    fn the_documents_are_json() {
        for (command, document, _) in page::DOCUMENTS {
            let parsed: Result<serde_json::Value, _> = serde_json::from_str(document);
            assert!(parsed.is_ok(), "{command}: {parsed:?}");
        }
    }
}
