//! The drawings of figures, as SVG: bars, stacked bars and lines.

use std::path::Path;

use plotters::coord::Shift;
use plotters::prelude::*;

use crate::Result;
use crate::spread::Spread;

/// What a figure shows.
#[derive(Debug)]
pub(crate) enum Drawing {
    /// One bar a line, on a logarithmic axis in `unit`.
    Bars {
        /// Unit of the axis.
        unit: String,
        /// From bottom to top.
        bars: Vec<Bar>,
    },
    /// One bar a line, made of parts, on a linear axis in `unit`.
    Stacks {
        /// Unit of the axis.
        unit: String,
        /// What the parts are called, in their order.
        parts: Vec<&'static str>,
        /// From bottom to top: label and the size of each part.
        stacks: Vec<(String, Vec<f64>)>,
    },
    /// One line a series, on logarithmic axes.
    Lines {
        /// What is across.
        across: String,
        /// What is up.
        up: String,
        /// Label and points.
        series: Vec<(String, Vec<(f64, Spread)>)>,
    },
}

/// A bar of the drawing: its label and its spread.
#[derive(Debug)]
pub(crate) struct Bar {
    pub(crate) label: String,
    pub(crate) spread: Spread,
}

impl Drawing {
    /// Writes it to `path` under `title`.
    ///
    /// # Errors
    /// If the file cannot be written, or there is nothing to draw.
    pub(crate) fn write(&self, path: &Path, title: &str) -> Result<()> {
        match self {
            Self::Bars { unit, bars } => draw_bars(path, title, unit, bars),
            Self::Stacks { unit, parts, stacks } => draw_stacks(path, title, unit, parts, stacks),
            Self::Lines { across, up, series } => draw_lines(path, title, [across, up], series),
        }
    }
}

fn nothing(title: &str) -> Box<dyn std::error::Error> {
    format!("figure {title} has nothing to draw, or something at or below zero on a logarithmic axis").into()
}

fn area(path: &Path, height: u32) -> Result<DrawingArea<SVGBackend<'_>, Shift>> {
    let area = SVGBackend::new(path, (WIDTH, height)).into_drawing_area();
    area.fill(&WHITE)?;
    Ok(area)
}

fn draw_bars(path: &Path, title: &str, unit: &str, bars: &[Bar]) -> Result<()> {
    let least = bars.iter().map(|bar| bar.spread.min).fold(f64::INFINITY, f64::min);
    let most = bars.iter().map(|bar| bar.spread.max).fold(0.0, f64::max);
    if bars.is_empty() || least <= 0.0 {
        return Err(nothing(title));
    }
    let area = area(path, 120 + 40 * u32::try_from(bars.len())?)?;
    let floor = least / 2.0;
    let mut chart = ChartBuilder::on(&area)
        .caption(format!("{title} ({unit}, median with least and greatest)"), ("sans-serif", 18))
        .margin(16)
        .x_label_area_size(36)
        .y_label_area_size(LABELS)
        .build_cartesian_2d(
            (floor..most * 1.5).log_scale(),
            (0..i32::try_from(bars.len())?).into_segmented(),
        )?;
    let label = |row: &SegmentValue<i32>| of_row(row, bars, |bar| bar.label.clone());
    chart
        .configure_mesh()
        .disable_y_mesh()
        .y_labels(bars.len() + 1)
        .y_label_formatter(&label)
        .x_desc(unit)
        .draw()?;
    for (row, bar) in (0..).zip(bars) {
        let Spread { median, min, max, .. } = bar.spread;
        let color = Palette99::pick(usize::try_from(row)?).mix(0.8);
        for (from, to, style, margin) in
            [(floor, median, color.filled(), 6), (min, max, BLACK.mix(0.35).filled(), 15)]
        {
            let corners = [(from, SegmentValue::Exact(row)), (to, SegmentValue::Exact(row + 1))];
            let mut rectangle = Rectangle::new(corners, style);
            rectangle.set_margin(margin, margin, 0, 0);
            chart.draw_series([rectangle])?;
        }
    }
    area.present()?;
    Ok(())
}

