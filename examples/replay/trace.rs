//! Traces: from their files to requests in the order in which they are served.
//!
//! A request is a list of hash ids, one a block, kept as runs of consecutive ids; an equal id is an
//! equal block behind an equal prefix. Ids mean something within a space only: the whole trace of
//! Mooncake's, a session of Claude Code's. Knows nothing of caches.

use std::collections::BinaryHeap;
use std::error::Error;
use std::fs;
use std::io::Read as _;
use std::ops::Range;
use std::path::Path;

use flate2::read::MultiGzDecoder;
use serde_json::Value;

/// Consecutive hash ids.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ids {
    pub start: u32,
    pub count: u32,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// When it comes, in ms.
    pub time_ms: u64,
    /// Which ids are the same.
    pub space: u32,
    /// The conversation it belongs to: requests of one continue each other.
    pub stream: u32,
    /// Tokens of the prompt; the last block may be partly full.
    pub tokens: u64,
    /// Its ids, among [`Trace::ids`].
    pub ids: Range<usize>,
    /// Whether its stream ends with it.
    pub last: bool,
    /// Whether what it generated calls a tool, whose answer comes back without anybody's thinking.
    pub tool_call: bool,
}

/// Requests in the order of their serving.
#[derive(Debug, Clone)]
pub struct Trace {
    pub block_tokens: usize,
    pub streams: u32,
    pub requests: Vec<Request>,
    pub ids: Vec<Ids>,
}

/// A request of a session, at a time since the session's begin, in seconds.
struct Turn {
    at: f64,
    ends: f64,
    request: Request,
}

type Fallible<T> = Result<T, Box<dyn Error>>;

impl Trace {
    /// Reads a trace of either kind, or generates the synthetic one.
    pub fn open(path: &Path, users: usize) -> Fallible<Trace> {
        if path.as_os_str() == "synthetic" {
            return Ok(Trace::synthetic());
        }
        let named = |error| format!("{}: {error}", path.display());
        let bytes = fs::read(path).map_err(named)?;
        let text = if bytes.starts_with(&[0x1f, 0x8b]) {
            let mut text = String::new();
            MultiGzDecoder::new(&bytes[..]).read_to_string(&mut text).map_err(named)?;
            text
        } else {
            String::from_utf8(bytes).map_err(|_| named(std::io::ErrorKind::InvalidData.into()))?
        };
        Trace::parse(&text, users).map_err(|error| format!("{}: {error}", path.display()).into())
    }

    /// The trace of a file's text.
    pub fn parse(text: &str, users: usize) -> Fallible<Trace> {
        let mut trace = Trace { block_tokens: 0, streams: 0, requests: vec![], ids: vec![] };
        let mut sessions = Vec::new();
        for (n, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
            let at = |error: Box<dyn Error>| format!("line {}: {error}", n + 1);
            let row: Value = serde_json::from_str(line).map_err(|error| at(error.into()))?;
            if row.get("requests").is_some() {
                let space = sessions.len() as u32;
                sessions.push(trace.session(&row, space).map_err(at)?);
            } else {
                let request = trace.mooncake(&row).map_err(at)?;
                trace.requests.push(request);
            }
        }
        if sessions.is_empty() == trace.requests.is_empty() {
            return Err("neither requests nor sessions, or both".into());
        }
        if sessions.is_empty() {
            trace.requests.sort_by_key(|request| request.time_ms); // stable
        } else {
            trace.serve(sessions, users);
        }
        Ok(trace)
    }

    fn mooncake(&mut self, row: &Value) -> Fallible<Request> {
        let ids = row["hash_ids"].as_array().ok_or("no hash_ids")?;
        let first = self.ids.len();
        for id in ids {
            let id = id.as_u64().and_then(|id| u32::try_from(id).ok()).ok_or("a bad hash id")?;
            self.push_ids(first, Ids { start: id, count: 1 });
        }
        self.block_tokens = 512;
        let tokens = row["input_length"].as_u64().ok_or("no input_length")?;
        self.streams += 1;
        Ok(Request {
            time_ms: row["timestamp"].as_u64().ok_or("no timestamp")?,
            space: 0,
            stream: self.streams - 1,
            tokens,
            ids: first..self.ids.len(),
            last: false,
            tool_call: false,
        })
    }

    /// Appends ids to a request whose first are at `first`.
    fn push_ids(&mut self, first: usize, ids: Ids) {
        match self.ids[first..].last_mut() {
            Some(run) if run.start + run.count == ids.start => run.count += ids.count,
            _ => self.ids.push(ids),
        }
    }

