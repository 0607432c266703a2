//! Threads that borrow an object beside each other, alone, and for good: whoever is alone is alone,
//! and nobody is inside after its end.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32 as Plain, Ordering::SeqCst};

use shuttle::thread;

#[path = "../../../src/capi/handle/gate.rs"]
mod gate;
mod sync {
    pub use shuttle::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
}

use sync::{AtomicU32, AtomicUsize};

const LIVE: usize = 0x70000;
const NEXT: usize = 0x80000;
const MARK: usize = 0xffff;

struct Slot {
    word: AtomicUsize,
    counts: [AtomicU32; 2],
    // What is true, seen by no scheduler.
    beside: Plain,
    alone: Plain,
    ended: AtomicBool,
}

impl Slot {
    fn new() -> Arc<Self> {
        Arc::new(Slot {
            word: AtomicUsize::new(LIVE),
            counts: [AtomicU32::new(0), AtomicU32::new(0)],
            beside: Plain::new(0),
            alone: Plain::new(0),
            ended: AtomicBool::new(false),
        })
    }

    fn inside(&self) {
        assert!(!self.ended.load(SeqCst), "inside what has ended");
    }

    fn share(&self, shard: usize) {
        match gate::enter_shared(&self.word, &self.counts[shard], LIVE) {
            Ok(()) => {
                self.beside.fetch_add(1, SeqCst);
                for _ in 0..2 {
                    self.inside();
                    assert_eq!(self.alone.load(SeqCst), 0, "somebody is alone, and this too");
                    thread::yield_now();
                }
                self.beside.fetch_sub(1, SeqCst);
                gate::leave_shared(&self.counts[shard]);
            }
            Err(seen) => assert_ne!(seen, LIVE),
        }
    }

    fn be_alone(&self, end: bool) {
        match gate::enter_exclusive(&self.word, &self.counts, LIVE, MARK) {
            Ok(()) => {
                self.alone.fetch_add(1, SeqCst);
                self.inside();
                assert_eq!(self.alone.load(SeqCst), 1);
                thread::yield_now();
                assert_eq!(self.beside.load(SeqCst), 0, "alone, and others are inside");
                self.alone.fetch_sub(1, SeqCst);
                if end {
                    self.ended.store(true, SeqCst);
                    self.word.store(NEXT, sync::Ordering::Release);
                } else {
                    gate::leave_exclusive(&self.word, MARK);
                }
            }
            Err(seen) => assert_ne!(seen, LIVE),
        }
    }
}

fn run(threads: Vec<fn(&Slot)>) {
    let slot = Slot::new();
    let spawn = |act: fn(&Slot)| {
        let slot = slot.clone();
        thread::spawn(move || act(&slot))
    };
    let threads: Vec<_> = threads.into_iter().map(spawn).collect();
    for thread in threads {
        thread.join().unwrap();
    }
    // All have left: the counts are even, and the word is live unless it ended.
    assert!(slot.counts.iter().all(|count| count.load(sync::Ordering::SeqCst) == 0));
    let word = slot.word.load(sync::Ordering::SeqCst);
    assert_eq!(word, if slot.ended.load(SeqCst) { NEXT } else { LIVE });
}

pub fn check() {
    shuttle::check_dfs(|| run(vec![|slot| slot.share(0), |slot| slot.be_alone(true)]), None);
    shuttle::check_dfs(|| run(vec![|slot| slot.be_alone(false), |slot| slot.be_alone(true)]), None);
    println!("handle: every schedule of two");
    super::explore("handle: five threads", || {
        run(vec![
            |slot| slot.share(0),
            |slot| slot.share(1),
            |slot| slot.share(0),
            |slot| slot.be_alone(false),
            |slot| slot.be_alone(true),
        ]);
    });
}
