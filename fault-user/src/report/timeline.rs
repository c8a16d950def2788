//! The timeline of a run: when its rules were active, how its probes went, and where an expectation broke.

use std::collections::BTreeSet;

use maud::{Markup, html};

use super::chart::{Canvas, GAP, RULE, Size, lines, marks, number, real, seconds, short};
use super::file::{ProbeReport, Report};

/// The picture.
#[must_use]
pub fn picture(report: &Report, size: Size) -> Markup {
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
