//! A connection whose reads and writes end by a deadline: every wait of the socket is for hardly
//! longer than what is left of it (a tenth, since to say how long is a call of the system, too), so
//! that a peer that sends a byte now and then gains nothing.

use alloc::boxed::Box;
use std::io::{self, ErrorKind, IoSlice, IoSliceMut, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
#[cfg(unix)]
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::string::String;
use std::time::{Duration, Instant};

#[cfg(feature = "remote-tls")]
use super::tls::Tls;

/// Where a server listens.
#[derive(Debug, Clone)]
pub(super) enum Endpoint {
    Tcp(String, u16),
    #[cfg(feature = "remote-tls")]
    Tls(String, u16, Tls),
    Unix(PathBuf),
}

/// Bytes that are read beyond what is asked for: enough for the reply between two objects, so that of
/// the objects little is copied twice.
const AHEAD: usize = 512;

#[derive(Debug)]
enum Socket {
    Tcp(TcpStream),
    #[cfg(unix)]
    Unix(UnixStream),
}

/// A socket that waits no longer than until the deadline.
#[derive(Debug)]
struct Timed {
    socket: Socket,
    /// How long the socket waits for reads and for writes, as it was last told.
    waits: [Duration; 2],
    /// When what is being done must be done.
    deadline: Instant,
}

#[derive(Debug)]
enum Stream {
    Plain(Timed),
    #[cfg(feature = "remote-tls")]
    Tls(Box<rustls::StreamOwned<rustls::ClientConnection, Timed>>),
}

/// The connection, with a buffer for what is read in lines.
#[derive(Debug)]
pub(super) struct Wire {
    stream: Stream,
    buffer: Box<[u8]>,
    from: usize,
    to: usize,
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
        let timed = |socket| Timed { socket, waits: [Duration::ZERO; 2], deadline };
        let stream = match to {
            Endpoint::Tcp(host, port) => Stream::Plain(timed(tcp(host, *port, limit, deadline)?)),
            #[cfg(feature = "remote-tls")]
            Endpoint::Tls(host, port, tls) => {
                let socket = timed(tcp(host, *port, limit, deadline)?);
                let mut stream = rustls::StreamOwned::new(tls.client()?, socket);
                while stream.conn.is_handshaking() {
                    stream.conn.complete_io(&mut stream.sock)?;
                }
                Stream::Tls(Box::new(stream))
            }
            #[cfg(unix)]
            Endpoint::Unix(path) => Stream::Plain(timed(Socket::Unix(UnixStream::connect(path)?))),
            #[cfg(not(unix))]
            Endpoint::Unix(_) => return Err(ErrorKind::Unsupported.into()),
        };
        let buffer = alloc::vec![0; 16 << 10].into_boxed_slice();
        Ok(Self { stream, buffer, from: 0, to: 0 })
    }

    /// When what is done from now on must be done.
    pub fn set_deadline(&mut self, deadline: Instant) {
        match &mut self.stream {
            Stream::Plain(timed) => timed.deadline = deadline,
            #[cfg(feature = "remote-tls")]
            Stream::Tls(stream) => stream.sock.deadline = deadline,
        }
    }

    /// Whether something came that nobody has read.
    pub fn has_rest(&self) -> bool {
        self.from < self.to
    }

    pub fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        match &mut self.stream {
            Stream::Plain(timed) => timed.write_all(bytes),
            #[cfg(feature = "remote-tls")]
            Stream::Tls(stream) => stream.write_all(bytes),
        }
    }

    /// Writes all parts, in as few calls of the system as it takes.
    pub fn write_all_vectored(&mut self, mut parts: &mut [IoSlice]) -> io::Result<()> {
        // Empty ones at the front would look like a peer that takes nothing.
        IoSlice::advance_slices(&mut parts, 0);
        while !parts.is_empty() {
            // As many as the system takes at once on any platform.
            let at_once = &parts[..parts.len().min(64)];
            let written = match &mut self.stream {
                Stream::Plain(timed) => timed.write_vectored(at_once)?,
                #[cfg(feature = "remote-tls")]
                Stream::Tls(stream) => stream.write_vectored(at_once)?,
            };
            if written == 0 {
                return Err(ErrorKind::WriteZero.into());
            }
            IoSlice::advance_slices(&mut parts, written);
        }
        Ok(())
    }

    /// Sends what was written and is kept, which TLS does with less than a record.
    pub fn flush(&mut self) -> io::Result<()> {
        match &mut self.stream {
            Stream::Plain(_) => Ok(()),
            #[cfg(feature = "remote-tls")]
            Stream::Tls(stream) => stream.flush(),
        }
    }

    /// Reads at least a byte into `into`, and what comes with it into the first `ahead` bytes of the
    /// buffer, which is empty; how much is in `into`.
    fn read_some(&mut self, into: &mut [u8], ahead: usize) -> io::Result<usize> {
        let (bytes, buffer) = (into.len(), &mut self.buffer[..ahead]);
        let read = match &mut self.stream {
            Stream::Plain(timed) => {
                timed.read_vectored(&mut [IoSliceMut::new(into), IoSliceMut::new(buffer)])
            }
            #[cfg(feature = "remote-tls")]
            Stream::Tls(stream) => stream.read(into),
        };
        match read? {
            0 => Err(ErrorKind::UnexpectedEof.into()),
            count => {
                (self.from, self.to) = (0, count.saturating_sub(bytes));
                Ok(count.min(bytes))
            }
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

/// A connection to the first of a host's addresses that takes one.
fn tcp(host: &str, port: u16, limit: Duration, deadline: Instant) -> io::Result<Socket> {
    let mut last = io::Error::from(ErrorKind::NotFound);
    for address in (host, port).to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, left(deadline)?.min(limit)) {
            Ok(stream) => {
                stream.set_nodelay(true)?;
                return Ok(Socket::Tcp(stream));
            }
            Err(error) => last = error,
        }
    }
    Err(last)
}

