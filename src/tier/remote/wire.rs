//! A connection whose reads and writes end by a deadline: every wait of the socket is for no longer
//! than what is left of it, so that a peer that sends a byte now and then gains nothing.

use alloc::boxed::Box;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
#[cfg(unix)]
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::string::String;
use std::time::{Duration, Instant};

/// Where a server listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Endpoint {
    Tcp(String, u16),
    Unix(PathBuf),
}

#[derive(Debug)]
enum Stream {
    Tcp(TcpStream),
    #[cfg(unix)]
    Unix(UnixStream),
}

/// The connection, with a buffer for what is read in lines.
#[derive(Debug)]
pub(super) struct Wire {
    stream: Stream,
    buffer: Box<[u8]>,
    from: usize,
    to: usize,
    /// When what is being done must be done.
    pub deadline: Instant,
}

/// What is left until `deadline`; `TimedOut` where that is nothing.
fn left(deadline: Instant) -> io::Result<Duration> {
    match deadline.saturating_duration_since(Instant::now()) {
        Duration::ZERO => Err(ErrorKind::TimedOut.into()),
        left => Ok(left),
    }
}

impl Wire {
    pub fn connect(to: &Endpoint, limit: Duration, deadline: Instant) -> io::Result<Self> {
        let stream = match to {
            Endpoint::Tcp(host, port) => {
                let mut last = io::Error::from(ErrorKind::NotFound);
                let mut found = None;
                for address in (host.as_str(), *port).to_socket_addrs()? {
                    match TcpStream::connect_timeout(&address, left(deadline)?.min(limit)) {
                        Ok(stream) => {
                            found = Some(stream);
                            break;
                        }
                        Err(error) => last = error,
                    }
                }
                let stream = found.ok_or(last)?;
                stream.set_nodelay(true)?;
                Stream::Tcp(stream)
            }
            #[cfg(unix)]
            Endpoint::Unix(path) => Stream::Unix(UnixStream::connect(path)?),
            #[cfg(not(unix))]
            Endpoint::Unix(_) => return Err(ErrorKind::Unsupported.into()),
        };
        let buffer = alloc::vec![0; 16 << 10].into_boxed_slice();
        Ok(Self { stream, buffer, from: 0, to: 0, deadline })
    }

    /// Whether something came that nobody has read.
    pub fn has_rest(&self) -> bool {
        self.from < self.to
    }

    pub fn write_all(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let left = Some(left(self.deadline)?);
            let written = match &mut self.stream {
                Stream::Tcp(s) => s.set_write_timeout(left).and_then(|()| s.write(bytes)),
                #[cfg(unix)]
                Stream::Unix(s) => s.set_write_timeout(left).and_then(|()| s.write(bytes)),
            };
            match written {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(n) => bytes = &bytes[n..],
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Reads at least a byte.
    fn read_some(stream: &mut Stream, deadline: Instant, into: &mut [u8]) -> io::Result<usize> {
        loop {
            let left = Some(left(deadline)?);
            let read = match stream {
                Stream::Tcp(s) => s.set_read_timeout(left).and_then(|()| s.read(into)),
                #[cfg(unix)]
                Stream::Unix(s) => s.set_read_timeout(left).and_then(|()| s.read(into)),
            };
            match read {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                read => return read,
            }
        }
    }

    /// Fills `into`: what is not buffered comes straight from the socket.
    pub fn read_exact(&mut self, into: &mut [u8]) -> io::Result<()> {
        let mut done = into.len().min(self.to - self.from);
        into[..done].copy_from_slice(&self.buffer[self.from..self.from + done]);
        self.from += done;
        while done < into.len() {
            done += Self::read_some(&mut self.stream, self.deadline, &mut into[done..])?;
        }
        Ok(())
    }

    /// A line that ends with CR LF, without them; `InvalidData` where it is longer than the buffer.
    pub fn read_line(&mut self) -> io::Result<&[u8]> {
        let mut looked = self.from;
        loop {
            let end = self.buffer[looked..self.to].iter().position(|&byte| byte == b'\n');
            if let Some(end) = end.map(|end| looked + end) {
                let line = self.from..end;
                self.from = end + 1;
                let line = &self.buffer[line];
                return line.strip_suffix(b"\r").ok_or(ErrorKind::InvalidData.into());
            }
            if self.from > 0 {
                self.buffer.copy_within(self.from..self.to, 0);
                (self.from, self.to) = (0, self.to - self.from);
            }
            if self.to == self.buffer.len() {
                return Err(ErrorKind::InvalidData.into());
            }
            looked = self.to;
            let room = &mut self.buffer[self.to..];
            self.to += Self::read_some(&mut self.stream, self.deadline, room)?;
        }
    }
}