fn draw_stacks(
    path: &Path,
    title: &str,
    unit: &str,
    parts: &[&str],
    stacks: &[(String, Vec<f64>)],
) -> Result<()> {
    let most = stacks.iter().map(|(_, sizes)| sizes.iter().sum::<f64>()).fold(0.0, f64::max);
    if stacks.is_empty() || most <= 0.0 {
        return Err(nothing(title));
    }
    let area = area(path, 160 + 32 * u32::try_from(stacks.len())?)?;
    let mut chart = ChartBuilder::on(&area)
        .caption(format!("{title} ({unit}, medians by part)"), ("sans-serif", 18))
        .margin(16)
        .x_label_area_size(36)
        .y_label_area_size(LABELS)
        .build_cartesian_2d(0.0..most * 1.05, (0..i32::try_from(stacks.len())?).into_segmented())?;
    let label = |row: &SegmentValue<i32>| of_row(row, stacks, |stack| stack.0.clone());
    chart
        .configure_mesh()
        .disable_y_mesh()
        .y_labels(stacks.len() + 1)
        .y_label_formatter(&label)
        .x_desc(unit)
        .draw()?;
    for (part, name) in parts.iter().enumerate() {
        let color = Palette99::pick(part).mix(0.85);
        let rectangles = (0..).zip(stacks).map(|(row, (_, sizes))| {
            let from: f64 = sizes.iter().take(part).sum();
            let to = from + sizes.get(part).copied().unwrap_or(0.0);
            let corners = [(from, SegmentValue::Exact(row)), (to, SegmentValue::Exact(row + 1))];
            let mut rectangle = Rectangle::new(corners, color.filled());
            rectangle.set_margin(5, 5, 0, 0);
            rectangle
        });
        chart
            .draw_series(rectangles)?
            .label(*name)
            .legend(move |(x, y)| Rectangle::new([(x, y - 5), (x + 12, y + 5)], color.filled()));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::LowerRight)
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK.mix(0.3))
        .draw()?;
    area.present()?;
    Ok(())
}

fn draw_lines(
    path: &Path,
    title: &str,
    [across, up]: [&str; 2],
    series: &[(String, Vec<(f64, Spread)>)],
) -> Result<()> {
    let points = || series.iter().flat_map(|(_, points)| points);
    let least = points().map(|(x, spread)| x.min(spread.min)).fold(f64::INFINITY, f64::min);
    if points().next().is_none() || least <= 0.0 {
        return Err(nothing(title));
    }
    let range = |values: &mut dyn Iterator<Item = f64>| {
        let (least, most) =
            values.fold((f64::INFINITY, 0.0_f64), |(a, b), value| (a.min(value), b.max(value)));
        (least / 1.5..most * 1.5).log_scale()
    };
    let area = area(path, 520)?;
    let mut chart = ChartBuilder::on(&area)
        .caption(format!("{title} (medians with least and greatest)"), ("sans-serif", 18))
        .margin(16)
        .x_label_area_size(40)
        .y_label_area_size(70)
        .build_cartesian_2d(
            range(&mut points().map(|(x, _)| *x)),
            range(&mut points().flat_map(|(_, spread)| [spread.min, spread.max])),
        )?;
    chart.configure_mesh().x_desc(across).y_desc(up).draw()?;
    for (index, (label, points)) in series.iter().enumerate() {
        let color = Palette99::pick(index).to_rgba();
        let line: Vec<_> = points.iter().map(|(x, spread)| (*x, spread.median)).collect();
        chart
            .draw_series([PathElement::new(line, color.stroke_width(2))])?
            .label(label)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], color.stroke_width(2)));
        let whisker = |(x, spread): &(f64, Spread)| [(*x, spread.min), (*x, spread.max)];
        let whiskers = points.iter().map(|point| PathElement::new(whisker(point), color.stroke_width(4)));
        chart.draw_series(whiskers)?;
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK.mix(0.3))
        .draw()?;
    area.present()?;
    Ok(())
}

/// The label of a row of a chart whose rows are segments.
fn of_row<T>(row: &SegmentValue<i32>, rows: &[T], label: impl Fn(&T) -> String) -> String {
    let (SegmentValue::CenterOf(row) | SegmentValue::Exact(row)) = row else { return String::new() };
    usize::try_from(*row).ok().and_then(|row| rows.get(row)).map_or_else(String::new, label)
}

const WIDTH: u32 = 860;
/// Room for the labels of rows.
const LABELS: u32 = 300;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_drawing_is_drawn_and_nothing_is_an_error() {
        let path = std::env::temp_dir().join(format!("godwit-drawing-{}.svg", std::process::id()));
        let spread = Spread::of([1.0, 3.0]).unwrap();
        let drawings = [
            Drawing::Bars { unit: "ms".to_owned(), bars: vec![Bar { label: "one".to_owned(), spread }] },
            Drawing::Stacks {
                unit: "ms".to_owned(),
                parts: vec!["part"],
                stacks: vec![("one".to_owned(), vec![2.0])],
            },
            Drawing::Lines {
                across: "MB".to_owned(),
                up: "ms".to_owned(),
                series: vec![("one".to_owned(), vec![(1.0, spread), (2.0, spread)])],
            },
        ];
        for drawing in drawings {
            drawing.write(&path, "sample").unwrap();
            let svg = std::fs::read_to_string(&path).unwrap();
            assert!(svg.contains("one") && svg.contains("<svg"), "{svg}");
        }
        std::fs::remove_file(&path).unwrap();
        assert!(Drawing::Bars { unit: String::new(), bars: Vec::new() }.write(&path, "none").is_err());
    }
}
