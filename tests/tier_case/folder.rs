//! A directory of a test. Unit tests of the library have it too.

use std::path::PathBuf;

/// A path for a directory that goes when the test ends.
pub struct Folder(pub PathBuf);

impl Folder {
    /// One that is not there yet, of a name that no other of the process has.
    pub fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("kvcache-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        Folder(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
