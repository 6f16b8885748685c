//! What the fuzzers of contrib/fuzz found worth keeping, as ordinary tests: it must end, and not panic.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]
#![allow(clippy::indexing_slicing, clippy::string_slice, reason = "a test fails by panicking")]

#[path = "../contrib/fuzz/targets.rs"]
mod targets;

use std::fs;
use std::path::Path;

#[test]
fn nothing_in_the_corpus_does_harm() {
    for (name, target) in targets::TARGETS {
        let directory =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("contrib/fuzz/corpus").join(name);
        let mut files: Vec<_> = fs::read_dir(&directory).unwrap().flatten().collect();
        files.sort_by_key(fs::DirEntry::file_name);
        assert!(!files.is_empty(), "{name} has no corpus");
        for file in files {
            eprintln!("{name}: {:?}", file.file_name());
            target(&fs::read(file.path()).unwrap());
        }
    }
}

/// Every fuzzer is a target, and the other way round.
#[test]
fn each_target_has_a_fuzzer() {
    let manifest = include_str!("../contrib/fuzz/Cargo.toml");
    let mut fuzzers: Vec<&str> =
        manifest.lines().filter_map(|line| line.strip_prefix("path = \"fuzz_targets/")).collect();
    fuzzers.sort_unstable();
    let mut targets = targets::TARGETS.map(|(name, _)| format!("{name}.rs\""));
    targets.sort_unstable();
    assert_eq!(fuzzers, targets);
}
