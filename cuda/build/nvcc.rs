//! Compiles each `cuda/*.cu` to a fatbin with nvcc, and writes the file that embeds them.
//!
//! nvcc is looked for in `NVCC`, `CUDACXX`, `CUDA_HOME`, `CUDA_PATH`, `PATH`, and the folder that
//! scripts/cuda-toolchain.sh fills. Where there is none the library gets no kernels: a warning says
//! so here, the build text says so at run time, and `KVCACHE_REQUIRE_NVCC=1` makes it an error.
//!
//! `KVCACHE_CUDA_ARCHS` is a list such as `80;90a;90-virtual`: machine code for each, or PTX with
//! `-virtual`. `KVCACHE_FATBIN_DIR` names a folder with a ready `<name>.fatbin` for each source, and
//! then nothing is compiled. `KVCACHE_CUDA_HEAD_DIMS` is a list such as `64;80;128`: of the sources
//! whose name ends in a head dimension (`decode_d80.cu`) these are compiled. Either may be `release`:
//! every architecture since Ampere, every head dimension. An image is compiled again only when its
//! source, a header that it includes, the compiler or the options change.

use std::collections::BTreeMap;
use std::collections::hash_map::DefaultHasher;
use std::fmt::Write;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::{env, fs};

use super::sources::{in_parallel, kernels, read_all};

/// Machine code for the two families that the kernels are written for, and PTX for what is newer.
const DEFAULT_ARCHS: &str = "80;90a;90-virtual";

/// What `KVCACHE_CUDA_ARCHS=release` stands for: machine code for every family since Ampere, PTX for
/// what is newer.
const RELEASE_ARCHS: &str = "80;86;89;90a;100a;120;90-virtual;120-virtual";

/// The head dimensions of most models; the others are a list away.
const DEFAULT_HEAD_DIMS: &str = "64;128;256";

/// Compiles what changed in `cuda` and writes `kvc_images.rs`.
pub fn build(cuda: &Path) {
    println!("cargo::rerun-if-changed={}", cuda.display());
    for name in [
        "NVCC",
        "CUDACXX",
        "CUDA_HOME",
        "CUDA_PATH",
        "PATH",
        "DOCS_RS",
        "KVCACHE_CUDA_ARCHS",
        "KVCACHE_CUDA_HEAD_DIMS",
        "KVCACHE_REQUIRE_NVCC",
        "KVCACHE_FATBIN_DIR",
    ] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let sources = sources(cuda);
    let (images, text) = if env::var_os("DOCS_RS").is_some() {
        (Vec::new(), "none (documentation build)".into())
    } else if let Some(ready) = env::var_os("KVCACHE_FATBIN_DIR") {
        taken(Path::new(&ready), &sources)
    } else if let Some(nvcc) = find_nvcc(cuda) {
        compiled(&nvcc, &sources, &out)
    } else if env::var("KVCACHE_REQUIRE_NVCC").is_ok_and(|value| value == "1") {
        stop("KVCACHE_REQUIRE_NVCC is set and there is no nvcc")
    } else {
        println!(
            "cargo::warning=no nvcc: this build has no CUDA kernels (scripts/cuda-toolchain.sh installs one)"
        );
        (Vec::new(), "none (no nvcc when this was built)".into())
    };
    write_images(&out.join("kvc_images.rs"), &images, &text);
}

fn stop(why: &str) -> ! {
    println!("cargo::error={why}");
    std::process::exit(1)
}

/// The kernel sources that this build wants, by name without the ending.
fn sources(cuda: &Path) -> Vec<(String, PathBuf)> {
    let list = env::var("KVCACHE_CUDA_HEAD_DIMS").unwrap_or_else(|_| DEFAULT_HEAD_DIMS.to_owned());
    let wanted: Vec<&str> = list.split([';', ',', ' ']).filter(|dim| !dim.is_empty()).collect();
    let mut sources = kernels(cuda);
    if list == "release" {
        return sources;
    }
    let dims: Vec<&str> = sources.iter().filter_map(|(name, _)| head_dim(name)).collect();
    if let Some(unknown) = wanted.iter().find(|dim| !dims.contains(dim)) {
        stop(&format!("KVCACHE_CUDA_HEAD_DIMS: there are no kernels for `{unknown}`"));
    }
    sources.retain(|(name, _)| head_dim(name).is_none_or(|dim| wanted.contains(&dim)));
    sources
}

/// The head dimension that a source is for: `80` of `decode_d80`.
fn head_dim(name: &str) -> Option<&str> {
    let (_, dim) = name.rsplit_once("_d")?;
    dim.bytes().all(|digit| digit.is_ascii_digit()).then_some(dim)
}

/// The first nvcc that answers, with its version.
fn find_nvcc(cuda: &Path) -> Option<(PathBuf, String)> {
    let mut candidates: Vec<PathBuf> =
        ["NVCC", "CUDACXX"].iter().filter_map(env::var_os).map(PathBuf::from).collect();
    for home in ["CUDA_HOME", "CUDA_PATH"] {
        candidates.extend(env::var_os(home).map(|home| Path::new(&home).join("bin/nvcc")));
    }
    candidates.push("nvcc".into());
    candidates.push(cuda.join("../.toolchain/cuda/nvidia/cu13/bin/nvcc"));
    candidates.into_iter().find_map(|nvcc| {
        let output = Command::new(&nvcc).arg("--version").output().ok()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        // "Cuda compilation tools, release 13.0, V13.0.88"
        let version = text.split(" V").nth(1)?.lines().next()?.trim().to_owned();
        output.status.success().then_some((nvcc, version))
    })
}

