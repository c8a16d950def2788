//! The maps and constants that the programs share with the daemon. Sizes given here are defaults: the
//! loader sets them for the rules at hand.

use core::ffi::c_void;

use aya_ebpf::Global;
use aya_ebpf::bindings::bpf_map_type::BPF_MAP_TYPE_SK_STORAGE;
use aya_ebpf::bindings::{BPF_F_CLONE, BPF_F_MMAPABLE, BPF_F_NO_PREALLOC};
use aya_ebpf::btf_maps;
use aya_ebpf::macros::{btf_map, map};
use aya_ebpf::maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, RingBuf, SockMap};
use fault_common::abi::{
    CORRUPT_BITS_MAX, COUNTERS, Control, Counter, DATAGRAMS as DATAGRAMS_MAX, Datagram,
    DecisionKey, Destination, ENDPOINTS_MAX, Endpoint, FOLLOWED as FOLLOWED_MAX, Flow, FlowRule,
    FlowRuleKey, Followed, Handshake, Hold, Known, MATCHES_MAX, NAMED_WORDS, NAMES_MAX, Original,
    Owner, PLACES, PortClasses, Prompt, Release, RuleEntry, RuleState, RuleStats, STEERS, ScopeKey,
    SetHeader, Steer, Trace, Watched, protocol,
};
use fault_common::decide::Verdict;
use fault_common::delay::{TABLE_ENTRIES, distribution};
use fault_common::dns::{Message, NameKey};
use fault_common::flow::{Address, FlowKey, Told};
use fault_common::fragment::{DatagramKey, FollowedKey};
use fault_common::matching::{Connection, Matches, Ports, Query};
use fault_common::packet::{PROTOCOL_TCP, Packet};
use fault_common::random::Ordinals;

/// Words of a rule vector.
#[unsafe(no_mangle)]
pub static WORDS: Global<u32> = Global::new(1);
/// Classes of one rule set.
#[unsafe(no_mangle)]
pub static CLASSES: Global<u32> = Global::new(64);
/// 1 where a TCX link holds the program, 0 for a netlink filter: they differ in how a packet is
/// stolen without its sender being told.
#[unsafe(no_mangle)]
pub static TCX: Global<u32> = Global::new(1);

