//! A device whose work is done when somebody waits for it, and in any order that its streams and their
//! marks allow: what a missing event would leave to chance is chosen here. Under it lies the emulator, or
//! plain memory without kernels. It can fail copies, and forget what one stream was told to wait for.

// Not every test uses all of it.
#![allow(dead_code)]

use core::ffi::c_void;
use core::ptr::NonNull;
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard};

use kvcache::device::{Backend, Device, HostCopy, Mark, Stream, Way};
use kvcache::error::{Error, Result};
use kvcache::kernels::Launch;

/// When work is done that nobody waits for yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pace {
    /// Never: as late as can be.
    Lazy,
    /// On the side streams at once, as far as it need not wait; on the cache's never.
    EagerSides,
    /// Now and then, anywhere, by this seed.
    Random(u64),
}

impl Pace {
    pub const ALL: [Pace; 4] = [Pace::Lazy, Pace::EagerSides, Pace::Random(1), Pace::Random(2)];
}

/// What copies between device and host do wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trouble {
    None,
    /// They are refused when they are enqueued; the device goes on.
    Refused,
    /// They are enqueued, and the device fails when it comes to them; for good.
    Failing,
}

type Work = Box<dyn FnOnce(&dyn Backend) -> Result<()> + Send>;

enum Op {
    Do(Work),
    /// Copies: as many ranges, of which the host's are these.
    Copy(Work, Vec<(usize, usize)>),
    Pass(usize),
    Hold(usize),
}

#[derive(Default)]
struct State {
    streams: BTreeMap<usize, VecDeque<Op>>,
    /// Marks: their stream, and whether it has passed them.
    marks: BTreeMap<usize, (usize, bool)>,
    /// Opened, in this order, and not closed.
    sides: Vec<usize>,
    next: usize,
    rng: u64,
    failed: bool,
    /// Allocations: on the device, and of the host.
    memory: BTreeMap<u64, u64>,
    host: BTreeMap<usize, usize>,
}

pub struct Late {
    inner: Arc<dyn Backend>,
    pace: Pace,
    state: Mutex<State>,
    pub trouble: Mutex<Trouble>,
    /// Whether host memory is refused.
    pub no_host_memory: Mutex<bool>,
    /// A pair of streams, the second of which does not wait for the first when it is told to.
    pub forgets: Mutex<Option<(usize, usize)>>,
    /// Calls of `copy_host`, and ranges.
    pub copied: Mutex<(usize, usize)>,
}

impl core::fmt::Debug for Late {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Late").field("pace", &self.pace).finish_non_exhaustive()
    }
}

const DEAD: Error =
    Error::DeviceFailed { call: "late", why: "the device has failed, as it was told" };

/// The cache's stream, and the side streams in the order in which they are opened.
pub const CACHE: usize = 0;
pub const DOWN: usize = 1;
pub const UP: usize = 2;

fn stream(number: usize) -> Stream {
    // SAFETY: never given to a driver.
    unsafe { Stream::from_raw(core::ptr::without_provenance_mut(number)) }
}

fn number(stream: Stream) -> usize {
    stream.as_raw().addr()
}

impl Late {
    pub fn new(inner: Arc<dyn Backend>, pace: Pace) -> Arc<Self> {
        let rng = if let Pace::Random(seed) = pace { seed } else { 0 };
        Arc::new(Self {
            inner,
            pace,
            state: Mutex::new(State { rng, ..State::default() }),
            trouble: Mutex::new(Trouble::None),
            no_host_memory: Mutex::new(false),
            forgets: Mutex::new(None),
            copied: Mutex::new((0, 0)),
        })
    }

    /// One without kernels.
    pub fn memory(pace: Pace) -> Arc<Self> {
        Self::new(Arc::new(Memory::default()), pace)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// Ranges on the side streams that were not copied yet.
    pub fn waits(&self) -> usize {
        let state = self.state();
        let ranges = |op: &Op| if let Op::Copy(_, ranges) = op { ranges.len() } else { 0 };
        state.streams.iter().filter(|(n, _)| **n != CACHE).flat_map(|(_, s)| s).map(ranges).sum()
    }

    /// Side streams that are open, host allocations, allocations, marks that were not ended.
    pub fn left(&self) -> [usize; 4] {
        let state = self.state();
        [state.sides.len(), state.host.len(), state.memory.len(), state.marks.len()]
    }

    /// The largest allocation, which is a pool.
    pub fn pool(&self) -> u64 {
        *self.state().memory.iter().max_by_key(|(_, bytes)| **bytes).unwrap().0
    }

    /// What a kernel that is enqueued on the cache's stream now would see.
    pub fn read(&self, from: u64, bytes: usize) -> Vec<u8> {
        let mut to = vec![0; bytes];
        // SAFETY: within the pool, which lives as long as the cache.
        unsafe { self.download(from, &mut to, Stream::DEFAULT) }.unwrap();
        to
    }

    fn random(state: &mut State, below: usize) -> usize {
        state.rng = state.rng.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state.rng >> 33) as usize % below.max(1)
    }

