//! What the command line of a QEMU says about its monitors (QEMU,
//! qemu-options.hx, util/qemu-option.c, monitor/monitor.c). There is no I/O
//! here. The text comes from `/proc` and may contain anything.

use super::options::{Pairs, get, options};

/// The facts in a QEMU's command line that this tool needs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CommandLine {
    /// The VM's name (`-name`).
    pub name: Option<String>,
    /// The QMP monitors, in the order of the command line.
    pub monitors: Vec<Endpoint>,
    /// The human monitors, in the words of the command line.
    pub human_monitors: Vec<String>,
    /// Whether QEMU reads more options from a file that could not be read here
    /// (`-readconfig`). That file may define more monitors.
    pub reads_config: bool,
    /// The chardevs that are not monitors, or are not known to be monitors.
    pub chardevs: Vec<Endpoint>,
    /// libvirt's own monitor, if libvirt started the QEMU. libvirt names its
    /// chardev `charmonitor` (libvirt, src/qemu/qemu_command.c).
    pub libvirts: Option<Endpoint>,
}

/// The address of a QMP monitor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Endpoint {
    /// QEMU listens on the socket at this path. The path is valid for root and
    /// QEMU's own directory.
    Unix(String),
    /// QEMU got the socket as this descriptor. libvirt does this.
    Descriptor(u32),
    /// QEMU listens on the socket at this path, but its command line does not
    /// say what the socket is for.
    Listening(String),
    /// QEMU connects to the socket at this path as a client, so it does not
    /// listen there.
    Client(String),
    /// TCP, standard input and so on, in the words of the command line. No file
    /// descriptor can be passed over these.
    Other(String),
}

/// The options that define monitors.
const OPTIONS: [&str; 8] =
    ["qmp", "qmp-pretty", "mon", "monitor", "chardev", "object", "readconfig", "name"];

/// The facts that have been found in a command line.
#[derive(Debug, Default)]
struct Found {
    name: Option<String>,
    /// The chardevs by id, and whether a human monitor uses them.
    chardevs: Vec<(String, Endpoint)>,
    /// The monitors: their addresses, or the ids of their chardevs.
    controls: Vec<Result<Endpoint, String>>,
    humans: Vec<String>,
    reads_config: bool,
}

impl CommandLine {
    /// Reads the arguments of a process, with or without the program's name.
    /// `read` returns the text of a file that QEMU reads, if it can be read.
    pub fn parse<'a>(
        arguments: impl IntoIterator<Item = &'a str>,
        read: impl Fn(&str) -> Option<String>,
    ) -> Self {
        let mut found = Found::default();
        let mut arguments = arguments.into_iter();
        while let Some(argument) = arguments.next() {
            let option = argument.strip_prefix("--").or_else(|| argument.strip_prefix('-'));
            let Some(option) = option else { continue };
            if !OPTIONS.contains(&option) {
                continue;
            }
            let Some(value) = arguments.next() else { break };
            match option {
                "qmp" | "qmp-pretty" => found.controls.push(match value.strip_prefix("chardev:") {
                    Some(id) => Err(id.to_owned()),
                    None => Ok(compat(value)),
                }),
                "monitor" if value != "none" => found.humans.push(value.to_owned()),
                "readconfig" => match read(value) {
                    Some(text) => found.file(&text),
                    None => found.reads_config = true,
                },
                _ => {
                    let first = match option {
                        "mon" => "chardev",
                        "chardev" => "backend",
                        "object" => "qom-type",
                        _ => "guest",
                    };
                    found.option(option, &options(value, first), value);
                }
            }
        }
        found.line()
    }
}

impl Found {
    /// Handles one option. `words` is shown if the option has no address that
    /// can be used.
    fn option(&mut self, option: &str, options: &Pairs, words: &str) {
        let chardev_of = |options| get(options, "chardev").map(str::to_owned);
        match option {
            "mon" if get(options, "mode") == Some("control") => {
                self.controls.extend(chardev_of(options).map(Err));
            }
            "mon" => self.humans.extend(chardev_of(options).map(|id| format!("chardev:{id}"))),
            // Since QEMU 11.1 (QEMU, qapi/qom.json, `MonitorQMPProperties`).
            "object" if get(options, "qom-type") == Some("monitor-qmp") => {
                self.controls.extend(chardev_of(options).map(Err));
            }
            "chardev" => {
                let id = get(options, "id").unwrap_or_default().to_owned();
                self.chardevs.push((id, chardev(options, words)));
            }
            "name" => {
                let name = get(options, "guest").filter(|name| !name.is_empty());
                self.name = name.map(str::to_owned).or(self.name.take());
            }
            _ => {}
        }
    }

