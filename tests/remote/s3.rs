//! A store that speaks S3.

use kvcache::tier::remote::open;
use kvcache::tier::{ObjectKey, Outcome, Put, TierKind};

use super::tier_case::*;
use super::{
    counters, get, keeps_what_it_is_given, object, options, s3, serves_the_next_process, with_store,
};

#[test]
fn keeps_objects_and_serves_the_next_process() {
    let Some(address) = s3() else { return };
    let open_s3 = || open(&address, &options()).unwrap();
    keeps_what_it_is_given(&*open_s3());
    serves_the_next_process(&open_s3);
}

/// No missing object.
#[test]
fn a_bucket_that_is_not_there_is_a_failure() {
    let Some(address) = s3() else { return };
    let none = open(&format!("{address}-none"), &options()).unwrap();
    let mut outcomes = [Outcome::None];
    none.put(&[Put { key: ObjectKey::default(), object: &object(1), label: None }], &mut outcomes);
    assert_eq!(outcomes, [Outcome::Failed]);
}

/// With `KVCACHE_S3_REFUSES` the store is one that does not take the environment's credentials.
#[test]
fn with_a_wrong_secret_fails_and_is_counted() {
    let Some(address) = s3().filter(|_| std::env::var_os("KVCACHE_S3_REFUSES").is_some()) else {
        return;
    };
    let store = open(&address, &options()).unwrap();
    let key = ObjectKey([9; 32]);
    assert!(!store.exists(&[key], &mut [false]), "not found out, which is not absent");
    let mut outcomes = [Outcome::None];
    store.put(&[Put { key, object: &object(1), label: None }], &mut outcomes);
    assert_eq!((outcomes[0], get(&*store, key, 20_000).0), (Outcome::Failed, Outcome::Failed));
    let mut cache = with_store(store);
    let prompt = prompt(1, 8);
    assert_eq!(serve(&mut cache, &prompt).1, expected(&prompt));
    cache.flush_tiers(LONG);
    let counted = counters(&cache);
    assert!(counted.failures > 0 && counted.stored == 0 && counted.down, "{counted:?}");
    let refusal = report(&cache, TierKind::Remote).refusal.unwrap();
    assert!(refusal.contains("refuses the access key") && !refusal.contains("wrong"), "{refusal}");
}
