//! Builds and runs every program of `c` and `cpp`, against the shared and the static library. A
//! program that exits with 0 has passed; its checks print what failed.

use std::path::Path;
use std::process::Command;

use ffi_tests::{Flavor, build, compiler, run, sources};

fn run_all(ext: &str, flavors: [Flavor; 2]) {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(ext);
    std::fs::create_dir_all(&dir).unwrap();
    for source in sources(ext) {
        for flavor in flavors {
            let program = build(&source, flavor, &dir).expect("a compiler");
            run(&mut Command::new(&program));
            println!("passed: {}", program.file_name().unwrap().display());
        }
    }
}

#[test]
fn c_programs() {
    assert!(compiler(false).is_some(), "a C compiler is needed");
    run_all("c", Flavor::C);
}

#[test]
fn cpp_programs() {
    if compiler(true).is_none() {
        println!("skipped: no C++ compiler");
        return;
    }
    run_all("cpp", Flavor::CPP);
}
