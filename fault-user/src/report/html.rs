//! `report.html`: one file that explains itself, without a network: timelines with the fault windows drawn in.

use maud::{DOCTYPE, Markup, PreEscaped, html};

use super::file::{Report, RuleReport, Sample};
use super::summary::human_bytes;

/// Size of a picture in its own units.
const WIDTH: u64 = 880;
const HEIGHT: u64 = 120;

const STYLE: &str = "
:root { color-scheme: light dark; --ink: #1a1a1a; --paper: #fff; --dim: #6b7280; --line: #2563eb; --hit: #dc2626;
  --window: #fca5a533; --edge: #e5e7eb; --good: #15803d; --bad: #b91c1c; }
@media (prefers-color-scheme: dark) { :root { --ink: #e5e7eb; --paper: #111827; --dim: #9ca3af; --line: #60a5fa;
  --hit: #f87171; --window: #f8717133; --edge: #374151; --good: #4ade80; --bad: #f87171; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 960px;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
code, pre { font: 13px ui-monospace, monospace; } pre { overflow-x: auto; padding: .7rem; border: 1px solid var(--edge); }
table { border-collapse: collapse; width: 100%; } th, td { text-align: left; padding: .3rem .6rem;
  border-bottom: 1px solid var(--edge); vertical-align: top; } td.n, th.n { text-align: right; white-space: nowrap; }
th { color: var(--dim); font-weight: 500; } .good { color: var(--good); } .bad { color: var(--bad); }
.dim { color: var(--dim); } svg { width: 100%; height: auto; display: block; } figure { margin: 0 0 1.2rem; }
figcaption { margin-bottom: .2rem; } svg text { fill: var(--dim); font: 11px system-ui, sans-serif; }
";

/// The whole file.
#[must_use]
pub fn render(report: &Report) -> String {
    let title = format!("fault: {}", report.command.join(" "));
    html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width";
                title { (title) }
                style { (PreEscaped(STYLE)) }
            }
            body {
                h1 { code { (report.command.join(" ")) } " " (mark(report.is_good(), "passed", "failed")) }
                p {
                    "Under " (report.rules.len()) " rules for " (seconds(report.length_ms)) ", seed " (report.seed)
                    ", Linux " (report.kernel) ". The command ended with " (report.command_exit)
                    ", fault with " (report.exit) "."
                }
                @if !report.expectations.is_empty() {
                    h2 { "Expectations" }
                    table { @for expectation in &report.expectations {
                        tr { td { (mark(expectation.holds, "holds", "failed")) } td { (expectation.text) } }
                    } }
                }
                h2 { "Rules" }
                (rules(report))
                h2 { "Over time" }
                p.dim { "Blue: what the rule saw, per second. Red: what it did. Shaded: when it acted." }
                @for (index, rule) in report.rules.iter().enumerate() { (picture(report, index, rule)) }
                @if !report.connects.is_empty() {
                    h2 { "Connects" }
                    p.dim {
                        "A dot is a connect of the application: how long until it was answered. Blue: by a connection. Red: by an \
                         error, or (at the top) not at all."
                    }
                    @for name in targets(report) { (connects(report, name)) }
                }
                h2 { "Again" }
                p { "The same draws for the same traffic:" }
                pre { (report.again.join(" ")) }
                p { "Exactly the decisions of this run:" }
                pre { "sudo fault replay REPORT -- " (report.command.join(" ")) }
            }
        }
    }
    .into_string()
}

fn mark(good: bool, yes: &str, no: &str) -> Markup {
    html! { span class=(if good { "good" } else { "bad" }) { (if good { yes } else { no }) } }
}

fn rules(report: &Report) -> Markup {
    html! {
        table {
            tr { th { "rule" } th.n { "seen" } th.n { "hit" } th.n { "connections" } th { "by" } th {} }
            @for rule in &report.rules {
                tr {
                    td { code { (rule.rule) } }
                    td.n { (rule.seen.packets) @if rule.seen.bytes != 0 { br; span.dim { (human_bytes(rule.seen.bytes)) } } }
                    td.n { (rule.hit.packets) @if rule.hit.bytes != 0 { br; span.dim { (human_bytes(rule.hit.bytes)) } } }
                    td.n { (rule.connections) }
                    td { (rule.mechanism) }
                    td { (mark(rule.fired, "fired", "never fired")) }
                }
            }
        }
    }
}

/// The rates between two samples: bytes, hits and connections per second.
fn rates(samples: &[Sample], index: usize, of: fn(&Sample) -> &Vec<u64>) -> Vec<(u64, f64)> {
    samples
        .windows(2)
        .map(|pair| {
            let value = |sample: &Sample| of(sample).get(index).copied().unwrap_or(0);
            let more = value(&pair[1]).saturating_sub(value(&pair[0]));
            let ms = pair[1].at_ms.saturating_sub(pair[0].at_ms).max(1);
            #[expect(clippy::cast_precision_loss, reason = "a picture")]
            let rate = more as f64 * 1000.0 / ms as f64;
            (pair[1].at_ms, rate)
        })
        .collect()
}

