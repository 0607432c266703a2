//! ZMTP 3.0, the protocol of ZeroMQ: greeting, the NULL handshake, frames. As much of it as a PUB
//! and a ROUTER socket that bind need; peers of 3.1 fall back to it.
//!
//! Everything a peer sends is bounded: frames, messages, properties. What breaks the protocol or a
//! bound ends the connection. Knows no socket: bytes in, bytes out.

use alloc::vec::Vec;

/// The most bytes of a frame that a peer may send: subscriptions, replay requests, properties.
const MAX_FRAME_BYTES: usize = 1024;
/// The most frames of a message that a peer may send.
const MAX_FRAMES: usize = 8;

const MORE: u8 = 1;
const LONG: u8 = 2;
const COMMAND: u8 = 4;

/// The greeting: signature, version 3.0, mechanism NULL, no server, filler.
pub(super) const GREETING: [u8; 64] = {
    let mut greeting = [0; 64];
    greeting[0] = 0xff;
    greeting[9] = 0x7f;
    greeting[10] = 3;
    let null = *b"NULL";
    let mut at = 0;
    while at < 4 {
        greeting[12 + at] = null[at];
        at += 1;
    }
    greeting
};

/// The peer broke the protocol.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Broken;

/// Appends the header of a frame.
pub(super) fn frame_header(out: &mut Vec<u8>, bytes: usize, more: bool) {
    header(out, bytes, if more { MORE } else { 0 });
}

fn header(out: &mut Vec<u8>, bytes: usize, flags: u8) {
    match u8::try_from(bytes) {
        Ok(bytes) => out.extend_from_slice(&[flags, bytes]),
        Err(_) => {
            out.push(flags | LONG);
            out.extend_from_slice(&(bytes as u64).to_be_bytes());
        }
    }
}

/// Appends a frame.
pub(super) fn frame(out: &mut Vec<u8>, body: &[u8], more: bool) {
    frame_header(out, body.len(), more);
    out.extend_from_slice(body);
}

/// Appends a command.
fn command(out: &mut Vec<u8>, name: &str, data: &[u8]) {
    header(out, 1 + name.len() + data.len(), COMMAND);
    out.push(name.len() as u8);
    out.extend_from_slice(name.as_bytes());
    out.extend_from_slice(data);
}

/// Appends the READY command of a socket of this type.
pub(super) fn ready(out: &mut Vec<u8>, socket_type: &str) {
    let mut data = Vec::new();
    data.push(b"Socket-Type".len() as u8);
    data.extend_from_slice(b"Socket-Type");
    data.extend_from_slice(&(socket_type.len() as u32).to_be_bytes());
    data.extend_from_slice(socket_type.as_bytes());
    command(out, "READY", &data);
}

/// What a peer said.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Said {
    /// Its handshake, with its socket type: it is ready.
    Ready(Vec<u8>),
    /// A message, by frames.
    Message(Vec<Vec<u8>>),
    /// It subscribes to topics that begin so, or no more.
    Subscribe(Vec<u8>, bool),
    /// It wants these bytes back.
    Ping(Vec<u8>),
}

/// What arrives from a peer, in pieces.
#[derive(Debug, Default)]
pub(super) struct Reader {
    bytes: Vec<u8>,
    at: usize,
    greeted: bool,
    frames: Vec<Vec<u8>>,
}

impl Reader {
    /// Takes bytes that arrived.
    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.bytes.drain(..self.at);
        self.at = 0;
        self.bytes.extend_from_slice(bytes);
    }

    /// Whether the peer's greeting has come.
    pub(super) fn is_greeted(&self) -> bool {
        self.greeted
    }

    fn rest(&self) -> &[u8] {
        &self.bytes[self.at..]
    }

    /// What has been said whole, if anything.
    pub(super) fn next(&mut self) -> Result<Option<Said>, Broken> {
        if !self.greeted {
            let Some(greeting) = self.rest().first_chunk::<64>() else { return Ok(None) };
            let signed = greeting[0] == 0xff && greeting[9] & 1 == 1 && greeting[10] >= 3;
            if !signed || greeting[12..32] != GREETING[12..32] {
                return Err(Broken);
            }
            self.greeted = true;
            self.at += 64;
        }
        loop {
            let Some((flags, body)) = self.frame()? else { return Ok(None) };
            if flags & COMMAND != 0 {
                if let Some(said) = command_of(&body)? {
                    return Ok(Some(said));
                }
                continue;
            }
            self.frames.push(body);
            if self.frames.len() > MAX_FRAMES {
                return Err(Broken);
            }
            if flags & MORE == 0 {
                return Ok(Some(Said::Message(core::mem::take(&mut self.frames))));
            }
        }
    }

    /// The next whole frame.
    fn frame(&mut self) -> Result<Option<(u8, Vec<u8>)>, Broken> {
        let rest = self.rest();
        let Some(&flags) = rest.first() else { return Ok(None) };
        let (header, bytes) = if flags & LONG == 0 {
            (2, rest.get(1).map(|&bytes| u64::from(bytes)))
        } else {
            (9, rest[1..].first_chunk().map(|bytes| u64::from_be_bytes(*bytes)))
        };
        let Some(bytes) = bytes else { return Ok(None) };
        if bytes > MAX_FRAME_BYTES as u64 {
            return Err(Broken);
        }
        let Some(body) = rest.get(header..header + bytes as usize) else { return Ok(None) };
        let body = body.to_vec();
        self.at += header + body.len();
        Ok(Some((flags, body)))
    }
}

