//! The host's model of the data plane: a linear search instead of bit vectors, plain maps instead of BPF
//! maps, and [`fault_common::decide`] for the decision itself.

use std::collections::HashMap;
use std::io::Write as _;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use fault_common::abi::{
    Datagram, Event, FlowRule, Followed, RuleEntry, RuleState, STATE_BITS, action, datagram,
    direction,
};
use fault_common::decide::{Fired, Plain, Sample, Verdict, judge, open};
use fault_common::flow::{FlowKey, Side as End, flow_of};
use fault_common::fragment::{DatagramKey, FollowedKey, FragmentKind, datagram_of, keep, meet};
use fault_common::matching::{Hints, Service, service};
use fault_common::packet::{PROTOCOL_TCP, PROTOCOL_UDP, Packet, parse};
use fault_user::inject::xdp;
use fault_user::plan::tables::{Network, PacketRule, ProtocolClass};
use fault_user::rule::{ResolvedRule, Rule, SystemResolver, Targets};
use fault_user::sys::net::clsact::TcHook;

use super::kernel::{Kernel, NEXT, VANISHED, XDP_DROP, XDP_PASS};
use super::packets::Recipe;

/// `SplitMix64`: the cases are the same on every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        fault_common::random::mix(self.0)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[usize::try_from(self.below(from.len() as u64)).unwrap()]
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

struct Flow {
    service: Service,
    initial: Option<u32>,
    rules: Vec<FlowRule>,
}

#[derive(Default)]
struct Model {
    flows: HashMap<FlowKey, Flow>,
    states: Vec<RuleState>,
    datagrams: HashMap<DatagramKey, Datagram>,
    followed: HashMap<FollowedKey, Followed>,
}

impl Model {
    /// What is known of a fragment's datagram, before rules are asked. What is not a fragment is the first of its own.
    fn meet(&self, packet: &mut Packet) -> (FragmentKind, Datagram) {
        let mut now = Datagram::NONE;
        if !packet.is_fragment {
            return (FragmentKind::First, now);
        }
        let known = self.datagrams.get(&datagram_of(packet));
        (meet(known, 1, packet, &mut now), now)
    }

    fn keep(&mut self, packet: &Packet, mut now: Datagram, state: u8) {
        if packet.is_fragment {
            keep(&mut now, packet, state);
            self.datagrams.insert(datagram_of(packet), now);
        }
    }

    /// What becomes of a packet, and the events that tell of it.
    fn judge(&mut self, rules: &[PacketRule], frame: &[u8]) -> (Verdict, Vec<Event>) {
        let mut verdict = Verdict::default();
        let mut events = Vec::new();
        let ethertype = u16::from_be_bytes([frame[12], frame[13]]);
        let mut packet = parse(&frame, ethertype, 14, u32::try_from(frame.len()).unwrap()).unwrap();
        let (place, mut now) = self.meet(&mut packet);
        if place == FragmentKind::Unconcerned {
            return (verdict, events);
        }
        if !rules.iter().any(|rule| may_concern(rule, &packet)) {
            let state = if place == FragmentKind::First {
                datagram::UNCONCERNED
            } else {
                datagram::EARLY
            };
            self.keep(&packet, now, state);
            return (verdict, events);
        }
        let bytes = u32::try_from(frame.len()).unwrap() + now.early_bytes;
        let (key, end) = flow_of(&packet);
        let named = |port| rules.iter().any(|rule| names_alone(rule, &packet, port));
        let hints = Hints {
            // The tests' network namespace has no sockets.
            listens: [false; 2],
            named: [named(packet.source_port), named(packet.destination_port)],
        };
        let service = service(&packet, end, hints);
        let flow = self.flows.entry(key).or_insert_with(|| Flow {
            service,
            initial: None,
            rules: Vec::new(),
        });
        if packet.is_initial() && flow.initial != Some(packet.sequence) {
            *flow = Flow {
                service,
                initial: Some(packet.sequence),
                rules: Vec::new(),
            };
        }
        let is_certain = flow.service.is_certain;
        let guess = guess(flow, end);
        let mut judged = 0;
        for (index, rule) in rules.iter().enumerate() {
            let Some(direction) = concerns(rule, &packet, guess, is_certain) else {
                continue;
            };
            if verdict.end != 0 {
                break;
            }
            judged += 1;
            let name = FollowedKey {
                datagram: datagram_of(&packet),
                uid: rule.entry.uid,
            };
            // What is no fragment that the table knows has nothing to follow.
            let mut followed = Followed::NONE;
            if packet.follows {
                followed = *self.followed.get(&name).unwrap_or(&followed);
            }
            let entry = &rule.entry;
            let state = &mut self.states[index];
            let memory = memory(flow, entry, state);
            let sample = Sample {
                now_ns: 1_000_000_000,
                size: packet.length(),
                direction,
            };
            let fired = judge::<Plain>(
                entry,
                &sample,
                &packet,
                &mut followed,
                memory,
                state,
                &mut verdict,
            );
            events.extend(fired.map(|fired| event(entry, &fired, bytes)));
            if packet.is_fragment && place != FragmentKind::Orphan {
                self.followed.insert(name, followed);
            }
        }
        if place != FragmentKind::Orphan {
            let state = if judged == 0 {
                datagram::UNCONCERNED
            } else {
                datagram::JUDGED
            };
            now.rules = now.rules.max(judged);
            self.keep(&packet, now, state);
        }
        (verdict, events)
    }
}

