//! The C++ wrapper, `bindings/cpp/kvcache.hpp`: its tests in every standard that it is for, and
//! nothing of the C header missing in it.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use ffi_tests::{
    Flavor, HERE, NATIVE_STATIC_LIBS, build, compiler, libraries, run, sources_in, takes,
};

fn repository() -> &'static Path {
    Path::new(HERE).parent().unwrap()
}

/// The words of C or C++ code, without comments.
fn words(code: &str) -> BTreeSet<&str> {
    code.lines()
        .map(|line| line.split_once("//").map_or(line, |(code, _)| code))
        .flat_map(|line| line.split(|c: char| !c.is_ascii_alphanumeric() && c != '_'))
        .filter(|word| !word.is_empty())
        .collect()
}

/// What of the header's text, its functions, handles and constants, the wrapper does not name.
fn missing(symbols: &str, header: &str, wrapper: &str) -> Vec<String> {
    let named = words(wrapper);
    let functions = symbols.lines().filter(|line| !line.starts_with('#'));
    let functions = functions.map(|line| line.split(' ').next().unwrap());
    let constants = header.lines().filter_map(|line| line.strip_prefix("#define KVC_"));
    let constants = constants.map(|line| format!("KVC_{}", line.split(' ').next().unwrap()));
    let types = header.lines().filter_map(|line| line.strip_prefix("typedef struct kvc_"));
    let types = types.map(|line| format!("kvc_{}", line.split(' ').next().unwrap()));
    let structs = header.lines().filter_map(|line| line.strip_prefix("} kvc_"));
    let structs = structs.map(|line| format!("kvc_{}", line.trim_end_matches(';')));
    functions
        .map(String::from)
        .chain(constants)
        .chain(types)
        .chain(structs)
        .filter(|name| !named.contains(name.as_str()))
        .collect()
}

#[test]
fn nothing_of_the_header_is_missing() {
    let read = |path: &str| fs::read_to_string(repository().join(path)).unwrap();
    let (symbols, header) = (read("ffi-tests/symbols.txt"), read("include/kvcache.h"));
    let wrapper = read("bindings/cpp/kvcache.hpp");
    assert_eq!(missing(&symbols, &header, &wrapper), [""; 0]);

    // What is taken out is found missing, and a comment does not stand in for it.
    for name in ["kvc_pool_refs", "KVC_FORMAT_KT4V2", "kvc_prefix_hit", "kvc_events"] {
        let symbols = format!("{symbols}{name}x 0.1\n");
        let wrapper = format!("{wrapper}\n// {name}x\n");
        assert_eq!(missing(&symbols, &header, &wrapper), [format!("{name}x")]);
    }
    assert_eq!(
        missing("", "#define KVC_NEW 1\ntypedef struct kvc_x kvc_x;\n} kvc_y;\n", &wrapper),
        ["KVC_NEW", "kvc_x", "kvc_y"]
    );
}

#[test]
fn its_tests_pass_in_every_standard() {
    if compiler(true).is_none() {
        println!("skipped: no C++ compiler");
        return;
    }
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("wrapper");
    fs::create_dir_all(&dir).unwrap();
    for source in sources_in(&repository().join("bindings/cpp/tests"), "cpp") {
        for flavor in Flavor::WRAPPER {
            if takes(true, flavor.standard) {
                run(&mut Command::new(build(&source, flavor, &dir).unwrap()));
            } else {
                println!("skipped: the C++ compiler has no {}", flavor.standard);
            }
        }
    }
}

/// Both ways to report errors in one program, whose names must not meet when it is linked.
#[test]
fn both_ways_to_report_errors_fit_one_program() {
    if compiler(true).is_none() {
        println!("skipped: no C++ compiler");
        return;
    }
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("wrapper-both");
    fs::create_dir_all(&dir).unwrap();
    let throwing = "#define KVCACHE_EXCEPTIONS 1\n#include \"kvcache.hpp\"\n\
        bool throws() { try { (void)kvcache::pool::create(0); } \
        catch (const kvcache::error &e) { return e.code() == -1; } return false; }\n";
    let returning = "#include \"kvcache.hpp\"\nbool throws();\n\
        int main() { return !(throws() && kvcache::pool::create(0).error().code() == -1); }\n";
    fs::write(dir.join("throwing.cpp"), throwing).unwrap();
    fs::write(dir.join("returning.cpp"), returning).unwrap();
    let program = dir.join("both");
    let mut compile = compiler(true).unwrap();
    compile.args(["-std=c++17", "-o"]).arg(&program);
    compile.args([dir.join("throwing.cpp"), dir.join("returning.cpp")]);
    compile.arg(libraries().join("libkvcache.a")).args(NATIVE_STATIC_LIBS.split(' '));
    run(&mut compile);
    run(&mut Command::new(program));
}
