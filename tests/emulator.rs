//! The emulator's own tests: every primitive against its definition, and every detector on a bug
//! planted for it (cuda/emu/probes.cu).
#![cfg(feature = "emulate")]

#[path = "device/probe.rs"]
mod probe;

use half::{bf16, f16};
use kvcache::emu::{Fault, FaultKind, Options, Schedule, launch};
use probe::{Probe, options, run};

fn words(n: u32) -> Vec<u32> {
    (0..n).map(|i| i.wrapping_mul(2_654_435_761).rotate_left(7) ^ 0x5bd1_e995).collect()
}

#[test]
fn shuffles_and_votes() {
    let input = words(128);
    for options in options() {
        for n in [1, 5, 31] {
            let out =
                run("kvc_probe_warp", 1, 128, 0, &input, &[0; 1024], (0, n), options).unwrap();
            for t in 0..128u32 {
                let (warp, lane) = (t / 32 * 32, t % 32);
                let at = |lane: u32| input[(warp + lane) as usize];
                let got = &out[t as usize * 8..][..8];
                assert_eq!(got[0], at(at(lane) % 32));
                assert_eq!(got[1], if lane >= n { at(lane - n) } else { at(lane) });
                assert_eq!(got[2], if lane + n < 32 { at(lane + n) } else { at(lane) });
                assert_eq!(got[3], at(lane ^ n));
                let votes = |lanes: std::ops::Range<u32>, bit: u32| {
                    lanes.filter(|&l| at(l) & bit != 0).map(|l| 1u32 << l).sum::<u32>()
                };
                assert_eq!(got[4], votes(0..32, 1));
                assert_eq!(got[5], if lane < 16 { votes(0..16, 2) } else { votes(16..32, 2) });
                assert_eq!(got[6..], [at(lane ^ 1), warp + (lane ^ 1)]);
            }
        }
    }
}

#[test]
fn matrix_loads() {
    let input = words(128);
    let element = |matrix: usize, row: usize, column: usize| {
        input[(matrix * 8 + row) * 4 + column / 2] >> (column % 2 * 16) & 0xffff
    };
    for options in options() {
        let out =
            run("kvc_probe_ldmatrix", 1, 32, 512, &input, &[0; 288], (0, 0), options).unwrap();
        for lane in 0..32 {
            let (g, t) = (lane / 4, lane % 4);
            for m in 0..4 {
                let plain = element(m, g, 2 * t) | element(m, g, 2 * t + 1) << 16;
                let turned = element(m, 2 * t, g) | element(m, 2 * t + 1, g) << 16;
                assert_eq!(out[lane * 9 + m], plain);
                assert_eq!(out[lane * 9 + 4 + m], turned);
            }
            let turned = element(0, 2 * t, g) | element(0, 2 * t + 1, g) << 16;
            assert_eq!(out[lane * 9 + 8], turned);
        }
    }
}

#[test]
fn matrix_products() {
    for mode in [0, 1] {
        let value = |i: usize| ((i * 37 + 11) % 29) as f32 / 4.0 - 3.0;
        let bits = |x: f32| {
            if mode == 0 { f16::from_f32(x).to_bits() } else { bf16::from_f32(x).to_bits() }
        };
        // Multiples of 1/4 below 8: exact in both formats, and so are all sums.
        let a: Vec<f32> = (0..256).map(value).collect();
        let b: Vec<f32> = (0..128).map(|i| value(i * 7 + 3)).collect();
        let c: Vec<f32> = (0..128).map(|i| value(i * 5 + 1)).collect();
        let halves: Vec<u16> = a.iter().chain(&b).map(|&x| bits(x)).collect();
        let input: Vec<u32> =
            halves.chunks(2).map(|p| u32::from(p[0]) | u32::from(p[1]) << 16).collect();
        let start: Vec<u32> = c.iter().map(|x| x.to_bits()).collect();
        for options in options() {
            let out = run("kvc_probe_mma", 1, 32, 0, &input, &start, (mode, 0), options).unwrap();
            for row in 0..16 {
                for column in 0..8 {
                    let want = c[row * 8 + column]
                        + (0..16).map(|k| a[row * 16 + k] * b[k * 8 + column]).sum::<f32>();
                    assert_eq!(f32::from_bits(out[row * 8 + column]), want);
                }
            }
        }
    }
}

