//! The files that the disk tier needs, behind a trait, so that tests can put failing disks and
//! power cuts in their place.

use alloc::boxed::Box;
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{Error, ErrorKind, Result};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// An open file.
pub trait DiskFile: fmt::Debug + Send + Sync {
    /// Reads at an offset; may read less, 0 at the end.
    ///
    /// # Errors
    /// Those of the system.
    fn read_at(&self, bytes: &mut [u8], offset: u64) -> Result<usize>;

    /// Writes at an offset; may write less.
    ///
    /// # Errors
    /// Those of the system.
    fn write_at(&self, bytes: &[u8], offset: u64) -> Result<usize>;

    /// Waits until what was written survives a power cut.
    ///
    /// # Errors
    /// Those of the system.
    fn sync(&self) -> Result<()>;

    /// Its length.
    ///
    /// # Errors
    /// Those of the system.
    fn length(&self) -> Result<u64>;

    /// Makes it so long, zeros behind what it has, and takes the room on the disk now.
    ///
    /// # Errors
    /// Those of the system: `StorageFull` above all.
    fn allocate(&self, bytes: u64) -> Result<()>;

    /// Makes it so long, no matter what is lost.
    ///
    /// # Errors
    /// Those of the system.
    fn set_len(&self, bytes: u64) -> Result<()>;

    /// Waits until no other process can change it any more, and keeps others waiting while it is
    /// open. A transfer that was given to io_uring outlives the process that gave it.
    ///
    /// # Errors
    /// Those of the system.
    fn own(&self) -> Result<()> {
        Ok(())
    }

    /// The descriptor, where there is one to give to io_uring.
    fn descriptor(&self) -> Option<RawFd> {
        None
    }
}

/// A directory's files, by name.
pub trait Files: fmt::Debug + Send + Sync {
    /// Opens a file for reading and writing; `direct`: past the page cache, where that can be.
    ///
    /// # Errors
    /// Those of the system; `NotFound` unless it may be created.
    fn open(&self, name: &str, create: bool, direct: bool) -> Result<Box<dyn DiskFile>>;

    /// Gives a file another name, in place of what has it.
    ///
    /// # Errors
    /// Those of the system.
    fn rename(&self, from: &str, to: &str) -> Result<()>;

    /// Waits until names that were made or changed survive a power cut.
    ///
    /// # Errors
    /// Those of the system.
    fn sync_names(&self) -> Result<()>;

    /// The names there are.
    ///
    /// # Errors
    /// Those of the system.
    fn names(&self) -> Result<Vec<String>>;

    /// Makes the directory this process's own; false where another has it.
    ///
    /// # Errors
    /// Those of the system.
    fn lock(&mut self) -> Result<bool>;
}

/// Reads all of `bytes`, or says how it could not.
pub fn read_all(file: &dyn DiskFile, mut bytes: &mut [u8], mut offset: u64) -> Result<()> {
    while !bytes.is_empty() {
        match file.read_at(bytes, offset) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(count) => {
                let count = count.min(bytes.len());
                bytes = &mut bytes[count..];
                offset += count as u64;
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Writes all of `bytes`, or says how it could not.
pub fn write_all(file: &dyn DiskFile, mut bytes: &[u8], mut offset: u64) -> Result<()> {
    while !bytes.is_empty() {
        match file.write_at(bytes, offset) {
            Ok(0) => return Err(ErrorKind::WriteZero.into()),
            Ok(count) => {
                let count = count.min(bytes.len());
                bytes = &bytes[count..];
                offset += count as u64;
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// A directory of the system.
#[derive(Debug)]
pub struct Directory {
    path: PathBuf,
    lock: Option<File>,
}

impl Directory {
    /// The directory at `path`, made where it is not there.
    ///
    /// # Errors
    /// Those of the system.
    pub fn new(path: &Path) -> Result<Self> {
        fs::create_dir_all(path)?;
        Ok(Self { path: path.to_path_buf(), lock: None })
    }
}

/// The file whose lock says that a process uses the directory.
const LOCK: &str = "lock";

impl Files for Directory {
    fn open(&self, name: &str, create: bool, direct: bool) -> Result<Box<dyn DiskFile>> {
        let path = self.path.join(name);
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(create);
        if direct && cfg!(target_os = "linux") {
            #[cfg(target_os = "linux")]
            options.custom_flags(libc::O_DIRECT);
            match options.open(&path) {
                // A file system without direct access.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
                opened => return opened.map(|file| Box::new(file) as Box<dyn DiskFile>),
            }
            options.custom_flags(0);
        }
        Ok(Box::new(options.open(&path)?))
    }

    fn rename(&self, from: &str, to: &str) -> Result<()> {
        fs::rename(self.path.join(from), self.path.join(to))
    }

    fn sync_names(&self) -> Result<()> {
        File::open(&self.path)?.sync_all()
    }

    fn names(&self) -> Result<Vec<String>> {
        fs::read_dir(&self.path)?
            .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
            .collect()
    }

    fn lock(&mut self) -> Result<bool> {
        let path = self.path.join(LOCK);
        let file = OpenOptions::new().write(true).create(true).truncate(false).open(path)?;
        match file.try_lock() {
            Ok(()) => {
                self.lock = Some(file);
                Ok(true)
            }
            Err(fs::TryLockError::WouldBlock) => Ok(false),
            Err(fs::TryLockError::Error(error)) => Err(error),
        }
    }
}

impl DiskFile for File {
    fn read_at(&self, bytes: &mut [u8], offset: u64) -> Result<usize> {
        FileExt::read_at(self, bytes, offset)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> Result<usize> {
        FileExt::write_at(self, bytes, offset)
    }

    fn sync(&self) -> Result<()> {
        self.sync_data()
    }

    fn length(&self) -> Result<u64> {
        Ok(self.metadata()?.len())
    }

    fn allocate(&self, bytes: u64) -> Result<()> {
        let had = self.length()?;
        if bytes <= had {
            return Ok(());
        }
        #[cfg(target_os = "linux")]
        match super::sys::allocate(self.as_raw_fd(), had, bytes - had) {
            // A file system that cannot: the room is taken as it is written.
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {}
            done => return done,
        }
        File::set_len(self, bytes)
    }

    fn set_len(&self, bytes: u64) -> Result<()> {
        File::set_len(self, bytes)
    }

    fn own(&self) -> Result<()> {
        // Held by the open file, and so by each transfer of a process that was killed.
        self.lock()
    }

    fn descriptor(&self) -> Option<RawFd> {
        Some(self.as_raw_fd())
    }
}

/// The code of the system, for an error that carries no more.
pub fn code(error: &Error) -> i32 {
    error.raw_os_error().unwrap_or(match error.kind() {
        ErrorKind::StorageFull => libc::ENOSPC,
        ErrorKind::UnexpectedEof => libc::EIO,
        _ => 0,
    })
}
