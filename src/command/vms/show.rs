//! Shows the VMs to people.

use super::advice::Advice;
use super::monitor::State;
use super::{MonitorReport, VmReport};
use crate::qemu::CONTROLLER_XML;
use crate::text::escape;
use crate::ui::screen::{Line, Screen, Style};

/// The column where the text after a state begins.
const INDENT: usize = 13;

/// The option that gives a VM the most possible ports.
const CONTROLLER: &str = "-device qemu-xhci,id=xhci,p2=15,p3=15";

/// Shows every VM, with blank lines between them.
pub fn shown(vms: &[VmReport], screen: Screen) -> String {
    let vms: Vec<String> = vms.iter().map(|vm| one(vm, screen)).collect();
    vms.join("\n")
}

fn one(vm: &VmReport, screen: Screen) -> String {
    let mut text = title(vm).shown(screen);
    for monitor in &vm.monitors {
        text += &monitor_lines(vm, monitor, screen);
    }
    if vm.monitors.is_empty() {
        text +=
            &row(Style::Bad, "no monitor", "it was started without a QMP monitor").shown(screen);
    }
    if vm.reads_config {
        let file = "in a file (-readconfig) that this user may not read; its monitors are not seen";
        text += &row(Style::Dim, "more", file).shown(screen);
    }
    if let Some(controllers) = &vm.controllers {
        let mut words: Vec<String> = Vec::new();
        for c in controllers {
            words.push(format!("{} of {} on {}", c.free, c.ports, escape(&c.bus)));
        }
        let none_free = controllers.iter().all(|c| c.free == 0);
        let style = if none_free { Style::Bad } else { Style::Good };
        if words.is_empty() {
            text += &row(style, "free ports", "none: it has no USB controller").shown(screen);
            let (what, line) = match vm.libvirt {
                true => ("add one with `virsh edit`, then stop and start it", CONTROLLER_XML),
                false => ("start it with one", CONTROLLER),
            };
            text += &format!("  To attach devices, use --add-controller, or {what}:\n    {line}\n");
        } else {
            text += &row(style, "free ports", &words.join(", ")).shown(screen);
        }
    }
    text + &advice_lines(vm)
}

/// `win11  running, QEMU 10.0.2, process 1234 of user qemu`
fn title(vm: &VmReport) -> Line {
    let mut line = Line::default();
    let name = vm.name.as_deref().unwrap_or("(no name)");
    line.add(Style::Bold, escape(name)).add(Style::Plain, "  ");
    let mut words = Vec::new();
    words.extend(vm.status.as_deref().map(|status| escape(status).into_owned()));
    let version = vm.qemu.as_ref().map(|version| format!("QEMU {version}"));
    let program = || vm.program.as_deref().map(|program| escape(program).into_owned());
    words.extend(version.or_else(program));
    let user = vm.user.as_deref().map(|user| format!(" of user {}", escape(user)));
    words.push(match vm.pid {
        Some(pid) => format!("process {pid}{}", user.unwrap_or_default()),
        None if vm.monitors.iter().all(|m| m.state == State::Gone) => "not running".to_owned(),
        None => "its process is not seen".to_owned(),
    });
    if vm.libvirt {
        words.push("libvirt's".to_owned());
    }
    line.add(Style::Plain, words.join(", "));
    line
}

fn row(style: Style, word: &str, rest: &str) -> Line {
    let mut line = Line::default();
    line.add(Style::Plain, "  ").add(style, word).pad_to(INDENT).add(Style::Plain, " ");
    line.add(Style::Plain, rest);
    line
}

/// The lines about a monitor. A socket's path is never cut, because users copy
/// it.
fn monitor_lines(vm: &VmReport, monitor: &MonitorReport, screen: Screen) -> String {
    let style = match monitor.state {
        State::Free => Style::Good,
        State::Held | State::Silent | State::Stopped => Style::Busy,
        State::Forbidden | State::Unusable => Style::Dim,
        State::Gone | State::Taken | State::Broken => Style::Bad,
    };
    let whole = Screen { columns: usize::MAX, ..screen };
    let place = match &monitor.socket {
        Some(address) => escape(&address.to_string()).into_owned(),
        None => escape(&monitor.asked).into_owned(),
    };
    let mut text = row(style, monitor.state.word(), &place).shown(whole);
    let mut notes = Vec::new();
    if monitor.state == State::Held {
        let holder =
            |h: &super::HolderReport| format!("{} (process {})", escape(&h.program), h.pid);
        let holders: Vec<String> = monitor.held_by.iter().map(holder).collect();
        notes.push(match holders.as_slice() {
            [] => "by a client that this user may not see".to_owned(),
            some => format!("by {}", some.join(" and ")),
        });
    }
    // If the VM is shown only because of the configuration, this remark is not
    // needed.
    let configured = monitor.configured_as.as_ref().filter(|_| vm.pid.is_some());
    notes.extend(configured.map(|name| format!("VM {name} of the configuration")));
    notes.extend(monitor.note.as_deref().map(|note| escape(note).into_owned()));
    for note in notes {
        text += &row(Style::Plain, "", &note).shown(whole);
    }
    text
}

fn advice_lines(vm: &VmReport) -> String {
    let mut text = String::new();
    if let Some(Advice::Qemu(lines) | Advice::Shell(lines) | Advice::Monitor(lines)) = &vm.to_add {
        let what = if vm.monitors.is_empty() { "" } else { " one more monitor" };
        text += &format!("  To attach devices, start it with{what}:\n    {lines}\n");
    }
    let (lines, how) = match &vm.to_paste {
        Some(Advice::Monitor(lines)) => (lines, "type into its monitor"),
        Some(Advice::Qemu(lines) | Advice::Shell(lines)) => (lines, "run"),
        None => return text,
    };
    let lines = lines.replace('\n', "\n    ");
    text + &format!("  Or if it is QEMU 11.1 or later, {how}, while it runs:\n    {lines}\n")
}
