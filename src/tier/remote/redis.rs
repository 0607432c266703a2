//! Objects as values of a Redis or Valkey server. The commands of a batch are sent together and
//! answered together; each of a tier's threads has a connection, kept from call to call.

use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;
use std::io::{self, ErrorKind};
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use percent_encoding::percent_decode_str;
use url::Url;

use super::refusal::{self, Refusal};
use super::resp::{Connection, Reply};
use super::wire::{Endpoint, Wire};
use super::{RemoteOptions, name};
use crate::error::{Error, Result};
use crate::tier::{Get, ObjectKey, Outcome, Put, Store};

/// The store.
pub(super) struct RedisStore {
    endpoint: Endpoint,
    user: String,
    password: String,
    database: u32,
    options: RemoteOptions,
    idle: Mutex<Vec<Connection>>,
    refusal: Refusal,
}

impl fmt::Debug for RedisStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (scheme, place) = match &self.endpoint {
            Endpoint::Tcp(host, port) => ("redis", alloc::format!("{host}:{port}")),
            #[cfg(feature = "remote-tls")]
            Endpoint::Tls(host, port, _) => ("rediss", alloc::format!("{host}:{port}")),
            Endpoint::Unix(path) => ("redis+unix", path.display().to_string()),
        };
        f.debug_tuple("RedisStore").field(&scheme).field(&place).field(&self.database).finish()
    }
}

impl RedisStore {
    pub fn new(url: &Url, options: &RemoteOptions) -> Result<Self> {
        let bad = |why| Error::invalid("address", why);
        let decoded = |text: &str| percent_decode_str(text).decode_utf8_lossy().into_owned();
        let host = url.host_str().unwrap_or_default();
        let mut database = 0;
        let endpoint = if matches!(url.scheme(), "redis" | "rediss") {
            if host.is_empty() {
                return Err(bad("must name a host"));
            }
            let number = url.path().trim_start_matches('/');
            if !number.is_empty() {
                database = number.parse().map_err(|_| bad("must end with a database's number"))?;
            }
            let host = host.trim_start_matches('[').trim_end_matches(']');
            let port = url.port().unwrap_or(6379);
            match url.scheme() {
                "redis" => Endpoint::Tcp(host.into(), port),
                _ => tls(host, port)?,
            }
        } else {
            let path = decoded(url.path());
            if !host.is_empty() || path.len() < 2 {
                return Err(bad("must have the path of a socket after redis+unix://"));
            }
            Endpoint::Unix(Path::new(&path).into())
        };
        let (user, password) =
            (decoded(url.username()), decoded(url.password().unwrap_or_default()));
        let options = options.clone();
        let (idle, refusal) = (Mutex::default(), Refusal::default());
        Ok(Self { endpoint, user, password, database, options, idle, refusal })
    }

    fn name(&self, key: &ObjectKey) -> String {
        name(&self.options.prefix, key)
    }

    fn connect(&self, deadline: Instant) -> io::Result<Connection> {
        let wire = Wire::connect(&self.endpoint, self.options.connect_timeout, deadline)
            .inspect_err(|error| self.note_failure(error))?;
        let mut connection = Connection::new(wire);
        let mut asked = 0;
        if !self.password.is_empty() {
            let (user, password) = (self.user.as_bytes(), self.password.as_bytes());
            match user {
                [] => connection.command(&[b"AUTH", password])?,
                user => connection.command(&[b"AUTH", user, password])?,
            }
            asked += 1;
        }
        if self.database > 0 {
            let number = alloc::format!("{}", self.database);
            connection.command(&[b"SELECT", number.as_bytes()])?;
            asked += 1;
        }
        connection.send()?;
        for _ in 0..asked {
            if self.reply(&mut connection)? != Reply::Status {
                return Err(ErrorKind::PermissionDenied.into());
            }
        }
        Ok(connection)
    }

    /// The next reply. Where it refuses whoever asks that is remembered, until one does not.
    fn reply(&self, connection: &mut Connection) -> io::Result<Reply> {
        let reply = connection.reply()?;
        self.note(&reply);
        Ok(reply)
    }

    #[cfg(feature = "remote-tls")]
    fn note_failure(&self, error: &io::Error) {
        if super::tls::is_certificate(error) {
            self.refusal.note(Some(refusal::CERTIFICATE));
        }
    }

    #[cfg(not(feature = "remote-tls"))]
    fn note_failure(&self, _: &io::Error) {}

    fn note(&self, reply: &Reply) {
        let why = match reply {
            Reply::Error(text) if text.starts_with("NOAUTH") => Some(refusal::NO_PASSWORD),
            Reply::Error(text) if text.starts_with("NOPERM") => Some(refusal::NOT_ALLOWED),
            Reply::Error(text)
                if text.starts_with("WRONGPASS")
                    // Redis before 6, and one that has no password.
                    || text.starts_with("ERR invalid password")
                    || text.starts_with("ERR AUTH") =>
            {
                Some(refusal::PASSWORD)
            }
            // Busy, full, or not for this key.
            Reply::Error(_) => return,
            _ => None,
        };
        self.refusal.note(why);
    }

