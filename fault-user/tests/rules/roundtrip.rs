//! Every valid rule prints as a text and as an object that are read as the same rule.

use std::net::IpAddr;
use std::sync::LazyLock;

use fault_user::rule::faults::{self, Loss};
use fault_user::rule::scenario::schema;
use fault_user::rule::{
    Bounds, Cidr, CloseHow, CorruptAt, CorruptDataMode, CorruptMode, CountScope, Direction,
    Distribution, ErrorReply, Fault, Host, LifetimeFrom, Mix, MixArm, Modifiers, PacketKinds,
    PortRange, Protocol, RejectWith, Rule, Target, TargetRef, Triggers,
};
use proptest::option::of;
use proptest::prelude::*;
use proptest::sample::select;

/// A whole in parts per million.
const PPM: u32 = 1_000_000;

/// Probabilities, round ones as often as odd ones.
fn ppm() -> impl Strategy<Value = u32> {
    prop_oneof![0..=PPM, (0..=100_u32).prop_map(|percent| percent * 10_000)]
}

/// Durations of at least a nanosecond and at most `limit` seconds, round ones as often as odd ones.
fn time(limit: u64) -> impl Strategy<Value = u64> {
    let limit = limit * 1_000_000_000;
    let unit = select(vec![
        1_u64,
        1_000,
        1_000_000,
        100_000_000,
        1_000_000_000,
        60_000_000_000,
    ]);
    prop_oneof![
        1..=limit,
        (unit, 1..2_000_u64).prop_map(move |(unit, n)| (unit * n).min(limit))
    ]
}

/// Sizes of at least 2 bytes.
fn size() -> impl Strategy<Value = u64> {
    prop_oneof![
        2..100_000_u64,
        (1..5_000_u64).prop_map(|k| k << 10),
        (1..5_000_u64).prop_map(|k| k * 1_000)
    ]
}

/// A duration and its jitter.
fn jittered(limit: u64) -> impl Strategy<Value = (u64, u64)> {
    time(limit).prop_flat_map(|t| (Just(t), prop_oneof![Just(0), 0..=t]))
}

fn loss() -> impl Strategy<Value = Loss> {
    let pair = || (ppm(), ppm()).prop_map(|(a, b)| (a, b.min(PPM - a)));
    prop_oneof![
        ppm().prop_map(Loss::Random),
        (
            ppm(),
            ppm(),
            prop_oneof![Just(PPM), ppm()],
            prop_oneof![Just(0), ppm()]
        )
            .prop_map(|(p, r, one_minus_h, one_minus_k)| Loss::GilbertElliott {
                p,
                r,
                one_minus_h,
                one_minus_k
            }),
        (pair(), pair(), ppm()).prop_map(|((p13, p14), (p31, p32), p23)| Loss::State {
            p13,
            p31,
            p32,
            p23,
            p14
        }),
        ppm().prop_map(|p13| Loss::State {
            p13,
            p31: PPM - p13,
            p32: 0,
            p23: PPM,
            p14: 0
        }),
    ]
}

fn delay() -> impl Strategy<Value = Fault> {
    let distribution = select(vec![
        Distribution::Uniform,
        Distribution::Normal,
        Distribution::Pareto,
        Distribution::ParetoNormal,
    ]);
    (jittered(60), distribution, ppm(), any::<bool>()).prop_map(
        |((delay_ns, jitter_ns), distribution, correlation, keep_order)| {
            Fault::Delay(faults::Delay {
                delay_ns,
                jitter_ns,
                // Neither has a meaning without a jitter.
                distribution: if jitter_ns == 0 {
                    Distribution::Uniform
                } else {
                    distribution
                },
                correlation: if jitter_ns == 0 { 0 } else { correlation },
                keep_order,
            })
        },
    )
}

fn rate() -> impl Strategy<Value = Fault> {
    let bits = prop_oneof![1..10_000_000_000_u64, (1..5_000_u64).prop_map(|k| k << 13)];
    (
        bits,
        of(size()),
        -100..100_i32,
        0..100_u32,
        -10..10_i32,
        of(1..u32::MAX),
    )
        .prop_map(
            |(
                bits_per_second,
                burst_bytes,
                overhead_bytes,
                cell_bytes,
                cell_overhead,
                limit_packets,
            )| {
                Fault::Rate(faults::Rate {
                    bits_per_second,
                    burst_bytes,
                    overhead_bytes,
                    cell_bytes,
                    cell_overhead_bytes: if cell_bytes == 0 { 0 } else { cell_overhead },
                    limit_packets,
                })
            },
        )
}

