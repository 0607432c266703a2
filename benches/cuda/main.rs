//! The CUDA kernels on a GPU: time, bandwidth, and share of what a device copy reaches in the same
//! run. `cargo bench --features cuda --bench cuda [-- FILTER]`; `OUT` names a folder for
//! `kernels.json`. Without a GPU it says so and ends (`KVCACHE_REQUIRE_GPU=1`: fails).
//!
//! | file | job |
//! |---|---|
//! | `gpu.rs` | memory with random content, cold caches, graph replay, events |
//! | `attend.rs` | decode and prefill over paged K and V |
//! | `cascade.rs` | decode over a shared prefix, plain and as a cascade, beside the cost model |
//! | `append.rs` | append, with and without rotation |
//! | `codes.rs` | decode and prefill over rows of codes in every format, append to them |
//! | `latents.rs` | decode over latents in bf16 and codes, append to them |
//! | `sealed.rs` | decode and prefill over sealed tiles in every format, sealing |
//! | `copy.rs` | copy and zero of a GiB of blocks |
//! | `tiers.rs` | demotion to host memory and promotion from it, alone and beside decode |
//! | `lookup.rs` | lookups in a prefix index on the device |

mod append;
mod attend;
mod cascade;
mod codes;
mod copy;
mod gpu;
mod latents;
mod lookup;
mod sealed;
mod tiers;

use std::process::ExitCode;

use gpu::{Gpu, Sample};
use serde_json::{Value, json};

/// One line of the table.
pub struct Line {
    /// What ran, with its shape.
    pub name: String,
    /// The shape again, for programs.
    pub shape: Value,
    /// Bytes that must move.
    pub bytes: u64,
    /// Floating-point operations; 0 where they are not the limit.
    pub flops: u64,
    pub sample: Sample,
}

fn main() -> ExitCode {
    let filter = std::env::args().skip(1).find(|word| !word.starts_with('-')).unwrap_or_default();
    let gpu = match Gpu::open() {
        Ok(gpu) => gpu,
        Err(error) => {
            let required = std::env::var("KVCACHE_REQUIRE_GPU").is_ok_and(|value| value == "1");
            println!("skipped: no GPU ({error})");
            return ExitCode::from(if required { 1 } else { 0 });
        }
    };
    match run(&gpu, &filter) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("cuda: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(gpu: &Gpu, filter: &str) -> Result<(), Box<dyn std::error::Error>> {
    let facts = gpu.cuda.facts()?;
    println!(
        "{}, {} SMs, {:.0}/{:.0} MHz, {} MiB L2, driver {}",
        facts.name,
        facts.multiprocessors,
        f64::from(facts.clocks_khz.0) / 1e3,
        f64::from(facts.clocks_khz.1) / 1e3,
        facts.l2_bytes >> 20,
        facts.driver
    );
    println!("kernels: {}", kvcache::kernels::image::build_text());
    // What copying reaches here and now: a GiB read and a GiB written.
    let copy = gpu.copy_bandwidth(1 << 30)?;
    println!("device copy: {copy:.1} GB/s (read + write)\n");
    println!("{:<52} {:>9} {:>9} {:>9} {:>8} {:>7}", "call", "us", "p10", "p90", "GB/s", "copy");

    // Written anew after every line: a run that is cut short leaves what it had.
    let save = |lines: &[Value]| {
        let Some(folder) = std::env::var_os("OUT") else { return };
        let all = json!({
            "device": facts.name,
            "multiprocessors": facts.multiprocessors,
            "capability": facts.capability,
            "max_clock_khz": facts.clocks_khz.0,
            "memory_clock_khz": facts.clocks_khz.1,
            "driver": facts.driver,
            "kernels": kvcache::kernels::image::build_text(),
            "copy_gb_per_s": copy,
            "lines": lines,
        });
        let (path, part) = ("kernels.json", "kernels.json.part");
        let [path, part] = [path, part].map(|name| std::path::Path::new(&folder).join(name));
        let written = std::fs::write(&part, format!("{all:#}"));
        if let Err(error) = written.and_then(|()| std::fs::rename(&part, &path)) {
            eprintln!("cuda: {}: {error}", path.display());
        }
    };
    let mut lines = Vec::new();
    let mut report = |line: Line| {
        let seconds = line.sample.median_us * 1e-6;
        let rate = line.bytes as f64 / seconds / 1e9;
        let teraflops = line.flops as f64 / seconds / 1e12;
        let Sample { median_us, p10_us, p90_us } = line.sample;
        let share = 100.0 * rate / copy;
        print!("{:<52} {median_us:>9.2} {p10_us:>9.2} {p90_us:>9.2}", line.name);
        print!(" {rate:>8.1} {share:>5.1} %");
        println!(
            "{}",
            if line.flops == 0 { String::new() } else { format!(" {teraflops:.0} TF/s") }
        );
        lines.push(json!({
            "name": line.name,
            "shape": line.shape,
            "us": median_us,
            "us_p10": p10_us,
            "us_p90": p90_us,
            "bytes": line.bytes,
            "gb_per_s": rate,
            "share_of_copy": rate / copy,
            "tflops": if line.flops == 0 { Value::Null } else { json!(teraflops) },
        }));
        save(&lines);
    };
    attend::run(gpu, filter, &mut report)?;
    cascade::run(gpu, filter, &mut report)?;
    append::run(gpu, filter, &mut report)?;
    copy::run(gpu, filter, &mut report)?;
    lookup::run(gpu, filter, &mut report)?;
    tiers::run(gpu, filter, &mut report)?;
    codes::run(gpu, filter, &mut report)?;
    latents::run(gpu, filter, &mut report)?;
    sealed::run(gpu, filter, &mut report)?;
    Ok(())
}
