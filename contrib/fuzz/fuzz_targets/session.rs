#![no_main]

#[allow(dead_code, reason = "each fuzzer is of one target")]
#[path = "../targets.rs"]
mod targets;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| targets::session(bytes));