    /// Does the first thing on a stream, where it need not wait; whether it did.
    fn advance(&self, state: &mut State, n: usize) -> bool {
        let State { streams, marks, .. } = state;
        let Some(queue) = streams.get_mut(&n) else { return false };
        if let Some(Op::Hold(mark)) = queue.front()
            && marks.get(mark).is_some_and(|(_, passed)| !passed)
        {
            return false;
        }
        let Some(op) = queue.pop_front() else { return false };
        match op {
            _ if state.failed => {}
            Op::Do(work) => state.failed |= work(&*self.inner).is_err(),
            Op::Copy(..) if *self.trouble.lock().unwrap() == Trouble::Failing => {
                state.failed = true;
            }
            Op::Copy(work, _) => state.failed |= work(&*self.inner).is_err(),
            Op::Hold(_) => {}
            Op::Pass(mark) => {
                if let Some((_, passed)) = state.marks.get_mut(&mark) {
                    *passed = true;
                }
            }
        }
        true
    }

    /// Works on stream `n` until `done`, on others only as far as it waits for them.
    fn drive(&self, state: &mut State, n: usize, done: &dyn Fn(&State) -> bool) {
        while !done(state) && !state.failed {
            if self.advance(state, n) {
                continue;
            }
            let front = state.streams.get(&n).and_then(|queue| queue.front());
            let Some(&Op::Hold(mark)) = front else { return };
            let other = state.marks[&mark].0;
            assert_ne!(other, n, "a stream waits for itself");
            self.drive(state, other, &|state| state.marks[&mark].1);
        }
    }

    /// What happens by itself.
    fn stir(&self, state: &mut State) {
        match self.pace {
            Pace::Lazy => {}
            Pace::EagerSides => {
                for n in state.sides.clone() {
                    while self.advance(state, n) {}
                }
            }
            Pace::Random(_) => {
                for _ in 0..Self::random(state, 4) {
                    let numbers: Vec<usize> = state.streams.keys().copied().collect();
                    let n = numbers.get(Self::random(state, numbers.len())).copied();
                    n.map(|n| self.advance(state, n));
                }
            }
        }
    }

    fn enqueue(&self, to: Stream, op: Op) -> Result<()> {
        let mut state = self.state();
        if state.failed {
            return Err(DEAD);
        }
        state.streams.entry(number(to)).or_default().push_back(op);
        self.stir(&mut state);
        Ok(())
    }

    fn finish(&self, n: usize) -> Result<()> {
        let mut state = self.state();
        self.drive(&mut state, n, &|state| {
            state.streams.get(&n).is_none_or(|queue| queue.is_empty())
        });
        if state.failed { Err(DEAD) } else { Ok(()) }
    }

    fn finish_all(&self) {
        let numbers: Vec<usize> = self.state().streams.keys().copied().collect();
        for n in numbers {
            let _ = self.finish(n);
        }
    }
}

