//! The one-line form: what the specification shows is read, and prints as its canonical text.

use fault_user::rule::Rule;

/// Rules as people write them, and their canonical text.
const RULES: &[(&str, &str)] = &[
    ("tcp:5432 loss=30%", ""),
    ("udp:53 drop first=2 dir=to-client", ""),
    ("tcp:6379 delay=200ms~50ms", ""),
    ("mysql down at=2s for=5s", ""),
    ("10.0.0.0/8:443 blackhole", ""),
    ("tcp:80 mix 10%:timeout 20%:latency=1s", ""),
    ("[::1]:8080 corrupt=5% dir=to-client", ""),
    ("tcp:!22 drop", ""),
    ("*,!10.0.0.0/8,!22 drop", ""),
    ("tcp:!22,!!80 drop", "error"),
    ("!dn,!!\u{514} drop", "error"),
    (
        "tcp:80 slicer=average_size:64,delay:10ms",
        "tcp:80 slicer=64,delay:10ms",
    ),
    (
        "tcp:80 delay=200ms~50ms dist=normal corr=25% keep-order",
        "tcp:80 delay=200ms~50ms,dist:normal,corr:25%,keep-order",
    ),
];

#[test]
fn examples() {
    for (text, canonical) in RULES {
        if *canonical == "error" {
            assert!(text.parse::<Rule>().is_err(), "{text}");
            continue;
        }
        let rule: Rule = text.parse().unwrap_or_else(|error| panic!("{error}"));
        let canonical = if canonical.is_empty() {
            text
        } else {
            canonical
        };
        assert_eq!(rule.to_string(), *canonical);
        assert_eq!(rule.to_string().parse(), Ok(rule), "{text}");
    }
}
