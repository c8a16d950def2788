//! What tests say when they skip.
//!
//! libtest has no word for a skipped test and hides what a passing one prints with `println!`. So a
//! test that can't run here writes one line straight to [`std::io::stderr`] and passes:
//! `skipped: NAME: needs FEATURE: REASON`, with a feature that `cargo xtask vm` knows, or
//! `skipped: NAME: REASON`.

/// A test that did not run.
#[derive(Debug, PartialEq, Eq)]
pub struct Skip {
    /// The test's name.
    pub test: String,
    /// The feature of the kernel that it missed, where it named one.
    pub needs: Option<String>,
    /// All that it said after its name.
    pub reason: String,
}

impl Skip {
    /// Reads a line of a test's output, in which other output may come first.
    pub fn parse(line: &str) -> Option<Self> {
        let (_, said) = line.split_once("skipped: ")?;
        let (test, reason) = said.split_once(": ")?;
        let needs = reason.strip_prefix("needs ").map(|rest| {
            rest.split_once(':')
                .map_or(rest, |(feature, _)| feature)
                .trim()
                .to_owned()
        });
        Some(Self {
            test: test.to_owned(),
            needs,
            reason: reason.trim().to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::Skip;

    #[test]
    fn a_skip_names_the_test_the_feature_and_the_reason() {
        let skip = Skip::parse("test x ... skipped: tcx_order: needs tcx: kernel 5.10").unwrap();
        assert_eq!(
            (
                skip.test.as_str(),
                skip.needs.as_deref(),
                skip.reason.as_str()
            ),
            ("tcx_order", Some("tcx"), "needs tcx: kernel 5.10")
        );
    }

    #[test]
    fn a_skip_may_name_no_feature() {
        let skip = Skip::parse("skipped: redis_loss: no redis-server in PATH").unwrap();
        assert_eq!(
            (skip.needs, skip.reason.as_str()),
            (None, "no redis-server in PATH")
        );
    }

    #[test]
    fn other_lines_are_no_skips() {
        assert_eq!(Skip::parse("test skips ... ok"), None);
        assert_eq!(Skip::parse("skipped: without a reason"), None);
    }
}
