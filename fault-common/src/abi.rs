//! The layout of every BPF map value, shared by the programs and the loader.
//!
//! A change to anything here, or to what a field means, is a new [`ABI_VERSION`]: the loader refuses
//! an object that carries another one.

/// Version of this layout.
pub const ABI_VERSION: u32 = 18;
/// Name of the ELF section in which the object carries [`ABI_VERSION`].
pub const ABI_SECTION: &str = "fault_abi";

/// Largest number of rules in a set.
pub const RULES_MAX: u32 = 4096;
/// Largest number of 64-bit words of a rule vector: one bit for each rule.
pub const WORDS_MAX: u32 = RULES_MAX / 64;
/// How many matching rules of one packet are listed before the first of them is judged. Those that
/// follow are judged as well, but it takes longer.
pub const MATCHES_MAX: usize = 8;
/// How many rules keep what they remember of a connection in its [`Flow`]. Further ones have an entry
/// of their own, by [`FlowRuleKey`].
pub const FLOW_SLOTS: usize = 8;
/// How many cgroup levels a rule set may use as scopes.
pub const SCOPE_LEVELS_MAX: usize = 4;
/// How many different names rules of one instance can be aimed at whose addresses are learned.
pub const NAMES_MAX: usize = 64;
/// How many addresses of such names are known at once.
pub const LEARNED_MAX: u32 = 1 << 14;
/// Most bits that one `corrupt` flips in one packet.
pub const CORRUPT_BITS_MAX: u32 = 64;

/// Direction of a packet as seen from the service.
pub mod direction {
    /// To the service.
    pub const TO_SERVER: u8 = 0;
    /// From the service.
    pub const TO_CLIENT: u8 = 1;
    /// The bit of [`TO_SERVER`] in [`super::RuleEntry::directions`].
    pub const BIT_TO_SERVER: u8 = 1;
    /// The bit of [`TO_CLIENT`].
    pub const BIT_TO_CLIENT: u8 = 2;
}

/// What holds the packets of a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Held {
    /// Nothing: they are not held.
    No,
    /// Whatever can keep a packet until a time: a qdisc, or the delay line.
    Timed,
    /// The delay line, which has the fault's arguments.
    Shaped,
}

/// A fault, as the programs know it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KernelFault {
    /// The value of [`RuleEntry::fault`].
    pub number: u8,
    /// The fault of the rule language that becomes it, with the argument that chooses it.
    pub name: &'static str,
    /// What may become of a packet: bits by [`action`].
    pub actions: u32,
    /// What holds its packets.
    pub held: Held,
}

