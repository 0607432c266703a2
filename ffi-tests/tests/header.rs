//! The header and the libraries as artifacts: standards, symbols, SONAME, link line, drift.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

use ffi_tests::{HERE, NATIVE_STATIC_LIBS, cargo, compiler, libraries, run, soname, takes};

/// Held by whoever reads the libraries or has cargo write them: tests run side by side.
static LIBRARIES: Mutex<()> = Mutex::new(());

fn repository() -> &'static Path {
    Path::new(HERE).parent().unwrap()
}

fn header() -> String {
    std::fs::read_to_string(repository().join("include/kvcache.h")).unwrap()
}

/// Names of the functions that the header declares.
fn declared() -> BTreeSet<String> {
    let code: String = header()
        .lines()
        .filter(|line| !line.trim_start().starts_with(['/', '#']))
        .flat_map(|line| [line, " "])
        .collect();
    code.split(';')
        .filter(|item| !item.contains("typedef"))
        .filter_map(|item| item.split_once('('))
        .filter_map(|(before, _)| before.split([' ', '*']).rfind(|word| !word.is_empty()))
        .filter(|name| name.starts_with("kvc_"))
        .map(str::to_string)
        .collect()
}

/// The committed list: symbol and the version that brought it.
fn committed() -> BTreeMap<String, String> {
    let text = std::fs::read_to_string(Path::new(HERE).join("symbols.txt")).unwrap();
    text.lines()
        .filter(|line| !line.starts_with('#'))
        .map(|line| line.split_once(' ').expect("symbol, space, version"))
        .map(|(name, since)| (name.to_string(), since.trim().to_string()))
        .collect()
}

#[test]
fn every_standard_takes_the_header() {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let all = [
        (false, &["c99", "c11", "c17", "c2x"][..]),
        (true, &["c++11", "c++14", "c++17", "c++20", "c++23"]),
    ];
    for (cpp, standards) in all {
        let ext = if cpp { "cpp" } else { "c" };
        let source = dir.join(format!("only_the_header.{ext}"));
        std::fs::write(&source, "#include \"kvcache.h\"\n#include \"kvcache.h\"\n").unwrap();
        for standard in standards {
            let Some(mut compile) = compiler(cpp) else {
                assert!(cpp, "a C compiler is needed");
                println!("skipped: no C++ compiler for {standard}");
                continue;
            };
            if !takes(cpp, standard) {
                println!("skipped: the compiler has no {standard}");
                continue;
            }
            compile.arg(format!("-std={standard}")).args(["-Wconversion", "-Wundef"]);
            run(compile.arg("-fsyntax-only").arg(&source));
        }
    }
}

#[test]
fn the_symbols_are_those_of_the_list_and_of_the_header() {
    let _alone = LIBRARIES.lock();
    let output = run(Command::new("nm")
        .args(["-D", "--defined-only", "--format=just-symbols"])
        .arg(libraries().join("libkvcache.so")));
    let exported: BTreeSet<String> =
        String::from_utf8(output.stdout).unwrap().lines().map(str::to_string).collect();
    let committed: BTreeSet<String> = committed().into_keys().collect();
    assert_eq!(exported, committed, "exported (left) against ffi-tests/symbols.txt (right)");
    assert_eq!(declared(), committed, "declared (left) against ffi-tests/symbols.txt (right)");
}

#[test]
fn the_static_library_has_every_symbol() {
    let _alone = LIBRARIES.lock();
    let output = run(Command::new("nm")
        .args(["--defined-only", "--extern-only", "--format=just-symbols"])
        .arg(libraries().join("libkvcache.a")));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let defined: BTreeSet<&str> = text.lines().collect();
    for name in committed().keys() {
        assert!(defined.contains(name.as_str()), "{name} is not in libkvcache.a");
    }
}

#[test]
fn the_soname_is_that_of_the_abi() {
    let _alone = LIBRARIES.lock();
    let mut parts = env!("CARGO_PKG_VERSION").split('.');
    let (major, minor) = (parts.next().unwrap(), parts.next().unwrap());
    let version = if major == "0" { format!("0.{minor}") } else { major.to_string() };
    let name = soname(&libraries().join("libkvcache.so"));
    assert_eq!(name, format!("libkvcache.so.{version}"));
}

#[test]
fn the_installed_version_is_that_of_the_package() {
    let read = |name: &str| {
        let path = repository().join("bindings/c/install").join(name);
        std::fs::read_to_string(path).unwrap()
    };
    let line = format!("set(PACKAGE_VERSION \"{}\")", env!("CARGO_PKG_VERSION"));
    assert!(read("kvcacheConfigVersion.cmake").contains(&line), "{line}");
    // The same system libraries as everywhere, in CMake's form.
    let native = NATIVE_STATIC_LIBS.replace("-l", "").replace(' ', ";");
    assert!(read("kvcacheConfig.cmake").contains(&format!("\"{native}\"")), "{native}");
}

#[test]
fn the_documented_link_line_is_what_the_compiler_says() {
    let _alone = LIBRARIES.lock();
    let mut rustc = cargo("rustc");
    rustc.args(["-p", "kvcache-c", "--crate-type", "staticlib"]);
    let output = run(rustc.args(["--", "--print", "native-static-libs"]));
    let text = String::from_utf8(output.stderr).unwrap();
    let line = text.lines().find_map(|line| line.split_once("native-static-libs: "));
    let printed: BTreeSet<&str> = line.expect("a link line").1.split_whitespace().collect();
    assert_eq!(printed, NATIVE_STATIC_LIBS.split(' ').collect());
    for file in ["README.md", "bindings/c/README.md"] {
        let text = std::fs::read_to_string(repository().join(file)).unwrap();
        assert!(text.contains(NATIVE_STATIC_LIBS), "{file} must give {NATIVE_STATIC_LIBS}");
    }
}

#[test]
fn every_function_says_which_threads_may_call_it() {
    let (mut comment, mut functions) = (String::new(), 0);
    for line in header().lines() {
        if line.starts_with("//") {
            comment.push_str(line);
            comment.push('\n');
            continue;
        }
        // A declaration starts in the first column and is no typedef, brace or preprocessor line.
        let starts = line.starts_with(|c: char| c.is_ascii_lowercase()) && line.contains("kvc_");
        let starts = starts && !line.starts_with("typedef");
        if starts && line.contains('(') {
            let said = comment.contains("// Threads: thread-safe")
                || comment.contains("// Threads: per-handle")
                || comment.contains("// Threads: init-only");
            assert!(said, "{line}");
            functions += 1;
        }
        comment.clear();
    }
    assert_eq!(functions, committed().len());
}

/// Needs cbindgen built, which takes longer than all other tests: run with `-- --ignored`.
#[test]
#[ignore = "builds cbindgen"]
fn the_committed_header_is_the_generated_one() {
    let fresh: PathBuf = Path::new(env!("CARGO_TARGET_TMPDIR")).join("generated.h");
    let _ = std::fs::remove_file(&fresh);
    let mut check = cargo("check");
    check.args(["-p", "libkvcache", "--features", "generate-header"]);
    run(check.env("KVCACHE_HEADER_OUT", &fresh));
    let fresh = std::fs::read_to_string(&fresh).unwrap();
    assert!(
        fresh == header(),
        "include/kvcache.h is not what src/capi says: cargo check --features generate-header"
    );
}
