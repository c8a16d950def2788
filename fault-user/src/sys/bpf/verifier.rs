//! Summarizes the verifier's errors in one line.

use aya::programs::ProgramError;

/// A load error in one line: the verifier's reason instead of its whole log.
#[must_use]
pub fn summary(name: &str, error: &ProgramError) -> String {
    match error {
        ProgramError::LoadError {
            io_error,
            verifier_log,
        } => {
            let log = verifier_log.to_string();
            let reason = last_word(&log).unwrap_or("no verifier log");
            format!("the kernel rejected the program {name}: {io_error}: {reason}")
        }
        other => format!("the kernel rejected the program {name}: {other}"),
    }
}

/// The line with the verifier's reason: the last one before its statistics.
fn last_word(log: &str) -> Option<&str> {
    log.lines().map(str::trim).rfind(|line| {
        !line.is_empty()
            && !line.starts_with("processed ")
            && !line.starts_with("verification time")
            && !line.starts_with("stack depth")
    })
}

#[cfg(test)]
mod tests {
    use super::last_word;

    #[test]
    fn the_statistics_are_not_the_reason() {
        let log = "0: R1=ctx()\n12: (79) r1 = *(u64 *)(r2 +8)\nR2 invalid mem access 'scalar'\nprocessed 12 insns (limit 1000000)\n";
        assert_eq!(last_word(log), Some("R2 invalid mem access 'scalar'"));
        assert_eq!(last_word(""), None);
    }
}
