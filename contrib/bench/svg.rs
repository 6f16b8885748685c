//! The picture: how long one device takes, and how long many at once.

use crate::race::BURSTS;
use crate::report::{CONTENDERS, Spread, describe};
use serde_json::Value;
use std::fmt::Write;

const WIDTH: f64 = 880.0;
const LEFT: f64 = 300.0;
const ROW: f64 = 34.0;
const PLUG: &str = "#1f6feb";
const PULL: &str = "#d1700f";
const COLOURS: [&str; 6] = ["#6e7781", "#8250df", "#1a7f37", "#1f6feb", "#d1700f", "#a40e26"];

/// A scale on which every factor of ten has the same length.
struct Scale {
    least: f64,
    most: f64,
    from: f64,
    to: f64,
}

impl Scale {
    fn at(&self, value: f64) -> f64 {
        let part = (value.max(self.least) / self.least).log10() / (self.most / self.least).log10();
        self.from + part * (self.to - self.from)
    }

    fn marks(&self) -> Vec<f64> {
        let marks = (0..6).flat_map(|power| [1.0, 2.0, 5.0].map(|n| n * 10f64.powi(power)));
        marks.filter(|mark| (self.least..=self.most).contains(mark)).collect()
    }
}

/// The scale that fits all of these, from one mark to another.
fn scale<'a>(spreads: impl Iterator<Item = &'a Spread> + Clone, from: f64, to: f64) -> Scale {
    let least = spreads.clone().map(|spread| spread.least).fold(f64::INFINITY, f64::min);
    let most = spreads.map(|spread| spread.most).fold(1.0, f64::max);
    let all = Scale { least: 1.0, most: 1e6, from, to };
    let marks = all.marks();
    let below = marks.iter().rev().find(|mark| **mark <= least).unwrap_or(&1.0);
    let above = marks.iter().find(|mark| **mark >= most).unwrap_or(&1e6);
    Scale { least: *below, most: *above, ..all }
}

pub fn draw(results: &Value) -> String {
    let mut picture = String::new();
    let top = alone(&mut picture, results);
    let height = bursts(&mut picture, results, top + 60.0);
    let note = describe(results).replace('&', "&amp;").replace('<', "&lt;");
    // The machine, and the one in it.
    for (n, line) in note.split("; ").enumerate() {
        let y = height + 34.0 + 14.0 * n as f64;
        let _ = writeln!(picture, r#"<text x="16" y="{y}" font-size="10">{line}</text>"#);
    }
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {}\" \
         font-family=\"sans-serif\" font-size=\"13\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n{picture}</svg>\n",
        height + 60.0
    )
}

fn alone(picture: &mut String, results: &Value) -> f64 {
    let race = &results["race"]["alone"];
    let rows: Vec<(&str, [Option<Spread>; 2])> = CONTENDERS
        .iter()
        .map(|(name, title)| (*title, ["plug", "pull"].map(|way| Spread::of(&race[name][way]))))
        .filter(|(_, [plug, _])| plug.is_some())
        .collect();
    let spreads = rows.iter().flat_map(|(_, both)| both.iter().flatten());
    let scale = scale(spreads, LEFT, WIDTH - 30.0);
    let bottom = 70.0 + ROW * rows.len() as f64;
    title(picture, 26.0, "One device: milliseconds from the kernel's event");
    for (n, (colour, word)) in
        [(PLUG, "plug to attached"), (PULL, "pull to gone")].iter().enumerate()
    {
        let x = LEFT + 150.0 * n as f64;
        let _ = writeln!(
            picture,
            r#"<circle cx="{x}" cy="44" r="4" fill="{colour}"/><text x="{}" y="48">{word}</text>"#,
            x + 9.0
        );
    }
    for mark in scale.marks() {
        let x = scale.at(mark);
        let _ = writeln!(
            picture,
            r##"<path d="M{x:.1} 60V{bottom}" stroke="#d0d7de"/><text x="{x:.1}" y="{}" text-anchor="middle">{mark}</text>"##,
            bottom + 16.0
        );
    }
    for (n, (title, both)) in rows.iter().enumerate() {
        let y = 70.0 + ROW * (n as f64 + 0.5);
        let _ = writeln!(
            picture,
            r#"<text x="{}" y="{}" text-anchor="end">{title}</text>"#,
            LEFT - 12.0,
            y + 4.0
        );
        for (spread, (colour, y)) in both.iter().zip([(PLUG, y - 6.0), (PULL, y + 6.0)]) {
            let Some(Spread { median, least, most }) = spread else { continue };
            let [median, least, most] = [*median, *least, *most].map(|value| scale.at(value));
            let _ = writeln!(
                picture,
                r#"<path d="M{least:.1} {y}H{most:.1}" stroke="{colour}" stroke-width="2"/><circle cx="{median:.1}" cy="{y}" r="4" fill="{colour}"/>"#
            );
        }
    }
    bottom
}

fn bursts(picture: &mut String, results: &Value, top: f64) -> f64 {
    let race = &results["race"]["bursts"];
    let lines: Vec<(&str, Vec<(usize, Spread)>)> = CONTENDERS
        .iter()
        .map(|(name, title)| {
            let spread =
                |size: &usize| Some((*size, Spread::of(&race[name][size.to_string()]["plug"])?));
            (*title, BURSTS.iter().filter_map(spread).collect::<Vec<_>>())
        })
        .filter(|(_, points)| !points.is_empty())
        .collect();
    let bottom = top + 260.0;
    let spreads = lines.iter().flat_map(|(_, points)| points.iter().map(|(_, spread)| spread));
    let scale = scale(spreads, bottom, top + 20.0);
    let across = |size: usize| LEFT + (WIDTH - 60.0 - LEFT) * (size as f64 / 12.0);
    title(picture, top, "Many at once: milliseconds until the last is attached");
    for mark in scale.marks() {
        let y = scale.at(mark);
        let _ = writeln!(
            picture,
            r##"<path d="M{LEFT} {y:.1}H{}" stroke="#d0d7de"/><text x="{}" y="{:.1}" text-anchor="end">{mark}</text>"##,
            WIDTH - 30.0,
            LEFT - 8.0,
            y + 4.0
        );
    }
    for size in BURSTS {
        let _ = writeln!(
            picture,
            r#"<text x="{:.1}" y="{}" text-anchor="middle">{size}</text>"#,
            across(size),
            bottom + 16.0
        );
    }
    for (n, ((title, points), colour)) in lines.iter().zip(COLOURS).enumerate() {
        let place = |(size, spread): &(usize, Spread)| (across(*size), scale.at(spread.median));
        let path: Vec<String> =
            points.iter().map(place).map(|(x, y)| format!("{x:.1} {y:.1}")).collect();
        let _ = writeln!(
            picture,
            r#"<path d="M{}" fill="none" stroke="{colour}" stroke-width="2"/>"#,
            path.join("L")
        );
        for (x, y) in points.iter().map(place) {
            let _ = writeln!(picture, r#"<circle cx="{x:.1}" cy="{y:.1}" r="3" fill="{colour}"/>"#);
        }
        let y = top + 40.0 + 22.0 * n as f64;
        let _ = writeln!(
            picture,
            r#"<circle cx="20" cy="{}" r="4" fill="{colour}"/><text x="28" y="{y}" font-size="11">{title}</text>"#,
            y - 4.0
        );
    }
    bottom
}

fn title(picture: &mut String, y: f64, text: &str) {
    let _ = writeln!(
        picture,
        r#"<text x="16" y="{y}" font-size="15" font-weight="bold">{text}</text>"#
    );
}
