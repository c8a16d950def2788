//! Accepted failures: a team starts from where it is, and only what got worse fails.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, ensure};
use serde::{Deserialize, Serialize};

use super::cell::Cell;
use super::dependency::Dependency;
use super::faults::{Experiment, FaultKind, experiment, kinds_of_pair};
use super::verdict::ExperimentVerdict;
use crate::rule::Rule;
use crate::sys::process::files::{self, Writer};

/// What stands at the beginning of a file that was written.
const HEAD: &str = "\
# What `fault explore --accept` accepts. A failure that is not listed here, or that is worse than it is here, fails the
# build. Give each one a reason, and remove those that are fixed.

";

/// One accepted failure.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    /// The dependency, as rules name it.
    target: String,
    /// The kind of fault.
    fault: String,
    /// The worst verdict that is accepted.
    verdict: ExperimentVerdict,
    /// Why it is accepted.
    #[serde(default)]
    reason: String,
}

/// The file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Content {
    #[serde(default)]
    accepted: Vec<Entry>,
}

/// A file of accepted failures.
#[derive(Debug)]
pub struct AcceptFile {
    path: PathBuf,
    writer: Writer,
    /// Nothing where there is no file yet: this run writes it.
    content: Option<Content>,
}

impl AcceptFile {
    /// Reads the file. Where there is none yet, checks that it can be written.
    ///
    /// # Errors
    /// It has a mistake, or can't be read or written: one line.
    pub fn open(path: &Path) -> Result<Self> {
        let writer = Writer::start()?;
        let own = path.to_owned();
        let text = writer.run(move || read(&own))?;
        let content = text.map(|text| parse(path, &text)).transpose()?;
        Ok(Self {
            path: path.to_owned(),
            writer,
            content,
        })
    }

    /// Whether this run writes the file.
    #[must_use]
    pub fn is_new(&self) -> bool {
        self.content.is_none()
    }

    /// Checks that each accepted failure is that of an experiment. `own` are those of the file of rules, `limit` is how
    /// long a run may take.
    ///
    /// # Errors
    /// The first that is none: one line.
    pub fn check(
        &self,
        dependencies: &[Dependency],
        own: &[Experiment],
        limit: Duration,
    ) -> Result<()> {
        let path = self.path.display();
        // What is used only under another fault is not known yet.
        let singles = self.entries().iter();
        let singles = singles.filter(|entry| kinds_of_pair(&entry.fault).is_none());
        for Entry { target, fault, .. } in singles {
            let targeted = own.iter().filter(|one| one.target(dependencies) == target);
            let mut known = dependencies.iter().filter(|one| one.target == *target);
            ensure!(
                targeted.clone().count() + known.clone().count() != 0,
                "{path}: the command does not talk to `{target}`: its dependencies are listed above"
            );
            let is_own = targeted.clone().any(|one| one.name() == fault);
            let is_tried = match fault.parse::<FaultKind>() {
                Ok(kind) => known.any(|one| experiment(0, one, kind, limit).is_some()),
                // A rule of a file that this run may leave out.
                Err(_) => own.is_empty(),
            };
            ensure!(
                is_own || is_tried,
                "{path}: `{fault}` is not tried on `{target}`: remove the entry (--plan lists what is tried)"
            );
        }
        Ok(())
    }

    /// The verdict that is accepted of a cell, if one is.
    #[must_use]
    pub fn accepted(&self, dependencies: &[Dependency], cell: &Cell) -> Option<ExperimentVerdict> {
        let target = cell.experiment.target(dependencies);
        let fault = cell.experiment.name();
        let is_it = |entry: &&Entry| entry.target == target && entry.fault == fault;
        let entry = self.entries().iter().find(is_it);
        entry.map(|entry| entry.verdict)
    }

    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The number of accepted failures that have no reason.
    #[must_use]
    pub fn without_reason(&self) -> usize {
        let entries = self.entries().iter();
        entries
            .filter(|entry| entry.reason.trim().is_empty())
            .count()
    }

    fn entries(&self) -> &[Entry] {
        self.content
            .as_ref()
            .map_or(&[], |content| &content.accepted)
    }

    /// Writes the file with the failures among these cells, which are accepted from now on.
    ///
    /// # Errors
    /// It can't be written.
    pub fn write(&mut self, dependencies: &[Dependency], cells: &[Cell]) -> Result<()> {
        let failures = cells.iter().filter(|cell| cell.is_failure());
        let entry = |cell: &Cell| Entry {
            target: cell.experiment.target(dependencies).to_owned(),
            fault: cell.experiment.name().to_owned(),
            verdict: cell.first.verdict,
            reason: String::new(),
        };
        let content = Content {
            accepted: failures.map(entry).collect(),
        };
        let text = format!("{HEAD}{}", toml::to_string_pretty(&content)?);
        let path = self.path.clone();
        self.writer
            .run(move || files::replace(&path, text.as_bytes()))?;
        self.content = Some(content);
        Ok(())
    }
}

/// The text of the file; nothing where there is none, and one can be made.
fn read(path: &Path) -> Result<Option<String>> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            files::check_replaceable(path)?;
            Ok(None)
        }
        Err(error) => Err(error).with_context(|| format!("can't read {}", path.display())),
    }
}

