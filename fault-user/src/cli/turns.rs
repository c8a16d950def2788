//! Rules that are taken in and out of the kernel's tables at their times.
//!
//! Of the rules that match a packet only the first few are judged, in or out of their windows. Where there are more, as with
//! drawn faults, only those are put in whose window is near.

use std::collections::BTreeSet;
use std::ops::Range;
use std::time::{Duration, Instant};

use fault_common::abi::MATCHES_MAX;

use crate::rule::ResolvedRule;
use crate::rule::units::show_duration;

/// How long before its window a rule is put in: the kernel opens the window itself, to the moment.
const LEAD_NS: u64 = 100_000_000;

/// A rule with one window.
struct Turn {
    rule: usize,
    from_ns: u64,
    to_ns: u64,
    /// What is told of it, where it was drawn.
    text: Option<String>,
}

/// What changes with a look at the clock.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Change {
    /// What there is to tell, one line each.
    pub told: Vec<String>,
    /// Rules whose window is over.
    pub over: Vec<usize>,
}

/// The rules that come and go.
pub struct Turns {
    all: Vec<Turn>,
    started: Instant,
    /// When to look next; nothing more happens when there is none.
    next_ns: Option<u64>,
    /// Whether rules are taken out. Few stay in, so that they count connections from the beginning, as a replay does.
    take_out: bool,
    /// The rules that are not in.
    pub resting: BTreeSet<usize>,
    told: BTreeSet<usize>,
    over: BTreeSet<usize>,
}

impl Turns {
    /// All rules stay in.
    #[must_use]
    pub fn none(started: Instant) -> Self {
        Self {
            all: Vec::new(),
            started,
            next_ns: None,
            take_out: false,
            resting: BTreeSet::new(),
            told: BTreeSet::new(),
            over: BTreeSet::new(),
        }
    }

    /// The rules with one window, when there are many or some were drawn.
    pub fn of<'a>(
        rules: impl Iterator<Item = (String, &'a ResolvedRule)>,
        drawn: &Range<usize>,
        started: Instant,
    ) -> Self {
        let rules: Vec<_> = rules.collect();
        let mut turns = Self::none(started);
        turns.take_out = rules.len() > MATCHES_MAX;
        if !turns.take_out && drawn.is_empty() {
            return turns;
        }
        for (index, (text, rule)) in rules.into_iter().enumerate() {
            let modifiers = &rule.modifiers;
            if let (Some(length_ns), None) = (modifiers.for_ns, modifiers.period_ns) {
                turns.all.push(Turn {
                    rule: index,
                    from_ns: modifiers.at_ns,
                    to_ns: modifiers.at_ns.saturating_add(length_ns),
                    text: drawn.contains(&index).then_some(text),
                });
            }
        }
        turns.next_ns = (!turns.all.is_empty()).then_some(0);
        turns
    }

    /// Whether rules come and go at all.
    #[must_use]
    pub fn are_some(&self) -> bool {
        !self.all.is_empty()
    }

    /// Waits for the next moment at which something changes.
    pub async fn wait(&self) {
        let Some(next_ns) = self.next_ns else {
            return std::future::pending().await;
        };
        let at = self.started + Duration::from_nanos(next_ns);
        tokio::time::sleep_until(at.into()).await;
    }

    /// Looks at the clock.
    pub fn look(&mut self) -> Change {
        let now_ns = u64::try_from(self.started.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.look_at(now_ns)
    }

    fn look_at(&mut self, now_ns: u64) -> Change {
        let mut change = Change::default();
        let mut next_ns: Option<u64> = None;
        for turn in &self.all {
            let begin_ns = turn.from_ns.saturating_sub(LEAD_NS);
            let is_in = (begin_ns..turn.to_ns).contains(&now_ns);
            if is_in || !self.take_out {
                self.resting.remove(&turn.rule);
            } else {
                self.resting.insert(turn.rule);
            }
            let is_over = now_ns >= turn.to_ns;
            if let Some(text) = &turn.text {
                if is_in && self.told.insert(turn.rule) {
                    change.told.push(format!("drawn: `{text}`"));
                } else if is_over && !self.over.contains(&turn.rule) {
                    change
                        .told
                        .push(format!("over: `{text}`, at {}", show_duration(turn.to_ns)));
                }
            }
            if is_over && self.over.insert(turn.rule) && self.take_out {
                change.over.push(turn.rule);
            }
            for moment_ns in [begin_ns, turn.to_ns] {
                if moment_ns > now_ns {
                    next_ns = Some(next_ns.map_or(moment_ns, |next| next.min(moment_ns)));
                }
            }
        }
        self.next_ns = next_ns;
        change
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rule::{Rule, SystemResolver, Targets};

    const S_NS: u64 = 1_000_000_000;

    fn turns(texts: &[&str], drawn: Range<usize>) -> Turns {
        let rules: Vec<_> = texts
            .iter()
            .map(|text| {
                let rule: Rule = text.parse().unwrap();
                rule.resolve(&Targets::new(), &mut SystemResolver).unwrap()
            })
            .collect();
        let named = texts.iter().map(|text| (*text).to_owned()).zip(&rules);
        Turns::of(named, &drawn, Instant::now())
    }

    const TEXTS: [&str; 3] = [
        "tcp:1 loss=1%",
        "tcp:1 drop at=2s for=3s",
        "tcp:1 down at=9s for=1s",
    ];

    #[test]
    fn drawn_rules_are_told_of() {
        let mut turns = turns(&TEXTS, 1..3);
        assert_eq!(turns.look_at(0), Change::default());
        assert_eq!(turns.next_ns, Some(2 * S_NS - LEAD_NS));
        let told = turns.look_at(2 * S_NS).told;
        assert_eq!(told, ["drawn: `tcp:1 drop at=2s for=3s`"]);
        let told = turns.look_at(5 * S_NS).told;
        assert_eq!(told, ["over: `tcp:1 drop at=2s for=3s`, at 5s"]);
        assert_eq!(turns.look_at(9 * S_NS).told.len(), 1);
        assert_eq!(turns.look_at(10 * S_NS).told.len(), 1);
        assert_eq!(turns.next_ns, None);
        assert!(turns.resting.is_empty(), "few rules stay in");
    }

    #[test]
    fn many_rules_come_and_go() {
        let texts: Vec<_> = TEXTS.iter().chain(&TEXTS).chain(&TEXTS).copied().collect();
        let mut turns = turns(&texts, 0..0);
        assert_eq!(turns.look_at(0), Change::default());
        assert_eq!(turns.resting, [1, 2, 4, 5, 7, 8].into());
        assert_eq!(turns.look_at(2 * S_NS), Change::default());
        assert_eq!(turns.resting, [2, 5, 8].into());
        assert_eq!(turns.look_at(5 * S_NS).over, [1, 4, 7]);
        turns.look_at(9 * S_NS);
        assert_eq!(turns.resting, [1, 4, 7].into());
        assert_eq!(turns.look_at(10 * S_NS).over, [2, 5, 8]);
    }

    #[test]
    fn few_rules_stay_in() {
        let texts = ["tcp:1 drop at=2s for=3s"; MATCHES_MAX];
        assert_eq!(turns(&texts, 0..0).next_ns, None);
        let texts = ["tcp:1 drop at=2s for=3s"; MATCHES_MAX + 1];
        assert_eq!(turns(&texts, 0..0).next_ns, Some(0));
    }
}
