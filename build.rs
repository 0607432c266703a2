//! Tells dependents where the header is, rewrites it under the feature `generate-header`, and
//! compiles the CUDA sources where a feature asks for it: `cuda` by nvcc into embedded images,
//! `emulate` by the host's compiler into the emulator. Without those features it does nothing more.

#[cfg(feature = "emulate")]
#[path = "cuda/build/emulator.rs"]
mod emulator;
#[cfg(feature = "cuda")]
#[path = "cuda/build/nvcc.rs"]
mod nvcc;

#[cfg(any(feature = "cuda", feature = "emulate"))]
#[path = "cuda/build/sources.rs"]
mod sources;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-check-cfg=cfg(kvc_emu_sanitize)");
    println!("cargo::rustc-check-cfg=cfg(fuzzing)");
    let root = std::env::var("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR");
    println!("cargo::metadata=include={root}/include");
    #[cfg(feature = "generate-header")]
    header::generate(std::path::Path::new(&root));
    #[cfg(any(feature = "cuda", feature = "emulate"))]
    let cuda = std::path::Path::new(&root).join("cuda");
    #[cfg(feature = "emulate")]
    emulator::build(&cuda);
    #[cfg(feature = "cuda")]
    nvcc::build(&cuda);
}

/// `include/kvcache.h` from `src/capi`: cbindgen once a noun, so that the header reads noun by
/// noun (constants, types, functions) and not kind by kind.
#[cfg(feature = "generate-header")]
mod header {
    use std::path::Path;
    use std::{env, fs};

    use cbindgen::{Builder, Config, DocumentationStyle, Language, Style};

    /// The sections of the header, in order: file under `src/capi` and title.
    const NOUNS: &[(&str, &str)] = &[
        ("status", "Status codes and the text of the last error"),
        ("info", "Which library this is"),
        ("plan", "plan: how much memory a cache takes, and what fits"),
        ("scales", "attend, append: where the scales of quantised K and V lie"),
        ("tile", "attend: sealed tiles on the caller's own memory, and their sealing"),
        ("attend", "attend: the kernels alone, on the caller's own memory"),
        ("append", "append: new keys and values into the caller's own memory"),
        ("pool", "pool: blocks, references, nothing else"),
        ("prefix", "prefix: which token sequences are cached in which blocks"),
        ("prefix_step", "prefix: what a step wants of it, in one call"),
        ("prefix_windows", "prefix: layer groups with a sliding window"),
        ("retention", "prefix: what stays in an index, and what goes"),
        ("cache", "cache: the whole KV cache"),
        ("cache_scales", "cache: the scales of fp8 and nvfp4"),
        ("seq", "seq: the sequences of a cache"),
        ("step", "step: one forward pass over a batch"),
        ("step_device", "step: for rows in the memory of the cache's device"),
        ("device", "device: where kernels run beside the CPU"),
        ("device_rates", "device: what it does in a microsecond"),
        ("device_kernels", "device: its kernels alone, on the caller's own memory and stream"),
        ("device_cascade", "device: a prefix that sequences share attended once for all of them"),
        ("device_merge", "device: partial results of attention merged"),
        ("device_copy", "device: blocks copied, swapped and zeroed"),
        ("device_prefix", "device: a prefix index's copy there, and lookups in it"),
        ("events", "events: what becomes cached and what ceases to be, as it happens"),
        ("metrics", "metrics: what a cache counts and times"),
        ("tier_store", "tier: a store of the engine's own"),
        ("tier", "tier: where blocks go that the device has no room for, and come back from"),
        ("onboard", "onboard: a sequence starts before its blocks are there"),
        ("prefetch", "prefetch: a prompt's blocks on their way back"),
        ("transfer", "transfer: a sequence's blocks from one cache to another"),
    ];

    const HEAD: &str = include_str!("src/capi/header.txt");

    const TAIL: &str = "\n#ifdef __cplusplus\n}  // extern \"C\"\n#endif\n\n#endif  // KVCACHE_H\n";

    pub fn generate(root: &Path) {
        println!("cargo::rerun-if-changed=src/capi");
        println!("cargo::rerun-if-env-changed=KVCACHE_HEADER_OUT");
        let mut text = HEAD.to_string();
        for (file, title) in NOUNS {
            let path = root.join("src/capi").join(file).with_extension("rs");
            let bar = "-".repeat(94);
            text.push_str(&format!("\n// {bar}\n// {title}\n// {bar}\n"));
            text.push_str(&without_safety(&section(&path)));
        }
        text.push_str(TAIL);
        // A test that only compares names another place.
        let out = env::var_os("KVCACHE_HEADER_OUT")
            .map_or_else(|| root.join("include/kvcache.h"), Into::into);
        println!("cargo::rerun-if-changed={}", out.display());
        if fs::read_to_string(&out).ok().as_deref() != Some(&text) {
            fs::create_dir_all(out.parent().unwrap()).unwrap();
            fs::write(&out, text).unwrap();
        }
    }

    fn section(path: &Path) -> String {
        let config = Config {
            language: Language::C,
            style: Style::Type,
            documentation_style: DocumentationStyle::C99,
            no_includes: true,
            line_length: 100,
            tab_width: 4,
            ..Config::default()
        };
        let bindings = Builder::new().with_config(config).with_src(path).generate();
        let mut bytes = Vec::new();
        bindings.unwrap_or_else(|error| panic!("{}: {error}", path.display())).write(&mut bytes);
        String::from_utf8(bytes).unwrap()
    }

    /// Drops the `# Safety` parts: they speak to Rust callers; C readers have the head's rules.
    fn without_safety(section: &str) -> String {
        let mut kept: Vec<&str> = Vec::new();
        let mut dropping = false;
        for line in section.lines() {
            let comment = line.trim_start().starts_with("//");
            dropping = comment && (dropping || line.trim() == "// # Safety");
            if line.trim() == "// # Safety" && kept.last().is_some_and(|l| l.trim() == "//") {
                kept.pop();
            }
            if !dropping {
                kept.push(line);
            }
        }
        kept.join("\n") + "\n"
    }
}
