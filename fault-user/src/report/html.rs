//! `report.html`: a self-contained report.

use std::time::{Duration, UNIX_EPOCH};

use fault_common::abi::MATCHES_MAX;
use maud::{DOCTYPE, Markup, PreEscaped, html};

use super::chart::{self, SIZES, seconds};
use super::file::{RuleReport, RunReport, shell_line};
use super::fold::{Folded, fold};
use super::summary::{counted, human_bytes};
use super::timeline;

const STYLE: &str = "
:root { color-scheme: light dark; --ink: #1f2328; --paper: #fff; --card: #f6f8fa; --dim: #59636e; --edge: #d1d9e0;
  --line: #0969da; --area: #0969da26; --good: #1a7f37; --bad: #cf222e; --odd: #bc4c00; --broke: #8250df; --fault: #bf8700;
  --window: #d4a72c1f; --badpaper: #ffebe9; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --paper: #0d1117; --card: #151b23; --dim: #9198a1;
  --edge: #3d444d; --line: #4493f8; --area: #4493f833; --good: #3fb950; --bad: #f85149; --odd: #f0883e; --broke: #a371f7;
  --fault: #d29922; --window: #d2992224; --badpaper: #f851491a; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 980px;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.25rem; margin: 0 0 .3rem; font-weight: 600; } h1 code { font-size: 1.05rem; overflow-wrap: anywhere; }
h2 { font-size: 1.05rem; margin: 2rem 0 .6rem; } h3 { font-size: 1rem; margin: 0; }
code, pre { font-family: ui-monospace, SFMono-Regular, Menlo, monospace; font-size: 13px; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; padding: .7rem .9rem; border: 1px solid var(--edge);
  border-radius: 6px; background: var(--card); margin: .3rem 0 1rem; }
details pre { max-height: 24rem; overflow-y: auto; }
.badge { display: inline-block; font-size: .8rem; font-weight: 600; color: #fff; padding: .1rem .6rem;
  border-radius: 1rem; margin-right: .6rem; vertical-align: 2px; }
.dim { color: var(--dim); } p { margin: .3rem 0; } .good { color: var(--good); } .bad { color: var(--bad); }
.badge.good, .badge.bad { color: #fff; background: #1a7f37; } .badge.bad { background: #cf222e; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .35rem .6rem; border-bottom: 1px solid var(--edge); vertical-align: top; }
th { color: var(--dim); font-weight: 500; font-size: .85rem; } td.n, th.n { text-align: right; white-space: nowrap; }
tr.failed td { background: var(--badpaper); } td.mark { width: 1.5rem; font-weight: 600; }
figure { margin: 0 0 1rem; padding: .8rem 1rem .6rem; border: 1px solid var(--edge); border-radius: 6px; }
figcaption { margin-bottom: .6rem; } figcaption .dim { font-size: .9rem; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; font-size: .9rem; color: var(--dim); margin-bottom: .8rem; }
.legend i { display: inline-block; width: .7rem; height: .7rem; border-radius: 2px; margin-right: .4rem; }
svg { width: 100%; height: auto; display: block; } svg text { fill: var(--dim); font: 11px system-ui, sans-serif; }
svg text.name { fill: var(--ink); font-weight: 600; } svg text.rule { fill: var(--ink); font: 11px ui-monospace, monospace; }
.grid { stroke: var(--edge); stroke-width: .7; } .tick { stroke: var(--dim); } .area { fill: var(--area); }
.line { fill: none; stroke: var(--line); stroke-width: 1.5; stroke-linejoin: round; }
.window { fill: var(--window); } .bar { fill: var(--fault); } rect.good, circle.good { fill: var(--line); }
rect.bad, circle.bad { fill: var(--bad); } rect.odd { fill: var(--odd); }
line.broke { stroke: var(--broke); stroke-width: 1.5; stroke-dasharray: 4 2; }
svg text.broke { fill: var(--broke); font-weight: 600; } svg.narrow { display: none; }
@media (max-width: 640px) {
  body { margin: 1rem auto; padding: 0 .6rem; } figure { padding: .6rem .4rem; } svg.wide { display: none; }
  svg.narrow { display: block; } .cards, .cards tbody, .cards tr, .cards td { display: block; width: auto; }
  .cards tr:has(th) { display: none; } .cards tr { border-bottom: 1px solid var(--edge); padding: .5rem .4rem; position: relative; }
  .cards td { border: 0; padding: .1rem 0 .1rem 1.5rem; text-align: left !important; overflow-wrap: anywhere; }
  .cards td.mark { position: absolute; left: .3rem; padding: .1rem 0; width: auto; } .cards td:empty { display: none; }
  .cards td[data-label]::before { content: attr(data-label) ' '; color: var(--dim); font-size: .85rem; }
  .cards td br { display: none; } .cards td br + .dim { margin-left: .4rem; } .cards tr.failed { background: var(--badpaper); }
  .cards tr.failed td { background: none; } .cards td.n { display: inline-block; }
}
";

/// The whole file of a run.
#[must_use]
pub fn render(report: &RunReport) -> String {
    let title = format!(
        "{} fault: {}",
        if report.is_good() { "✓" } else { "✗" },
        shell_line(&report.command)
    );
    page(&title, &body(report))
}

/// A page that needs no other file.
#[must_use]
pub fn page(title: &str, body: &Markup) -> String {
    html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                title { (title) }
                style { (PreEscaped(STYLE)) }
            }
            body { (body) }
        }
    }
    .into_string()
}