impl Timed {
    /// Makes the socket wait until the deadline, if what it was told last is not about that.
    fn wait(&mut self, way: usize) -> io::Result<()> {
        let left = left(self.deadline)?;
        if self.waits[way].abs_diff(left) > left / 10 {
            let limit = Some(left);
            match (&self.socket, way) {
                (Socket::Tcp(socket), READS) => socket.set_read_timeout(limit),
                (Socket::Tcp(socket), _) => socket.set_write_timeout(limit),
                #[cfg(unix)]
                (Socket::Unix(socket), READS) => socket.set_read_timeout(limit),
                #[cfg(unix)]
                (Socket::Unix(socket), _) => socket.set_write_timeout(limit),
            }?;
            self.waits[way] = left;
        }
        Ok(())
    }

    /// Makes a call until it is done: again where it was interrupted, or the socket waited for as long
    /// as it was told before there was more time.
    fn until_done(
        &mut self,
        way: usize,
        mut call: impl FnMut(&mut Socket) -> io::Result<usize>,
    ) -> io::Result<usize> {
        loop {
            self.wait(way)?;
            match call(&mut self.socket) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error)
                    if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) =>
                {
                    self.waits = [Duration::ZERO; 2];
                }
                done => return done,
            }
        }
    }
}

/// Ways of a socket.
const READS: usize = 0;
const WRITES: usize = 1;

impl Read for Timed {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.read_vectored(&mut [IoSliceMut::new(into)])
    }

    fn read_vectored(&mut self, parts: &mut [IoSliceMut]) -> io::Result<usize> {
        self.until_done(READS, |socket| match socket {
            Socket::Tcp(socket) => socket.read_vectored(parts),
            #[cfg(unix)]
            Socket::Unix(socket) => socket.read_vectored(parts),
        })
    }
}

impl Write for Timed {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(bytes)])
    }

    fn write_vectored(&mut self, parts: &[IoSlice]) -> io::Result<usize> {
        self.until_done(WRITES, |socket| match socket {
            Socket::Tcp(socket) => socket.write_vectored(parts),
            #[cfg(unix)]
            Socket::Unix(socket) => socket.write_vectored(parts),
        })
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
