//! What the device's calls promise, held against a device that only writes down what it is asked:
//! nothing but launches (and a memset) is enqueued, so that all of it can be captured; no address is
//! followed on the host; what kvc_device_attend_kernel names is what runs; the workspace that is asked
//! for maxima is enough for every smaller call.

use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::ffi::{CStr, c_void};
use core::ptr::{null, null_mut, without_provenance, without_provenance_mut};
use std::sync::Mutex;

use super::append::kvc_append_desc_init;
use super::attend::{kvc_attend_desc, kvc_attend_desc_init};
use super::device::{OpenDevice, kvc_device, kvc_device_close};
use super::device_cascade::{kvc_device_cascade, kvc_device_cascade_workspace_size};
use super::device_copy::{kvc_device_copy, kvc_device_copy_desc, kvc_device_copy_desc_init};
use super::device_kernels::*;
use super::device_merge::{kvc_device_merge, kvc_device_merge_desc, kvc_device_merge_desc_init};
use super::device_prefix::*;
use super::handle;
use super::info::*;
use super::prefix::{kvc_prefix_create, kvc_prefix_destroy};
use super::status::{KVC_OK, kvc_status};
use crate::device::{Backend, Device, Stream};
use crate::error::Result;
use crate::kernels::{Launch, SM90_SHARED_BYTES};

/// A device that runs nothing.
#[derive(Debug, Default)]
struct Notebook(Mutex<Vec<String>>);

impl Notebook {
    fn note(&self, what: &str) {
        self.0.lock().unwrap().push(what.to_string());
    }

    fn take(&self) -> Vec<String> {
        core::mem::take(&mut self.0.lock().unwrap())
    }
}

impl Backend for Notebook {
    fn device(&self) -> Device {
        Device::Emu
    }
    fn name(&self) -> &str {
        "notebook"
    }
    fn multiprocessors(&self) -> u32 {
        132
    }
    fn multiprocessor_shared_bytes(&self) -> u32 {
        SM90_SHARED_BYTES
    }
    fn alloc(&self, _: u64) -> Result<u64> {
        self.note("alloc");
        Ok(1 << 40)
    }
    unsafe fn free(&self, _: u64) {
        self.note("free");
    }
    unsafe fn upload(&self, _: u64, _: &[u8], _: Stream) -> Result<()> {
        self.note("upload");
        Ok(())
    }
    unsafe fn download(&self, _: u64, _: &mut [u8], _: Stream) -> Result<()> {
        self.note("download");
        Ok(())
    }
    unsafe fn copy(&self, _: u64, _: u64, _: u64, _: Stream) -> Result<()> {
        self.note("copy");
        Ok(())
    }
    unsafe fn zero(&self, _: u64, _: u64, _: Stream) -> Result<()> {
        self.note("zero");
        Ok(())
    }
    unsafe fn launch(&self, launch: &Launch, _: *const c_void, _: usize, _: Stream) -> Result<()> {
        self.note(launch.kernel.name);
        Ok(())
    }
    fn sync(&self, _: Stream) -> Result<()> {
        self.note("sync");
        Ok(())
    }
}

fn ok(status: kvc_status) {
    assert_eq!(status, KVC_OK);
}

fn made<T>(init: unsafe extern "C" fn(*mut T, u32) -> kvc_status) -> T {
    // SAFETY: for structs of the ABI, which are integers, floats and pointers.
    let mut made: T = unsafe { core::mem::zeroed() };
    // SAFETY: the struct is of the size given.
    ok(unsafe { init(&mut made, size_of::<T>() as u32) });
    made
}

/// An address that faults where it is followed.
fn nowhere<T>() -> *mut T {
    without_provenance_mut(1 << 40)
}

fn opened() -> (Arc<Notebook>, *mut kvc_device) {
    let notebook = Arc::new(Notebook::default());
    let device = handle::publish(OpenDevice(notebook.clone())).unwrap();
    (notebook, device)
}

fn attention(format: u32, dtype: u32, dim: u32) -> kvc_attend_desc {
    let mut desc = made(kvc_attend_desc_init);
    (desc.q_heads, desc.kv_heads) = (8, 2);
    (desc.k_dim, desc.v_dim) = (dim, dim);
    (desc.format, desc.q_dtype, desc.out_dtype) = (format, dtype, dtype);
    (desc.block_tokens, desc.num_blocks, desc.seqs) = (16, 1000, 12);
    (desc.k, desc.v, desc.q, desc.out) = (nowhere(), nowhere(), nowhere(), nowhere());
    (desc.table, desc.table_stride, desc.kv_lens) = (nowhere(), 64, nowhere());
    (desc.lse, desc.bad_block) = (nowhere(), nowhere());
    (desc.workspace, desc.workspace_bytes) = (nowhere(), 1 << 40);
    desc
}

