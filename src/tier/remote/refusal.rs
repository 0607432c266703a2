//! Why a server refuses whoever calls, in words of ours: none of what the server says, nor of what it
//! was told, a secret perhaps, is in them. Kept until a call succeeds.

use std::sync::{Mutex, PoisonError};

/// Redis, asked with a password or without.
pub(super) const PASSWORD: &str = "signing in to Redis, which refuses the user or the password,";
pub(super) const NO_PASSWORD: &str = "asking Redis, which wants a password,";
pub(super) const NOT_ALLOWED: &str =
    "asking Redis, which does not allow the user this command or key,";
/// An object store.
pub(super) const KEY: &str =
    "asking the S3 store, which refuses the access key, its secret or what it may do (403),";
pub(super) const BUCKET: &str = "asking the S3 store, which has no such bucket,";
/// TLS.
pub(super) const CERTIFICATE: &str =
    "connecting over TLS to a server whose certificate is not trusted, or not its own,";

/// The last refusal.
#[derive(Debug, Default)]
pub(super) struct Refusal(Mutex<Option<&'static str>>);

impl Refusal {
    /// Remembers that the server refuses, or that it does not.
    pub fn note(&self, why: Option<&'static str>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = why;
    }

    pub fn get(&self) -> Option<&'static str> {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
