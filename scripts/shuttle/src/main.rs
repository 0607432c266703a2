//! Explores the interleavings of the library's hand-made protocols: `handle` (who is inside an
//! object) and `events` (the queue between a cache and its publisher). `SHUTTLE_ITERATIONS` schedules
//! each, random and by priorities; small ones are explored whole. A failing schedule is printed.
//!
//! What it cannot show is weak memory: it runs threads in every order, each step seen by all at once.

extern crate alloc;

mod events;
mod handle;

// What the library's files name by their paths.
use kvcache::{ids, prefix};

/// The library's own makes its errors for itself only.
mod error {
    #[derive(Debug)]
    pub struct Error(#[allow(dead_code, reason = "shown by Debug")] &'static str);

    impl Error {
        pub const fn invalid(_: &'static str, why: &'static str) -> Self {
            Error(why)
        }
    }

    pub type Result<T> = core::result::Result<T, Error>;
}

fn iterations() -> usize {
    let given = std::env::var("SHUTTLE_ITERATIONS").ok();
    given.map_or(20_000, |text| text.parse().expect("SHUTTLE_ITERATIONS: a count"))
}

/// Explores a model by random schedules and by ones that prefer some threads.
fn explore(name: &str, model: fn()) {
    shuttle::check_random(model, iterations());
    shuttle::check_pct(model, iterations(), 3);
    println!("{name}: {} schedules", 2 * iterations());
}

fn main() {
    handle::check();
    events::check();
}
