//! The timeline of a run: when its rules were active, how its probes went, and where an expectation broke.

use std::collections::BTreeSet;

use maud::{Markup, html};

use super::chart::{Canvas, GAP, RULE, Size, lines, marks, number, real, seconds, short};
use super::file::{ProbeReport, RunReport};

/// The picture.
#[must_use]
pub fn picture(report: &RunReport, size: Size) -> Markup {
    let marks = marks(report, |_| true);
    let rules = lines(report.rules.iter());
    let head = if marks.is_empty() { 0.0 } else { RULE };
    let below_rules = head + RULE * number(rules.len());
    let bottom = below_rules + RULE * number(report.probes.len());
    let canvas = Canvas::new(size, report.length_ms, bottom);
    html! {
        svg class=(size.class) viewBox={ "0 0 " (size.width()) " " (bottom + GAP) } role="img"
            aria-label="When the rules were active, the probes, and where an expectation broke" {
            @for (line, rule) in rules.iter().enumerate() {
                (canvas.windows(rule, head + RULE * number(line), None))
            }
            @for (line, probe) in report.probes.iter().enumerate() {
                (tries(&canvas, probe, below_rules + RULE * number(line)))
            }
            (canvas.axis(bottom + 6.0))
            (canvas.marks(&marks, bottom + 6.0))
        }
    }
}

/// One line of a picture of what happened when.
#[derive(Clone, Debug)]
pub struct Row {
    /// What it is about.
    pub name: String,
    /// What happened.
    pub spans: Vec<Span>,
}

/// Something that lasted.
#[derive(Clone, Debug)]
pub struct Span {
    /// Its start, in milliseconds.
    pub from_ms: f64,
    /// Its end, in milliseconds.
    pub to_ms: f64,
    /// The class of its bar: `good`, `odd`, `bad`, or `bar` for a fault.
    pub class: &'static str,
    /// What it was.
    pub title: String,
}

/// The picture of these rows.
#[must_use]
pub fn of_rows(rows: &[Row], length_ms: u64, size: Size) -> Markup {
    const ROW: f64 = 30.0;
    /// So wide is a bar at least.
    const LEAST: f64 = 2.0;
    let bottom = ROW * number(rows.len());
    let canvas = Canvas::new(size, length_ms, bottom);
    html! {
        svg class=(size.class) viewBox={ "0 0 " (size.width()) " " (bottom + GAP) } role="img"
            aria-label="When the fault acted, and the connections" {
            @for (line, row) in rows.iter().enumerate() {
                @let top = ROW * number(line);
                (canvas.text(&row.name, canvas.x(0.0), top + 11.0))
                @for span in &row.spans {
                    @let (from, to) = (canvas.x(span.from_ms), canvas.x(span.to_ms));
                    rect class=(span.class) x=(short(from)) y=(short(top + 15.0)) height="8"
                        width=(short((to - from).max(LEAST))) {
                        title { (span.title) }
                    }
                }
            }
            (canvas.axis(bottom + 6.0))
        }
    }
}

/// The line of a probe: a dot for each try. Dots of the same result that would lie on each other are one.
fn tries(canvas: &Canvas, probe: &ProbeReport, top: f64) -> Markup {
    let mut taken = BTreeSet::new();
    // Failed ones are drawn over the others.
    let mut sorted: Vec<_> = probe.tries.iter().collect();
    sorted.sort_by_key(|one| one.complaint.is_some());
    html! {
        @for one in sorted {
            @let (x, failed) = (canvas.x(real(one.at_ms)), one.complaint.is_some());
            @if taken.insert((short((x / 3.0).round()), failed)) {
                circle.probe.good[!failed].bad[failed] cx=(short(x)) cy=(short(top + 15.5)) r="2.6" {
                    title {
                        (probe.name) " at " (seconds(real(one.at_ms))) ": "
                        (one.complaint.as_deref().unwrap_or("held"))
                    }
                }
            }
        }
        (canvas.text(&format!("probe {}", probe.name), canvas.x(0.0), top + 11.0))
    }
}
