//! A chart of one target over time: its faults, and below them on the same axis its throughput, its connections, their
//! connect times, and the hits.

use std::collections::BTreeSet;

use maud::{Markup, html};

use super::file::{ConnectReport, Expectation, RuleReport, RunReport};
use super::fold::{Folded, fold};
use crate::rule::timeline::round_step;

/// The size of a picture, in CSS pixels where it is shown as it is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Size {
    /// The class by which the style sheet shows one of the sizes.
    pub class: &'static str,
    width: f64,
    /// What the labels of scales take.
    left: f64,
    /// Maximum number of bars in a lane.
    bars: u16,
    /// Columns of text that would fit below the axis.
    columns: usize,
}

/// Every picture is drawn for a desktop and for a phone, whose text would be too small if it was only scaled.
pub const SIZES: [Size; 2] = [
    Size {
        class: "wide",
        width: 920.0,
        left: 76.0,
        bars: 140,
        columns: 88,
    },
    Size {
        class: "narrow",
        width: 340.0,
        left: 58.0,
        bars: 50,
        columns: 28,
    },
];

impl Size {
    /// The width of a picture.
    #[must_use]
    pub fn width(self) -> f64 {
        self.width
    }
}

const RIGHT: f64 = 12.0;
/// The width of a character of a rule's text.
const CHARACTER: f64 = 6.7;
/// Marks closer to each other than this share a label.
const MARK: f64 = 26.0;
/// Height of the line of a rule, of a lane, and of what is between two lanes.
pub(super) const RULE: f64 = 19.0;
const LANE: f64 = 74.0;
pub(super) const GAP: f64 = 30.0;
/// Dots closer to each other than this are merged.
const GRID: f64 = 2.0;
const MS_NS: u64 = 1_000_000;
/// The resolution of times in milliseconds: the sampling interval.
const SAMPLE_MS: u64 = 100;
/// The shortest time that the axis of latencies shows, in microseconds.
const SHORTEST_US: f64 = 10.0;

/// The data of a chart.
pub struct TargetChart<'a> {
    /// Its name.
    pub name: &'a str,
    report: &'a RunReport,
    rules: Vec<(usize, &'a RuleReport)>,
    connects: Vec<&'a ConnectReport>,
}

/// The targets of rules and connections, in the order of the rules.
#[must_use]
pub fn targets(report: &RunReport) -> Vec<TargetChart<'_>> {
    let rules = report.rules.iter().map(|rule| rule.target.as_str());
    let connects = report.connects.iter().map(|one| one.target.as_str());
    let mut names: Vec<&str> = Vec::new();
    for name in rules.chain(connects) {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    let of = |name| TargetChart {
        name,
        report,
        rules: (0..)
            .zip(&report.rules)
            .filter(|(_, rule)| rule.target == name)
            .collect(),
        connects: report
            .connects
            .iter()
            .filter(|one| one.target == name)
            .collect(),
    };
    names.into_iter().map(of).collect()
}

/// A time of a connection, in microseconds.
type Took = fn(&ConnectReport) -> Option<u64>;

const CONNECT_TIME: &str = "connect time";

/// The times of a connection, by their names.
const TIMES: [(&str, Took); 2] = [
    (CONNECT_TIME, |one| one.connect_us),
    ("time to first byte", |one| one.first_byte_us),
];

/// A value at a time in milliseconds since the start.
type Point = (f64, f64);

