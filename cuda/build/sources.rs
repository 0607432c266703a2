//! What both compilers of `cuda/` need: its kernel sources, what they include, and all cores.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::{env, fs};

/// Every kernel source, by name without its ending.
pub fn kernels(cuda: &Path) -> Vec<(String, PathBuf)> {
    let mut sources: Vec<_> = fs::read_dir(cuda)
        .expect("the crate has a folder cuda")
        .map(|entry| entry.expect("the folder can be read").path())
        .filter(|path| path.extension().is_some_and(|ending| ending == "cu"))
        .map(|path| (path.file_stem().unwrap().to_string_lossy().into_owned(), path))
        .collect();
    sources.sort();
    sources
}

/// Adds `file` and the headers that it includes by name, with their contents.
pub fn read_all(file: &Path, found: &mut BTreeMap<PathBuf, String>) {
    if found.contains_key(file) {
        return;
    }
    let Ok(text) = fs::read_to_string(file) else { return };
    let folder = file.parent().expect("a file has a folder").to_owned();
    let included: Vec<PathBuf> = text
        .lines()
        .filter_map(|line| line.trim().strip_prefix("#include \"")?.strip_suffix('"'))
        .map(|name| folder.join(name))
        .collect();
    found.insert(file.to_owned(), text);
    included.iter().for_each(|file| read_all(file, found));
}

/// Runs `work` on every item, on as many threads as cargo allows jobs.
pub fn in_parallel<T: Send>(items: Vec<T>, work: impl Fn(T) + Sync) {
    let jobs = env::var("NUM_JOBS").ok().and_then(|jobs| jobs.parse().ok()).unwrap_or(1usize);
    let queue = Mutex::new(items);
    std::thread::scope(|scope| {
        for _ in 0..jobs {
            scope.spawn(|| {
                loop {
                    let Some(item) = queue.lock().unwrap().pop() else { return };
                    work(item);
                }
            });
        }
    });
}