macro_rules! faults {
    ($($(#[$doc:meta])* $fault:ident = $number:literal, $name:literal, $held:ident, [$($action:ident),+];)+) => {
        /// What a rule does; values of [`RuleEntry::fault`].
        pub mod fault {
            use super::{Held, KernelFault, action};

            $($(#[$doc])* pub const $fault: u8 = $number;)+

            /// All of them.
            pub const ALL: &[KernelFault] = &[$(KernelFault {
                number: $number,
                name: $name,
                actions: $(1 << action::$action)|+,
                held: Held::$held,
            }),+];

            /// The fault of this number.
            #[must_use]
            pub fn of(number: u8) -> Option<&'static KernelFault> {
                ALL.iter().find(|fault| fault.number == number)
            }
        }
    };
}

faults! {
    /// Silent random loss: `arguments[0]` threshold.
    LOSS = 1, "loss", No, [DROP];
    /// Gilbert-Elliott loss: `arguments` p, r, 1-h, 1-k as thresholds.
    LOSS_GILBERT_ELLIOTT = 2, "loss=ge", No, [DROP];
    /// Four-state Markov loss: `arguments` p13, p31, p32, p23, p14 as thresholds.
    LOSS_STATE = 3, "loss=state", No, [DROP];
    /// Silent drop of whatever the modifiers pick; also `blackhole`.
    DROP = 4, "drop", No, [DROP];
    /// Refusal: `arguments[0]` is a value of [`super::reject`].
    REJECT = 5, "reject", No, [REJECT_RST, REJECT_ICMP, DROP];
    /// RST to both ends, once `arguments[0]` bytes of payload have gone in the packet's direction.
    RESET = 6, "reset", No, [RESET];
    /// Bit flips the receiver reads: `arguments[0]` threshold, `[1]` bits.
    CORRUPT_VISIBLE = 7, "corrupt", No, [CORRUPT];
    /// Bit flips the receiver's checksum catches: `arguments[0]` threshold.
    CORRUPT_LINK = 8, "corrupt=link", No, [DROP_CHECKSUM];
    /// The same packet twice: `arguments[0]` threshold.
    DUPLICATE = 9, "duplicate", No, [DUPLICATE];
    /// Drops larger packets: `arguments[0]` bytes, `[1]` 1 to answer with ICMP "too big".
    MTU = 10, "mtu", No, [REJECT_ICMP, DROP];
    /// Marks ECT packets CE: `arguments[0]` threshold.
    ECN = 11, "ecn", No, [ECN];
    /// The service is gone: refuses what is new, resets what is open.
    DOWN = 12, "down", No, [RESET, REJECT_RST, REJECT_ICMP, DROP];
    /// Held: `arguments` middle and jitter in nanoseconds, [`crate::delay::distribution`] with 0x100 for
    /// keep-order, correlation (of 2^32).
    DELAY = 13, "delay", Timed, [HOLD];
    /// Shaped: the delay line has the arguments.
    RATE = 14, "rate", Shaped, [HOLD];
    /// Overtakes what is held: `arguments[0]` threshold, `[1]` gap.
    REORDER = 15, "reorder", Timed, [HOLD];
    /// Held up to the next slot: the delay line has the arguments.
    SLOT = 16, "slot", Shaped, [HOLD];
    /// Given to a relay by the delay line: `arguments[0]` the relay's number.
    RELAY = 17, "relay", Shaped, [HOLD];
    /// No fault: a response of DNS is read for the addresses of names.
    LEARN = 18, "learn", No, [LEARN];
    /// A query of DNS is answered: `arguments[0]` [`crate::dns::Reply::flags`], `[1]` the type of its address (0: none),
    /// `[2]` and `[3]` the address.
    ANSWER = 19, "answer", No, [ANSWER];
}

/// How a refusal is told; values of `arguments[0]` of [`fault::REJECT`].
pub mod reject {
    /// RST for TCP, ICMP host unreachable for ICMP, ICMP port unreachable for others.
    pub const BY_PROTOCOL: u64 = 0;
    /// A TCP RST.
    pub const RST: u64 = 1;
    /// ICMP port unreachable.
    pub const ICMP_PORT: u64 = 2;
    /// ICMP host unreachable (v6: address unreachable).
    pub const ICMP_HOST: u64 = 3;
    /// ICMP administratively prohibited.
    pub const ICMP_ADMIN: u64 = 4;
}

/// How many bits of a [`RuleEntry::uid`] are its [`RuleEntry::state`]; those above tell it from the rules that had
/// the state before it.
pub const STATE_BITS: u32 = 13;

/// The [`RuleEntry::uid`] of the rule that has `state` as the `age`-th, from 1.
#[must_use]
pub const fn rule_uid(age: u32, state: u32) -> u32 {
    (age << STATE_BITS) | state
}

/// The [`RuleEntry::state`] of the rule with this [`RuleEntry::uid`].
#[must_use]
#[inline(always)]
pub const fn state_of(uid: u32) -> u32 {
    uid & ((1 << STATE_BITS) - 1)
}

/// Bits of [`RuleEntry::flags`].
pub mod rule_flag {
    /// Triggers count over the whole rule instead of per connection.
    pub const COUNT_PER_RULE: u8 = 1;
    /// The mix window of the rule is in use.
    pub const MIX: u8 = 2;
    /// What the rule decides may differ from one wire packet to the next: a super-packet is divided before the
    /// rule is asked.
    pub const PER_SEGMENT: u8 = 4;
}

/// What rules ask for beside their fault; bits of the programs' constant `MODIFIERS`.
pub mod modifier {
    /// A time at which it begins, ends or repeats.
    pub const WINDOW: u32 = 1;
    /// Only some counts fire.
    pub const TRIGGER: u32 = 2;
    /// See [`super::rule_flag::COUNT_PER_RULE`].
    pub const COUNT_PER_RULE: u32 = 4;
    /// `p=` of less than 100%.
    pub const PROBABILITY: u32 = 8;
    /// `match=`.
    pub const KINDS: u32 = 16;
    /// `size=`.
    pub const SIZE: u32 = 32;
    /// `conn=`.
    pub const CONNECTION: u32 = 64;
    /// See [`super::rule_flag::MIX`].
    pub const MIX: u32 = 128;
    /// See [`super::rule_flag::PER_SEGMENT`].
    pub const PER_SEGMENT: u32 = 256;
    /// `type=`.
    pub const QUERY_TYPE: u32 = 512;
}

/// What rules concern; bits of the programs' constant `PROTOCOLS`, by the index of [`SetHeader::portless`].
pub mod protocol {
    /// TCP.
    pub const TCP: u32 = 1;
    /// UDP.
    pub const UDP: u32 = 2;
    /// ICMP and `ICMPv6`.
    pub const ICMP: u32 = 4;
}

/// One compiled rule. Times are nanoseconds since [`SetHeader::epoch_ns`]; thresholds are of 2^32.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RuleEntry {
    /// Key of the rule's draws.
    pub key: u64,
    /// Key of the draw that a `mix` makes once per connection.
    pub mix_key: u64,
    /// The rule's part of the mix draw: from here ...
    pub mix_from: u64,
    /// ... up to, not including, here.
    pub mix_to: u64,
    /// When the rule begins.
    pub at_ns: u64,
    /// How long it lasts; 0: until it is removed.
    pub length_ns: u64,
    /// Length of one repetition; 0: no repetition.
    pub period_ns: u64,
    /// How long it is active at the start of each repetition.
    pub active_ns: u64,
    /// First count that fires, from 1.
    pub count_from: u64,
    /// Last count that fires.
    pub count_to: u64,
    /// Only multiples of this count fire; 1 for all.
    pub count_step: u64,
    /// The `p=` modifier.
    pub probability: u64,
    /// What the fault needs: see [`fault`].
    pub arguments: [u64; 5],
    /// First connection concerned, from 1.
    pub connection_from: u32,
    /// Last connection concerned.
    pub connection_to: u32,
    /// Smallest IP packet concerned, in bytes.
    pub size_min: u32,
    /// Largest IP packet concerned, in bytes.
    pub size_max: u32,
    /// Index of the rule's [`RuleState`] and [`RuleStats`]; its name in events.
    pub state: u32,
    /// Identity of the rule across rule sets, never reused and not 0: see [`rule_uid`].
    pub uid: u32,
    /// What it does: see [`fault`].
    pub fault: u8,
    /// Bits of [`crate::packet::kind`] of which one must be there; 0: any packet.
    pub kinds: u8,
    /// Bits of [`direction`].
    pub directions: u8,
    /// Bits of [`rule_flag`].
    pub flags: u8,
    /// The type that a query of DNS asks for; 0: any.
    pub query_type: u16,
    /// Always zero.
    pub padding: u16,
}

impl RuleEntry {
    /// Whether all that the rule ever does to a packet is to lose it.
    #[must_use]
    #[inline(always)]
    pub const fn only_loses(&self) -> bool {
        match self.fault {
            fault::LOSS
            | fault::LOSS_GILBERT_ELLIOTT
            | fault::LOSS_STATE
            | fault::DROP
            | fault::CORRUPT_LINK => true,
            fault::MTU => self.arguments[1] == 0,
            _ => false,
        }
    }
}

/// What all rules of one set share.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SetHeader {
    /// Time 0 of the rules' windows, on `CLOCK_MONOTONIC`.
    pub epoch_ns: u64,
    /// How many rules there are.
    pub rules: u32,
    /// Changes whenever the scopes do, so that a connection's scope is looked up again.
    pub scope_version: u32,
    /// 1 when a rule names a host.
    pub has_hosts: u8,
    /// 1 when a rule is scoped to a cgroup.
    pub has_scopes: u8,
    /// How many of `scope_levels` are in use.
    pub scope_level_count: u8,
    /// Distinct cgroup levels of the scopes, deepest first.
    pub scope_levels: [u8; SCOPE_LEVELS_MAX],
    /// 1 when a rule has no port.
    pub has_portless: u8,
    /// Class of the rules without a port: TCP, UDP, ICMP, others; by direction.
    pub portless: [[u16; 2]; 4],
    /// Class of the rules without a host.
    pub any_host: u16,
    /// Class of the rules without a cgroup.
    pub any_scope: u16,
    /// 1 when a rule is aimed at a name whose addresses are learned.
    pub has_names: u8,
    /// 1 when a rule is aimed at queries for a name.
    pub has_questions: u8,
    /// Class of the rules that are not aimed at queries for a name.
    pub any_question: u16,
}

/// The names that an address is known by. There is a byte for each, so that several CPUs can write to one entry.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Known {
    /// 1 for a name that it is known by.
    pub names: [u8; NAMES_MAX],
}

