//! The table.

use std::{fmt, time::Duration};

use crate::samples::Budget;

/// What a figure is held against.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Target {
    /// Told, and held against nothing.
    None,
    /// The ratio shall be at most this.
    RatioAtMost(f64),
    /// Our own figure shall be at least this.
    AtLeast(f64),
}

/// One line of the table.
#[derive(Debug)]
pub(crate) struct Row {
    pub(crate) what: String,
    /// The raw client's figure and ours; the former only where there is one.
    pub(crate) raw: Option<Figure>,
    pub(crate) ours: Figure,
    /// How many times worse ours is, with the quarter and three-quarter marks over the pairs of blocks.
    pub(crate) ratio: Option<(f64, Option<(f64, f64)>)>,
    pub(crate) target: Target,
}

/// A time, or how often something happens in a second.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Figure {
    Time(Duration),
    Rate(f64),
}

impl fmt::Display for Figure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = match self {
            Self::Time(time) if *time < Duration::from_micros(10) => format!("{} ns", time.as_nanos()),
            Self::Time(time) if *time < Duration::from_millis(10) => format!("{} µs", time.as_micros()),
            Self::Time(time) => format!("{:.1} ms", time.as_secs_f64() * 1e3),
            Self::Rate(rate) => format!("{}/s", thousands(*rate)),
        };
        f.pad(&text)
    }
}

fn thousands(number: f64) -> String {
    let digits = format!("{number:.0}");
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i) % 3 == 0 {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

impl Row {
    fn verdict(&self) -> (String, &'static str) {
        let word = |met| if met { "met" } else { "missed" };
        match (self.target, self.ratio, self.ours) {
            (Target::RatioAtMost(limit), Some((ratio, _)), _) => (format!("≤ {limit}"), word(ratio <= limit)),
            (Target::AtLeast(limit), _, Figure::Rate(rate)) => {
                (format!("≥ {}/s", thousands(limit)), word(rate >= limit))
            }
            _ => (String::new(), ""),
        }
    }
}

/// What was measured of one backend.
#[derive(Debug)]
pub(crate) struct Report {
    pub(crate) title: String,
    /// What the columns of the two sides are called.
    pub(crate) sides: (&'static str, &'static str),
    pub(crate) rows: Vec<Row>,
    pub(crate) notes: Vec<String>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (left, right) = self.sides;
        let title = &self.title;
        writeln!(f, "\n{title:<44} {left:>12} {right:>12}   ratio (middle half)   target")?;
        for row in &self.rows {
            let raw = row.raw.map_or(String::new(), |raw| raw.to_string());
            let ratio = row.ratio.map_or(String::new(), |(ratio, spread)| {
                let spread = spread.map_or(String::new(), |(low, high)| format!(" ({low:.2}–{high:.2})"));
                format!("{ratio:.2}{spread}")
            });
            let (target, verdict) = row.verdict();
            let line = format!("  {:<42} {raw:>12} {:>12}   {ratio:<19}   {target:<13} {verdict}", row.what, row.ours);
            writeln!(f, "{}", line.trim_end())?;
        }
        for note in &self.notes {
            writeln!(f, "  {note}")?;
        }
        Ok(())
    }
}

/// Says what the figures stand on.
pub(crate) fn headline(budget: &Budget) {
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let load = std::fs::read_to_string("/proc/loadavg").ok();
    let load = load.and_then(|text| text.split_whitespace().next()?.parse::<f64>().ok());
    println!("quorate beside raw clients: one server each on loopback, {cpus} CPUs shared by server and clients");
    let latency = budget.latency;
    println!("release profile; both sides take turns in blocks, {latency:?} for each measure");
    if let Some(load) = load.filter(|load| *load > 0.5) {
        println!("the machine is busy with something else (load {load:.1}): these figures are rough");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(target: Target, ratio: f64, rate: f64) -> Row {
        Row { what: "x".into(), raw: None, ours: Figure::Rate(rate), ratio: Some((ratio, None)), target }
    }

    #[test]
    fn a_target_is_met_exactly_up_to_its_limit() {
        assert_eq!(row(Target::RatioAtMost(1.15), 1.15, 0.0).verdict().1, "met");
        assert_eq!(row(Target::RatioAtMost(1.15), 1.16, 0.0).verdict().1, "missed");
        assert_eq!(row(Target::AtLeast(640.0), 0.0, 640.0).verdict().1, "met");
        assert_eq!(row(Target::AtLeast(640.0), 0.0, 639.0).verdict().1, "missed");
        assert_eq!(row(Target::None, 9.0, 0.0).verdict().1, "");
    }

    #[test]
    fn figures_are_readable() {
        assert_eq!(Figure::Rate(1_234_567.2).to_string(), "1,234,567/s");
        assert_eq!(Figure::Rate(999.0).to_string(), "999/s");
        assert_eq!(Figure::Time(Duration::from_nanos(1450)).to_string(), "1450 ns");
        assert_eq!(Figure::Time(Duration::from_micros(1450)).to_string(), "1450 µs");
        assert_eq!(Figure::Time(Duration::from_micros(80_000)).to_string(), "80.0 ms");
    }
}