/// Faults of the packet layer that work on every protocol.
fn packet_fault() -> impl Strategy<Value = Fault> {
    prop_oneof![
        loss().prop_map(Fault::Loss),
        Just(Fault::Drop(faults::Drop)),
        Just(Fault::Blackhole(faults::Blackhole)),
        of(select(vec![
            RejectWith::IcmpPort,
            RejectWith::IcmpHost,
            RejectWith::IcmpAdmin
        ]))
        .prop_map(|with| Fault::Reject(faults::Reject { with })),
        (
            ppm(),
            1..=64_u32,
            select(vec![CorruptMode::Visible, CorruptMode::Link])
        )
            .prop_map(|(probability, bits, mode)| Fault::Corrupt(faults::Corrupt {
                probability,
                bits,
                mode
            })),
        ppm().prop_map(|probability| Fault::Duplicate(faults::Duplicate { probability })),
        (ppm(), 1..100_u32)
            .prop_map(|(probability, gap)| Fault::Reorder(faults::Reorder { probability, gap })),
        delay(),
        rate(),
        (68..=65_535_u32, any::<bool>())
            .prop_map(|(bytes, icmp)| Fault::Mtu(faults::Mtu { bytes, icmp })),
        ppm().prop_map(|probability| Fault::Ecn(faults::Ecn { probability })),
        (jittered(60), of(1..100_u32), of(size())).prop_map(
            |((max_ns, min_ns), packets, bytes)| Fault::Slot(faults::Slot {
                min_ns,
                max_ns,
                packets,
                bytes
            })
        ),
    ]
}

/// Any text that an argument may be.
fn text() -> impl Strategy<Value = String> {
    prop_oneof!["[a-z]{1,8}", "[ -~]{0,12}", "[^\r\n]{0,8}"]
}

fn reply() -> impl Strategy<Value = ErrorReply> {
    prop_oneof![
        prop::collection::vec(200..600_u16, 1..4).prop_map(ErrorReply::Http),
        Just(ErrorReply::Http(vec![500])),
        of(text().prop_filter("no single word in capitals", |text| text
            .contains(char::is_lowercase)))
        .prop_map(ErrorReply::Redis),
        of(text().prop_filter("no number", |text| text.contains(char::is_lowercase)))
            .prop_map(ErrorReply::Mysql),
        of("[3-9A-Z][0-9A-Z]{3}[0-9]( [ -~]{0,9})?").prop_map(ErrorReply::Postgres),
        of(text()).prop_map(ErrorReply::Smtp),
        of(text()).prop_map(ErrorReply::Memcache),
        (1..=1_048_576_u64).prop_map(ErrorReply::Random),
        Just(ErrorReply::Random(64)),
    ]
}

fn query() -> impl Strategy<Value = String> {
    select(vec!["^UPDATE", "a \"b\" c", r"\bx\b|^$", "plain", ""]).prop_map(str::to_owned)
}

/// Whether there are requests to read: none at a login, and before random bytes.
fn can_be_selected(reply: &ErrorReply) -> bool {
    !matches!(reply, ErrorReply::Random(_) | ErrorReply::Postgres(Some(_)))
}

/// Faults of the stream layer that work on TCP only.
fn tcp_fault() -> impl Strategy<Value = Fault> {
    let how = || select(vec![CloseHow::Fin, CloseHow::Rst]);
    prop_oneof![
        time(1_000).prop_map(|delay_ns| Fault::SlowClose(faults::SlowClose { delay_ns })),
        prop_oneof![Just(0), time(1_000)]
            .prop_map(|timeout_ns| Fault::Timeout(faults::Timeout { timeout_ns })),
        prop_oneof![Just(0), time(1_000)]
            .prop_map(|timeout_ns| Fault::ResetPeer(faults::ResetPeer { timeout_ns })),
        (size(), 0..2_u64, prop_oneof![Just(0), time(3_600)]).prop_map(
            |(average_size_bytes, size_variation_bytes, delay_ns)| {
                Fault::Slicer(faults::Slicer {
                    average_size_bytes,
                    size_variation_bytes,
                    delay_ns,
                })
            }
        ),
        select(vec![
            Fault::Reset(faults::Reset { bytes: None }),
            Fault::Reset(faults::Reset {
                bytes: Some(65_536)
            }),
            Fault::NoAccept(faults::NoAccept),
            Fault::Stall(faults::Stall),
            Fault::Abort(faults::Abort)
        ]),
        Just(Fault::Reject(faults::Reject {
            with: Some(RejectWith::Rst)
        })),
        how().prop_map(|how| Fault::CloseOnData(faults::CloseOnData { how })),
        (of(1..100_u64), how()).prop_map(|(count, how)| Fault::Close(faults::Close { count, how })),
        (
            jittered(10_000),
            select(vec![LifetimeFrom::Connect, LifetimeFrom::FirstData])
        )
            .prop_map(
                |((time_ns, jitter_ns), from)| Fault::Lifetime(faults::Lifetime {
                    time_ns,
                    jitter_ns,
                    from
                })
            ),
        (size(), time(3_600)).prop_map(|(min_bytes, max_wait_ns)| Fault::Coalesce(
            faults::Coalesce {
                min_bytes,
                max_wait_ns
            }
        )),
        (reply(), of(query())).prop_map(|(reply, query)| {
            let query = query.filter(|_| can_be_selected(&reply));
            Fault::Error(faults::Error { reply, query })
        }),
        (1..100_u64, of(reply()), of(query())).prop_map(|(errors, reply, query)| {
            let query = query.filter(|_| reply.as_ref().is_some_and(can_be_selected));
            Fault::Transient(faults::Transient {
                errors,
                reply,
                query,
            })
        }),
    ]
}

