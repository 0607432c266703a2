//! What tests of the emulator share: a launch of one of its probes.

use kvcache::emu::{Buffer, Fault, Fibers, Options, Schedule, launch};

/// What every probe takes.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Probe {
    pub input: u64,
    pub output: u64,
    pub mode: u32,
    pub n: u32,
}

/// Every schedule, with both ways to switch.
#[allow(dead_code)]
pub fn options() -> Vec<Options> {
    let mut all = Vec::new();
    for schedule in Schedule::ALL {
        for fibers in [Fibers::Native, Fibers::Ucontext] {
            all.push(Options { schedule, fibers });
        }
    }
    all
}

/// Runs a probe and returns its output words.
#[allow(clippy::too_many_arguments)]
pub fn run(
    name: &str,
    blocks: u32,
    threads: u32,
    shared_bytes: u32,
    input: &[u32],
    output: &[u32],
    (mode, n): (u32, u32),
    options: Options,
) -> Result<Vec<u32>, Fault> {
    let (input, output) = (Buffer::of(input).unwrap(), Buffer::of(output).unwrap());
    let params = Probe { input: input.address(), output: output.address(), mode, n };
    // SAFETY: both addresses are of buffers that live to the end of this function.
    unsafe { launch(name, [blocks, 1, 1], threads, shared_bytes, &params, options)? };
    Ok(output.read())
}
