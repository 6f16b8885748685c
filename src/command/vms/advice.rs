//! Advice for a VM that has no monitor for this tool: what to add, and where.

use serde::Serialize;

use crate::host::proc::cmdline::{CommandLine, Endpoint};
use crate::qemu::qmp::Version;

/// The first QEMU that accepts another monitor while it runs (QEMU,
/// qapi/qom.json, `MonitorQMPProperties`).
const ADDED_SINCE: Version = Version { major: 11, minor: 1, micro: 0 };

/// What to add, and where.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "to", content = "lines", rename_all = "lowercase")]
pub enum Advice {
    /// An option for QEMU's command line.
    Qemu(String),
    /// A command line for a shell.
    Shell(String),
    /// Lines for the VM's human monitor.
    Monitor(String),
}

impl Advice {
    /// What adds a monitor to this VM at its next start.
    pub fn at_start(line: &CommandLine) -> Self {
        Advice::Qemu(format!("-qmp unix:{},server=on,wait=off", socket(line)))
    }

    /// What adds a monitor while the VM runs, through another monitor that this
    /// tool itself cannot use. `version` is the version of its QEMU, if it is
    /// known.
    pub fn while_running(line: &CommandLine, version: Option<Version>) -> Option<Self> {
        if version.is_some_and(|version| version < ADDED_SINCE) {
            return None;
        }
        let socket = socket(line);
        let chardev = format!("chardev-add socket,id=usb,path={socket},server=on,wait=off");
        let object = "object_add monitor-qmp,id=usb,chardev=usb";
        let pass = |commands: &str, to: String| {
            // QEMU drops the queued commands of a client that closes its
            // connection.
            Some(Advice::Shell(format!("({commands}; sleep 1) | {to}")))
        };
        let people = || line.human_monitors.iter();
        if let Some(path) = people().find_map(|words| server(words, "unix:")) {
            let commands = format!("echo '{chardev}'; echo '{object}'");
            return pass(&commands, format!("socat - UNIX-CONNECT:{path}"));
        }
        let tcp = line.monitors.iter().find_map(|monitor| match monitor {
            Endpoint::Other(words) => server(words, "tcp:")?.split_once(':'),
            _ => None,
        });
        if let Some((host, port)) = tcp {
            let host = if host.is_empty() { "localhost" } else { host };
            let commands = format!(
                "echo '{{\"execute\":\"qmp_capabilities\"}}\
                 {{\"execute\":\"chardev-add\",\"arguments\":{{\"id\":\"usb\",\"backend\":{{\"type\":\"socket\",\
                 \"data\":{{\"addr\":{{\"type\":\"unix\",\"data\":{{\"path\":\"{socket}\"}}}},\"wait\":false}}}}}}}}\
                 {{\"execute\":\"object-add\",\"arguments\":{{\"qom-type\":\"monitor-qmp\",\"id\":\"usb\",\
                 \"chardev\":\"usb\"}}}}'"
            );
            return pass(&commands, format!("nc {host} {port}"));
        }
        people().next().map(|_| Advice::Monitor(format!("{chardev}\n{object}")))
    }
}

/// The path of the new monitor's socket.
fn socket(line: &CommandLine) -> String {
    let name: String = line.name.as_deref().unwrap_or_default().chars().filter(is_plain).collect();
    format!("/run/{}.qmp", if name.is_empty() { "vm" } else { &name })
}

/// Whether a character needs no quotes anywhere.
fn is_plain(c: &char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-')
}

/// The address of a server of this kind, if it needs no quotes in a shell.
fn server<'a>(words: &'a str, kind: &str) -> Option<&'a str> {
    let (place, options) = words.strip_prefix(kind)?.split_once(',').unwrap_or((words, ""));
    let place = place.strip_prefix(kind).unwrap_or(place);
    let listens = kind == "unix:" && !words.contains(',')
        || options.split(',').any(|option| matches!(option, "server" | "server=on"));
    let is_whole = kind == "tcp:" || place.starts_with('/');
    let fits = |c: char| is_plain(&c) || matches!(c, '/' | ':');
    (listens && is_whole && place.chars().all(fits)).then_some(place)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(arguments: &str) -> CommandLine {
        CommandLine::parse(arguments.split(' '), |_| None)
    }

    #[test]
    fn a_name_cannot_add_options_of_its_own() {
        let line = |name: &str| CommandLine { name: Some(name.into()), ..CommandLine::default() };
        let advice = Advice::at_start(&line("../a b,server=off;rm"));
        let option = "-qmp unix:/run/..abserveroffrm.qmp,server=on,wait=off";
        assert_eq!(advice, Advice::Qemu(option.into()));
        assert_eq!(Advice::at_start(&line("日本")), Advice::at_start(&line("vm")));
    }

    #[test]
    fn a_vm_that_runs_is_given_a_monitor_by_way_of_another() {
        let add = |arguments: &str| Advice::while_running(&line(arguments), None);
        let Some(Advice::Shell(shell)) = add("-name a -monitor unix:/run/a.mon,server=on,wait=off")
        else {
            panic!("no line for a shell")
        };
        assert_eq!(
            shell,
            "(echo 'chardev-add socket,id=usb,path=/run/a.qmp,server=on,wait=off'; echo 'object_add \
             monitor-qmp,id=usb,chardev=usb'; sleep 1) | socat - UNIX-CONNECT:/run/a.mon"
        );
        let Some(Advice::Shell(shell)) = add("-name a -qmp tcp:127.0.0.1:4444,server=on,wait=off")
        else {
            panic!("no line for a shell")
        };
        assert!(shell.ends_with("; sleep 1) | nc 127.0.0.1 4444"), "{shell}");
        let json = shell.split('\'').nth(1).unwrap();
        let commands = serde_json::Deserializer::from_str(json).into_iter::<serde_json::Value>();
        assert_eq!(commands.map(Result::unwrap).count(), 3);
        for people in ["stdio", "vc", "telnet:127.0.0.1:1,server=on", "unix:/a;b,server=on"] {
            let advice = add(&format!("-monitor {people}"));
            assert!(matches!(advice, Some(Advice::Monitor(_))), "{people}: {advice:?}");
        }
        assert_eq!(add("-qmp unix:/a,server=on -qmp tcp:1.2.3.4:5"), None);
        let old = Version { major: 11, minor: 0, micro: 9 };
        assert_eq!(Advice::while_running(&line("-monitor stdio"), Some(old)), None);
    }
}