/// What rules may do: a bit for each value of [`fault_common::abi::action`]. The verifier leaves out what
/// is not needed.
#[unsafe(no_mangle)]
pub static ACTIONS: Global<u32> = Global::new(u32::MAX);
/// The faults that rules have: a bit for each value of [`fault_common::abi::fault`].
#[unsafe(no_mangle)]
pub static FAULTS: Global<u32> = Global::new(u32::MAX);
/// What they have beside: bits of [`fault_common::abi::modifier`].
#[unsafe(no_mangle)]
pub static MODIFIERS: Global<u32> = Global::new(u32::MAX);
/// The protocols that rules concern: bits of [`protocol`]. Packets of others end at their ports.
#[unsafe(no_mangle)]
pub static PROTOCOLS: Global<u32> = Global::new(u32::MAX);
/// The most bits that a rule flips in one packet.
#[unsafe(no_mangle)]
pub static CORRUPT_BITS: Global<u32> = Global::new(CORRUPT_BITS_MAX);
/// How many rules can match one packet; `MATCHES_MAX` and 1 stands for more than that. With few rules the
/// verifier has less to look at.
#[unsafe(no_mangle)]
pub static MATCHES: Global<u32> = Global::new(MATCHES_MAX as u32 + 1);
/// How many names rules are aimed at, at most [`NAMES_MAX`].
#[unsafe(no_mangle)]
pub static NAME_COUNT: Global<u32> = Global::new(NAMES_MAX as u32);
/// 1 when decisions are repeated instead of made.
#[unsafe(no_mangle)]
pub static REPLAY: Global<u32> = Global::new(0);
/// The mark of the relay's own sockets.
#[unsafe(no_mangle)]
pub static RELAY_MARK: Global<u32> = Global::new(0xfa17);
/// Cookie of the network namespace that the relay is in, or that is watched; 0 for any.
#[unsafe(no_mangle)]
pub static NETNS: Global<u64> = Global::new(0);
/// 1 when only connections to servers of the cgroup are given to the relay.
#[unsafe(no_mangle)]
pub static OWN_SERVERS: Global<u32> = Global::new(0);
/// Upper bound of the services in [`STEER_TABLE`]. The verifier walks the loop over them no farther.
#[unsafe(no_mangle)]
pub static SERVICES: Global<u32> = Global::new(STEERS);
/// Index of the delay line's tap device.
#[unsafe(no_mangle)]
pub static TAP: Global<u32> = Global::new(0);
/// What holds packets: see [`fault_common::abi::holder`].
#[unsafe(no_mangle)]
pub static HOLDER: Global<u32> = Global::new(0);
/// Index of the device into which packets go that a qdisc holds on their way in.
#[unsafe(no_mangle)]
pub static DETOUR: Global<u32> = Global::new(0);
/// 1 where the kernel tells departure times from times of arrival (Linux 5.18).
#[unsafe(no_mangle)]
pub static STAMPS: Global<u32> = Global::new(0);
/// The bit of this instance among those of the network namespace that judge a packet; 0 judges every packet again.
#[unsafe(no_mangle)]
pub static INSTANCE: Global<u64> = Global::new(1);
/// 1 to 255: tells the marks of this network namespace's instances from those of others'.
#[unsafe(no_mangle)]
pub static NETNS_MARK: Global<u32> = Global::new(1);
/// The same in 32 bits.
#[unsafe(no_mangle)]
pub static NETNS_TAG: Global<u32> = Global::new(1);
/// The ports of Docker's DNS server in this network namespace: see [`fault_common::dns::DockerPorts::packed`].
#[unsafe(no_mangle)]
pub static DOCKER_PORTS: Global<u32> = Global::new(0);
/// 1 when the XDP program may have judged what arrives.
#[unsafe(no_mangle)]
pub static XDP: Global<u32> = Global::new(0);
/// Which time is read: see [`fault_common::abi::clock`].
#[unsafe(no_mangle)]
pub static CLOCK: Global<u32> = Global::new(0);
/// 1 when the verifier can be shown that a super-packet's wire packets are judged ahead; older ones do not see in time that
/// the ways through it come together again.
#[unsafe(no_mangle)]
pub static FORESEES: Global<u32> = Global::new(0);
/// 1 where programs can ask whether there is a device (Linux 5.12).
#[unsafe(no_mangle)]
pub static ASKS_DEVICE: Global<u32> = Global::new(0);
/// 1 where the kernel has MPTCP and programs can get from a subflow to its connection (Linux 5.19).
#[unsafe(no_mangle)]
pub static MPTCP: Global<u32> = Global::new(0);
/// 1 when rules may be limited to cgroups.
#[unsafe(no_mangle)]
pub static SCOPED: Global<u32> = Global::new(1);

/// 1 when the programs tell in [`TRACES`] what they do with each packet that reaches a rule's port.
#[unsafe(no_mangle)]
pub static TRACE: Global<u32> = Global::new(0);

/// A map that the kernel keeps with each socket and copies to the sockets that a listener accepts.
/// aya's own type lacks the flag for that, hence this definition by BTF, in libbpf's form.
#[repr(C)]
pub struct SocketStorage<T: 'static> {
    r#type: *const [i32; BPF_MAP_TYPE_SK_STORAGE as usize],
    key: *const i32,
    value: *const T,
    max_entries: *const [i32; 0],
    map_flags: *const [i32; (BPF_F_NO_PREALLOC | BPF_F_CLONE) as usize],
}

// SAFETY: nothing is ever read through these pointers; only their types matter.
unsafe impl<T> Sync for SocketStorage<T> {}

impl<T> SocketStorage<T> {
    /// Only its type says what the map is like.
    const NEW: Self = Self {
        r#type: core::ptr::null(),
        key: core::ptr::null(),
        value: core::ptr::null(),
        max_entries: core::ptr::null(),
        map_flags: core::ptr::null(),
    };

    /// What the storage helpers take as the map.
    #[inline(always)]
    pub fn as_ptr(&self) -> *mut c_void {
        core::ptr::from_ref(self).cast_mut().cast()
    }
}

