//! Loads rules into the kernel's tables around their windows, and unloads them.
//!
//! Only the first few rules that match a packet are evaluated, whether or not they are in their windows. With more
//! rules, such as drawn faults, only those whose window is near are loaded.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use fault_common::abi::MATCHES_MAX;

use crate::rule::ResolvedRule;
use crate::rule::units::show_duration;

/// A rule is loaded this long before its window. The kernel opens the window itself, at the exact time.
const LEAD_NS: u64 = 100_000_000;

/// A rule with one window.
struct Window {
    rule: usize,
    from_ns: u64,
    to_ns: u64,
    /// The rule's text, for messages.
    text: String,
}

/// The windows that have opened or closed since the last look.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct WindowChange {
    /// Messages, one line each.
    pub told: Vec<String>,
    /// Rules whose window is over.
    pub over: Vec<usize>,
}

/// The windows of all rules.
pub struct Windows {
    all: Vec<Window>,
    started: Instant,
    /// The time of the next change; `None` if there is none.
    next_ns: Option<u64>,
    /// Whether rules are unloaded outside their windows. If there are few, they stay loaded and count connections from
    /// the start, as a replay does.
    take_out: bool,
    /// The rules that are not loaded.
    pub resting: BTreeSet<usize>,
    told: BTreeSet<usize>,
    over: BTreeSet<usize>,
}

impl Windows {
    /// Creates windows for rules that always stay loaded.
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

    /// Collects the rules that have windows. A periodic rule has one window from its first repetition to its last.
    pub fn of<'a>(
        rules: impl Iterator<Item = (String, &'a ResolvedRule)>,
        started: Instant,
    ) -> Self {
        let rules: Vec<_> = rules.collect();
        let mut windows = Self::none(started);
        windows.take_out = rules.len() > MATCHES_MAX;
        for (index, (text, rule)) in rules.into_iter().enumerate() {
            let modifiers = &rule.modifiers;
            let schedule = modifiers.schedule();
            let end_ns = match schedule.period_ns {
                None => schedule
                    .on_ns
                    .map(|on_ns| schedule.start_ns.saturating_add(on_ns)),
                Some(_) => schedule.end_ns,
            };
            if end_ns.is_some() || schedule.start_ns > 0 || schedule.period_ns.is_some() {
                windows.all.push(Window {
                    rule: index,
                    from_ns: schedule.start_ns,
                    to_ns: end_ns.unwrap_or(u64::MAX),
                    text,
                });
            }
        }
        windows.next_ns = (!windows.all.is_empty()).then_some(0);
        windows
    }

    /// Whether any rule is loaded and unloaded.
    #[must_use]
    pub fn are_some(&self) -> bool {
        !self.all.is_empty()
    }

    /// Waits for the next change.
    pub async fn wait(&self) {
        let Some(next_ns) = self.next_ns else {
            return std::future::pending().await;
        };
        let at = self.started + Duration::from_nanos(next_ns);
        tokio::time::sleep_until(at.into()).await;
    }

