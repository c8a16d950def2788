//! Reads DNS: learns the addresses of names from responses, before these are delivered, and makes responses of queries.

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::maps::lpm_trie::Key;
use fault_common::abi::{Counter, Known, MATCHES_MAX, NAMES_MAX};
use fault_common::dns::{
    ANSWERS_MAX, Head, MESSAGE_BYTES, Message, NameKey, PORT, Reply, STEPS_MAX, Step,
};
use fault_common::flow::Address;
use fault_common::packet::{PROTOCOL_TCP, PROTOCOL_UDP, Packet, TCP_ACK, TCP_SYN};

use crate::classify;
use crate::maps::{FRESH, LEARNED, LOOKUPS, MESSAGE, NAME_COUNT, NAMES, SCRATCH, count};
use crate::skb::Any;

const BPF_NOEXIST: u64 = 1;

/// Reads the response in the packet at hand. A global function: see `classify::fault_collect`.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn fault_learn(skb: *mut __sk_buff) -> u32 {
    let Some(message) = message() else {
        // The verifier looks at global functions also where nobody calls them.
        return 0;
    };
    if is_over_tcp() {
        return 0;
    }
    // SAFETY: see `message`.
    let steps = match load(Any::of(skb), unsafe { &mut *message }) {
        // One for the question, and one for each answer.
        Some(head) if head.is_response() => 1 + u32::from(head.answers),
        Some(_) => return 0,
        None => {
            count(Counter::Unread);
            return 0;
        }
    };
    let end = fault_name(Message::QUESTION);
    // SAFETY: as above; a fresh reference, since the function above writes through another one.
    let (mut at, names) = unsafe { ((*message).after_question(end), (*message).names) };
    if end == 0 {
        at = 0;
    }
    note_lookups(names);
    // SAFETY: as above.
    if names != 0 && unsafe { (*message).is_truncated() } {
        // The rest is asked for over TCP.
        count(Counter::Unread);
    }
    for step in 1..=ANSWERS_MAX {
        if at == 0 {
            count(Counter::Unread);
            break;
        }
        if step >= steps {
            break;
        }
        at = fault_answer(at);
    }
    0
}

/// The message at hand. No reference to it lives across a call of a global function, as with `Scratch`.
#[inline(always)]
pub fn message() -> Option<*mut Message> {
    if NAME_COUNT.load() == 0 {
        return None;
    }
    MESSAGE.get_ptr_mut(0)
}

/// Whether the packet at hand is of TCP. Counts its connection when the server accepts it.
#[inline(always)]
fn is_over_tcp() -> bool {
    let Some(scratch) = SCRATCH.get_ptr_mut(0) else {
        return false;
    };
    // SAFETY: see `Scratch`; nothing is written.
    let packet = unsafe { &(*scratch).packet };
    if packet.protocol != PROTOCOL_TCP {
        return false;
    }
    if packet.tcp_flags & (TCP_SYN | TCP_ACK) == TCP_SYN | TCP_ACK {
        count(Counter::DnsOverTcp);
    }
    true
}

/// Whether a packet may be a query to a server of DNS.
#[inline(always)]
pub fn may_ask(packet: &Packet) -> bool {
    packet.protocol == PROTOCOL_UDP && packet.has_transport && packet.destination_port == PORT
}

/// Notes in the scratch what the query in the packet at hand asks for. A global function: see `classify::fault_collect`.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn fault_read_query(skb: *mut __sk_buff) -> u32 {
    let (Some(message), Some(scratch)) = (message(), SCRATCH.get_ptr_mut(0)) else {
        return 0;
    };
    // SAFETY: see `message`.
    match load(Any::of(skb), unsafe { &mut *message }) {
        Some(head) if head.is_query() => {}
        Some(_) => return 0,
        None => {
            count(Counter::Unread);
            return 0;
        }
    }
    let end = fault_name(Message::QUESTION);
    // SAFETY: as above, and see `Scratch`; the caller holds no reference to it meanwhile.
    let (message, scratch) = unsafe { (&mut *message, &mut *scratch) };
    let end = if end == 0 {
        0
    } else {
        message.after_question(end)
    };
    if end == 0 {
        count(Counter::Unread);
        return 0;
    }
    message.question_end = end;
    scratch.packet.query_type = message.question_type(end);
    scratch.connection.questions = message.names;
    1
}

/// Makes a response of the query at hand, as the rule says that fired last. Gives its length; 0 when there is no such
/// rule. A global function: see `classify::fault_collect`.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn fault_respond() -> u32 {
    let (Some(message), Some(scratch)) = (message(), SCRATCH.get_ptr_mut(0)) else {
        return 0;
    };
    // SAFETY: see `Scratch`; nothing is written.
    let scratch = unsafe { &*scratch };
    let last = scratch.hits.wrapping_sub(1) as usize % MATCHES_MAX;
    let Some((rule, ..)) = classify::rule_at(scratch, scratch.hit_rules[last]) else {
        return 0;
    };
    // SAFETY: see `message`.
    let message = unsafe { &mut *message };
    message.answer(message.question_end, &Reply::of(&rule.arguments))
}