impl Known {
    /// By none.
    pub const NOBODY: Self = Self {
        names: [0; NAMES_MAX],
    };

    /// The names as bits.
    #[must_use]
    #[inline(always)]
    pub fn mask(&self) -> u64 {
        // Puts the lowest bit of each of eight bytes next to each other in the highest byte.
        const GATHER: u64 = 0x0102_0408_1020_4080;
        let mut mask = 0;
        let (words, _) = self.names.as_chunks::<8>();
        for (index, word) in words.iter().enumerate() {
            mask |= (u64::from_le_bytes(*word).wrapping_mul(GATHER) >> 56) << (8 * index);
        }
        mask
    }
}

/// The classes of one port, by direction: the rules for packets to it and from it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PortClasses {
    /// Of TCP.
    pub tcp: [u16; 2],
    /// Of UDP.
    pub udp: [u16; 2],
}

/// Words of the set of ports that rules give by themselves, not within a range: a bit for each port of TCP, then of UDP.
pub const NAMED_WORDS: u32 = 2 << 10;

/// Where a port of TCP (0) or UDP (1) is in that set: the word, and the bit.
#[must_use]
#[inline(always)]
pub const fn named_at(protocol: u32, port: u16) -> (u32, u32) {
    ((protocol << 10) | (port >> 6) as u32, port as u32 & 63)
}

/// A host's classes, by direction.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ScopeKey {
    /// The cgroup's id.
    pub cgroup: u64,
    /// Generation of the rule set.
    pub generation: u32,
    /// Always zero.
    pub padding: u32,
}

/// Which time the programs read; values of their constant `CLOCK`.
pub mod clock {
    /// To the nanosecond, from the hardware.
    pub const EXACT: u32 = 0;
    /// The kernel's last tick (Linux 5.11): a few milliseconds late, and quicker.
    pub const TICK: u32 = 1;
    /// None: where no rule has a window, and links take the programs away when the daemon dies, nobody asks for it.
    pub const NONE: u32 = 2;
}

/// What the daemon tells the programs.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Control {
    /// Past this `CLOCK_MONOTONIC` time every packet passes; 0 before the first rules and after the last.
    /// `u64::MAX` where the kernel takes the programs away with the process.
    pub lease_until_ns: u64,
    /// Which of the two rule sets is active: 0 or 1.
    pub generation: u32,
    /// 1 when events are wanted.
    pub events: u32,
    /// Index of the device that divides super-packets; 0 without one, when each is treated as one packet.
    pub divider: u32,
    /// Zero.
    pub padding: u32,
}

/// What one rule remembers of one connection.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FlowRule {
    /// The rule's [`RuleEntry::uid`]; 0 for a free slot.
    pub uid: u32,
    /// The connection's ordinal among those of the rule, from 1.
    pub connection: u32,
    /// Packets that passed the rule's window and filters, by direction.
    pub packets: [u64; 2],
    /// Packets that passed the rule's filters outside its windows: the lower half counts those to the server, the upper
    /// half those to the client.
    pub outside: u64,
    /// What the fault itself remembers, by direction: the state of a Markov loss model, or the payload bytes
    /// towards a `reset`.
    pub memory: [u32; 2],
}