#[test]
fn attention_enqueues_its_plan_and_the_kernel_that_it_names() {
    const DIMS: [u32; 6] = [64, 80, 96, 128, 192, 256];
    let (notebook, device) = opened();
    let floats = [(KVC_FORMAT_F16, KVC_DTYPE_F16), (KVC_FORMAT_BF16, KVC_DTYPE_BF16)];
    let floats = floats.iter().flat_map(|&(format, dtype)| DIMS.map(|dim| (format, dtype, dim)));
    let codes = [KVC_FORMAT_FP8_E4M3, KVC_FORMAT_INT8_T, KVC_FORMAT_INT4_T, KVC_FORMAT_NVFP4];
    let codes = codes.iter().flat_map(|&format| DIMS.map(|dim| (format, KVC_DTYPE_F16, dim)));
    for (format, dtype, dim) in floats.chain(codes) {
        for q_tokens in [1, 2, 8, 9, 600] {
            let mut desc = attention(format, dtype, dim);
            let scales = super::scales::kvc_scales {
                k: nowhere(),
                v: nowhere(),
                ..made(super::scales::kvc_scales_init)
            };
            if !matches!(format, KVC_FORMAT_F16 | KVC_FORMAT_BF16 | KVC_FORMAT_FP8_E4M3) {
                desc.scales = &scales;
            }
            desc.q_indptr = nowhere();
            let mut options = made(kvc_device_attend_options_init);
            (options.max_q_tokens, options.max_kv_tokens) = (q_tokens, 1024);
            let mut name = [0u8; 64];
            // SAFETY: the structs are live, and the addresses are not followed.
            unsafe {
                let to = name.as_mut_ptr().cast();
                ok(kvc_device_attend_kernel(device, &desc, &options, to, 64));
                ok(kvc_device_attend(device, &desc, &options, null_mut()));
                let mut bytes = 0;
                ok(kvc_device_attend_workspace_size(device, &desc, &options, &mut bytes));
                assert!(bytes != 0);
            }
            let name = CStr::from_bytes_until_nul(&name).unwrap().to_str().unwrap();
            let mut did = notebook.take();
            assert_eq!(did.pop().as_deref(), Some(name));
            let plan: &[&str] = if q_tokens <= 8 { &["kvc_decode_plan"] } else { &[] };
            assert_eq!(did, plan, "{name}");
            // Another layer's call needs the kernel alone.
            options.planned = 1;
            // SAFETY: see above.
            ok(unsafe { kvc_device_attend(device, &desc, &options, null_mut()) });
            assert_eq!(notebook.take(), [name]);
        }
    }
    // SAFETY: any handle is taken.
    ok(unsafe { kvc_device_close(device) });
}

#[test]
fn a_workspace_for_maxima_serves_every_smaller_call() {
    let (_, device) = opened();
    for (pieces, latent) in [(0, false), (0, true), (512, false), (512, true)] {
        let size = |seqs: u32, q_tokens: u32, kv_tokens: u32| {
            let mut desc = attention(KVC_FORMAT_BF16, KVC_DTYPE_BF16, 128);
            if latent {
                (desc.kv_heads, desc.k_dim, desc.v_dim, desc.v_in_k) = (1, 576, 512, 1);
            }
            desc.seqs = seqs;
            let mut options = made(kvc_device_attend_options_init);
            (options.max_q_tokens, options.max_kv_tokens) = (q_tokens, kv_tokens);
            options.piece_tokens = pieces;
            let (mut plain, mut cascade) = (0, 0);
            // SAFETY: the structs are live, and the addresses are not followed.
            unsafe {
                ok(kvc_device_attend_workspace_size(device, &desc, &options, &mut plain));
                if !latent {
                    let out = &mut cascade;
                    ok(kvc_device_cascade_workspace_size(device, &desc, &options, 3, out));
                }
            }
            (plain, cascade)
        };
        let most = size(64, if latent { 8 } else { 600 }, 100_000);
        for seqs in [1, 2, 5, 31, 63, 64] {
            for q_tokens in [1, 3, 7, 8] {
                for kv_tokens in [1, 64, 1000, 65_537, 100_000] {
                    let (plain, cascade) = size(seqs, q_tokens, kv_tokens);
                    let what = (seqs, q_tokens, kv_tokens);
                    assert!(plain <= most.0 && cascade <= most.1, "{what:?} {plain} {cascade}");
                }
            }
        }
    }
    // SAFETY: any handle is taken.
    ok(unsafe { kvc_device_close(device) });
}