#[test]
fn asynchronous_copies() {
    let input = words(384);
    for options in options() {
        let out =
            run("kvc_probe_cp_async", 1, 32, 1536, &input, &[7; 384], (0, 0), options).unwrap();
        let zeroed = |i: usize| if (i / 4).is_multiple_of(2) { input[i] } else { 0 };
        assert_eq!(out, (0..384).map(zeroed).collect::<Vec<_>>());
        let input = words(64 * 9);
        let out = run("kvc_probe_bulk", 1, 64, 640, &input, &[0; 64 * 9], (0, 9), options).unwrap();
        assert_eq!(out, input);
    }
}

#[test]
fn atomics_and_named_barriers() {
    for options in options() {
        let out = run("kvc_probe_atomics", 40, 128, 512, &[0], &[0; 4], (0, 0), options).unwrap();
        assert_eq!(out, [40 * (127 * 128 / 2), u32::MAX, 40 * 128 - 1, 0]);
    }
}

#[test]
fn conversions_are_those_of_ieee() {
    // Every f16; floats around every boundary of both formats, and the special ones.
    let mut input: Vec<u32> = (0..=0xffff).collect();
    for high in 0..=0xffffu32 {
        for low in [0x0fff, 0x1000, 0x1001, 0x3000, 0x7fff, 0x8000, 0x8001, 0xffff] {
            input.push(high << 16 | low);
        }
    }
    let n = input.len() as u32;
    let zeros = vec![0; input.len() * 3];
    let out =
        run("kvc_probe_convert", 1, 32, 0, &input, &zeros, (0, n), Options::default()).unwrap();
    for (i, &bits) in input.iter().enumerate() {
        let x = f32::from_bits(bits);
        let (half, brain) = (f16::from_f32(x), bf16::from_f32(x));
        if x.is_nan() {
            assert_eq!(out[i * 3..][..2], [0x7fff, 0x7fff_0000]);
        } else {
            assert_eq!(out[i * 3], u32::from(half.to_bits()), "{x:e}");
            assert_eq!(out[i * 3 + 1], u32::from(brain.to_bits()) << 16, "{x:e}");
        }
        let wide = f16::from_bits(bits as u16).to_f32();
        let got = f32::from_bits(out[i * 3 + 2]);
        assert!(got.to_bits() == wide.to_bits() || (got.is_nan() && wide.is_nan()), "{bits:04x}");
    }
}

/// Runs the probe with a bug planted, on 64 threads with 256 words of shared memory.
fn plant(mode: u32, n: u32, options: Options) -> Result<Vec<u32>, Fault> {
    run("kvc_probe_bug", 1, 64, 1024, &words(256), &[0; 67], (mode, n), options)
}

fn must_fault(mode: u32, n: u32, kind: FaultKind) {
    for options in options() {
        let fault = plant(mode, n, options).expect_err("the bug must be seen");
        assert_eq!(fault.kind, kind, "mode {mode}: {fault}");
        assert!(fault.text.starts_with("kvc_probe_bug: "), "{fault}");
    }
}

#[test]
fn a_missing_barrier_changes_results_under_some_schedule() {
    let want = |step: u32| (0..64).map(|t| (t + step) % 64).collect::<Vec<u32>>();
    for options in options() {
        assert_eq!(plant(0, 0, options).unwrap()[..64], want(1));
    }
    let wrong = |mode, step, schedule| {
        plant(mode, 0, Options { schedule, ..Options::default() }).unwrap()[..64] != want(step)
    };
    // Reading ahead shows when threads run upwards; reading back only when they run downwards,
    // but for the first thread, which reads from the last.
    assert!(wrong(1, 1, Schedule::Forward));
    assert!(wrong(2, 63, Schedule::Reverse));
    assert!(wrong(1, 1, Schedule::Seeded(1)) && wrong(2, 63, Schedule::Seeded(1)));
}

#[test]
fn shared_memory_starts_as_poison() {
    for options in options() {
        assert_eq!(plant(3, 0, options).unwrap()[..64], [u32::MAX; 64]);
    }
}

#[test]
fn accesses_outside_shared_memory_are_caught() {
    must_fault(6, 256, FaultKind::Shared);
    if cfg!(not(kvc_emu_sanitize)) {
        must_fault(4, 256, FaultKind::Shared);
        must_fault(5, 0, FaultKind::Shared);
    }
}

#[test]
fn accesses_outside_device_memory_are_caught() {
    must_fault(9, 0, FaultKind::Global);
    if cfg!(not(kvc_emu_sanitize)) {
        must_fault(7, 256, FaultKind::Global);
        must_fault(7, 1 << 24, FaultKind::Global);
        must_fault(8, 67, FaultKind::Global);
    }
}

#[test]
fn wrong_masks_are_caught() {
    for mode in 10..=14 {
        must_fault(mode, 0, FaultKind::Mask);
    }
}

