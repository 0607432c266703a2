//! `cargo run -p ffi-tests -- build DIR`: builds every C and C++ program into DIR and prints their
//! paths, one a line, for tools that want to run them their own way (valgrind).

use std::path::Path;
use std::process::ExitCode;

use ffi_tests::{Flavor, build, compiler, sources};

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [verb, dir] = args.as_slice() else {
        eprintln!("usage: ffi-tests build DIR");
        return ExitCode::FAILURE;
    };
    if verb != "build" {
        eprintln!("usage: ffi-tests build DIR");
        return ExitCode::FAILURE;
    }
    let dir = Path::new(dir);
    std::fs::create_dir_all(dir).expect("DIR must be writable");
    for (ext, cpp, flavors) in [("c", false, Flavor::C), ("cpp", true, Flavor::CPP)] {
        if compiler(cpp).is_none() {
            eprintln!("skipped: no compiler for .{ext}");
            continue;
        }
        for source in sources(ext) {
            for flavor in flavors {
                println!("{}", build(&source, flavor, dir).expect("a compiler").display());
            }
        }
    }
    ExitCode::SUCCESS
}
