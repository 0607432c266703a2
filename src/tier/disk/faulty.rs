//! Disks that fail, for tests: files in memory that lose what was not flushed in a power cut, tear
//! writes, and answer errors and short counts at a chosen operation.

use std::collections::BTreeMap;
use std::io::{Error, ErrorKind, Result};
use std::sync::{Arc, Mutex};

use super::files::{DiskFile, Files};

/// What goes wrong at one operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trouble {
    /// The power goes: this operation and all after it fail, and what was not flushed is lost, or
    /// torn.
    PowerCut,
    /// The disk is full.
    Full,
    /// It answers an error.
    Broken,
    /// Reads and writes do half of what they were asked for.
    Short,
}

#[derive(Debug, Default, Clone)]
struct Content {
    /// What a reader sees.
    now: Vec<u8>,
    /// What survives a power cut.
    flushed: Vec<u8>,
    /// Ranges written since, in order.
    dirty: Vec<(usize, usize)>,
}

#[derive(Debug, Default)]
struct Disk {
    files: Vec<Content>,
    names: BTreeMap<String, usize>,
    flushed_names: BTreeMap<String, usize>,
    locked: bool,
    operations: u64,
    trouble: Option<(u64, Trouble)>,
    dead: bool,
    seed: u64,
}

/// A disk in memory; clones are the same disk.
#[derive(Debug, Clone, Default)]
pub struct FaultyFiles(Arc<Mutex<Disk>>);

#[derive(Debug)]
struct FaultyFile {
    disk: Arc<Mutex<Disk>>,
    number: usize,
}

impl Disk {
    /// Whether this operation is in trouble.
    fn step(&mut self) -> Result<bool> {
        self.operations += 1;
        if self.dead {
            return Err(Error::other("no power"));
        }
        match self.trouble {
            Some((at, trouble)) if self.operations >= at => {
                // A power cut stays, a short count stays; the others happen once.
                match trouble {
                    Trouble::PowerCut => {
                        self.dead = true;
                        Err(Error::other("no power"))
                    }
                    Trouble::Short => Ok(true),
                    Trouble::Full => {
                        self.trouble = None;
                        Err(ErrorKind::StorageFull.into())
                    }
                    Trouble::Broken => {
                        self.trouble = None;
                        Err(Error::from_raw_os_error(libc::EIO))
                    }
                }
            }
            _ => Ok(false),
        }
    }

    fn random(&mut self) -> u64 {
        self.seed = self.seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        self.seed >> 33
    }
}

impl FaultyFiles {
    /// The operation from which on something goes wrong.
    pub fn trouble(&self, at: u64, trouble: Trouble) {
        let mut disk = self.0.lock().unwrap();
        disk.trouble = Some((disk.operations + at, trouble));
    }

    /// Operations so far.
    pub fn operations(&self) -> u64 {
        self.0.lock().unwrap().operations
    }

    /// The disk as the next start finds it: flushed bytes, and of the others any part, torn at 512
    /// bytes, chosen by `seed`.
    pub fn after_power_cut(&self, seed: u64) -> FaultyFiles {
        let mut disk = self.0.lock().unwrap();
        disk.seed = seed;
        let mut files = disk.files.clone();
        for file in &mut files {
            let mut survives = file.flushed.clone();
            for (start, end) in file.dirty.clone() {
                let mut at = start;
                while at < end {
                    let next = ((at / 512 + 1) * 512).min(end);
                    if disk.random().is_multiple_of(2) {
                        if survives.len() < next {
                            survives.resize(next, 0);
                        }
                        survives[at..next].copy_from_slice(&file.now[at..next]);
                    }
                    at = next;
                }
            }
            *file = Content { now: survives.clone(), flushed: survives, dirty: Vec::new() };
        }
        // A name that was not flushed may be there or not.
        let mut names = disk.flushed_names.clone();
        if disk.random().is_multiple_of(2) {
            names = disk.names.clone();
        }
        let disk = Disk { files, flushed_names: names.clone(), names, ..Disk::default() };
        FaultyFiles(Arc::new(Mutex::new(disk)))
    }

    /// Another process gets the directory of one that was killed, with all that it wrote.
    pub fn after_kill(&self) -> FaultyFiles {
        let disk = self.0.lock().unwrap();
        let (files, names) = (disk.files.clone(), disk.names.clone());
        let disk =
            Disk { files, names, flushed_names: disk.flushed_names.clone(), ..Disk::default() };
        FaultyFiles(Arc::new(Mutex::new(disk)))
    }

