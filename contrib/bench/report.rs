//! Outside: the table, the goals, and what is kept of a run.

use crate::race::BURSTS;
use crate::svg;
use serde_json::{Value, json};
use std::fs;
use std::path::Path;
use std::process::Command;

/// How the contenders are shown, the best first.
pub const CONTENDERS: [(&str, &str); 8] = [
    ("nobody", "nobody"),
    ("floor", "floor: connected, asks nothing"),
    ("stamp", "udev starts a program that does nothing"),
    ("watch", "usb-qmp-hotplug watch"),
    ("rule", "usb-qmp-hotplug by udev rule"),
    ("script", "bash and socat by udev rule"),
    ("vhotplug", "vhotplug"),
    ("hostport", "QEMU's own scan (hostport)"),
];

/// The middle one of many numbers, and the range that they lie in.
#[derive(Clone, Copy)]
pub struct Spread {
    pub median: f64,
    pub least: f64,
    pub most: f64,
}

impl Spread {
    pub fn of(numbers: &Value) -> Option<Spread> {
        let mut numbers: Vec<f64> = numbers.as_array()?.iter().filter_map(Value::as_f64).collect();
        numbers.sort_by(f64::total_cmp);
        let (least, most) = (*numbers.first()?, *numbers.last()?);
        let median = (numbers[(numbers.len() - 1) / 2] + numbers[numbers.len() / 2]) / 2.0;
        Some(Spread { median, least, most })
    }
}

pub fn run(measured: &str, directory: &str, load_before: &str) {
    let text = fs::read_to_string(measured).expect("what the lab has measured");
    let mut results: Value = serde_json::from_str(&text).expect("what the lab has measured");
    results["machine"] = machine(load_before);
    print(&results);
    let keep = |name: &str, text: String| {
        fs::write(Path::new(directory).join(name), text).expect("a place for the results");
    };
    let text = serde_json::to_string_pretty(&results).expect("plain data");
    keep("results.json", on_one_line(&text) + "\n");
    keep("results.svg", svg::draw(&results));
    keep("table.md", table(&results));
}

/// Lists of numbers on one line each.
fn on_one_line(text: &str) -> String {
    let mut short = String::new();
    for line in text.lines() {
        let word = line.trim();
        let is_number = word.trim_end_matches(',').parse::<f64>().is_ok();
        match word {
            _ if is_number => short += &word.replace(',', ", "),
            "]" | "]," if !short.ends_with(['}', '\n']) => short += word,
            _ => {
                if !short.is_empty() {
                    short.push('\n');
                }
                short += line;
            }
        }
    }
    short
}

/// What the numbers depend on, without a name of anything.
fn machine(load_before: &str) -> Value {
    let cpus = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpus.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let emulator = Command::new("qemu-system-x86_64").arg("--version").output().expect("QEMU");
    let emulator = String::from_utf8_lossy(&emulator.stdout).into_owned();
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load_after: Vec<&str> = load.split(' ').take(3).collect();
    json!({
        "processor": model.map_or("unknown", |(_, model)| model),
        "cores": cpus.matches("processor\t").count(),
        "kernel": kernel.trim().split('-').next(),
        "emulator": emulator.lines().next(),
        "load_before": load_before, "load_after": load_after.join(" "),
    })
}

