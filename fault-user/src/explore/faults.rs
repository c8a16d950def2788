//! The faults that are tried on a dependency, and the rules that inject them.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use super::dependency::Dependency;
use super::kind::ApplicationProtocol;
use crate::rule::units::show_duration;
use crate::rule::{Protocol, nearest};

/// A kind of fault. The order is that in which they are tried: the most telling first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum FaultKind {
    /// Every connection is refused.
    Refused,
    /// Open connections are reset and new ones refused, after two thirds of the usual traffic.
    RefusedLater,
    /// Nothing can be reached for two seconds, then all is well.
    Outage,
    /// All packets are dropped, handshakes included.
    Silent,
    /// Connections are open and no data comes back, after two thirds of the usual traffic.
    SilentLater,
    /// Every answer is late.
    Slow,
    /// Packets get lost.
    Loss,
    /// Connections end in the middle of a response.
    Cut,
    /// Connections stall in the middle of a response.
    Stall,
    /// The service answers with an error of its own protocol.
    Error,
    /// It says that it has no room now.
    Busy,
    /// It says that the transaction is to be repeated.
    Conflict,
    /// It takes no writes.
    ReadOnly,
    /// Responses are corrupted.
    Corrupt,
    /// Little fits through.
    Bandwidth,
    /// There is no such name.
    NoName,
    /// The name server has failed.
    ServerFailure,
    /// The name server does not answer.
    Timeout,
    /// A rule of the user's own.
    Own,
}

/// All that are tried by themselves, with their names and what they do, in order.
pub const FAULTS: [(FaultKind, &str, &str); 18] = [
    (FaultKind::Refused, "refused", "every connection is refused"),
    (
        FaultKind::RefusedLater,
        "refused-later",
        "open connections are reset and new ones refused, after some traffic",
    ),
    (
        FaultKind::Outage,
        "outage",
        "unreachable for two seconds, then well again",
    ),
    (
        FaultKind::Silent,
        "silent",
        "all packets are dropped, handshakes included",
    ),
    (
        FaultKind::SilentLater,
        "silent-later",
        "connections open, but after some traffic no data comes back",
    ),
    (FaultKind::Slow, "slow", "every answer is late"),
    (FaultKind::Loss, "loss", "a third of the packets is lost"),
    (
        FaultKind::Cut,
        "cut",
        "connections end in the middle of a response",
    ),
    (
        FaultKind::Stall,
        "stall",
        "connections stall in the middle of a response",
    ),
    (
        FaultKind::Error,
        "error",
        "the service answers with an error of its own protocol",
    ),
    (
        FaultKind::Busy,
        "busy",
        "the service answers that it has no room now",
    ),
    (
        FaultKind::Conflict,
        "conflict",
        "the service answers that the transaction is to be repeated",
    ),
    (
        FaultKind::ReadOnly,
        "read-only",
        "the service answers that it takes no writes",
    ),
    (FaultKind::Corrupt, "corrupt", "responses are corrupted"),
    (
        FaultKind::Bandwidth,
        "bandwidth",
        "responses take two seconds more to come through",
    ),
    (
        FaultKind::NoName,
        "nxdomain",
        "the name server answers that there is no such name",
    ),
    (
        FaultKind::ServerFailure,
        "servfail",
        "the name server answers that it has failed",
    ),
    (
        FaultKind::Timeout,
        "timeout",
        "the name server does not answer queries for the name",
    ),
];

/// How long an outage lasts, and what a low bandwidth adds.
const WHILE: Duration = Duration::from_secs(2);
/// How long the resolvers of C libraries wait for an answer: two attempts of five seconds (resolv.conf(5)).
const RESOLVER: Duration = Duration::from_secs(10);
/// The shortest time in use for which a fault can begin by the clock.
const CLOCKED: Duration = Duration::from_millis(500);
/// The least rate of a low bandwidth, in bits per second.
const RATE_LEAST: u64 = 8_000;
/// The longest time by which answers are late at first.
const SLOW_MOST: Duration = Duration::from_secs(5);
/// The shortest.
const SLOW_LEAST: Duration = Duration::from_millis(100);

impl FaultKind {
    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        FAULTS
            .get(self as usize)
            .map_or("rule", |(_, name, _)| name)
    }
}

impl fmt::Display for FaultKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for FaultKind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let known = FAULTS.iter().find(|(_, name, _)| *name == text);
        known.map(|(fault, ..)| *fault).ok_or_else(|| {
            let names = FAULTS.map(|(_, name, _)| name);
            match nearest(text, names) {
                Some(name) => format!("there is no fault `{text}`; did you mean `{name}`?"),
                None => format!(
                    "there is no fault `{text}`: choose from {}",
                    names.join(", ")
                ),
            }
        })
    }
}

