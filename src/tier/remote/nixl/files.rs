//! Objects as files of a directory that machines share. A put writes a file of another name and then
//! renames it, so that a file is whole or not there; a file whose writer died stays in a directory of
//! its own, which the next store empties.
//!
//! Nothing is flushed: what a power cut damages is found when it is verified, and removed.

use alloc::string::String;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering};
use core::time::Duration;
use std::fs::{self, File, OpenOptions};
use std::hash::{BuildHasher, RandomState};
use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd;
use std::path::{Component, Path, PathBuf};

use percent_encoding::percent_decode_str;
use url::Url;

use super::agent::{Kind, Transfer, Way};
use super::lane::Worker;
use crate::error::{Error, Result};
use crate::tier::Outcome;

/// How old a file is that nobody writes any more.
const LEFT: Duration = Duration::from_secs(24 * 3600);

/// The directory where files are written, below that of the store.
fn writing(dir: &Path) -> PathBuf {
    dir.join(".writing")
}

/// The directory that an address names.
///
/// # Errors
/// `InvalidArgument` where it names none, or names of objects could lead out of it.
pub(super) fn directory(url: &Url, prefix: &str) -> Result<PathBuf> {
    let dir = PathBuf::from(&*percent_decode_str(url.path()).decode_utf8_lossy());
    let elsewhere = url.host_str().is_some_and(|host| !host.is_empty());
    if elsewhere || !dir.is_absolute() || dir.parent().is_none() {
        let why = "must have the path of a directory, from the root on, after nixl+posix:";
        return Err(Error::invalid("address", why));
    }
    let below = |part| matches!(part, Component::Normal(name) if name != ".writing");
    if !Path::new(prefix).components().all(below) {
        return Err(Error::invalid("prefix", "must be a path below the directory"));
    }
    Ok(dir)
}

/// The path of the object of this name, whose last 64 characters are its key: in one of 256
/// directories, as one of all objects grows large.
pub(super) fn path(dir: &Path, name: &str) -> String {
    let (prefix, key) = name.split_at(name.len().saturating_sub(64));
    let path = dir.join(alloc::format!("{prefix}{}/{key}", &key[..2]));
    path.to_string_lossy().into_owned()
}

/// Looks whether the directory is there, and removes what writers of long ago left in it.
///
/// # Errors
/// `TierFailed` where it is not.
pub(super) fn open(dir: &Path) -> Result<()> {
    let failed = |error: io::Error| Error::TierFailed {
        what: "opening the directory that machines share",
        os_code: error.raw_os_error().unwrap_or(0),
    };
    fs::read_dir(dir).map_err(failed)?;
    let Ok(files) = fs::read_dir(writing(dir)) else { return Ok(()) };
    for file in files.flatten() {
        let age = file.metadata().and_then(|found| found.modified()).map(|time| time.elapsed());
        if matches!(age, Ok(Ok(age)) if age > LEFT) {
            let _ = fs::remove_file(file.path());
        }
    }
    Ok(())
}

/// A name that no other writer has, on this machine or another.
fn unique(dir: &Path) -> PathBuf {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let random = RandomState::new().hash_one(std::process::id());
    writing(dir).join(alloc::format!("{random:016x}-{number}"))
}

/// A file for an object, open, with its name.
fn create(dir: &Path) -> io::Result<(File, PathBuf)> {
    let path = unique(dir);
    let open = || OpenOptions::new().write(true).create_new(true).open(&path);
    let file = match open() {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            fs::create_dir_all(writing(dir))?;
            open()?
        }
        file => file?,
    };
    Ok((file, path))
}

/// Gives a file its name; the directory of the name is made with its first file.
fn publish(from: &Path, to: &Path) -> io::Result<()> {
    match fs::rename(from, to) {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            fs::create_dir_all(to.parent().unwrap_or(to))?;
            fs::rename(from, to)
        }
        renamed => renamed,
    }
}