/// nvcc's options for the architectures asked for, and their list as text.
fn architectures() -> (Vec<String>, String) {
    let list = env::var("KVCACHE_CUDA_ARCHS").unwrap_or_else(|_| DEFAULT_ARCHS.into());
    let list = if list == "release" { RELEASE_ARCHS } else { list.as_str() };
    let mut options = Vec::new();
    let mut names = Vec::new();
    for arch in list.split([';', ',', ' ']).filter(|arch| !arch.is_empty()) {
        let (number, ptx) = match arch.strip_suffix("-virtual") {
            Some(number) => (number, true),
            None => (arch.strip_suffix("-real").unwrap_or(arch), false),
        };
        let known = number.len() >= 2
            && number.trim_end_matches(['a', 'f']).bytes().all(|digit| digit.is_ascii_digit());
        if !known {
            stop(&format!("KVCACHE_CUDA_ARCHS: `{arch}` is not like 80, 90a or 90-virtual"));
        }
        let kind = if ptx { "compute" } else { "sm" };
        options.push("-gencode".into());
        options.push(format!("arch=compute_{number},code={kind}_{number}"));
        names.push(format!("{kind}_{number}"));
    }
    if names.is_empty() {
        stop("KVCACHE_CUDA_ARCHS names no architecture");
    }
    (options, names.join(" "))
}

type Images = Vec<(String, PathBuf)>;

fn compiled(
    (nvcc, version): &(PathBuf, String),
    sources: &[(String, PathBuf)],
    out: &Path,
) -> (Images, String) {
    let (architectures, names) = architectures();
    let mut options: Vec<String> =
        ["-fatbin", "-std=c++17", "-O3", "-Xptxas", "-warn-spills"].map(String::from).into();
    options.extend(architectures);
    let mut images = Vec::new();
    let mut stale = Vec::new();
    for (name, source) in sources {
        let mut files = BTreeMap::new();
        read_all(source, &mut files);
        let mut hash = DefaultHasher::new();
        (files.values().collect::<Vec<_>>(), &options, version).hash(&mut hash);
        let image = out.join(format!("{name}-{:016x}.fatbin", hash.finish()));
        if !image.exists() {
            stale.push((source.clone(), image.clone()));
        }
        images.push((name.clone(), image));
    }
    compile(nvcc, &options, stale);
    (images, format!("{names} by nvcc {version}"))
}

/// Compiles what is stale, or says why not and stops the build.
fn compile(nvcc: &Path, options: &[String], stale: Vec<(PathBuf, PathBuf)>) {
    let failures = Mutex::new(Vec::new());
    in_parallel(stale, |(source, image)| {
        // Under another name until it is whole: an interrupted build leaves no image.
        let part = image.with_extension("part");
        let result = Command::new(nvcc).args(options).arg(&source).arg("-o").arg(&part).output();
        let text = match result {
            Ok(output) if output.status.success() => {
                for line in String::from_utf8_lossy(&output.stderr).lines() {
                    println!("cargo::warning={line}");
                }
                match fs::rename(&part, &image) {
                    Ok(()) => return,
                    Err(error) => error.to_string(),
                }
            }
            Ok(output) => String::from_utf8_lossy(&output.stderr).into_owned(),
            Err(error) => error.to_string(),
        };
        failures.lock().unwrap().push(format!("{}: {text}", source.display()));
    });
    let failures = failures.into_inner().unwrap();
    if !failures.is_empty() {
        for line in failures.iter().flat_map(|failure| failure.lines()) {
            println!("cargo::error={line}");
        }
        std::process::exit(1);
    }
}

fn taken(ready: &Path, sources: &[(String, PathBuf)]) -> (Images, String) {
    let images: Images = sources
        .iter()
        .map(|(name, _)| {
            let image = ready.join(format!("{name}.fatbin"));
            if !image.is_file() {
                stop(&format!("KVCACHE_FATBIN_DIR: no {}", image.display()));
            }
            println!("cargo::rerun-if-changed={}", image.display());
            let image = fs::canonicalize(&image).expect("the file was just there");
            (name.clone(), image)
        })
        .collect();
    (images, "prebuilt (KVCACHE_FATBIN_DIR)".into())
}

fn write_images(to: &Path, images: &[(String, PathBuf)], text: &str) {
    let mut code = String::from("pub(super) static IMAGES: &[Image] = &[\n");
    for (name, image) in images {
        writeln!(
            code,
            "    Image {{ name: {name:?}, bytes: {{\n        static IMAGE: &Aligned<[u8]> = \
             &Aligned(*include_bytes!({:?}));\n        &IMAGE.0\n    }} }},",
            image.display().to_string()
        )
        .expect("a string takes any text");
    }
    writeln!(code, "];\npub(super) const BUILD_TEXT: &str = {text:?};")
        .expect("a string takes any text");
    fs::write(to, code).expect("OUT_DIR can be written");
}
