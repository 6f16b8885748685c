//! The rounds: plug, wait, pull, wait, for each contender in turn.

use crate::contender::{Contender, Turn, prepare};
use crate::cpu::Spent;
use crate::kernel::{Feed, News, Uevent, now};
use crate::options::Options;
use crate::qmp::Qmp;
use crate::vm::Vm;
use crate::wait::wait_until;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::rc::Rc;
use std::thread;
use std::time::{Duration, Instant};

const FLOOR_SOCKET: &str = "/run/vm/floor.qmp";

/// The socket for what comes alone, on the kernel's first bus.
const SOCKET: u32 = 3;

pub const BURSTS: [usize; 5] = [1, 2, 4, 8, 12];

/// When nothing tells that something happened, look all the same.
const LOOK: Duration = Duration::from_secs(1);

/// Everything that is to be measured with.
struct Lab<'a> {
    options: &'a Options,
    hardware: Qmp<File>,
    feed: Feed,
    vm: Rc<Vm>,
}

/// A device on its way. Times are nanoseconds.
struct Device {
    port: String,
    bus: u32,
    device: u32,
    began: u64,
    ended: Option<u64>,
}

/// What came of a plug or a pull of one or many devices.
struct Outcome {
    devices: Vec<Device>,
    /// Nobody told of the end of one of them; the time is too long by up to [`LOOK`].
    coarse: bool,
    qemu: u64,
    others: u64,
}

impl Outcome {
    /// From the first event until the last device was done, in milliseconds; none if one never was.
    fn took(&self) -> Option<f64> {
        let begin = self.devices.iter().map(|device| device.began).min()?;
        let ends: Option<Vec<u64>> = self.devices.iter().map(|device| device.ended).collect();
        Some(milliseconds(ends?.into_iter().max()?.saturating_sub(begin)))
    }

    /// From the first event until the kernel told of the last device, in milliseconds.
    fn told(&self) -> Option<f64> {
        let began = || self.devices.iter().map(|device| device.began);
        Some(milliseconds(began().max()? - began().min()?))
    }

    /// From the first event until the last program of the rule began to run, in milliseconds.
    fn began_to_run(&self, noted: &[(String, u64)]) -> Option<f64> {
        let began = self.devices.iter().map(|device| device.began).min()?;
        let last = noted.iter().map(|(_, at)| *at).max()?;
        (noted.len() == self.devices.len()).then(|| milliseconds(last.saturating_sub(began)))
    }

    fn lost(&self) -> usize {
        self.devices.iter().filter(|device| device.ended.is_none()).count()
    }
}

/// What the last so many of these took together, in milliseconds; none if there were fewer.
fn last(noted: &[(String, u64)], what: &str, count: usize) -> Option<f64> {
    let all = noted.iter().rev().filter(|(noted, _)| noted == what);
    let last: Vec<u64> = all.map(|(_, took)| *took).take(count).collect();
    (last.len() == count).then(|| milliseconds(last.iter().sum()))
}

fn milliseconds(nanoseconds: u64) -> f64 {
    (nanoseconds as f64 / 1e4).round() / 1e2
}