    /// Reads a file of options. It has groups, for example `[chardev "ID"]`,
    /// each with lines `NAME = "VALUE"` (QEMU, util/qemu-config.c,
    /// `qemu_config_foreach`).
    fn file(&mut self, text: &str) {
        let mut group: Option<(&str, Pairs)> = None;
        for line in text.lines().map(str::trim).chain(["[end]"]) {
            let head = line.strip_prefix('[').and_then(|line| line.strip_suffix(']'));
            if let Some(head) = head {
                let (name, id) = head.split_once(' ').unwrap_or((head, ""));
                let id = id.trim().trim_matches('"');
                let id = (!id.is_empty()).then(|| ("id".to_owned(), id.to_owned()));
                if let Some((name, options)) = group.replace((name, id.into_iter().collect())) {
                    let words = get(&options, "id").unwrap_or(name).to_owned();
                    self.option(name, &options, &words);
                }
            } else if let (Some((_, options)), Some((name, value))) =
                (&mut group, line.split_once('='))
            {
                if !line.starts_with('#') {
                    let value = value.trim().trim_matches('"');
                    options.push((name.trim().to_owned(), value.to_owned()));
                }
            }
        }
    }

    fn line(self) -> CommandLine {
        let mut line = CommandLine { name: self.name, ..CommandLine::default() };
        line.reads_config = self.reads_config;
        let at = |id: &str| {
            let known = self.chardevs.iter().find(|(known, _)| known == id);
            known.map_or_else(|| Endpoint::Other(format!("chardev {id}")), |(_, at)| at.clone())
        };
        for control in self.controls {
            match control {
                Ok(endpoint) if endpoint == Endpoint::Other("none".into()) => {}
                Ok(endpoint) => line.monitors.push(endpoint),
                Err(id) if id == "charmonitor" => line.libvirts = Some(at(&id)),
                Err(id) => line.monitors.push(at(&id)),
            }
        }
        let human = |words: String| match words.strip_prefix("chardev:").map(at) {
            Some(Endpoint::Unix(path)) => format!("unix:{path}"),
            _ => words,
        };
        line.chardevs = self.chardevs.iter().map(|(_, at)| at.clone()).collect();
        line.human_monitors = self.humans.into_iter().map(human).collect();
        line
    }
}

/// The short form of `-qmp`, `unix:PATH,server=on,wait=off` (QEMU,
/// chardev/char.c, `qemu_chr_parse_compat`).
fn compat(value: &str) -> Endpoint {
    match value.strip_prefix("unix:") {
        Some(rest) => unix(&options(rest, "path"), value),
        None => Endpoint::Other(value.to_owned()),
    }
}

fn chardev(options: &Pairs, value: &str) -> Endpoint {
    let is_socket = options.iter().any(|(_, value)| value == "socket");
    if !is_socket {
        return Endpoint::Other(value.to_owned());
    }
    // Written as `fd=23`, or in JSON as `"addr": {"type": "fd", "data": {"str":
    // "23"}}`.
    let descriptor = get(options, "fd").or_else(|| get(options, "str"));
    match descriptor.and_then(|number| number.parse().ok()) {
        Some(number) => Endpoint::Descriptor(number),
        None => unix(options, value),
    }
}