/// A size of a fault that can be changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Magnitude {
    /// Its value, in milliseconds.
    pub ms: u64,
    /// How often it delays the command: once for each request, or once in all.
    pub times: u64,
}

/// What tells an experiment that is no single kind of fault from others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Own {
    /// The target of its rule, or of the second fault of a pair.
    pub target: String,
    /// The rest of its rule; of a pair `silent with tcp:6379 refused`.
    pub name: String,
}

/// What stands between the two faults in the name of a pair.
const WITH: &str = " with ";

/// The kinds of a pair's faults, second one first, by the pair's name; nothing where it is none of a pair.
///
/// # Errors
/// The first one's name is none of a kind of fault: one line.
pub fn kinds_of_pair(name: &str) -> Option<Result<(FaultKind, FaultKind), String>> {
    let (second, first) = name.split_once(WITH)?;
    let second = second.parse().ok()?;
    let (_, first) = first.rsplit_once(' ')?;
    Some(first.parse().map(|first| (second, first)))
}

/// A fault on a dependency, as rules.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Experiment {
    /// The place of the dependency.
    pub dependency: usize,
    /// What is tried.
    pub fault: FaultKind,
    /// Where it is a rule of the user's own, or a pair of faults.
    pub own: Option<Own>,
    /// The faults of a pair; none where it is a single fault.
    pub parts: Vec<Experiment>,
    /// The rules.
    pub rules: Vec<String>,
    /// What can be made smaller.
    pub magnitude: Option<Magnitude>,
    /// How much longer the fault itself makes a run that does all it should.
    pub adds: Duration,
    /// When the fault is over, since the start.
    pub over: Option<Duration>,
}

/// The experiments with some kinds of faults, the most telling first. `limit` is the timeout of a run.
#[must_use]
pub fn experiments(
    dependencies: &[(usize, &Dependency)],
    faults: &[FaultKind],
    limit: Duration,
) -> Vec<Experiment> {
    let mut faults = faults.to_vec();
    faults.sort_unstable();
    faults.dedup();
    let each = |fault: FaultKind| {
        let on = move |(number, one): &(usize, &Dependency)| experiment(*number, one, fault, limit);
        dependencies.iter().filter_map(on).collect::<Vec<_>>()
    };
    faults.into_iter().flat_map(each).collect()
}

/// One fault on one dependency; nothing where it has no meaning there.
#[must_use]
pub fn experiment(
    number: usize,
    dependency: &Dependency,
    fault: FaultKind,
    limit: Duration,
) -> Option<Experiment> {
    let rules = rules(dependency, fault)?;
    let mut experiment = Experiment {
        dependency: number,
        fault,
        own: None,
        parts: Vec::new(),
        rules,
        magnitude: None,
        adds: Duration::ZERO,
        over: None,
    };
    match fault {
        FaultKind::Outage => {
            let ms = u64::try_from(WHILE.as_millis()).unwrap_or(u64::MAX);
            experiment.set(dependency, Magnitude { ms, times: 1 });
        }
        FaultKind::Slow => {
            let times = dependency.usage.turns.max(1);
            let each = limit / 2 / u32::try_from(times).unwrap_or(u32::MAX);
            let each = each.clamp(SLOW_LEAST, SLOW_MOST);
            let ms = u64::try_from(each.as_millis()).unwrap_or(u64::MAX);
            experiment.set(dependency, Magnitude { ms, times });
        }
        FaultKind::Bandwidth => experiment.adds = WHILE,
        FaultKind::Timeout => experiment.adds = RESOLVER,
        _ => {}
    }
    Some(experiment)
}

/// The pairs of these faults that are on different dependencies, the most telling first.
#[must_use]
pub fn pairs(dependencies: &[Dependency], singles: &[Experiment]) -> Vec<Experiment> {
    let mut chosen = Vec::new();
    for (number, second) in singles.iter().enumerate() {
        let others = singles[..number].iter();
        let others = others.filter(|first| first.dependency != second.dependency);
        chosen.extend(others.map(|first| (first, second)));
    }
    chosen.sort_by_key(|(first, second)| {
        let (one, other) = (first.fault, second.fault);
        (one.max(other), one.min(other))
    });
    chosen
        .into_iter()
        .map(|(first, second)| Experiment::pair(dependencies, first, second))
        .collect()
}