    /// Returns the changes since the last call.
    pub fn look(&mut self) -> WindowChange {
        let now_ns = u64::try_from(self.started.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.look_at(now_ns)
    }

    fn look_at(&mut self, now_ns: u64) -> WindowChange {
        let mut change = WindowChange::default();
        let mut next_ns: Option<u64> = None;
        for window in &self.all {
            let begin_ns = window.from_ns.saturating_sub(LEAD_NS);
            let is_in = (begin_ns..window.to_ns).contains(&now_ns);
            if is_in || !self.take_out {
                self.resting.remove(&window.rule);
            } else {
                self.resting.insert(window.rule);
            }
            let is_over = now_ns >= window.to_ns;
            let text = &window.text;
            if is_in && self.told.insert(window.rule) {
                change.told.push(format!("begins: `{text}`"));
            } else if is_over && !self.over.contains(&window.rule) {
                let at = show_duration(window.to_ns);
                change.told.push(format!("ends: `{text}`, at {at}"));
            }
            if is_over && self.over.insert(window.rule) && self.take_out {
                change.over.push(window.rule);
            }
            for moment_ns in [begin_ns, window.to_ns] {
                if moment_ns > now_ns && moment_ns != u64::MAX {
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

    fn windows(texts: &[&str]) -> Windows {
        let rules: Vec<_> = texts
            .iter()
            .map(|text| {
                let rule: Rule = text.parse().unwrap();
                rule.resolve(&Targets::new(), &mut SystemResolver).unwrap()
            })
            .collect();
        let named = texts.iter().map(|text| (*text).to_owned()).zip(&rules);
        Windows::of(named, Instant::now())
    }

    const TEXTS: [&str; 3] = [
        "tcp:1 loss=1%",
        "tcp:1 drop at=2s for=3s",
        "tcp:1 down at=9s for=1s",
    ];

    #[test]
    fn few_rules_are_told_of() {
        let mut windows = windows(&TEXTS);
        assert_eq!(windows.look_at(0), WindowChange::default());
        assert_eq!(windows.next_ns, Some(2 * S_NS - LEAD_NS));
        let told = windows.look_at(2 * S_NS).told;
        assert_eq!(told, ["begins: `tcp:1 drop at=2s for=3s`"]);
        let told = windows.look_at(5 * S_NS).told;
        assert_eq!(told, ["ends: `tcp:1 drop at=2s for=3s`, at 5s"]);
        assert_eq!(windows.look_at(9 * S_NS).told.len(), 1);
        assert_eq!(windows.look_at(10 * S_NS).told.len(), 1);
        assert_eq!(windows.next_ns, None);
        assert!(windows.resting.is_empty(), "few rules stay in");
    }

    #[test]
    fn many_rules_come_and_go() {
        let texts: Vec<_> = TEXTS.iter().chain(&TEXTS).chain(&TEXTS).copied().collect();
        let mut windows = windows(&texts);
        assert_eq!(windows.look_at(0), WindowChange::default());
        assert_eq!(windows.resting, [1, 2, 4, 5, 7, 8].into());
        let told = windows.look_at(2 * S_NS).told;
        assert_eq!(told, ["begins: `tcp:1 drop at=2s for=3s`"; 3]);
        assert_eq!(windows.resting, [2, 5, 8].into());
        assert_eq!(windows.look_at(5 * S_NS).over, [1, 4, 7]);
        windows.look_at(9 * S_NS);
        assert_eq!(windows.resting, [1, 4, 7].into());
        assert_eq!(windows.look_at(10 * S_NS).over, [2, 5, 8]);
    }

    #[test]
    fn few_rules_stay_in() {
        let texts = ["tcp:1 drop at=2s for=3s"; MATCHES_MAX];
        let mut few = windows(&texts);
        few.look_at(0);
        assert!(few.resting.is_empty() && few.look_at(5 * S_NS).over.is_empty());
        let texts = ["tcp:1 drop at=2s for=3s"; MATCHES_MAX + 1];
        let mut many = windows(&texts);
        many.look_at(0);
        assert_eq!(many.resting.len(), MATCHES_MAX + 1);
    }

    #[test]
    fn windows_of_written_rules_are_told_of() {
        let texts = [
            "tcp:1 loss=1%",
            "tcp:1 drop for=3s",
            "tcp:1 drop at=1s",
            "tcp:1 drop period=2s duty=50% for=4s",
        ];
        let mut windows = windows(&texts);
        let begun = [1, 3].map(|rule| format!("begins: `{}`", texts[rule]));
        assert_eq!(windows.look_at(0).told, begun);
        assert_eq!(
            windows.look_at(S_NS).told,
            [format!("begins: `{}`", texts[2])]
        );
        assert_eq!(windows.look_at(2 * S_NS).told, [""; 0], "a repetition");
        assert_eq!(
            windows.look_at(3 * S_NS).told,
            [format!("ends: `{}`, at 3s", texts[1])]
        );
        assert_eq!(
            windows.look_at(4 * S_NS).told,
            [format!("ends: `{}`, at 4s", texts[3])]
        );
        assert_eq!(windows.next_ns, None);
    }
}
