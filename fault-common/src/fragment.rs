//! Fragments of a datagram. Only the first one has ports, so what the later ones need to know is kept in a table from it:
//! whose they are, and what the rules made of the datagram.
//!
//! To the counts of a rule, to `p=`, to its filters and to its delay a datagram is one packet, which the first fragment
//! that a rule judges decides for all. What a wire does by chance (`loss`, a damaged checksum, `duplicate`, `ecn`) is drawn
//! for each fragment: see [`crate::decide::judge`].

use crate::abi::{Datagram, datagram};
use crate::flow::digest;
use crate::packet::Packet;
use crate::random::mix;

/// How long fragments of one identification are taken for one datagram, in nanoseconds: as long as Linux waits for the
/// missing ones by default (`ipfrag_time`).
pub const REASSEMBLY_NS: u64 = 30_000_000_000;

/// The name of a datagram: source, destination, identification and, in IPv4, the protocol (RFC 791, RFC 8200).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct DatagramKey {
    /// The IPv4 addresses, the sender's first. Of IPv6 64 mixed bits of both.
    pub addresses: [u32; 2],
    /// See [`Packet::identification`].
    pub identification: u32,
    /// IP protocol number of IPv4; [`IPV6`] for IPv6.
    pub protocol: u32,
}

/// [`DatagramKey::protocol`] of IPv6, whose fragments do not all name the protocol.
pub const IPV6: u32 = 1 << 8;

/// Names what a rule made of a datagram.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct FollowedKey {
    /// The datagram.
    pub datagram: DatagramKey,
    /// The rule's [`RuleEntry::uid`](crate::abi::RuleEntry::uid).
    pub uid: u32,
}

/// What a fragment is to the table of datagrams.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FragmentKind {
    /// The first one of its datagram: rules judge it by its own ports.
    First,
    /// A later one, which has got the ports of the first.
    Follows,
    /// A later one of a datagram that no rule concerns.
    Unconcerned,
    /// A later one whose first one is not known: it has not come yet, or it is forgotten.
    Orphan,
}

/// Which datagram a fragment belongs to.
#[must_use]
#[inline(always)]
pub fn datagram_of(packet: &Packet) -> DatagramKey {
    let (addresses, protocol) = if packet.ipv6 {
        let both = mix(digest(&packet.source)).wrapping_add(digest(&packet.destination));
        #[expect(clippy::cast_possible_truncation, reason = "both halves are kept")]
        let halves = [(both >> 32) as u32, both as u32];
        (halves, IPV6)
    } else {
        let addresses = [packet.source[3], packet.destination[3]];
        (addresses, u32::from(packet.protocol))
    };
    DatagramKey {
        addresses,
        identification: packet.identification,
        protocol,
    }
}

/// Looks a fragment up. `known` is what the table holds of its datagram. `now` becomes what is known of the datagram at
/// hand, and a fragment that follows gets its ports.
#[inline(always)]
pub fn meet(
    known: Option<&Datagram>,
    time_ns: u64,
    packet: &mut Packet,
    now: &mut Datagram,
) -> FragmentKind {
    let known = known.filter(|known| time_ns.saturating_sub(known.time_ns) < REASSEMBLY_NS);
    if packet.fragment != 0
        && let Some(known) = known
        && known.state != datagram::EARLY
    {
        if known.state == datagram::UNCONCERNED {
            return FragmentKind::Unconcerned;
        }
        *now = *known;
        packet.follows = true;
        packet.source_port = now.source_port;
        packet.destination_port = now.destination_port;
        packet.protocol = now.protocol;
        packet.icmp_type = now.icmp_type;
        return FragmentKind::Follows;
    }
    let early_bytes = match known {
        Some(known) if known.state == datagram::EARLY => known.early_bytes,
        _ => 0,
    };
    // Field by field: a whole one would be made on the stack, where the kernel's programs have no room for it.
    now.time_ns = time_ns;
    now.early_bytes = early_bytes;
    now.source_port = packet.source_port;
    now.destination_port = packet.destination_port;
    now.protocol = packet.protocol;
    now.icmp_type = packet.icmp_type;
    now.state = datagram::EARLY;
    now.rules = 0;
    if packet.fragment == 0 {
        FragmentKind::First
    } else {
        FragmentKind::Orphan
    }
}

