//! One manual page, in roff (groff_man(7)).

use std::io;

use clap::Command;
use clap_mangen::Man;

use super::Page;

/// The JSON documents by command: an example, and its explanation.
pub const DOCUMENTS: [(&str, &str, &str); 4] = [
    (
        "inspect",
        include_str!("../../../contrib/man/inspect.json"),
        include_str!("../../../contrib/man/inspect.roff"),
    ),
    (
        "sync",
        include_str!("../../../contrib/man/sync.json"),
        include_str!("../../../contrib/man/sync.roff"),
    ),
    (
        "list",
        include_str!("../../../contrib/man/list.json"),
        include_str!("../../../contrib/man/list.roff"),
    ),
    (
        "vms",
        include_str!("../../../contrib/man/vms.json"),
        include_str!("../../../contrib/man/vms.roff"),
    ),
];

/// The page of the program.
pub fn main(root: &Command) -> io::Result<Page> {
    let root = root.clone().mut_subcommand("help", |help| help.hide(true));
    let mut text = Vec::new();
    head(&root, &mut text)?;
    Man::new(root).render_subcommands_section(&mut text)?;
    let mut text =
        in_bold(&String::from_utf8_lossy(&text)).replace(".SH SUBCOMMANDS", ".SH COMMANDS");
    text += include_str!("../../../contrib/man/main.roff");
    text += &see(&["usb-qmp-hotplug.toml(5)", "qemu-system-x86_64(1)", "udev(7)", "udevadm(8)"]);
    Ok(("usb-qmp-hotplug.1".to_owned(), text))
}

/// The page of a command.
pub fn command(command: &Command) -> io::Result<Page> {
    let mut text = Vec::new();
    head(command, &mut text)?;
    let mut text = in_bold(&String::from_utf8_lossy(&text));
    if let Some(more) = command.get_after_help() {
        text += &more_help(&more.to_string());
    }
    if let Some((_, json, notes)) = DOCUMENTS.iter().find(|(name, ..)| *name == command.get_name())
    {
        text += ".SH \"JSON DOCUMENT\"\n.B \\-\\-json\nprints one document. Names and types stay as \
                 they are; there may be more of them later.\n";
        text += &verbatim(json);
        text += notes;
    }
    text += ".SH \"EXIT STATUS\"\nAs in\n.BR usb\\-qmp\\-hotplug (1).\n";
    text += &see(&["usb-qmp-hotplug(1)", "usb-qmp-hotplug.toml(5)"]);
    Ok((format!("usb-qmp-hotplug-{}.1", command.get_name()), text))
}

/// The title. It has no date, so that the same source creates the same page.
/// The generator's own title would be too long for a line.
fn title(command: &Command) -> String {
    let name = command.get_display_name().unwrap_or("usb-qmp-hotplug");
    let source = concat!("usb-qmp-hotplug ", env!("CARGO_PKG_VERSION"));
    format!(".TH {} 1 \"\" \"{source}\" \"User Commands\"\n", escaped(name))
}

/// The synopsis, as the help has it. It is shorter than the generator's, and it
/// has the values of the options.
fn synopsis(command: &Command) -> String {
    let usage = command.clone().render_usage().to_string();
    let words = usage.trim_start_matches("Usage: ").trim();
    format!(".SH SYNOPSIS\n{}\n", in_bold(&escaped(words)).trim_end())
}

fn head(command: &Command, text: &mut Vec<u8>) -> io::Result<()> {
    let man = Man::new(command.clone());
    text.extend(title(command).into_bytes());
    man.render_name_section(text)?;
    text.extend(synopsis(command).into_bytes());
    man.render_description_section(text)?;
    man.render_options_section(text)
}

/// The help text after the options. Indented lines are not filled.
fn more_help(help: &str) -> String {
    let is_verbatim = |line: &&str| line.starts_with("  ");
    let has_examples =
        help.lines().filter(is_verbatim).any(|line| line.contains("usb-qmp-hotplug"));
    let mut text = format!(".SH {}\n", if has_examples { "EXAMPLES" } else { "NOTES" });
    let mut block = String::new();
    for line in help.lines().chain([""]) {
        if is_verbatim(&line) {
            block += line.strip_prefix("  ").unwrap_or(line);
            block.push('\n');
            continue;
        }
        if !block.is_empty() {
            text += &verbatim(&std::mem::take(&mut block));
        }
        text += if line.is_empty() { ".PP\n" } else { "" };
        if !line.is_empty() {
            text += &in_bold(&(escaped(line) + "\n"));
        }
    }
    text.trim_end_matches(".PP\n").to_owned()
}

/// Lines that are not filled.
pub fn verbatim(text: &str) -> String {
    let lines: String = text.lines().map(|line| escaped(line) + "\n").collect();
    format!(".PP\n.RS 4\n.nf\n{lines}.fi\n.RE\n.PP\n")
}

/// The pages to read next.
pub fn see(pages: &[&str]) -> String {
    let mut text = String::from(".SH \"SEE ALSO\"\n");
    for (i, page) in pages.iter().enumerate() {
        let (name, section) = page.split_once('(').unwrap_or((page, ""));
        let end = if i + 1 < pages.len() { "," } else { "" };
        text += &format!(".BR {} ({section}{end}\n", escaped(name));
    }
    text
}

/// Escapes text for roff. A hyphen becomes a minus, and no line begins a
/// request.
fn escaped(line: &str) -> String {
    let text = line.replace('\\', "\\e").replace('-', "\\-").replace('`', "\\(ga");
    if text.starts_with(['.', '\'']) { format!("\\&{text}") } else { text }
}

/// Makes text bold that the help texts mark with backticks, because users type
/// it.
fn in_bold(text: &str) -> String {
    let mut bold = String::with_capacity(text.len());
    for line in text.lines() {
        let line = line.replace("\\(ga", "`");
        for (i, part) in line.split('`').enumerate() {
            let is_last = i == line.matches('`').count();
            match i % 2 {
                0 => bold += part,
                _ if is_last => bold += &format!("\\(ga{part}"),
                _ => bold += &format!("\\fB{part}\\fR"),
            }
        }
        bold.push('\n');
    }
    bold
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_typed_is_bold() {
        assert_eq!(in_bold("a `b-c` d\n"), "a \\fBb-c\\fR d\n");
        assert_eq!(in_bold("a ` d\n"), "a \\(ga d\n");
    }

    #[test]
    fn what_is_indented_stands_as_it_is() {
        let text = more_help("Do this:\n  usb-qmp-hotplug x\n\nOr that.");
        assert!(
            text.starts_with(".SH EXAMPLES\nDo this:\n.PP\n.RS 4\n.nf\nusb\\-qmp\\-hotplug x\n.fi")
        );
        assert!(text.ends_with(".PP\nOr that.\n"), "{text}");
    }
}
