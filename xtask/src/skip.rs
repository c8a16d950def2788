//! What tests say when they skip.
//!
//! libtest has no word for a skipped test. Here one that can't run writes
//! `eprintln!("skipped: REASON")` and passes. Where the reason begins with `needs FEATURE` and the
//! machine has that feature by the list that `cargo xtask vm` makes, the skip is a failure.
//! libtest shows what a passing test wrote only with `--show-output`, in a part of its own.

/// What makes libtest show what passing tests wrote.
pub const SHOW_OUTPUT: &str = "--show-output";

/// A test that did not run.
#[derive(Debug, PartialEq, Eq)]
pub struct Skip {
    /// The test's name.
    pub test: String,
    /// Why, in its own words.
    pub reason: String,
}

impl Skip {
    /// The feature that it missed, where it named one.
    pub fn needs(&self) -> Option<&str> {
        let rest = self.reason.strip_prefix("needs ")?;
        Some(
            rest.split_once([':', ' '])
                .map_or(rest, |(feature, _)| feature),
        )
    }
}

/// Finds the skips in the output of test programs, line by line.
#[derive(Default)]
pub struct Reader {
    /// The test whose output the lines are.
    test: Option<String>,
    /// Whether the lines are what passing tests wrote.
    is_of_passing: bool,
}

/// What a line is.
#[derive(Debug, PartialEq, Eq)]
pub enum Line {
    /// A test says that it skipped.
    Skip(Skip),
    /// Something else that a passing test wrote, or libtest around it.
    OfPassing,
    /// Anything else.
    Other,
}

impl Reader {
    /// Says what the next line is.
    pub fn read(&mut self, line: &str) -> Line {
        let line = line.trim_end();
        if line == "successes:" {
            self.is_of_passing = true;
        } else if line == "failures:" || line.starts_with("test result: ") {
            *self = Self::default();
        }
        if let Some(name) = line
            .strip_prefix("---- ")
            .and_then(|rest| rest.strip_suffix(" stdout ----"))
        {
            self.test = Some(name.to_owned());
        }
        if let Some((_, reason)) = line.split_once("skipped: ") {
            let test = self.test.as_deref().unwrap_or("a test").to_owned();
            return Line::Skip(Skip {
                test,
                reason: reason.to_owned(),
            });
        }
        if self.is_of_passing {
            Line::OfPassing
        } else {
            Line::Other
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Line, Reader, Skip};

    fn skip(test: &str, reason: &str) -> Line {
        Line::Skip(Skip {
            test: test.to_owned(),
            reason: reason.to_owned(),
        })
    }

    #[test]
    fn skips_of_passing_tests_are_found_under_their_names() {
        let mut reader = Reader::default();
        let lines = [
            ("test order ... ok", Line::Other),
            ("successes:", Line::OfPassing),
            ("---- tests::order stdout ----", Line::OfPassing),
            ("seed 7", Line::OfPassing),
            (
                "skipped: needs tcx: kernel 5.10",
                skip("tests::order", "needs tcx: kernel 5.10"),
            ),
            ("successes:", Line::OfPassing),
            ("    tests::order", Line::OfPassing),
            ("test result: ok. 1 passed; 0 failed", Line::Other),
            ("running 3 tests", Line::Other),
        ];
        for (line, what) in lines {
            assert_eq!(reader.read(line), what, "{line}");
        }
    }

    #[test]
    fn what_failing_tests_wrote_is_passed_on() {
        let mut reader = Reader::default();
        reader.read("successes:");
        assert_eq!(reader.read("failures:"), Line::Other);
        assert_eq!(reader.read("---- loss stdout ----"), Line::Other);
        assert_eq!(reader.read("thread 'loss' panicked"), Line::Other);
    }

    #[test]
    fn a_skip_may_name_a_feature() {
        let needs = |reason: &str| {
            let skip = Skip {
                test: String::new(),
                reason: reason.to_owned(),
            };
            skip.needs().map(str::to_owned)
        };
        assert_eq!(needs("needs fq: no such qdisc").as_deref(), Some("fq"));
        assert_eq!(needs("needs fq").as_deref(), Some("fq"));
        assert_eq!(needs("no redis-server in PATH"), None);
    }
}
