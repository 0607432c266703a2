//! Compiles every kernel with the host's C++ compiler, together with the emulator that runs them.
//!
//! `KVCACHE_EMU_SANITIZE=1` builds them with AddressSanitizer and UndefinedBehaviorSanitizer; the
//! test programs then want the sanitizer's library loaded first (scripts/emu-sanitize.sh does it).

use std::path::Path;

/// Compiles `cuda` into a static library that the crate links.
pub fn build(cuda: &Path) {
    println!("cargo::rerun-if-changed={}", cuda.display());
    println!("cargo::rerun-if-env-changed=KVCACHE_EMU_SANITIZE");
    let mut sources: Vec<_> = ["driver.cpp", "warp.cpp", "async.cpp", "probes.cu"]
        .iter()
        .map(|name| cuda.join("emu").join(name))
        .collect();
    let mut kernels: Vec<_> = std::fs::read_dir(cuda)
        .expect("the crate has a folder cuda")
        .map(|entry| entry.expect("the folder can be read").path())
        .filter(|path| path.extension().is_some_and(|ending| ending == "cu"))
        .collect();
    kernels.sort();
    sources.append(&mut kernels);

    let mut build = cc::Build::new();
    build
        .cpp(true)
        .std("c++17")
        .define("KVC_EMULATE", None)
        // The kernels are tested, not timed, but unoptimised they are ten times slower.
        .opt_level(2)
        .debug(true)
        .extra_warnings(true)
        // Rounding must not depend on which host compiled it.
        .flag("-ffp-contract=off")
        // The escape from a fiber would look like a broken stack to the checked longjmp.
        .flag("-U_FORTIFY_SOURCE")
        .flag("-x")
        .flag("c++")
        .files(sources);
    let sanitize = std::env::var("KVCACHE_EMU_SANITIZE").is_ok_and(|value| value == "1");
    if sanitize {
        build
            .flag("-fsanitize=address,undefined")
            .flag("-fno-sanitize-recover=all")
            .flag("-fno-omit-frame-pointer");
        println!("cargo::rustc-cfg=kvc_emu_sanitize");
    }
    build.compile("kvc_emulator");
    if sanitize {
        println!("cargo::rustc-link-lib=dylib=asan");
        println!("cargo::rustc-link-lib=dylib=ubsan");
    }
}
