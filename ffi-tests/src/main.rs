//! `cargo run -p ffi-tests -- build DIR`: builds every C and C++ program into DIR and prints their
//! paths, one a line, for tools that want to run them their own way (valgrind).

use std::path::Path;
use std::process::ExitCode;

use ffi_tests::{Flavor, HERE, build, compiler, sources, sources_in};

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
    let wrapper = sources_in(&Path::new(HERE).join("../bindings/cpp/tests"), "cpp");
    let all = [
        (sources("c"), &Flavor::C[..]),
        (sources("cpp"), &Flavor::CPP),
        (wrapper, &Flavor::WRAPPER[..1]),
    ];
    for (sources, flavors) in all {
        if compiler(sources[0].extension().is_some_and(|ext| ext == "cpp")).is_none() {
            eprintln!("skipped: no compiler for {}", sources[0].display());
            continue;
        }
        for source in sources {
            for &flavor in flavors {
                println!("{}", build(&source, flavor, dir).expect("a compiler").display());
            }
        }
    }
    ExitCode::SUCCESS
}
