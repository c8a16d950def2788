//! The kernel's version, for features that can't be checked without side effects.

/// Whether this kernel has at least this version. An unknown version counts as old.
#[must_use]
pub fn at_least(major: u32, minor: u32) -> bool {
    std::fs::read_to_string("/proc/sys/kernel/osrelease")
        .ok()
        .and_then(|release| parse(&release))
        .is_some_and(|found| found >= (major, minor))
}

/// Major and minor number of a release such as `6.1.0-37-amd64` or `7.3-cloud-amd64`.
fn parse(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map(str::parse::<u32>);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_of_all_kinds() {
        assert_eq!(parse("6.1.0-37-amd64\n"), Some((6, 1)));
        assert_eq!(parse("7.3-cloud-amd64"), Some((7, 3)));
        assert_eq!(parse("5.10.0"), Some((5, 10)));
        assert_eq!(parse("6"), None);
        assert_eq!(parse("linux"), None);
    }
}
