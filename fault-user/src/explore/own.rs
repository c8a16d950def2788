//! Experiments of a user's own: the rules of a scenario file, one each.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, ensure};

use super::dependency::Dependency;
use super::faults::{Experiment, FaultKind, Own};
use crate::rule::scenario::Scenario;
use crate::rule::{Protocol, Rule, SystemResolver, TargetRef, Targets};
use crate::steer::reconnect::is_aimed;

/// The rules of a file.
#[derive(Debug)]
pub struct OwnRules {
    path: PathBuf,
    /// A rule as it is written, and what it stands for: several where it is a profile.
    rules: Vec<(Rule, Vec<Rule>)>,
}

impl OwnRules {
    /// Reads a scenario file.
    ///
    /// # Errors
    /// It has a mistake, no rules, or what makes no experiment: one line.
    pub fn load(path: &Path) -> Result<Self> {
        let name = path.display();
        let scenario = Scenario::load(path)?;
        ensure!(
            !scenario.rules.is_empty(),
            "{name}: there are no rules in it"
        );
        let others = [
            ("expect", !scenario.expect.is_empty()),
            ("random", scenario.random.is_some()),
            ("for", scenario.length.is_some()),
        ];
        if let Some((field, _)) = others.iter().find(|(_, is_there)| *is_there) {
            return Err(anyhow!(
                "{name}: `{field}` has no meaning for `fault explore`, where each rule is an experiment: remove it"
            ));
        }
        let mut rules = Vec::new();
        for rule in scenario.rules {
            let rule = spelled_out(rule, &scenario.targets);
            let expanded = rule.expanded(&scenario.profiles)?;
            rules.push((rule, expanded));
        }
        Ok(Self {
            path: path.to_owned(),
            rules,
        })
    }

    /// An experiment for each rule, on the first dependency that it concerns.
    ///
    /// # Errors
    /// A rule concerns none: one line.
    pub fn experiments(&self, dependencies: &[Dependency]) -> Result<Vec<Experiment>> {
        let experiments = self.rules.iter().map(|(rule, expanded)| {
            let dependency = concerned(rule, dependencies)?.with_context(|| {
                format!(
                    "{}: `{rule}` concerns nothing that the command talks to: its dependencies are listed above",
                    self.path.display()
                )
            })?;
            let (target, text) = (rule.target.to_string(), rule.to_string());
            let name = text.strip_prefix(&target).unwrap_or(&text).trim();
            Ok(Experiment {
                dependency,
                fault: FaultKind::Own,
                own: Some(Own {
                    target,
                    name: name.to_owned(),
                }),
                parts: Vec::new(),
                rules: expanded.iter().map(ToString::to_string).collect(),
                magnitude: None,
                adds: Duration::ZERO,
                over: None,
            })
        });
        experiments.collect()
    }
}

/// A rule with the target itself in the place of its name.
fn spelled_out(mut rule: Rule, targets: &Targets) -> Rule {
    if let TargetRef::Name(name) = &rule.target
        && let Some(target) = targets.get(name)
    {
        rule.target = TargetRef::Spec(target.clone());
    }
    rule
}

/// The place of the first dependency that a rule concerns.
fn concerned(rule: &Rule, dependencies: &[Dependency]) -> Result<Option<usize>> {
    let written = rule.target.to_string();
    let target = rule.resolve(&Targets::new(), &mut SystemResolver)?.target;
    let concerns = |one: &Dependency| {
        let has_protocol = target.protocol == one.protocol || target.protocol == Protocol::Any;
        let mut addresses = one.addresses.iter();
        written == one.target
            || written == "*"
            || (has_protocol
                && one.protocol != Protocol::Dns
                && addresses.any(|address| is_aimed(&target, SocketAddr::new(*address, one.port))))
    };
    Ok(dependencies.iter().position(concerns))
}

#[cfg(test)]
mod tests {
    use super::super::dependency::tests::example;
    use super::super::kind::ApplicationProtocol;
    use super::*;

    fn load(text: &str) -> Result<OwnRules> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("own.toml");
        std::fs::write(&path, text).unwrap();
        OwnRules::load(&path)
    }

    #[test]
    fn each_rule_is_an_experiment_on_what_it_concerns() {
        let text = "targets = { db = 'tcp:2' }\nrules = ['db loss=5%', '10.0.0.0/8:1 delay=1s p=50%', '* profile=lte']";
        let dependencies = [
            example(ApplicationProtocol::Redis, 1),
            example(ApplicationProtocol::Unknown, 2),
        ];
        let own = load(text).unwrap().experiments(&dependencies).unwrap();
        let told: Vec<_> = own
            .iter()
            .map(|one| (one.dependency, one.target(&dependencies), one.name()))
            .collect();
        assert_eq!(
            told,
            [
                (1, "tcp:2", "loss=5%"),
                (0, "10.0.0.0/8:1", "delay=1s p=50%"),
                (0, "*", "profile=lte"),
            ]
        );
        assert_eq!(own[0].rules, ["tcp:2 loss=5%"]);
        assert!(own[2].rules.len() > 1, "a profile is several rules");
    }

    #[test]
    fn mistakes_are_told() {
        let dependencies = [example(ApplicationProtocol::Redis, 1)];
        for (text, part) in [
            ("rules = []", "there are no rules in it"),
            ("rules = ['tcp:1 los=5%']", "unknown fault `los`\n"),
            (
                "rules = ['tcp:1 loss=5%']\nfor = '3s'",
                "`for` has no meaning",
            ),
            (
                "rules = ['tcp:7 loss=5%']",
                "`tcp:7 loss=5%` concerns nothing",
            ),
        ] {
            let found = load(text).and_then(|own| own.experiments(&dependencies));
            let error = found.unwrap_err().to_string();
            assert!(error.contains(part), "`{part}` is not in {error}");
        }
    }
}
