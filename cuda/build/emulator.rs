//! Compiles every kernel with the host's C++ compiler, together with the emulator that runs them.
//! A source is compiled again only when it, a header that it includes or an option changes.
//!
//! `KVCACHE_EMU_SANITIZE=1` builds them with AddressSanitizer and UndefinedBehaviorSanitizer; the
//! test programs then want the sanitizer's library loaded first (scripts/emulator.sh does it).

use std::collections::BTreeMap;
use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::{env, fs};

use super::sources::{in_parallel, read_all};

/// Compiles `cuda` into a static library that the crate links.
pub fn build(cuda: &Path) {
    println!("cargo::rerun-if-changed={}", cuda.display());
    println!("cargo::rerun-if-env-changed=KVCACHE_EMU_SANITIZE");
    let mut sources: Vec<_> = [
        "launch.cpp",
        "driver.cpp",
        "warp.cpp",
        "async.cpp",
        "wgmma.cpp",
        "probes.cu",
        "probes_quant.cu",
        "probes_wgmma.cu",
    ]
    .iter()
    .map(|name| cuda.join("emu").join(name))
    .collect();
    sources.extend(super::sources::kernels(cuda).into_iter().map(|(_, path)| path));

    let mut build = cc::Build::new();
    build
        .cpp(true)
        .std("c++17")
        .define("KVC_EMULATE", None)
        // The kernels are tested, not timed, but unoptimised they are ten times slower.
        .opt_level(2)
        // Lines are what a fault's stack names; the names of variables are a third of the compiler's time.
        .debug(false)
        .flag("-g1")
        .extra_warnings(true)
        // Rounding must not depend on which host compiled it.
        .flag("-ffp-contract=off")
        // The escape from a fiber would look like a broken stack to the checked longjmp.
        .flag("-U_FORTIFY_SOURCE")
        .flag("-x")
        .flag("c++");
    let sanitize = env::var("KVCACHE_EMU_SANITIZE").is_ok_and(|value| value == "1");
    if sanitize {
        build
            .flag("-fsanitize=address,undefined")
            .flag("-fno-sanitize-recover=all")
            .flag("-fno-omit-frame-pointer");
        println!("cargo::rustc-cfg=kvc_emu_sanitize");
    }
    let objects = objects(&build, &sources);
    // From here on there are objects only; they are no C++ by `-x`.
    cc::Build::new().cpp(true).objects(objects).compile("kvc_emulator");
    if sanitize {
        println!("cargo::rustc-link-lib=dylib=asan");
        println!("cargo::rustc-link-lib=dylib=ubsan");
    }
}

/// The object of each source, compiled where it is not there yet.
fn objects(build: &cc::Build, sources: &[PathBuf]) -> Vec<PathBuf> {
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let compiler = build.get_compiler();
    let mut stale = Vec::new();
    let mut objects = Vec::new();
    for source in sources {
        let mut files = BTreeMap::new();
        read_all(source, &mut files);
        let mut hash = DefaultHasher::new();
        files.hash(&mut hash);
        (compiler.path(), compiler.args()).hash(&mut hash);
        let stem = source.file_stem().expect("a file has a name").to_string_lossy();
        let object = out.join(format!("{stem}-{:016x}.o", hash.finish()));
        if !object.exists() {
            stale.push((source.clone(), object.clone()));
        }
        objects.push(object);
    }
    let failures = Mutex::new(Vec::new());
    in_parallel(stale, |(source, object)| {
        // Under another name until it is whole: an interrupted build leaves no object.
        let part = object.with_extension("part");
        let mut command = compiler.to_command();
        match command.arg("-c").arg(&source).arg("-o").arg(&part).output() {
            Ok(output) if output.status.success() => {
                for line in String::from_utf8_lossy(&output.stderr).lines() {
                    println!("cargo::warning={line}");
                }
                fs::rename(&part, &object).expect("OUT_DIR can be written");
            }
            Ok(output) => {
                failures.lock().unwrap().push(String::from_utf8_lossy(&output.stderr).into_owned());
            }
            Err(error) => failures.lock().unwrap().push(error.to_string()),
        }
    });
    let failures = failures.into_inner().unwrap();
    if !failures.is_empty() {
        for line in failures.iter().flat_map(|failure| failure.lines()) {
            println!("cargo::error={line}");
        }
        std::process::exit(1);
    }
    objects
}