/// Whose a socket is.
#[unsafe(link_section = ".maps")]
#[unsafe(no_mangle)]
pub static SOCKET_SCOPES: SocketStorage<Owner> = SocketStorage::NEW;

/// Lease and generation; one entry.
#[map]
pub static CONTROL: Array<Control> = Array::with_max_entries(1, BPF_F_MMAPABLE);
/// The headers of the two generations.
#[map]
pub static SETS: Array<SetHeader> = Array::with_max_entries(2, 0);
/// Rules: generation x capacity.
#[map]
pub static RULES: Array<RuleEntry> = Array::with_max_entries(128, BPF_F_MMAPABLE);
/// Classes of ports: generation x 65536.
#[map]
pub static PORTS: Array<PortClasses> = Array::with_max_entries(2 << 16, BPF_F_MMAPABLE);
/// Ports that rules give by themselves: generation x [`NAMED_WORDS`].
#[map]
pub static NAMED: Array<u64> = Array::with_max_entries(2 * NAMED_WORDS, BPF_F_MMAPABLE);
/// Summaries: generation x classes.
#[map]
pub static SUMMARIES: Array<u64> = Array::with_max_entries(128, BPF_F_MMAPABLE);
/// Vectors: generation x classes x words.
#[map]
pub static VECTORS: Array<u64> = Array::with_max_entries(128, BPF_F_MMAPABLE);
/// Classes of hosts: generation (4 bytes), then the IPv6 or mapped address.
#[map]
pub static HOSTS: LpmTrie<HostKey, u32> = LpmTrie::with_max_entries(1, BPF_F_NO_PREALLOC);
/// Which names a name is one of, as bits: see [`fault_common::dns::key_of`].
#[map]
pub static NAMES: LpmTrie<NameKey, u64> = LpmTrie::with_max_entries(1, BPF_F_NO_PREALLOC);
/// Classes of names: generation x [`NAMES_MAX`], 16 bits for each value of [`fault_common::matching::about`].
#[map]
pub static NAME_CLASSES: Array<u32> = Array::with_max_entries(2 * NAMES_MAX as u32, 0);
/// A map of the addresses of names.
type NameAddresses = btf_maps::HashMap<Address, Known, 1, { BPF_F_NO_PREALLOC as usize }>;

/// The addresses of names. Defined by BTF as in [`STEER_LEARNED`]: from Linux 5.15 to 6.1 a map with it and one without
/// are not of the same kind.
#[btf_map]
pub static LEARNED: NameAddresses = NameAddresses::new();
/// How often each name was looked up.
#[map]
pub static LOOKUPS: PerCpuArray<u64> = PerCpuArray::with_max_entries(NAMES_MAX as u32, 0);
/// The DNS message at hand, a query until it is judged; one entry for each CPU.
#[map]
pub static MESSAGE: PerCpuArray<Message> = PerCpuArray::with_max_entries(1, 0);
/// Room for an entry of [`LEARNED`] that is to be made; one for each CPU.
#[map]
pub static FRESH: PerCpuArray<Known> = PerCpuArray::with_max_entries(1, 0);
/// Classes of scopes.
#[map]
pub static SCOPES: HashMap<ScopeKey, u32> = HashMap::with_max_entries(16, 0);
/// What is remembered of connections. The kernel forgets none by itself: the daemon removes entries.
#[map]
pub static FLOWS: HashMap<FlowKey, Flow> = HashMap::with_max_entries(1, BPF_F_NO_PREALLOC);
/// What rules remember of connections whose entry has no slot for them.
#[map]
pub static FLOW_RULES: HashMap<FlowRuleKey, FlowRule> =
    HashMap::with_max_entries(1, BPF_F_NO_PREALLOC);
/// See [`Flow::touched`]; the daemon writes it.
#[map]
pub static ROUND: Array<u32> = Array::with_max_entries(1, 0);
/// How many connections have begun.
#[map]
pub static BIRTHS: Array<u64> = Array::with_max_entries(1, 0);
/// Whose the ICMP echo requests are that have been sent, for their answers.
#[map]
pub static ECHOES: LruHashMap<Echo, Owner> = LruHashMap::with_max_entries(1, 0);
/// What is remembered of datagrams that come in fragments.
#[map]
pub static DATAGRAMS: LruHashMap<DatagramKey, Datagram> =
    LruHashMap::with_max_entries(DATAGRAMS_MAX, 0);
