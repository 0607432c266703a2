//! `--tier`: blocks that outlive their stay on the device or the run: in host memory, on a disk, or in
//! a remote store.

use std::error::Error;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use kvcache::cache::{Demotion, KvCache, LowerTier, TierOptions};
use kvcache::ids::Namespace;
use kvcache::layout::slice::Slice;
use kvcache::prefix::Digest;
use kvcache::tier::disk::{DiskOptions, DiskStore, Recovery};
use kvcache::tier::{Configuration, Store, TierKind, TierSettings};

/// How long the engine waits for a prompt's blocks, and at its end for all to be written.
const WAIT: Duration = Duration::from_secs(10);
/// What a disk tier may take.
const DISK_BYTES: u64 = 1 << 30;

/// What the command line names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TierArg {
    Host(usize),
    Disk(String),
    Remote(String),
}

impl TierArg {
    pub fn parse(text: &str) -> Result<Self, Box<dyn Error>> {
        match text.split_once(':') {
            Some(("host", blocks)) => Ok(TierArg::Host(blocks.parse()?)),
            Some(("disk", dir)) if !dir.is_empty() => Ok(TierArg::Disk(dir.into())),
            Some(("remote", address)) if !address.is_empty() => Ok(TierArg::Remote(address.into())),
            _ => Err("--tier takes host:BLOCKS, disk:DIR or remote:ADDRESS".into()),
        }
    }
}

/// A name of the model that its weights go into: objects of other weights are other objects.
pub fn model_name(weights: &[u8]) -> String {
    let words: Vec<u32> = weights
        .chunks(4)
        .map(|four| four.iter().rev().fold(0, |word, &byte| word << 8 | u32::from(byte)))
        .collect();
    Digest::of_block(None, &words).0.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Gives the cache its tier; what a disk had.
pub fn attach(
    cache: &mut KvCache,
    arg: &TierArg,
    model: &str,
) -> Result<Option<Recovery>, Box<dyn Error>> {
    let (mut options, mut found) = (TierOptions::host(model, 0), None);
    match arg {
        TierArg::Host(blocks) => options.host_blocks = *blocks,
        TierArg::Disk(dir) => {
            let config = Configuration::new(model, cache.spec(), &Slice::whole(cache.spec()))?;
            let disk = DiskOptions::new(Path::new(dir), DISK_BYTES);
            let (store, recovery) = DiskStore::open(&disk, &config)?;
            found = Some(recovery);
            options.lower.push(lower(Arc::new(store), TierKind::Disk));
        }
        TierArg::Remote(address) => {
            options.lower.push(lower(open_remote(address)?, TierKind::Remote));
        }
    }
    options.transit_blocks = 1024;
    cache.attach_tiers(options)?;
    Ok(found)
}

/// A tier that gets what is committed.
fn lower(store: Arc<dyn Store>, kind: TierKind) -> LowerTier {
    let settings = TierSettings { kind, readers: 2, writers: 1, queued_blocks: 256 };
    let demotion = Demotion { on_commit: true, ..Demotion::default() };
    LowerTier { store, settings, demotion }
}

#[cfg(feature = "remote")]
fn open_remote(address: &str) -> Result<Arc<dyn Store>, Box<dyn Error>> {
    use kvcache::tier::remote::{RemoteOptions, open};
    Ok(open(address, &RemoteOptions::default())?)
}

#[cfg(not(feature = "remote"))]
fn open_remote(_: &str) -> Result<Arc<dyn Store>, Box<dyn Error>> {
    Err("--tier remote needs the feature remote".into())
}

/// Loads what lower tiers have of a prompt. Nothing to do for a cache without.
pub fn load(cache: &mut KvCache, prompt: &[u32]) -> Result<(), Box<dyn Error>> {
    if cache.configuration().is_some() {
        let mut prefetch = cache.prefetch(prompt, Namespace::default())?;
        cache.wait_prefetch(&mut prefetch, WAIT);
    }
    Ok(())
}

/// Waits until the lower tiers have everything.
pub fn flush(cache: &mut KvCache) {
    if !cache.flush_tiers(WAIT) {
        eprintln!("generate: the tier did not take everything in {} s", WAIT.as_secs());
    }
}

/// What each tier did.
pub fn print(cache: &KvCache, found: Option<Recovery>) {
    if let Some(found) = found {
        println!("{:<34}{} blocks found, {} dropped", "disk tier", found.objects, {
            found.damaged_records + found.truncated_objects + found.excess_objects
        });
    }
    for report in cache.tier_reports() {
        let c = report.counters;
        println!(
            "{:<34}{} blocks stored, {} loaded, {} bad, {} dropped, {} failures",
            format!("{} tier", report.kind.name()),
            c.stored,
            c.loaded,
            c.bad,
            c.dropped,
            c.failures
        );
    }
}