    /// The turns of a session and of the agents that it started, in the order of their time.
    fn session(&mut self, row: &Value, space: u32) -> Fallible<Vec<Turn>> {
        let block_tokens = row["block_size"].as_u64().filter(|n| (1..=65536).contains(n));
        let block_tokens = block_tokens.ok_or("no block_size")? as usize;
        if self.block_tokens != 0 && self.block_tokens != block_tokens {
            return Err("sessions of different block sizes".into());
        }
        self.block_tokens = block_tokens;
        let mut turns = Vec::new();
        self.stream_of(&row["requests"], space, 0.0, &mut turns)?;
        turns.sort_by(|a, b| a.at.total_cmp(&b.at));
        Ok(turns)
    }

    fn stream_of(
        &mut self,
        rows: &Value,
        space: u32,
        t0: f64,
        out: &mut Vec<Turn>,
    ) -> Fallible<()> {
        let stream = self.streams;
        self.streams += 1;
        let mut last = None;
        for row in rows.as_array().ok_or("no requests")? {
            let at = t0 + row["t"].as_f64().ok_or("a request without a time")?;
            if row["type"] == "subagent" {
                self.stream_of(&row["requests"], space, at, out)?;
                continue;
            }
            let first = self.ids.len();
            for run in row["hash_runs"].as_array().ok_or("no hash_runs")? {
                let part = |i: usize| run[i].as_u64().and_then(|n| u32::try_from(n).ok());
                let (start, count) = part(0).zip(part(1)).ok_or("a bad run of hash ids")?;
                start.checked_add(count).ok_or("a bad run of hash ids")?;
                self.push_ids(first, Ids { start, count });
            }
            let request = Request {
                time_ms: 0,
                space,
                stream,
                tokens: row["in"].as_u64().ok_or("no in")?,
                ids: first..self.ids.len(),
                last: false,
                tool_call: row["stop"] == "tool_use",
            };
            last = Some(out.len());
            out.push(Turn { at, ends: at + row["api_time"].as_f64().unwrap_or(0.0), request });
        }
        if let Some(last) = last {
            out[last].request.last = true;
        }
        Ok(())
    }

    /// Lets `users` users take one session after the other, and merges what they do by time.
    fn serve(&mut self, sessions: Vec<Vec<Turn>>, users: usize) {
        let mut free: BinaryHeap<_> =
            (0..users).map(|user| std::cmp::Reverse((0u64, user))).collect();
        for session in sessions {
            let Some(std::cmp::Reverse((begin, user))) = free.pop() else { return };
            let ms = |seconds: f64| begin + (seconds.max(0.0) * 1000.0) as u64;
            let end = session.iter().map(|turn| ms(turn.ends)).max().unwrap_or(begin);
            let timed = |turn: Turn| Request { time_ms: ms(turn.at), ..turn.request };
            self.requests.extend(session.into_iter().map(timed));
            free.push(std::cmp::Reverse((end, user)));
        }
        self.requests.sort_by_key(|request| request.time_ms); // stable
    }

    /// A small trace with what real ones have: shared system prompts, conversations that grow,
    /// branches that are given up, and single requests. The same every time.
    pub fn synthetic() -> Trace {
        let mut trace = Trace { block_tokens: 64, streams: 0, requests: vec![], ids: vec![] };
        let (mut state, mut fresh) = (9u64, 1000u32);
        let mut random = |below: u32| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) as u32 % below
        };
        let mut open: Vec<(u32, Vec<Ids>, u32)> = Vec::new();
        for time in 0..3000u64 {
            if open.len() < 24 {
                let system = random(3);
                open.push((trace.streams, vec![Ids { start: 100 * system, count: 12 }], 0));
                trace.streams += 1;
            }
            let which = random(open.len() as u32) as usize;
            let (stream, ids, turns) = &mut open[which];
            if random(8) == 0 && ids.len() > 1 {
                ids.pop();
            }
            let count = 1 + random(9);
            ids.push(Ids { start: fresh, count });
            fresh += count;
            *turns += 1;
            let last = random(12) == 0;
            let blocks: u32 = ids.iter().map(|run| run.count).sum();
            let first = trace.ids.len();
            trace.ids.extend_from_slice(ids);
            trace.requests.push(Request {
                time_ms: time * 50,
                space: 0,
                stream: *stream,
                tokens: u64::from(blocks) * 64 - u64::from(random(64)),
                ids: first..trace.ids.len(),
                last,
                tool_call: random(2) == 0,
            });
            if last {
                open.swap_remove(which);
            }
        }
        trace
    }

    /// The ids of a request.
    pub fn ids_of(&self, request: &Request) -> &[Ids] {
        &self.ids[request.ids.clone()]
    }

    /// Blocks of a request.
    pub fn blocks_of(&self, request: &Request) -> u64 {
        self.ids_of(request).iter().map(|run| u64::from(run.count)).sum()
    }
}
