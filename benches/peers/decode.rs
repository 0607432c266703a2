//! Peers of decode over quantised formats: processes that speak the lines of `ggml.c` and `vllm.py`.
//! `KVCACHE_PEERS` has their commands, one a line; `scripts/peers.sh` sets it.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

pub struct Peer {
    child: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
    pub name: String,
    /// The formats that it has.
    pub kinds: Vec<String>,
    built: usize,
}

impl Peer {
    /// Those that the variable names.
    pub fn all() -> Vec<Self> {
        let commands = std::env::var("KVCACHE_PEERS").unwrap_or_default();
        commands.lines().filter(|line| !line.trim().is_empty()).map(Self::start).collect()
    }

    fn start(command: &str) -> Self {
        let mut words = command.split_whitespace();
        let mut process = Command::new(words.next().unwrap());
        let process = process.args(words).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = process.spawn().expect("KVCACHE_PEERS must name programs");
        let (to, from) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let from = BufReader::new(from);
        let (name, kinds) = (String::new(), Vec::new());
        let mut peer = Self { child, to, from, name, kinds, built: 0 };
        let mut words = peer.ask("kinds").split(' ').map(str::to_owned).collect::<Vec<_>>();
        peer.name = words.remove(0);
        peer.kinds = words;
        peer
    }

    fn ask(&mut self, question: &str) -> String {
        writeln!(self.to, "{question}").expect("the peer reads");
        let mut line = String::new();
        self.from.read_line(&mut line).expect("the peer answers");
        line.trim_end().to_owned()
    }

    fn numbers(&mut self, question: &str) -> Vec<f64> {
        let answer = self.ask(question);
        answer.split(' ').map(|number| number.parse().expect("the peer answers")).collect()
    }

    /// Builds a decode step; its number, and the bytes of a token's K and V.
    pub fn build(&mut self, kind: &str, seqs: usize, tokens: usize) -> (usize, f64) {
        let answer = self.numbers(&format!("decode {kind} {seqs} {tokens}"));
        // Values are means of thousands of numbers below 1: what 4 bits cost them is far below this.
        assert!(answer[1] < 0.02, "{kind} of {}: off by {}", self.name, answer[1]);
        self.built += 1;
        (self.built - 1, answer[0])
    }

    /// The seconds that a step took.
    pub fn run(&mut self, step: usize, threads: usize) -> f64 {
        self.numbers(&format!("run {step} {threads}"))[0]
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // Nothing to lose: it only computes.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
