//! The C program of README.md compiles and runs, as C99 against the shared library and as C11
//! against the static one.

use std::path::Path;
use std::process::Command;

use ffi_tests::{Flavor, HERE, build, run};

#[test]
fn the_c_program_of_the_readme_runs() {
    let readme = Path::new(HERE).parent().unwrap().join("README.md");
    let text = std::fs::read_to_string(readme).unwrap();
    let (_, rest) = text.split_once("\n```c\n").expect("README.md has a C program");
    let (program, _) = rest.split_once("\n```").expect("the block is closed");
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("readme");
    std::fs::create_dir_all(&dir).unwrap();
    let source = dir.join("readme.c");
    std::fs::write(&source, format!("{program}\n")).unwrap();
    for flavor in Flavor::C {
        run(&mut Command::new(build(&source, flavor, &dir).expect("a C compiler")));
    }
}
