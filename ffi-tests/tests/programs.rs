//! Builds and runs every program of `c` and `cpp`, against the shared and the static library. A
//! program that exits with 0 has passed; its checks print what failed.

use std::path::Path;
use std::process::Command;

use ffi_tests::{Flavor, build, compiler, sources};

fn run_all(ext: &str, flavors: [Flavor; 2]) {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(ext);
    std::fs::create_dir_all(&dir).unwrap();
    let mut failed = 0;
    for source in sources(ext) {
        for flavor in flavors {
            let program = build(&source, flavor, &dir).expect("a compiler");
            let name = program.file_name().unwrap().display();
            let output = Command::new(&program).output().unwrap();
            if output.status.success() {
                println!("passed: {name}");
            } else {
                let said = String::from_utf8_lossy(&output.stderr);
                println!("FAILED: {name} ({})\n{said}", output.status);
                failed += 1;
            }
        }
    }
    assert_eq!(failed, 0, "programs that failed");
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