/// Makes `now` what the table is to hold, in a state that is one of [`datagram`]. Of a fragment that passes unjudged
/// before the first one its bytes are added up, for the rates of the first one's rules.
#[inline(always)]
pub const fn keep(now: &mut Datagram, packet: &Packet, state: u8) {
    now.state = state;
    now.early_bytes = if state == datagram::EARLY {
        now.early_bytes.saturating_add(packet.end)
    } else {
        0
    };
}

#[cfg(test)]
mod tests {
    extern crate std;

    use super::*;
    use crate::abi::{DecisionKey, FlowRule, Followed, RuleEntry, RuleState, fault};
    use crate::decide::{Counting, Fired, Plain, Sample, Verdict, judge};
    use crate::flow::mapped;
    use crate::random::{ALWAYS, threshold_from_ppm};
    use std::cell::RefCell;
    use std::collections::HashMap;
    use std::vec::Vec;

    fn fragment(number: u16, ipv6: bool) -> Packet {
        Packet {
            source: if ipv6 { [1, 2, 3, 4] } else { mapped(1) },
            destination: if ipv6 { [5, 6, 7, 8] } else { mapped(2) },
            source_port: if number == 0 { 4000 } else { 0 },
            destination_port: if number == 0 { 7000 } else { 0 },
            protocol: if ipv6 && number != 0 { 60 } else { 17 },
            ipv6,
            is_fragment: true,
            has_transport: number == 0,
            follows: number != 0,
            fragment: number,
            identification: 9,
            end: 1514,
            ..Packet::default()
        }
    }

    #[test]
    fn later_fragments_get_the_ports_of_the_first() {
        for ipv6 in [false, true] {
            let mut now = Datagram::NONE;
            let mut first = fragment(0, ipv6);
            assert_eq!(meet(None, 5, &mut first, &mut now), FragmentKind::First);
            now.rules = 2;
            keep(&mut now, &first, datagram::JUDGED);
            let known = now;
            let mut later = fragment(185, ipv6);
            assert_eq!(datagram_of(&first), datagram_of(&later));
            let mut now = Datagram::NONE;
            assert_eq!(
                meet(Some(&known), 6, &mut later, &mut now),
                FragmentKind::Follows
            );
            assert_eq!((later.source_port, later.destination_port), (4000, 7000));
            assert_eq!((later.protocol, later.has_transport), (17, false));
            assert_eq!(now, known);
            // The identification is used again, for another datagram.
            let mut late = fragment(185, ipv6);
            let late_ns = 5 + REASSEMBLY_NS;
            assert_eq!(
                meet(Some(&known), late_ns, &mut late, &mut now),
                FragmentKind::Orphan
            );
            assert_eq!(now.rules, 0);
        }
    }

    #[test]
    fn what_comes_before_the_first_is_added_to_it() {
        let mut now = Datagram::NONE;
        let (mut one, mut other) = (fragment(185, false), fragment(370, false));
        assert_eq!(meet(None, 1, &mut one, &mut now), FragmentKind::Orphan);
        keep(&mut now, &one, datagram::EARLY);
        let known = now;
        assert_eq!(
            meet(Some(&known), 2, &mut other, &mut now),
            FragmentKind::Orphan
        );
        keep(&mut now, &other, datagram::EARLY);
        let known = now;
        let mut first = fragment(0, false);
        assert_eq!(
            meet(Some(&known), 3, &mut first, &mut now),
            FragmentKind::First
        );
        assert_eq!(now.early_bytes, 2 * 1514);
        keep(&mut now, &first, datagram::JUDGED);
        assert_eq!(now.early_bytes, 0, "they are counted once");
    }

