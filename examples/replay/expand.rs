//! From hash ids to tokens: every id stands for a full block of tokens, different ids for different
//! blocks from the first token on.
//!
//! A conversation's next prompt begins like its last one, so each stream keeps its last prompt and
//! only what follows the common ids is written anew, as an engine that gets a growing prompt would.

use crate::trace::{Ids, Trace};

/// The last prompt of a stream.
#[derive(Default)]
pub struct Prompt {
    ids: Vec<Ids>,
    /// Whole blocks.
    pub tokens: Vec<u32>,
    /// How many leading tokens the prompt before in the same stream had too.
    pub shared_tokens: usize,
}

/// The prompts of all streams that have a further request.
pub struct Prompts {
    streams: Vec<Option<Prompt>>,
    /// The last request of each stream.
    last: Vec<usize>,
    current: Prompt,
    owner: Option<u32>,
    /// Buffers of streams that ended.
    spare: Vec<Prompt>,
}

/// What a token of a cache may have.
const TOKEN_BITS: u32 = (1 << 31) - 1;

/// Appends the tokens of a block.
pub fn block(id: u32, tokens: &mut [u32]) {
    // Odd factors: one token tells all ids below 2^31 apart.
    let base = id.wrapping_mul(0x9e37_79b1);
    for (n, token) in tokens.iter_mut().enumerate() {
        *token = (base ^ (n as u32).wrapping_mul(0x85eb_ca6b)) & TOKEN_BITS;
    }
}

impl Prompts {
    pub fn of(trace: &Trace) -> Self {
        let mut last = vec![0; trace.streams as usize];
        for (n, request) in trace.requests.iter().enumerate() {
            last[request.stream as usize] = n;
        }
        let streams = last.iter().map(|_| None).collect();
        Prompts { streams, last, current: Prompt::default(), owner: None, spare: Vec::new() }
    }

    /// The prompt of request `n`, good until the next call.
    pub fn expand(&mut self, trace: &Trace, n: usize) -> &Prompt {
        let request = &trace.requests[n];
        let stream = request.stream as usize;
        if self.owner != Some(request.stream) {
            let next = self.streams[stream].take().unwrap_or_else(|| {
                let mut fresh = self.spare.pop().unwrap_or_default();
                fresh.ids.clear();
                fresh.tokens.clear();
                fresh
            });
            let before = std::mem::replace(&mut self.current, next);
            match self.owner {
                Some(owner) if self.last[owner as usize] > n => {
                    self.streams[owner as usize] = Some(before);
                }
                _ => self.spare.push(before),
            }
            self.owner = Some(request.stream);
        }
        self.current.become_ids(trace.ids_of(request), trace.block_tokens);
        &self.current
    }
}

impl Prompt {
    fn become_ids(&mut self, ids: &[Ids], block_tokens: usize) {
        // The ids that are the same, run by run; the last of them maybe for a part.
        let mut shared = 0;
        for (old, new) in self.ids.iter().zip(ids) {
            if old.start != new.start {
                break;
            }
            shared += old.count.min(new.count) as usize;
            if old.count != new.count {
                break;
            }
        }
        let blocks: usize = ids.iter().map(|run| run.count as usize).sum();
        self.shared_tokens = shared * block_tokens;
        self.tokens.resize(blocks * block_tokens, 0);
        let each = ids.iter().flat_map(|run| run.start..run.start + run.count);
        for (id, tokens) in each.zip(self.tokens.chunks_exact_mut(block_tokens)).skip(shared) {
            block(id, tokens);
        }
        self.ids.clear();
        self.ids.extend_from_slice(ids);
    }
}