    /// Changes the bytes of a file behind everybody's back.
    pub fn edit(&self, name: &str, edit: impl FnOnce(&mut Vec<u8>)) {
        let mut disk = self.0.lock().unwrap();
        let number = disk.names[name];
        edit(&mut disk.files[number].now);
    }
}

impl Files for FaultyFiles {
    fn open(&self, name: &str, create: bool, _: bool) -> Result<Box<dyn DiskFile>> {
        let mut disk = self.0.lock().unwrap();
        disk.step()?;
        let number = match disk.names.get(name) {
            Some(&number) => number,
            None if create => {
                disk.files.push(Content::default());
                let number = disk.files.len() - 1;
                disk.names.insert(name.into(), number);
                number
            }
            None => return Err(ErrorKind::NotFound.into()),
        };
        Ok(Box::new(FaultyFile { disk: self.0.clone(), number }))
    }

    fn rename(&self, from: &str, to: &str) -> Result<()> {
        let mut disk = self.0.lock().unwrap();
        disk.step()?;
        let number = disk.names.remove(from).ok_or(ErrorKind::NotFound)?;
        disk.names.insert(to.into(), number);
        Ok(())
    }

    fn sync_names(&self) -> Result<()> {
        let mut disk = self.0.lock().unwrap();
        disk.step()?;
        disk.flushed_names = disk.names.clone();
        Ok(())
    }

    fn names(&self) -> Result<Vec<String>> {
        Ok(self.0.lock().unwrap().names.keys().cloned().collect())
    }

    fn lock(&mut self) -> Result<bool> {
        let mut disk = self.0.lock().unwrap();
        Ok(!core::mem::replace(&mut disk.locked, true))
    }
}

impl DiskFile for FaultyFile {
    fn read_at(&self, bytes: &mut [u8], offset: u64) -> Result<usize> {
        let mut disk = self.disk.lock().unwrap();
        let short = disk.step()?;
        let now = &disk.files[self.number].now;
        let from = now.get(offset as usize..).unwrap_or(&[]);
        let mut count = bytes.len().min(from.len());
        if short && count > 1 {
            count /= 2;
        }
        bytes[..count].copy_from_slice(&from[..count]);
        Ok(count)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> Result<usize> {
        let mut disk = self.disk.lock().unwrap();
        let short = match disk.step() {
            Ok(short) => short,
            // The power goes in the middle of it.
            Err(error) if disk.dead => {
                let count = bytes.len() / 2;
                disk.files[self.number].write(&bytes[..count], offset as usize);
                return Err(error);
            }
            Err(error) => return Err(error),
        };
        let count = if short && bytes.len() > 1 { bytes.len() / 2 } else { bytes.len() };
        disk.files[self.number].write(&bytes[..count], offset as usize);
        Ok(count)
    }

    fn sync(&self) -> Result<()> {
        let mut disk = self.disk.lock().unwrap();
        disk.step()?;
        let file = &mut disk.files[self.number];
        file.flushed = file.now.clone();
        file.dirty.clear();
        Ok(())
    }

    fn length(&self) -> Result<u64> {
        Ok(self.disk.lock().unwrap().files[self.number].now.len() as u64)
    }

    fn allocate(&self, bytes: u64) -> Result<()> {
        let mut disk = self.disk.lock().unwrap();
        disk.step()?;
        let file = &mut disk.files[self.number];
        if file.now.len() < bytes as usize {
            file.now.resize(bytes as usize, 0);
        }
        Ok(())
    }

    fn set_len(&self, bytes: u64) -> Result<()> {
        let mut disk = self.disk.lock().unwrap();
        disk.step()?;
        let file = &mut disk.files[self.number];
        file.now.resize(bytes as usize, 0);
        file.dirty.retain(|&(_, end)| end <= bytes as usize);
        Ok(())
    }
}

impl Content {
    fn write(&mut self, bytes: &[u8], at: usize) {
        if self.now.len() < at + bytes.len() {
            self.now.resize(at + bytes.len(), 0);
        }
        self.now[at..at + bytes.len()].copy_from_slice(bytes);
        self.dirty.push((at, at + bytes.len()));
    }
}