fn parse(path: &Path, text: &str) -> Result<Content> {
    let name = path.display();
    let content: Content = toml::from_str(text).map_err(|error| {
        let line = error.span().map_or(1, |span| {
            1 + text[..span.start.min(text.len())].matches('\n').count()
        });
        let message = error.message().replace('\n', " ");
        anyhow!("{name}:{line}: {message}")
    })?;
    let mut known = BTreeSet::new();
    for Entry {
        target,
        fault,
        verdict,
        ..
    } in &content.accepted
    {
        // Else it is a rule of a file.
        let is_rule = format!("{target} {fault}").parse::<Rule>().is_ok();
        let kind = match kinds_of_pair(fault) {
            Some(kinds) => kinds.map(|_| ()),
            None => fault.parse::<FaultKind>().map(|_| ()),
        };
        if let Err(error) = kind
            && !is_rule
        {
            return Err(anyhow!("{name}: `{target}`: {error}"));
        }
        ensure!(
            verdict.is_failure(),
            "{name}: `{target} {fault}`: `{}` is no failure: remove it",
            verdict.name()
        );
        ensure!(
            known.insert((target, fault)),
            "{name}: `{target} {fault}` is listed twice: remove one of them"
        );
    }
    Ok(content)
}

#[cfg(test)]
mod tests {
    use super::super::cell::Standing;
    use super::super::dependency::tests::example;
    use super::super::experimenter::tests::cell_of;
    use super::super::kind::ApplicationProtocol;
    use super::super::verdict::RunEnd;
    use super::super::verdict::tests::seen;
    use super::*;

    const LIMIT: Duration = Duration::from_secs(10);

    fn cell(verdict: ExperimentVerdict) -> Cell {
        let one = example(ApplicationProtocol::Redis, 6379);
        let experiment = experiment(0, &one, FaultKind::Silent, LIMIT);
        cell_of(experiment.unwrap(), verdict, seen(RunEnd::TimedOut, 77))
    }

    #[test]
    fn only_what_is_worse_than_accepted_fails() {
        use ExperimentVerdict::{Broken, Failed, Hung, NoRecovery, NotReached, Survived};
        for (verdict, accepted, standing) in [
            (Survived, None, Standing::Well),
            (Failed, None, Standing::New),
            (Failed, Some(Failed), Standing::Accepted),
            (NoRecovery, Some(Failed), Standing::Accepted),
            (Hung, Some(Failed), Standing::Worse),
            (Broken, Some(Hung), Standing::Worse),
            (Failed, Some(Hung), Standing::Better),
            (Survived, Some(Hung), Standing::Better),
            (NotReached, Some(Hung), Standing::Accepted),
        ] {
            assert_eq!(
                Standing::of(&cell(verdict), accepted),
                standing,
                "{verdict:?}"
            );
        }
        let mut flaky = cell(Hung);
        flaky.differs = Some(Survived);
        assert_eq!(Standing::of(&flaky, None), Standing::Well);
        assert_eq!(Standing::of(&flaky, Some(Failed)), Standing::Accepted);
    }

    #[test]
    fn what_is_written_is_read_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("resilience.toml");
        let dependencies = [example(ApplicationProtocol::Redis, 6379)];
        let mut first = AcceptFile::open(&path).unwrap();
        assert!(first.is_new() && !path.exists());
        let cells = [cell(ExperimentVerdict::Hung)];
        assert_eq!(first.accepted(&dependencies, &cells[0]), None);
        first.write(&dependencies, &cells).unwrap();
        let second = AcceptFile::open(&path).unwrap();
        assert!(!second.is_new());
        second.check(&dependencies, &[], LIMIT).unwrap();
        assert_eq!(
            second.accepted(&dependencies, &cells[0]),
            Some(ExperimentVerdict::Hung)
        );
        assert_eq!(second.without_reason(), 1);
        let other = [example(ApplicationProtocol::Redis, 1)];
        let error = second.check(&other, &[], LIMIT).unwrap_err();
        let error = error.to_string();
        assert!(error.contains("does not talk to `tcp:6379`"), "{error}");
    }

    #[test]
    fn what_is_never_tried_can_t_be_accepted() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("resilience.toml");
        let dependencies = [example(ApplicationProtocol::Unknown, 6379)];
        let checked = |fault: &str| {
            let text =
                format!("[[accepted]]\ntarget = 'tcp:6379'\nfault = '{fault}'\nverdict = 'hung'\n");
            std::fs::write(&path, text).unwrap();
            let file = AcceptFile::open(&path).unwrap();
            file.check(&dependencies, &[], LIMIT)
        };
        checked("silent").unwrap();
        checked("loss=5%").unwrap();
        // Nobody knows the errors of an unknown protocol.
        let error = checked("error").unwrap_err().to_string();
        assert!(
            error.contains("`error` is not tried on `tcp:6379`"),
            "{error}"
        );
    }

    #[test]
    fn mistakes_are_told_in_one_line() {
        let entry = |fault: &str, verdict: &str| {
            format!("[[accepted]]\ntarget = 'tcp:1'\nfault = '{fault}'\nverdict = '{verdict}'\n")
        };
        let cases = [
            ("x".to_owned(), "f.toml:1: "),
            (entry("silnet", "hung"), "did you mean `silent`?"),
            (
                entry("silent with tcp:2 refusd", "hung"),
                "did you mean `refused`?",
            ),
            (entry("silent", "hang"), "f.toml:4: unknown variant `hang`"),
            (entry("silent", "slow"), "`slow` is no failure"),
            (entry("silent", "hung").repeat(2), "listed twice"),
            (entry("silent", "hung") + "why = 1\n", "unknown field `why`"),
        ];
        for (text, part) in cases {
            let error = parse(Path::new("f.toml"), &text).unwrap_err().to_string();
            assert!(
                error.contains(part) && error.lines().count() == 1,
                "`{part}` is not in {error}"
            );
        }
    }
}