#[test]
fn every_other_call_enqueues_kernels_alone() {
    let (notebook, device) = opened();
    let mut append = made(kvc_append_desc_init);
    let mut more = made(kvc_device_append_options_init);
    (append.kv_heads, append.k_dim, append.v_dim, append.rows) = (2, 64, 64, 5);
    (append.format, append.dtype) = (KVC_FORMAT_BF16, KVC_DTYPE_BF16);
    (append.block_tokens, append.num_blocks) = (16, 100);
    (append.k, append.v, append.slots) = (nowhere(), nowhere(), nowhere());
    (append.k_rows, append.v_rows, append.positions) = (nowhere(), nowhere(), nowhere());
    (more.rotary_dim, more.table_positions, more.q_heads) = (64, 10, 8);
    (more.cosines, more.sines, more.q) = (nowhere(), nowhere(), nowhere());
    more.q_out = without_provenance_mut(1 << 41);
    let mut copy = made(kvc_device_copy_desc_init);
    (copy.count, copy.run_bytes, copy.planes) = (9, 256, 3);
    (copy.from_blocks, copy.to_blocks, copy.list) = (5, 5, nowhere());
    (copy.from_planes, copy.to_planes) = (nowhere(), nowhere());
    (copy.from_block_stride, copy.to_block_stride) = (256, 256);
    let mut merge = made(kvc_device_merge_desc_init);
    (merge.count, merge.rows, merge.heads, merge.dim) = (3, 7, 2, 64);
    (merge.parts, merge.lse, merge.out) = (nowhere(), nowhere(), without_provenance_mut(1 << 41));
    let cascade = attention(KVC_FORMAT_F16, KVC_DTYPE_F16, 128);
    let mut options = made(kvc_device_attend_options_init);
    options.max_kv_tokens = 1024;
    let (mut prefix, mut copied) = (null_mut(), null_mut());
    let mut lookup = made(kvc_device_lookup_desc_init);
    (lookup.requests, lookup.max_blocks) = (9, 10);
    (lookup.tokens, lookup.indptr) = (nowhere(), without_provenance(1 << 41));
    (lookup.matched, lookup.blocks) = (nowhere(), nowhere());
    let stream = null_mut();
    // SAFETY: the structs are live, and the addresses are not followed.
    unsafe {
        ok(kvc_device_append(device, &append, &more, stream));
        assert_eq!(notebook.take(), ["kvc_append"]);
        ok(kvc_device_copy(device, &copy, stream));
        assert_eq!(notebook.take(), ["kvc_copy"]);
        ok(kvc_device_copy(device, &kvc_device_copy_desc { zero: 1, ..copy }, stream));
        assert_eq!(notebook.take(), ["kvc_zero"]);
        ok(kvc_device_merge(device, &merge, stream));
        ok(kvc_device_merge(device, &kvc_device_merge_desc { rows: 0, ..merge }, stream));
        assert_eq!(notebook.take(), ["kvc_merge"]);

        ok(kvc_device_cascade(device, &cascade, &options, nowhere(), 2, stream));
        let halves = ["kvc_prefill_f16_d128", "kvc_decode_f16_d128", "kvc_merge"];
        let first = ["zero", "kvc_cascade_split", "kvc_decode_plan"];
        assert_eq!(notebook.take(), [&first[..], &halves].concat());
        options.planned = 1;
        ok(kvc_device_cascade(device, &cascade, &options, nowhere(), 2, stream));
        assert_eq!(notebook.take(), halves);
        // Refused calls enqueue nothing.
        let window = kvc_attend_desc { window: 9, ..cascade };
        assert_ne!(kvc_device_cascade(device, &window, &options, nowhere(), 2, stream), KVC_OK);
        let odd = kvc_attend_desc { k_dim: 72, v_dim: 72, ..cascade };
        assert_ne!(kvc_device_attend(device, &odd, &options, stream), KVC_OK);
        let no_list = kvc_device_cascade(device, &cascade, &options, null(), 2, stream);
        assert_ne!(no_list, KVC_OK);
        assert_eq!(notebook.take(), [""; 0]);

        ok(kvc_prefix_create(4, 1, 100, &mut prefix));
        ok(kvc_device_prefix_create(device, prefix, &mut copied));
        notebook.take();
        ok(kvc_device_prefix_lookup(copied, &lookup, stream));
        assert_eq!(notebook.take(), ["kvc_lookup"]);
        // A sync may make room, and waits for nothing.
        ok(kvc_device_prefix_sync(copied, stream, null_mut()));
        let grew = ["alloc", "free", "upload", "upload", "kvc_lookup_patch"];
        assert_eq!(notebook.take(), grew);
        ok(kvc_device_prefix_sync(copied, stream, null_mut()));
        assert_eq!(notebook.take(), grew[2..]);
        ok(kvc_device_prefix_destroy(copied));
        ok(kvc_prefix_destroy(prefix));
        ok(kvc_device_close(device));
    }
}