/// Faults of the stream layer that work on UDP too.
fn udp_fault() -> impl Strategy<Value = Fault> {
    let mode = select(vec![
        CorruptDataMode::Flip,
        CorruptDataMode::Zero,
        CorruptDataMode::Random,
    ]);
    let at = prop_oneof![
        (1..=PPM).prop_map(CorruptAt::Probability),
        Just(CorruptAt::Probability(PPM)),
        any::<u64>().prop_map(CorruptAt::Offset)
    ];
    prop_oneof![
        jittered(3_600).prop_map(|(latency_ns, jitter_ns)| Fault::Latency(faults::Latency {
            latency_ns,
            jitter_ns
        })),
        (1..1_000_000_000_u64, any::<bool>()).prop_map(|(bits_per_second, shared)| {
            Fault::Bandwidth(faults::Bandwidth {
                bits_per_second,
                shared,
            })
        }),
        (size(), any::<bool>())
            .prop_map(|(bytes, shared)| Fault::LimitData(faults::LimitData { bytes, shared })),
        select(vec![
            Fault::Discard(faults::Discard),
            Fault::Down(faults::Down)
        ]),
        (mode, at).prop_map(|(mode, at)| Fault::CorruptData(faults::CorruptData { mode, at })),
        (
            text().prop_filter("a regular expression", |t| !t.is_empty()
                && regex::bytes::Regex::new(t).is_ok()),
            text()
        )
            .prop_map(
                |(regex, replacement)| Fault::Substitute(faults::Substitute { regex, replacement })
            ),
    ]
}

fn mix(arm: impl Strategy<Value = Fault>) -> impl Strategy<Value = Fault> {
    prop::collection::vec((0..=PPM / 4, arm), 1..4).prop_map(|arms| {
        let arms = arms
            .into_iter()
            .map(|(probability, fault)| MixArm { probability, fault });
        Fault::Mix(Mix {
            arms: arms.collect(),
        })
    })
}

fn cidr() -> impl Strategy<Value = Cidr> {
    let v4 = (any::<u32>(), 0..=32_u32).prop_map(|(bits, prefix)| {
        let mask = u32::MAX.checked_shl(32 - prefix).unwrap_or(0);
        (IpAddr::from((bits & mask).to_be_bytes()), prefix)
    });
    let v6 = (any::<u128>(), 0..=128_u32).prop_map(|(bits, prefix)| {
        let mask = u128::MAX.checked_shl(128 - prefix).unwrap_or(0);
        (IpAddr::from((bits & mask).to_be_bytes()), prefix)
    });
    prop_oneof![v4, v6]
        .prop_map(|(address, prefix)| Cidr::new(address, u8::try_from(prefix).unwrap()).unwrap())
}

