//! Names to targets, hosts to addresses, ports to disjoint ranges.

use std::io;
use std::net::IpAddr;

use fault_user::rule::{Cidr, ResolvedRule, Rule, RuleError, Targets, named_target};

/// The targets of the tests.
fn targets() -> Targets {
    [
        "mysql=tcp:3306",
        "web=tcp:80,443,8000-8010,8005-8020,81",
        "dns=udp:53",
        "far=far.example:443",
    ]
    .iter()
    .map(|text| named_target(text).unwrap())
    .collect()
}

/// Resolves a rule with a resolver that knows two hosts.
fn resolve(rule: &str) -> Result<ResolvedRule, RuleError> {
    let mut resolver = |host: &str| -> io::Result<Vec<IpAddr>> {
        match host {
            "far.example" => Ok(vec![
                "2001:db8::1".parse().unwrap(),
                "10.0.0.7".parse().unwrap(),
                "::ffff:10.0.0.7".parse().unwrap(),
            ]),
            "empty.example" => Ok(Vec::new()),
            _ => Err(io::Error::other("no such host")),
        }
    };
    rule.parse::<Rule>()?.resolve(&targets(), &mut resolver)
}

/// The hosts and ports of a resolved rule.
fn shown(rule: &str) -> (Vec<String>, Vec<String>) {
    let target = resolve(rule)
        .unwrap_or_else(|error| panic!("{error}"))
        .target;
    (
        target.hosts.iter().map(ToString::to_string).collect(),
        target.ports.iter().map(ToString::to_string).collect(),
    )
}

#[test]
fn names_and_ports() {
    let any: Vec<String> = Vec::new();
    assert_eq!(shown("mysql down"), (any.clone(), vec!["3306".to_owned()]));
    let ports = ["80-81", "443", "8000-8020"].map(str::to_owned).to_vec();
    assert_eq!(shown("web down"), (any.clone(), ports));
    assert_eq!(shown("* loss=1%"), (any.clone(), any));
    assert_eq!(resolve("mysql down").unwrap().name, "mysql");
    assert_eq!(resolve("tcp:3306 down").unwrap().name, "tcp:3306");
}

#[test]
fn hosts_get_all_their_addresses_once() {
    let hosts = ["10.0.0.7", "2001:db8::1"].map(str::to_owned).to_vec();
    assert_eq!(shown("far.example:80 down").0, hosts);
    assert_eq!(shown("far down").0, hosts);
    assert_eq!(shown("far.example loss=1%").0, hosts);
    assert_eq!(shown("10.0.0.0/8:80 down").0, ["10.0.0.0/8"]);
}

#[test]
fn rules_keep_the_names_whose_addresses_are_to_be_learned() {
    let target = |rule: &str| resolve(rule).unwrap().target;
    for (rule, name, addresses) in [
        ("near.example:80 drop", Some("near.example"), 0),
        ("far.example:80 drop", Some("far.example"), 2),
        ("*.Example.com:443 drop", Some("*.example.com"), 0),
        ("*.example.com drop", Some("*.example.com"), 0),
        ("far.example:80 slicer=64", Some("far.example"), 2),
        ("near.example:80 slicer=64", Some("near.example"), 0),
        ("*.example:80 slicer=64", Some("*.example"), 0),
        ("far.example:80,!10.0.0.9 drop", None, 2),
        ("10.0.0.1:80 drop", None, 1),
    ] {
        let target = target(rule);
        assert_eq!(target.name.as_deref(), name, "{rule}");
        assert_eq!(target.hosts.len(), addresses, "{rule}");
        assert!(!target.has_any_host(), "{rule}");
    }
    assert!(target("tcp:80 drop").has_any_host());
}

#[test]
fn what_can_not_be_resolved() {
    let error = |rule: &str| resolve(rule).unwrap_err().to_string();
    assert_eq!(
        error("mysq1 down"),
        "unknown target `mysq1`\n  mysq1 down\n  ^^^^^\nhelp: expected one of dns, far, mysql or web; did you mean `mysql`?"
    );
    assert_eq!(
        error("near.example:80,!10.0.0.9 slicer=64"),
        "the host `near.example` can't be looked up: no such host\n  near.example:80,!10.0.0.9 slicer=64\n  ^^^^^^^^^^^^^^^^^^^^^^^^^"
    );
    let empty = error("empty.example:80,!10.0.0.9 drop");
    assert!(empty.starts_with("the host `empty.example` has no address"));
    let pattern = "the names of `*.example` can't be looked up";
    assert!(error("*.example:80,!10.0.0.1 drop").starts_with(pattern));
    assert!(error("tcp:mysql drop").starts_with("the host `mysql` can't be looked up"));
    assert!(error("dns slicer=64").starts_with("`slicer` does not work on UDP"));
    assert!(error("dns reject=rst").starts_with("UDP has no RST"));
    assert!(error("dns drop match=syn").starts_with("only TCP packets have flags"));
}

#[test]
fn named_targets() {
    assert_eq!(named_target("a=tcp:1").unwrap().0, "a");
    for (text, message) in [
        ("mysql", "the `=` is missing"),
        ("tcp=tcp:1", "`tcp` is a protocol, not a name for a target"),
        ("1a=tcp:1", "`1a` is not a name for a target"),
        ("=tcp:1", "`` is not a name for a target"),
        ("a=tcp:0", "there is no port 0"),
        ("a=", "the host or port is missing"),
    ] {
        assert_eq!(named_target(text).unwrap_err().message, message, "{text}");
    }
}

#[test]
fn networks() {
    let cidr = |text: &str| {
        let (address, prefix) = text.split_once('/').unwrap();
        Cidr::new(address.parse().unwrap(), prefix.parse().unwrap())
    };
    assert_eq!(cidr("10.0.0.1/8"), None);
    assert_eq!(cidr("10.0.0.0/33"), None);
    assert_eq!(cidr("::/129"), None);
    let ten = cidr("10.0.0.0/8").unwrap();
    let all = cidr("0.0.0.0/0").unwrap();
    let six = cidr("::/0").unwrap();
    assert!(
        ten.contains("10.255.255.255".parse().unwrap())
            && !ten.contains("11.0.0.0".parse().unwrap())
    );
    assert!(all.covers(&ten) && !ten.covers(&all) && ten.overlaps(&all) && all.overlaps(&ten));
    assert!(
        !six.overlaps(&all)
            && six.contains("2001:db8::1".parse().unwrap())
            && !six.contains("10.0.0.1".parse().unwrap())
    );
}
