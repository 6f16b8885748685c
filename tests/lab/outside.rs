//! Outside the machine: an ordinary test program, whose trials wait for what the machines report.

use crate::all_tests;
use crate::inside::{CYCLES, RUN, Report, deadline};
use libtest_mimic::{Arguments, Failed, Trial};
use std::collections::{BTreeSet, HashMap};
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::sync::{Arc, Condvar, Mutex, Once};
use std::thread;

const QEMU_VERSIONS: [&str; 2] = ["7.2", "10.0"];
const PROJECT: &str = env!("CARGO_MANIFEST_DIR");

pub fn run() -> ExitCode {
    let mut arguments = Arguments::from_args();
    let mut trials = Vec::new();
    let mut machines = Vec::new();
    let mut complaints = BTreeSet::new();
    for version in QEMU_VERSIONS {
        let missing = missing(version);
        complaints.extend(missing.clone());
        let trial_name = |test: &str| format!("qemu_{}::{test}", version.replace('.', "_"));
        let selected = all_tests().filter(|test| is_selected(&arguments, &trial_name(test.name)));
        let machine =
            Arc::new(Machine::new(version, selected.map(|test| test.name.to_owned()).collect()));
        for test in all_tests() {
            let (machine, missing) = (Arc::clone(&machine), missing.clone());
            let trial = Trial::test(trial_name(test.name), {
                let missing = missing.clone();
                move || {
                    missing
                        .map_or_else(|| machine.result_of(test.name), |missing| Err(missing.into()))
                }
            });
            trials.push(trial.with_ignored_flag(missing.is_some()));
        }
        machines.push(machine);
    }
    for complaint in complaints {
        eprintln!("lab: tests are ignored: {complaint}");
    }
    // Trials only wait: all of them at once, so that the machines run side by side.
    arguments.test_threads = Some(trials.len());
    let conclusion = libtest_mimic::run(&arguments, trials);
    for machine in machines {
        machine.finish();
    }
    conclusion.exit_code()
}

/// What keeps the lab from running with this QEMU, and how to get it.
fn missing(version: &str) -> Option<String> {
    let lab = Path::new(PROJECT).join("target/lab");
    let Ok(installed) = Command::new("qemu-system-x86_64").arg("--version").output() else {
        return Some("qemu-system-x86_64 is not installed; contrib/setup installs it".to_owned());
    };
    if !lab.join("stamp").exists() {
        return Some("the lab is not prepared; run contrib/setup".to_owned());
    }
    let installed =
        String::from_utf8_lossy(&installed.stdout).contains(&format!("version {version}."));
    let unpacked = lab.join(format!("qemu-{version}")).exists();
    (!installed && !unpacked).then(|| format!("contrib/setup could not get QEMU {version}"))
}

/// As libtest-mimic selects, which does not tell.
fn is_selected(arguments: &Arguments, name: &str) -> bool {
    let matches =
        |filter: &String| if arguments.exact { name == filter } else { name.contains(filter) };
    arguments.filter.as_ref().is_none_or(matches) && !arguments.skip.iter().any(matches)
}

/// A machine with one version of QEMU: booted when the first result is asked for, gone after the last test.
struct Machine {
    version: &'static str,
    tests: Vec<String>,
    boot: Once,
    progress: Mutex<Progress>,
    news: Condvar,
}

#[derive(Default)]
struct Progress {
    reports: HashMap<String, Report>,
    /// What the machine said before it was gone.
    ended: Option<String>,
    booted: bool,
}

impl Machine {
    fn new(version: &'static str, tests: Vec<String>) -> Machine {
        Machine {
            version,
            tests,
            boot: Once::new(),
            progress: Mutex::default(),
            news: Condvar::new(),
        }
    }

    fn result_of(self: &Arc<Self>, test: &str) -> Result<(), Failed> {
        self.boot.call_once(|| {
            self.progress.lock().unwrap().booted = true;
            let machine = Arc::clone(self);
            thread::spawn(move || machine.run());
        });
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

    /// Waits until the machine, if it was booted, is gone with all it left.
    fn finish(&self) {
        let _gone = self.news.wait_while(self.progress.lock().unwrap(), |progress| {
            progress.booted && progress.ended.is_none()
        });
    }

    fn run(&self) {
        let timeout = (self.tests.len() as u64 + 1) * deadline().as_secs();
        // More processors than there are real ones make emulation slower.
        let processors = thread::available_parallelism().map_or(1, usize::from);
        let cpus = if processors / QEMU_VERSIONS.len() > 1 { "2" } else { "1" };
        // The thread that starts it waits for it, so the lab dies when this program is killed.
        let mut lab = Command::new("setpriv")
            .args(["--pdeathsig", "TERM"])
            .arg(Path::new(PROJECT).join("contrib/lab"))
            .args(["--qemu", self.version])
            .args(["--cpus", cpus, "--timeout", &timeout.to_string()])
            .arg("env")
            .args(std::env::var(CYCLES).map(|cycles| format!("{CYCLES}={cycles}")))
            .arg(std::env::current_exe().expect("this program"))
            .arg(RUN)
            .args(&self.tests)
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
                self.progress.lock().unwrap().reports.insert(report.test.clone(), report);
                self.news.notify_all();
            }
        }
        let status = lab.wait().expect("a child");
        let complaints = complaints.join().unwrap_or_default();
        self.progress.lock().unwrap().ended = Some(format!("{complaints}contrib/lab: {status}"));
        self.news.notify_all();
    }
}