fn target(protocol: Protocol) -> impl Strategy<Value = Target> {
    let host = prop_oneof![
        cidr().prop_map(Host::Cidr),
        "[a-z]([a-z0-9-]{0,8}[a-z0-9])?(\\.[a-z]{2,5}){0,2}".prop_map(Host::Name),
    ];
    let range = (1..=u16::MAX, 1..=u16::MAX).prop_map(|(a, b)| PortRange {
        first: a.min(b),
        last: a.max(b),
    });
    let ports = prop::collection::vec(
        prop_oneof![
            range,
            (1..=u16::MAX).prop_map(|p| PortRange { first: p, last: p })
        ],
        0..4,
    );
    let excluded = prop_oneof![
        (1..=u16::MAX).prop_map(|p| (None, vec![PortRange { first: p, last: p }])),
        cidr().prop_map(|network| (Some(Host::Cidr(network)), Vec::new())),
    ];
    let except = prop::collection::vec(excluded, 0..3);
    (of(host), ports, except).prop_map(move |(host, ports, except)| {
        let has_ports = protocol != Protocol::Icmp;
        let except = except.into_iter().map(|(host, ports)| Target {
            host,
            ports,
            ..Target::default()
        });
        Target {
            protocol,
            host,
            ports: if has_ports { ports } else { Vec::new() },
            except: except
                .filter(|one| has_ports || one.host.is_some())
                .collect(),
        }
    })
}

fn bounds(least: u64) -> impl Strategy<Value = Bounds> {
    prop_oneof![
        (least..1_000_000, 0..10_000_u64).prop_map(|(first, more)| Bounds {
            first,
            last: first + more
        }),
        (least..1_000).prop_map(|first| Bounds {
            first,
            last: Bounds::OPEN
        }),
    ]
}

fn schedule() -> impl Strategy<Value = (u64, Option<u64>, Option<u64>, Option<u32>)> {
    let at = prop_oneof![Just(0), time(1_000)];
    prop_oneof![
        (at, of(time(1_000))).prop_map(|(at, length)| (at, length, None, None)),
        time(1_000).prop_flat_map(|period| (1..=period).prop_map(move |on| (
            0,
            Some(on),
            Some(period),
            None
        ))),
        (time(100), 1..=PPM, of(0..1_000_000_u64)).prop_map(|(period, duty, more)| (
            0,
            more.map(|more| period + u64::from(PPM) + more),
            Some(period + u64::from(PPM)),
            Some(duty)
        )),
    ]
}

fn modifiers() -> impl Strategy<Value = Modifiers> {
    let n = || 1..10_000_u64;
    let triggers = (of(n()), of(n()), of(n()), of(n()), of(bounds(1)))
        .prop_map(|(first, after, nth, every, range)| Triggers {
            first,
            after,
            nth,
            every,
            range,
        })
        .prop_map(|some| {
            // Most combinations pick no packet, and are refused.
            let bounds = some.bounds();
            let multiple = bounds.first.checked_next_multiple_of(some.step());
            if multiple.is_some_and(|multiple| multiple <= bounds.last) {
                some
            } else {
                Triggers {
                    every: some.every,
                    ..Triggers::default()
                }
            }
        });
    let kinds = prop::collection::vec(
        select(vec![
            PacketKinds::SYN,
            PacketKinds::DATA,
            PacketKinds::ACK,
            PacketKinds::FIN,
            PacketKinds::RST,
        ]),
        0..3,
    )
    .prop_map(|kinds| {
        kinds
            .into_iter()
            .fold(PacketKinds::default(), PacketKinds::with)
    });
    let direction = select(vec![
        Direction::Both,
        Direction::ToServer,
        Direction::ToClient,
    ]);
    (
        ppm(),
        triggers,
        any::<bool>(),
        of(bounds(1)),
        kinds,
        of(bounds(0)),
        direction,
        schedule(),
        any::<bool>(),
    )
        .prop_map(
            |(
                probability,
                triggers,
                per_rule,
                connections,
                packets,
                size,
                direction,
                (at_ns, for_ns, period_ns, duty),
                reconnect,
            )| {
                let per_rule = per_rule && !triggers.is_empty();
                Modifiers {
                    probability,
                    triggers,
                    count: if per_rule {
                        CountScope::PerRule
                    } else {
                        CountScope::PerConnection
                    },
                    connections,
                    hosts: None,
                    asked: fault_user::rule::Asked::default(),
                    packets,
                    size,
                    query_type: None,
                    direction,
                    at_ns,
                    for_ns,
                    period_ns,
                    duty,
                    reconnect,
                }
            },
        )
}