/// All numbers of one contender, by their names.
#[derive(Default)]
struct Numbers(BTreeMap<&'static str, Vec<f64>>);

impl Numbers {
    fn add(&mut self, name: &'static str, value: Option<f64>) {
        self.0.entry(name).or_default().extend(value);
    }

    fn count(&mut self, name: &'static str, more: usize) {
        let count = self.0.entry(name).or_insert_with(|| vec![0.0]);
        count[0] += more as f64;
    }
}

pub fn run(options: &Options) -> Value {
    keep_journal();
    let hardware =
        File::options().read(true).write(true).open("/dev/virtio-ports/hardware").unwrap();
    let floor = format!("unix:{FLOOR_SOCKET},server=on,wait=off");
    let vm = Rc::new(Vm::new("a").argument("-qmp", &floor).start());
    prepare(options, &vm);
    let mut lab = Lab { options, hardware: Qmp::new(hardware), feed: Feed::start(), vm };
    let version = lab.vm.qmp("query-version", json!({}));
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    json!({
        "qemu": version["qemu"], "kernel": kernel.trim(),
        "alone": lab.one_at_a_time(), "bursts": lab.bursts(),
    })
}

/// Stands in for the journal, and shows what went wrong.
fn keep_journal() {
    fs::create_dir_all("/run/systemd/journal").unwrap();
    let journal = UnixDatagram::bind("/run/systemd/journal/socket").expect("no journal yet");
    thread::spawn(move || {
        let mut bytes = [0; 4096];
        while let Ok(length) = journal.recv(&mut bytes) {
            let text = String::from_utf8_lossy(&bytes[..length]);
            // A warning or an error (syslog(3)).
            if text.contains("PRIORITY=3\n") || text.contains("PRIORITY=4\n") {
                eprintln!("{}", text.replace(char::is_control, " "));
            }
        }
    });
}

impl Lab<'_> {
    fn one_at_a_time(&mut self) -> Value {
        let contenders = Contender::all(self.options);
        let mut all: BTreeMap<&str, Numbers> = BTreeMap::new();
        // The first round is for programs to be read from the disk.
        for round in 0..=self.options.rounds {
            for place in 0..contenders.len() {
                let contender = contenders[(place + round) % contenders.len()];
                let numbers = self.turn(contender);
                eprintln!("round {round}, {}: {:?}", contender.name(), numbers.0);
                if round > 0 {
                    let sum = all.entry(contender.name()).or_default();
                    for (name, values) in numbers.0 {
                        match name {
                            "lost" | "coarse" => sum.count(name, values[0] as usize),
                            _ => sum.0.entry(name).or_default().extend(values),
                        }
                    }
                }
            }
        }
        json!(all.into_iter().map(|(name, numbers)| (name, numbers.0)).collect::<BTreeMap<_, _>>())
    }

    fn turn(&mut self, contender: Contender) -> Numbers {
        let turn = self.start(contender);
        if contender.stays() {
            let plug = self.plug(contender, 1);
            self.pull(contender, &plug.devices);
        }
        let mut numbers = Numbers::default();
        let plug = self.plug(contender, 1);
        numbers.add("plug_cpu", Some(milliseconds(plug.others)));
        numbers.add("plug_qemu_cpu", Some(milliseconds(plug.qemu)));
        let plug_noted = turn.noted();
        let pull = self.pull(contender, &plug.devices);
        numbers.add("pull_cpu", Some(milliseconds(pull.others)));
        numbers.add("pull_qemu_cpu", Some(milliseconds(pull.qemu)));
        let pull_noted = turn.noted();
        numbers.count("coarse", usize::from(plug.coarse) + usize::from(pull.coarse));
        match contender {
            Contender::Nobody => {}
            Contender::Stamp => {
                numbers.add("plug", plug.began_to_run(&plug_noted));
                numbers.add("pull", pull.began_to_run(&pull_noted));
            }
            _ => {
                numbers.add("plug", plug.took());
                numbers.add("pull", pull.took());
                numbers.count("lost", plug.lost());
            }
        }
        numbers.add("qmp_plug", last(&pull_noted, "add", 1));
        numbers.add("qmp_pull", last(&pull_noted, "remove", 1));
        numbers
    }

    /// Many devices at the same instant.
    fn bursts(&mut self) -> Value {
        let mut contenders = Contender::all(self.options);
        // Nobody, too: the kernel's part is in all of them.
        contenders.retain(|contender| contender.takes_bursts());
        let mut all: BTreeMap<&str, BTreeMap<usize, Numbers>> = BTreeMap::new();
        for round in 0..self.options.burst_rounds {
            for place in 0..contenders.len() {
                let contender = contenders[(place + round) % contenders.len()];
                let turn = self.start(contender);
                for size in BURSTS {
                    let plug = self.plug(contender, size);
                    let noted = turn.noted();
                    let pull = self.pull(contender, &plug.devices);
                    let (took, gone) = match contender {
                        Contender::Stamp => {
                            (plug.began_to_run(&noted), pull.began_to_run(&turn.noted()))
                        }
                        _ => (plug.took(), pull.took()),
                    };
                    eprintln!("burst of {size}, {}: {took:?} {gone:?}", contender.name());
                    let numbers = all.entry(contender.name()).or_default().entry(size).or_default();
                    numbers.add("told", plug.told());
                    numbers.add("plug", took);
                    numbers.add("pull", gone);
                    numbers.add("qmp_plug", last(&noted, "add", size));
                    numbers.count("lost", plug.lost());
                    numbers.count("left", pull.lost());
                }
            }
        }
        let plain = |sizes: BTreeMap<usize, Numbers>| -> BTreeMap<usize, _> {
            sizes.into_iter().map(|(size, numbers)| (size, numbers.0)).collect()
        };
        json!(all.into_iter().map(|(name, sizes)| (name, plain(sizes))).collect::<BTreeMap<_, _>>())
    }

    fn start(&self, contender: Contender) -> Turn {
        let port = format!("1-{SOCKET}");
        Turn::start(contender, self.options, &self.vm, FLOOR_SOCKET, &port)
    }

    /// Plugs in mice, the first at the socket for what comes alone.
    fn plug(&mut self, contender: Contender, count: usize) -> Outcome {
        let sockets = (SOCKET..=15).chain(1..SOCKET).take(count);
        let mouse = |socket: u32| {
            let arguments = json!({"driver": "usb-mouse", "bus": "hw.0", "port": socket.to_string(),
                                   "id": format!("bench{socket}")});
            ("device_add", arguments)
        };
        let commands: Vec<_> = sockets.map(mouse).collect();
        let before = self.quiet();
        self.hardware.must_all(&commands);

        let mut devices: Vec<Device> = Vec::new();
        let mut coarse = false;
        let deadline = Instant::now() + contender.patience();
        while Instant::now() < deadline
            && (devices.len() < count
                || contender.attaches() && devices.iter().any(|device| device.ended.is_none()))
        {
            let concerned = match self.feed.next(LOOK) {
                Some(News::Uevent(event)) if event.action == "add" && event.is_usb_device() => {
                    devices.push(Device::new(&event));
                    continue;
                }
                Some(News::Uevent(event)) if event.action == "unbind" => {
                    event.name().split(':').next().unwrap_or_default().to_owned()
                }
                Some(_) => continue,
                None => String::new(),
            };
            for device in &mut devices {
                if device.ended.is_none() && (concerned.is_empty() || concerned == device.port) {
                    device.ended = self.is_attached(contender, device).then(now);
                    coarse |= device.ended.is_some() && concerned.is_empty();
                }
            }
        }
        self.outcome(devices, coarse, before)
    }

    fn pull(&mut self, contender: Contender, plugged: &[Device]) -> Outcome {
        let before = self.quiet();
        for device in plugged {
            self.feed.watch_node(Path::new(&device.node()));
        }
        let commands: Vec<_> = plugged
            .iter()
            .map(|device| {
                let socket = device.port.trim_start_matches("1-");
                ("device_del", json!({"id": format!("bench{socket}")}))
            })
            .collect();
        self.hardware.must_all(&commands);

        let mut devices: Vec<Device> = Vec::new();
        let mut coarse = false;
        let deadline = Instant::now() + contender.patience();
        while Instant::now() < deadline
            && (devices.len() < plugged.len()
                || contender.attaches() && devices.iter().any(|device| device.ended.is_none()))
        {
            let told = match self.feed.next(LOOK) {
                Some(News::Uevent(event)) if event.action == "remove" && event.is_usb_device() => {
                    devices.push(Device::new(&event));
                    continue;
                }
                Some(News::Uevent(_)) => continue,
                Some(News::Closed) => true,
                None => false,
            };
            for device in &mut devices {
                if device.ended.is_none() {
                    device.ended = (!self.is_attached(contender, device)).then(now);
                    coarse |= device.ended.is_some() && !told;
                }
            }
        }
        self.outcome(devices, coarse, before)
    }

    fn is_attached(&self, contender: Contender, device: &Device) -> bool {
        let id = contender.id(&device.port, device.bus, device.device);
        let path = format!("/machine/peripheral/{id}");
        let attached = self.vm.try_qmp("qom-get", json!({"path": path, "property": "attached"}));
        attached.is_ok_and(|attached| attached == true)
    }

    /// Waits until nothing happens any more, except that udevd is awake, and forgets what happened.
    fn quiet(&self) -> Spent {
        fs::write("/sys/class/mem/null/uevent", "change").expect("an event of no concern");
        self.settle();
        self.feed.forget();
        Spent::now(self.vm.pid())
    }

    fn settle(&self) {
        thread::sleep(Duration::from_millis(100));
        wait_until("udevd has done all", || !Path::new("/run/udev/queue").exists());
        thread::sleep(Duration::from_millis(100));
    }

    fn outcome(&self, devices: Vec<Device>, coarse: bool, before: Spent) -> Outcome {
        self.settle();
        let (qemu, others) = Spent::now(self.vm.pid()).since(before);
        Outcome { devices, coarse, qemu, others }
    }
}

impl Device {
    fn new(event: &Uevent) -> Device {
        Device {
            port: event.name().to_owned(),
            bus: event.number("BUSNUM"),
            device: event.number("DEVNUM"),
            began: event.at,
            ended: None,
        }
    }

    fn node(&self) -> String {
        format!("/dev/bus/usb/{:03}/{:03}", self.bus, self.device)
    }
}