impl Backend for Late {
    fn device(&self) -> Device {
        Device::Cuda { ordinal: 0 }
    }
    fn name(&self) -> &str {
        "late"
    }
    fn multiprocessors(&self) -> u32 {
        self.inner.multiprocessors()
    }
    fn multiprocessor_shared_bytes(&self) -> u32 {
        self.inner.multiprocessor_shared_bytes()
    }
    fn alloc(&self, bytes: u64) -> Result<u64> {
        let address = self.inner.alloc(bytes)?;
        self.state().memory.insert(address, bytes);
        Ok(address)
    }
    unsafe fn free(&self, address: u64) {
        self.finish_all();
        self.state().memory.remove(&address);
        // SAFETY: the caller's promise, and nothing is under way.
        unsafe { self.inner.free(address) }
    }
    unsafe fn upload(&self, to: u64, from: &[u8], stream: Stream) -> Result<()> {
        let from = from.to_vec();
        // SAFETY: the caller's promise.
        let work = move |on: &dyn Backend| unsafe { on.upload(to, &from, Stream::DEFAULT) };
        self.enqueue(stream, Op::Do(Box::new(work)))
    }
    unsafe fn download(&self, from: u64, to: &mut [u8], stream: Stream) -> Result<()> {
        self.sync(stream)?;
        // SAFETY: the caller's promise.
        unsafe { self.inner.download(from, to, Stream::DEFAULT) }
    }
    unsafe fn copy(&self, from: u64, to: u64, bytes: u64, stream: Stream) -> Result<()> {
        // SAFETY: the caller's promise.
        let work = move |on: &dyn Backend| unsafe { on.copy(from, to, bytes, Stream::DEFAULT) };
        self.enqueue(stream, Op::Do(Box::new(work)))
    }
    unsafe fn zero(&self, at: u64, bytes: u64, stream: Stream) -> Result<()> {
        // SAFETY: the caller's promise.
        let work = move |on: &dyn Backend| unsafe { on.zero(at, bytes, Stream::DEFAULT) };
        self.enqueue(stream, Op::Do(Box::new(work)))
    }
    unsafe fn launch(
        &self,
        launch: &Launch,
        params: *const c_void,
        bytes: usize,
        stream: Stream,
    ) -> Result<()> {
        let mut words = vec![0u64; bytes.div_ceil(8)];
        // SAFETY: the caller's promise: that many bytes.
        unsafe {
            core::ptr::copy_nonoverlapping(params.cast::<u8>(), words.as_mut_ptr().cast(), bytes)
        };
        let launch = *launch;
        // SAFETY: the caller's promise, until the kernel has run.
        let work = move |on: &dyn Backend| unsafe {
            on.launch(&launch, words.as_ptr().cast(), bytes, Stream::DEFAULT)
        };
        self.enqueue(stream, Op::Do(Box::new(work)))
    }
    fn open_stream(&self) -> Result<Stream> {
        let mut state = self.state();
        let taken = |n: &usize| state.sides.contains(n);
        let n = (1..).find(|n| !taken(n)).unwrap();
        state.sides.push(n);
        Ok(stream(n))
    }
    unsafe fn close_stream(&self, stream: Stream) {
        // What is enqueued still runs.
        let _ = self.finish(number(stream));
        self.state().sides.retain(|n| *n != number(stream));
    }
    fn fence(&self, before: Stream, after: Stream) -> Result<()> {
        let mark = self.mark(before)?;
        self.hold(after, mark)
        // The mark stays: nobody ends it, and somebody may still wait for it.
    }
    fn sync(&self, stream: Stream) -> Result<()> {
        self.finish(number(stream))
    }
    fn locks_pages(&self) -> bool {
        true
    }
    fn alloc_host(&self, bytes: usize) -> Result<NonNull<u8>> {
        if *self.no_host_memory.lock().unwrap() {
            return Err(Error::OutOfMemory { bytes: bytes as u64 });
        }
        let at = self.inner.alloc_host(bytes)?;
        self.state().host.insert(at.addr().get(), bytes);
        Ok(at)
    }
    unsafe fn free_host(&self, at: NonNull<u8>, bytes: usize) {
        let mut state = self.state();
        let freed = at.addr().get()..at.addr().get() + bytes;
        let uses = |op: &Op| match op {
            Op::Copy(_, ranges) => ranges.iter().any(|(at, _)| freed.contains(at)),
            _ => false,
        };
        let used = !state.failed && state.streams.values().flatten().any(uses);
        assert!(!used, "host memory was freed under a copy");
        state.host.remove(&freed.start);
        // SAFETY: the caller's promise.
        unsafe { self.inner.free_host(at, bytes) }
    }
    unsafe fn copy_host(
        &self,
        way: Way,
        copies: &[HostCopy],
        locked: bool,
        stream: Stream,
    ) -> Result<()> {
        if *self.trouble.lock().unwrap() == Trouble::Refused {
            return Err(Error::DeviceFailed { call: "copy", why: "refused, as it was told" });
        }
        {
            let mut copied = self.copied.lock().unwrap();
            *copied = (copied.0 + 1, copied.1 + copies.len());
        }
        let ranges: Vec<_> = copies.iter().map(|copy| (copy.host.addr(), copy.bytes)).collect();
        let copies: Vec<_> = copies
            .iter()
            .map(|copy| (copy.device, copy.host.expose_provenance(), copy.bytes))
            .collect();
        let work = move |on: &dyn Backend| {
            let copies: Vec<HostCopy> = copies
                .iter()
                .map(|&(device, host, bytes)| {
                    let host = core::ptr::with_exposed_provenance_mut(host);
                    HostCopy { device, host, bytes }
                })
                .collect();
            // SAFETY: the caller's promise.
            unsafe { on.copy_host(way, &copies, locked, Stream::DEFAULT) }
        };
        self.enqueue(stream, Op::Copy(Box::new(work), ranges))
    }
    fn mark(&self, stream: Stream) -> Result<Mark> {
        let mut state = self.state();
        state.next += 1;
        let (mark, n) = (state.next, number(stream));
        state.marks.insert(mark, (n, false));
        drop(state);
        self.enqueue(stream, Op::Pass(mark))?;
        Ok(Mark::from_raw(core::ptr::without_provenance_mut(mark)))
    }
    fn hold(&self, stream: Stream, mark: Mark) -> Result<()> {
        let mark = mark.as_raw().addr();
        let from = self.state().marks[&mark].0;
        let forgotten = *self.forgets.lock().unwrap() == Some((from, number(stream)));
        if forgotten || from == number(stream) {
            return Ok(());
        }
        self.enqueue(stream, Op::Hold(mark))
    }
    fn has_passed(&self, mark: Mark) -> Result<bool> {
        let mut state = self.state();
        self.stir(&mut state);
        let passed = state.marks[&mark.as_raw().addr()].1;
        if state.failed { Err(DEAD) } else { Ok(passed) }
    }
    fn wait(&self, mark: Mark) -> Result<()> {
        let mark = mark.as_raw().addr();
        let mut state = self.state();
        let n = state.marks[&mark].0;
        self.drive(&mut state, n, &|state| state.marks[&mark].1);
        if state.failed { Err(DEAD) } else { Ok(()) }
    }
    unsafe fn end_mark(&self, mark: Mark) {
        // Who waits for it still does.
        let mark = mark.as_raw().addr();
        let mut state = self.state();
        let held = |op: &Op| matches!(op, Op::Hold(held) if *held == mark);
        if !state.streams.values().flatten().any(held) {
            state.marks.remove(&mark);
        }
    }
}

