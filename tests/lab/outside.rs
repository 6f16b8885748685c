//! Outside the machine: an ordinary test program, whose trials wait for what the machines report.

use crate::inside::{CYCLES, KERNEL_LOG, RUN, Report};
use crate::{Kind, Test, all_tests};
use libtest_mimic::{Arguments, Failed, Trial};
use std::collections::{BTreeSet, HashMap};
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

/// From the oldest to the newest; `contrib/setup` unpacks them.
const QEMU_VERSIONS: [&str; 4] = ["5.2", "7.2", "10.0", "11.1"];
const PROJECT: &str = env!("CARGO_MANIFEST_DIR");
/// How many tests a machine runs. With fewer, more time goes into booting; with more, one machine is left at the end
/// and a processor has nothing to do.
const AT_MOST: usize = 30;
/// `all` has every version run every test, `none` has no test run.
const LAB: &str = "LAB";

pub fn run() -> ExitCode {
    let mut arguments = Arguments::from_args();
    let mut trials = Vec::new();
    let mut machines = Vec::new();
    let mut complaints = BTreeSet::new();
    let here: Vec<&str> =
        QEMU_VERSIONS.into_iter().filter(|version| missing(version).is_none()).collect();
    let turns = turns(if here.is_empty() { &QEMU_VERSIONS } else { &here });
    for (version, place) in QEMU_VERSIONS.into_iter().flat_map(|v| Place::ALL.map(|p| (v, p))) {
        let missing = missing(version);
        complaints.extend(missing.clone());
        let is_here = |test: &Test| {
            let has_turn = turns.get(test.name) == Some(&version);
            Place::of(test) == place && (has_turn || runs_on(test, version))
        };
        let prefix = format!("qemu_{}", version.replace('.', "_"));
        let named = all_tests().filter(is_here).map(|t| (format!("{prefix}::{}", t.name), t));
        let is_wanted = |(name, _): &(String, Test)| is_selected(&arguments, name);
        let (wanted, others): (Vec<_>, Vec<_>) = named.partition(is_wanted);
        trials.extend(others.into_iter().map(|(name, _)| {
            let result = || Err("it was selected, and no machine has it".into());
            Trial::test(name, result).with_ignored_flag(missing.is_some())
        }));
        // As many tests in each of them, or one machine is left with a few.
        let machines_needed = wanted.len().div_ceil(AT_MOST).max(1);
        for part in wanted.chunks(wanted.len().div_ceil(machines_needed).max(1)) {
            let tests = part.iter().map(|(_, test)| *test).collect();
            let machine = Arc::new(Machine { version, place, tests, ..Machine::default() });
            trials.extend(part.iter().map(|(name, test)| {
                let (machine, why, test) = (Arc::clone(&machine), missing.clone(), test.name);
                let result =
                    move || why.map_or_else(|| machine.result_of(test), |why| Err(why.into()));
                Trial::test(name, result).with_ignored_flag(missing.is_some())
            }));
            machines.extend(missing.is_none().then_some(machine));
        }
    }
    for complaint in complaints {
        eprintln!("lab: tests are ignored: {complaint}");
    }
    if arguments.list {
        machines.clear();
    }
    machines.sort_by_key(|machine| std::cmp::Reverse(machine.weight()));
    let runners = run_machines(machines);
    // Trials only wait, so all of them do.
    arguments.test_threads = Some(trials.len());
    let conclusion = libtest_mimic::run(&arguments, trials);
    for runner in runners {
        runner.join().expect("a runner does not panic");
    }
    conclusion.exit_code()
}

/// In which of a QEMU version's machines a test runs.
#[derive(Clone, Copy, Default, PartialEq)]
enum Place {
    #[default]
    Usual,
    /// Process 1 is systemd.
    Systemd,
    /// It needs little of a processor, so it runs beside the others.
    Beside,
}

impl Place {
    const ALL: [Place; 3] = [Place::Usual, Place::Systemd, Place::Beside];

    fn of(test: &Test) -> Place {
        match test.kind {
            Kind::Systemd => Place::Systemd,
            Kind::Waits => Place::Beside,
            _ => Place::Usual,
        }
    }
}

