//! What a tier's threads do: take work from its queues, call the store, verify what it gives, and
//! note how long it took. Readers load, writers store and remove.

use alloc::sync::Arc;
use alloc::vec::Vec;
use std::time::Instant;

use super::ObjectKey;
use super::host::HostBlock;
use super::object;
use super::queue::{Load, Shared};
use super::slabs::Share;
use super::store::{Get, Outcome, Put};
use super::ticket::Missed;

/// The most objects of one call of a store.
const BATCH: usize = 16;

enum ReaderWork {
    Share(Share),
    Loads(Vec<Load>),
    Probe(Vec<Load>),
    Stop,
}

impl Shared {
    pub fn read(&self) {
        loop {
            match self.next_read() {
                ReaderWork::Share(share) => self.load_parts(share),
                ReaderWork::Loads(loads) => self.load(loads),
                ReaderWork::Probe(loads) => self.probe(loads),
                ReaderWork::Stop => return,
            }
        }
    }

    fn next_read(&self) -> ReaderWork {
        let mut state = self.state();
        loop {
            if state.stop {
                return ReaderWork::Stop;
            }
            // An engine is about to need its layers: before what is only fetched ahead.
            if let Some(share) = state.shares.pop_front() {
                return ReaderWork::Share(share);
            }
            if let Some((loads, _)) = state.probes.pop_front() {
                return ReaderWork::Probe(loads);
            }
            // Shared out, so that several readers work on one long chain.
            let share = state.loads.len().div_ceil(self.settings.readers as usize).min(BATCH);
            if share > 0 {
                return ReaderWork::Loads(state.loads.drain(..share).collect());
            }
            state = self.wait(state);
        }
    }

    /// Asks the store how much of a chain it has, and queues that.
    fn probe(&self, mut loads: Vec<Load>) {
        loads.retain(|load| !load.ticket.is_cancelled());
        let keys: Vec<ObjectKey> = loads.iter().map(|load| load.want.label.key).collect();
        let mut found = alloc::vec![false; keys.len()];
        let asked = self.store.exists(&keys, &mut found);
        let have = found.iter().take_while(|found| **found).count();
        let mut state = self.state();
        if !asked {
            state.failed();
        }
        let have = if asked { have } else { 0 };
        state.counters.missed += (loads.len() - have) as u64;
        let rest = loads.split_off(have);
        if asked {
            // What comes after the first that is missing may be there.
            let missing = rest.iter().zip(&found[have..]).filter(|(_, found)| !**found);
            let gone: Vec<ObjectKey> = missing.map(|(load, _)| load.want.label.key).collect();
            gone.iter().for_each(|key| state.seen.remove(key));
            self.tell(&gone, &[]);
        }
        state.reading.extend(loads.iter().map(|load| load.want.label.key));
        state.loads.extend(loads);
        drop(state);
        let why = if asked { Missed::Absent } else { Missed::Down };
        rest.iter().for_each(|load| load.ticket.miss(load.want.at, why));
        self.work.notify_all();
    }

    fn load(&self, mut loads: Vec<Load>) {
        let begin = Instant::now();
        let live: Vec<bool> = loads.iter().map(|load| !load.ticket.is_cancelled()).collect();
        let (mut gets, mut labels) = (Vec::new(), Vec::new());
        for (load, _) in loads.iter_mut().zip(&live).filter(|(_, live)| **live) {
            gets.push(Get { key: load.want.label.key, object: &mut load.buffer });
            labels.push(&load.want.label);
        }
        let mut outcomes = alloc::vec![Outcome::None; gets.len()];
        let mut whole = alloc::vec![false; gets.len()];
        if !gets.is_empty() {
            let mut see = |n: usize, object: &[u8]| {
                if let (Some(whole), Some(label)) = (whole.get_mut(n), labels.get(n)) {
                    *whole = object::verify(object, &self.config, label).is_ok();
                }
            };
            self.store.get_each(&mut gets, &mut outcomes, &mut see);
        }
        let time = begin.elapsed();
        let mut outcomes = outcomes.into_iter().zip(whole);
        let (mut done, mut bad, mut missed, mut failed) = (0u64, Vec::new(), 0, false);
        let keys: Vec<ObjectKey> = loads.iter().map(|load| load.want.label.key).collect();
        let mut arrived = Vec::with_capacity(loads.len());
        for (load, live) in loads.into_iter().zip(live) {
            let Load { want, buffer, ticket } = load;
            let outcome = if live { outcomes.next() } else { None };
            let result = match outcome {
                Some((Outcome::Done, true)) => {
                    done += 1;
                    Ok(Arc::new(HostBlock { label: want.label, buffer }))
                }
                // Whole as the store says, and not what was asked for; or nothing of it was seen.
                Some((Outcome::Done | Outcome::Bad, _)) => {
                    bad.push(want.label.key);
                    Err(Missed::Bad)
                }
                Some((Outcome::Failed | Outcome::Full, _)) => {
                    (missed, failed) = (missed + 1, true);
                    Err(Missed::Down)
                }
                Some((Outcome::Absent | Outcome::None, _)) => {
                    missed += 1;
                    Err(Missed::Absent)
                }
                None => Err(Missed::Cancelled),
            };
            arrived.push((ticket, want.at, result));
        }
        let mut state = self.state();
        let (mut gone, mut seen) = (Vec::new(), Vec::new());
        for ((_, _, result), key) in arrived.iter().zip(&keys) {
            match result {
                Ok(block) => {
                    state.seen.insert(*key);
                    seen.push(&block.label);
                }
                Err(Missed::Absent | Missed::Bad) => {
                    state.seen.remove(key);
                    gone.push(*key);
                }
                Err(_) => {}
            }
        }
        self.tell(&gone, &seen);
        state.counters.loaded += done;
        state.counters.missed += missed;
        state.counters.bad += bad.len() as u64;
        state.counters.loaded_bytes += done * self.buffers.bytes() as u64;
        if done > 0 {
            state.load_rate.observe(done * self.buffers.bytes() as u64, time);
        }
        match failed {
            true => state.failed(),
            false if done > 0 => state.pause = None,
            false => {}
        }
        for key in &keys {
            state.reading.remove(key);
        }
        let woken = !bad.is_empty();
        state.removes.extend(bad);
        drop(state);
        // After it was counted: whoever waited for a block finds it in the counters.
        for (ticket, at, result) in arrived {
            match result {
                Ok(block) => ticket.done(at, block),
                Err(why) => ticket.miss(at, why),
            }
        }
        if woken {
            self.work.notify_all();
        }
    }