/// Names what a rule remembers of a connection whose [`Flow`] has no slot for it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FlowRuleKey {
    /// The connection.
    pub flow: crate::flow::FlowKey,
    /// Its [`Flow::birth`].
    pub birth: u32,
    /// The rule's [`RuleEntry::uid`].
    pub uid: u32,
}

/// Whose a socket is. Kept with the socket in the kernel.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Owner {
    /// The deepest scope (a cgroup that rules are limited to) that the socket belongs to; 0: none.
    pub scope: u64,
    /// The socket's cookie; that of the listener where a listener accepted it.
    pub socket: u64,
}

/// What is remembered of one connection.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    /// The scopes of both ends, by [`crate::flow::Side`]; 0: none, or not known.
    pub scopes: [u64; 2],
    /// Which sockets sent and received the connection's datagrams, in this order, by side: see
    /// [`Flow::is_taken_over`].
    pub sockets: [[u32; 2]; 2],
    /// [`SetHeader::scope_version`] for which the scopes were looked up.
    pub scope_version: u32,
    /// Sequence number of the SYN that began the connection.
    pub initial_sequence: u32,
    /// Which [`crate::flow::Side`] the service is.
    pub server_side: u8,
    /// 1 when that is certain: see [`crate::matching::Service`].
    pub is_certain: u8,
    /// 1 when the SYN has been seen.
    pub has_initial: u8,
    /// Which ends of a TCP connection have told whose they are: see [`Flow::unresolved`].
    pub resolved: u8,
    /// 1 once a FIN has been seen, by the [`crate::flow::Side`] that sent it; both are 1 after an RST.
    pub ended: [u8; 2],
    /// Always zero.
    pub padding: [u8; 2],
    /// The half second in which the last packet came, counted from the start of the run.
    pub touched: u32,
    /// Differs between two connections with the same [`crate::flow::FlowKey`].
    pub birth: u32,
    /// What rules remember of it.
    pub rules: [FlowRule; FLOW_SLOTS],
}

/// How many datagrams in fragments are remembered at once. Beyond, those that have been idle for longest are forgotten.
pub const DATAGRAMS: u32 = 4096;
/// How often rules are remembered that have judged one of these datagrams.
pub const FOLLOWED: u32 = 8 * DATAGRAMS;

/// What one rule made of a datagram that comes in fragments.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Followed {
    /// The rule's [`RuleEntry::uid`]; 0 for none.
    pub uid: u32,
    /// See [`DecisionKey::seen`].
    pub seen: u32,
    /// The datagram's ordinal in its connection and direction, from 1; 0 when window, filters, trigger or `p=` did not pick
    /// it.
    pub packet: u64,
    /// How long the rule holds it; [`Followed::UNDRAWN`] before that is known.
    pub delay_ns: u64,
}

impl Followed {
    /// See [`Followed::delay_ns`].
    pub const UNDRAWN: u64 = u64::MAX;
    /// That of no rule.
    pub const NONE: Self = Self {
        uid: 0,
        seen: 0,
        packet: 0,
        delay_ns: Self::UNDRAWN,
    };
}

/// What is remembered of a datagram that comes in fragments.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Datagram {
    /// When the fragment came that it was entered for (`CLOCK_MONOTONIC`).
    pub time_ns: u64,
    /// Bytes of later fragments that have passed before the first one.
    pub early_bytes: u32,
    /// See [`crate::packet::Packet::source_port`].
    pub source_port: u16,
    /// See [`crate::packet::Packet::destination_port`].
    pub destination_port: u16,
    /// IP protocol number of the transport header.
    pub protocol: u8,
    /// ICMP type, 0 for others.
    pub icmp_type: u8,
    /// What has become of it: see [`datagram`].
    pub state: u8,
    /// Always zero.
    pub padding: u8,
    /// How many rules one of its fragments was judged by, at most.
    pub rules: u32,
}

impl Datagram {
    /// One of which nothing is known.
    pub const NONE: Self = Self {
        time_ns: 0,
        early_bytes: 0,
        source_port: 0,
        destination_port: 0,
        protocol: 0,
        icmp_type: 0,
        state: datagram::EARLY,
        padding: 0,
        rules: 0,
    };
}

/// Values of [`Datagram::state`].
pub mod datagram {
    /// Its first fragment has not come.
    pub const EARLY: u8 = 0;
    /// No rule concerns it.
    pub const UNCONCERNED: u8 = 1;
    /// Rules have judged its first fragment.
    pub const JUDGED: u8 = 2;
}

/// What one rule remembers of all connections.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RuleState {
    /// Connections seen.
    pub connections: u64,
    /// Packets that passed the rule's filters.
    pub packets: u64,
    /// [`RuleEntry::uid`] of the rule whose state this is; that of another one is no more.
    pub uid: u32,
    /// Always zero.
    pub padding: u32,
}

/// What one rule saw and did, on one CPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RuleStats {
    /// Packets (socket buffers) that were the rule's by target, direction and scope.
    pub seen_packets: u64,
    /// The same in wire packets: a super-packet counts its segments.
    pub seen_segments: u64,
    /// The same in wire bytes.
    pub seen_bytes: u64,
    /// Packets that the fault was applied to.
    pub hit_packets: u64,
    /// The same in wire packets.
    pub hit_segments: u64,
    /// The same in wire bytes.
    pub hit_bytes: u64,
}

