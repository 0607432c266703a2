//! Programs of the past against the library of today: `snapshots/VERSION` has sources and the header
//! as they were, the header from when it was smallest. What ran then runs now.
//!
//! A snapshot is never edited. A release whose ABI is another one begins a folder of its own.

use std::fs;
use std::path::Path;
use std::process::Command;

use ffi_tests::{Flavor, HERE, build, run, sources_in};

#[test]
fn programs_of_older_headers_run() {
    let mut parts = env!("CARGO_PKG_VERSION").split('.');
    let version = format!("{}.{}", parts.next().unwrap(), parts.next().unwrap());
    let snapshot = Path::new(HERE).join("snapshots").join(version);
    let today = fs::read_to_string(Path::new(HERE).join("../include/kvcache.h")).unwrap();
    let then = fs::read_to_string(snapshot.join("kvcache.h")).unwrap();
    assert!(then.lines().count() < today.lines().count(), "the snapshot is an older header");
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("snapshots");
    fs::create_dir_all(&dir).unwrap();
    for source in sources_in(&snapshot, "c") {
        // The header beside the source is found before today's.
        for flavor in Flavor::C {
            run(&mut Command::new(build(&source, flavor, &dir).expect("a C compiler")));
        }
    }
}
