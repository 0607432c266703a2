//! A connection whose reads and writes end by a deadline: every wait of the socket is for hardly
//! longer than what is left of it (a tenth, since to say how long is a call of the system, too), so
//! that a peer that sends a byte now and then gains nothing.

use alloc::boxed::Box;
use std::io::{self, ErrorKind, IoSliceMut, Read, Write};
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

/// Bytes that are read beyond what is asked for: enough for the reply between two objects, so that of
/// the objects little is copied twice.
const AHEAD: usize = 512;

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
    /// How long the socket waits for reads and for writes, as it was last told.
    waits: [Duration; 2],
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
        let waits = [Duration::ZERO; 2];
        Ok(Self { stream, buffer, from: 0, to: 0, waits, deadline })
    }

    /// Whether something came that nobody has read.
    pub fn has_rest(&self) -> bool {
        self.from < self.to
    }

    pub fn write_all(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            self.stream.wait_for(&mut self.waits[1], self.deadline, Stream::set_write_timeout)?;
            let written = match &mut self.stream {
                Stream::Tcp(stream) => stream.write(bytes),
                #[cfg(unix)]
                Stream::Unix(stream) => stream.write(bytes),
            };
            match written {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(n) => bytes = &bytes[n..],
                Err(error) => self.retry(error)?,
            }
        }
        Ok(())
    }

    /// Reads at least a byte into `into`, and what comes with it into the first `ahead` bytes of the
    /// buffer, which is empty; how much is in `into`.
    fn read_some(&mut self, into: &mut [u8], ahead: usize) -> io::Result<usize> {
        loop {
            self.stream.wait_for(&mut self.waits[0], self.deadline, Stream::set_read_timeout)?;
            let (bytes, buffer) = (into.len(), &mut self.buffer[..ahead]);
            let parts = &mut [IoSliceMut::new(into), IoSliceMut::new(buffer)];
            let read = match &mut self.stream {
                Stream::Tcp(stream) => stream.read_vectored(parts),
                #[cfg(unix)]
                Stream::Unix(stream) => stream.read_vectored(parts),
            };
            match read {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(count) => {
                    (self.from, self.to) = (0, count.saturating_sub(bytes));
                    return Ok(count.min(bytes));
                }
                Err(error) => self.retry(error)?,
            }
        }
    }

    /// Whether a call that failed is to be made again: it was interrupted, or the socket waited for
    /// as long as it was told before there was more time.
    fn retry(&mut self, error: io::Error) -> io::Result<()> {
        match error.kind() {
            ErrorKind::Interrupted => Ok(()),
            ErrorKind::WouldBlock | ErrorKind::TimedOut => {
                self.waits = [Duration::ZERO; 2];
                left(self.deadline).map(drop)
            }
            _ => Err(error),
        }
    }

    /// Fills `into`: what is not buffered comes straight from the socket, and with its end the
    /// beginning of what follows.
    pub fn read_exact(&mut self, into: &mut [u8]) -> io::Result<()> {
        let mut done = into.len().min(self.to - self.from);
        into[..done].copy_from_slice(&self.buffer[self.from..self.from + done]);
        self.from += done;
        while done < into.len() {
            done += self.read_some(&mut into[done..], AHEAD)?;
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
            let had = self.to;
            if had == self.buffer.len() {
                return Err(ErrorKind::InvalidData.into());
            }
            looked = had;
            let mut more = [0; AHEAD];
            let room = AHEAD.min(self.buffer.len() - had);
            let count = self.read_some(&mut more[..room], 0)?;
            self.buffer[had..had + count].copy_from_slice(&more[..count]);
            (self.from, self.to) = (0, had + count);
        }
    }
}

impl Stream {
    fn set_read_timeout(&self, limit: Duration) -> io::Result<()> {
        match self {
            Stream::Tcp(stream) => stream.set_read_timeout(Some(limit)),
            #[cfg(unix)]
            Stream::Unix(stream) => stream.set_read_timeout(Some(limit)),
        }
    }

    fn set_write_timeout(&self, limit: Duration) -> io::Result<()> {
        match self {
            Stream::Tcp(stream) => stream.set_write_timeout(Some(limit)),
            #[cfg(unix)]
            Stream::Unix(stream) => stream.set_write_timeout(Some(limit)),
        }
    }

    /// Makes the socket wait until the deadline, if what it was told last is not about that.
    fn wait_for(
        &self,
        told: &mut Duration,
        deadline: Instant,
        tell: fn(&Self, Duration) -> io::Result<()>,
    ) -> io::Result<()> {
        let left = left(deadline)?;
        if told.abs_diff(left) > left / 10 {
            tell(self, left)?;
            *told = left;
        }
        Ok(())
    }
}
