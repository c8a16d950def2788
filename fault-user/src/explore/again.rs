//! The command line that does a cell again.

use super::cell::Cell;
use super::verdict::ExperimentVerdict;
use crate::report::file::shell_line;

/// What all cells have in common.
#[derive(Clone, Debug, Default)]
pub struct Again {
    /// The command and its arguments.
    pub command: Vec<String>,
    /// What all randomness comes from.
    pub seed: u64,
    /// Who runs it, where that was asked for.
    pub user: Option<String>,
    /// The options that name a running service; none where the command itself is explored.
    pub whose: Vec<String>,
    /// What the command's job is told by, such as `FAULT_JOB=1`, where there are several.
    pub job: Option<String>,
    /// Done before each run.
    pub before: Option<String>,
    /// Done after each run.
    pub after: Option<String>,
    /// Must succeed after each run.
    pub check: Option<String>,
}

impl Again {
    /// A line for a shell that makes a run with the same rules and draws, with what comes before and after it.
    #[must_use]
    pub fn line(&self, cell: &Cell) -> String {
        let mut line = match &self.before {
            Some(before) => format!("{} && ", self.beside(before)),
            None => String::new(),
        };
        line.push_str(&shell_line(&self.run(cell.rules())));
        let is_broken = cell.first.verdict == ExperimentVerdict::Broken;
        let check = self.check.as_ref().filter(|_| is_broken);
        if cell.first.seen.unrecovered.is_some() {
            // Whether it is well afterwards.
            line.extend(["; ".to_owned(), self.beside(&shell_line(&self.command))]);
        }
        for after in check.into_iter().chain(&self.after) {
            line.extend(["; ".to_owned(), self.beside(after)]);
        }
        line
    }

    fn run(&self, rules: &[String]) -> Vec<String> {
        let mut words = to_words(["sudo", "fault", "run", "--seed"]);
        words.push(self.seed.to_string());
        words.extend_from_slice(&self.whose);
        if let Some(user) = &self.user {
            words.extend(["--user".to_owned(), user.clone()]);
        }
        for rule in rules {
            words.extend(["-r".to_owned(), rule.clone()]);
        }
        words.push("--".to_owned());
        words.extend(self.with_job());
        words.extend_from_slice(&self.command);
        words
    }

    /// A line for the shell, as the user who runs the command.
    fn beside(&self, line: &str) -> String {
        let mut words = Vec::new();
        if let Some(user) = &self.user {
            words = to_words(["sudo"]);
            let (name, group) = match user.split_once(':') {
                Some((name, group)) => (name, Some(group)),
                None => (user.as_str(), None),
            };
            for (option, value) in [("-u", Some(name)), ("-g", group)] {
                // sudo(8) wants a mark in front of a number.
                let number = |value: &str| value.parse::<u32>().is_ok();
                let value = value.map(|value| {
                    let mark = if number(value) { "#" } else { "" };
                    format!("{mark}{value}")
                });
                words.extend(
                    value
                        .into_iter()
                        .flat_map(|value| [option.to_owned(), value]),
                );
            }
        }
        words.extend(self.with_job());
        words.extend(to_words(["sh", "-c", line]));
        shell_line(&words)
    }

    fn with_job(&self) -> Vec<String> {
        match &self.job {
            Some(job) => to_words(["env", job]),
            None => Vec::new(),
        }
    }
}

fn to_words<const N: usize>(words: [&str; N]) -> Vec<String> {
    words.map(str::to_owned).to_vec()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::dependency::tests::example;
    use super::super::experimenter::tests::cell_of;
    use super::super::faults::{FaultKind, experiment};
    use super::super::kind::ApplicationProtocol;
    use super::super::verdict::RunEnd;
    use super::super::verdict::tests::seen;
    use super::*;

    fn silent(verdict: ExperimentVerdict) -> Cell {
        let one = example(ApplicationProtocol::Redis, 6379);
        let experiment = experiment(0, &one, FaultKind::Silent, Duration::from_secs(10));
        cell_of(experiment.unwrap(), verdict, seen(RunEnd::Exited(1), 9))
    }

    #[test]
    fn the_line_has_everything_that_a_run_has() {
        let mut again = Again {
            command: to_words(["sh", "-c", "x y"]),
            seed: 7,
            ..Again::default()
        };
        let plain = "sudo fault run --seed 7 -r 'tcp:6379 blackhole' -- sh -c 'x y'";
        assert_eq!(again.line(&silent(ExperimentVerdict::Failed)), plain);
        again.user = Some("app:33".to_owned());
        again.job = Some("FAULT_JOB=1".to_owned());
        again.before = Some("make db".to_owned());
        again.after = Some("rm -r db".to_owned());
        again.check = Some("test -e db".to_owned());
        let run = "sudo fault run --seed 7 --user app:33 -r 'tcp:6379 blackhole' -- env FAULT_JOB=1 sh -c 'x y'";
        let beside = "sudo -u app -g '#33' env FAULT_JOB=1 sh -c ";
        assert_eq!(
            again.line(&silent(ExperimentVerdict::Failed)),
            format!("{beside}'make db' && {run}; {beside}'rm -r db'")
        );
        assert_eq!(
            again.line(&silent(ExperimentVerdict::Broken)),
            format!("{beside}'make db' && {run}; {beside}'test -e db'; {beside}'rm -r db'")
        );
    }
}
