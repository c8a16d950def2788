//! Faults drawn from a weighted list within limits, for environments that run for long.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::super::error::{Piece, RuleError};
use super::super::faults::Fault;
use super::super::object::read_text;
use super::super::units::{self, PPM};
use super::super::{Mix, MixArm, Rule, TargetRef};
use super::Nanoseconds;

/// A time between two ends, in nanoseconds, both included: `2s..10s`, or `5s` for that time alone.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct SpanNs {
    /// The shortest.
    pub least: u64,
    /// The longest.
    pub most: u64,
}

impl SpanNs {
    /// Reads `A..B` or `A`.
    fn read(piece: Piece<'_>) -> Result<Self, RuleError> {
        let text = piece.text();
        let Some(at) = text.find("..") else {
            let least = units::duration(piece)?;
            return Ok(Self { least, most: least });
        };
        let span = Self {
            least: units::duration(piece.slice(0..at))?,
            most: units::duration(piece.slice(at + 2..text.len()))?,
        };
        if span.least > span.most {
            return Err(piece
                .error("this range is empty")
                .expected("the shorter time first"));
        }
        Ok(span)
    }
}

impl fmt::Display for SpanNs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&units::show_duration(self.least))?;
        if self.most == self.least {
            return Ok(());
        }
        write!(f, "..{}", units::show_duration(self.most))
    }
}

impl Serialize for SpanNs {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for SpanNs {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        read_text(deserializer, Self::read)
    }
}

/// One entry of the list: `{ "weight": 3, "rule": "mysql down" }`, or the rule alone for weight 1.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct WeightedRule {
    /// How often it is drawn, compared with the others.
    pub weight: u32,
    /// The rule, without a timeline of its own.
    pub rule: Rule,
}

impl<'de> Deserialize<'de> for WeightedRule {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        /// The object form.
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Object {
            #[serde(default = "one")]
            weight: u32,
            rule: Rule,
        }
        let read = |text: &str| {
            Ok(Ok(Self {
                weight: 1,
                rule: text.parse()?,
            }))
        };
        Ok(
            match super::super::object::text_or::<D, _, Object>(deserializer, "a rule", read)? {
                Ok(choice) => choice,
                Err(Object { weight, rule }) => Self { weight, rule },
            },
        )
    }
}

/// The default of a weight and of how many act at once.
fn one() -> u32 {
    1
}

/// What is drawn, and within which limits.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Random {
    /// The weighted list.
    pub choices: Vec<WeightedRule>,
    /// How long a drawn fault acts.
    pub length: SpanNs,
    /// How long it is quiet before and between faults.
    #[serde(default)]
    pub quiet: SpanNs,
    /// How many act at once at most, each on a target of its own.
    #[serde(default = "one")]
    pub at_a_time: u32,
    /// After how long nothing is drawn any more, and the last fault has ended.
    pub total: Nanoseconds,
    /// The blast radius: the largest share of a target's connections that a drawn fault touches.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connections: Option<TextProbability>,
}

/// A probability in parts per million that is written as in the one-line form.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct TextProbability(pub u32);

impl Serialize for TextProbability {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&units::show_probability(self.0))
    }
}

impl<'de> Deserialize<'de> for TextProbability {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        read_text(deserializer, |piece| units::probability(piece).map(Self))
    }
}

/// The most faults that are drawn, whatever the limits say.
pub const MAX_DRAWN: usize = 100_000;

/// Finer times would only make rules harder to read.
const MS_NS: u64 = 1_000_000;

/// Numbers from a seed: `SplitMix64` (Steele, Lea and Flood 2014).
struct Numbers(u64);

impl Numbers {
    /// The next 64 bits.
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `limit`, which is more than 0, by the high half of a product (Lemire 2019; the
    /// bias is below 2^-32 for every limit that occurs here).
    fn below(&mut self, limit: u64) -> u64 {
        let product = u128::from(self.next()) * u128::from(limit);
        u64::try_from(product >> 64).unwrap_or(0)
    }

    /// A time within a span, in whole milliseconds where the span has one.
    fn within(&mut self, span: SpanNs) -> u64 {
        let time_ns = span.least + self.below((span.most - span.least).saturating_add(1));
        (time_ns - time_ns % MS_NS).max(span.least)
    }
}

impl Random {
    /// The faults of a seed, as rules with their times, in the order of their starts.
    ///
    /// It is a pure function of the list, the limits and the seed. No two faults of one target act at
    /// the same time, and each ends before the total is over.
    #[must_use]
    pub fn draw(&self, seed: u64) -> Vec<Rule> {
        if self.choices.iter().all(|choice| choice.weight == 0) {
            return Vec::new();
        }
        let mut numbers = Numbers(seed);
        let mut lanes: Vec<u64> = (0..self.at_a_time.max(1))
            .map(|_| numbers.within(self.quiet))
            .collect();
        let mut busy: Vec<(TargetRef, u64)> = Vec::new();
        let mut drawn = Vec::new();
        while drawn.len() < MAX_DRAWN {
            let Some((lane, at)) = lanes.iter().copied().enumerate().min_by_key(|(_, at)| *at)
            else {
                break;
            };
            busy.retain(|(_, end)| *end > at);
            let length = numbers.within(self.length).max(1);
            let end = at.saturating_add(length);
            if end > self.total.0 {
                // A shorter one might fit still, but then the last ones would all be short.
                lanes.swap_remove(lane);
                continue;
            }
            if let Some(rule) = self.pick(&mut numbers, &busy) {
                busy.push((rule.target.clone(), end));
                drawn.push(self.timed(rule, at, length));
                lanes[lane] = end.saturating_add(numbers.within(self.quiet));
            } else {
                // Every target has its fault: this lane waits until the first of them is free.
                let free = busy.iter().map(|(_, end)| *end).min().unwrap_or(end);
                lanes[lane] = free.saturating_add(numbers.within(self.quiet));
            }
        }
        drawn
    }