    #[test]
    fn datagrams_that_no_rule_concerns_are_known_as_such() {
        let mut now = Datagram::NONE;
        let mut first = fragment(0, false);
        assert_eq!(meet(None, 1, &mut first, &mut now), FragmentKind::First);
        keep(&mut now, &first, datagram::UNCONCERNED);
        let (known, mut later) = (now, fragment(185, false));
        assert_eq!(
            meet(Some(&known), 2, &mut later, &mut now),
            FragmentKind::Unconcerned
        );
    }

    #[test]
    fn datagrams_have_names_of_their_own() {
        let one = fragment(0, false);
        let back = Packet {
            source: one.destination,
            destination: one.source,
            ..one
        };
        let next = Packet {
            identification: 10,
            ..one
        };
        let ping = Packet { protocol: 1, ..one };
        for other in [back, next, ping, fragment(0, true)] {
            assert_ne!(datagram_of(&one), datagram_of(&other));
        }
    }

    fn rule(fault: u8, arguments: [u64; 5]) -> RuleEntry {
        RuleEntry {
            key: 7,
            mix_key: 0,
            mix_from: 0,
            mix_to: 0,
            at_ns: 0,
            length_ns: 0,
            period_ns: 0,
            active_ns: 0,
            count_from: 1,
            count_to: u64::MAX,
            count_step: 1,
            probability: ALWAYS,
            arguments,
            connection_from: 1,
            connection_to: u32::MAX,
            size_min: 0,
            size_max: u32::MAX,
            state: 0,
            uid: 1,
            fault,
            kinds: 0,
            directions: 3,
            flags: 0,
            query_type: 0,
            padding: 0,
        }
    }

    const CONNECTION: FlowRule = FlowRule {
        uid: 1,
        connection: 1,
        packets: [0; 2],
        outside: 0,
        memory: [0; 2],
    };

    fn judge_one<C: Counting>(
        rule: &RuleEntry,
        packet: &Packet,
        followed: &mut Followed,
        flow: &mut FlowRule,
        state: &mut RuleState,
    ) -> (Option<Fired>, Verdict) {
        let sample = Sample {
            now_ns: 0,
            size: packet.length(),
            direction: 0,
        };
        let mut verdict = Verdict::default();
        let fired = judge::<C>(rule, &sample, packet, followed, flow, state, &mut verdict);
        (fired, verdict)
    }

    /// What a rule makes of datagrams of four fragments each, one after the other.
    fn judged<C: Counting>(rule: &RuleEntry, datagrams: u32) -> Vec<[(Option<Fired>, Verdict); 4]> {
        let (mut flow, mut state) = (CONNECTION, RuleState::default());
        let one = |_| {
            let mut followed = Followed::NONE;
            core::array::from_fn(|number| {
                let packet = fragment(u16::try_from(number).unwrap() * 185, false);
                judge_one::<C>(rule, &packet, &mut followed, &mut flow, &mut state)
            })
        };
        (0..datagrams).map(one).collect()
    }

    /// The delays of as many datagrams that need no fragments.
    fn rule_on_whole_packets(rule: &RuleEntry) -> Vec<u64> {
        let (mut flow, mut state) = (CONNECTION, RuleState::default());
        let packet = Packet {
            is_fragment: false,
            ..fragment(0, false)
        };
        (0..50)
            .map(|_| {
                judge_one::<Plain>(
                    rule,
                    &packet,
                    &mut { Followed::NONE },
                    &mut flow,
                    &mut state,
                )
                .1
                .delay_ns
            })
            .collect()
    }

    #[test]
    fn all_fragments_are_as_late_as_the_first() {
        // Uniform jitter, each value near the one before.
        let rule = rule(fault::DELAY, [100_000, 50_000, 0, 1 << 31, 0]);
        let mut delays = Vec::new();
        for datagram in judged::<Plain>(&rule, 50) {
            let [first, ..] = datagram.map(|(_, verdict)| verdict.delay_ns);
            assert!(
                datagram
                    .iter()
                    .all(|(_, verdict)| verdict.delay_ns == first)
            );
            delays.push(first);
        }
        let whole = rule_on_whole_packets(&rule);
        assert_eq!(delays, whole, "as late as whole datagrams");
        delays.dedup();
        assert!(delays.len() > 40, "{delays:?}");
    }