/// Where each test runs that takes turns: with the QEMU that has the fewest tests so far.
fn turns(versions: &[&'static str]) -> HashMap<&'static str, &'static str> {
    let tests = |version: &&'static str| {
        (all_tests().filter(|test| runs_on(test, version)).count(), *version)
    };
    let mut tests: Vec<_> = versions.iter().map(tests).collect();
    let has_turn = |test: Test| {
        let fewest = tests.iter_mut().min()?;
        fewest.0 += 1;
        Some((test.name, fewest.1))
    };
    all_tests().filter(|test| test.kind == Kind::AnyQemu).filter_map(has_turn).collect()
}

fn runs_on(test: &Test, version: &str) -> bool {
    let is_end = [QEMU_VERSIONS.first(), QEMU_VERSIONS.last()].contains(&Some(&version));
    let all = std::env::var(LAB).as_deref() == Ok("all");
    match test.kind {
        Kind::Usual => all || is_end,
        Kind::AnyQemu => all, // or where it has its turn
        Kind::EveryQemu => true,
        Kind::Qemu7 => version == "7.2",
        Kind::Long => all,
        Kind::Systemd | Kind::Waits => all || QEMU_VERSIONS.last() == Some(&version),
    }
}

/// Runs the machines, one more than there are processors: tests wait now and then. With two for each processor, the
/// emulators take a third more processor time for the same tests. Those that mostly wait run beside them.
fn run_machines(machines: Vec<Arc<Machine>>) -> Vec<thread::JoinHandle<()>> {
    let processors = thread::available_parallelism().map_or(1, usize::from);
    let (beside, others): (Vec<_>, Vec<_>) =
        machines.into_iter().partition(|machine| machine.place == Place::Beside);
    let groups = [(beside, 1), (others, processors + 1)];
    let at_a_time: usize = groups.iter().map(|(group, most)| group.len().min(*most)).sum();
    // More processors than there are real ones make emulation slower.
    let cpus = if at_a_time > 0 && processors / at_a_time > 1 { "2" } else { "1" };
    groups.into_iter().flat_map(|(group, most)| run_group(group, most, cpus)).collect()
}

/// Runs so many of these machines at a time, each with so many processors.
fn run_group(
    machines: Vec<Arc<Machine>>,
    at_most: usize,
    cpus: &'static str,
) -> Vec<thread::JoinHandle<()>> {
    let at_a_time = machines.len().min(at_most);
    let queue = Arc::new(Mutex::new(machines.into_iter()));
    let runner = || {
        let queue = Arc::clone(&queue);
        thread::spawn(move || {
            let next = || queue.lock().unwrap().next();
            while let Some(machine) = next() {
                machine.run(cpus);
            }
        })
    };
    (0..at_a_time).map(|_| runner()).collect()
}

/// What keeps the lab from running with this QEMU, and how to get it.
fn missing(version: &str) -> Option<String> {
    if std::env::var(LAB).as_deref() == Ok("none") {
        return Some(format!("{LAB}=none"));
    }
    let lab = Path::new(PROJECT).join("target/lab");
    if Command::new("qemu-system-x86_64").arg("--version").output().is_err() {
        return Some("qemu-system-x86_64 is not installed; contrib/setup installs it".to_owned());
    }
    if !lab.join("stamp").exists() {
        return Some("the lab is not prepared; run contrib/setup".to_owned());
    }
    let unpacked = lab.join(format!("qemu-{version}")).exists();
    (!unpacked).then(|| format!("contrib/setup could not get QEMU {version}"))
}

/// As libtest-mimic selects, which does not tell.
fn is_selected(arguments: &Arguments, name: &str) -> bool {
    let matches =
        |filter: &String| if arguments.exact { name == filter } else { name.contains(filter) };
    arguments.filter.as_ref().is_none_or(matches) && !arguments.skip.iter().any(matches)
}

/// A machine with one version of QEMU, and what it has reported.
#[derive(Default)]
struct Machine {
    version: &'static str,
    place: Place,
    tests: Vec<Test>,
    progress: Mutex<Progress>,
    news: Condvar,
}

