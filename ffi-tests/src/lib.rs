//! Builds the C libraries as a user would get them, and programs against them.
//!
//! The libraries are built by cargo into the target directory and profile of the running test, so
//! that they are fresh and share its compiled crates. Programs are built by the C and C++
//! compilers that the `cc` crate finds. This file knows no test.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;
use std::{env, fs};

/// The package's directory: `c`, `cpp` and the committed lists.
pub const HERE: &str = env!("CARGO_MANIFEST_DIR");
/// The target the tests run on.
pub const TARGET: &str = env!("FFI_TARGET");

/// System libraries that a program needs beside `libkvcache.a`: what
/// `cargo rustc -- --print native-static-libs` says, and what the documentation tells users.
pub const NATIVE_STATIC_LIBS: &str = "-lgcc_s -lutil -lrt -lpthread -lm -ldl -lc";

/// How a program is compiled and against what it is linked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Flavor {
    /// The language standard, as `-std=` takes it.
    pub standard: &'static str,
    /// Against `libkvcache.a`, else `libkvcache.so`.
    pub linked_static: bool,
}

impl Flavor {
    /// Each C program is compiled as C99 and as C11, and linked both ways.
    pub const C: [Flavor; 2] = [
        Flavor { standard: "c99", linked_static: false },
        Flavor { standard: "c11", linked_static: true },
    ];
    /// The C++ wrapper's tests, in each standard that it is for.
    pub const WRAPPER: [Flavor; 3] = [
        Flavor { standard: "c++17", linked_static: false },
        Flavor { standard: "c++20", linked_static: true },
        Flavor { standard: "c++23", linked_static: false },
    ];
    /// The C++ programs, both ways.
    pub const CPP: [Flavor; 2] = [
        Flavor { standard: "c++17", linked_static: false },
        Flavor { standard: "c++17", linked_static: true },
    ];
}

/// The sources with the extension `ext` in `c` or `cpp`, sorted by name.
pub fn sources(ext: &str) -> Vec<PathBuf> {
    sources_in(&Path::new(HERE).join(ext), ext)
}

/// The sources with the extension `ext` in `dir`, sorted by name.
pub fn sources_in(dir: &Path, ext: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).expect("the directory of the sources");
    let mut sources: Vec<_> = entries
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|e| e == ext))
        .collect();
    sources.sort();
    assert!(!sources.is_empty(), "no sources in {}", dir.display());
    sources
}

/// Where cargo put the running program: `target[/triple]/profile`.
fn profile_dir() -> PathBuf {
    let exe = env::current_exe().expect("the path of this program");
    let dir = exe.parent().unwrap();
    if dir.ends_with("deps") { dir.parent().unwrap().to_path_buf() } else { dir.to_path_buf() }
}

/// A cargo command on the C library with this program's profile, target and target directory.
pub fn cargo(subcommand: &str) -> Command {
    let profile_dir = profile_dir();
    let mut target_dir = profile_dir.parent().unwrap();
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(Path::new(HERE).parent().unwrap()).arg(subcommand);
    if target_dir.ends_with(TARGET) {
        target_dir = target_dir.parent().unwrap();
        cargo.args(["--target", TARGET]);
    }
    let profile = match profile_dir.file_name().unwrap().to_str().unwrap() {
        "debug" => "dev",
        name => name,
    };
    cargo.args(["--profile", profile, "--target-dir"]).arg(target_dir);
    cargo
}

/// The directory with fresh `libkvcache.so` and `libkvcache.a`; builds them once a process.
pub fn libraries() -> &'static Path {
    static DIR: OnceLock<PathBuf> = OnceLock::new();
    DIR.get_or_init(|| {
        let mut build = cargo("build");
        if cfg!(feature = "emulate") {
            build.args(["--features", "emulate"]);
        }
        run(build.args(["-p", "kvcache-c"]));
        let dir = profile_dir();
        for name in ["libkvcache.so", "libkvcache.a"] {
            assert!(dir.join(name).exists(), "cargo build -p kvcache-c made no {name}");
        }
        dir
    })
}

/// The compiler of C or C++ with warnings as errors and the header's directory, or `None` where
/// there is none.
pub fn compiler(cpp: bool) -> Option<Command> {
    let mut build = cc::Build::new();
    build.target(TARGET).host(env!("FFI_HOST")).opt_level(1).cpp(cpp).no_default_flags(true);
    let tool = build.cargo_metadata(false).try_get_compiler().ok()?;
    let works = Command::new(tool.path()).arg("--version").output();
    works.is_ok_and(|output| output.status.success()).then(|| {
        let mut command = Command::new(tool.path());
        command.args(["-O1", "-g", "-Wall", "-Wextra", "-Wpedantic", "-Werror"]);
        let repository = Path::new(HERE).parent().unwrap();
        command.arg("-I").arg(repository.join("include"));
        if cpp {
            command.arg("-I").arg(repository.join("bindings/cpp"));
        }
        command
    })
}

/// Whether the compiler knows a standard; one from before it refuses its name.
pub fn takes(cpp: bool, standard: &str) -> bool {
    let Some(mut command) = compiler(cpp) else { return false };
    // Not compiled: an empty program is an error of its own in C.
    command.args(["-E", "-x", if cpp { "c++" } else { "c" }]);
    let output = command.arg(format!("-std={standard}")).arg("/dev/null").output();
    output.is_ok_and(|output| output.status.success())
}

/// Builds `source` into `dir`. Returns the program's path, or `None` without a compiler.
pub fn build(source: &Path, flavor: Flavor, dir: &Path) -> Option<PathBuf> {
    let cpp = source.extension().is_some_and(|e| e == "cpp");
    let libraries = libraries();
    let mut command = compiler(cpp)?;
    let stem = source.file_stem().unwrap().to_str().unwrap();
    let kind = if flavor.linked_static { "a" } else { "so" };
    let program = dir.join(format!("{stem}-{}-{kind}", flavor.standard.replace('+', "p")));
    command.arg(format!("-std={}", flavor.standard)).arg(source).arg("-o").arg(&program);
    if flavor.linked_static {
        command.arg(libraries.join("libkvcache.a"));
        if cfg!(feature = "emulate") {
            // The emulator is C++.
            command.arg("-lstdc++");
        }
        command.args(NATIVE_STATIC_LIBS.split(' '));
    } else {
        // The program looks for its SONAME, which only an installed library has as a file name.
        let soname = dir.join(soname(&libraries.join("libkvcache.so")));
        let _ = fs::remove_file(&soname);
        fs::copy(libraries.join("libkvcache.so"), &soname).unwrap();
        command.arg(&soname).arg("-lm").arg("-pthread");
        command.arg(format!("-Wl,-rpath,{}", dir.canonicalize().unwrap().display()));
    }
    run(&mut command);
    Some(program)
}

/// The SONAME of a shared library, as `readelf` sees it.
pub fn soname(library: &Path) -> String {
    let output = run(Command::new("readelf").arg("-d").arg(library));
    let text = String::from_utf8(output.stdout).unwrap();
    let line = text.lines().find(|line| line.contains("(SONAME)")).expect("a SONAME");
    line.split(['[', ']']).nth(1).unwrap().to_string()
}

/// Runs a command and panics with all it said where it fails.
pub fn run(command: &mut Command) -> Output {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(
        output.status.success(),
        "{command:?}: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    output
}
