//! The part of Redis's protocol (RESP2) that a store of objects needs: commands as arrays of byte
//! strings, and replies that are a status, an error, a number or one byte string.
//!
//! A client crate would read every object into memory of its own, as long as the server says it is,
//! and then have it copied; here it goes from the socket to the tier's buffer, and a length that is
//! not the object's is a bad object instead of an allocation.

use alloc::string::String;
use alloc::vec::Vec;
use std::io::{self, ErrorKind, IoSlice};

use super::wire::Wire;

/// Bytes of commands that are gathered before they are sent.
const GATHERED: usize = 64 << 10;

/// A reply up to its byte string.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Reply {
    /// "OK" and the like.
    Status,
    /// The server's words.
    Error(String),
    /// A number.
    Number(i64),
    /// There is no such value.
    Nil,
    /// So many bytes follow, which [`Connection::take`] or [`Connection::skip`] reads.
    Bytes(u64),
}

/// A connection, with the commands that have not been sent yet.
#[derive(Debug)]
pub(super) struct Connection {
    pub wire: Wire,
    gathered: Vec<u8>,
}

impl Connection {
    pub fn new(wire: Wire) -> Self {
        Self { wire, gathered: Vec::new() }
    }

    /// Queues a command.
    pub fn command(&mut self, parts: &[&[u8]]) -> io::Result<()> {
        use std::io::Write;
        write!(self.gathered, "*{}\r\n", parts.len())?;
        for part in parts {
            write!(self.gathered, "${}\r\n", part.len())?;
            self.gathered.extend_from_slice(part);
            self.gathered.extend_from_slice(b"\r\n");
        }
        if self.gathered.len() >= GATHERED { self.send() } else { Ok(()) }
    }

    /// Sends commands that set values, after what is queued: values from where they are, and all of it in
    /// few writes, since the server wakes at each.
    pub fn send_sets<'a>(
        &mut self,
        sets: impl ExactSizeIterator<Item = (&'a str, &'a [u8])> + Clone,
    ) -> io::Result<()> {
        use std::io::Write;
        self.send()?;
        let mut ends = Vec::with_capacity(sets.len());
        for (name, value) in sets.clone() {
            let (name_bytes, bytes) = (name.len(), value.len());
            write!(self.gathered, "*3\r\n$3\r\nSET\r\n${name_bytes}\r\n{name}\r\n${bytes}\r\n")?;
            ends.push(self.gathered.len());
        }
        let (mut parts, mut from) = (Vec::with_capacity(3 * sets.len()), 0);
        for ((_, value), end) in sets.zip(ends) {
            parts.push(IoSlice::new(&self.gathered[from..end]));
            parts.push(IoSlice::new(value));
            parts.push(IoSlice::new(b"\r\n"));
            from = end;
        }
        let sent = self.wire.write_all_vectored(&mut parts);
        self.gathered.clear();
        sent.and_then(|()| self.wire.flush())
    }

    /// Sends what is queued.
    pub fn send(&mut self) -> io::Result<()> {
        self.wire.write_all(&self.gathered)?;
        self.gathered.clear();
        self.wire.flush()
    }

    /// The next reply. `InvalidData` for what is none, or of a kind that was not asked for.
    pub fn reply(&mut self) -> io::Result<Reply> {
        let line = self.wire.read_line()?;
        let (&kind, rest) = line.split_first().ok_or(ErrorKind::InvalidData)?;
        let number = || core::str::from_utf8(rest).ok().and_then(|text| text.parse::<i64>().ok());
        Ok(match (kind, number()) {
            (b'+', _) => Reply::Status,
            (b'-', _) => Reply::Error(String::from_utf8_lossy(rest).into_owned()),
            (b':', Some(number)) => Reply::Number(number),
            (b'$', Some(-1)) => Reply::Nil,
            (b'$', Some(bytes @ 0..)) => Reply::Bytes(bytes as u64),
            _ => return Err(ErrorKind::InvalidData.into()),
        })
    }

    /// The bytes that a reply announced, as many as `into` has.
    pub fn take(&mut self, into: &mut [u8]) -> io::Result<()> {
        self.wire.read_exact(into)?;
        self.end()
    }

    /// Reads past the bytes that a reply announced, through `scratch`.
    pub fn skip(&mut self, mut bytes: u64, scratch: &mut [u8]) -> io::Result<()> {
        if scratch.is_empty() {
            return Err(ErrorKind::InvalidInput.into());
        }
        while bytes > 0 {
            let part = bytes.min(scratch.len() as u64);
            self.wire.read_exact(&mut scratch[..part as usize])?;
            bytes -= part;
        }
        self.end()
    }

    fn end(&mut self) -> io::Result<()> {
        let mut end = [0; 2];
        self.wire.read_exact(&mut end)?;
        if end == *b"\r\n" { Ok(()) } else { Err(ErrorKind::InvalidData.into()) }
    }
}
