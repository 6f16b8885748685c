//! What reads bytes from outside, each as a function of bytes that may hold anything. The fuzzers of this
//! directory call them, and so does tests/corpus.rs.

use std::borrow::Cow;
use std::fs;
use std::path::{Component, Path};
use std::time::Duration;

use serde_json::Map;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use usb_qmp_hotplug::host::Host;
use usb_qmp_hotplug::host::proc::cmdline::CommandLine;
use usb_qmp_hotplug::policy::config::Config;
use usb_qmp_hotplug::policy::rule::Glob;
use usb_qmp_hotplug::qemu::qmp::{Session, VmAddress};
use usb_qmp_hotplug::qemu::{Access, Attachment, Placement, Vm, parse_info_usb};
use usb_qmp_hotplug::text;
use usb_qmp_hotplug::usb::{
    Address, DeviceId, HotplugEvent, Port, PortPath, Selector, Speed, VendorProduct, classes,
    is_hub,
};

/// A target: its name, and what it does with bytes.
pub type Target = (&'static str, fn(&[u8]));

/// All of them.
pub const TARGETS: [Target; 10] = [
    ("session", session),
    ("peer", peer),
    ("libvirt", libvirt),
    ("info_usb", info_usb),
    ("toml", toml),
    ("udev", udev),
    ("names", names),
    ("descriptors", descriptors),
    ("cmdline", cmdline),
    ("tree", tree),
];

/// Longer than anything takes: time passes at once where nothing else happens.
const TIME: Duration = Duration::from_secs(5);

/// Runs it with a clock that passes over waiting.
fn run(future: impl Future<Output = ()>) {
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = runtime.enable_all().start_paused(true).build().expect("a runtime");
    runtime.block_on(future);
}

/// A whole conversation with who sends these bytes, whatever is asked.
pub fn session(bytes: &[u8]) {
    says(Path::new("/run/vm.qmp").into(), bytes);
}

/// The same by way of libvirt.
pub fn libvirt(bytes: &[u8]) {
    let Ok(Some(address)) = VmAddress::read("libvirt:win11") else { return };
    says(address, bytes);
}

fn says(address: VmAddress, bytes: &[u8]) {
    run(async {
        let (ours, mut theirs) = UnixStream::pair().expect("a pair");
        let talk = async {
            let Ok(session) = Session::on_stream(ours, &address, TIME).await else { return };
            ask(session.into()).await;
        };
        let speak = async {
            let (mut reader, mut writer) = theirs.split();
            let mut nothing = tokio::io::sink();
            let hear = tokio::io::copy(&mut reader, &mut nothing);
            let say = async {
                let _ = writer.write_all(bytes).await;
                let _ = writer.shutdown().await;
            };
            tokio::join!(hear, say)
        };
        tokio::select! { () = talk => {}, _ = speak => {} }
    });
}

/// What inspect, attach, sync and detach ask a VM, and a controller more.
async fn ask(mut vm: Vm) {
    let (Ok(id), Ok(address)) = ("usb-host-1-1".parse::<DeviceId>(), "1:2".parse::<Address>())
    else {
        return;
    };
    let (speed, placement) = ("480".parse::<Speed>().ok(), Placement::default());
    if let Ok(inventory) = vm.inspect().await {
        for controller in &inventory.controllers {
            let _ = inventory.free_ports(controller);
        }
    }
    let _ = vm.host_devices().await;
    let _ = vm.given(&id).await;
    if let Ok(probe) = vm.probe(&id, speed, &placement).await {
        match probe.guest_ports {
            Ok(guest_ports) => {
                let attachment = Attachment { id: &id, address, options: &Map::new() };
                let _ = vm.attach(&attachment, &Access::Address, &guest_ports).await;
            }
            Err(lacks) => {
                let _ = text::chain(&lacks);
                let _ = vm.add_controller(lacks, speed, &placement, false).await;
            }
        }
    }
    if let Err(error) = vm.detach(&id).await {
        let _ = text::chain(&error);
    }
}

/// A QEMU that answers every command, with the next line of the bytes: as its result, after a `!` as the
/// words of a refusal, after a `~` as what comes before an empty result.
pub fn peer(bytes: &[u8]) {
    run(async {
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        let talk = async {
            let address = Path::new("/run/vm.qmp").into();
            let Ok(session) = Session::on_stream(ours, &address, TIME).await else { return };
            ask(session.into()).await;
        };
        let answer = async {
            let (reader, mut writer) = theirs.into_split();
            let greeting =
                b"{\"QMP\":{\"version\":{\"qemu\":{\"major\":10,\"minor\":0,\"micro\":2}}}}\n";
            let _ = writer.write_all(greeting).await;
            let mut commands = BufReader::new(reader).lines();
            let mut lines = bytes.split(|byte| *byte == b'\n');
            while let Ok(Some(command)) = commands.next_line().await {
                let id =
                    command.rsplit_once("\"id\":").map_or("0", |(_, id)| id.trim_end_matches('}'));
                let line = String::from_utf8_lossy(lines.next().unwrap_or(b"{}"));
                let reply = match line.as_bytes().first() {
                    Some(b'!') => {
                        let words = serde_json::Value::from(&line[1..]);
                        format!(
                            "{{\"error\":{{\"class\":\"GenericError\",\"desc\":{words}}},\"id\":{id}}}\n"
                        )
                    }
                    Some(b'~') => format!("{}\n{{\"return\":{{}},\"id\":{id}}}\n", &line[1..]),
                    _ => format!("{{\"return\":{line},\"id\":{id}}}\n"),
                };
                if writer.write_all(reply.as_bytes()).await.is_err() {
                    return;
                }
            }
        };
        tokio::select! { () = talk => {}, () = answer => {} }
    });
}

/// The text of `info usb`.
pub fn info_usb(bytes: &[u8]) {
    for line in parse_info_usb(&String::from_utf8_lossy(bytes)) {
        let _ = line.product(line.id());
    }
}

/// A configuration.
pub fn toml(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    if let Err(error) = Config::parse(Path::new("/etc/x.toml"), &text) {
        assert!(!error.to_string().is_empty());
    }
}

/// udev's variables, one a line.
pub fn udev(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let variables: Vec<(&str, &str)> =
        text.lines().filter_map(|line| line.split_once('=')).collect();
    let get = |name: &str| {
        variables.iter().find(|(known, _)| *known == name).map(|(_, v)| (*v).to_owned())
    };
    if let Ok(Some(event)) = HotplugEvent::from_variables(get) {
        let _ = event.device();
    }
}

/// What a person types, and what a device calls itself.
pub fn names(bytes: &[u8]) {
    let all = String::from_utf8_lossy(bytes);
    let (first, second) = all.split_once('\n').unwrap_or((&all, ""));
    let _ = (first.parse::<Port>(), first.parse::<PortPath>(), first.parse::<VendorProduct>());
    let _ = (first.parse::<Address>(), first.parse::<DeviceId>(), first.parse::<Speed>());
    let _ =
        (first.parse::<Selector>().map(|selector| selector.to_string()), VmAddress::read(first));
    if let (Ok(glob), Ok(other)) = (Glob::new(first), Glob::new(second)) {
        let matches = glob.matches(second);
        assert!(!glob.covers(&other) || !other.matches(first) || glob.matches(first));
        assert!(!glob.is_literal() || matches == (glob.as_str() == second));
    }
    let shown = text::escape(&all);
    assert!(!shown.chars().any(char::is_control));
    let _ = (text::fit(&shown, 20), text::words(&all), text::nearest(first, [second]));
    assert!(!text::escape_json(serde_json::Value::from(&*all).to_string()).contains('\u{9b}'));
}

/// A device's descriptors.
pub fn descriptors(bytes: &[u8]) {
    let _ = (classes(bytes), is_hub(bytes));
}

/// The command line of a process, and a file that it has QEMU read.
pub fn cmdline(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let (file, line) = text.split_once('\u{1}').unwrap_or(("", &text));
    let _ = CommandLine::parse(line.split('\0'), |_| Some(file.to_owned()));
}

/// sysfs and `/proc`: lines of `PATH=TEXT`, where `\n` in a text is a new line, or `PATH>TARGET` for a link.
pub fn tree(bytes: &[u8]) {
    let root = tempfile::tempdir().expect("a directory");
    for line in String::from_utf8_lossy(bytes).lines().take(100) {
        let Some(at) = line.find(['=', '>']) else { continue };
        let (path, rest) = (Path::new(&line[..at]), &line[at + 1..]);
        let is_plain = |part: Component| matches!(part, Component::Normal(_));
        if path.as_os_str().is_empty() || !path.components().all(is_plain) {
            continue;
        }
        let path = root.path().join(path);
        let _ = path.parent().map(fs::create_dir_all);
        if line[at..].starts_with('=') {
            let _ = fs::write(path, rest.replace("\\n", "\n"));
        } else if !rest.contains("..") && !rest.starts_with('/') {
            let _ = std::os::unix::fs::symlink(rest, path);
        }
    }
    let host = Host::at(root.path());
    for device in host.devices().unwrap_or_default() {
        let _ = (host.speed(&device.port), host.strings(&device.port), host.serial(&device.port));
        let _ =
            (host.uses(&device.port), host.disk_nodes(&device.port), host.holders(device.address));
        let _ = host.strangers(device.address);
    }
    if let Ok(selector) = "serial=1".parse::<Selector>() {
        let _: Cow<str> =
            host.find(&selector).map_or_else(|e| text::chain(&e).into(), |_| "".into());
    }
    let _ = (host.qemus(), host.all_holders());
}
