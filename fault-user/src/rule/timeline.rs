//! When rules act: their windows, and a picture of them for the terminal.

use super::modifier::Schedule;
use super::units::show_duration;
use super::{Modifiers, Rule};

/// The windows in which a rule acts, up to a horizon: start and end in nanoseconds from the beginning.
///
/// A window that reaches over the horizon is cut off there. Windows neither overlap nor touch, and come
/// in order; a rule without end gives one window to the horizon.
pub fn windows(modifiers: &Modifiers, horizon_ns: u64) -> impl Iterator<Item = (u64, u64)> + use<> {
    let schedule = modifiers.schedule();
    let end = schedule.end_ns.unwrap_or(u64::MAX).min(horizon_ns);
    // A window that fills its period never closes: one window says the same.
    let period = schedule
        .period_ns
        .filter(|period| schedule.on_ns.is_none_or(|on| on < *period));
    let length = if schedule.period_ns.is_some() && period.is_none() {
        None
    } else {
        schedule.on_ns
    };
    let starts = std::iter::successors(Some(schedule.start_ns), move |start| {
        start.checked_add(period?)
    });
    starts
        .take_while(move |start| *start < end)
        .map(move |start| {
            let stop = length.map_or(end, |length| start.saturating_add(length));
            (start, stop.min(end))
        })
        .filter(|(start, stop)| start < stop)
}

/// When the last of the rules that end is over, with a tenth on top so that the end can be seen.
///
/// Of a rule that repeats without end three periods are shown; where nothing ends it is ten seconds
/// after the last start.
#[must_use]
pub fn horizon_ns(rules: &[Rule]) -> u64 {
    let last = |schedule: Schedule| match (schedule.end_ns, schedule.period_ns) {
        (Some(end), _) => end,
        (None, Some(period)) => schedule.start_ns.saturating_add(period.saturating_mul(3)),
        (None, None) => schedule.start_ns,
    };
    let ends = rules.iter().map(|rule| rule.modifiers.schedule());
    let endless = ends
        .clone()
        .all(|s| s.end_ns.is_none() && s.period_ns.is_none());
    let most = ends.map(last).max().unwrap_or(0);
    if endless || most == 0 {
        return most.saturating_add(10_000_000_000);
    }
    most.saturating_add(most / 10)
}

/// The most columns of a rule's text beside its bar.
const LABEL_COLUMNS: usize = 36;

/// The fewest columns of a bar.
const LEAST_COLUMNS: usize = 20;

/// A picture of when rules act, `width` columns wide: a scale, and a line for each rule or for several that share one.
///
/// A full block is a cell of time in which a rule of the line acts throughout, a shaded one a cell in which it
/// acts for a part, a dot one in which it does not; an arrow at the end is a rule that goes on.
#[must_use]
pub fn picture(lines: &[Vec<&Rule>], horizon_ns: u64, width: usize) -> String {
    let labels: Vec<String> = lines
        .iter()
        .map(|rules| rules.first().map_or_else(String::new, |rule| label(rule)))
        .collect();
    let longest = labels.iter().map(|l| l.chars().count()).max().unwrap_or(0);
    let columns = width.saturating_sub(longest + 2).max(LEAST_COLUMNS);
    let mut shown = vec![format!("{:longest$} {}", "", scale(horizon_ns, columns))];
    for (rules, label) in lines.iter().zip(&labels) {
        let goes_on = |rule: &&Rule| {
            let schedule = rule.modifiers.schedule();
            schedule.end_ns.is_none_or(|end| end > horizon_ns)
                && (schedule.period_ns.is_some() || schedule.on_ns.is_none())
        };
        let arrow = if rules.iter().any(goes_on) { "→" } else { "" };
        let bar = bar(rules, horizon_ns, columns);
        shown.push(format!("{label:longest$} {bar}{arrow}"));
    }
    shown.join("\n")
}

/// A rule's target and fault, shortened where they are long.
fn label(rule: &Rule) -> String {
    let text = format!("{} {}", rule.target, rule.fault);
    let text: String = text
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    if text.chars().count() <= LABEL_COLUMNS {
        return text;
    }
    text.chars().take(LABEL_COLUMNS - 1).chain(['…']).collect()
}

/// The time at the left edge of a column.
fn edge(column: usize, columns: usize, horizon_ns: u64) -> u64 {
    let wide = u128::from(horizon_ns) * column as u128 / columns as u128;
    u64::try_from(wide).unwrap_or(horizon_ns)
}

/// The cells of a line of rules.
fn bar(rules: &[&Rule], horizon_ns: u64, columns: usize) -> String {
    let mut covered = vec![0_u64; columns];
    // More windows than this could not be told apart in the picture, and would take long to add up.
    let all = rules
        .iter()
        .flat_map(|rule| windows(&rule.modifiers, horizon_ns).take(columns * 1_000));
    for (start, stop) in all {
        let first = u128::from(start) * columns as u128 / u128::from(horizon_ns.max(1));
        let first = usize::try_from(first).unwrap_or(columns);
        for (column, sum) in covered.iter_mut().enumerate().skip(first) {
            let (left, right) = (
                edge(column, columns, horizon_ns),
                edge(column + 1, columns, horizon_ns),
            );
            if left >= stop {
                break;
            }
            *sum += stop.min(right).saturating_sub(start.max(left));
        }
    }
    covered
        .iter()
        .enumerate()
        .map(|(column, sum)| {
            let cell = edge(column + 1, columns, horizon_ns) - edge(column, columns, horizon_ns);
            match sum {
                0 => '·',
                sum if *sum >= cell => '█',
                _ => '▒',
            }
        })
        .collect()
}