/// What is told of a rule that fired.
fn event(entry: &RuleEntry, fired: &Fired, bytes: u32) -> Event {
    let ordinals = fired.ordinals;
    Event {
        time_ns: 0,
        packet: ordinals.packet,
        rule: entry.uid,
        connection: ordinals.connection,
        seen: fired.seen,
        bytes,
        segments: 1,
        direction: ordinals.direction,
        action: fired.action,
        fragment: ordinals.fragment,
        padding: 0,
    }
}

fn guess(flow: &Flow, end: End) -> u8 {
    if flow.service.side == end {
        direction::TO_CLIENT
    } else {
        direction::TO_SERVER
    }
}

fn memory<'a>(flow: &'a mut Flow, entry: &RuleEntry, state: &mut RuleState) -> &'a mut FlowRule {
    let known = flow.rules.iter().position(|slot| slot.uid == entry.uid);
    let at = known.unwrap_or_else(|| {
        let mut slot = FlowRule::default();
        open::<Plain>(entry, state, &mut slot);
        flow.rules.push(slot);
        flow.rules.len() - 1
    });
    &mut flow.rules[at]
}

fn protocol_of(packet: &Packet) -> ProtocolClass {
    match packet.protocol {
        PROTOCOL_TCP => ProtocolClass::Tcp,
        PROTOCOL_UDP => ProtocolClass::Udp,
        _ if packet.is_icmp() => ProtocolClass::Icmp,
        _ => ProtocolClass::Other,
    }
}

fn in_ports(rule: &PacketRule, port: u16) -> bool {
    rule.ports
        .iter()
        .any(|(first, last)| *first <= port && port <= *last)
}

/// Whether a rule gives this port by itself.
fn names_alone(rule: &PacketRule, packet: &Packet, port: u16) -> bool {
    !packet.is_icmp()
        && rule.protocols.contains(&protocol_of(packet))
        && rule.ports.contains(&(port, port))
}

/// Whether the rule means all packets of this protocol.
fn is_portless(rule: &PacketRule, packet: &Packet) -> bool {
    rule.ports.is_empty() || rule.portless.contains(&protocol_of(packet))
}

/// Whether protocol and port alone leave it open that the rule concerns the packet.
fn may_concern(rule: &PacketRule, packet: &Packet) -> bool {
    [direction::TO_SERVER, direction::TO_CLIENT]
        .iter()
        .any(|way| by_port(rule, packet, *way))
}

fn by_port(rule: &PacketRule, packet: &Packet, way: u8) -> bool {
    let port = if way == direction::TO_SERVER {
        packet.destination_port
    } else {
        packet.source_port
    };
    rule.protocols.contains(&protocol_of(packet))
        && rule.entry.directions & (1 << way) != 0
        && (is_portless(rule, packet) || (!packet.is_icmp() && in_ports(rule, port)))
}

