//! Shows the devices as a tree of ports, for people. There is no I/O here.

use unicode_width::UnicodeWidthStr;

use super::Report;
use super::entry::{BusReport, Entry};
use crate::text::{escape, fit};
use crate::ui::screen::{Line, Screen, Style};
use crate::usb::Port;

/// The least width for names. If there is less space, other columns are left
/// out.
const LEAST_FOR_NAMES: usize = 16;

/// The least width of a driver's name that is cut.
const LEAST_FOR_DRIVERS: usize = 12;

/// The number of blanks between two columns.
const GAP: usize = 2;

/// A column before the names.
struct Column {
    title: &'static str,
    style: Style,
    cells: Vec<String>,
}

impl Column {
    fn new(title: &'static str, style: Style, cells: impl Iterator<Item = String>) -> Self {
        Column { title, style, cells: cells.collect() }
    }

    fn cut(&mut self, columns: usize) {
        for cell in &mut self.cells {
            *cell = fit(cell, columns).into_owned();
        }
    }

    fn is_empty(&self) -> bool {
        self.cells.iter().all(String::is_empty)
    }

    fn width(&self) -> usize {
        let cells = self.cells.iter().map(|cell| cell.width());
        cells.chain([self.title.width()]).max().unwrap_or(0)
    }
}

/// The whole tree.
pub fn shown(report: &Report, screen: Screen) -> String {
    let entries = &report.devices;
    let guides = guides(&entries.iter().map(|entry| &entry.port).collect::<Vec<_>>());
    let ports = guides.iter().zip(entries).map(|(guide, e)| guide.own.width() + width(&e.port));
    let ports = ports.max().unwrap_or(0);
    let columns = columns(entries, ports, screen.columns);

    let mut header = Line::default();
    header.add(Style::Dim, "PORT");
    let mut start = ports + GAP;
    for column in &columns {
        header.pad_to(start).add(Style::Dim, column.title);
        start += column.width() + GAP;
    }
    header.pad_to(start).add(Style::Dim, "NAME");
    let mut text = header.shown(screen);

    let mut bus = None;
    for (row, (entry, guide)) in entries.iter().zip(&guides).enumerate() {
        if bus != Some(entry.bus) {
            bus = Some(entry.bus);
            text += &report
                .buses
                .iter()
                .find(|b| b.bus == entry.bus)
                .map_or_else(String::new, |b| bus_line(b).shown(screen));
        }
        let mut line = Line::default();
        let style = if entry.hub { Style::Plain } else { Style::Bold };
        line.add(Style::Dim, &guide.own).add(style, entry.port.to_string());
        let mut start = ports + GAP;
        for column in &columns {
            let cell = column.cells.get(row).cloned().unwrap_or_default();
            line.pad_to(start).add(column.style, cell);
            start += column.width() + GAP;
        }
        let name = entry.shown_name();
        let style = if entry.hub { Style::Dim } else { Style::Plain };
        line.pad_to(start).add(style, escape(&name));
        text += &line.shown(screen);
        text.extend(details(entry, guide, screen.columns).map(|line| line.shown(screen)));
    }
    text
}

fn width(port: &Port) -> usize {
    port.to_string().width()
}

/// The columns that leave enough space for names. First drivers are cut. Then
/// the twin's column is removed, then the driver's, then the speed's.
fn columns(entries: &[Entry], ports: usize, screen: usize) -> Vec<Column> {
    let cells = entries.iter();
    let optional = |port: &Option<Port>| port.as_ref().map(ToString::to_string).unwrap_or_default();
    let twins = Column::new("TWIN", Style::Dim, cells.clone().map(|e| optional(&e.twin)));
    let speed = |e: &Entry| e.speed_mbps.map(|s| format!("{:>4}", s.to_string()));
    let speed = |e: &Entry| speed(e).unwrap_or_default();
    let drivers = |e: &Entry| escape(&e.drivers.join(",")).into_owned();
    let mut columns = vec![
        twins,
        Column::new("DEVICE", Style::Plain, cells.clone().map(Entry::at)),
        Column::new("ID", Style::Plain, cells.clone().map(Entry::id)),
        Column::new("Mb/s", Style::Dim, cells.clone().map(speed)),
        Column::new("DRIVER", Style::Dim, cells.map(drivers)),
    ];
    columns.retain(|column| !column.is_empty());
    for title in ["TWIN", "DRIVER", "Mb/s"] {
        let taken: usize = columns.iter().map(|column| column.width() + GAP).sum();
        let too_much = (ports + GAP + taken + LEAST_FOR_NAMES).saturating_sub(screen);
        if too_much == 0 {
            break;
        }
        let drivers = columns.iter_mut().find(|column| column.title == "DRIVER");
        match drivers.map(|drivers| (drivers.width().saturating_sub(too_much), drivers)) {
            Some((room, drivers)) if room >= LEAST_FOR_DRIVERS => drivers.cut(room),
            _ => columns.retain(|column| column.title != title),
        }
    }
    columns
}

