//! Processor time, to the nanosecond: the scheduler's own books (Linux, Documentation/scheduler/sched-stats.rst).

use std::fs;
use std::process;

/// Processor time used so far, in nanoseconds.
#[derive(Clone, Copy)]
pub struct Spent {
    pub machine: u64,
    pub qemu: u64,
    pub bench: u64,
}

impl Spent {
    pub fn now(qemu: i32) -> Spent {
        Spent {
            machine: machine(),
            qemu: of_process(qemu),
            bench: of_process(process::id() as i32),
        }
    }

    /// QEMU's part of what was spent since, and that of all others but the bench itself: the kernel at work for
    /// other programs, udevd, and the contender.
    pub fn since(self, before: Spent) -> (u64, u64) {
        let qemu = self.qemu.saturating_sub(before.qemu);
        let bench = self.bench.saturating_sub(before.bench);
        (qemu, (self.machine - before.machine).saturating_sub(qemu + bench))
    }
}

/// All processors together, idling left out.
fn machine() -> u64 {
    let text = fs::read_to_string("/proc/schedstat").expect("the scheduler's statistics");
    text.lines()
        .filter(|line| line.starts_with("cpu"))
        .filter_map(|line| line.split(' ').nth(7)?.parse::<u64>().ok())
        .sum()
}

/// All threads of a process.
pub fn of_process(pid: i32) -> u64 {
    let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else { return 0 };
    let of_task = |text: String| text.split(' ').next()?.parse::<u64>().ok();
    tasks
        .flatten()
        .filter_map(|task| of_task(fs::read_to_string(task.path().join("schedstat")).ok()?))
        .sum()
}