fn by_host(rule: &PacketRule, packet: &Packet, way: u8) -> bool {
    let words = if way == direction::TO_SERVER {
        packet.destination
    } else {
        packet.source
    };
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
    let address = u128::from_be_bytes(bytes.try_into().unwrap());
    rule.hosts.is_empty()
        || rule.hosts.iter().any(|host| {
            host.prefix == 0 || (address ^ host.address) >> (128 - u32::from(host.prefix)) == 0
        })
}

/// The packet's direction as the rule sees it, when the rule concerns it.
fn concerns(rule: &PacketRule, packet: &Packet, guess: u8, is_certain: bool) -> Option<u8> {
    let matches = |way| by_port(rule, packet, way) && by_host(rule, packet, way);
    if is_portless(rule, packet) || is_certain {
        return matches(guess).then_some(guess);
    }
    match (matches(direction::TO_SERVER), matches(direction::TO_CLIENT)) {
        (true, true) => Some(guess),
        (true, false) => Some(direction::TO_SERVER),
        (false, true) => Some(direction::TO_CLIENT),
        (false, false) => None,
    }
}

/// Every fault.
const FAULTS: &[&str] = &[
    "loss=50%",
    "loss=ge(20%,30%,90%,5%)",
    "loss=state(10%,50%,20%,40%,5%)",
    "drop",
    "blackhole",
    "reject",
    "reject=rst",
    "reject=icmp-port",
    "reject=icmp-host",
    "reject=icmp-admin",
    "reset",
    "reset=60",
    "corrupt=40%,bits:3",
    "corrupt=30%,link",
    "duplicate=30%",
    "mtu=90",
    "mtu=90,icmp",
    "ecn=50%",
    "down",
    "mix 30%:drop 40%:corrupt=100%",
    "mix 50%:reset 20%:loss=30%",
];

/// Every modifier, and some together.
const MODIFIERS: &[&str] = &[
    "",
    "p=50%",
    "first=3",
    "after=2",
    "nth=2",
    "every=3",
    "range=2..5",
    "first=4 count=rule",
    "every=2 count=rule",
    "conn=1..2",
    "match=data",
    "match=syn,ack",
    "match=fin",
    "match=rst",
    "size=1..80",
    "dir=to-server",
    "dir=to-client",
    "at=1h",
    "at=0s for=1h",
    "at=100ms for=800ms",
    "period=1h duty=50%",
    "at=500ms period=10h duty=1%",
    "every=2 after=1 dir=to-client",
    "range=2..9 count=rule p=70%",
];

/// What is put behind them.
const MORE: &[&str] = &[
    "",
    "",
    "",
    "dir=to-server",
    "dir=to-client",
    "p=60%",
    "conn=2..9",
    "match=data",
    "size=50..",
    "count=rule first=20",
    "every=2",
    "for=1h",
];

/// Over few ports and hosts, so that rules overlap.
const TARGETS: &[&str] = &[
    "tcp:80",
    "tcp:80,443",
    "udp:53",
    "any:53-100",
    "tcp:1000-50000",
    "*",
    "icmp",
    "10.1.0.2:80",
    "10.1.0.0/16",
    "[fd00::2]:80",
    "10.0.0.0/8:1-60000",
    "tcp:10.1.0.1",
    "udp:[fd00::/64]:53",
    "tcp:!80",
    "*,!53",
    "!udp:53",
    "*,!10.1.0.0/16",
    "10.0.0.0/8:!443,!10.1.0.2",
];

/// Goes through all pairs of a fault and a modifier, over and over, or through enough of them to meet each fault and each
/// modifier several times.
#[derive(Default)]
struct Pairs {
    drawn: usize,
    few: bool,
}

impl Pairs {
    /// How many have to be drawn.
    fn count(&self) -> usize {
        if self.few {
            3 * MODIFIERS.len().max(FAULTS.len())
        } else {
            FAULTS.len() * MODIFIERS.len()
        }
    }