fn failure(error: &io::Error) -> Outcome {
    match error.kind() {
        ErrorKind::NotFound => Outcome::Absent,
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => Outcome::Full,
        _ => Outcome::Failed,
    }
}

/// Moves bytes between files and parts of `staging`, those that are open; what was done.
fn transfer(
    worker: &mut Worker,
    way: Way,
    files: &[Option<&File>],
    staging: &mut [u8],
    lengths: &[usize],
) -> Vec<bool> {
    let mut rest = staging;
    let (mut transfers, mut which) = (Vec::new(), Vec::new());
    for (n, (file, &length)) in files.iter().zip(lengths).enumerate() {
        let (bytes, after) = rest.split_at_mut(length);
        rest = after;
        if let Some(file) = file {
            // A descriptor is never negative.
            let device = file.as_raw_fd().unsigned_abs().into();
            transfers.push(Transfer { device, name: "", bytes });
            which.push(n);
        }
    }
    let mut done = alloc::vec![false; files.len()];
    let Ok(agent) = worker.agent() else { return done };
    let moved = agent.transfer(way, Kind::File, &mut transfers);
    if moved.contains(&false) {
        worker.end_agent();
    }
    which.into_iter().zip(moved).for_each(|(n, moved)| done[n] = moved);
    done
}

/// Puts objects, one after the other in `staging`.
pub(super) fn put(
    worker: &mut Worker,
    dir: &Path,
    paths: &[String],
    staging: &mut [u8],
    lengths: &[usize],
) -> Vec<Outcome> {
    let files: Vec<_> = paths.iter().map(|_| create(dir)).collect();
    let open: Vec<_> = files.iter().map(|file| file.as_ref().ok().map(|file| &file.0)).collect();
    let done = transfer(worker, Way::Write, &open, staging, lengths);
    let mut outcomes = Vec::with_capacity(paths.len());
    for (((file, path), length), done) in files.iter().zip(paths).zip(lengths).zip(done) {
        outcomes.push(match file {
            // A missing directory is no missing object.
            Err(error) if error.kind() == ErrorKind::NotFound => Outcome::Failed,
            Err(error) => failure(error),
            Ok((file, written)) => {
                let whole = || file.metadata().is_ok_and(|found| found.len() == *length as u64);
                let named = match done && whole() {
                    true => publish(written, Path::new(path)).map_err(|error| failure(&error)),
                    false => Err(Outcome::Failed),
                };
                if named.is_err() {
                    let _ = fs::remove_file(written);
                }
                match named {
                    Ok(()) => Outcome::Done,
                    Err(Outcome::Full) => Outcome::Full,
                    Err(_) => Outcome::Failed,
                }
            }
        });
    }
    outcomes
}

/// Gets objects, one after the other into `staging`.
pub(super) fn get(
    worker: &mut Worker,
    paths: &[String],
    staging: &mut [u8],
    lengths: &[usize],
) -> Vec<Outcome> {
    let open = |(path, &length): (&String, &usize)| {
        let file = File::open(path).map_err(|error| failure(&error))?;
        let found = file.metadata().map_err(|error| failure(&error))?;
        let same = found.is_file() && found.len() == length as u64;
        if same { Ok(file) } else { Err(Outcome::Bad) }
    };
    let files: Vec<_> = paths.iter().zip(lengths).map(open).collect();
    let open: Vec<_> = files.iter().map(|file| file.as_ref().ok()).collect();
    let done = transfer(worker, Way::Read, &open, staging, lengths);
    let outcome = |(file, done): (&core::result::Result<File, Outcome>, bool)| match file {
        Ok(_) if done => Outcome::Done,
        Ok(_) => Outcome::Failed,
        Err(outcome) => *outcome,
    };
    files.iter().zip(done).map(outcome).collect()
}

/// Removes objects.
pub(super) fn remove(paths: &[String]) {
    // What stays there is verified again when it is next asked for.
    paths.iter().for_each(|path| drop(fs::remove_file(path)));
}