fn body(report: &RunReport) -> Markup {
    let command = shell_line(&report.command);
    html! {
        (head(report))
        @if !report.expectations.is_empty() {
            h2 { "Expectations" }
            (expectations(report))
        }
        h2 { "Rules" }
        (rules(report))
        h2 { "Timeline" }
        (legend(report))
        figure { @for size in SIZES { (timeline::picture(report, size)) } }
        h2 { "What happened" }
        @for target in chart::targets(report) {
            figure {
                figcaption {
                    h3 {
                        (target.name)
                        @if let Some(address) = report.targets.get(target.name) { " " code.dim { (address) } }
                    }
                    div.dim { (target.figures()) }
                }
                @for size in SIZES { (target.picture(size)) }
            }
        }
        h2 { "Again" }
        p { "The same rules with the same random draws:" }
        pre { (shell_line(&report.again)) }
        p { "Exactly the decisions of this run, given the folder of this report:" }
        pre { "sudo fault replay DIR -- " (command) }
        @if report.rules.len() > MATCHES_MAX {
            p.dim {
                "Of more than " (MATCHES_MAX) " rules each is loaded only around its windows: a packet is \
                 found again only if it arrives in the same window."
            }
        }
    }
}

/// The head of the report.
fn head(report: &RunReport) -> Markup {
    let good = report.is_good();
    let started = UNIX_EPOCH + Duration::from_secs(report.started_unix_s);
    html! {
        h1 {
            span class={ "badge " (if good { "good" } else { "bad" }) } { (if good { "passed" } else { "failed" }) }
            code { (shell_line(&report.command)) }
        }
        p { (verdict(report)) }
        p.dim {
            (humantime::format_rfc3339_seconds(started)) " · " (seconds_of(report.length_ms)) " under "
            (counted(report.rules.len(), "rule")) " · seed " (report.seed) " · "
            (if report.host { "the whole host" } else { "the command's own traffic" })
            " · fault " (report.fault) " on Linux " (report.kernel)
        }
    }
}

