//! The last messages, by number: what subscribers are served from, and what is replayed.
//!
//! Bounded in messages and in bytes; the oldest go first. Every connection is only a position in
//! here, so that any number of slow ones cost no memory: one that falls behind the oldest goes on
//! there, and sees the gap in the numbers. Knows no socket.

use alloc::collections::VecDeque;
use alloc::sync::Arc;
use alloc::vec::Vec;

/// A published message: its number and its bytes.
pub(super) type Numbered = (u64, Arc<Vec<u8>>);

#[derive(Debug)]
pub(super) struct Replay {
    messages: VecDeque<Numbered>,
    max_messages: usize,
    bytes: usize,
    max_bytes: usize,
    next_seq: u64,
}

impl Replay {
    pub(super) fn new(max_messages: usize, max_bytes: usize) -> Self {
        Replay { messages: VecDeque::new(), max_messages, bytes: 0, max_bytes, next_seq: 0 }
    }

    /// Keeps a message, whose number is above all before it. The last one is kept whatever its
    /// size.
    pub(super) fn push(&mut self, seq: u64, message: Arc<Vec<u8>>) {
        self.next_seq = seq + 1;
        self.bytes += message.len();
        self.messages.push_back((seq, message));
        while self.messages.len() > 1
            && (self.messages.len() > self.max_messages || self.bytes > self.max_bytes)
        {
            let oldest = self.messages.pop_front();
            self.bytes -= oldest.map_or(0, |(_, message)| message.len());
        }
    }

    /// One past the number of the last message.
    pub(super) fn next_seq(&self) -> u64 {
        self.next_seq
    }

    /// The first message that is kept with a number of `seq` or above.
    pub(super) fn from(&self, seq: u64) -> Option<Numbered> {
        let at = self.messages.partition_point(|(number, _)| *number < seq);
        self.messages.get(at).cloned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;

    #[test]
    fn the_oldest_go_first() {
        let mut replay = Replay::new(3, 100);
        assert!(replay.from(0).is_none() && replay.next_seq() == 0);
        for (seq, bytes) in [(0, 10), (2, 10), (3, 10), (4, 10)] {
            replay.push(seq, Arc::new(vec![seq as u8; bytes]));
        }
        let numbers = |replay: &Replay, from| replay.from(from).map(|(seq, _)| seq);
        assert_eq!(numbers(&replay, 0), Some(2));
        assert_eq!(numbers(&replay, 3), Some(3));
        assert_eq!(numbers(&replay, 5), None);
        assert_eq!(replay.next_seq(), 5);
        // By bytes: 10 + 10 + 85 are too many; one alone never is.
        replay.push(5, Arc::new(vec![5; 85]));
        assert_eq!((numbers(&replay, 0), replay.bytes), (Some(4), 95));
        replay.push(9, Arc::new(vec![9; 1000]));
        assert_eq!((numbers(&replay, 0), replay.bytes), (Some(9), 1000));
        replay.push(10, Arc::new(vec![0; 1]));
        assert_eq!((numbers(&replay, 0), replay.bytes), (Some(10), 1));
    }
}