impl TargetChart<'_> {
    /// The figures in one line.
    #[must_use]
    pub fn figures(&self) -> String {
        let mut parts = Vec::new();
        if let Some(bytes) = self.bytes().last() {
            parts.push(format!("{}B carried", quantity(bytes.1)));
        }
        if !self.connects.is_empty() {
            let failed = self.connects.iter().filter(|one| !one.connected).count();
            let reset = self.connects.iter().filter(|one| one.reset_us.is_some());
            parts.push(format!(
                "{} connects, {failed} failed, {} reset",
                self.connects.len(),
                reset.count()
            ));
            for (what, took) in TIMES {
                let mut times: Vec<u64> =
                    self.connects.iter().filter_map(|one| took(one)).collect();
                times.sort_unstable();
                if let Some(middle) = times.get(times.len() / 2) {
                    parts.push(format!("median {what} {}", time(*middle)));
                }
            }
        }
        parts.join(" · ")
    }

    /// The picture.
    #[must_use]
    pub fn picture(&self, size: Size) -> Markup {
        let marks = marks(self.report, |one| one.target.as_deref() == Some(self.name));
        let head = if marks.is_empty() { 0.0 } else { RULE };
        let lines = self.lines();
        let mut canvas = Canvas::new(
            size,
            self.report.length_ms,
            head + RULE * number(lines.len()) + GAP,
        );
        let throughput = self.throughput(size);
        if throughput.iter().any(|(_, rate)| *rate > 0.0) {
            canvas.area("bytes/s", &throughput);
        }
        if !self.connects.is_empty() {
            self.connections(&mut canvas);
            for (what, took) in TIMES {
                self.times(&mut canvas, what, took);
            }
        }
        let hits = self.hits(size);
        if hits.iter().any(|(_, count)| *count > 0.0) {
            canvas.bars("hits", &[("bad", "hits", hits)]);
        }
        let bottom = canvas.top;
        html! {
            svg class=(size.class) viewBox={ "0 0 " (size.width) " " (bottom + 4.0) } role="img"
                aria-label={ "What happened to " (self.name) } {
                @for (number_of, line) in lines.iter().enumerate() {
                    (canvas.windows(line, head + RULE * number(number_of), Some(bottom - GAP)))
                }
                @for part in &canvas.parts { (part) }
                (canvas.axis(bottom - GAP))
                (canvas.marks(&marks, bottom - GAP))
            }
        }
    }

    /// The lines of the rules, with what they do to the target.
    fn lines(&self) -> Vec<ChartLine<'_>> {
        let mut lines = lines(self.rules.iter().map(|(_, rule)| *rule));
        for line in &mut lines {
            if let Some(rest) = line.text.strip_prefix(self.name) {
                line.text = rest.trim_start().to_owned();
            }
        }
        lines
    }

    /// Bytes since the start.
    fn bytes(&self) -> Vec<Point> {
        let traffic = self
            .report
            .traffic
            .iter()
            .find(|one| one.target == self.name);
        let bytes = traffic.map(|one| one.bytes.as_slice()).unwrap_or_default();
        let samples = self.report.samples.iter();
        samples
            .zip(bytes)
            .map(|(sample, bytes)| (real(sample.at_ms), real(*bytes)))
            .collect()
    }

    fn throughput(&self, size: Size) -> Vec<Point> {
        let (bytes, bars) = (self.bytes(), bars(self.report.length_ms, size));
        let per_second = |(at, amount): Point| (at, amount * 1000.0 / bars.width_ms);
        bars.differences(&bytes)
            .into_iter()
            .map(per_second)
            .collect()
    }

    /// The hits of all rules of the target.
    fn hits(&self, size: Size) -> Vec<Point> {
        let sum = |hits: &[u64]| {
            let ours = self.rules.iter();
            ours.filter_map(|(index, _)| hits.get(*index)).sum::<u64>()
        };
        let samples = self.report.samples.iter();
        let all: Vec<Point> = samples
            .map(|sample| (real(sample.at_ms), real(sum(&sample.hits))))
            .collect();
        bars(self.report.length_ms, size).differences(&all)
    }

    fn connections(&self, canvas: &mut Canvas) {
        let bars = bars(self.report.length_ms, canvas.size);
        let began = |wanted: bool| {
            let of_kind = self.connects.iter().filter(|one| one.connected == wanted);
            bars.counts(of_kind.map(|one| one.at_us))
        };
        let resets = bars.counts(self.connects.iter().filter_map(|one| one.reset_us));
        canvas.bars(
            "connects",
            &[
                ("good", "connected", began(true)),
                ("bad", "failed", began(false)),
                ("odd", "reset while open", resets),
            ],
        );
    }

    /// A time of each connection, on a logarithmic scale. Nothing is drawn where there is none.
    fn times(&self, canvas: &mut Canvas, what: &str, took: Took) {
        let times = || self.connects.iter().filter_map(|one| took(one));
        // A connect that is never answered is drawn too, at the top.
        if what != CONNECT_TIME && times().next().is_none() {
            return;
        }
        let shortest = real(times().min().unwrap_or(0)).max(SHORTEST_US);
        let longest = real(times().max().unwrap_or(0)).max(shortest);
        let (low, high) = (shortest.log10().floor(), longest.log10().ceil());
        let high = high.max(low + 1.0);
        let decades: Vec<f64> = std::iter::successors(Some(low), |at| Some(at + 1.0))
            .take_while(|at| *at <= high)
            .collect();
        let (top, bottom) = canvas.lane(what);
        let y = |us: f64| {
            let share = (us.max(SHORTEST_US).log10() - low) / (high - low);
            bottom - share.clamp(0.0, 1.0) * LANE
        };
        let mut taken = BTreeSet::new();
        // Failed ones are drawn over the others.
        let mut sorted = self.connects.clone();
        sorted.sort_by_key(|one| !one.connected);
        let dots: Vec<_> = sorted
            .into_iter()
            .filter_map(|one| {
                let took = took(one);
                if took.is_none() && what != CONNECT_TIME {
                    return None;
                }
                let x = canvas.x(real(one.at_us) / 1000.0);
                let y = took.map_or(top, |us| y(real(us)));
                let cell = ((x / GRID).round(), (y / GRID).round());
                taken
                    .insert((cell.0.to_bits(), cell.1.to_bits(), one.connected))
                    .then_some((x, y, one))
            })
            .collect();
        let drawn = html! {
            @for decade in decades.iter().step_by(if decades.len() > 5 { 2 } else { 1 }) {
                (canvas.line(y(10_f64.powf(*decade)), &time_of(10_f64.powf(*decade))))
            }
            @for (x, y, one) in dots {
                @let answer = took(one).map_or_else(|| "never answered".to_owned(), |us| format!("{what} {}", time(us)));
                circle cx=(short(x)) cy=(short(y)) r="2.6" class=(if one.connected { "good" } else { "bad" }) {
                    title { "connect at " (seconds(real(one.at_us) / 1000.0)) ", " (answer) @if !one.connected { ", failed" } }
                }
            }
        };
        canvas.parts.push(drawn);
    }
}