/// What happened to a packet; values of [`Event::action`].
pub mod action {
    /// Dropped silently.
    pub const DROP: u8 = 1;
    /// Dropped as the receiver's checksum would have.
    pub const DROP_CHECKSUM: u8 = 2;
    /// Answered with an RST.
    pub const REJECT_RST: u8 = 3;
    /// Answered with an ICMP error.
    pub const REJECT_ICMP: u8 = 4;
    /// Reset at both ends.
    pub const RESET: u8 = 5;
    /// Bits flipped.
    pub const CORRUPT: u8 = 6;
    /// Sent twice.
    pub const DUPLICATE: u8 = 7;
    /// Marked CE.
    pub const ECN: u8 = 8;
    /// Held.
    pub const HOLD: u8 = 9;
    /// Sent ahead of what is held.
    pub const OVERTAKE: u8 = 10;
    /// Read for the addresses of names.
    pub const LEARN: u8 = 11;
    /// Answered as a server of DNS would.
    pub const ANSWER: u8 = 12;
}

/// What the programs tell the delay line about a packet that they hand to it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Hold {
    /// `CLOCK_MONOTONIC` time at which the packet came.
    pub now_ns: u64,
    /// How long it is held, beside rates and slots.
    pub delay_ns: u64,
    /// Identifies connection and direction, where its packets must keep their order; else 0.
    pub flow: u64,
    /// Index of the interface that it passes.
    pub interface: u32,
    /// Bytes on the wire.
    pub bytes: u32,
    /// [`RuleEntry::state`] of the rate that it is subject to, and 1; 0 for none.
    pub rate: u16,
    /// The same for slots.
    pub slot: u16,
    /// Bits of [`hold_flag`].
    pub flags: u16,
    /// Wire packets in it.
    pub segments: u16,
    /// The number of the relay that it is given to, and 1; 0 for none.
    pub relay: u16,
    /// Always 0.
    pub padding: [u16; 3],
    /// The instances that have judged it, a bit each: see [`INSTANCES_MAX`].
    pub judges: u64,
}

/// Where a packet goes on that the delay line has held.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Release {
    /// [`Hold::judges`].
    pub judges: u64,
    /// The number of the place, below [`PLACES`].
    pub place: u64,
}

/// How many instances of `fault` there can be in one network namespace. Each has a number, and a bit of its own in what a
/// packet remembers.
pub const INSTANCES_MAX: u32 = 64;
/// How many of them a packet remembers from one interface to the next.
pub const INSTANCES_REMEMBERED: u32 = 8;

/// What holds packets; values of the programs' constant `HOLDER`.
pub mod holder {
    /// The delay line, behind a tap device.
    pub const DELAY_LINE: u32 = 0;
    /// An fq qdisc, which keeps a packet until the departure time that the program sets.
    pub const FQ: u32 = 1;
    /// netem qdiscs, one for each delay, below a prio qdisc.
    pub const NETEM: u32 = 2;
}

/// The major number of the handles of our qdiscs, which nobody else is likely to choose.
pub const QDISC_MAJOR: u16 = 0xfa17;
/// How many netem qdiscs there can be below one prio qdisc, whose first band is for packets that are not held.
pub const LEAVES: u32 = 15;

/// How many targets can be watched, or have their connections redirected to the relay: bits of an entry of `STEER_PORTS`.
pub const STEERS: u32 = 64;

/// A target that is watched, or whose connections are redirected to the relay.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Steer {
    /// Port of the relay on 127.0.0.1, in host byte order.
    pub port4: u16,
    /// Port of the relay on `::1`; 0 where there is no IPv6.
    pub port6: u16,
    /// 1 when every host is concerned.
    pub any_host: u16,
    /// 1 when connections from outside are refused.
    pub refused: u16,
    /// What it is about: bits of [`steered`].
    pub protocols: u32,
    /// Always zero.
    pub padding: u32,
    /// The names whose learned addresses are concerned, as bits.
    pub names: u64,
}

/// Bits of [`Steer::protocols`].
pub mod steered {
    /// Connections of TCP.
    pub const TCP: u32 = 1;
    /// Datagrams of UDP.
    pub const UDP: u32 = 2;
}

/// An address and a port of TCP or UDP.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Destination {
    /// The address, as in [`crate::flow`].
    pub address: crate::flow::Address,
    /// The port in host byte order.
    pub port: u32,
}

/// A connection of TCP that is being opened by way of the relay, as the relay's host sees it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Handshake {
    /// The client's own address.
    pub client: Destination,
    /// The address that its segments are sent to.
    pub server: Destination,
}

/// Where the client of a [`Handshake`] meant to connect.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Original {
    /// The server's address.
    pub server: Destination,
    /// Whether the client's SYN is held: a value of [`admitted`].
    pub admitted: u32,
    /// The entry of [`Steer`] that the connection belongs to.
    pub service: u32,
}

/// Values of [`Original::admitted`].
pub mod admitted {
    /// The SYN is held until the server has answered the relay.
    pub const HELD: u32 = 0;
    /// The SYN was held, and is not held any more.
    pub const RELEASED: u32 = 1;
    /// The SYN is not held, because the server is [`Prompt`](super::Prompt).
    pub const AT_ONCE: u32 = 2;
}

/// A server on this host that has just answered the relay at once, and has room for further connections. Its clients'
/// SYNs are not held.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Prompt {
    /// The server's address.
    pub server: Destination,
    /// Always zero.
    pub padding: u32,
    /// When the relay has to look again, in nanoseconds of `CLOCK_MONOTONIC`.
    pub until_ns: u64,
    /// How many clients of the service are admitted at once, counted from its beginning.
    pub limit: u64,
}