fn picture(report: &Report, index: usize, rule: &RuleReport) -> Markup {
    let is_stream = rule.seen.bytes == 0;
    let seen = rates(&report.samples, index, |sample| &sample.seen_bytes);
    let connections = rates(&report.samples, index, |sample| &sample.connections);
    let hits = rates(&report.samples, index, |sample| &sample.hits);
    let (seen, unit) = if is_stream {
        (connections, "connections/s")
    } else {
        (seen, "bytes/s")
    };
    let most = |points: &[(u64, f64)]| points.iter().map(|point| point.1).fold(0.0, f64::max);
    html! {
        figure {
            figcaption {
                code { (rule.rule) } " "
                span.dim { "at most " (rounded(most(&seen))) " " (unit) ", " (rounded(most(&hits))) " hits/s" }
            }
            svg viewBox={ "0 0 " (WIDTH) " " (HEIGHT + 16) } role="img" {
                @for (from, to) in &rule.windows_ms {
                    @let x = across(*from, report.length_ms);
                    rect x=(x) y="0" width=(across(*to, report.length_ms).saturating_sub(x).max(1)) height=(HEIGHT)
                        fill="var(--window)" {}
                }
                line x1="0" y1=(HEIGHT) x2=(WIDTH) y2=(HEIGHT) stroke="var(--edge)" {}
                polyline fill="none" stroke="var(--line)" stroke-width="1.5" points=(line(&seen, report.length_ms)) {}
                polyline fill="none" stroke="var(--hit)" stroke-width="1.5" points=(line(&hits, report.length_ms)) {}
                text x="0" y=(HEIGHT + 13) { "0 s" }
                text x=(WIDTH) y=(HEIGHT + 13) text-anchor="end" { (seconds(report.length_ms)) }
            }
        }
    }
}

/// The targets that were connected to, each once.
fn targets(report: &Report) -> Vec<&str> {
    let mut names: Vec<_> = report
        .connects
        .iter()
        .map(|connect| connect.target.as_str())
        .collect();
    names.sort_unstable();
    names.dedup();
    names
}

/// Connection latency over time, with the windows of the target's faults.
fn connects(report: &Report, name: &str) -> Markup {
    let of_target = || report.connects.iter().filter(|one| one.target == name);
    let slowest = of_target().filter_map(|one| one.took_us).max();
    let (slowest, count) = (slowest.unwrap_or(0).max(1), of_target().count());
    let windows = report.rules.iter().filter(|rule| rule.target == name);
    html! {
        figure {
            figcaption {
                code { (name) } " "
                span.dim { (count) " connects, answered in at most " (slowest / 1000) "." (slowest % 1000 / 100) " ms" }
            }
            svg viewBox={ "0 0 " (WIDTH) " " (HEIGHT + 16) } role="img" {
                @for (from, to) in windows.flat_map(|rule| &rule.windows_ms) {
                    @let x = across(*from, report.length_ms);
                    rect x=(x) y="0" width=(across(*to, report.length_ms).saturating_sub(x).max(1)) height=(HEIGHT)
                        fill="var(--window)" {}
                }
                line x1="0" y1=(HEIGHT) x2=(WIDTH) y2=(HEIGHT) stroke="var(--edge)" {}
                @for one in of_target() {
                    @let took = one.took_us.unwrap_or(slowest).min(slowest);
                    circle cx=(across(one.at_us / 1000, report.length_ms)) cy=(HEIGHT - took * (HEIGHT - 6) / slowest)
                        r="2.5" fill=(if one.connected { "var(--line)" } else { "var(--hit)" }) {}
                }
                text x="0" y=(HEIGHT + 13) { "0 s" }
                text x=(WIDTH) y=(HEIGHT + 13) text-anchor="end" { (seconds(report.length_ms)) }
            }
        }
    }
}

fn across(ms: u64, length_ms: u64) -> u64 {
    ms.min(length_ms) * WIDTH / length_ms.max(1)
}

/// The points of a line, scaled to the picture's height.
fn line(points: &[(u64, f64)], length_ms: u64) -> String {
    let most = points.iter().map(|point| point.1).fold(1.0, f64::max);
    let text: Vec<String> = points
        .iter()
        .map(|&(at_ms, value)| {
            #[expect(clippy::cast_precision_loss, reason = "a picture of 120 units")]
            let y = HEIGHT as f64 * (1.0 - 0.95 * value / most);
            format!("{},{y:.1}", across(at_ms, length_ms))
        })
        .collect();
    text.join(" ")
}

fn rounded(value: f64) -> String {
    match value {
        value if value >= 1e9 => format!("{:.1} G", value / 1e9),
        value if value >= 1e6 => format!("{:.1} M", value / 1e6),
        value if value >= 1e3 => format!("{:.1} k", value / 1e3),
        value => format!("{value:.0}"),
    }
}

fn seconds(ms: u64) -> String {
    format!("{}.{} s", ms / 1000, ms % 1000 / 100)
}