impl Experiment {
    /// Two faults at the same time.
    #[must_use]
    pub fn pair(dependencies: &[Dependency], first: &Self, second: &Self) -> Self {
        let name = format!(
            "{}{WITH}{} {}",
            second.name(),
            first.target(dependencies),
            first.name()
        );
        Self {
            own: Some(Own {
                target: second.target(dependencies).to_owned(),
                name,
            }),
            magnitude: None,
            ..first.clone().and(second.clone())
        }
    }

    /// Whether it is a rule of the user's own.
    #[must_use]
    pub fn is_own(&self) -> bool {
        self.fault == FaultKind::Own
    }

    /// This one and another one at the same time.
    #[must_use]
    pub fn and(mut self, other: Self) -> Self {
        let mut parts = std::mem::take(&mut self.parts);
        if parts.is_empty() {
            parts.push(self.clone());
        }
        parts.push(other.clone());
        Self {
            rules: [self.rules, other.rules.clone()].concat(),
            adds: self.adds + other.adds,
            // It is over when both are.
            over: self.over.zip(other.over).map(|(one, other)| one.max(other)),
            parts,
            ..other
        }
    }

    /// What it is tried on, as rules name it. With [`Self::name`] it tells the experiment from all others.
    #[must_use]
    pub fn target<'a>(&'a self, dependencies: &'a [Dependency]) -> &'a str {
        match &self.own {
            Some(own) => &own.target,
            None => &dependencies[self.dependency].target,
        }
    }

    /// What is tried: the name of a kind of fault, or the rest of a rule.
    #[must_use]
    pub fn name(&self) -> &str {
        self.own.as_ref().map_or(self.fault.name(), |own| &own.name)
    }

    /// Gives the fault another magnitude.
    pub fn set(&mut self, dependency: &Dependency, magnitude: Magnitude) {
        let Magnitude { ms, times } = magnitude;
        self.magnitude = Some(magnitude);
        self.adds = Duration::from_millis(ms.saturating_mul(times));
        let time = show_duration(ms.saturating_mul(1_000_000));
        let target = &dependency.target;
        if self.fault == FaultKind::Slow {
            self.rules = vec![slow(dependency, &time)];
        } else {
            let (at, lead) = begins(dependency);
            let length = lead + Duration::from_millis(ms);
            self.over = Some(at + length);
            self.adds += lead;
            let length = show_duration(u64::try_from(length.as_nanos()).unwrap_or(u64::MAX));
            self.rules = vec![format!("{target} down{} for={length}", at_modifier(at))];
        }
    }
}

fn slow(dependency: &Dependency, time: &str) -> String {
    let target = &dependency.target;
    match dependency.protocol {
        Protocol::Udp => format!("{target} delay={time} dir=to-client"),
        _ => format!("{target} delay={time} match=data dir=to-client"),
    }
}

/// When a fault begins that comes while the dependency is in use, a third of that time after the first use, and how much
/// earlier than it matters. Where the dependency is in use only for a moment the clock can't tell when: from the start.
fn begins(dependency: &Dependency) -> (Duration, Duration) {
    const STEP_MS: u64 = 10;
    let round = |time: Duration| {
        let ms = u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        Duration::from_millis(ms / STEP_MS * STEP_MS)
    };
    let usage = &dependency.usage;
    let used = usage.last.saturating_sub(usage.first);
    if used < CLOCKED {
        (Duration::ZERO, round(usage.first))
    } else {
        (round(usage.first + used / 3), Duration::ZERO)
    }
}

fn at_modifier(at: Duration) -> String {
    match u64::try_from(at.as_nanos()) {
        Ok(0) | Err(_) => String::new(),
        Ok(ns) => format!(" at={}", show_duration(ns)),
    }
}

fn two_thirds(count: u64) -> u64 {
    count * 2 / 3
}

fn rules(dependency: &Dependency, fault: FaultKind) -> Option<Vec<String>> {
    let target = &dependency.target;
    // What the relay does concerns new connections, unless open ones are reset.
    let is_relayed = matches!(
        fault,
        FaultKind::Cut
            | FaultKind::Stall
            | FaultKind::Error
            | FaultKind::Busy
            | FaultKind::Conflict
            | FaultKind::ReadOnly
    );
    let anew = if is_relayed && dependency.is_kept {
        " reconnect"
    } else {
        ""
    };
    let text = match dependency.protocol {
        Protocol::Udp => on_datagrams(dependency, fault)?,
        Protocol::Dns => on_queries(fault)?.to_owned(),
        _ => on_streams(dependency, fault)?,
    };
    Some(vec![format!("{target} {text}{anew}")])
}