/// The result in one sentence.
fn verdict(report: &RunReport) -> String {
    let failed = report.expectations.iter().filter(|one| !one.holds).count();
    let folded = fold(report.rules.iter().map(RuleReport::name));
    let unfired = folded
        .iter()
        .filter(|line| {
            line.members
                .iter()
                .any(|index| report.rules[*index].failed())
        })
        .count();
    let mut parts = vec![format!("The command ended with {}", report.command_exit)];
    if failed != 0 {
        parts.push(format!(
            "{failed} of {} failed",
            counted(report.expectations.len(), "expectation")
        ));
    } else if !report.expectations.is_empty() {
        parts.push("all expectations were met".to_owned());
    }
    if unfired != 0 {
        parts.push(format!("{} never fired", counted(unfired, "rule")));
    }
    format!(
        "{}; fault's exit code is {}.",
        parts.join(", "),
        report.exit
    )
}

fn expectations(report: &RunReport) -> Markup {
    html! {
        table.cards {
            tr { th {} th.n { "no." } th { "expected" } th { "found" } th { "broke" } }
            @for (number, expectation) in (1..).zip(&report.expectations) {
                tr.failed[!expectation.holds] {
                    td.mark { (mark(expectation.holds)) }
                    td.n data-label="no." { (number) }
                    td data-label="expected" { (expectation.expected) }
                    td data-label="found" { (expectation.found) }
                    td data-label="broke" { @if let Some(ms) = expectation.broke_ms { "at " (seconds_of(ms)) } }
                }
            }
        }
    }
}

fn mark(good: bool) -> Markup {
    html! {
        @if good { span.good title="holds" { "✓" } } @else { span.bad title="failed" { "✗" } }
    }
}

fn rules(report: &RunReport) -> Markup {
    let lines = fold(report.rules.iter().map(RuleReport::name));
    html! {
        div.scroll { table.cards {
            tr { th {} th { "rule" } th.n { "matched" } th.n { "hit" } th.n { "connections" } th { "by" } }
            @for line in &lines { (rule(line, &report.rules)) }
        } }
    }
}

/// The row of a rule, or of all faults that were drawn from one.
fn rule(line: &Folded, rules: &[RuleReport]) -> Markup {
    let members = || line.members.iter().map(|index| &rules[*index]);
    let sum = |figure: fn(&RuleReport) -> u64| members().map(figure).sum::<u64>();
    let (failed, fired) = (
        members().any(RuleReport::failed),
        members().any(|rule| rule.fired),
    );
    let amount = |packets: u64, bytes: u64| {
        html! { (packets) @if bytes != 0 { br; span.dim { (human_bytes(bytes)) } } }
    };
    html! {
        tr.failed[failed] {
            td.mark { @if failed || fired { (mark(!failed)) } @else { span.dim title="never fired, which is accepted" { "–" } } }
            td {
                code { (line) }
                @if failed { br; span.bad { "never fired" } }
                @else if !fired { br; span.dim { "never fired (accepted)" } }
            }
            td.n data-label="matched" { (amount(sum(|rule| rule.seen.packets), sum(|rule| rule.seen.bytes))) }
            td.n data-label="hit" { (amount(sum(|rule| rule.hit.packets), sum(|rule| rule.hit.bytes))) }
            td.n data-label="connections" { (sum(|rule| rule.connections)) }
            td data-label="by" { (members().next().map_or("", |rule| &rule.mechanism)) }
        }
    }
}

/// The legend of colours.
fn legend(report: &RunReport) -> Markup {
    let broke = report.expectations.iter().any(|one| one.broke_ms.is_some());
    let parts = [
        ("--fault", "fault active (shaded below)", true),
        ("--line", "traffic, successful connect, probe held", true),
        ("--bad", "failed connect or probe, hit", true),
        ("--odd", "reset of an open connection", true),
        ("--broke", "✗: an expectation broke, by its number", broke),
    ];
    html! {
        div.legend {
            @for (colour, what, _) in parts.iter().filter(|part| part.2) {
                span { i style={ "background: var(" (colour) ")" } {} (what) }
            }
        }
    }
}

fn seconds_of(ms: u64) -> String {
    #[expect(
        clippy::cast_precision_loss,
        reason = "a run does not last for that long"
    )]
    seconds(ms as f64)
}