/// What a command says; `None` for those that mean nothing here.
fn command_of(body: &[u8]) -> Result<Option<Said>, Broken> {
    let (&length, rest) = body.split_first().ok_or(Broken)?;
    let (name, data) = rest.split_at_checked(length.into()).ok_or(Broken)?;
    Ok(match name {
        b"READY" => Some(Said::Ready(socket_type(data)?)),
        b"SUBSCRIBE" => Some(Said::Subscribe(data.to_vec(), true)),
        b"CANCEL" => Some(Said::Subscribe(data.to_vec(), false)),
        // After the time to live in two bytes, a context of at most 16 is to be sent back.
        b"PING" => Some(Said::Ping(data.get(2..data.len().min(18)).ok_or(Broken)?.to_vec())),
        b"ERROR" => return Err(Broken),
        _ => None,
    })
}

/// The property Socket-Type among others.
fn socket_type(mut data: &[u8]) -> Result<Vec<u8>, Broken> {
    while let Some((&length, rest)) = data.split_first() {
        let (name, rest) = rest.split_at_checked(length.into()).ok_or(Broken)?;
        let (bytes, rest) = rest.split_at_checked(4).ok_or(Broken)?;
        let bytes = bytes.iter().fold(0, |n, &byte| n << 8 | usize::from(byte));
        let (value, rest) = rest.split_at_checked(bytes).ok_or(Broken)?;
        if name.eq_ignore_ascii_case(b"Socket-Type") {
            return Ok(value.to_vec());
        }
        data = rest;
    }
    Err(Broken)
}

/// Appends the answer to a ping.
pub(super) fn pong(out: &mut Vec<u8>, context: &[u8]) {
    command(out, "PONG", context);
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;

    fn greeted() -> Reader {
        let mut reader = Reader::default();
        reader.push(&GREETING);
        reader
    }

    #[test]
    fn what_is_said_arrives_in_any_pieces() {
        let mut stream = GREETING.to_vec();
        ready(&mut stream, "SUB");
        frame(&mut stream, b"", true);
        frame(&mut stream, &[7; 300], false);
        command(&mut stream, "SUBSCRIBE", b"kv");
        command(&mut stream, "PING", b"\0\x05abc");
        command(&mut stream, "SOMETHING", b"new");
        frame(&mut stream, &[1], false);
        let expected = [
            Said::Ready(b"SUB".to_vec()),
            Said::Message(vec![vec![], vec![7; 300]]),
            Said::Subscribe(b"kv".to_vec(), true),
            Said::Ping(b"abc".to_vec()),
            Said::Message(vec![vec![1]]),
        ];
        for piece in [1, 2, 3, 64, 65, 1000] {
            let (mut reader, mut said) = (Reader::default(), Vec::new());
            for bytes in stream.chunks(piece) {
                reader.push(bytes);
                while let Some(next) = reader.next().unwrap() {
                    said.push(next);
                }
            }
            assert_eq!(said, expected, "in pieces of {piece}");
        }
    }

    #[test]
    fn what_breaks_the_protocol_or_a_bound_is_refused() {
        let mut old = GREETING;
        old[10] = 2;
        let mut curve = GREETING;
        curve[12..17].copy_from_slice(b"CURVE");
        for greeting in [[0; 64], old, curve] {
            let mut reader = Reader::default();
            reader.push(&greeting);
            assert_eq!(reader.next(), Err(Broken));
        }
        let huge = [LONG, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff];
        let many = [MORE, 0].repeat(MAX_FRAMES + 1);
        let bad: [&[u8]; 7] = [
            &huge,
            &many,
            &[COMMAND, 0],
            &[COMMAND, 3, 9, b'a', b'b'],
            &[COMMAND, 6, 5, b'R', b'E', b'A', b'D', b'Y'],
            &[COMMAND, 8, 5, b'R', b'E', b'A', b'D', b'Y', 200, 1],
            &[COMMAND, 6, 5, b'E', b'R', b'R', b'O', b'R'],
        ];
        for bytes in bad {
            let mut reader = greeted();
            reader.push(bytes);
            assert_eq!(reader.next(), Err(Broken), "{bytes:?}");
        }
    }

    #[test]
    fn any_bytes_are_taken_or_refused() {
        let mut x = 1u64;
        for _ in 0..2000 {
            let mut reader = greeted();
            for _ in 0..20 {
                x = x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                reader.push(&[(x >> 33) as u8 & 7, (x >> 40) as u8 & 15, (x >> 50) as u8]);
                if reader.next().is_err() {
                    break;
                }
            }
        }
    }
}
