//! Stores that NIXL moves bytes to: a directory that machines share, or a bucket of an S3-compatible
//! store. The library is loaded when such a store is opened; a build needs nothing of it.
//!
//! Objects pass through memory of the store's own, since what NIXL moves cannot be called back: a call
//! that takes longer than its limit is left to end by itself, with the memory it uses. Each of a tier's
//! threads has an agent of its own, on a thread of its own, kept from call to call.
//!
//! NIXL has no call that removes anything: files are removed as files, and objects of a bucket by a
//! request of our own.

mod agent;
mod files;
mod lane;
mod objects;
#[cfg(test)]
mod tests;

use alloc::boxed::Box;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::ops::Range;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use url::Url;

use self::agent::Kind;
use self::lane::{Lane, Recipe, Worker};
use super::s3::S3Store;
use super::{RemoteOptions, name};
use crate::error::{Error, Result};
use crate::tier::{Get, ObjectKey, Outcome, Put, Store};

/// Bytes that a call moves at once, unless an object is longer.
const STAGED: usize = 8 << 20;

/// Where objects are.
#[derive(Debug)]
enum Place {
    Directory(PathBuf),
    /// What removes them.
    Bucket(Box<S3Store>),
}

/// The store.
#[derive(Debug)]
pub(super) struct NixlStore {
    place: Arc<Place>,
    recipe: Arc<Recipe>,
    options: RemoteOptions,
    idle: Mutex<Vec<Lane>>,
}

impl NixlStore {
    /// # Errors
    /// `InvalidArgument` for an address that is none; `TierFailed` where NIXL, or its plugin, cannot be
    /// loaded.
    pub fn new(url: &Url, options: &RemoteOptions) -> Result<Self> {
        let bad = |why| Error::invalid("address", why);
        let (place, recipe) = match url.scheme() {
            "nixl+posix" => {
                let place = Place::Directory(files::directory(url, &options.prefix)?);
                (place, Recipe::new(c"POSIX", Vec::new()))
            }
            _ => {
                let bucket = url.as_str().trim_start_matches("nixl+");
                let bucket = Url::parse(bucket).map_err(|_| bad("is not a URL"))?;
                let bucket = S3Store::new(&bucket, options)?;
                let parameters = bucket.nixl_parameters();
                (Place::Bucket(Box::new(bucket)), Recipe::new(c"OBJ", parameters))
            }
        };
        let (place, recipe) = (Arc::new(place), Arc::new(recipe));
        let store = Self { place, recipe, options: options.clone(), idle: Mutex::default() };
        // What cannot work is said now; a server need not be there yet.
        let place = store.place.clone();
        let open = move |worker: &mut Worker, _: &mut [u8]| {
            if let Place::Directory(dir) = &*place {
                files::open(dir)?;
            }
            worker.agent().map(drop)
        };
        let late = Error::TierFailed { what: "opening NIXL's store in time", os_code: 0 };
        store.run(store.deadline(), 0, |_| {}, open, |_, _| {}).unwrap_or(Err(late))?;
        Ok(store)
    }

    fn deadline(&self) -> Instant {
        Instant::now() + self.options.timeout
    }

    /// The path of an object's file, or the name of an object of the bucket.
    fn name(&self, key: &ObjectKey) -> String {
        let name = name(&self.options.prefix, key);
        match &*self.place {
            Place::Directory(dir) => files::path(dir, &name),
            Place::Bucket(_) => name,
        }
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Lane>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs a call on a lane, with `bytes` bytes of its memory that are filled before it and looked at
    /// after it, here. None where it took too long.
    fn run<T: Send + 'static>(
        &self,
        deadline: Instant,
        bytes: usize,
        fill: impl FnOnce(&mut [u8]),
        call: impl FnOnce(&mut Worker, &mut [u8]) -> T + Send + 'static,
        look: impl FnOnce(&T, &[u8]),
    ) -> Option<T> {
        let kept = self.idle().pop();
        let mut lane = kept.or_else(|| Lane::new(&self.recipe))?;
        let mut staging = core::mem::take(&mut lane.staging);
        if staging.len() < bytes {
            staging.try_reserve_exact(bytes - staging.len()).ok()?;
            staging.resize(bytes, 0);
        }
        fill(&mut staging[..bytes]);
        let (mut lane, (staging, result)) = lane.call(deadline, move |worker| {
            let result = call(worker, &mut staging[..bytes]);
            (staging, result)
        })?;
        look(&result, &staging[..bytes]);
        lane.staging = staging;
        self.idle().push(lane);
        Some(result)
    }
}

/// Parts of a batch whose bytes are moved together: one object, or several of `STAGED` bytes at most.
fn parts(lengths: &[usize]) -> impl Iterator<Item = Range<usize>> {
    let mut from = 0;
    core::iter::from_fn(move || {
        let mut bytes = *lengths.get(from)?;
        let more = lengths[from + 1..].iter().take_while(|&&length| {
            bytes = bytes.saturating_add(length);
            bytes <= STAGED
        });
        let part = from..from + 1 + more.count();
        from = part.end;
        Some(part)
    })
}

