//! What `watch` costs while nothing happens, over a thousand events, and with many VMs and rules, and how long
//! it takes to start.

use crate::contender::DIRECTORY;
use crate::cpu;
use crate::hardware::{Device, Hardware, Plugged, xhci};
use crate::options::Options;
use crate::wait::{PATIENCE, wait_until};
use serde_json::{Value, json};
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// As many as anybody has, and more.
const MANY_VMS: usize = 256;
const MANY_RULES: usize = 10_000;

/// How long a VM takes for the greeting, and for each answer, where the start is measured.
const DELAY: Duration = Duration::from_millis(50);

const VMS: [usize; 3] = [1, 8, 64];
const RULES: [usize; 3] = [1, 100, 1000];
const EVENTS_FOR_COST: usize = 50;
const STARTS: usize = 5;

const GREETING: &str = concat!(
    r#"{"QMP": {"version": {"qemu": {"micro": 0, "minor": 0, "major": 10}, "package": ""}, "#,
    r#""capabilities": []}}"#,
    "\n"
);

pub fn run(options: &Options) -> Value {
    let delay = Arc::new(AtomicBool::new(false));
    for number in 0..MANY_VMS {
        let (socket, delay) =
            (UnixListener::bind(socket(number)).expect("a socket"), delay.clone());
        // A client that leaves is no failure.
        let greet = move |client: UnixStream| serve(&client, &delay).unwrap_or_default();
        thread::spawn(move || socket.incoming().flatten().for_each(greet));
    }
    let mut hardware = Hardware::open();
    let mouse = hardware.plug(Device::Mouse, xhci(3));
    let idle: Vec<Value> = [1, 64].map(|vms| idle(vms, options.idle)).to_vec();
    let growth = growth(&mouse, options.events);
    // The emulator translates the code of an event when it first runs: that is nobody's cost.
    let _ = cost_of_event(&mouse, 1, 1);
    let mut cost = Vec::new();
    for vms in VMS {
        for rules in RULES {
            let microseconds = cost_of_event(&mouse, vms, rules);
            eprintln!("{vms} VMs, {rules} rules: {microseconds} µs an event");
            cost.push(json!({"vms": vms, "rules": rules, "microseconds": microseconds}));
        }
    }
    let (_, memory) = Watch::start(MANY_VMS, MANY_RULES).memory();
    let microseconds = cost_of_event(&mouse, MANY_VMS, MANY_RULES);
    let many = json!({"vms": MANY_VMS, "rules": MANY_RULES, "anonymous_kib": memory,
                      "microseconds": microseconds});
    eprintln!("many: {many}");
    delay.store(true, Ordering::Relaxed);
    let starts = [(1, 1), (MANY_VMS, 1), (1, MANY_RULES)];
    let start: Vec<Value> = starts.map(|(vms, rules)| start(vms, rules)).to_vec();
    hardware.pull(&mouse);
    json!({"idle": idle, "growth": growth, "cost": cost, "many": many, "start": start})
}

fn socket(number: usize) -> String {
    format!("{DIRECTORY}/vm{number}.qmp")
}

/// A monitor of a VM that has no USB. All of them share the processors with `watch`, so each does as little as it can:
/// it searches a command for a few words, and writes an answer in one piece, as QEMU does.
fn serve(mut client: &UnixStream, delay: &AtomicBool) -> io::Result<()> {
    let think = || thread::sleep(DELAY * u32::from(delay.load(Ordering::Relaxed)));
    think();
    client.write_all(GREETING.as_bytes())?;
    for line in BufReader::new(client).lines() {
        let line = line?;
        // The command's own id comes after its arguments, and ends it.
        let Some((command, id)) = line.rsplit_once("\"id\":") else { break };
        let answer = match command {
            _ if command.contains("\"qom-list\"") => "[]",
            _ if command.contains("\"human-monitor-command\"") => "\"\"",
            _ => "{}",
        };
        think();
        client.write_all(format!("{{\"return\": {answer}, \"id\":{id}\n").as_bytes())?;
    }
    Ok(())
}

struct Watch {
    child: Child,
    /// How long it took until it was ready.
    started: Duration,
}

