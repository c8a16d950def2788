//! The packet parser: whatever the bytes, it neither panics nor reads past the packet's end.
#![no_main]

use fault_common::packet::parse;
use libfuzzer_sys::fuzz_target;

// The first two bytes are the EtherType, so that every one is tried; the rest is the packet.
fuzz_target!(|input: &[u8]| {
    let Some((ethertype, bytes)) = input.split_first_chunk() else {
        return;
    };
    let Ok(length) = u32::try_from(bytes.len()) else {
        return;
    };
    if let Ok(packet) = parse(&bytes, u16::from_be_bytes(*ethertype), 0, length) {
        let offsets = [
            packet.network_offset,
            packet.transport_offset,
            packet.payload_offset,
            packet.end,
            length,
        ];
        assert!(offsets.is_sorted(), "{packet:?} in {length} bytes");
    }
});
