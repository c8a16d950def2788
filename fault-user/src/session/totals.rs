//! The traffic of targets since the start, over all windows and changes of their rules.

use serde::{Deserialize, Serialize};

use crate::inject::injection::Hits;
use crate::plan::Plan;
use crate::steer::Steering;

/// The state of a target.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub struct TargetLine {
    /// Its name.
    pub target: String,
    /// Bytes since the start, in both directions.
    pub bytes: u64,
    /// Connections since the start.
    pub connections: u64,
    /// Open connections, if known.
    pub open: Option<u64>,
}

/// The totals of all targets.
#[derive(Debug, Default)]
pub struct TargetTotals {
    targets: Vec<TargetTotal>,
    /// The bytes that each rule had matched, and that the relays of its target had sent, at the last call.
    counted: Vec<[u64; 2]>,
}

/// The totals of one target.
#[derive(Debug)]
struct TargetTotal {
    name: String,
    bytes: u64,
    connections: u64,
    /// The connections before the rules were replaced.
    earlier_connections: u64,
}

impl TargetTotals {
    /// Adds the traffic since the last call. Returns the totals of the targets of `plan`, in the order of its rules.
    ///
    /// Rules of one target match the same packets: the one whose figure grew the most counts.
    pub fn take(
        &mut self,
        plan: &Plan,
        hits: &[Hits],
        steering: Option<&Steering>,
    ) -> Vec<TargetLine> {
        let redirected = steering.map(Steering::traffic).unwrap_or_default();
        let relayed = |index| {
            let found = redirected.iter().find(|(other, _)| *other == index);
            found.map(|(_, traffic)| traffic)
        };
        let mut lines: Vec<(TargetLine, u64)> = Vec::new();
        self.counted.resize(plan.rules.len(), [0; 2]);
        for (index, (rule, hits)) in plan.rules.iter().zip(hits).enumerate() {
            let place = lines
                .iter()
                .position(|(line, _)| line.target == rule.target);
            let place = place.unwrap_or_else(|| {
                let target = rule.target.clone();
                lines.push((
                    TargetLine {
                        target,
                        ..TargetLine::default()
                    },
                    0,
                ));
                lines.len() - 1
            });
            let (line, grown) = &mut lines[place];
            let now = [
                hits.stats.seen_bytes,
                relayed(index).map_or(0, |traffic| traffic.bytes),
            ];
            for (now, before) in now.iter().zip(self.counted[index]) {
                *grown = (*grown).max(now.saturating_sub(before));
            }
            self.counted[index] = now;
            line.connections = line.connections.max(hits.connections);
            line.open = line.open.max(relayed(index).map(|traffic| traffic.open));
        }
        lines
            .into_iter()
            .map(|(line, grown)| self.total(line, grown))
            .collect()
    }

    /// Adds the growth of a target to its totals.
    fn total(&mut self, line: TargetLine, grown: u64) -> TargetLine {
        let total = self.target(&line.target);
        total.bytes += grown;
        total.connections = total
            .connections
            .max(total.earlier_connections + line.connections);
        TargetLine {
            bytes: total.bytes,
            connections: total.connections,
            ..line
        }
    }

    fn target(&mut self, name: &str) -> &mut TargetTotal {
        let place = self.targets.iter().position(|one| one.name == name);
        let place = place.unwrap_or_else(|| {
            self.targets.push(TargetTotal {
                name: name.to_owned(),
                bytes: 0,
                connections: 0,
                earlier_connections: 0,
            });
            self.targets.len() - 1
        });
        &mut self.targets[place]
    }

    /// Goes on after the rules were replaced by those of `plan`. The `hits` with which they begin have been counted
    /// already.
    pub fn restart(&mut self, plan: &Plan, hits: &[Hits]) {
        self.counted = hits.iter().map(|hits| [hits.stats.seen_bytes, 0]).collect();
        for total in &mut self.targets {
            let rules = plan.rules.iter().zip(hits);
            let own = rules.filter(|(rule, _)| rule.target == total.name);
            let counted = own.map(|(_, hits)| hits.connections).max().unwrap_or(0);
            total.earlier_connections = total.connections.saturating_sub(counted);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::testing::plan;

    fn hits(bytes: u64, connections: u64) -> Hits {
        let mut hits = Hits::default();
        hits.stats.seen_bytes = bytes;
        hits.connections = connections;
        hits
    }

    #[test]
    fn rules_that_follow_each_other_count_together() {
        let plan = plan(&["tcp:1 drop for=1s", "tcp:1 loss=1%", "udp:2 drop"]);
        let mut totals = TargetTotals::default();
        let mut take = |bytes: [u64; 3]| {
            let lines = totals.take(&plan, &bytes.map(|bytes| hits(bytes, 1)), None);
            lines.iter().map(|line| line.bytes).collect::<Vec<_>>()
        };
        assert_eq!(take([100, 90, 7]), [100, 7], "the same packets");
        assert_eq!(
            take([100, 150, 7]),
            [160, 7],
            "only the second one is loaded"
        );
        assert_eq!(take([0, 150, 0]), [160, 7], "nothing falls");
    }

    #[test]
    fn totals_outlive_their_rules() {
        let (old, new) = (
            plan(&["tcp:1 drop", "tcp:1 loss=1%"]),
            plan(&["tcp:1 drop"]),
        );
        let mut totals = TargetTotals::default();
        totals.take(&old, &[hits(60, 2), hits(100, 5)], None);
        // The first rule was kept, with its figures.
        totals.restart(&new, &[hits(60, 2)]);
        let line = &totals.take(&new, &[hits(60, 2)], None)[0];
        assert_eq!((line.bytes, line.connections), (100, 5));
        let line = &totals.take(&new, &[hits(75, 4)], None)[0];
        assert_eq!((line.bytes, line.connections), (115, 7));
    }
}
