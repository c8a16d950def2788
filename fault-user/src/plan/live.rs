//! Replaces a plan without interrupting traffic: unchanged rules keep their state and counters.

use std::collections::HashSet;

use anyhow::{Context as _, Result};
use fault_common::abi::{RULES_MAX, RuleEntry, rule_uid};
use fault_common::random::rule_key;

use super::{Plan, PlannedRule};

impl Plan {
    /// Makes this plan the successor of `old`, as the `age`-th plan (the first is 1), `elapsed_ns` after the start.
    ///
    /// A rule with the same text as one of the old plan is the same rule. The times of a new rule count from now on.
    /// Its state is not used by the old plan, whose rules may still process packets.
    ///
    /// # Errors
    /// The old and the new rules together are too many.
    pub fn succeed(&mut self, old: &Self, age: u32, elapsed_ns: u64) -> Result<()> {
        self.follow(old, age, elapsed_ns, |other, rule| other.text == rule.text)
    }

    /// As [`Plan::succeed`], but all rules are new ones, also those with the same text.
    ///
    /// # Errors
    /// As [`Plan::succeed`].
    pub fn supersede(&mut self, old: &Self, age: u32, elapsed_ns: u64) -> Result<()> {
        self.follow(old, age, elapsed_ns, |_, _| false)
    }

    fn follow(
        &mut self,
        old: &Self,
        age: u32,
        elapsed_ns: u64,
        is_same: impl Fn(&PlannedRule, &PlannedRule) -> bool,
    ) -> Result<()> {
        let mut taken: HashSet<u32> = states(old).collect();
        let mut claimed = HashSet::new();
        for rule in &mut self.rules {
            let same = old.rules.iter().enumerate().find(|(index, other)| {
                is_same(other, rule)
                    && other.entries.len() == rule.entries.len()
                    && !claimed.contains(index)
            });
            if let Some((index, other)) = same {
                claimed.insert(index);
                keep(rule, other);
                continue;
            }
            for part in &mut rule.entries {
                take(&mut taken, &mut part.entry, age)?;
                part.entry.at_ns += elapsed_ns;
            }
        }
        if let Some(learner) = &mut self.learner {
            match &old.learner {
                Some(other) => learner.entry = other.entry,
                None => take(&mut taken, &mut learner.entry, age)?,
            }
        }
        let old = old.rules.iter().flat_map(|rule| &rule.entries);
        part_keys(&mut self.rules, &old.map(|part| part.entry.uid).collect());
        Ok(())
    }
}

/// Gives an entry a state that is not taken.
fn take(taken: &mut HashSet<u32>, entry: &mut RuleEntry, age: u32) -> Result<()> {
    let state = (0..2 * RULES_MAX)
        .find(|state| taken.insert(*state))
        .context("the old and the new rules together are too many: use fewer rules")?;
    entry.state = state;
    entry.uid = rule_uid(age, state);
    Ok(())
}

/// A new rule may have the former position of a kept one, but must not have the same random draws. `kept` are the
/// identities of kept rules.
fn part_keys(rules: &mut [PlannedRule], kept: &HashSet<u32>) {
    let is_kept = |rule: &PlannedRule| {
        let mut parts = rule.entries.iter();
        parts.all(|part| kept.contains(&part.entry.uid))
    };
    let keys = |rule: &PlannedRule| -> HashSet<u64> {
        let parts = rule.entries.iter();
        parts.map(|part| part.entry.key).collect()
    };
    let taken: HashSet<u64> = rules
        .iter()
        .filter(|rule| is_kept(rule))
        .flat_map(keys)
        .collect();
    for rule in rules.iter_mut() {
        if is_kept(rule) || keys(rule).is_disjoint(&taken) {
            continue;
        }
        // The same for all arms of a mix, which share one draw.
        let salt = rule.entries.first().map_or(0, |part| part.entry.uid);
        for part in &mut rule.entries {
            part.entry.key = rule_key(part.entry.key, salt);
            part.entry.mix_key = rule_key(part.entry.mix_key, salt);
        }
    }
}

fn states(plan: &Plan) -> impl Iterator<Item = u32> {
    let entries = plan.rules.iter().flat_map(|rule| &rule.entries);
    let all = entries.chain(&plan.learner);
    all.map(|part| part.entry.state)
}

/// Copies the identity of a rule: its state, its randomness and its time.
fn keep(rule: &mut PlannedRule, old: &PlannedRule) {
    for (part, before) in rule.entries.iter_mut().zip(&old.entries) {
        part.entry.state = before.entry.state;
        part.entry.uid = before.entry.uid;
        part.entry.key = before.entry.key;
        part.entry.mix_key = before.entry.mix_key;
        part.entry.at_ns = before.entry.at_ns;
        part.entry.length_ns = before.entry.length_ns;
        part.shaper = before.shaper;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::testing::plan;

    #[test]
    fn a_rule_that_stays_is_the_same_and_a_new_one_begins_now() {
        let old = plan(&["tcp:1 drop", "tcp:2 loss=5%", "tcp:2 loss=5%"]);
        let mut new = plan(&[
            "tcp:3 drop at=1s",
            "tcp:2 loss=5%",
            "tcp:2 loss=5%",
            "tcp:2 loss=5%",
        ]);
        new.succeed(&old, 2, 10_000_000_000).unwrap();
        let entry = |plan: &Plan, rule: usize| plan.rules[rule].entries[0].entry;
        assert_eq!(entry(&new, 1), entry(&old, 1));
        assert_eq!(entry(&new, 2), entry(&old, 2));
        assert_eq!(
            (entry(&new, 0).state, entry(&new, 0).uid),
            (3, rule_uid(2, 3))
        );
        assert_eq!(entry(&new, 0).at_ns, 11_000_000_000);
        assert_eq!(entry(&new, 3).state, 4);
    }
    #[test]
    fn a_new_rule_in_the_place_of_one_that_stays_draws_for_itself() {
        let old = plan(&["tcp:1 drop", "tcp:2 loss=50%"]);
        let mut new = plan(&["tcp:2 loss=50%", "tcp:2 mix 50%:drop 50%:reset"]);
        new.succeed(&old, 2, 0).unwrap();
        let entry = |rule: usize, arm: usize| new.rules[rule].entries[arm].entry;
        assert_eq!(entry(0, 0).key, old.rules[1].entries[0].entry.key);
        assert_ne!(entry(1, 0).key, entry(0, 0).key);
        assert_eq!(entry(1, 0).mix_key, entry(1, 1).mix_key);
    }
}