    /// One of the rules whose target has no fault, by weight.
    fn pick(&self, numbers: &mut Numbers, busy: &[(TargetRef, u64)]) -> Option<&Rule> {
        let free =
            |choice: &&WeightedRule| !busy.iter().any(|(target, _)| *target == choice.rule.target);
        let sum: u64 = self
            .choices
            .iter()
            .filter(free)
            .map(|c| u64::from(c.weight))
            .sum();
        if sum == 0 {
            return None;
        }
        let mut ticket = numbers.below(sum);
        for choice in self.choices.iter().filter(free) {
            match ticket.checked_sub(choice.weight.into()) {
                Some(rest) => ticket = rest,
                None => return Some(&choice.rule),
            }
        }
        None
    }

    /// The rule with its times, and within the blast radius.
    fn timed(&self, rule: &Rule, at: u64, length: u64) -> Rule {
        let mut rule = rule.clone();
        rule.modifiers.at_ns = at;
        rule.modifiers.for_ns = Some(length);
        if let Some(TextProbability(share)) = self.connections.filter(|share| share.0 < PPM) {
            rule.fault = narrowed(rule.fault, share);
        }
        rule
    }
}

/// A fault that touches at most a share of the connections.
fn narrowed(fault: Fault, share: u32) -> Fault {
    let scaled = |ppm: u32| {
        let product = u64::from(ppm) * u64::from(share) / u64::from(PPM);
        u32::try_from(product).unwrap_or(share)
    };
    let arms = match fault {
        Fault::Mix(mix) => mix
            .arms
            .into_iter()
            .map(|arm| MixArm {
                probability: scaled(arm.probability),
                ..arm
            })
            .collect(),
        fault => vec![MixArm {
            probability: share,
            fault,
        }],
    };
    Fault::Mix(Mix { arms })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A list with three targets.
    fn random(at_a_time: u32) -> Random {
        let choice = |weight, rule: &str| WeightedRule {
            weight,
            rule: rule.parse().unwrap(),
        };
        Random {
            choices: vec![
                choice(3, "mysql down"),
                choice(1, "redis delay=200ms"),
                choice(1, "tcp:80 mix 50%:timeout"),
            ],
            length: SpanNs {
                least: 1_000_000_000,
                most: 5_000_000_000,
            },
            quiet: SpanNs {
                least: 500_000_000,
                most: 2_000_000_000,
            },
            at_a_time,
            total: Nanoseconds(3_600_000_000_000),
            connections: None,
        }
    }

    /// The start and end of a drawn rule.
    fn times(rule: &Rule) -> (u64, u64) {
        let at = rule.modifiers.at_ns;
        (at, at + rule.modifiers.for_ns.unwrap())
    }

    #[test]
    fn same_seed_same_faults() {
        assert_eq!(random(2).draw(7), random(2).draw(7));
        assert_ne!(random(2).draw(7), random(2).draw(8));
    }

    #[test]
    fn limits_hold() {
        for at_a_time in 1..=4 {
            let drawn = random(at_a_time).draw(u64::from(at_a_time));
            assert!(drawn.len() > 500, "{} faults in an hour", drawn.len());
            assert!(drawn.is_sorted_by_key(|rule| rule.modifiers.at_ns));
            for (i, rule) in drawn.iter().enumerate() {
                let (at, end) = times(rule);
                assert!(
                    end <= 3_600_000_000_000
                        && (1_000_000_000..=5_000_000_000).contains(&(end - at))
                );
                assert_eq!(rule.check(), Ok(()));
                assert_eq!(at % MS_NS + end % MS_NS, 0, "{rule}");
                let others = drawn[..i].iter().filter(|other| times(other).1 > at);
                let (same, open) = others.fold((0, 0), |(same, open), other| {
                    (same + usize::from(other.target == rule.target), open + 1)
                });
                assert_eq!(same, 0, "two faults of one target at once");
                assert!(open < at_a_time, "more than {at_a_time} at once");
            }
        }
    }

    #[test]
    fn quiet_between_faults() {
        let drawn = random(1).draw(1);
        for pair in drawn.windows(2) {
            let gap = times(&pair[1]).0 - times(&pair[0]).1;
            assert!((500_000_000..=2_000_000_000).contains(&gap), "{gap}");
        }
    }

    #[test]
    fn weights_count() {
        let drawn = random(1).draw(3);
        let mysql = drawn
            .iter()
            .filter(|r| r.target == TargetRef::Name("mysql".into()))
            .count();
        // Three of five: 0.6, with five standard deviations of the binomial to either side.
        let n = u32::try_from(drawn.len()).map(f64::from).unwrap();
        let share = u32::try_from(mysql).map(f64::from).unwrap() / n;
        assert!(
            (share - 0.6).abs() < 5.0 * (0.24 / n).sqrt(),
            "{share} of {n}"
        );
    }

    #[test]
    fn blast_radius() {
        let narrow = Random {
            connections: Some(TextProbability(200_000)),
            ..random(1)
        };
        for rule in narrow.draw(1) {
            let text = rule.fault.to_string();
            let right = ["mix 20%:down", "mix 20%:delay=200ms", "mix 10%:timeout"];
            assert!(right.contains(&text.as_str()), "{text}");
        }
    }
}
