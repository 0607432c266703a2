//! Handles in Rust: liveness, kinds, borrows, poisoning, exhaustion.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::ptr;

use super::*;

struct Thing {
    alive: Arc<()>,
}
struct ThingHandle;
impl Noun for Thing {
    type Handle = ThingHandle;
    const KIND: usize = 13;
    const NAME: &'static str = "thing";
}

struct Other;
struct OtherHandle;
impl Noun for Other {
    type Handle = OtherHandle;
    const KIND: usize = 14;
    const NAME: &'static str = "other";
}

/// The table is shared by the whole process: some tests must not overlap the others.
static TABLE: std::sync::RwLock<()> = std::sync::RwLock::new(());

fn error<T>(result: Result<T>) -> Error {
    result.err().expect("must be refused")
}

#[test]
fn a_handle_lives_until_it_is_destroyed() {
    let _table = TABLE.read();
    let alive = Arc::new(());
    let handle = publish(Thing { alive: alive.clone() }).unwrap();
    assert_eq!(Arc::strong_count(&shared::<Thing>(handle).unwrap().alive), 2);
    destroy::<Thing>(handle).unwrap();
    assert_eq!(Arc::strong_count(&alive), 1, "destroy drops the object");
    let stale = Error::StaleHandle { what: "thing" };
    assert_eq!(error(shared::<Thing>(handle)), stale);
    assert_eq!(error(exclusive::<Thing>(handle)), stale);
    assert_eq!(error(destroy::<Thing>(handle)), stale);
    assert_eq!(destroy::<Thing>(ptr::null_mut()), Ok(()));
    assert_eq!(error(shared::<Thing>(ptr::null())), Error::NullPointer { what: "thing" });
}

#[test]
fn foreign_and_invented_handles_are_refused() {
    // Alone: a handle that is one bit off may be another test's.
    let _table = TABLE.write();
    let handle = publish(Thing { alive: Arc::new(()) }).unwrap();
    let stale = Error::StaleHandle { what: "other" };
    assert_eq!(error(shared::<Other>(handle.cast::<OtherHandle>())), stale);
    let local = 0u64;
    for value in [1, 4096, usize::MAX, usize::MAX / 2, (&raw const local).addr(), LOW_MASK, TAG] {
        let invented = ptr::without_provenance::<OtherHandle>(value);
        assert_eq!(error(shared::<Other>(invented)), stale, "{value:#x}");
        let bit = 1usize.rotate_left(value as u32 % usize::BITS);
        let near = ptr::without_provenance::<ThingHandle>(handle.addr() ^ bit);
        assert_eq!(error(shared::<Thing>(near)), Error::StaleHandle { what: "thing" });
    }
    destroy::<Thing>(handle).unwrap();
}

#[test]
fn borrows_exclude_each_other_and_destruction() {
    let _table = TABLE.read();
    let busy = Error::InvalidState { why: "the handle is in use by another call" };
    let handle = publish(Thing { alive: Arc::new(()) }).unwrap();
    let first = shared::<Thing>(handle).unwrap();
    let second = shared::<Thing>(handle).unwrap();
    assert_eq!(error(exclusive::<Thing>(handle)), busy);
    assert_eq!(error(destroy::<Thing>(handle)), busy);
    drop((first, second));
    let mut alone = exclusive::<Thing>(handle).unwrap();
    alone.alive = Arc::new(());
    assert_eq!(error(shared::<Thing>(handle)), busy);
    assert_eq!(error(exclusive::<Thing>(handle)), busy);
    drop(alone);
    destroy::<Thing>(handle).unwrap();
}

#[test]
fn a_panic_poisons_and_destroy_still_frees() {
    let _table = TABLE.read();
    let alive = Arc::new(());
    let handle = publish(Thing { alive: alive.clone() }).unwrap();
    let value = handle.addr();
    let unwound = std::panic::catch_unwind(|| {
        let _inside = shared::<Thing>(ptr::without_provenance(value)).unwrap();
        std::panic::resume_unwind(alloc::boxed::Box::new(()));
    });
    assert!(unwound.is_err());
    assert_eq!(error(shared::<Thing>(handle)), Error::Poisoned);
    assert_eq!(error(exclusive::<Thing>(handle)), Error::Poisoned);
    destroy::<Thing>(handle).unwrap();
    assert_eq!(Arc::strong_count(&alive), 1);
    let again = publish(Thing { alive }).unwrap();
    assert!(shared::<Thing>(again).is_ok(), "a slot is clean when it is used again");
    destroy::<Thing>(again).unwrap();
}

