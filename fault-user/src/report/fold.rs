//! Folds the faults that `random` draws: one line for all that were drawn from the same rule.

use std::fmt;

/// A line of a summary.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Folded {
    /// The rule; for drawn faults the one that they were drawn from, without times.
    pub rule: String,
    /// The indexes of its rules.
    pub members: Vec<usize>,
    /// Whether they were drawn.
    pub is_drawn: bool,
}

/// The name of a rule in a summary.
#[derive(Clone, Copy, Debug)]
pub enum RuleName<'a> {
    /// A rule as it was written.
    Written(&'a str),
    /// The rule that a fault was drawn from.
    Drawn(&'a str),
}

/// Folds rules, in the order of their first appearance. Written rules stay apart.
pub fn fold<'a>(names: impl Iterator<Item = RuleName<'a>>) -> Vec<Folded> {
    let mut lines: Vec<Folded> = Vec::new();
    for (index, name) in names.enumerate() {
        let (rule, is_drawn) = match name {
            RuleName::Written(rule) => (rule, false),
            RuleName::Drawn(rule) => (rule, true),
        };
        let mut known = lines.iter_mut();
        match known.find(|line| is_drawn && line.is_drawn && line.rule == rule) {
            Some(line) => line.members.push(index),
            None => lines.push(Folded {
                rule: rule.to_owned(),
                members: vec![index],
                is_drawn,
            }),
        }
    }
    lines
}

impl fmt::Display for Folded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.rule)?;
        match (self.is_drawn, self.members.len()) {
            (false, _) => Ok(()),
            (true, 1) => f.write_str(" (drawn once)"),
            (true, count) => write!(f, " (drawn {count} times)"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_drawn_faults_share_a_line() {
        let names = [
            RuleName::Written("a drop"),
            RuleName::Drawn("a drop"),
            RuleName::Drawn("b down"),
            RuleName::Drawn("a drop"),
            RuleName::Written("a drop"),
        ];
        let lines = fold(names.into_iter());
        let shown: Vec<String> = lines.iter().map(ToString::to_string).collect();
        assert_eq!(
            shown,
            [
                "a drop",
                "a drop (drawn 2 times)",
                "b down (drawn once)",
                "a drop"
            ]
        );
        assert_eq!(lines[1].members, [1, 3]);
    }
}