/// What rules made of these.
#[map]
pub static FOLLOWED: LruHashMap<FollowedKey, Followed> =
    LruHashMap::with_max_entries(FOLLOWED_MAX, 0);
/// What rules remember of all connections.
#[map]
pub static RULE_STATES: Array<RuleState> = Array::with_max_entries(64, 0);
/// What rules saw and did.
#[map]
pub static RULE_STATS: PerCpuArray<RuleStats> = PerCpuArray::with_max_entries(64, 0);
/// Why packets passed.
#[map]
pub static COUNTS: PerCpuArray<u64> = PerCpuArray::with_max_entries(COUNTERS, 0);
/// Decisions that fired.
#[map]
pub static EVENTS: RingBuf = RingBuf::with_byte_size(1 << 20, 0);
/// What was done with packets; the loader makes it larger where [`TRACE`] is 1.
#[map]
pub static TRACES: RingBuf = RingBuf::with_byte_size(1 << 12, 0);
/// Room for what does not fit the stack; one entry for each CPU.
#[map]
pub static SCRATCH: PerCpuArray<Scratch> = PerCpuArray::with_max_entries(1, 0);

/// The tables of distributions: see [`fault_common::delay::table_index`].
#[map]
pub static SPREADS: Array<i64> =
    Array::with_max_entries(distribution::TABLES * TABLE_ENTRIES, BPF_F_MMAPABLE);
/// What the delay line is told about packets on their way to it, by their ticket.
#[map]
pub static HOLDS: Array<Hold> = Array::with_max_entries(fault_common::abi::HOLDS, BPF_F_MMAPABLE);
/// Until when the delay line takes packets, and how many it has been sent: see [`fault_common::abi::line`].
#[map]
pub static LINE: Array<u64> =
    Array::with_max_entries(fault_common::abi::line::ENTRIES, BPF_F_MMAPABLE);
/// Places where packets go on that have been held, by their number: twice the interface's index, and 1 for its ingress.
#[map]
pub static RELEASES: Array<u64> = Array::with_max_entries(PLACES, BPF_F_MMAPABLE);
/// What the delay line tells about packets on their way back from it, by their ticket.
#[map]
pub static RELEASED: Array<Release> =
    Array::with_max_entries(fault_common::abi::HOLDS, BPF_F_MMAPABLE);

/// The interfaces where packets can be held, each with the entry of [`RELEASES`] by which those that it receives go on.
#[map]
pub static WAYS: HashMap<u32, u32> = HashMap::with_max_entries(1, 0);
/// The bridges of interfaces that are ports, by index.
#[map]
pub static BRIDGE_PORTS: HashMap<u32, u32> = HashMap::with_max_entries(1, BPF_F_NO_PREALLOC);
/// When the packet departs that is on its way to an fq qdisc, on this CPU.
#[map]
pub static DEPARTURE: PerCpuArray<u64> = PerCpuArray::with_max_entries(1, 0);
/// When the last packet departs of those that must keep their order, by [`Verdict::flow`]. The daemon removes those that have departed.
#[map]
pub static ORDERS: HashMap<u64, u64> = HashMap::with_max_entries(1, BPF_F_NO_PREALLOC);
/// The classes of a prio qdisc in which netem holds packets, by delay in nanoseconds.
#[map]
pub static LEAVES: HashMap<u64, u32> = HashMap::with_max_entries(fault_common::abi::LEAVES, 0);

