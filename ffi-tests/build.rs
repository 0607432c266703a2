//! Tells the tests which target they were built for; under the feature `bindgen`, reads the header
//! as a Rust program that has nothing else would.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    for name in ["TARGET", "HOST"] {
        println!("cargo::rustc-env=FFI_{name}={}", std::env::var(name).unwrap());
    }
    #[cfg(feature = "bindgen")]
    {
        let header = "../include/kvcache.h";
        println!("cargo::rerun-if-changed={header}");
        let out = std::path::Path::new(&std::env::var("OUT_DIR").unwrap()).join("bindings.rs");
        // A libclang by itself has no stddef.h; the C compiler's serves.
        let cc = std::process::Command::new("cc").arg("-print-file-name=include").output();
        let include = String::from_utf8(cc.expect("a C compiler").stdout).unwrap();
        let bindings = bindgen::Builder::default()
            .header(header)
            .clang_arg(format!("-isystem{}", include.trim()))
            .allowlist_item("kvc_.*|KVC_.*")
            .layout_tests(true)
            .generate();
        bindings.expect("libclang must read the header").write_to_file(out).unwrap();
    }
}