/// Equal parts of a run.
#[derive(Clone, Copy)]
struct Bars {
    count: u16,
    width_ms: f64,
}

fn bars(length_ms: u64, size: Size) -> Bars {
    // At most one per sample.
    let count = u16::try_from(length_ms / SAMPLE_MS)
        .unwrap_or(size.bars)
        .clamp(1, size.bars);
    Bars {
        count,
        width_ms: real(length_ms.max(1)) / f64::from(count),
    }
}

impl Bars {
    fn middles(self) -> impl Iterator<Item = f64> {
        (0..self.count).map(move |bar| (f64::from(bar) + 0.5) * self.width_ms)
    }

    /// The growth of a running total in each part.
    fn differences(self, sums: &[Point]) -> Vec<Point> {
        let at = |ms: f64| {
            let next = sums.partition_point(|(time, _)| *time < ms);
            let (t1, v1) = sums.get(next).or(sums.last()).copied().unwrap_or_default();
            let before = next.checked_sub(1).and_then(|place| sums.get(place));
            let (t0, v0) = before.copied().unwrap_or_default();
            if t1 > t0 {
                v0 + (v1 - v0) * ((ms - t0) / (t1 - t0)).clamp(0.0, 1.0)
            } else {
                v1
            }
        };
        let half = self.width_ms / 2.0;
        let grown = |middle: f64| (at(middle + half) - at(middle - half)).max(0.0);
        self.middles()
            .map(|middle| (middle, grown(middle)))
            .collect()
    }

    /// The number of these times, in microseconds, in each part.
    fn counts(self, times_us: impl Iterator<Item = u64>) -> Vec<Point> {
        let mut counts = vec![0_u32; usize::from(self.count)];
        for time_us in times_us {
            let middles = self.width_ms * 1000.0;
            let place = counts.len().min(floor(real(time_us) / middles) + 1) - 1;
            counts[place] += 1;
        }
        self.middles()
            .zip(counts.into_iter().map(f64::from))
            .collect()
    }
}