fn on_streams(dependency: &Dependency, fault: FaultKind) -> Option<String> {
    let usage = &dependency.usage;
    Some(match fault {
        FaultKind::Refused => "reject".to_owned(),
        FaultKind::RefusedLater => {
            // The first handshake passes at least, unless it has already.
            let passes = if dependency.is_kept {
                two_thirds(usage.to_server_packets)
            } else {
                two_thirds(usage.answered + usage.to_server_packets).max(1)
            };
            let after = match passes {
                0 => String::new(),
                passes => format!(" after={passes} count=rule"),
            };
            format!("reset{after} match=syn/data dir=to-server")
        }
        // Their text depends on a magnitude.
        FaultKind::Outage | FaultKind::Slow => String::new(),
        FaultKind::Silent => "blackhole".to_owned(),
        FaultKind::SilentLater => {
            let after = match two_thirds(usage.to_client_packets) {
                0 => String::new(),
                passes => format!(" after={passes} count=rule"),
            };
            format!("drop{after} match=data dir=to-client")
        }
        FaultKind::Loss => "loss=30%".to_owned(),
        FaultKind::Cut => format!("limit_data={} dir=to-client", middle(usage.response_bytes)?),
        FaultKind::Stall => format!(
            "slicer={},delay:1h dir=to-client",
            middle(usage.response_bytes)?
        ),
        FaultKind::Error | FaultKind::Busy | FaultKind::Conflict | FaultKind::ReadOnly => {
            format!("error={}", error_of(&dependency.kind, fault)?)
        }
        FaultKind::Corrupt => "corrupt=100%,bits:8 match=data dir=to-client".to_owned(),
        FaultKind::Bandwidth => bandwidth(usage.to_client_bytes)?,
        FaultKind::NoName | FaultKind::ServerFailure | FaultKind::Timeout | FaultKind::Own => {
            return None;
        }
    })
}

fn on_queries(fault: FaultKind) -> Option<&'static str> {
    match fault {
        FaultKind::NoName => Some("nxdomain"),
        FaultKind::ServerFailure => Some("servfail"),
        FaultKind::Timeout => Some("drop"),
        _ => None,
    }
}

fn on_datagrams(dependency: &Dependency, fault: FaultKind) -> Option<String> {
    let usage = &dependency.usage;
    Some(match fault {
        FaultKind::Refused => "reject".to_owned(),
        FaultKind::Outage | FaultKind::Slow => String::new(),
        FaultKind::Silent => "blackhole".to_owned(),
        FaultKind::SilentLater => match two_thirds(usage.to_client_packets) {
            0 => return None,
            passes => format!("drop after={passes} count=rule dir=to-client"),
        },
        FaultKind::Loss => "loss=30%".to_owned(),
        FaultKind::Corrupt => "corrupt=100%,bits:8 dir=to-client".to_owned(),
        _ => return None,
    })
}

/// The middle of a response, in bytes; nothing where it has none.
fn middle(response_bytes: u64) -> Option<u64> {
    (response_bytes >= 2).then_some(response_bytes / 2)
}

/// What an error is called in the service's own protocol; nothing where there is no such error.
fn error_of(kind: &ApplicationProtocol, fault: FaultKind) -> Option<&'static str> {
    Some(match (kind, fault) {
        (ApplicationProtocol::Http(_), FaultKind::Error) => "http",
        (ApplicationProtocol::Http(_), FaultKind::Busy) => "http:503",
        (ApplicationProtocol::Redis, FaultKind::Error) => "redis",
        (ApplicationProtocol::Redis, FaultKind::Busy) => "redis:LOADING",
        (ApplicationProtocol::Redis, FaultKind::ReadOnly) => "redis:READONLY",
        (ApplicationProtocol::Postgres, FaultKind::Error) => "postgres",
        (ApplicationProtocol::Postgres, FaultKind::Busy) => "postgres:53300",
        (ApplicationProtocol::Postgres, FaultKind::Conflict) => "postgres:40001",
        (ApplicationProtocol::Postgres, FaultKind::ReadOnly) => "postgres:25006",
        (ApplicationProtocol::Mysql, FaultKind::Error) => "mysql",
        (ApplicationProtocol::Mysql, FaultKind::Busy) => "mysql:1040",
        (ApplicationProtocol::Mysql, FaultKind::Conflict) => "mysql:1213",
        (ApplicationProtocol::Mysql, FaultKind::ReadOnly) => "mysql:1290",
        (ApplicationProtocol::Smtp, FaultKind::Error) => "smtp",
        (ApplicationProtocol::Memcached, FaultKind::Error) => "memcache",
        _ => return None,
    })
}