    /// A rule of the next pair that goes together: not a reset of UDP, nor a match of SYN on ICMP, ...
    fn rule(&mut self, random: &mut Random) -> (String, ResolvedRule) {
        const ATTEMPTS: usize = 60;
        loop {
            let fault = FAULTS[self.drawn % FAULTS.len()];
            let row = if self.few {
                self.drawn
            } else {
                self.drawn / FAULTS.len()
            };
            let modifier = MODIFIERS[row % MODIFIERS.len()];
            self.drawn += 1;
            for _ in 0..ATTEMPTS {
                let (target, more) = (random.pick(TARGETS), random.pick(MORE));
                let text = format!("{target} {fault} {modifier} {more}");
                let Ok(rule) = text.trim().parse::<Rule>() else {
                    continue;
                };
                if let Ok(resolved) = rule.resolve(&Targets::new(), &mut SystemResolver) {
                    return (text, resolved);
                }
            }
        }
    }
}

fn random_rules(
    random: &mut Random,
    pairs: &mut Pairs,
    first_uid: u32,
    most: u64,
) -> Vec<PacketRule> {
    let count = 1 + random.below(most);
    let mut entries = Vec::new();
    for ordinal in 0..u32::try_from(count).unwrap() {
        let (text, resolved) = pairs.rule(random);
        let state = u32::try_from(entries.len()).unwrap();
        let mut compiled =
            fault_user::plan::packet::compile(&resolved, random.next(), ordinal, state, None)
                .unwrap_or_else(|error| panic!("{text}: {error}"));
        for rule in &mut compiled {
            rule.entry.uid += first_uid;
        }
        entries.extend(compiled);
    }
    entries
}

fn random_recipe(random: &mut Random, set: u64) -> Recipe {
    let base = match random.below(8) {
        0 => Recipe::ping(b"echo echo"),
        1 | 2 => Recipe::udp(b"datagram"),
        _ => Recipe::tcp(*random.pick(&[2, 16, 16, 16, 24, 17, 4]), b""),
    };
    let mut recipe = if random.one_in(3) { base.v6() } else { base };
    // Connections of this rule set alone; few of them, so that each has several packets.
    recipe.source_port = u16::try_from(10_000 + (set * 3 + random.below(3)) % 20_000).unwrap();
    recipe.destination_port = *random.pick(&[80, 443, 53, 60, 2000]);
    if random.one_in(4) && recipe.source.is_ipv4() {
        recipe.destination = IpAddr::from([10, 1, 0, *random.pick(&[3, 4])]);
    }
    recipe.sequence = 1000 + u32::try_from(random.below(2)).unwrap();
    recipe.service = u8::try_from(random.below(4)).unwrap();
    if recipe.flags & 2 == 0 && recipe.protocol == 6 && random.one_in(2) {
        recipe.payload = vec![0x5a; usize::try_from(random.below(60)).unwrap()];
    }
    let identifier = recipe.source_port;
    if random.one_in(3) {
        recipe = recipe.reversed();
    }
    if matches!(recipe.protocol, 1 | 58) {
        // An answer carries the identifier of its question.
        recipe.source_port = identifier;
    }
    recipe
}

/// The next frame: a whole packet mostly. The fragments of a datagram come one by one, out of order at times, and other
/// packets between them.
fn random_frame(random: &mut Random, set: u64, waiting: &mut Vec<Vec<u8>>) -> Vec<u8> {
    if random.one_in(2)
        && let Some(frame) = waiting.pop()
    {
        return frame;
    }
    let mut recipe = random_recipe(random, set);
    if !random.one_in(6) {
        return recipe.frame();
    }
    recipe.payload = vec![0x5a; usize::try_from(random.below(120)).unwrap()];
    // Hosts of this rule set alone, since what comes before its first fragment has no ports.
    let number = u16::try_from(set).unwrap();
    let client = if recipe.source_port < recipe.destination_port {
        &mut recipe.destination
    } else {
        &mut recipe.source
    };
    *client = match client {
        IpAddr::V4(_) => IpAddr::from((0x0a02_0000 | u32::from(number)).to_be_bytes()),
        IpAddr::V6(_) => IpAddr::from([0xfd00, 0, 0, 0, 0, 0, number, 1]),
    };
    let identification = u16::try_from(random.below(1 << 16)).unwrap();
    let mut fragments = recipe.fragments(identification, 24);
    if random.one_in(4) {
        let first = fragments.remove(0);
        fragments.insert(
            usize::try_from(random.below(fragments.len() as u64 + 1)).unwrap(),
            first,
        );
    }
    // The last one is taken first.
    fragments.reverse();
    let first = fragments.pop().unwrap();
    waiting.extend(fragments);
    first
}