/// A chart that is being drawn, lane by lane.
pub(super) struct Canvas {
    size: Size,
    length_ms: u64,
    top: f64,
    parts: Vec<Markup>,
}

/// The line of a rule, or of all faults that were drawn from one.
pub(super) struct ChartLine<'a> {
    pub text: String,
    windows: Vec<(&'a RuleReport, (u64, u64))>,
}

/// The lines of rules, in their order; drawn faults share one.
pub(super) fn lines<'a>(rules: impl Iterator<Item = &'a RuleReport>) -> Vec<ChartLine<'a>> {
    let rules: Vec<_> = rules.collect();
    let folded = fold(rules.iter().map(|rule| rule.name()));
    let line = |group: &Folded| {
        let members = group.members.iter().map(|index| rules[*index]);
        let windows = members.flat_map(|rule| rule.windows_ms.iter().map(move |one| (rule, *one)));
        ChartLine {
            text: group.to_string(),
            windows: windows.collect(),
        }
    };
    folded.iter().map(line).collect()
}

/// A mark where an expectation broke.
pub(super) struct Mark {
    at_ms: f64,
    /// The number of the expectation, from 1.
    number: usize,
    text: String,
}

/// The marks of the expectations that are wanted, ordered by time.
pub(super) fn marks(report: &RunReport, wanted: impl Fn(&Expectation) -> bool) -> Vec<Mark> {
    let numbered = (1..).zip(&report.expectations);
    let mut marks: Vec<Mark> = numbered
        .filter(|(_, one)| !one.holds && wanted(one))
        .filter_map(|(number, one)| {
            Some(Mark {
                at_ms: real(one.broke_ms?),
                number,
                text: one.text(),
            })
        })
        .collect();
    marks.sort_by(|one, other| one.at_ms.total_cmp(&other.at_ms));
    marks
}

impl Canvas {
    pub(super) fn new(size: Size, length_ms: u64, top: f64) -> Self {
        Self {
            size,
            length_ms: length_ms.max(1),
            top,
            parts: Vec::new(),
        }
    }

    /// The x coordinate of a time.
    pub(super) fn x(&self, ms: f64) -> f64 {
        self.size.left + (ms / real(self.length_ms)).clamp(0.0, 1.0) * self.inner()
    }

    /// The width between the labels and the right edge.
    fn inner(&self) -> f64 {
        self.size.width - self.size.left - RIGHT
    }

    /// A line of a scale.
    fn line(&self, y: f64, label: &str) -> Markup {
        let Size { left, width, .. } = self.size;
        html! {
            line.grid x1=(left) x2=(width - RIGHT) y1=(short(y)) y2=(short(y)) {}
            text x=(left - 6.0) y=(short(y + 3.5)) text-anchor="end" { (label) }
        }
    }

    /// A text that begins at `x` where there is room for it, else further to the left. What does not fit is cut off.
    pub(super) fn text(&self, text: &str, x: f64, y: f64) -> Markup {
        let most = floor(self.size.width / CHARACTER);
        let length = text.chars().count();
        let shown: String = if length <= most {
            text.to_owned()
        } else {
            text.chars().take(most - 1).chain(['…']).collect()
        };
        let room = self.size.width - number(length.min(most)) * CHARACTER;
        html! {
            text.rule x=(short(x.min(room).max(0.0))) y=(short(y)) { (shown) @if length > most { title { (text) } } }
        }
    }

    /// Begins a lane: its upper and lower edge.
    fn lane(&mut self, name: &str) -> (f64, f64) {
        let top = self.top;
        self.top += LANE + GAP;
        self.parts
            .push(html! { text.name x="0" y=(short(top - 10.0)) { (name) } });
        (top, top + LANE)
    }

    /// A lane with a scale from nothing to a round number above `most`: its lower edge, and that number.
    fn scaled(&mut self, name: &str, most: f64) -> (f64, f64) {
        let (_, bottom) = self.lane(name);
        let most = round_up(most);
        let drawn = html! {
            (self.line(bottom, "0"))
            @if most > 1.0 { (self.line(bottom - LANE / 2.0, &quantity(most / 2.0))) }
            (self.line(bottom - LANE, &quantity(most)))
        };
        self.parts.push(drawn);
        (bottom, most)
    }

