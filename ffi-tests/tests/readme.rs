//! The C program of README.md compiles without warnings against both libraries and runs, and the
//! commands beside it do what they say.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use ffi_tests::{Flavor, HERE, build, libraries, run};

/// The first block of `language` after `heading` in README.md.
fn block(heading: &str, language: &str) -> String {
    let text = fs::read_to_string(Path::new(HERE).parent().unwrap().join("README.md")).unwrap();
    let (_, part) = text.split_once(heading).expect("the heading");
    let (_, code) = part.split_once(&format!("```{language}\n")).expect("the block");
    code.split_once("```").expect("the end of the block").0.to_string()
}

/// An empty directory with the program in it.
fn directory(name: &str) -> PathBuf {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let _ = fs::remove_dir_all(&dir);
    fs::create_dir_all(&dir).unwrap();
    fs::write(dir.join("serve.c"), block("## From C", "c")).unwrap();
    dir
}

fn expect_output(output: &Output) {
    assert_eq!(String::from_utf8_lossy(&output.stdout), "0 tokens cached, status 0\n");
}

#[test]
fn its_c_program_runs_against_both_libraries() {
    let dir = directory("readme-program");
    for flavor in Flavor::C {
        let program = build(&dir.join("serve.c"), flavor, &dir).expect("a C compiler is needed");
        expect_output(&run(&mut Command::new(program)));
    }
}

#[cfg(unix)]
#[test]
fn its_commands_build_and_run_the_program() {
    let dir = directory("readme-commands");
    fs::create_dir_all(dir.join("target/release")).unwrap();
    fs::copy(libraries().join("libkvcache.so"), dir.join("target/release/libkvcache.so")).unwrap();
    let include = Path::new(HERE).parent().unwrap().join("include");
    std::os::unix::fs::symlink(include, dir.join("include")).unwrap();
    let commands = block("## From C", "sh");
    // The libraries are there already, built as the running profile says.
    let commands = commands.strip_prefix("cargo build --release\n").expect("the build first");
    let output = run(Command::new("sh").args(["-e", "-c", commands]).current_dir(&dir));
    expect_output(&output);
}