#[derive(Default)]
struct Progress {
    reports: HashMap<String, Report>,
    seconds: Vec<(f64, String)>,
    /// What the machine said before it was gone.
    ended: Option<String>,
}

impl Machine {
    /// How long it takes, roughly: the longest are to begin first. A test that starts systemd's services or libvirt's
    /// takes as long as four others.
    fn weight(&self) -> usize {
        let weight = |test: &Test| match test.kind {
            Kind::Systemd | Kind::Qemu7 => 4,
            _ => 1,
        };
        self.tests.iter().map(weight).sum()
    }

    fn result_of(&self, test: &str) -> Result<(), Failed> {
        let waiting = |progress: &mut Progress| {
            progress.ended.is_none() && !progress.reports.contains_key(test)
        };
        let mut progress = self.news.wait_while(self.progress.lock().unwrap(), waiting).unwrap();
        match progress.reports.remove(test) {
            Some(Report { failure: None, .. }) => Ok(()),
            Some(Report { failure: Some(failure), .. }) => Err(failure.into()),
            None => Err(format!(
                "the machine ended before this test did:\n{}",
                progress.ended.as_deref().unwrap_or_default()
            )
            .into()),
        }
    }

    /// Says at once what failed: libtest-mimic does when all have ended.
    fn tell_failure(&self, report: &Report) {
        if let Some(failure) = &report.failure {
            let printed = failure.split(KERNEL_LOG).next().unwrap_or_default();
            eprintln!("lab: QEMU {}: {} failed:\n{printed}", self.version, report.test);
        }
    }

    /// Says which tests take long, so that somebody can make them shorter.
    fn tell_times(&self, all: Duration) {
        let mut times = self.progress.lock().unwrap().seconds.clone();
        times.sort_by(|a, b| b.0.total_cmp(&a.0));
        let longest = times.iter().take(5).map(|(seconds, test)| format!("{test} {seconds:.0} s"));
        eprintln!(
            "lab: QEMU {}: {} tests in {} s; the longest: {}",
            self.version,
            times.len(),
            all.as_secs(),
            longest.collect::<Vec<_>>().join(", ")
        );
    }

    /// Boots it, has it run its tests, and waits until it is gone with all it left.
    fn run(&self, cpus: &str) {
        let start = Instant::now();
        let boot = Duration::from_secs(120);
        let timeout = boot + self.tests.iter().map(Test::deadline).sum::<Duration>();
        // The thread that starts it waits for it, so the lab dies when this program is killed.
        let mut lab = Command::new("setpriv")
            .args(["--pdeathsig", "TERM"])
            .arg(Path::new(PROJECT).join("contrib/lab"))
            .args(["--qemu", self.version])
            .args((self.place == Place::Systemd).then_some("--systemd"))
            .args(["--cpus", cpus, "--timeout", &timeout.as_secs().to_string()])
            .arg("env")
            .args(std::env::var(CYCLES).map(|cycles| format!("{CYCLES}={cycles}")))
            .arg(std::env::current_exe().expect("this program"))
            .arg(RUN)
            .args(self.tests.iter().map(|test| test.name))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("setpriv");
        let mut stderr = lab.stderr.take().expect("piped");
        let complaints = thread::spawn(move || {
            let mut text = String::new();
            let _ = stderr.read_to_string(&mut text);
            text
        });
        for line in BufReader::new(lab.stdout.take().expect("piped")).lines().map_while(Result::ok)
        {
            if let Ok(report) = serde_json::from_str::<Report>(&line) {
                self.tell_failure(&report);
                let mut progress = self.progress.lock().unwrap();
                progress.seconds.push((report.seconds, report.test.clone()));
                progress.reports.insert(report.test.clone(), report);
                drop(progress);
                self.news.notify_all();
            }
        }
        let status = lab.wait().expect("a child");
        self.tell_times(start.elapsed());
        let complaints = complaints.join().unwrap_or_default();
        self.progress.lock().unwrap().ended = Some(format!("{complaints}contrib/lab: {status}"));
        self.news.notify_all();
    }
}
