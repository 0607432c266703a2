//! Objects of a bucket, by their names, through NIXL's plugin for S3-compatible stores.
//!
//! The plugin says of a get that failed no more than that: whether the object is missing is asked
//! afterwards. Of one that is shorter it gives what there is, and of one that is longer the beginning;
//! that it is another is seen when it is verified.

use alloc::string::String;
use alloc::vec::Vec;

use super::agent::{Agent, Kind, Transfer, Way};
use super::lane::Worker;
use crate::tier::Outcome;

fn transfer(
    agent: &mut Agent,
    way: Way,
    names: &[String],
    staging: &mut [u8],
    lengths: &[usize],
) -> Vec<bool> {
    let mut rest = staging;
    let mut transfers = Vec::with_capacity(names.len());
    for (n, (name, &length)) in names.iter().zip(lengths).enumerate() {
        let (bytes, after) = rest.split_at_mut(length);
        rest = after;
        transfers.push(Transfer { device: n as u64, name, bytes });
    }
    agent.transfer(way, Kind::Object, &mut transfers)
}

/// Puts objects, one after the other in `staging`.
pub(super) fn put(
    worker: &mut Worker,
    names: &[String],
    staging: &mut [u8],
    lengths: &[usize],
) -> Vec<Outcome> {
    let Ok(agent) = worker.agent() else { return alloc::vec![Outcome::Failed; names.len()] };
    let done = transfer(agent, Way::Write, names, staging, lengths);
    done.into_iter().map(|done| if done { Outcome::Done } else { Outcome::Failed }).collect()
}

/// Gets objects, one after the other into `staging`.
pub(super) fn get(
    worker: &mut Worker,
    names: &[String],
    staging: &mut [u8],
    lengths: &[usize],
) -> Vec<Outcome> {
    let Ok(agent) = worker.agent() else { return alloc::vec![Outcome::Failed; names.len()] };
    let done = transfer(agent, Way::Read, names, staging, lengths);
    let failed = names.iter().zip(&done).filter(|(_, done)| !**done);
    let failed: Vec<String> = failed.map(|(name, _)| name.clone()).collect();
    let found = if failed.is_empty() { None } else { agent.exist(Kind::Object, &failed) };
    let mut found = found.unwrap_or_default().into_iter();
    let outcome = |done| match done {
        true => Outcome::Done,
        false if found.next() == Some(false) => Outcome::Absent,
        false => Outcome::Failed,
    };
    done.into_iter().map(outcome).collect()
}