    /// A lane with one value over time.
    fn area(&mut self, name: &str, points: &[Point]) {
        let most = points.iter().map(|point| point.1).fold(0.0, f64::max);
        let (bottom, most) = self.scaled(name, most);
        let y = |value: f64| short(bottom - value / most * LANE);
        let points_of_line: Vec<String> = points
            .iter()
            .map(|&(ms, value)| format!("{},{}", short(self.x(ms)), y(value)))
            .collect();
        let path = format!("M {}", points_of_line.join(" L "));
        let end = |point: Option<&Point>| short(self.x(point.map_or(0.0, |point| point.0)));
        let closed = format!(
            "{path} L {},{bottom} L {},{bottom} Z",
            end(points.last()),
            end(points.first())
        );
        self.parts.push(html! {
            path.area d=(closed) {}
            path.line d=(path) {}
        });
    }

    /// A lane with stacked counts over time.
    fn bars(&mut self, name: &str, kinds: &[(&str, &str, Vec<Point>)]) {
        let places = kinds.first().map_or(0, |kind| kind.2.len());
        let height = |place: usize| kinds.iter().map(|kind| kind.2[place].1).sum::<f64>();
        let most = (0..places).map(height).fold(0.0, f64::max);
        let (bottom, most) = self.scaled(name, most);
        let width = self.inner() / number(places.max(1));
        let mut drawn = Vec::new();
        for place in 0..places {
            let mut from = bottom;
            for (class, what, points) in kinds {
                let (ms, count) = points[place];
                if count > 0.0 {
                    let high = count / most * LANE;
                    from -= high;
                    drawn.push(html! {
                        rect class=(class) x=(short(self.x(ms) - width / 2.0 + 0.5)) y=(short(from))
                            width=(short((width - 1.0).max(0.5))) height=(short(high)) {
                            title { (short(count)) " " (what) " at " (seconds(ms)) }
                        }
                    });
                }
            }
        }
        self.parts.extend(drawn);
    }

    /// The windows of a rule: bars with its text. With `bottom` they are shaded down to there.
    pub(super) fn windows(&self, line: &ChartLine<'_>, top: f64, bottom: Option<f64>) -> Markup {
        let first = line
            .windows
            .first()
            .map_or(0.0, |(_, window)| real(window.0));
        html! {
            @for (rule, (from, to)) in &line.windows {
                @let (x, end) = (self.x(real(*from)), self.x(real(*to)));
                @let width = short((end - x).max(1.0));
                @if let Some(bottom) = bottom {
                    // A rule without windows is not shaded.
                    @if to.saturating_sub(*from) + SAMPLE_MS < self.length_ms {
                        rect.window x=(short(x)) y=(short(top + RULE)) width=(width) height=(short(bottom - top - RULE)) {}
                    }
                }
                rect.bar x=(short(x)) y=(short(top + 14.0)) width=(width) height="3" {
                    title { (rule.rule) ": " (seconds(real(*from))) " to " (seconds(real(*to))) }
                }
            }
            (self.text(&line.text, self.x(first), top + 11.0))
        }
    }

    /// Lines where expectations broke, with their numbers at the top.
    pub(super) fn marks(&self, marks: &[Mark], bottom: f64) -> Markup {
        let groups = marks.chunk_by(|one, next| self.x(next.at_ms) - self.x(one.at_ms) < MARK);
        html! {
            @for group in groups {
                @for mark in group {
                    @let x = short(self.x(mark.at_ms));
                    line.broke x1=(x) x2=(x) y1="3" y2=(short(bottom)) { title { (mark.text) " (at " (seconds(mark.at_ms)) ")" } }
                }
                @let numbers: Vec<String> = group.iter().map(|mark| mark.number.to_string()).collect();
                @let label = format!("✗{}", numbers.join(","));
                @let room = self.size.width - number(label.chars().count()) * CHARACTER;
                @let x = group.first().map_or(0.0, |mark| self.x(mark.at_ms) + 3.0);
                text.broke x=(short(x.min(room))) y="11" { (label) }
            }
        }
    }

