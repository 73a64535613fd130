//! Plots as SVG.

use std::path::Path;

use plotters::coord::ranged1d::{AsRangedCoord, ValueFormatter};
use plotters::prelude::*;
use setu_core::{Error, Result};

/// Colours that differ for every kind of eye (Okabe and Ito, 2008).
const COLORS: [RGBColor; 6] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
];
const SIZE: (u32, u32) = (820, 420);

/// How a series is drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    Line,
    /// A line with its points marked.
    Marked,
    /// A limit that others are held to.
    Dashed,
}

/// Where the names of the series stand.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Legend {
    #[default]
    UpperLeft,
    UpperRight,
    MiddleRight,
    LowerLeft,
    LowerRight,
}

/// Named points.
#[derive(Clone, Debug)]
pub struct Series {
    pub name: String,
    pub style: Style,
    /// Index of its colour.
    pub color: usize,
    pub points: Vec<(f64, f64)>,
}

/// A chart of lines.
#[derive(Clone, Debug, Default)]
pub struct Chart {
    pub title: String,
    pub x: String,
    pub y: String,
    pub log_x: bool,
    pub log_y: bool,
    /// Highest y shown; fitted to the points if there is none.
    pub most_y: Option<f64>,
    pub legend: Legend,
    pub series: Vec<Series>,
}

impl Chart {
    pub fn new(title: &str, x: &str, y: &str) -> Chart {
        Chart { title: title.to_owned(), x: x.to_owned(), y: y.to_owned(), ..Chart::default() }
    }

    /// Adds a series in the next colour.
    pub fn add(&mut self, name: impl Into<String>, style: Style, points: Vec<(f64, f64)>) {
        let color = self.series.len();
        self.series.push(Series { name: name.into(), style, color, points });
    }

    /// A horizontal limit, over as much of x as the series so far.
    pub fn limit(&mut self, name: impl Into<String>, y: f64) {
        let (low, high) = range(self.series.iter().flat_map(|series| series.points.iter().map(|point| point.0)));
        self.add(name, Style::Dashed, vec![(low, y), (high, y)]);
    }

    /// Writes the chart.
    ///
    /// # Errors
    /// The file can't be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        let all = || self.series.iter().flat_map(|series| &series.points);
        let x = range(all().map(|point| point.0));
        let (low, high) = range(all().map(|point| point.1));
        let high = self.most_y.unwrap_or(if self.log_y { high * 1.3 } else { high + 0.06 * (high - low) });
        // A linear axis shows zero where it isn't far.
        let low = match self.log_y {
            true => low / 1.3,
            false if low > 0.0 && low < 0.5 * high => 0.0,
            false => low - 0.03 * (high - low).max(f64::MIN_POSITIVE),
        };
        let drawn = match (self.log_x, self.log_y) {
            (false, false) => self.draw(path, x.0..x.1, low..high),
            (true, false) => self.draw(path, (x.0..x.1).log_scale(), low..high),
            (false, true) => self.draw(path, x.0..x.1, (low..high).log_scale()),
            (true, true) => self.draw(path, (x.0..x.1).log_scale(), (low..high).log_scale()),
        };
        drawn.map_err(|error| Error::internal(format!("{} can't be drawn: {error}", path.display())))
    }

    fn draw<X, Y>(&self, path: &Path, x: X, y: Y) -> std::result::Result<(), Box<dyn std::error::Error>>
    where
        X: AsRangedCoord<Value = f64>,
        Y: AsRangedCoord<Value = f64>,
        X::CoordDescType: ValueFormatter<f64>,
        Y::CoordDescType: ValueFormatter<f64>,
    {
        let root = SVGBackend::new(path, SIZE).into_drawing_area();
        root.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(&root)
            .caption(&self.title, ("sans-serif", 18))
            .margin(12)
            .x_label_area_size(44)
            .y_label_area_size(72)
            .build_cartesian_2d(x, y)?;
        chart
            .configure_mesh()
            .x_desc(&self.x)
            .y_desc(&self.y)
            .x_label_formatter(&|value| shown(*value))
            .y_label_formatter(&|value| shown(*value))
            .light_line_style(TRANSPARENT)
            .label_style(("sans-serif", 13))
            .draw()?;
        for series in &self.series {
            let color = COLORS[series.color % COLORS.len()];
            let points = series.points.iter().copied();
            let drawn = match series.style {
                Style::Dashed => {
                    let line = DashedLineSeries::new(points, 7, 5, color.stroke_width(2));
                    chart.draw_series(line)?
                }
                _ => chart.draw_series(LineSeries::new(points, color.stroke_width(2)))?,
            };
            drawn
                .label(&series.name)
                .legend(move |(x, y)| PathElement::new(vec![(x, y), (x + 20, y)], color.stroke_width(3)));
            if series.style == Style::Marked {
                let marks = series.points.iter().map(|&point| Circle::new(point, 4, color.filled()));
                chart.draw_series(marks)?;
            }
        }
        chart
            .configure_series_labels()
            .background_style(WHITE.mix(0.85))
            .border_style(BLACK.mix(0.3))
            .label_font(("sans-serif", 13))
            .position(match self.legend {
                Legend::UpperLeft => SeriesLabelPosition::UpperLeft,
                Legend::UpperRight => SeriesLabelPosition::UpperRight,
                Legend::MiddleRight => SeriesLabelPosition::MiddleRight,
                Legend::LowerLeft => SeriesLabelPosition::LowerLeft,
                Legend::LowerRight => SeriesLabelPosition::LowerRight,
            })
            .draw()?;
        root.present()?;
        Ok(())
    }
}

/// A step function through many points as few: at most `most` of them, evenly chosen, the last included.
pub fn thinned(points: &[(f64, f64)], most: usize) -> Vec<(f64, f64)> {
    let step = points.len().div_ceil(most.max(1)).max(1);
    let last = points.last().filter(|_| points.len() % step != 1);
    points.iter().step_by(step).chain(last).copied().collect()
}

fn range(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let finite = values.filter(|value| value.is_finite());
    let (low, high) = finite.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| (low.min(v), high.max(v)));
    if low < high { (low, high) } else { (0.0, high.max(1.0)) }
}

/// A number without more digits than a label needs.
fn shown(value: f64) -> String {
    let size = value.abs();
    if size >= 1e6 {
        format!("{} M", value / 1e6)
    } else if size >= 1e3 {
        format!("{} k", value / 1e3)
    } else if size >= 10.0 || size == 0.0 {
        format!("{value:.0}")
    } else {
        let text = format!("{value:.3}");
        text.trim_end_matches('0').trim_end_matches('.').to_owned()
    }
}
