//! A GPU to measure on: memory full of random numbers, calls over buffers that are too many to stay
//! in its cache, timed by events around a replayed graph.

use std::sync::Arc;

use kvcache::cuda::{Cuda, Event, Graph, Queue};
use kvcache::device::{Backend, DeviceMemory, Stream};
use kvcache::dtype::bf16;
use kvcache::error::Result;
use kvcache::kernels::Launch;

pub struct Gpu {
    pub cuda: Arc<Cuda>,
    pub backend: Arc<dyn Backend>,
    pub queue: Queue,
    pub stream: Stream,
    /// 64 MiB of random bf16, the source of all content.
    noise: DeviceMemory,
}

/// Microseconds of one call.
#[derive(Debug, Clone, Copy)]
pub struct Sample {
    pub median_us: f64,
    pub p10_us: f64,
    pub p90_us: f64,
}

const NOISE_BYTES: u64 = 64 << 20;
/// Replays that are timed, after those that warm up.
const REPLAYS: usize = 40;
const WARM_UP: usize = 5;
/// Microseconds that a replay should take at least, so that events measure it well.
const REPLAY_US: f64 = 200.0;

impl Gpu {
    pub fn open() -> Result<Self> {
        let cuda = Cuda::open(0)?;
        let backend: Arc<dyn Backend> = cuda.clone();
        let queue = Queue::new(&cuda)?;
        // SAFETY: a stream of this device, which lives as long as this object.
        let stream = unsafe { Stream::from_raw(queue.as_raw()) };
        let mut noise = DeviceMemory::new(&backend, NOISE_BYTES)?;
        let mut state = 0x9e37_79b9_7f4a_7c15u64;
        let values: Vec<u8> = (0..NOISE_BYTES / 2)
            .flat_map(|_| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                let x = (state >> 40) as f32 / (1u64 << 24) as f32;
                bf16::from_f32(4.0 * x - 2.0).to_ne_bytes()
            })
            .collect();
        noise.upload(0, &values, stream)?;
        Ok(Self { cuda, backend, queue, stream, noise })
    }

    /// Memory of random bf16 numbers.
    pub fn random(&self, bytes: u64) -> Result<DeviceMemory> {
        let memory = DeviceMemory::new(&self.backend, bytes)?;
        for at in (0..bytes).step_by(NOISE_BYTES as usize) {
            let part = NOISE_BYTES.min(bytes - at);
            // SAFETY: both ranges are within their memory.
            unsafe {
                self.backend.copy(self.noise.address(), memory.address() + at, part, self.stream)
            }?;
        }
        self.queue.sync()?;
        Ok(memory)
    }

    /// Memory with these numbers.
    pub fn put<const N: usize>(
        &self,
        values: impl Iterator<Item = [u8; N]>,
    ) -> Result<DeviceMemory> {
        let bytes: Vec<u8> = values.flatten().collect();
        let mut memory = DeviceMemory::new(&self.backend, bytes.len() as u64)?;
        memory.upload(0, &bytes, self.stream)?;
        Ok(memory)
    }

    /// Bytes that are free, less a margin.
    pub fn room(&self) -> Result<u64> {
        Ok(self.cuda.facts()?.memory_bytes.1 / 10 * 8)
    }

    /// How many sets of `bytes` bytes must take turns so that a call finds nothing of its own in the
    /// cache.
    pub fn sets(&self, bytes: u64) -> Result<usize> {
        let enough = (2 * self.cuda.facts()?.l2_bytes).max(100 << 20);
        Ok(enough.div_ceil(bytes.max(1)).clamp(1, 256) as usize)
    }

    /// Times a call: `enqueue(i)` puts the call on set `i` of `sets` on the stream.
    pub fn time(&self, sets: usize, enqueue: impl Fn(usize) -> Result<()>) -> Result<Sample> {
        let (start, end) = (Event::new(&self.cuda)?, Event::new(&self.cuda)?);
        // Once without a graph: errors come out here, and the time says how many calls to a replay.
        enqueue(0)?;
        self.queue.sync()?;
        start.record(&self.queue)?;
        enqueue(sets - 1)?;
        end.record(&self.queue)?;
        self.queue.sync()?;
        let once_us = f64::from(end.milliseconds_since(&start)?) * 1e3;
        // All sets at least once, so that a replay finds nothing of the one before in the cache.
        let calls = ((REPLAY_US / once_us.max(1.0)) as usize).clamp(1, 64).max(sets);
        let graph =
            Graph::capture(&self.queue, || (0..calls).try_for_each(|call| enqueue(call % sets)))?;
        let mut times = Vec::with_capacity(REPLAYS);
        for replay in 0..WARM_UP + REPLAYS {
            start.record(&self.queue)?;
            graph.launch(&self.queue)?;
            end.record(&self.queue)?;
            self.queue.sync()?;
            if replay >= WARM_UP {
                times.push(f64::from(end.milliseconds_since(&start)?) * 1e3 / calls as f64);
            }
        }
        times.sort_by(f64::total_cmp);
        let at = |share: f64| times[((times.len() - 1) as f64 * share).round() as usize];
        Ok(Sample { median_us: at(0.5), p10_us: at(0.1), p90_us: at(0.9) })
    }

    /// Puts a kernel on the stream.
    pub fn enqueue<P>(&self, launch: &Launch, params: &P) -> Result<()> {
        let (at, bytes) = (std::ptr::from_ref(params).cast(), size_of::<P>());
        // SAFETY: the parameters were made for this kernel, from memory that outlives the timing.
        unsafe { self.backend.launch(launch, at, bytes, self.stream) }
    }

    /// GB/s of the driver's copy within the device, bytes read and bytes written counted: the better
    /// of copies on a stream and of copies in a graph, which the driver does in different ways.
    pub fn copy_bandwidth(&self, bytes: u64) -> Result<f64> {
        let (from, to) = (self.random(bytes)?, self.random(bytes)?);
        // SAFETY: both have these bytes.
        let copy =
            || unsafe { self.backend.copy(from.address(), to.address(), bytes, self.stream) };
        let in_graph = self.time(1, |_| copy())?.median_us;
        let (start, end) = (Event::new(&self.cuda)?, Event::new(&self.cuda)?);
        let mut times = Vec::with_capacity(REPLAYS);
        for _ in 0..REPLAYS {
            start.record(&self.queue)?;
            copy()?;
            end.record(&self.queue)?;
            self.queue.sync()?;
            times.push(f64::from(end.milliseconds_since(&start)?) * 1e3);
        }
        times.sort_by(f64::total_cmp);
        Ok(2.0 * bytes as f64 / in_graph.min(times[times.len() / 2]) / 1e3)
    }

    /// Blocks `0..blocks` in an order as scattered as a pool's after a while, always the same one.
    pub fn scattered(blocks: u64) -> Vec<i32> {
        let mut ids: Vec<i32> = (0..blocks as i32).collect();
        let mut state = 0x2545_f491_4f6c_dd1du64;
        for i in (1..ids.len()).rev() {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            ids.swap(i, (state % (i as u64 + 1)) as usize);
        }
        ids
    }
}