    /// The times below the last lane.
    pub(super) fn axis(&self, bottom: f64) -> Markup {
        let step_ms =
            round_step(self.length_ms.saturating_mul(MS_NS), self.size.columns).div_ceil(MS_NS);
        let ticks = (0..)
            .map(|tick| step_ms.max(1) * tick)
            .take_while(|ms| *ms <= self.length_ms);
        html! {
            @for ms in ticks {
                @let x = short(self.x(real(ms)));
                line.tick x1=(x) x2=(x) y1=(short(bottom)) y2=(short(bottom + 4.0)) {}
                text x=(x) y=(short(bottom + 16.0)) text-anchor=(if ms == 0 { "start" } else { "middle" }) {
                    // Tenths of a second are what seconds are shown with.
                    @if step_ms < 100 { (ms) " ms" } @else { (seconds(real(ms))) }
                }
            }
        }
    }
}

/// The next of 1, 2, 4, 6 and 8 times a power of ten: its half is round too.
fn round_up(value: f64) -> f64 {
    if value <= 1.0 {
        return 1.0;
    }
    let power = 10_f64.powf(value.log10().floor());
    let factors = [1.0, 2.0, 4.0, 6.0, 8.0, 10.0];
    let round = factors.into_iter().map(|factor| factor * power);
    round
        .into_iter()
        .find(|round| *round >= value * 0.999)
        .unwrap_or(value)
}

/// A number with at most one digit behind the point.
pub(super) fn short(value: f64) -> String {
    let text = format!("{value:.1}");
    text.strip_suffix(".0").map(str::to_owned).unwrap_or(text)
}

/// A quantity with the prefix of its unit.
fn quantity(value: f64) -> String {
    let prefixes = [(1e9, "G"), (1e6, "M"), (1e3, "k")];
    let (unit, prefix) = prefixes
        .into_iter()
        .find(|(unit, _)| value >= *unit)
        .unwrap_or((1.0, ""));
    let space = if prefix.is_empty() { "" } else { " " };
    format!("{}{space}{prefix}", short(value / unit))
}

/// Formats a time in microseconds.
#[must_use]
pub fn time(us: u64) -> String {
    time_of(real(us))
}

fn time_of(us: f64) -> String {
    match us {
        us if us >= 1e6 => format!("{} s", short(us / 1e6)),
        us if us >= 1e3 => format!("{} ms", short(us / 1e3)),
        us => format!("{} µs", short(us)),
    }
}

/// Formats a time since the start.
#[must_use]
pub fn seconds(ms: f64) -> String {
    format!("{} s", short(ms / 1000.0))
}

#[expect(clippy::cast_precision_loss, reason = "a picture")]
pub(super) fn real(value: u64) -> f64 {
    value as f64
}

#[expect(clippy::cast_precision_loss, reason = "few")]
pub(super) fn number(count: usize) -> f64 {
    count as f64
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "never negative, and cut off by who asks"
)]
fn floor(value: f64) -> usize {
    value as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scales_are_round() {
        for (value, round) in [
            (0.0, 1.0),
            (1.0, 1.0),
            (1.5, 2.0),
            (21.0, 40.0),
            (5e6, 6e6),
            (99.0, 100.0),
        ] {
            assert!((round_up(value) - round).abs() < 1e-9, "{value}");
        }
        assert_eq!(quantity(2_500_000.0), "2.5 M");
        assert_eq!(quantity(50.0), "50");
        assert_eq!(time(1500), "1.5 ms");
        assert_eq!(seconds(10_400.0), "10.4 s");
    }

    #[test]
    fn sums_become_what_came_in_each_part() {
        let bars = bars(400, SIZES[0]);
        assert_eq!(bars.count, 4);
        let sums = [(0.0, 0.0), (100.0, 10.0), (300.0, 50.0), (400.0, 50.0)];
        let grown: Vec<f64> = bars
            .differences(&sums)
            .into_iter()
            .map(|point| point.1)
            .collect();
        assert_eq!(grown, [10.0, 20.0, 20.0, 0.0]);
        let counts: Vec<f64> = bars
            .counts([0, 99_999, 100_000, 999_999_999].into_iter())
            .into_iter()
            .map(|point| point.1)
            .collect();
        assert_eq!(counts, [2.0, 1.0, 0.0, 1.0]);
    }
}