/// What lets through in two seconds more than usual what came back in a run.
fn bandwidth(bytes: u64) -> Option<String> {
    let rate = (bytes * 8 / WHILE.as_secs()).max(RATE_LEAST);
    (bytes != 0).then(|| format!("rate={}kbit dir=to-client", rate.div_ceil(1000)))
}

#[cfg(test)]
mod tests {
    use super::super::dependency::tests::example;
    use super::*;
    use crate::rule::Rule;

    const LIMIT: Duration = Duration::from_secs(10);

    fn every() -> Vec<FaultKind> {
        FAULTS.map(|(fault, ..)| fault).to_vec()
    }

    #[test]
    fn the_table_has_every_fault_in_order() {
        for (place, (fault, name, _)) in FAULTS.iter().enumerate() {
            assert_eq!(*fault as usize, place);
            assert_eq!(name.parse(), Ok(*fault));
        }
        let error = "silnet".parse::<FaultKind>().unwrap_err();
        assert_eq!(error, "there is no fault `silnet`; did you mean `silent`?");
    }

    #[test]
    fn experiments_are_ordinary_rules_and_the_most_telling_come_first() {
        let [mut one, two] = [
            example(ApplicationProtocol::Redis, 1),
            example(ApplicationProtocol::Unknown, 2),
        ];
        let all = experiments(&[(0, &one), (1, &two)], &every(), LIMIT);
        for text in all.iter().flat_map(|one| &one.rules) {
            let rule: Rule = text.parse().unwrap_or_else(|error| panic!("{error}"));
            assert_eq!(rule.to_string(), *text, "as `fault` prints it");
        }
        assert_eq!(all.len(), 14 + 11, "an unknown protocol has no errors");
        assert_eq!((all[0].dependency, all[1].dependency), (0, 1));
        assert_eq!(
            (all[0].fault, all[1].fault),
            (FaultKind::Refused, FaultKind::Refused)
        );
        one.protocol = Protocol::Udp;
        one.target = "udp:53".to_owned();
        let datagrams = experiments(&[(0, &one)], &every(), LIMIT);
        let names: Vec<_> = datagrams.iter().map(|one| one.fault.name()).collect();
        assert_eq!(
            names,
            [
                "refused",
                "outage",
                "silent",
                "silent-later",
                "slow",
                "loss",
                "corrupt"
            ]
        );
        for text in datagrams.iter().flat_map(|one| &one.rules) {
            text.parse::<Rule>()
                .unwrap_or_else(|error| panic!("{error}"));
        }
    }

    #[test]
    fn pairs_are_of_two_dependencies_and_the_most_telling_come_first() {
        let dependencies = [
            example(ApplicationProtocol::Redis, 1),
            example(ApplicationProtocol::Unknown, 2),
        ];
        let numbered: Vec<_> = dependencies.iter().enumerate().collect();
        let faults = [FaultKind::Refused, FaultKind::Outage];
        let pairs = pairs(&dependencies, &experiments(&numbered, &faults, LIMIT));
        let names: Vec<_> = pairs
            .iter()
            .map(|one| (one.target(&dependencies), one.name()))
            .collect();
        assert_eq!(
            names,
            [
                ("tcp:2", "refused with tcp:1 refused"),
                ("tcp:1", "outage with tcp:2 refused"),
                ("tcp:2", "outage with tcp:1 refused"),
                ("tcp:2", "outage with tcp:1 outage"),
            ]
        );
        assert_eq!(pairs[0].rules, ["tcp:1 reject", "tcp:2 reject"]);
        assert_eq!(pairs[2].over, None, "one of them lasts");
        assert_eq!(pairs[3].over, Some(WHILE));
        assert_eq!(pairs[3].adds, WHILE * 2);
    }