/// Memory alone.
#[derive(Debug, Default)]
struct Memory {
    held: Mutex<BTreeMap<u64, Vec<u64>>>,
}

fn at(address: u64) -> *mut u8 {
    core::ptr::with_exposed_provenance_mut(address as usize)
}

impl Backend for Memory {
    fn device(&self) -> Device {
        Device::Cuda { ordinal: 0 }
    }
    fn name(&self) -> &str {
        "memory"
    }
    fn multiprocessors(&self) -> u32 {
        1
    }
    fn multiprocessor_shared_bytes(&self) -> u32 {
        1 << 16
    }
    fn alloc(&self, bytes: u64) -> Result<u64> {
        let mut words = vec![0u64; bytes as usize / 8 + 1];
        let address = words.as_mut_ptr().expose_provenance() as u64;
        self.held.lock().unwrap().insert(address, words);
        Ok(address)
    }
    unsafe fn free(&self, address: u64) {
        self.held.lock().unwrap().remove(&address);
    }
    unsafe fn upload(&self, to: u64, from: &[u8], _: Stream) -> Result<()> {
        // SAFETY: the caller's promise, here and below.
        unsafe { core::ptr::copy_nonoverlapping(from.as_ptr(), at(to), from.len()) };
        Ok(())
    }
    unsafe fn download(&self, from: u64, to: &mut [u8], _: Stream) -> Result<()> {
        // SAFETY: see above.
        unsafe { core::ptr::copy_nonoverlapping(at(from), to.as_mut_ptr(), to.len()) };
        Ok(())
    }
    unsafe fn copy(&self, from: u64, to: u64, bytes: u64, _: Stream) -> Result<()> {
        // SAFETY: see above.
        unsafe { core::ptr::copy(at(from), at(to), bytes as usize) };
        Ok(())
    }
    unsafe fn zero(&self, from: u64, bytes: u64, _: Stream) -> Result<()> {
        // SAFETY: see above.
        unsafe { core::ptr::write_bytes(at(from), 0, bytes as usize) };
        Ok(())
    }
    unsafe fn launch(&self, _: &Launch, _: *const c_void, _: usize, _: Stream) -> Result<()> {
        Err(Error::NoKernels { what: "none here" })
    }
    fn sync(&self, _: Stream) -> Result<()> {
        Ok(())
    }
}
