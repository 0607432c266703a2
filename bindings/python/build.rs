//! Hands include/kvcache.h to maturin in the subset that cffi's `cdef` parses: declarations and
//! integer constants, without includes, guards and comments. maturin looks for `header.h` in the
//! target folder after it has run cargo, and makes the Python declarations from it, so a function
//! that is added to the header is in the wheel without anything written by hand.

use std::path::{Path, PathBuf};
use std::{env, fs};

fn main() {
    let header = Path::new("../../include/kvcache.h");
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed={}", header.display());
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    // target[/TRIPLE]/PROFILE/build/PACKAGE/out
    let mut target = out.ancestors().nth(4).expect("OUT_DIR is inside a target folder");
    if target.file_name() == env::var_os("TARGET").as_deref() {
        target = target.parent().expect("a triple's folder is inside a target folder");
    }
    let to = target.join("header.h");
    println!("cargo::rerun-if-changed={}", to.display());
    let text = fs::read_to_string(header).expect("include/kvcache.h");
    let text = declarations(&text);
    // Only where it differs: a file newer than this run would have the next build run it again.
    if fs::read_to_string(&to).is_ok_and(|old| old == text) {
        return;
    }
    fs::write(&to, text).unwrap_or_else(|e| panic!("{}: {e}", to.display()));
}

fn declarations(header: &str) -> String {
    let mut out = String::new();
    let mut cplusplus = false;
    for line in header.lines() {
        match line {
            "#ifdef __cplusplus" => cplusplus = true,
            "#endif" if cplusplus => cplusplus = false,
            _ if cplusplus => {}
            // A constant has a name and a value; the guard has only a name.
            _ if line.starts_with("#define ") && line.split(' ').count() == 3 => {
                out.extend([line, "\n"]);
            }
            _ if line.starts_with('#') || line.trim_start().starts_with("//") => {}
            _ if line.trim().is_empty() => {}
            _ => out.extend([line, "\n"]),
        }
    }
    out
}