fn rule() -> impl Strategy<Value = Rule> {
    let tcp = || prop_oneof![packet_fault(), tcp_fault(), udp_fault()];
    let with = |protocol, fault: BoxedStrategy<Fault>| {
        (target(protocol).prop_map(TargetRef::Spec), fault).boxed()
    };
    let name = "[a-z_][a-z0-9_-]{0,9}"
        .prop_filter("no protocol", |name| Protocol::from_word(name).is_none());
    let pair = prop_oneof![
        with(
            Protocol::Tcp,
            prop_oneof![3 => tcp(), 1 => mix(tcp())].boxed()
        ),
        with(Protocol::Any, tcp().boxed()),
        with(
            Protocol::Udp,
            prop_oneof![packet_fault(), udp_fault()].boxed()
        ),
        with(
            Protocol::Icmp,
            prop_oneof![packet_fault(), mix(packet_fault())].boxed()
        ),
        (name.prop_map(TargetRef::Name), tcp()).boxed(),
    ];
    (pair, modifiers()).prop_map(|((target, fault), mut modifiers)| {
        use fault_user::rule::Layer;
        let protocol = match &target {
            TargetRef::Spec(target) => target.protocol,
            TargetRef::Name(_) => Protocol::Any,
        };
        if !matches!(protocol, Protocol::Any | Protocol::Tcp) {
            modifiers.reconnect = false;
            modifiers.packets = PacketKinds::default();
        }
        match fault.layer() {
            Layer::Stream => {
                modifiers.packets = PacketKinds::default();
                modifiers.size = modifiers.size.filter(|_| protocol == Protocol::Udp);
            }
            Layer::Packet | Layer::Either => modifiers.reconnect = false,
            Layer::Mixed => {}
        }
        Rule {
            target,
            fault,
            modifiers,
        }
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn text_and_back(rule in rule()) {
        rule.check().map_err(|error| TestCaseError::fail(error.to_string()))?;
        let text = rule.to_string();
        let back: Rule = text.parse().map_err(|error| TestCaseError::fail(format!("{error}")))?;
        prop_assert_eq!(&back, &rule, "{}", text);
        prop_assert_eq!(back.to_string(), text);
    }

    #[test]
    fn object_and_back(rule in rule()) {
        let object = rule.to_object();
        let back: Rule = serde_json::from_value(object.clone())
            .map_err(|error| TestCaseError::fail(format!("{error}: {object}")))?;
        prop_assert_eq!(&back, &rule, "{}", object);
        prop_assert_eq!(back.to_object(), object);
        let text = serde_json::to_value(&rule).map_err(|error| TestCaseError::fail(error.to_string()))?;
        prop_assert_eq!(serde_json::from_value::<Rule>(text).ok(), Some(rule));
    }

    #[test]
    fn the_schema_knows_every_object(rule in rule()) {
        static VALIDATOR: LazyLock<jsonschema::Validator> = LazyLock::new(|| jsonschema::validator_for(&schema()).unwrap());
        let scenario = serde_json::json!({ "rules": [rule.to_object(), rule.to_string()] });
        let error = VALIDATOR.iter_errors(&scenario).next().map(|error| error.to_string());
        prop_assert_eq!(error, None, "{}", scenario);
    }

    #[test]
    fn objects_in_yaml_and_toml(rule in rule()) {
        let object = rule.to_object();
        let yaml = serde_saphyr::to_string(&object).map_err(|error| TestCaseError::fail(error.to_string()))?;
        let back: Rule = serde_saphyr::from_str(&yaml).map_err(|error| TestCaseError::fail(format!("{error}: {yaml}")))?;
        prop_assert_eq!(&back, &rule, "{}", yaml);
        // TOML's numbers end at 2^63 - 1.
        if let Ok(toml) = toml::to_string(&object) {
            let back: Rule = toml::from_str(&toml).map_err(|error| TestCaseError::fail(format!("{error}: {toml}")))?;
            prop_assert_eq!(&back, &rule, "{}", toml);
        }
    }

    #[test]
    fn any_text_is_read_or_refused(text in "\\PC{0,60}") {
        if let Ok(rule) = text.parse::<Rule>() {
            prop_assert_eq!(rule.to_string().parse(), Ok(rule));
        }
    }

    #[test]
    fn a_broken_rule_is_read_or_refused(rule in rule(), at in any::<prop::sample::Index>(), with in "\\PC{0,3}", cut in 0..3_usize) {
        let mut chars: Vec<char> = rule.to_string().chars().collect();
        let at = at.index(chars.len());
        let end = (at + cut).min(chars.len());
        chars.splice(at..end, with.chars());
        let text: String = chars.into_iter().collect();
        match text.parse::<Rule>() {
            Ok(rule) => prop_assert_eq!(rule.to_string().parse(), Ok(rule)),
            Err(error) => prop_assert!(!error.to_string().is_empty() && !error.one_line().contains('\n')),
        }
    }
}
