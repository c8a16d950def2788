//! The reader of DNS messages: whatever the bytes, it neither panics nor reads past the message's end, and goes on from
//! record to record.
#![no_main]

use fault_common::dns::{ANSWERS_MAX, Message};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|datagram: &[u8]| {
    let mut message = Message::EMPTY;
    message.fill(datagram);
    let Some(head) = message.head() else {
        return;
    };
    let end = name_end(&mut message, Message::QUESTION);
    let mut at = message.after_question(end);
    for _ in 0..u32::from(head.answers).min(ANSWERS_MAX) {
        if at == 0 {
            return;
        }
        let end = name_end(&mut message, at);
        let Some(record) = message.record(end).filter(|_| end != 0) else {
            return;
        };
        assert!(end < record.next && record.next <= message.length);
        at = record.next;
    }
});

/// Where the name at `at` ends, 0 where it is malformed.
fn name_end(message: &mut Message, at: u32) -> u32 {
    let end = message.read_name(at);
    assert!(end == 0 || (at < end && end <= message.length));
    let key = message.key();
    // Behind the bits that count, nothing is left of an earlier name.
    let (bits, name) = key.split_at(4);
    assert_eq!(bits, 2048_u32.to_ne_bytes());
    assert!(!name.iter().any(u8::is_ascii_uppercase));
    assert_eq!(name.last(), Some(&0));
    end
}