/// Ports whose connections may be redirected to the relay, or are watched: a bit for each entry of [`STEER_TABLE`].
#[map]
pub static STEER_PORTS: Array<u64> = Array::with_max_entries(1 << 16, BPF_F_MMAPABLE);
/// Over which protocols, and where to.
#[map]
pub static STEER_TABLE: Array<Steer> = Array::with_max_entries(STEERS, BPF_F_MMAPABLE);
/// Hosts concerned, by entry of [`STEER_TABLE`].
#[map]
pub static STEER_HOSTS: LpmTrie<HostKey, u32> = LpmTrie::with_max_entries(1, BPF_F_NO_PREALLOC);
/// The addresses of names that another loaded object learns: its [`LEARNED`], if there is one.
#[btf_map]
pub static STEER_LEARNED: btf_maps::ArrayOfMaps<NameAddresses, 1> = btf_maps::ArrayOfMaps::new();
/// The relay's listeners for what comes from outside: for each entry of [`STEER_TABLE`] one of IPv4 and one of IPv6.
#[map]
pub static LISTENERS: SockMap = SockMap::with_max_entries(2 * STEERS, 0);
/// Where servers of the cgroup listen, and how many sockets.
#[map]
pub static SERVED: HashMap<Destination, u64> = HashMap::with_max_entries(1, BPF_F_NO_PREALLOC);
/// Ports from which the relay is connecting to such servers: how many sockets. Behind them the ports that it listens at
/// over IPv4: one more than the place in [`LISTENERS`].
#[map]
pub static RELAY_PORTS: Array<u64> = Array::with_max_entries(2 << 16, BPF_F_MMAPABLE);
/// What redirected connections were meant for, with the client's socket.
#[unsafe(link_section = ".maps")]
#[unsafe(no_mangle)]
pub static ORIGINALS: SocketStorage<Original> = SocketStorage::NEW;
/// The same while they are being opened, and until the relay has accepted them.
#[map]
pub static HANDSHAKES: LruHashMap<Handshake, Original> = LruHashMap::with_max_entries(1, 0);
/// For each entry of [`STEER_TABLE`] the server that answers at once, if there is one.
#[map]
pub static PROMPTS: Array<Prompt> = Array::with_max_entries(STEERS, BPF_F_MMAPABLE);
/// How many clients of each entry have been admitted at once.
#[map]
pub static ADMITTED: Array<u64> = Array::with_max_entries(STEERS, BPF_F_MMAPABLE);
/// SYNs that are held, and clients that have given up.
#[map]
pub static HANDSHAKE_EVENTS: RingBuf = RingBuf::with_byte_size(1 << 20, 0);

/// Connections that are watched, by the cookie of their socket.
#[map]
pub static WATCHED: HashMap<u64, Watched> = HashMap::with_max_entries(1, BPF_F_NO_PREALLOC);
/// What is seen of them.
#[map]
pub static WITNESSES: RingBuf = RingBuf::with_byte_size(1 << 20, 0);

/// How often processes connected to, sent to or bound what; told when a rule never matched.
#[map]
pub static ENDPOINTS: HashMap<Endpoint, u64> = HashMap::with_max_entries(ENDPOINTS_MAX, 0);
/// How often they did so with endpoints for which that had no room.
#[map]
pub static ENDPOINTS_LEFT_OUT: Array<u64> = Array::with_max_entries(1, 0);
/// How often they connected to a Unix socket; counted by a program that the loader makes.
#[map]
pub static UNIX_CONNECTS: Array<u64> = Array::with_max_entries(1, 0);

/// Decisions to be repeated, each with the ordinal of the packet by which it was made.
#[map]
pub static DECISIONS: HashMap<DecisionKey, u64> = HashMap::with_max_entries(1, 0);

/// Key of [`HOSTS`].
#[repr(C)]
#[derive(Clone, Copy)]
pub struct HostKey {
    pub generation: u32,
    pub address: [u32; 4],
}

/// Key of [`ECHOES`].
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Echo {
    /// Between whom, with the identifier as both ports.
    pub flow: FlowKey,
    /// Sequence number.
    pub sequence: u32,
}