/// The scale above the bars: round times, at least two columns apart from each other.
fn scale(horizon_ns: u64, columns: usize) -> String {
    let step = round_step(horizon_ns, columns);
    let mut line: Vec<char> = vec![' '; columns];
    let mut free = 0;
    let mut tick = 0_u64;
    while tick <= horizon_ns {
        let column = u128::from(tick) * columns as u128 / u128::from(horizon_ns.max(1));
        let column = usize::try_from(column).unwrap_or(columns);
        let text: Vec<char> = show_duration(tick).chars().collect();
        if column >= free && column + text.len() <= columns {
            line[column..column + text.len()].copy_from_slice(&text);
            free = column + text.len() + 2;
        }
        tick = tick.saturating_add(step);
    }
    line.into_iter().collect::<String>().trim_end().to_owned()
}

/// A round time of which about one fits into each eight columns.
#[must_use]
pub fn round_step(horizon_ns: u64, columns: usize) -> u64 {
    const SECOND: u64 = 1_000_000_000;
    const ROUND: [u64; 7] = [60, 120, 300, 600, 1_800, 3_600, 86_400];
    let ticks = (columns / 8).max(1) as u64;
    let least = (horizon_ns / ticks).max(1);
    if least > 30 * SECOND {
        let seconds = ROUND
            .into_iter()
            .map(|s| s * SECOND)
            .find(|step| *step >= least);
        return seconds.unwrap_or_else(|| least.next_multiple_of(86_400 * SECOND));
    }
    let mut power = 1_u64;
    loop {
        for factor in [1, 2, 5] {
            if power * factor >= least {
                return power * factor;
            }
        }
        power *= 10;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The windows of a rule with these modifiers, in seconds.
    fn seconds(modifiers: &str, horizon: u64) -> Vec<(u64, u64)> {
        let rule: Rule = format!("tcp:1 drop {modifiers}").parse().unwrap();
        windows(&rule.modifiers, horizon * 1_000_000_000)
            .map(|(a, b)| (a / 1_000_000_000, b / 1_000_000_000))
            .collect()
    }

    #[test]
    fn windows_of_each_kind() {
        assert_eq!(seconds("", 10), [(0, 10)]);
        assert_eq!(seconds("at=2s", 10), [(2, 10)]);
        assert_eq!(seconds("at=2s for=5s", 10), [(2, 7)]);
        assert_eq!(seconds("at=2s for=5s", 5), [(2, 5)]);
        assert_eq!(seconds("at=20s", 10), []);
        assert_eq!(seconds("for=2s period=5s", 12), [(0, 2), (5, 7), (10, 12)]);
        assert_eq!(seconds("at=1s period=5s duty=40%", 10), [(1, 3), (6, 8)]);
        assert_eq!(
            seconds("at=1s for=6s period=5s duty=40%", 100),
            [(1, 3), (6, 7)]
        );
        assert_eq!(seconds("period=5s duty=100%", 10), [(0, 10)]);
        // A part of a period that is shorter than a nanosecond.
        let never = Modifiers {
            period_ns: Some(10),
            duty: Some(1),
            ..Modifiers::default()
        };
        assert_eq!(windows(&never, 10).next(), None);
    }

    #[test]
    fn a_picture() {
        let lines = [
            "mysql down at=2s for=5s",
            "tcp:6379 delay=200ms",
            "tcp:80 drop for=500ms period=2s",
        ];
        let rules: Vec<Rule> = lines.iter().map(|line| line.parse().unwrap()).collect();
        let apart: Vec<Vec<&Rule>> = rules.iter().map(|rule| vec![rule]).collect();
        assert_eq!(
            picture(&apart, 10_000_000_000, 62),
            concat!(
                "                     0s      2s      4s      6s      8s\n",
                "mysql down           ········████████████████████············\n",
                "tcp:6379 delay=200ms ████████████████████████████████████████→\n",
                "tcp:80 drop          ██······██······██······██······██······→",
            )
        );
    }

    #[test]
    fn rules_share_a_line() {
        let rules = ["tcp:1 down at=1s for=1s", "tcp:1 down at=5s for=2s"];
        let rules = rules.map(|line| line.parse::<Rule>().unwrap());
        assert_eq!(
            picture(&[rules.iter().collect()], 10_000_000_000, 31),
            "           0s        5s\ntcp:1 down ··██······████······"
        );
    }

    #[test]
    fn horizons() {
        let horizon = |lines: &[&str]| {
            let rules: Vec<Rule> = lines.iter().map(|line| line.parse().unwrap()).collect();
            horizon_ns(&rules) / 100_000_000
        };
        assert_eq!(horizon(&[]), 100);
        assert_eq!(horizon(&["tcp:1 drop"]), 100);
        assert_eq!(horizon(&["tcp:1 drop at=5s"]), 150);
        assert_eq!(horizon(&["tcp:1 drop", "tcp:1 drop at=5s for=5s"]), 110);
        assert_eq!(horizon(&["tcp:1 drop for=1s period=10s"]), 330);
    }
}
