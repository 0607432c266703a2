//! A store in memory. Unit tests of the library have it too, so what it needs comes from who includes it.

use std::collections::BTreeMap;
use std::sync::Mutex;

use super::{Get, ObjectKey, Outcome, Put, Store};

/// A store that has to be asked, and gives objects whole.
#[derive(Debug, Default)]
pub struct Remote(pub Mutex<BTreeMap<ObjectKey, Vec<u8>>>);

impl Store for Remote {
    fn knows(&self, _: &ObjectKey) -> Option<bool> {
        None
    }
    fn exists(&self, keys: &[ObjectKey], found: &mut [bool]) -> bool {
        let objects = self.0.lock().unwrap();
        keys.iter().zip(found).for_each(|(key, found)| *found = objects.contains_key(key));
        true
    }
    fn put(&self, puts: &[Put], outcomes: &mut [Outcome]) {
        outcomes.fill(Outcome::Done);
        self.0.lock().unwrap().extend(puts.iter().map(|put| (put.key, put.object.to_vec())));
    }
    fn get(&self, gets: &mut [Get], outcomes: &mut [Outcome]) {
        let objects = self.0.lock().unwrap();
        for (get, outcome) in gets.iter_mut().zip(outcomes) {
            *outcome = match objects.get(&get.key) {
                None => Outcome::Absent,
                Some(object) if object.len() != get.object.len() => Outcome::Bad,
                Some(object) => {
                    get.object.copy_from_slice(object);
                    Outcome::Done
                }
            };
        }
    }
    fn remove(&self, keys: &[ObjectKey]) {
        let mut objects = self.0.lock().unwrap();
        keys.iter().for_each(|key| drop(objects.remove(key)));
    }
}