fn bus_line(bus: &BusReport) -> Line {
    let mut line = Line::default();
    let mut words = Vec::new();
    words.extend(bus.speed_mbps.map(|speed| format!("{speed} Mb/s")));
    words.extend(
        bus.ports.map(|ports| format!("{ports} port{}", if ports == 1 { "" } else { "s" })),
    );
    // The stable name already says where the controller is.
    let (kind, place) = bus.controller.rsplit_once(' ').unwrap_or((&bus.controller, ""));
    let is_said = bus.path.as_ref().is_some_and(|path| path.to_string().contains(place));
    words.push(escape(if is_said { kind } else { &bus.controller }).into_owned());
    words.retain(|word| !word.is_empty());
    line.add(Style::Plain, format!("bus {}", bus.bus));
    if let Some(path) = &bus.path {
        line.add(Style::Plain, format!("  {path}-0:"));
    }
    line.add(Style::Dim, format!("  {}", words.join(", ")));
    line
}

/// The other facts about a device. They are on one line, or on two if the
/// serial number would push the rest off the screen.
fn details(entry: &Entry, guide: &Guide, columns: usize) -> impl Iterator<Item = Line> {
    let words = detail_words(entry);
    let line = |words: &[(Style, String)]| {
        let mut line = Line::default();
        line.add(Style::Dim, &guide.below);
        for (place, (style, word)) in words.iter().enumerate() {
            if place > 0 {
                line.add(Style::Dim, "; ");
            }
            line.add(*style, word);
        }
        line
    };
    let whole = line(&words);
    let lines = match words.split_first() {
        None => Vec::new(),
        Some((serial, rest))
            if entry.serial.is_some() && !rest.is_empty() && whole.columns() > columns =>
        {
            vec![line(std::slice::from_ref(serial)), line(rest)]
        }
        Some(_) => vec![whole],
    };
    lines.into_iter()
}

fn detail_words(entry: &Entry) -> Vec<(Style, String)> {
    let mut words: Vec<(Style, String)> = Vec::new();
    if let Some(serial) = &entry.serial {
        words.push((Style::Dim, format!("serial {}", escape(serial))));
    }
    words.extend(entry.uses().into_iter().map(|used| (Style::Busy, used)));
    if let Some(holder) = entry.held_text() {
        let in_vm = entry.held_by.iter().any(|holder| holder.vm.is_some());
        let style = if in_vm { Style::Good } else { Style::Busy };
        words.push((
            style,
            if in_vm { format!("in {holder}") } else { format!("held by {holder}") },
        ));
    }
    if let Some(rule) = &entry.rule {
        let style = if rule.deny { Style::Bad } else { Style::Rule };
        words.push((style, rule.to_string()));
    }
    // The serial number of a hub is not useful.
    if words.is_empty() || (entry.hub && words.len() == 1 && entry.serial.is_some()) {
        words.clear();
    }
    words
}

/// The lines of the tree that lead to a port.
#[derive(Debug, PartialEq, Eq)]
struct Guide {
    /// The text before the port's name.
    own: String,
    /// The text before the other facts about the port's device.
    below: String,
}

/// The guides for ports in their order. Each hub comes before the devices that
/// are plugged into it.
fn guides(ports: &[&Port]) -> Vec<Guide> {
    let depth = |port: &Port| std::iter::successors(port.hub(), Port::hub).count();
    let guide = |(row, port): (usize, &&Port)| {
        let rest = ports.get(row + 1..).unwrap_or_default();
        // Whether another port follows on the same hub as this port, or on the
        // same hub as one that leads to this port.
        let follows = |level: usize| {
            let mut rest = rest.iter().take_while(|next| next.bus() == port.bus());
            rest.find(|next| depth(next) <= level).is_some_and(|next| depth(next) == level)
        };
        let above: String =
            (0..depth(port)).map(|level| if follows(level) { "│ " } else { "  " }).collect();
        let (own, side) = if follows(depth(port)) { ("├ ", "│ ") } else { ("└ ", "  ") };
        let has_more = rest.first().is_some_and(|next| next.hub().as_ref() == Some(*port));
        let down = if has_more { "│ " } else { "  " };
        Guide { own: format!("{above}{own}"), below: format!("{above}{side}{down}") }
    };
    ports.iter().enumerate().map(guide).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ports(names: &[&str]) -> Vec<Port> {
        names.iter().map(|name| name.parse().unwrap()).collect()
    }

    fn drawn(names: &[&str]) -> Vec<String> {
        let ports = ports(names);
        let guides = guides(&ports.iter().collect::<Vec<_>>());
        ports.iter().zip(guides).map(|(port, guide)| format!("{}{port}", guide.own)).collect()
    }

    #[test]
    fn ports_hang_on_their_hubs() {
        assert_eq!(
            drawn(&["1-1", "1-1.2", "1-1.2.1", "1-1.4", "1-3", "2-1", "2-1.1"]),
            ["├ 1-1", "│ ├ 1-1.2", "│ │ └ 1-1.2.1", "│ └ 1-1.4", "└ 1-3", "└ 2-1", "  └ 2-1.1",]
        );
    }

    #[test]
    fn what_is_said_below_a_port_keeps_the_tree_together() {
        let ports = ports(&["1-1", "1-1.2", "1-3"]);
        let guides = guides(&ports.iter().collect::<Vec<_>>());
        let below: Vec<&str> = guides.iter().map(|guide| guide.below.as_str()).collect();
        assert_eq!(below, ["│ │ ", "│     ", "    "]);
    }

    proptest! {
        #[test]
        fn any_ports_can_be_drawn(
            mut names in proptest::collection::vec("[1-3]-[1-3](\\.[1-3]){0,3}", 0..20),
        ) {
            names.sort();
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            prop_assert_eq!(drawn(&names).len(), names.len());
        }
    }
}
