//! `completions SHELL`: prints the script that completes command lines in that
//! shell. The script calls this program with the hidden command `complete`.

use crate::cli::{Completions, Shell};
use crate::error::Error;
use crate::ui::output::print;

/// Prints the script.
pub fn run(arguments: &Completions) -> Result<(), Error> {
    print(match arguments.shell {
        Shell::Bash => include_str!("../../contrib/completions/usb-qmp-hotplug.bash"),
        Shell::Zsh => include_str!("../../contrib/completions/_usb-qmp-hotplug"),
        Shell::Fish => include_str!("../../contrib/completions/usb-qmp-hotplug.fish"),
    })
}
