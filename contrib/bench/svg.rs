//! The picture: how long one device takes, and how long many at once.

use crate::race::BURSTS;
use crate::report::{CONTENDERS, Spread, describe};
use plotters::coord::Shift;
use plotters::coord::combinators::WithKeyPoints;
use plotters::prelude::*;
use serde_json::Value;
use std::error::Error;

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Chart<'a, C> = ChartContext<'a, SVGBackend<'a>, C>;
type Drawn = Result<(), Box<dyn Error>>;

/// The height of a row, in parts.
const ROW: usize = 10;

/// What is measured, what it is called, its colour, and its place in a row.
const WAYS: [(&str, &str, u32, usize); 2] =
    [("plug", "plug to attached", 0x1f6feb, 3), ("pull", "pull to gone", 0xd1700f, 7)];
const COLOURS: [u32; 6] = [0x6e7781, 0x8250df, 0x1a7f37, 0x1f6feb, 0xd1700f, 0xa40e26];

const TITLE: (&str, u32, FontStyle) = ("sans-serif", 18, FontStyle::Bold);
const TEXT: (&str, u32) = ("sans-serif", 15);

pub fn draw(results: &Value) -> String {
    let mut picture = String::new();
    let area = SVGBackend::with_string(&mut picture, (880, 660)).into_drawing_area();
    draw_on(&area, results).expect("it is drawn in memory");
    drop(area);
    picture
}

fn draw_on(area: &Area, results: &Value) -> Drawn {
    area.fill(&WHITE)?;
    let (alone_area, rest) = area.split_vertically(300);
    let (bursts_area, note) = rest.split_vertically(315);
    alone(&alone_area, &results["race"]["alone"])?;
    bursts(&bursts_area, &results["race"]["bursts"])?;
    // The machine, and the one in it.
    for (n, line) in (0..).zip(describe(results).split("; ")) {
        note.draw_text(line, &("sans-serif", 12).into_text_style(&note), (16, 14 * n))?;
    }
    Ok(area.present()?)
}

/// A logarithmic scale that fits all of these, from one mark to another.
fn scale(spreads: impl Iterator<Item = Spread>) -> WithKeyPoints<LogCoord<f64>> {
    let (least, most) = spreads
        .fold((1e5, 1.0), |(least, most), spread| (spread.least.min(least), spread.most.max(most)));
    let marks = (0..6).flat_map(|power| [1.0, 2.0, 5.0].map(|n| n * 10f64.powi(power)));
    let marks: Vec<f64> = marks.collect();
    let below = marks.iter().rposition(|mark| *mark <= least.min(most)).unwrap_or_default();
    let above = marks.iter().position(|mark| *mark >= most).unwrap_or(marks.len() - 1);
    let marks = marks[below..=above].to_vec();
    (marks[0]..marks[marks.len() - 1]).log_scale().with_key_points(marks)
}

fn ink(colour: u32) -> ShapeStyle {
    let [_, red, green, blue] = colour.to_be_bytes();
    RGBColor(red, green, blue).filled().stroke_width(2)
}

fn alone(area: &Area, race: &Value) -> Drawn {
    let time = |name: &str, way: &str| Spread::of(&race[name][way]);
    let rows = CONTENDERS.into_iter().filter(|(name, _)| time(name, "plug").is_some());
    let rows: Vec<(&str, &str)> = rows.collect();
    let both = |(name, _): &(&str, &str)| WAYS.map(|(way, ..)| time(name, way));
    let middles = (0..rows.len()).map(|row| row * ROW + ROW / 2).collect();
    let mut chart = ChartBuilder::on(area)
        .caption("One device: milliseconds from the kernel's event", TITLE)
        .margin(16)
        .x_label_area_size(20)
        .y_label_area_size(290)
        .build_cartesian_2d(
            scale(rows.iter().flat_map(both).flatten()),
            // The first row is at the top.
            (rows.len() * ROW..0).with_key_points(middles),
        )?;
    chart
        .configure_mesh()
        .set_all_tick_mark_size(4)
        .label_style(TEXT)
        .x_label_formatter(&f64::to_string)
        .y_label_formatter(&|y| rows[*y / ROW].1.to_owned())
        .draw()?;
    for (way, title, colour, place) in WAYS {
        let bars = rows.iter().enumerate().filter_map(|(row, (name, _))| {
            let (y, Spread { median, least, most }) = (row * ROW + place, time(name, way)?);
            Some(ErrorBar::new_horizontal(y, least, median, most, ink(colour), 8))
        });
        let legend = move |at| Circle::new(at, 4, ink(colour));
        chart.draw_series(bars)?.label(title).legend(legend);
    }
    // Those that take long are at the bottom.
    legend(&mut chart, SeriesLabelPosition::LowerLeft)
}

fn bursts(area: &Area, race: &Value) -> Drawn {
    let points = |name: &str| -> Vec<(usize, Spread)> {
        let time = |size: usize| Some((size, Spread::of(&race[name][size.to_string()]["plug"])?));
        BURSTS.into_iter().filter_map(time).collect()
    };
    let lines = CONTENDERS.map(|(name, title)| (title, points(name)));
    let spreads = lines.iter().flat_map(|(_, points)| points).map(|(_, spread)| *spread);
    let mut chart = ChartBuilder::on(area)
        .caption("Many at once: milliseconds until the last is attached", TITLE)
        .margin(16)
        .x_label_area_size(20)
        .y_label_area_size(60)
        .build_cartesian_2d((0..13usize).with_key_points(BURSTS.to_vec()), scale(spreads))?;
    chart
        .configure_mesh()
        .set_all_tick_mark_size(4)
        .label_style(TEXT)
        .y_label_formatter(&f64::to_string)
        .draw()?;
    let lines = lines.iter().filter(|(_, points)| !points.is_empty());
    for ((title, points), colour) in lines.zip(COLOURS) {
        let medians = points.iter().map(|(size, spread)| (*size, spread.median));
        let line = LineSeries::new(medians, ink(colour)).point_size(3);
        let legend = move |at| Circle::new(at, 4, ink(colour));
        chart.draw_series(line)?.label(*title).legend(legend);
    }
    legend(&mut chart, SeriesLabelPosition::LowerRight)
}

/// Says which colour is whose.
fn legend<C: CoordTranslate>(chart: &mut Chart<C>, at: SeriesLabelPosition) -> Drawn {
    let mut legend = chart.configure_series_labels();
    legend.position(at).legend_area_size(10).label_font(TEXT).background_style(WHITE);
    Ok(legend.draw()?)
}