/// Takes the message out of the packet at hand. Gives its head, nothing when it can't be read.
#[inline(always)]
fn load(skb: Any, message: &mut Message) -> Option<Head> {
    let scratch = SCRATCH.get_ptr_mut(0)?;
    // SAFETY: see `Scratch`; nothing is written.
    let packet = unsafe { &(*scratch).packet };
    let length = packet.payload_length();
    if length == 0 || !packet.has_transport {
        return None;
    }
    let most = if length > MESSAGE_BYTES as u32 {
        MESSAGE_BYTES as u32
    } else {
        length
    };
    // The same again in a form that the verifier sees through: 1 to MESSAGE_BYTES.
    let bytes = ((most - 1) & (MESSAGE_BYTES as u32 - 1)) + 1;
    // SAFETY: there is room for as many.
    unsafe { skb.load_raw(packet.payload_offset, message.bytes.as_mut_ptr(), bytes) }.ok()?;
    message.length = bytes;
    message.names = 0;
    message.head()
}

/// Reads the name at `at` of the message at hand, and adds the names of rules that it is one of. Gives where it ends, 0
/// when it is malformed. A global function, which the verifier looks at once and not for each name.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn fault_name(at: u32) -> u32 {
    let Some(message) = message() else {
        return 0;
    };
    // SAFETY: see `message`.
    unsafe { (*message).begin_name(at) };
    for _ in 0..STEPS_MAX {
        let step = fault_step();
        if step == Step::Malformed as u32 {
            return 0;
        }
        if step == Step::End as u32 {
            // SAFETY: as above; a fresh reference behind the call.
            return find_names(unsafe { &mut *message });
        }
    }
    0
}

/// Takes a step through the name at hand. Gives a [`Step`]. A global function: see [`fault_name`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn fault_step() -> u32 {
    match message() {
        // SAFETY: see `message`.
        Some(message) => unsafe { (*message).step() as u32 },
        None => Step::Malformed as u32,
    }
}

/// Adds the names of rules that the name at hand is one of. Gives where it ends.
#[inline(always)]
fn find_names(message: &mut Message) -> u32 {
    let key = core::ptr::from_ref(message.key()).cast::<Key<NameKey>>();
    // SAFETY: it is what a key is: the number of bits, then the bytes, at any address.
    if let Some(names) = NAMES.get(unsafe { &*key }) {
        message.names |= *names;
    }
    message.end()
}

/// Reads an answer of the message at hand, and learns its address. Gives where the next one begins, 0 when it is
/// malformed. A global function: see [`fault_name`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn fault_answer(at: u32) -> u32 {
    let Some(message) = message() else {
        return 0;
    };
    // SAFETY: see `message`; a fresh reference behind the call.
    let end = if unsafe { (*message).is_question(at) } {
        at + 2
    } else {
        fault_name(at)
    };
    // SAFETY: as above.
    let message = unsafe { &*message };
    if end == 0 {
        return 0;
    }
    let Some(record) = message.record(end) else {
        return 0;
    };
    if let Some(address) = record.address
        && message.names != 0
    {
        learn(&address, message.names);
    }
    record.next
}

/// Adds names to those that an address is known by.
#[inline(always)]
fn learn(address: &Address, names: u64) {
    if let Some(known) = LEARNED.get_ptr_mut(address) {
        return add(known, names);
    }
    let Some(fresh) = FRESH.get_ptr_mut(0) else {
        return;
    };
    for word in 0..NAMES_MAX / 8 {
        // SAFETY: this CPU's own entry, of that many aligned words. Volatile: see `classify::judge_rules`.
        unsafe { core::ptr::write_volatile(fresh.cast::<u64>().add(word), 0) };
    }
    add(fresh, names);
    // SAFETY: as above.
    if LEARNED
        .insert(address, unsafe { &*fresh }, BPF_NOEXIST)
        .is_ok()
    {
        return;
    }
    // Another CPU has been faster, or there is no room.
    match LEARNED.get_ptr_mut(address) {
        Some(known) => add(known, names),
        None => count(Counter::LearnedFull),
    }
}

#[inline(always)]
fn add(known: *mut Known, names: u64) {
    for name in 0..NAMES_MAX {
        if name >= NAME_COUNT.load() as usize {
            return;
        }
        if names >> name & 1 != 0 {
            // SAFETY: map values live until the program ends; whoever else writes to this byte writes the same.
            unsafe { (*known).names[name] = 1 };
        }
    }
}

/// Notes that names have been looked up.
#[inline(always)]
fn note_lookups(names: u64) {
    for name in 0..NAMES_MAX as u32 {
        if name >= NAME_COUNT.load() {
            return;
        }
        if names >> name & 1 != 0
            && let Some(lookups) = LOOKUPS.get_ptr_mut(name)
        {
            // SAFETY: the pointer is to this CPU's own entry of the map.
            unsafe { *lookups += 1 };
        }
    }
}