fn print(results: &Value) {
    let race = &results["race"];
    println!("{}", describe(results));
    println!("\nOne device, milliseconds from the kernel's event: median (range)\n");
    println!(
        "{:42} {:>26} {:>26} {:>12} {:>12}",
        "", "plug to attached", "pull to gone", "CPU of plug", "CPU of pull"
    );
    let alone = &race["alone"];
    let cpu = |name: &str, what: &str| {
        let of = |name: &str| Some(Spread::of(&alone[name][what])?.median);
        Some((of(name)? - of("nobody")?).max(0.0))
    };
    for (name, title) in CONTENDERS.iter().filter(|(name, _)| !alone[name].is_null()) {
        let time = |what: &str| shown(Spread::of(&alone[name][what]));
        let cpu = |what: &str| cpu(name, what).map_or("-".to_owned(), |cpu| format!("{cpu:.1}"));
        println!(
            "{title:42} {:>26} {:>26} {:>12} {:>12}",
            time("plug"),
            time("pull"),
            cpu("plug_cpu"),
            cpu("pull_cpu")
        );
    }
    println!(
        "{:42} {:>26} {:>26}",
        "floor's QMP commands alone",
        shown(Spread::of(&alone["floor"]["qmp_plug"])),
        shown(Spread::of(&alone["floor"]["qmp_pull"]))
    );
    println!("CPU: of all processes but QEMU, less what a plug costs when nobody cares.");

    println!("\nMany at once, milliseconds from the first event until the last is attached\n");
    let columns: String = BURSTS.iter().map(|size| format!("{size:>10}")).collect();
    println!("{:42} {columns}       lost", "");
    let bursts = &race["bursts"];
    let columns = |name: &str, what: &str| -> String {
        let time = |size: &usize| {
            let spread = Spread::of(&bursts[name][size.to_string()][what]);
            spread.map_or("         -".into(), |spread| format!("{:>10.0}", spread.median))
        };
        BURSTS.iter().map(time).collect()
    };
    println!("{:42} {}", "nobody: the kernel tells of the last", columns("nobody", "told"));
    println!("{:42} {}", "floor: the kernel tells of the last", columns("floor", "told"));
    println!("{:42} {}", "floor's QMP commands alone", columns("floor", "qmp_plug"));
    let attach = |name: &&str| *name != "nobody" && !bursts[*name].is_null();
    for (name, title) in CONTENDERS.iter().filter(|(name, _)| attach(name)) {
        let lost = if *name == "stamp" { String::new() } else { lost(&bursts[*name]).to_string() };
        println!("{title:42} {} {lost:>10}", columns(name, "plug"));
    }

    let resident = &results["resident"];
    println!("\nwatch");
    for idle in resident["idle"].as_array().into_iter().flatten() {
        println!(
            "  idle for {} s with {} VMs: {} context switches, {} KiB in memory ({} its own)",
            idle["seconds"], idle["vms"], idle["switches"], idle["rss_kib"], idle["anonymous_kib"]
        );
    }
    let growth = &resident["growth"];
    println!("  KiB before and after {} events: {}", growth["events"], growth["rss_kib"]);
    for cost in resident["cost"].as_array().into_iter().flatten() {
        println!(
            "  {:>4} VMs, {:>4} rules: {:>8} µs an event",
            cost["vms"], cost["rules"], cost["microseconds"]
        );
    }
    for start in resident["start"].as_array().into_iter().flatten() {
        println!(
            "  {:>4} VMs, {:>5} rules: ready {} ms after its start",
            start["vms"],
            start["rules"],
            shown(Spread::of(&start["milliseconds"]))
        );
    }

    println!("Goals");
    for (goal, value, limit) in goals(results) {
        let verdict = if value <= limit { "pass" } else { "MISS" };
        println!("  {verdict}  {value:>8.2} of at most {limit:>7.2}  {goal}");
    }
}

fn shown(spread: Option<Spread>) -> String {
    match spread {
        Some(Spread { median, least, most }) => format!("{median:.1} ({least:.1}-{most:.1})"),
        None => "-".to_owned(),
    }
}

fn lost(sizes: &Value) -> f64 {
    let of = |numbers: &Value| numbers["lost"][0].as_f64().unwrap_or_default();
    sizes.as_object().map_or(0.0, |sizes| sizes.values().map(of).sum())
}

/// The machine, in a line.
pub fn describe(results: &Value) -> String {
    let (machine, race) = (&results["machine"], &results["race"]);
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let version = &race["qemu"];
    format!(
        "{}, {} cores, Linux {}, load {}; in it, emulated by {}: Linux {}, QEMU {}.{}.{}",
        text(&machine["processor"]),
        machine["cores"],
        text(&machine["kernel"]),
        text(&machine["load_before"]),
        text(&machine["emulator"]),
        text(&race["kernel"]),
        version["major"],
        version["minor"],
        version["micro"],
    )
}