impl Watch {
    fn start(vms: usize, rules: usize) -> Watch {
        let mut config = String::new();
        for number in 0..vms {
            config += &format!("[vm.vm{number}]\nqmp = \"{}\"\n", socket(number));
        }
        // None but the last matches, and they ask for all kinds of things.
        for number in 1..rules {
            let port = format!("{}-{}", 5 + number / 200, 1 + number % 200);
            let asks = match number % 4 {
                0 => format!("port = \"{port}.*\""),
                1 => format!("vendor = \"{number:04x}\"\nproduct = \"0001\""),
                2 => format!("serial = \"SN{number:04}*\""),
                _ => format!("class = \"08\"\nport = \"{port}\""),
            };
            config += &format!("[[rule]]\nvm = \"vm{}\"\n{asks}\n", number % vms);
        }
        config += "[[rule]]\ndeny = true\nport = \"1-3\"\n";
        let (file, log) = (format!("{DIRECTORY}/many.toml"), format!("{DIRECTORY}/errors"));
        fs::write(&file, config).expect("space");
        // It tells systemd when it is ready (sd_notify(3)).
        let notify = format!("{DIRECTORY}/notify");
        let _ = fs::remove_file(&notify);
        let systemd = UnixDatagram::bind(&notify).expect("a socket");
        systemd.set_read_timeout(Some(PATIENCE)).expect("a socket");
        let begin = Instant::now();
        let child = Command::new(format!("{DIRECTORY}/tool"))
            .env("NOTIFY_SOCKET", &notify)
            .args(["--config", &file, "watch"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&log).expect("space"))
            .spawn()
            .expect("the program starts");
        let mut text = [0; 4096];
        while !String::from_utf8_lossy(&text).contains("READY=1") {
            text = [0; 4096];
            systemd.recv(&mut text).expect("watch is ready");
        }
        let started = begin.elapsed();
        thread::sleep(Duration::from_secs(1));
        Watch { child, started }
    }

    fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// How often it was given a processor.
    fn switches(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid())).expect("it runs");
        let of = |line: &str| {
            line.split_once("_ctxt_switches:").and_then(|(_, n)| n.trim().parse::<u64>().ok())
        };
        status.lines().filter_map(of).sum()
    }

    /// Its memory in KiB: all of it, and what is not a file's.
    fn memory(&self) -> (u64, u64) {
        let path = format!("/proc/{}/smaps_rollup", self.pid());
        let text = fs::read_to_string(path).expect("it runs");
        let of = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name))?;
            line.trim().trim_end_matches(" kB").parse().ok()
        };
        (of("Rss:").expect("Rss"), of("Anonymous:").expect("Anonymous"))
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn idle(vms: usize, seconds: u64) -> Value {
    let watch = Watch::start(vms, 1);
    let before = watch.switches();
    thread::sleep(Duration::from_secs(seconds));
    let switches = watch.switches() - before;
    let (rss, anonymous) = watch.memory();
    let idle = json!({"vms": vms, "seconds": seconds, "switches": switches, "rss_kib": rss,
                      "anonymous_kib": anonymous});
    eprintln!("idle: {idle}");
    idle
}

fn growth(mouse: &Plugged, events: usize) -> Value {
    let watch = Watch::start(8, 100);
    replay(mouse, 50);
    let before = watch.memory();
    replay(mouse, events);
    let after = watch.memory();
    let growth = json!({"events": events, "rss_kib": [before.0, after.0],
                        "anonymous_kib": [before.1, after.1]});
    eprintln!("growth: {growth}");
    growth
}

/// How long it takes until `watch` is ready, a few times over.
fn start(vms: usize, rules: usize) -> Value {
    let milliseconds = [(); STARTS].map(|()| Watch::start(vms, rules).started.as_millis() as u64);
    let start = json!({"vms": vms, "rules": rules, "milliseconds": milliseconds,
                       "delay_milliseconds": DELAY.as_millis() as u64});
    eprintln!("start: {start}");
    start
}

/// Processor time of an event that the last rule decides, in microseconds.
fn cost_of_event(mouse: &Plugged, vms: usize, rules: usize) -> f64 {
    let watch = Watch::start(vms, rules);
    replay(mouse, 5);
    let before = cpu::of_process(watch.pid());
    replay(mouse, EVENTS_FOR_COST);
    let spent = cpu::of_process(watch.pid()) - before;
    (spent as f64 / EVENTS_FOR_COST as f64 / 100.0).round() / 10.0
}

/// Has the kernel say many times that the mouse was plugged in.
fn replay(mouse: &Plugged, events: usize) {
    for _ in 0..events {
        fs::write(mouse.sysfs.join("uevent"), "add").expect("the kernel takes it");
        thread::sleep(Duration::from_millis(5));
        wait_until("udevd has done it", || !Path::new("/run/udev/queue").exists());
    }
    thread::sleep(Duration::from_millis(300));
}
