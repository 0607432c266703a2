//! Lookup of 256 requests of 1k tokens in an index of 100,000 blocks of 16 tokens that lies on the
//! device: all of a request found, half of it, nothing. And what an upload of changes takes.

use kvcache::device::DeviceMemory;
use kvcache::error::{Error, Result};
use kvcache::ids::{BlockId, Namespace};
use kvcache::kernels::params::{In, Out};
use kvcache::kernels::{LookupBatch, LookupImage, LookupUpload};
use kvcache::prefix::PrefixIndex;
use serde_json::json;

use crate::Line;
use crate::gpu::Gpu;

const REQUESTS: usize = 256;
const TOKENS: usize = 1024;
const BLOCK: usize = 16;
/// Short sequences that make the index large, and the blocks of each.
const SEQUENCES: usize = 10_000;
const BLOCKS_A_SEQUENCE: usize = 10;

pub fn run(gpu: &Gpu, filter: &str, report: &mut impl FnMut(Line)) -> Result<()> {
    let name = |what: &str| format!("lookup {REQUESTS} x {TOKENS} tokens {what}");
    let kinds = ["found", "half found", "not found"];
    if !kinds.iter().any(|kind| name(kind).contains(filter)) {
        return Ok(());
    }
    let mut index = PrefixIndex::new(BLOCK, 1, 1 << 17)?;
    let mut next_block = 0;
    let cached: Vec<Vec<u32>> = (0..REQUESTS).map(|i| tokens(i as u64, TOKENS)).collect();
    let filler = (0..SEQUENCES).map(|i| tokens((1 << 32) | i as u64, BLOCKS_A_SEQUENCE * BLOCK));
    for sequence in cached.iter().cloned().chain(filler) {
        insert(&mut index, &sequence, &mut next_block)?;
    }
    let image = LookupImage::new(&index)?;
    let memory = DeviceMemory::new(&gpu.backend, image.bytes())?;
    let flag = gpu.put([0u32.to_ne_bytes()].into_iter())?;
    index.start_mirror()?;
    let mut upload = LookupUpload::default();
    image.sync(&mut index, &mut upload)?;
    apply(gpu, &image, &memory, &upload, &flag)?;

    let known = [TOKENS, TOKENS / 2, 0];
    for (kind, what) in kinds.iter().enumerate() {
        if !name(what).contains(filter) {
            continue;
        }
        let requests: Vec<Vec<u32>> = cached
            .iter()
            .enumerate()
            .map(|(i, tokens_of)| {
                let mut request = tokens_of[..known[kind]].to_vec();
                request.extend(tokens((2 << 32) | i as u64, TOKENS - known[kind]));
                request
            })
            .collect();
        look_up(gpu, &image, &memory, report, &requests, known[kind], name(what))?;
    }

    // What a step changes: 16 sequences of two blocks each.
    for i in 0..16 {
        insert(&mut index, &tokens((3 << 32) | i, 2 * BLOCK), &mut next_block)?;
    }
    image.sync(&mut index, &mut upload)?;
    let (patches, words) = put(gpu, &upload)?;
    let at = (In::at(patches.address()), In::at(words.address()));
    let flag_at = Out::at(flag.address());
    if let Some((launch, params)) =
        image.patch_launch(memory.address(), &upload, at.0, at.1, flag_at)?
    {
        let sample = gpu.time(1, |_| gpu.enqueue(&launch, &params))?;
        let bytes = 8 * upload.words.len() as u64;
        let name = format!("lookup upload of 32 new blocks, {} runs", upload.patches.len());
        let shape = json!({ "op": "lookup upload", "blocks": 32, "runs": upload.patches.len() });
        report(Line { name, shape, bytes, flops: 0, sample });
    }
    Ok(())
}

fn look_up(
    gpu: &Gpu,
    image: &LookupImage,
    memory: &DeviceMemory,
    report: &mut impl FnMut(Line),
    requests: &[Vec<u32>],
    want: usize,
    name: String,
) -> Result<()> {
    let flat = gpu.put(requests.iter().flatten().map(|token| token.to_ne_bytes()))?;
    let indptr = gpu.put((0..=REQUESTS).map(|i| ((i * TOKENS) as i32).to_ne_bytes()))?;
    let max_blocks = TOKENS / BLOCK;
    let words = |count: usize| DeviceMemory::new(&gpu.backend, 4 * count as u64);
    let (matched, blocks) = (words(REQUESTS)?, words(REQUESTS * max_blocks)?);
    let (tails, tail_blocks) = (words(REQUESTS)?, words(REQUESTS)?);
    let call = LookupBatch {
        requests: REQUESTS as u32,
        tokens: In::at(flat.address()),
        indptr: In::at(indptr.address()),
        namespaces: In::at(0),
        leave: 0,
        max_blocks: max_blocks as u32,
        matched: Out::at(matched.address()),
        blocks: Out::at(blocks.address()),
        block_stride: max_blocks as i64,
        tail_tokens: Out::at(tails.address()),
        tail_blocks: Out::at(tail_blocks.address()),
        error_flag: Out::at(0),
    };
    let Some((launch, params)) = image.lookup_launch(memory.address(), &call)? else {
        return Ok(());
    };
    let sample = gpu.time(1, |_| gpu.enqueue(&launch, &params))?;
    let mut found = vec![0u8; 4 * REQUESTS];
    matched.download(0, &mut found, gpu.stream)?;
    if found.chunks(4).any(|word| word != (want as u32).to_ne_bytes()) {
        let (what, why) = ("lookup", "must find what the index has");
        return Err(Error::InvalidArgument { what, why });
    }
    // The tokens of the requests and, once more, those that they are compared with.
    let bytes = (REQUESTS * 4 * (TOKENS + want)) as u64;
    let shape = json!({
        "op": "lookup", "requests": REQUESTS, "tokens": TOKENS, "block_tokens": BLOCK,
        "found_tokens": want,
    });
    report(Line { name, shape, bytes, flops: 0, sample });
    Ok(())
}

/// Tokens that are the same for the same seed; other seeds part at the first.
fn tokens(seed: u64, count: usize) -> Vec<u32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..count)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add((seed << 1) | 1);
            (state >> 45) as u32
        })
        .collect()
}

fn insert(index: &mut PrefixIndex, tokens: &[u32], next_block: &mut u32) -> Result<()> {
    let count = (tokens.len() / BLOCK) as u32;
    let ids: Vec<BlockId> = (*next_block..*next_block + count).map(BlockId).collect();
    *next_block += count;
    index.insert(Namespace(0), tokens, &ids, &mut Vec::new())?;
    Ok(())
}

fn put(gpu: &Gpu, upload: &LookupUpload) -> Result<(DeviceMemory, DeviceMemory)> {
    let patches = gpu.put(upload.patches.iter().flat_map(|patch| {
        [patch.to as u32, (patch.to >> 32) as u32, patch.from, patch.words].map(u32::to_ne_bytes)
    }))?;
    Ok((patches, gpu.put(upload.words.iter().map(|word| word.to_ne_bytes()))?))
}

fn apply(
    gpu: &Gpu,
    image: &LookupImage,
    memory: &DeviceMemory,
    upload: &LookupUpload,
    flag: &DeviceMemory,
) -> Result<()> {
    let (patches, words) = put(gpu, upload)?;
    let at = (In::at(patches.address()), In::at(words.address()));
    let flag = Out::at(flag.address());
    if let Some((launch, params)) =
        image.patch_launch(memory.address(), upload, at.0, at.1, flag)?
    {
        gpu.enqueue(&launch, &params)?;
    }
    gpu.queue.sync()
}