impl Prompt {
    /// Whether a client of `server` is admitted at once, when `admitted` clients of the service have been before.
    #[must_use]
    pub fn admits(&self, server: &Destination, admitted: u64, now_ns: u64) -> bool {
        admitted < self.limit && now_ns < self.until_ns && self.server == *server
    }
}

/// The longest header of TCP, in bytes.
pub const TCP_HEADER_MAX: usize = 60;

/// Something that happened to a connection on its way to the relay.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HandshakeEvent {
    /// The cookie of the relay's listener; 0 for [`handshake::GONE`].
    pub listener: u64,
    /// Which connection.
    pub handshake: Handshake,
    /// One of [`handshake`].
    pub kind: u32,
    /// Bytes of `header` that are used.
    pub length: u32,
    /// The SYN's header of TCP.
    pub header: [u8; TCP_HEADER_MAX],
    /// Always zero.
    pub padding: u32,
}

/// Values of [`HandshakeEvent::kind`].
pub mod handshake {
    /// A SYN came in, and is held.
    pub const SYN: u32 = 1;
    /// The client has given up, or knows that it is refused.
    pub const GONE: u32 = 2;
}

/// The relay's addresses in 127.0.0.0/8, one for each server over IPv4, are 127.64.0.0 and following: the second octet
/// has the bits of [`alias::FIRST`] under [`alias::MASK`].
pub mod alias {
    /// See above.
    pub const MASK: u8 = 0xc0;
    /// See above.
    pub const FIRST: u8 = 0x40;
}

/// What is remembered of a connection that is watched.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Watched {
    /// The targets that it goes to, as bits.
    pub targets: u64,
    /// When it was last told that data was sent (`CLOCK_MONOTONIC`).
    pub sent_ns: u64,
    /// The same of data received.
    pub received_ns: u64,
    /// 1 once its end has been told.
    pub closed: u64,
}

/// Something that was seen of a connection.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Witness {
    /// When (`CLOCK_MONOTONIC`).
    pub time_ns: u64,
    /// Which connection: the cookie of its socket; of datagrams one for each socket and target.
    pub cookie: u64,
    /// The targets that it goes to, as bits.
    pub targets: u64,
    /// What: one of [`witness`].
    pub kind: u64,
}

/// Values of [`Witness::kind`].
pub mod witness {
    /// connect(2) was called.
    pub const CONNECT: u64 = 1;
    /// The handshake is done.
    pub const ESTABLISHED: u64 = 2;
    /// The process has closed it, or it was reset or refused.
    pub const CLOSED: u64 = 3;
    /// The process sent data, for the first time in a millisecond.
    pub const SENT: u64 = 4;
    /// The process' socket received data, for the first time in a millisecond.
    pub const RECEIVED: u64 = 5;
    /// A connection came in.
    pub const ACCEPTED: u64 = 6;
    /// As [`CLOSED`], but by a reset, of either end, while it was open.
    pub const RESET: u64 = 7;
}

/// Where a process connected to, sent a datagram to, or bound a socket to.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Endpoint {
    /// The cookie of its network namespace.
    pub netns: u64,
    /// The address, an IPv4 one mapped.
    pub address: [u32; 4],
    /// The port, in host order.
    pub port: u16,
    /// `IPPROTO_TCP` or `IPPROTO_UDP`.
    pub protocol: u8,
    /// What the process did: one of [`endpoint`].
    pub act: u8,
    /// Zero.
    pub padding: u32,
}

/// Values of [`Endpoint::act`].
pub mod endpoint {
    /// It connected, or sent a datagram without connecting.
    pub const DIALLED: u8 = 1;
    /// It bound a socket.
    pub const BOUND: u8 = 2;
}

/// How many different endpoints are told apart; further ones are only counted.
pub const ENDPOINTS_MAX: u32 = 1024;

/// Bits of [`Hold::flags`].
pub mod hold_flag {
    /// It was on its way in.
    pub const INGRESS: u16 = 1;
    /// It is sent twice.
    pub const TWICE: u16 = 2;
    /// It comes from the service: each direction has wires, slots and stages of a relay of its own.
    pub const TO_CLIENT: u16 = 4;
}

/// How many packets can be on their way to the delay line, or back from it, at once.
pub const HOLDS: u32 = 1 << 16;
/// How many packets wait for the delay line at most; its device has room for a few more. Further ones pass.
pub const WAITING_MAX: u64 = 1 << 14;

/// What the programs and the delay line tell each other; indexes of the entries of the map `LINE`.
pub mod line {
    /// Past this `CLOCK_MONOTONIC` time packets pass. The delay line pushes it forward while it runs, and takes it back to 0
    /// when it takes no more.
    pub const ALIVE_UNTIL: u32 = 0;
    /// How many tickets the programs have given out.
    pub const ISSUED: u32 = 1;
    /// How many of these the delay line has seen.
    pub const TAKEN: u32 = 2;
    /// How many entries there are.
    pub const ENTRIES: u32 = 3;
}

/// How many interfaces the delay line can send packets on at, each in both directions.
pub const PLACES: u32 = 1 << 12;

/// A packet of one rule, by which a decision is found again.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct DecisionKey {
    /// The rule's [`RuleEntry::uid`].
    pub rule: u32,
    /// The connection's ordinal among those of the rule, from 1.
    pub connection: u32,
    /// The packet's ordinal among those of its connection and direction that passed the filters, from 1.
    pub seen: u32,
    /// 0 to the server, 1 to the client.
    pub direction: u16,
    /// See [`crate::packet::Packet::fragment`].
    pub fragment: u16,
}