/// In JSON, a socket is a server unless the option says otherwise (QEMU,
/// qapi/char.json, `ChardevSocket`). In the other format, it is a client unless
/// the option says otherwise.
fn unix(options: &Pairs, value: &str) -> Endpoint {
    let is_on = |name| get(options, name).is_some_and(|v| matches!(v, "on" | "yes" | "y" | "true"));
    let (is_json, has) = (value.starts_with('{'), |name| get(options, name).is_some());
    match get(options, "path") {
        Some(path) if is_on("abstract") => Endpoint::Other(format!("abstract socket {path}")),
        Some(path) if is_on("server") || (is_json && !has("server")) => {
            Endpoint::Unix(path.to_owned())
        }
        Some(path) => Endpoint::Client(path.to_owned()),
        None => Endpoint::Other(value.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(text: &str) -> CommandLine {
        CommandLine::parse(text.split(' '), |_| None)
    }

    fn unix(path: &str) -> Endpoint {
        Endpoint::Unix(path.into())
    }

    #[test]
    fn monitors_are_found_in_every_form_that_qemu_takes() {
        for (arguments, monitors) in [
            ("-qmp unix:/run/a.qmp,server=on,wait=off", vec![unix("/run/a.qmp")]),
            ("--qmp unix:/run/a.qmp,server,nowait", vec![unix("/run/a.qmp")]),
            ("-qmp-pretty unix:a,,b,server=yes", vec![unix("a,b")]),
            ("-qmp unix:/a,server=on -qmp unix:/b,server=on", vec![unix("/a"), unix("/b")]),
            // A command line of Proxmox VE.
            (
                "-chardev socket,id=qmp,path=/var/run/qemu-server/1.qmp,server=on,wait=off -mon \
                 chardev=qmp,mode=control -chardev socket,id=qmp-event,path=/var/run/qmeventd.sock,\
                 reconnect=5 -mon chardev=qmp-event,mode=control",
                vec![
                    unix("/var/run/qemu-server/1.qmp"),
                    Endpoint::Client("/var/run/qmeventd.sock".into()),
                ],
            ),
            // The monitor may come before its chardev.
            ("-mon m,mode=control -chardev socket,id=m,path=/a,server=on", vec![unix("/a")]),
            ("-chardev socket,id=m,path=/a,server=on -qmp chardev:m", vec![unix("/a")]),
            ("-qmp unix:/a,server=off", vec![Endpoint::Client("/a".into())]),
            (
                "-qmp tcp:127.0.0.1:4444,server=on",
                vec![Endpoint::Other("tcp:127.0.0.1:4444,server=on".into())],
            ),
            ("-qmp stdio", vec![Endpoint::Other("stdio".into())]),
            (
                "-chardev socket,id=m,path=/a,server=on,abstract=on -qmp chardev:m",
                vec![Endpoint::Other("abstract socket /a".into())],
            ),
            ("-mon nope,mode=control", vec![Endpoint::Other("chardev nope".into())]),
            // These monitors are for people, not for programs.
            ("-monitor unix:/a,server=on -qmp none", vec![]),
            ("-chardev socket,id=m,path=/a,server=on -mon m", vec![]),
            ("-chardev socket,id=m,path=/a,server=on -mon m,mode=readline", vec![]),
            ("-qmp", vec![]),
            // This option exists since QEMU 11.1.
            (
                "-chardev socket,id=m,path=/a,server=on -object monitor-qmp,id=q,chardev=m",
                vec![unix("/a")],
            ),
            (
                r#"-object {"qom-type":"monitor-qmp","id":"q","chardev":"m"} -chardev socket,id=m,path=/a,server=on"#,
                vec![unix("/a")],
            ),
            ("-object memory-backend-ram,id=q,size=1M", vec![]),
            // A chardev in JSON is a server by default.
            (
                r#"-chardev {"id":"m","backend":{"type":"socket","data":{"addr":{"type":"unix","data":{"path":"/a"}}}}} -qmp chardev:m"#,
                vec![unix("/a")],
            ),
            (
                r#"-chardev {"id":"m","backend":{"type":"socket","data":{"server":false,"addr":{"type":"unix","data":{"path":"/a"}}}}} -qmp chardev:m"#,
                vec![Endpoint::Client("/a".into())],
            ),
        ] {
            assert_eq!(parse(arguments).monitors, monitors, "{arguments}");
        }
    }

    #[test]
    fn libvirts_monitor_is_known_in_all_its_forms() {
        let unix_addr = r#"{"type":"unix","data":{"path":"/var/lib/libvirt/qemu/m.sock"}}"#;
        let fd_addr = r#"{"type":"fd","data":{"str":"23"}}"#;
        let json = |addr: &str| {
            format!(
                r#"{{"id":"charmonitor","backend":{{"type":"socket","data":{{"addr":{addr},"server":true,"wait":false}}}}}}"#
            )
        };
        for (chardev, monitor) in [
            ("socket,id=charmonitor,fd=23,server=on,wait=off", Endpoint::Descriptor(23)),
            ("socket,id=charmonitor,path=/m,server,nowait", unix("/m")),
            (&*json(unix_addr), unix("/var/lib/libvirt/qemu/m.sock")),
            (&*json(fd_addr), Endpoint::Descriptor(23)),
        ] {
            let arguments = [
                "/usr/bin/qemu-system-x86_64",
                "-name",
                "guest=web1,debug-threads=on",
                "-chardev",
                chardev,
                "-mon",
                "chardev=charmonitor,id=monitor,mode=control",
            ];
            let line = CommandLine::parse(arguments, |_| None);
            assert_eq!(line.libvirts, Some(monitor), "{chardev}");
            assert_eq!(line.monitors, []);
            assert_eq!(line.name.as_deref(), Some("web1"));
        }
    }

    #[test]
    fn names_and_configuration_files_are_seen() {
        assert_eq!(parse("-name a,debug-threads=on").name.as_deref(), Some("a"));
        assert_eq!(parse("-name debug-threads=on,guest=a,,b").name.as_deref(), Some("a,b"));
        assert_eq!(parse("-name process=x").name, None);
        assert!(parse("-readconfig /etc/vm.cfg").reads_config);
        assert!(!parse("-m 64").reads_config);
    }

    #[test]
    fn a_file_of_options_is_read_like_the_command_line() {
        // Incus writes a file like this one.
        let file = "# Machine\n[machine]\ngraphics = \"off\"\n\n# Console\n[chardev \"console\"]\n\
                    backend = \"pty\"\n\n# Monitor\n[chardev \"monitor\"]\nbackend = \"socket\"\n\
                    path = \"/run/incus/v1/qemu.monitor\"\nserver = \"on\"\nwait = \"off\"\n\n[mon]\n\
                    chardev = \"monitor\"\nmode = \"control\"\n[name]\nguest = \"v1\"\n";
        let arguments = ["-S", "-readconfig", "/run/incus/v1/qemu.conf", "-name", "later"];
        let line = CommandLine::parse(arguments, |path| {
            (path == "/run/incus/v1/qemu.conf").then(|| file.to_owned())
        });
        assert_eq!(line.monitors, [unix("/run/incus/v1/qemu.monitor")]);
        assert_eq!((line.name.as_deref(), line.reads_config), (Some("later"), false));
    }

    #[test]
    fn monitors_for_people_are_told_apart() {
        let line = parse(
            "-monitor unix:/h,server=on,wait=off -chardev socket,id=m,path=/a,server=on -mon m -monitor none",
        );
        assert_eq!(line.human_monitors, ["unix:/h,server=on,wait=off", "unix:/a"]);
    }

    proptest! {
        #[test]
        fn no_file_panics(text in "(\\[|\\]|\"|=|\n|mon|chardev|#| |\\PC){0,60}") {
            let _ = CommandLine::parse(["-readconfig", "x"], |_| Some(text.clone()));
        }

        #[test]
        fn no_command_line_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let text = String::from_utf8_lossy(&bytes);
            let _ = CommandLine::parse(text.split('\0'), |_| None);
        }

        #[test]
        fn no_arguments_panic(arguments in proptest::collection::vec(
            "-(qmp|mon|chardev|object|name)|(unix:|socket)?(,|=|\\{|\"|id|path|server|mode=control|\\PC){0,12}", 0..9,
        )) {
            let _ = CommandLine::parse(arguments.iter().map(String::as_str), |_| None);
        }

        #[test]
        fn a_path_is_read_back(path in "/[^\0]{0,40}") {
            let option = format!("socket,id=m,server=on,path={}", path.replace(',', ",,"));
            let arguments = ["-chardev", &option, "-mon", "m,mode=control"];
            let line = CommandLine::parse(arguments, |_| None);
            prop_assert_eq!(line.monitors, [unix(&path)]);
        }
    }
}