impl Store for NixlStore {
    fn knows(&self, _: &ObjectKey) -> Option<bool> {
        None
    }

    fn exists(&self, keys: &[ObjectKey], found: &mut [bool]) -> bool {
        let names: Vec<String> = keys.iter().map(|key| self.name(key)).collect();
        let kind = match &*self.place {
            Place::Directory(_) => Kind::File,
            Place::Bucket(_) => Kind::Object,
        };
        let ask = move |worker: &mut Worker, _: &mut [u8]| worker.agent().ok()?.exist(kind, &names);
        match self.run(self.deadline(), 0, |_| {}, ask, |_, _| {}).flatten() {
            Some(there) => {
                found.copy_from_slice(&there);
                true
            }
            None => false,
        }
    }

    fn put(&self, objects: &[Put], outcomes: &mut [Outcome]) {
        let deadline = self.deadline();
        let lengths: Vec<usize> = objects.iter().map(|put| put.object.len()).collect();
        outcomes.fill(Outcome::Failed);
        for part in parts(&lengths) {
            let (objects, outcomes) = (&objects[part.clone()], &mut outcomes[part.clone()]);
            let names: Vec<String> = objects.iter().map(|put| self.name(&put.key)).collect();
            let (place, lengths) = (self.place.clone(), lengths[part].to_vec());
            let fill = |mut staging: &mut [u8]| {
                for put in objects {
                    let (bytes, rest) = staging.split_at_mut(put.object.len());
                    bytes.copy_from_slice(put.object);
                    staging = rest;
                }
            };
            let bytes = lengths.iter().sum();
            let call = move |worker: &mut Worker, staging: &mut [u8]| match &*place {
                Place::Directory(dir) => files::put(worker, dir, &names, staging, &lengths),
                Place::Bucket(_) => objects::put(worker, &names, staging, &lengths),
            };
            match self.run(deadline, bytes, fill, call, |_, _| {}) {
                Some(done) => outcomes.copy_from_slice(&done),
                None => return,
            }
        }
    }

    fn get(&self, objects: &mut [Get], outcomes: &mut [Outcome]) {
        let deadline = self.deadline();
        let lengths: Vec<usize> = objects.iter().map(|get| get.object.len()).collect();
        outcomes.fill(Outcome::Failed);
        for part in parts(&lengths) {
            let (objects, outcomes) = (&mut objects[part.clone()], &mut outcomes[part.clone()]);
            let names: Vec<String> = objects.iter().map(|get| self.name(&get.key)).collect();
            let (place, lengths) = (self.place.clone(), lengths[part].to_vec());
            let bytes = lengths.iter().sum();
            let call = move |worker: &mut Worker, staging: &mut [u8]| match &*place {
                Place::Directory(_) => files::get(worker, &names, staging, &lengths),
                Place::Bucket(_) => objects::get(worker, &names, staging, &lengths),
            };
            let look = |done: &Vec<Outcome>, mut staging: &[u8]| {
                for (get, outcome) in objects.iter_mut().zip(done) {
                    let (bytes, rest) = staging.split_at(get.object.len());
                    if *outcome == Outcome::Done {
                        get.object.copy_from_slice(bytes);
                    }
                    staging = rest;
                }
                outcomes.copy_from_slice(done);
            };
            if self.run(deadline, bytes, |_| {}, call, look).is_none() {
                return;
            }
        }
    }

    fn remove(&self, keys: &[ObjectKey]) {
        match &*self.place {
            Place::Bucket(bucket) => bucket.remove(keys),
            Place::Directory(_) => {
                let paths: Vec<String> = keys.iter().map(|key| self.name(key)).collect();
                let call = move |_: &mut Worker, _: &mut [u8]| files::remove(&paths);
                let _ = self.run(self.deadline(), 0, |_| {}, call, |(), _| {});
            }
        }
    }
}

#[cfg(test)]
mod part_tests {
    use super::*;

    #[test]
    fn parts_are_of_no_more_bytes_than_are_staged_and_leave_nothing_out() {
        let of = |lengths: &[usize]| -> Vec<(usize, usize)> {
            parts(lengths).map(|part| (part.start, part.end)).collect()
        };
        assert!(of(&[]).is_empty());
        assert_eq!(of(&[1, 2, 3]), [(0, 3)]);
        assert_eq!(of(&[STAGED, 0, 1, STAGED - 1, 1]), [(0, 2), (2, 4), (4, 5)]);
        assert_eq!(of(&[STAGED + 1, usize::MAX, 7]), [(0, 1), (1, 2), (2, 3)]);
    }
}