/// A decision that fired.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Event {
    /// `CLOCK_MONOTONIC` time.
    pub time_ns: u64,
    /// The packet's ordinal in its connection and direction, from 1.
    pub packet: u64,
    /// The rule's [`RuleEntry::uid`].
    pub rule: u32,
    /// The connection's ordinal among those of the rule, from 1.
    pub connection: u32,
    /// See [`DecisionKey::seen`].
    pub seen: u32,
    /// Bytes on the wire.
    pub bytes: u32,
    /// Wire packets.
    pub segments: u16,
    /// 0 to the server, 1 to the client.
    pub direction: u8,
    /// What was done: see [`action`].
    pub action: u8,
    /// See [`crate::packet::Packet::fragment`].
    pub fragment: u16,
    /// Always zero.
    pub padding: u16,
}

/// What a program did with a packet that reached a rule's port. Only told where the programs' constant `TRACE` is 1; nothing
/// is decided by it. What a [`step`] does not set is left over from an earlier one.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Trace {
    /// Time since the rule set's epoch, by which windows were judged.
    pub since_ns: u64,
    /// The packet's ordinal by which its rule decided, from 1; 0 when the rule did not pick it. With [`step::FORESEEN`]: of the
    /// last wire packet.
    pub packet: u64,
    /// [`RuleState::packets`] after it was judged.
    pub rule_packets: u64,
    /// How long its rule holds it.
    pub delay_ns: u64,
    /// The cgroups of its sender and its receiver, as in [`Flow::scopes`].
    pub scopes: [u64; 2],
    /// Its source address.
    pub source: crate::flow::Address,
    /// Its destination address.
    pub destination: crate::flow::Address,
    /// [`RuleEntry::uid`] of the rule that judged it; 0 for none.
    pub rule: u32,
    /// The connection's ordinal among those of the rule, from 1.
    pub connection: u32,
    /// See [`DecisionKey::seen`]; 0 when the rule's filters or window did not let it through. With [`step::FORESEEN`]: how many
    /// wire packets they let through.
    pub seen: u32,
    /// Packets of the connection and direction that passed the rule's filters outside its windows.
    pub outside: u32,
    /// [`FlowRule::memory`] after it was judged.
    pub memory: u32,
    /// Bytes of the largest wire packet in it, IP header included.
    pub size: u32,
    /// Bytes behind the transport header.
    pub payload: u32,
    /// Wire packets in it.
    pub segments: u32,
    /// Indexes of the rules that it matches.
    pub matches: [u16; MATCHES_MAX],
    /// How many of these there are.
    pub match_count: u16,
    /// 1 when there are more.
    pub overflow: u16,
    /// See [`crate::packet::Packet::source_port`].
    pub source_port: u16,
    /// See [`crate::packet::Packet::destination_port`].
    pub destination_port: u16,
    /// See [`crate::packet::Packet::fragment`].
    pub fragment: u16,
    /// See [`crate::packet::Packet::query_type`].
    pub query_type: u16,
    /// IP protocol number.
    pub protocol: u8,
    /// Bits of [`crate::packet::kind`].
    pub kinds: u8,
    /// See [`crate::packet::Packet::tcp_flags`].
    pub tcp_flags: u8,
    /// See [`crate::packet::Packet::icmp_type`].
    pub icmp_type: u8,
    /// See [`crate::packet::Packet::ecn`].
    pub ecn: u8,
    /// Bits of [`trace_flag`].
    pub flags: u8,
    /// Its [`direction`] to the rule that judged it; before any did, the one by who began the connection.
    pub direction: u8,
    /// What the rule did: see [`action`]; 0 for nothing.
    pub action: u8,
    /// What this is about: see [`step`].
    pub step: u8,
    /// The [`Counter`] of [`step::PASSED`].
    pub counter: u8,
    /// Always zero.
    pub padding: [u8; 2],
}

/// Values of [`Trace::step`].
pub mod step {
    /// The packet reached a rule's port, and matches the rules that are listed.
    pub const LISTED: u8 = 1;
    /// A rule judged it.
    pub const JUDGED: u8 = 2;
    /// A rule judged the wire packets of a super-packet ahead, and none of them is hit.
    pub const FORESEEN: u8 = 3;
    /// It goes the other way than all rules for its ports.
    pub const OTHER_WAY: u8 = 4;
    /// None of its sockets belongs to a cgroup that the rules are limited to.
    pub const NOBODY: u8 = 5;
    /// It passed for a reason that is counted: see [`super::Trace::counter`].
    pub const PASSED: u8 = 6;
    /// The same, and its headers were not read.
    pub const UNREAD: u8 = 7;
}

/// Bits of [`Trace::flags`].
pub mod trace_flag {
    /// See [`crate::packet::Packet::has_transport`].
    pub const TRANSPORT: u8 = 1;
    /// See [`crate::packet::Packet::is_fragment`].
    pub const FRAGMENT: u8 = 2;
    /// See [`crate::packet::Packet::follows`].
    pub const FOLLOWS: u8 = 4;
    /// See [`crate::matching::Connection::is_certain`].
    pub const CERTAIN: u8 = 8;
}

