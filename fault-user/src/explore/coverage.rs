//! What no experiment reached, and why.

use std::collections::BTreeSet;

use super::cell::Cell;
use super::dependency::{Dependency, Found};
use super::experimenter::Explored;
use crate::report::summary::counted;
use crate::rule::Protocol;

/// The dependencies, and connections to them, that no experiment reached: one line each.
#[must_use]
pub fn unreached(found: &Found, explored: &Explored) -> Vec<String> {
    let dependencies = found.dependencies.iter().enumerate();
    let lines = dependencies.filter_map(|(number, one)| {
        let concerns = |place: usize| place == number;
        let own = explored.cells.iter();
        let own = own.filter(|cell| concerns(cell.experiment.dependency));
        let own: Vec<&Cell> = own.collect();
        if own.iter().any(|cell| is_reached(cell)) {
            return connections(one, number, &own);
        }
        let mut left_out = explored.left_out.iter();
        let why = if !own.is_empty() {
            let is_used = |cell: &&Cell| cell.first.seen.connects.get(number) != Some(&0);
            if own.iter().any(is_used) {
                "no packet or request was one that its faults act on"
            } else {
                "the command did not use it in these runs"
            }
        } else if left_out.any(|one| concerns(one.dependency)) {
            "its experiments were not run"
        } else {
            "no fault was chosen for it (--faults, --only, --skip)"
        };
        Some(format!("no experiment reached {one}: {why}"))
    });
    lines.collect()
}

/// Whether the fault on the dependency acted. Of a pair the other one may have acted alone.
fn is_reached(cell: &Cell) -> bool {
    let seen = &cell.first.seen;
    let is_pair = !cell.experiment.parts.is_empty();
    seen.hits != 0 && !(is_pair && seen.connects.get(cell.experiment.dependency) == Some(&0))
}

/// The connections that a run without faults makes and no experiment reached; nothing where there are none, or they can't be
/// told apart.
fn connections(one: &Dependency, number: usize, cells: &[&Cell]) -> Option<String> {
    let singles = cells.iter().filter(|cell| cell.experiment.parts.is_empty());
    let acted = singles.filter(|cell| cell.first.seen.hits != 0);
    let acted: Vec<_> = acted.map(|cell| &cell.first.seen).collect();
    // Reports of older versions do not have them.
    let is_known = !acted.is_empty() && acted.iter().all(|seen| !seen.reached.is_empty());
    if one.protocol != Protocol::Tcp || one.is_kept || !is_known {
        return None;
    }
    let reached: BTreeSet<u64> = acted
        .iter()
        .flat_map(|seen| seen.reached.iter().map(|connection| (*connection).into()))
        .collect();
    let missing: BTreeSet<u64> = (1..=one.connections)
        .filter(|connection| !reached.contains(connection))
        .collect();
    let (first, last) = (missing.first()?, missing.last()?);
    let most = acted.iter().filter_map(|seen| seen.connects.get(number));
    let most = *most.max()?;
    let why = if most < *first {
        let most = counted(most, "connection");
        format!("under faults the command made at most {most}")
    } else {
        "the faults acted on others".to_owned()
    };
    let which = match missing.len() {
        1 => format!("connection {first}"),
        count => format!("{count} connections, from {first} to {last},"),
    };
    Some(format!(
        "no experiment reached {which} of {} to {}: {why}",
        one.connections, one.target
    ))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::dependency::tests::example;
    use super::super::experimenter::tests::cell_of;
    use super::super::faults::{FaultKind, experiment};
    use super::super::kind::ApplicationProtocol;
    use super::super::verdict::tests::seen;
    use super::super::verdict::{ExperimentVerdict, RunEnd};
    use super::*;

    #[test]
    fn what_no_experiment_reached_is_told_with_the_reason() {
        let mut many = example(ApplicationProtocol::Redis, 1);
        many.connections = 4;
        let found = Found {
            dependencies: vec![
                many,
                example(ApplicationProtocol::Redis, 2),
                example(ApplicationProtocol::Redis, 3),
                example(ApplicationProtocol::Redis, 4),
            ],
            out_of_reach: Vec::new(),
        };
        let of = |number: usize| {
            let one = &found.dependencies[number];
            experiment(number, one, FaultKind::Silent, Duration::from_secs(10)).unwrap()
        };
        let mut hit = cell_of(
            of(0),
            ExperimentVerdict::Survived,
            seen(RunEnd::Exited(0), 9),
        );
        hit.first.seen.reached = [1, 2].into();
        hit.first.seen.connects = vec![2, 0, 2, 0];
        let mut missed = cell_of(
            of(1),
            ExperimentVerdict::NotReached,
            seen(RunEnd::Exited(0), 9),
        );
        missed.first.seen.hits = 0;
        missed.first.seen.connects = vec![4, 0, 2, 0];
        let mut explored = Explored {
            cells: vec![hit, missed],
            left_out: vec![of(2)],
            stopped: None,
        };
        let lines = unreached(&found, &explored);
        let expected = [
            "no experiment reached 2 connections, from 3 to 4, of 4 to tcp:1: under faults the command made at most 2 \
             connections",
            "no experiment reached redis tcp:10.0.0.5:2: the command did not use it in these runs",
            "no experiment reached redis tcp:10.0.0.5:3: its experiments were not run",
            "no experiment reached redis tcp:10.0.0.5:4: no fault was chosen for it (--faults, --only, --skip)",
        ];
        assert_eq!(lines, expected);
        explored.cells[0].first.seen.reached = (1..=4).collect();
        explored.cells[1].first.seen.connects = vec![4, 1, 2, 0];
        let lines = unreached(&found, &explored);
        assert!(lines[0].ends_with("act on"), "{lines:?}");
    }
}
