//! `--install`: writes the rule to the directory that udev reads.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use tracing::warn;

use super::Context;
use super::udev::comment;
use super::what::What;
use crate::error::Error;
use crate::text::escape;

/// The directory of an administrator's rules (udev(7)).
const RULES: &str = "/etc/udev/rules.d";

/// The first systemd whose udevadm can check rules.
const VERIFY_SINCE: u32 = 254;

/// How often udev is told to read its rules, if it does not answer.
const TRIES: u32 = 3;

/// How long each of these tries takes at most. All together take a minute, which
/// udevadm would wait with one (udevadm(8), `control`).
const TRY_TIMEOUT: &str = "--timeout=20";

/// Writes the rule, checks it, and makes udev read it.
pub fn install(context: &Context, what: &What, vm: &str, rule: &str) -> Result<(), Error> {
    let path = Path::new(RULES).join(file_name(&what.label(), vm));
    let before = present(&path, &comment(what, vm))?;
    write(&path, rule).map_err(|source| cannot(&path, source))?;
    if let Err(complaint) = verified(&path) {
        // udev never reads a rule that it did not accept.
        let undone = match &before {
            Some(before) => write(&path, before),
            None => fs::remove_file(&path),
        };
        undone.map_err(|source| cannot(&path, source))?;
        return Err(Error::BadRule { path, complaint });
    }
    let shown = path.display();
    let had = if before.as_deref() == Some(rule) { "had been written before" } else { "written" };
    context.say(format_args!("{shown}: {had}"))?;
    if !reload() {
        warn!("udev could not be told; `udevadm control --reload` tells it, or the next boot");
    }
    warn_of_bus_number(what, vm, &path);
    context.say(format_args!("to undo: rm {shown} && udevadm control --reload"))
}

/// The name of the file. It is sorted after 50-udev-default, and it says what
/// the rule is for.
fn file_name(label: &str, vm: &str) -> String {
    let stem = Path::new(vm).file_stem().map(|stem| stem.to_string_lossy()).unwrap_or_default();
    let name = if vm.contains('/') { &stem } else { vm };
    let plain = |c: char| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '_' };
    let name: String = name.chars().take(64).map(plain).collect();
    format!("90-usb-qmp-hotplug-{name}-{label}.rules")
}

/// The present content of the file. Only a file that this command wrote for the
/// same VM and device may be replaced.
fn present(path: &Path, first_line: &str) -> Result<Option<String>, Error> {
    match fs::read_to_string(path) {
        Ok(text) if text.starts_with(first_line) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound && !path.is_symlink() => Ok(None),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Err(cannot(path, error)),
        _ => Err(Error::Usage(format!(
            "{} is there already and is for something else; move it away, or write the rule to a \
             file of your own: usb-qmp-hotplug rule ... > {RULES}/NAME.rules",
            path.display()
        ))),
    }
}

/// Writes the whole file or nothing. udev ignores the name of the temporary
/// file.
fn write(path: &Path, text: &str) -> io::Result<()> {
    let directory = path.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(directory)?;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let part: PathBuf = directory.join(format!(".{name}.{}", std::process::id()));
    let written = fs::File::options()
        .write(true)
        .create_new(true)
        .mode(0o644)
        .open(&part)
        .and_then(|mut file| file.write_all(text.as_bytes()).and_then(|()| file.sync_all()))
        .and_then(|()| fs::rename(&part, path));
    written.inspect_err(|_| {
        // The file may not exist.
        let _ = fs::remove_file(&part);
    })
}

/// Makes udevadm check the rule, if it can.
fn verified(path: &Path) -> Result<(), String> {
    let version = Command::new("udevadm").arg("--version").output();
    let version = version.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
    let version = version.ok().and_then(|text| text.split_whitespace().next()?.parse().ok());
    if version.is_none_or(|version: u32| version < VERIFY_SINCE) {
        return Ok(());
    }
    match Command::new("udevadm").arg("verify").arg(path).output() {
        Ok(output) if !output.status.success() => {
            let said = [output.stdout, output.stderr].concat();
            Err(escape(String::from_utf8_lossy(&said).trim()).into_owned())
        }
        _ => Ok(()),
    }
}

/// Makes udev read its rules. It may hang up on a busy machine (seen with
/// systemd 257), so it is told again.
fn reload() -> bool {
    (0..TRIES).any(|_| {
        let told = Command::new("udevadm").args(["control", "--reload", TRY_TIMEOUT]).output();
        told.is_ok_and(|output| output.status.success())
    })
}

/// Warns if an earlier rule for the same port by its bus number still exists.
fn warn_of_bus_number(what: &What, vm: &str, path: &Path) {
    let Some(label) = what.label_by_number() else { return };
    let before = Path::new(RULES).join(file_name(&label, vm));
    let ours = |text: String| text.starts_with("# usb-qmp-hotplug: ");
    if before != path && fs::read_to_string(&before).is_ok_and(ours) {
        let before = before.display();
        warn!("{before} is a rule for this port by its bus number; remove it: rm {before}");
    }
}

fn cannot(path: &Path, source: io::Error) -> Error {
    Error::Install { path: path.to_owned(), source }
}