/// See [`SCRATCH`]. Results go from one step to the next through here rather than in registers: what
/// comes from a map is one unknown value to the verifier, so the paths of a step do not multiply with
/// those of the next. A program can't be interrupted by another one on its CPU, except by the clones
/// that it sends itself: those are let pass before anything is written here, or they are the parts of a
/// super-packet, whose sender keeps nothing here.
#[repr(C)]
pub struct Scratch {
    /// The packet at hand.
    pub packet: Packet,
    /// Its connection.
    pub key: FlowKey,
    /// From which [`Side`](fault_common::flow::Side) of it the packet comes.
    pub side: u32,
    /// Whether its source and destination port are named by rules, and whether a socket listens at its sender's and at its
    /// receiver's end: answers on the way to `service`.
    pub hints: [u8; 4],
    /// Whether the service is the high end of its connection, and whether that is certain.
    pub service: [u8; 2],
    /// Whose its sockets are, as far as they have been asked.
    pub told: Told,
    /// Its matching rules.
    pub matches: Matches,
    /// A connection to be entered into [`FLOWS`].
    pub flow: Flow,
    /// Under what the rule at hand has an entry in [`FLOW_RULES`].
    pub apart: FlowRuleKey,
    /// Such an entry, to be made.
    pub entry: FlowRule,
    /// What is known of the datagram that it is a fragment of, where it is one.
    pub datagram: Datagram,
    /// The name of what the rule at hand makes of that datagram.
    pub followed_key: FollowedKey,
    /// What it makes of it, or of a whole packet.
    pub followed: Followed,
    /// How many rules have judged the fragment.
    pub rules: u32,
    /// What its rules decided.
    pub verdict: Verdict,
    /// When, where and how large it is.
    pub sight: Sight,
    /// The classes of its ports.
    pub ports: Ports,
    /// What its connection adds to them.
    pub connection: Connection,
    /// All its classes.
    pub query: Query,
    /// The slot of the connection's entry in which the rule at hand remembers it.
    pub slot: u32,
    /// How many of the packet's rules have fired.
    pub hits: u32,
    /// The faults that have not been carried out yet: a bit for each value of [`fault_common::abi::fault`].
    pub undone: u32,
    /// The first of them.
    pub hit_rules: [u16; MATCHES_MAX],
    /// What the rule at hand did: see [`fault_common::abi::action`]; 0 for nothing.
    pub fired: u32,
    /// See [`fault_common::abi::DecisionKey::seen`].
    pub seen: u32,
    /// The ordinals by which it did.
    pub ordinals: Ordinals,
    /// What the packet's rules remember of its connection, copied to judge ahead: see `split`.
    pub foreseen: [FlowRule; MATCHES_MAX],
    /// The slots of the connection's entry that these are copies of.
    pub foreseen_slots: [u32; MATCHES_MAX],
    /// How many packets of the direction had been counted there.
    pub foreseen_packets: [u64; MATCHES_MAX],
    /// How many rules' packet ordinals have been taken.
    pub taken: u32,
    /// How many super-packets this processor has wanted to divide since a part of one came back: see `split`.
    pub undivided: u32,
    /// Where the transport checksum of the packet is; 0 where there is none.
    pub checksum_offset: u32,
    /// What is told about the packet where [`TRACE`] is 1.
    pub trace: Trace,
}

/// What is known of a packet before any rule is asked.
#[repr(C)]
pub struct Sight {
    /// `CLOCK_MONOTONIC` time.
    pub now_ns: u64,
    /// Time since the rule set's epoch.
    pub since_ns: u64,
    /// Wire packets in it.
    pub segments: u32,
    /// Bytes of the largest of them, IP header included.
    pub size: u32,
    /// Bytes on the wire.
    pub bytes: u32,
    /// Which rule set is active.
    pub generation: u32,
}

/// Whether rules concern a protocol, one of [`protocol`].
#[inline(always)]
pub fn concerns(protocol: u32) -> bool {
    PROTOCOLS.load() & protocol != 0
}

/// Whether a packet that rules concern is TCP.
#[inline(always)]
pub fn is_tcp(packet: &Packet) -> bool {
    PROTOCOLS.load() == protocol::TCP || packet.protocol == PROTOCOL_TCP
}

/// Counts one packet that passes for a reason worth telling.
#[inline(always)]
pub fn count(counter: Counter) {
    if let Some(cell) = COUNTS.get_ptr_mut(counter as u32) {
        // SAFETY: the pointer is to this CPU's own entry of the map.
        unsafe { *cell += 1 };
    }
}