/// What is to be reached: what, how much it is, and how much it may be.
fn goals(results: &Value) -> Vec<(String, f64, f64)> {
    let race = &results["race"];
    let median = |numbers: &Value| Some(Spread::of(numbers)?.median);
    let of = |name: &str, way: &str| median(&race["alone"][name][way]);
    let of_twelve = |name: &str| median(&race["bursts"][name]["12"]["plug"]);
    let ratio = |value: Option<f64>, least: Option<f64>| Some(value? / least?);
    let sum = |a: Option<f64>, b: Option<f64>| Some(a? + b?);
    let mut goals: Vec<(String, Option<f64>, f64)> = Vec::new();
    let mut goal = |name: &str, value, limit| goals.push((name.to_owned(), value, limit));

    let rule_least = sum(of("stamp", "plug"), of("floor", "plug"));
    goal("watch, plug: the floor", ratio(of("watch", "plug"), of("floor", "plug")), 1.3);
    goal("watch, pull: the floor", ratio(of("watch", "pull"), of("floor", "pull")), 2.0);
    goal("rule, plug: a do-nothing rule + the floor", ratio(of("rule", "plug"), rule_least), 1.25);
    goal("rule, pull: a do-nothing rule", ratio(of("rule", "pull"), of("stamp", "pull")), 1.05);
    goal("watch, twelve: the floor's", ratio(of_twelve("watch"), of_twelve("floor")), 1.05);
    for who in ["rule", "watch"] {
        let alone = race["alone"][who]["lost"][0].as_f64().unwrap_or_default();
        let lost = alone + lost(&race["bursts"][who]);
        goal(&format!("{who}: devices lost"), Some(lost), 0.0);
    }

    let resident = &results["resident"];
    for idle in resident["idle"].as_array().into_iter().flatten() {
        let vms = &idle["vms"];
        goal(&format!("{vms} VMs, idle: context switches"), idle["switches"].as_f64(), 0.0);
        let mebibytes = idle["rss_kib"].as_f64().map(|rss| rss / 1024.0);
        goal(&format!("{vms} VMs: MiB in memory"), mebibytes, 5.0);
    }
    let grown = &resident["growth"]["anonymous_kib"];
    let grown = || Some(grown[1].as_f64()? - grown[0].as_f64()?);
    goal("KiB grown over many events", grown(), 0.0);
    let cost = |vms: u64, rules: u64| {
        let all = resident["cost"].as_array()?;
        let this = all.iter().find(|cost| cost["vms"] == vms && cost["rules"] == rules)?;
        this["microseconds"].as_f64()
    };
    goal("an event with 64 VMs: with 1", ratio(cost(64, 1), cost(1, 1)), 1.25);
    goal("an event with 1000 rules: with 1", ratio(cost(1, 1000), cost(1, 1)), 2.0);
    let start = |vms: u64| median(&start_of(results, vms, 1)["milliseconds"]);
    goal("a start with 256 VMs: with 1", ratio(start(256), start(1)), 3.0);
    goals.into_iter().filter_map(|(goal, value, limit)| Some((goal, value?, limit))).collect()
}

/// One of the measured starts.
fn start_of(results: &Value, vms: u64, rules: u64) -> &Value {
    let starts = results["resident"]["start"].as_array();
    let is_this = |start: &&Value| start["vms"] == vms && start["rules"] == rules;
    starts.and_then(|starts| starts.iter().find(is_this)).unwrap_or(&Value::Null)
}

/// The table of the README, and the paragraph below it.
fn table(results: &Value) -> String {
    let race = &results["race"];
    let median = |numbers: &Value| match Spread::of(numbers) {
        Some(Spread { median, .. }) => format!("{median:.0}"),
        None => "-".to_owned(),
    };
    let mut table =
        "| | plug to attached | pull to gone | twelve at once |\n|---|---|---|---|\n".to_owned();
    for (name, _) in CONTENDERS.iter().skip(1) {
        let (alone, burst) = (&race["alone"][name], &race["bursts"][name]["12"]["plug"]);
        if !alone.is_null() {
            let numbers = [&alone["plug"], &alone["pull"], burst].map(median).join(" | ");
            table += &format!("| {} | {numbers} |\n", in_readme(name));
        }
    }
    let number = |value: Option<f64>, digits: usize| {
        value.map_or("-".to_owned(), |number| format!("{number:.digits$}"))
    };
    let both = |of: &str| {
        let count = |what: &str| results["counts"][what][of].as_f64();
        let thousands = number(count("instructions").map(|count| count / 1000.0), 0);
        let calls = number(count("system_calls"), 0);
        format!("{thousands} thousand instructions and {calls} system calls")
    };
    let many = |what: &str| results["resident"]["many"][what].as_f64();
    let start = |vms, rules| median(&start_of(results, vms, rules)["milliseconds"]);
    let delay = start_of(results, 1, 1)["delay_milliseconds"].as_f64();
    table
        + &format!(
            "\nThe kernel tells of the last of the twelve after {} ms.\n\
             An attach takes `watch` {} (all that it does meanwhile), and a rule's whole process {}.\n\
             With {} VMs and {} rules, `watch` needs {} MiB of its own, and {} µs of processor time an event.\n\
             A start takes {} ms with one VM, {} ms with 256 (each thinks for {} ms before it answers), and {} ms \
             with one VM and 10000 rules.\n",
            median(&race["bursts"]["nobody"]["12"]["told"]),
            both("watch_add"),
            both("rule_add"),
            number(many("vms"), 0),
            number(many("rules"), 0),
            number(many("anonymous_kib").map(|kib| kib / 1024.0), 1),
            number(many("microseconds"), 0),
            start(1, 1),
            start(256, 1),
            number(delay, 0),
            start(1, 10_000),
        )
}

/// How the README names a contender.
fn in_readme(name: &str) -> &str {
    match name {
        "floor" => "the floor: a client that is connected already, and asks nothing",
        "stamp" => "udev starts a program that does nothing",
        "watch" => "**this tool, `watch`**",
        "rule" => "**this tool, by udev rule**",
        "script" => "a script of bash and socat, by udev rule",
        "hostport" => "QEMU's own scan (`hostport=`)",
        name => name,
    }
}
