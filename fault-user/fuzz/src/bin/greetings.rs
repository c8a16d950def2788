//! What clients ask for in their first bytes, by TLS or by HTTP: whatever the bytes, and however many have come.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| fault_user::relay::fuzz_greeting(data));
