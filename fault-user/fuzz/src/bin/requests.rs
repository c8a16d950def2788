//! What the relay reads of requests, of answers and of greetings: whatever the bytes, and however they are cut.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| fault_user::relay::fuzz(data));