    pub fn write(&self) {
        let mut state = self.state();
        loop {
            if !state.removes.is_empty() {
                let keys = core::mem::take(&mut state.removes);
                state.busy_writes += 1;
                drop(state);
                self.store.remove(&keys);
                state = self.state();
                state.busy_writes -= 1;
            } else if !state.puts.is_empty() {
                let count = state.puts.len().min(BATCH);
                let blocks: Vec<Arc<HostBlock>> = state.puts.drain(..count).collect();
                state.busy_writes += 1;
                drop(state);
                self.put(blocks);
                state = self.state();
                state.busy_writes -= 1;
            } else if state.stop {
                return;
            } else {
                state = self.wait(state);
                continue;
            }
            self.idle.notify_all();
        }
    }

    fn put(&self, blocks: Vec<Arc<HostBlock>>) {
        let keys: Vec<ObjectKey> = blocks.iter().map(|block| block.label.key).collect();
        let mut sealed = Vec::with_capacity(blocks.len());
        let mut unsealed = 0;
        for block in blocks {
            match self.seal(block) {
                Some(object) => sealed.push(object),
                None => unsealed += 1,
            }
        }
        let puts: Vec<Put> = sealed
            .iter()
            .map(|block| Put {
                key: block.label.key,
                object: &block.buffer,
                label: Some(&block.label),
            })
            .collect();
        let mut outcomes = alloc::vec![Outcome::None; puts.len()];
        let begin = Instant::now();
        self.store.put(&puts, &mut outcomes);
        let time = begin.elapsed();
        let count = |what| outcomes.iter().filter(|outcome| **outcome == what).count() as u64;
        let stored = count(Outcome::Done);
        let mut state = self.state();
        state.counters.stored += stored;
        state.counters.stored_bytes += stored * self.buffers.bytes() as u64;
        state.counters.full += count(Outcome::Full);
        state.counters.dropped += unsealed;
        if stored > 0 {
            state.put_rate.observe(stored * self.buffers.bytes() as u64, time);
        }
        match count(Outcome::Failed) {
            0 if stored > 0 => state.pause = None,
            0 => {}
            _ => state.failed(),
        }
        let mut seen = Vec::new();
        for (block, outcome) in sealed.iter().zip(&outcomes) {
            if *outcome == Outcome::Done {
                state.seen.insert(block.label.key);
                seen.push(&block.label);
            }
        }
        self.tell(&[], &seen);
        for key in &keys {
            state.writing.remove(key);
        }
    }

    /// The sealed object of a block: in place where nobody else has the block, else in a copy. None
    /// where there is no buffer for one, or a device failed that was to write it.
    fn seal(&self, block: Arc<HostBlock>) -> Option<HostBlock> {
        block.buffer.arrived().ok()?;
        let mut own = match Arc::try_unwrap(block) {
            Ok(own) => own,
            Err(shared) => {
                let mut buffer = self.buffers.take().ok()?;
                buffer[object::HEAD_BYTES..].copy_from_slice(shared.payload());
                HostBlock { label: shared.label.clone(), buffer }
            }
        };
        object::seal(&mut own.buffer, &self.config, &own.label);
        Some(own)
    }
}