    #[test]
    fn a_datagram_is_picked_whole() {
        let half = threshold_from_ppm(500_000);
        let every_third = RuleEntry {
            count_step: 3,
            ..rule(fault::DROP, [0; 5])
        };
        let by_chance = RuleEntry {
            probability: half,
            ..rule(fault::DROP, [0; 5])
        };
        let overtaken = rule(fault::REORDER, [half, 1, 0, 0, 0]);
        for (rule, expected) in [
            (every_third, 100..=100),
            (by_chance, 130..=170),
            (overtaken, 130..=170),
        ] {
            let picked = judged::<Plain>(&rule, 300)
                .iter()
                .filter(|datagram| {
                    let [first, ..] = datagram.map(|(fired, _)| fired.is_some());
                    assert!(datagram.iter().all(|(fired, _)| fired.is_some() == first));
                    first
                })
                .count();
            assert!(expected.contains(&picked), "{picked}: {rule:?}");
        }
    }

    #[test]
    fn a_wire_damages_each_fragment_by_itself() {
        let tenth = threshold_from_ppm(100_000);
        let wire = [fault::LOSS, fault::CORRUPT_LINK, fault::DUPLICATE];
        for fault in wire {
            let all = judged::<Plain>(&rule(fault, [tenth, 0, 0, 0, 0]), 10_000);
            let hit = all
                .iter()
                .filter(|datagram| datagram.iter().any(|(fired, _)| fired.is_some()));
            // 1 - 0.9^4 of 10,000, and four standard deviations.
            assert!((3439 - 190..3439 + 190).contains(&hit.count()));
        }
        // The checksum of a datagram is in its first fragment.
        let all = judged::<Plain>(&rule(fault::CORRUPT_VISIBLE, [ALWAYS, 1, 0, 0, 0]), 10);
        for datagram in all {
            assert_eq!(
                datagram.map(|(fired, _)| fired.is_some()),
                [true, false, false, false]
            );
        }
    }

    std::thread_local! {
        static KNOWN: RefCell<HashMap<DecisionKey, u64>> = RefCell::default();
    }

    /// Repeats the decisions in [`KNOWN`].
    struct Again;

    impl Counting for Again {
        fn next(counter: &mut u64) -> u64 {
            Plain::next(counter)
        }

        fn add(counter: &mut u64, value: u64) {
            Plain::add(counter, value);
        }

        fn swap(counter: &mut u64, from: u64, to: u64) -> bool {
            Plain::swap(counter, from, to)
        }

        fn replays() -> bool {
            true
        }

        fn recall(key: &DecisionKey) -> Option<u64> {
            KNOWN.with_borrow(|known| known.get(key).copied())
        }

        fn spread(_index: u32) -> i64 {
            0
        }
    }

    #[test]
    fn what_was_done_to_fragments_is_done_again() {
        let jittered = rule(fault::DELAY, [100_000, 50_000, 0, 0, 0]);
        let lossy = rule(fault::LOSS, [threshold_from_ppm(200_000), 0, 0, 0, 0]);
        for rule in [jittered, lossy] {
            let first = judged::<Plain>(&rule, 100);
            let fired = first.iter().flatten().filter_map(|(fired, _)| *fired);
            KNOWN.replace(
                fired
                    .map(|fired| {
                        let key = DecisionKey {
                            rule: rule.uid,
                            connection: fired.ordinals.connection,
                            seen: fired.seen,
                            direction: fired.ordinals.direction.into(),
                            fragment: fired.ordinals.fragment,
                        };
                        (key, fired.ordinals.packet)
                    })
                    .collect(),
            );
            assert_eq!(judged::<Again>(&rule, 100), first);
        }
    }
}