#[test]
fn divergent_barriers_are_caught() {
    must_fault(15, 0, FaultKind::Diverged);
    must_fault(16, 0, FaultKind::Diverged);
}

#[test]
fn a_block_that_cannot_continue_is_reported() {
    must_fault(24, 0, FaultKind::Deadlock);
    for options in options() {
        let fault = plant(17, 0, options).unwrap_err();
        // Either primitive may see first that the other half will not come.
        assert!(matches!(fault.kind, FaultKind::Deadlock | FaultKind::Diverged), "{fault}");
    }
}

#[test]
fn misaligned_and_misused_copies_are_caught() {
    must_fault(18, 0, FaultKind::Misaligned);
    for mode in [21, 22, 25] {
        must_fault(mode, 0, FaultKind::Protocol);
    }
    // A copy that nobody waits for shows where copies are late.
    let late = Options { schedule: Schedule::Forward, ..Options::default() };
    assert_eq!(plant(23, 0, late).unwrap_err().kind, FaultKind::Protocol);
}

#[test]
fn copies_that_are_read_too_early_or_start_too_early_show() {
    let input = words(256);
    let run = |mode, schedule| plant(mode, 0, Options { schedule, ..Options::default() }).unwrap();
    // No wait: right only if the copy happened at once.
    let right: Vec<u32> = (0..64).map(|t| input[t * 4]).collect();
    assert_eq!(run(19, Schedule::Forward)[..64], [u32::MAX; 64]);
    assert_eq!(run(19, Schedule::Reverse)[..64], right);
    // A buffer refilled under its reader: right only if the copy was late.
    let kept: Vec<u32> = (0..64).collect();
    assert_eq!(run(20, Schedule::Forward)[..64], kept);
    assert_ne!(run(20, Schedule::Reverse)[..64], kept);
}

#[test]
fn a_stack_overflow_is_caught() {
    if cfg!(not(kvc_emu_sanitize)) {
        must_fault(26, 0, FaultKind::Stack);
    }
}

#[test]
fn impossible_launches_are_refused() {
    let go = |name: &str, grid: [u32; 3], threads, shared| {
        let params = Probe { input: 0, output: 0, mode: 99, n: 0 };
        // SAFETY: mode 99 touches no memory.
        unsafe { launch(name, grid, threads, shared, &params, Options::default()) }
    };
    assert_eq!(go("kvc_probe_bug", [1, 1, 1], 64, 0), Ok(()));
    for (name, grid, threads, shared) in [
        ("kvc_no_such_kernel", [1, 1, 1], 32, 0),
        ("kvc_append", [1, 1, 1], 32, 0),
        ("kvc_probe_bug", [0, 1, 1], 64, 0),
        ("kvc_probe_bug", [1, 65536, 1], 64, 0),
        ("kvc_probe_bug", [1, 1, 1], 0, 0),
        ("kvc_probe_bug", [1, 1, 1], 96, 0),
        ("kvc_probe_bug", [1, 1, 1], 64, 228 << 10),
    ] {
        assert_eq!(go(name, grid, threads, shared).unwrap_err().kind, FaultKind::Launch);
    }
}

/// Runs one planted bug in a process of its own and returns what it wrote before it died.
#[cfg(kvc_emu_sanitize)]
fn dies(mode: u32, n: u32) -> String {
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "planted_for_a_sanitizer", "--ignored", "--nocapture"])
        .env("KVC_PLANT", format!("{mode} {n}"))
        .output()
        .unwrap();
    assert!(!output.status.success());
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
#[ignore = "the body of the next test's processes"]
fn planted_for_a_sanitizer() {
    let plan = std::env::var("KVC_PLANT").unwrap_or_else(|_| "0 0".into());
    let (mode, n) = plan.split_once(' ').unwrap();
    plant(mode.parse().unwrap(), n.parse().unwrap(), Options::default()).unwrap();
}

#[test]
fn sanitizers_see_their_bugs() {
    #[cfg(not(kvc_emu_sanitize))]
    eprintln!("skipped: built without KVCACHE_EMU_SANITIZE=1");
    #[cfg(kvc_emu_sanitize)]
    for (mode, n, text) in [
        (4, 256, "AddressSanitizer"),
        (5, 0, "AddressSanitizer: use-after-poison"),
        (7, 256, "AddressSanitizer"),
        (8, 67, "AddressSanitizer: use-after-poison"),
        (26, 0, "AddressSanitizer: stack-overflow"),
        (27, 5, "AddressSanitizer: stack-buffer-overflow"),
        (28, 0x7fff_ffff, "signed integer overflow"),
    ] {
        let report = dies(mode, n);
        assert!(report.contains(text), "mode {mode}: {report}");
    }
}