    #[test]
    fn errors_are_those_of_the_service() {
        let errors = [
            FaultKind::Error,
            FaultKind::Busy,
            FaultKind::Conflict,
            FaultKind::ReadOnly,
        ];
        for (kind, expected) in [
            (ApplicationProtocol::Postgres, 4),
            (ApplicationProtocol::Mysql, 4),
            (ApplicationProtocol::Redis, 3),
            (ApplicationProtocol::Http(None), 2),
            (ApplicationProtocol::Smtp, 1),
            (ApplicationProtocol::Memcached, 1),
            (ApplicationProtocol::Kafka, 0),
        ] {
            let one = example(kind, 1);
            let all = experiments(&[(0, &one)], &errors, LIMIT);
            for text in all.iter().flat_map(|one| &one.rules) {
                let rule: Rule = text.parse().unwrap_or_else(|error| panic!("{error}"));
                assert_eq!(rule.to_string(), *text, "as `fault` prints it");
            }
            assert_eq!(all.len(), expected, "{}", one.kind);
        }
    }

    #[test]
    fn names_have_the_errors_of_name_servers() {
        let mut one = example(ApplicationProtocol::Dns, 53);
        one.protocol = Protocol::Dns;
        one.target = "dns:db.internal".to_owned();
        let all = experiments(&[(0, &one)], &every(), LIMIT);
        let rules: Vec<_> = all.iter().flat_map(|one| &one.rules).collect();
        let expected =
            ["nxdomain", "servfail", "drop"].map(|fault| format!("dns:db.internal {fault}"));
        assert_eq!(rules, expected.iter().collect::<Vec<_>>());
        for text in rules {
            // As it is made smaller.
            let rule: Rule = format!("{text} conn=2")
                .parse()
                .unwrap_or_else(|error| panic!("{error}"));
            assert_eq!(rule.to_string(), format!("{text} conn=2"));
        }
    }

    fn text(dependency: &Dependency, fault: FaultKind) -> String {
        let experiment = experiment(0, dependency, fault, LIMIT).expect("it has a meaning");
        experiment.rules.join("; ")
    }

    #[test]
    fn connections_that_are_kept_come_back_through_the_relay() {
        let mut one = example(ApplicationProtocol::Redis, 1);
        one.is_kept = true;
        assert_eq!(
            text(&one, FaultKind::Cut),
            "tcp:1 limit_data=100 dir=to-client reconnect"
        );
        assert_eq!(text(&one, FaultKind::Silent), "tcp:1 blackhole");
        one.usage.to_server_packets = 1;
        assert_eq!(
            text(&one, FaultKind::RefusedLater),
            "tcp:1 reset match=syn/data dir=to-server"
        );
        for text in experiments(&[(0, &one)], &every(), LIMIT)
            .iter()
            .flat_map(|one| &one.rules)
        {
            text.parse::<Rule>()
                .unwrap_or_else(|error| panic!("{error}"));
        }
    }

    #[test]
    fn faults_that_come_later_let_two_thirds_pass() {
        let mut one = example(ApplicationProtocol::Redis, 1);
        let later = |one: &Dependency| text(one, FaultKind::RefusedLater);
        assert!(later(&one).contains("after=2 "));
        one.usage.answered = 1;
        one.usage.to_server_packets = 1;
        assert!(later(&one).contains("after=1 "), "a handshake");
        one.usage.to_client_packets = 1;
        assert_eq!(
            text(&one, FaultKind::SilentLater),
            "tcp:1 drop match=data dir=to-client"
        );
    }

    #[test]
    fn an_outage_begins_in_the_middle_of_what_lasts() {
        let mut one = example(ApplicationProtocol::Redis, 1);
        assert_eq!(text(&one, FaultKind::Outage), "tcp:1 down for=2s");
        one.usage.first = Duration::from_millis(206);
        one.usage.last = Duration::from_millis(300);
        assert_eq!(text(&one, FaultKind::Outage), "tcp:1 down for=2.2s");
        one.usage.last = Duration::from_millis(1_730);
        assert_eq!(text(&one, FaultKind::Outage), "tcp:1 down at=710ms for=2s");
        let experiment = experiment(0, &one, FaultKind::Outage, LIMIT).unwrap();
        assert_eq!(experiment.over, Some(Duration::from_millis(2_710)));
    }

    #[test]
    fn many_requests_are_each_less_late() {
        let mut one = example(ApplicationProtocol::Redis, 1);
        one.usage.turns = 1;
        let late = |one: &Dependency| {
            let experiment = experiment(0, one, FaultKind::Slow, LIMIT).unwrap();
            (experiment.magnitude.unwrap().ms, experiment.adds)
        };
        assert_eq!(late(&one), (5000, Duration::from_secs(5)));
        one.usage.turns = 10;
        assert_eq!(late(&one), (500, Duration::from_secs(5)));
        one.usage.turns = 1000;
        assert_eq!(late(&one), (100, Duration::from_secs(100)));
    }
}
