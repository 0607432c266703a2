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
}

impl fmt::Debug for RedisStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("RedisStore").field(&self.endpoint).field(&self.database).finish()
    }
}

impl RedisStore {
    pub fn new(url: &Url, options: &RemoteOptions) -> Result<Self> {
        let bad = |why| Error::invalid("address", why);
        let decoded = |text: &str| percent_decode_str(text).decode_utf8_lossy().into_owned();
        let host = url.host_str().unwrap_or_default();
        let mut database = 0;
        let endpoint = if url.scheme() == "redis" {
            if host.is_empty() {
                return Err(bad("must name a host"));
            }
            let number = url.path().trim_start_matches('/');
            if !number.is_empty() {
                database = number.parse().map_err(|_| bad("must end with a database's number"))?;
            }
            let host = host.trim_start_matches('[').trim_end_matches(']');
            Endpoint::Tcp(host.into(), url.port().unwrap_or(6379))
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
        Ok(Self { endpoint, user, password, database, options, idle: Mutex::default() })
    }

    fn name(&self, key: &ObjectKey) -> String {
        name(&self.options.prefix, key)
    }

    fn connect(&self, deadline: Instant) -> io::Result<Connection> {
        let wire = Wire::connect(&self.endpoint, self.options.connect_timeout, deadline)?;
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
            if connection.reply()? != Reply::Status {
                return Err(ErrorKind::PermissionDenied.into());
            }
        }
        Ok(connection)
    }

    /// Makes a call over a connection, a kept one if there is one. A kept one that the server has
    /// closed meanwhile is no failure: the call is made once more, which all of them may be.
    fn call<T>(&self, mut call: impl FnMut(&mut Connection) -> io::Result<T>) -> io::Result<T> {
        let deadline = Instant::now() + self.options.timeout;
        let idle = || self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        let kept = idle().pop();
        if let Some(mut connection) = kept {
            connection.wire.deadline = deadline;
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
                *outcome = match connection.reply()? {
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
                let reply = connection.reply()?;
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
            for (put, name) in objects.iter().zip(&names) {
                connection.command(&[b"SET", name.as_bytes(), put.object])?;
            }
            connection.send()?;
            for outcome in &mut *outcomes {
                *outcome = match connection.reply()? {
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