/// The program that is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum At {
    /// tc at egress of loopback.
    Egress,
    /// The same, made for each rule set alone, so that the kernel leaves out what the rules do not ask for.
    Fitted,
    /// XDP, with rules that it can carry out.
    Xdp,
}

impl At {
    /// What the kernel returns for a verdict.
    fn code(self, verdict: &Verdict) -> u32 {
        let lost = matches!(verdict.end, action::DROP | action::DROP_CHECKSUM);
        match (self, lost) {
            (Self::Egress | Self::Fitted, true) => VANISHED,
            (Self::Egress | Self::Fitted, false) => NEXT,
            (Self::Xdp, true) => XDP_DROP,
            (Self::Xdp, false) => XDP_PASS,
        }
    }

    fn run(self, kernel: &mut Kernel, frame: &[u8]) -> u32 {
        match self {
            Self::Egress | Self::Fitted => kernel.run(TcHook::Egress, true, frame).code,
            Self::Xdp => kernel.run_xdp(frame),
        }
    }

    fn rules(self, random: &mut Random, pairs: &mut Pairs, first_uid: u32) -> Vec<PacketRule> {
        // One rule is judged by a way of its own.
        let most = if self == Self::Fitted { 2 } else { 16 };
        loop {
            let rules = random_rules(random, pairs, first_uid, most);
            if self != Self::Xdp || xdp::suits(&rules).is_ok() {
                return rules;
            }
        }
    }
}

/// Compares `packets` random packets under random rules: return code, events, statistics.
pub fn compare(at: At, packets: u32) {
    let per_set = if at == At::Fitted { 60 } else { 400 };
    let mut random = Random(0x000f_a017);
    let mut pairs = Pairs {
        drawn: 0,
        few: at == At::Fitted,
    };
    let mut kernel = Kernel::new(64, 2048);
    let mut last_print = Instant::now();
    for set in 0..packets.div_ceil(per_set) {
        if last_print.elapsed() > Duration::from_secs(30) {
            // An emulated machine is slow, and taken for dead when it is silent. What the macros print is kept back.
            let _ = writeln!(std::io::stderr(), "{at:?}: rule set {set}");
            last_print = Instant::now();
        }
        let rules = at.rules(&mut random, &mut pairs, set << STATE_BITS);
        let mut model = Model {
            states: vec![RuleState::default(); rules.len()],
            ..Model::default()
        };
        if at == At::Fitted {
            kernel.fit(&rules);
        }
        kernel.install_entries(&rules, 1_000_000_000);
        let mut hits = vec![0; rules.len()];
        let mut waiting = Vec::new();
        for number in 0..per_set {
            // XDP leaves fragments to tc.
            let frame = if at == At::Xdp {
                random_recipe(&mut random, u64::from(set)).frame()
            } else {
                random_frame(&mut random, u64::from(set), &mut waiting)
            };
            let (verdict, expected) = model.judge(&rules, &frame);
            let code = at.run(&mut kernel, &frame);
            let found: Vec<Event> = kernel
                .take_events()
                .into_iter()
                .map(|event| Event {
                    time_ns: 0,
                    ..event
                })
                .collect();
            let context =
                || format!("packet {number} of set {set}: {frame:02x?}\nunder {rules:#?}");
            assert_eq!(found, expected, "{}", context());
            assert_eq!(code, at.code(&verdict), "{}", context());
            for event in &expected {
                let at = rules
                    .iter()
                    .position(|rule| rule.entry.uid == event.rule)
                    .unwrap();
                hits[at] += 1;
            }
        }
        for (rule, hits) in rules.iter().zip(&hits) {
            let (stats, _) = kernel.injector.stats(rule.entry.state).unwrap();
            assert_eq!(stats.hit_packets, *hits);
        }
    }
    assert!(
        pairs.drawn >= pairs.count(),
        "every fault and every modifier"
    );
}

/// Networks are compared by the model as the compiler makes them.
#[test]
fn a_network_keeps_only_its_prefix() {
    let network = Network::new("10.1.2.3".parse().unwrap(), 8);
    assert_eq!(network, Network::new("10.0.0.0".parse().unwrap(), 8));
}