#[test]
fn the_table_fills_and_recovers() {
    let _table = TABLE.write();
    let mut handles = Vec::new();
    let full = loop {
        match publish(Other) {
            Ok(handle) => handles.push(handle),
            Err(error) => break error,
        }
    };
    assert_eq!(full, Error::TooManyHandles { limit: MAX_HANDLES as u32 });
    assert!(handles.len() <= MAX_HANDLES);
    for handle in handles.drain(..) {
        destroy::<Other>(handle).unwrap();
    }
    let handle = publish(Other).unwrap();
    destroy::<Other>(handle).unwrap();
}

#[test]
fn threads_race_for_one_handle_and_one_wins() {
    let _table = TABLE.read();
    let rounds = if cfg!(miri) { 20 } else { 2000 };
    for _ in 0..rounds {
        let value = publish(Thing { alive: Arc::new(()) }).unwrap().addr();
        let wins: usize = std::thread::scope(|scope| {
            let race = || {
                let handle = ptr::without_provenance_mut::<ThingHandle>(value);
                let _ = shared::<Thing>(handle).map(|thing| Arc::strong_count(&thing.alive));
                usize::from(destroy::<Thing>(handle).is_ok())
            };
            let other = scope.spawn(race);
            race() + other.join().unwrap()
        });
        let handle = ptr::without_provenance_mut::<ThingHandle>(value);
        // Both may have met the other's borrow; then the handle is still live.
        assert_eq!(wins + usize::from(destroy::<Thing>(handle).is_ok()), 1);
    }
}

#[cfg(feature = "std")]
struct Turned {
    inside: core::sync::atomic::AtomicUsize,
    _alive: Arc<()>,
}
#[cfg(feature = "std")]
struct TurnedHandle;
#[cfg(feature = "std")]
impl Noun for Turned {
    type Handle = TurnedHandle;
    const KIND: usize = 12;
    const NAME: &'static str = "turned";
    const SHARING: Sharing = Sharing::Waits;
}

#[cfg(feature = "std")]
#[test]
fn who_waits_is_alone_then_or_hears_that_the_object_ended() {
    use core::sync::atomic::AtomicUsize;
    use core::sync::atomic::Ordering::SeqCst;
    let _table = TABLE.read();
    let alive = Arc::new(());
    let value =
        publish(Turned { inside: AtomicUsize::new(0), _alive: alive.clone() }).unwrap().addr();
    let handle = || ptr::without_provenance_mut::<TurnedHandle>(value);
    let rounds = if cfg!(miri) { 10 } else { 1000 };
    let (entered, ended) = (AtomicUsize::new(0), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                for _ in 0..rounds {
                    match waited::<Turned>(handle()) {
                        Ok(object) => {
                            assert_eq!(object.inside.fetch_add(1, SeqCst), 0, "two are inside");
                            std::thread::yield_now();
                            assert_eq!(object.inside.fetch_sub(1, SeqCst), 1);
                            entered.fetch_add(1, SeqCst);
                        }
                        Err(error) => {
                            assert_ne!(ended.load(SeqCst), 0, "refused before its end: {error}");
                            assert!(live::<Turned>(handle()).is_err());
                        }
                    }
                }
            });
        }
        scope.spawn(|| {
            while entered.load(SeqCst) < rounds {
                std::thread::yield_now();
            }
            ended.store(1, SeqCst);
            while let Err(error) = destroy::<Turned>(handle()) {
                assert_eq!(error, super::busy());
            }
        });
    });
    assert_eq!(Arc::strong_count(&alive), 1);
    assert_eq!(error(waited::<Turned>(handle())), Error::StaleHandle { what: "turned" });
}

#[cfg(feature = "std")]
#[test]
fn an_object_is_not_ended_while_a_call_is_inside() {
    let _table = TABLE.read();
    let object = Turned { inside: Default::default(), _alive: Arc::new(()) };
    let handle = publish(object).unwrap();
    let inside = waited::<Turned>(handle).unwrap();
    assert_eq!(error(destroy::<Turned>(handle)), super::busy());
    drop(inside);
    let value = handle.addr();
    let unwound = std::panic::catch_unwind(|| {
        let _inside = waited::<Turned>(ptr::without_provenance(value)).unwrap();
        std::panic::resume_unwind(alloc::boxed::Box::new(()));
    });
    assert!(unwound.is_err());
    assert_eq!(error(waited::<Turned>(handle)), Error::Poisoned);
    destroy::<Turned>(handle).unwrap();
    let again = publish(Turned { inside: Default::default(), _alive: Arc::new(()) }).unwrap();
    assert!(waited::<Turned>(again).is_ok(), "a slot is clean when it is used again");
    destroy::<Turned>(again).unwrap();
}