/// Why a program let a packet pass; indexes of the counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Counter {
    /// Not IP.
    NotIp = 0,
    /// Headers cut off.
    Truncated,
    /// Header fields that contradict each other.
    Malformed,
    /// Too many IPv6 extension headers.
    Headers,
    /// IPv6 neighbour discovery, never touched.
    Discovery,
    /// A later fragment whose first one is not known: no rule with a port can be asked about it. Or one for which it is
    /// not known what a rule made of the first one: the rule counts it as a packet of its own.
    Fragment,
    /// The lease had run out.
    LeaseExpired,
    /// A map lookup that can't fail did.
    Internal,
    /// The connection table could not take the connection.
    FlowTableFull,
    /// The table of what rules beyond the first [`FLOW_SLOTS`] remember of connections could not take an entry.
    FlowRuleTableFull,
    /// A reply, reset or rewrite that the kernel refused.
    ActionFailed,
    /// An event for which the ring buffer had no room.
    EventLost,
    /// A packet that was not held because the delay line did not run.
    NotHeld,
    /// A packet that has been judged at another hook, or that is a duplicate or an answer of ours.
    Own,
    /// A packet that several sockets are given, which a rule for one of them would have done more than lose.
    Group,
    /// No packet: a connection was entered into the table.
    FlowEntered,
    /// No packet: a rule's entry beside a connection was made.
    FlowRuleEntered,
    /// Another CPU held the connection's ordinal for longer than a program can wait, or took packet ordinals that were
    /// to be given back.
    Contended,
    /// No packet: an address of a name for which there was no room.
    LearnedFull,
    /// A DNS message that could not be read in full.
    Unread,
    /// A connection to a DNS server over TCP, whose messages are not read.
    DnsOverTcp,
    /// An answer to an ICMP echo request of the command whose request is forgotten: see `ECHOES` of the programs.
    EchoForgotten,
    /// No packet: a [`Trace`] for which the ring buffer had no room.
    TraceLost,
    /// A super-packet that was treated as one packet, because nothing came back from the device that divides them.
    Undivided,
    /// No packet, and counted by the daemon: a connection was removed from the table though its end had not been seen,
    /// because there were too many.
    Forgotten,
}

/// How many [`Counter`]s there are.
pub const COUNTERS: u32 = Counter::Forgotten as u32 + 1;

const _: () = {
    assert!(size_of::<RuleEntry>() == 168);
    assert!(size_of::<SetHeader>() == 48);
    assert!(size_of::<Known>() == NAMES_MAX);
    assert!(size_of::<PortClasses>() == 8);
    assert!(size_of::<ScopeKey>() == 16);
    assert!(size_of::<Control>() == 24);
    assert!(size_of::<FlowRule>() == 40);
    assert!(size_of::<FlowRuleKey>() == 24);
    assert!(size_of::<Owner>() == 16);
    assert!(size_of::<Flow>() == 56 + 40 * FLOW_SLOTS);
    assert!(size_of::<Datagram>() == 24);
    assert!(size_of::<Followed>() == 24);
    assert!(size_of::<RuleState>() == 24);
    assert!(size_of::<RuleStats>() == 48);
    assert!(2 * RULES_MAX <= 1 << STATE_BITS);
    assert!(size_of::<Event>() == 40);
    assert!(size_of::<Trace>() == 152);
    assert!(size_of::<Hold>() == 56);
    assert!(size_of::<Steer>() == 24);
    assert!(size_of::<Prompt>() == 40);
    assert!(size_of::<Original>() == 28);
    assert!(size_of::<HandshakeEvent>() == 120);
    assert!(size_of::<Destination>() == 20);
    assert!(size_of::<Watched>() == 32);
    assert!(size_of::<Witness>() == 32);
    assert!(size_of::<Endpoint>() == 32);
};

#[cfg(feature = "user")]
mod pod {
    use super::{
        Control, DecisionKey, Destination, Endpoint, Event, Flow, FlowRule, FlowRuleKey, Handshake,
        Hold, Known, Original, Owner, PortClasses, Prompt, Release, RuleEntry, RuleState,
        RuleStats, ScopeKey, SetHeader, Steer, Trace,
    };
    use crate::flow::FlowKey;

    macro_rules! pod {
        ($($kind:ty),* $(,)?) => {$(
            // SAFETY: it is `repr(C)`, without implicit padding (the sizes are asserted), and any bit pattern is a value.
            unsafe impl aya::Pod for $kind {}
        )*};
    }

    pod!(
        RuleEntry,
        Known,
        SetHeader,
        PortClasses,
        ScopeKey,
        Control,
        FlowRule,
        FlowRuleKey,
        Hold,
        Release,
        Steer,
        Destination,
        Endpoint,
        Handshake,
        Original,
        Prompt,
        DecisionKey,
        Event,
        Trace,
        Flow,
        Owner,
        RuleState,
        RuleStats,
        FlowKey
    );
}

#[cfg(test)]
mod tests {
    use super::{Destination, Prompt};

    #[test]
    fn a_prompt_server_admits_so_many_clients_for_so_long() {
        let at = |port: u32| Destination {
            port,
            ..Destination::default()
        };
        let prompt = Prompt {
            server: at(80),
            until_ns: 100,
            limit: 3,
            ..Prompt::default()
        };
        assert!(prompt.admits(&at(80), 2, 99));
        assert!(!prompt.admits(&at(81), 2, 99), "another server");
        assert!(!prompt.admits(&at(80), 3, 99), "its queue has no room");
        assert!(!prompt.admits(&at(80), 2, 100), "nobody has looked again");
        assert!(!Prompt::default().admits(&Destination::default(), 0, 0));
    }
}