    /// Makes a call over a connection, a kept one if there is one. A kept one that the server has
    /// closed meanwhile is no failure: the call is made once more, which all of them may be.
    fn call<T>(&self, mut call: impl FnMut(&mut Connection) -> io::Result<T>) -> io::Result<T> {
        let deadline = Instant::now() + self.options.timeout;
        let idle = || self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        let kept = idle().pop();
        if let Some(mut connection) = kept {
            connection.wire.set_deadline(deadline);
            match call(&mut connection) {
                Ok(result) => {
                    self.keep(connection);
                    return Ok(result);
                }
                // The others are as old.
                Err(error) if was_closed(error.kind()) => idle().clear(),
                Err(error) => return Err(error),
            }
        }
        let mut connection = self.connect(deadline)?;
        let result = call(&mut connection)?;
        self.keep(connection);
        Ok(result)
    }

    /// Keeps a connection, but none that has more to say than was asked.
    fn keep(&self, connection: Connection) {
        if !connection.wire.has_rest() {
            self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(connection);
        }
    }

    fn try_get(
        &self,
        names: &[String],
        objects: &mut [Get],
        outcomes: &mut [Outcome],
        see: &mut dyn FnMut(usize, &[u8]),
    ) -> io::Result<()> {
        self.call(|connection| {
            outcomes.fill(Outcome::None);
            for name in names {
                connection.command(&[b"GET", name.as_bytes()])?;
            }
            connection.send()?;
            for (n, (get, outcome)) in objects.iter_mut().zip(&mut *outcomes).enumerate() {
                *outcome = match self.reply(connection)? {
                    Reply::Bytes(bytes) if bytes == get.object.len() as u64 => {
                        connection.take(get.object)?;
                        see(n, get.object);
                        Outcome::Done
                    }
                    Reply::Bytes(bytes) => {
                        // So also where reading past it takes too long.
                        *outcome = Outcome::Bad;
                        connection.skip(bytes, get.object)?;
                        Outcome::Bad
                    }
                    Reply::Nil => Outcome::Absent,
                    // A value of another type.
                    Reply::Error(text) if text.starts_with("WRONGTYPE") => Outcome::Bad,
                    _ => Outcome::Failed,
                };
            }
            Ok(())
        })
    }
}

#[cfg(feature = "remote-tls")]
fn tls(host: &str, port: u16) -> Result<Endpoint> {
    Ok(Endpoint::Tls(host.into(), port, super::tls::Tls::new(host)?))
}

#[cfg(not(feature = "remote-tls"))]
fn tls(_: &str, _: u16) -> Result<Endpoint> {
    Err(Error::Unsupported { what: "a remote store over TLS" })
}

fn was_closed(kind: ErrorKind) -> bool {
    use ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, UnexpectedEof};
    matches!(kind, BrokenPipe | ConnectionAborted | ConnectionReset | UnexpectedEof)
}

/// What was not answered when a call failed has failed.
fn close(result: io::Result<()>, outcomes: &mut [Outcome]) {
    if result.is_err() {
        let open = outcomes.iter_mut().filter(|outcome| **outcome == Outcome::None);
        open.for_each(|outcome| *outcome = Outcome::Failed);
    }
}

impl Store for RedisStore {
    fn refusal(&self) -> Option<&'static str> {
        self.refusal.get()
    }

    fn knows(&self, _: &ObjectKey) -> Option<bool> {
        None
    }

    fn exists(&self, keys: &[ObjectKey], found: &mut [bool]) -> bool {
        let names: Vec<String> = keys.iter().map(|key| self.name(key)).collect();
        self.call(|connection| {
            for name in &names {
                connection.command(&[b"EXISTS", name.as_bytes()])?;
            }
            connection.send()?;
            let mut answered = true;
            for found in &mut *found {
                let reply = self.reply(connection)?;
                *found = reply == Reply::Number(1);
                answered &= matches!(reply, Reply::Number(_));
            }
            Ok(answered)
        })
        .unwrap_or(false)
    }

    fn put(&self, objects: &[Put], outcomes: &mut [Outcome]) {
        let names: Vec<String> = objects.iter().map(|put| self.name(&put.key)).collect();
        let result = self.call(|connection| {
            outcomes.fill(Outcome::None);
            connection.send_sets(
                names.iter().map(String::as_str).zip(objects.iter().map(|put| put.object)),
            )?;
            for outcome in &mut *outcomes {
                *outcome = match self.reply(connection)? {
                    Reply::Status => Outcome::Done,
                    Reply::Error(text) if text.starts_with("OOM") => Outcome::Full,
                    _ => Outcome::Failed,
                };
            }
            Ok(())
        });
        close(result, outcomes);
    }

    fn get(&self, objects: &mut [Get], outcomes: &mut [Outcome]) {
        self.get_each(objects, outcomes, &mut |_, _| {});
    }

    fn get_each(
        &self,
        objects: &mut [Get],
        outcomes: &mut [Outcome],
        see: &mut dyn FnMut(usize, &[u8]),
    ) {
        let names: Vec<String> = objects.iter().map(|get| self.name(&get.key)).collect();
        let result = self.try_get(&names, objects, outcomes, see);
        close(result, outcomes);
    }

    fn remove(&self, keys: &[ObjectKey]) {
        let names: Vec<String> = keys.iter().map(|key| self.name(key)).collect();
        let mut parts: Vec<&[u8]> = alloc::vec![b"DEL"];
        parts.extend(names.iter().map(|name| name.as_bytes()));
        // What stays there is verified again when it is next asked for.
        let _ = self.call(|connection| {
            connection.command(&parts)?;
            connection.send()?;
            connection.reply().map(drop)
        });
    }
}
