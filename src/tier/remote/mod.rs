//! Remote stores: Redis or Valkey, object stores that speak S3, and what NIXL moves bytes to, behind the
//! trait of all stores.
//!
//! Every call ends within its time limit, however slowly the other side answers: the limit is for
//! the whole call, connecting included, not for each read. Two waits are the system's own: for a
//! name to be resolved, and on a Unix socket for a server that accepts nobody. A call that fails is
//! a failed [`Outcome`](super::Outcome); the tier then leaves the store alone for a while. What is
//! given back is verified by the tier, so that a store that lies costs a miss.
//!
//! An object is one value, or one object of a bucket, whose name is a prefix and the key in
//! hexadecimal digits. How long it stays is the server's business (`maxmemory-policy`, a life-cycle
//! rule): what is not there any more is a miss.

#[cfg(unix)]
mod nixl;
mod redis;
mod refusal;
mod resp;
mod s3;
#[cfg(test)]
mod tests;
#[cfg(feature = "remote-tls")]
mod tls;
mod wire;

use alloc::string::String;
use alloc::sync::Arc;
use core::fmt::Write;
use core::time::Duration;

use url::Url;

use super::{ObjectKey, Store};
use crate::error::{Error, Result};

/// The longest time limit.
const LONGEST: Duration = Duration::from_secs(3600);

/// How a remote store is used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RemoteOptions {
    /// How long it may take to connect: 1 s by default.
    pub connect_timeout: Duration,
    /// How long a call may take, connecting included: 5 s by default. A call moves up to 16 objects.
    pub timeout: Duration,
    /// What the names of objects begin with: `kvcache/` by default.
    pub prefix: String,
}

impl Default for RemoteOptions {
    fn default() -> Self {
        let (connect_timeout, timeout) = (Duration::from_secs(1), Duration::from_secs(5));
        Self { connect_timeout, timeout, prefix: "kvcache/".into() }
    }
}

/// A store at an address. Nothing is connected to yet: one that is down is found to be when it is
/// used, and an engine starts without it.
///
/// | address | what |
/// |---|---|
/// | `redis://[[USER:]PASSWORD@]HOST[:PORT][/DB]` | Redis or Valkey, over TCP |
/// | `rediss://...` | the same over TLS (feature `remote-tls`) |
/// | `redis+unix:///PATH` | the same, over a Unix socket |
/// | `s3://BUCKET` | Amazon S3 (feature `remote-tls`) |
/// | `s3+http://HOST[:PORT]/BUCKET` | another S3-compatible store |
/// | `s3+https://HOST[:PORT]/BUCKET` | the same over TLS (feature `remote-tls`) |
/// | `nixl+posix:/DIR` | a directory that machines share, through NIXL (not on Windows) |
/// | `nixl+` and an address of S3 | that bucket through NIXL |
///
/// For S3 the environment gives the credentials (`AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`,
/// `AWS_SESSION_TOKEN`; without them requests are not signed) and the region (`AWS_REGION`, else
/// `us-east-1`). The bucket must exist.
///
/// Over TLS a server must have a certificate of an authority of Mozilla's list; where `SSL_CERT_FILE` in
/// the environment names a file of certificates (PEM), of one of those instead.
///
/// NIXL is loaded when a store of it is opened: `libnixl_capi.so` where the system finds it, or the file
/// that `KVCACHE_NIXL` in the environment names (in NIXL's wheels it lies below `.nixl_cu12.mesonpy.libs`).
/// It writes to the standard error stream what it finds wrong; `NIXL_LOG_LEVEL=FATAL` silences it. Files
/// in the directory can be read by whom its permissions and the process's umask let.
///
/// # Errors
/// `InvalidArgument` for an address that is none of these, or time limits of 0; `Unsupported` for TLS
/// in a build without `remote-tls`; `TierFailed` where NIXL or its plugin cannot be loaded, or the
/// directory is not there.
pub fn open(address: &str, options: &RemoteOptions) -> Result<Arc<dyn Store>> {
    for limit in [options.timeout, options.connect_timeout] {
        if limit.is_zero() || limit > LONGEST {
            return Err(Error::invalid("timeout", "must be above 0, and at most an hour"));
        }
    }
    let url = Url::parse(address).map_err(|_| Error::invalid("address", "is not a URL"))?;
    match url.scheme() {
        "redis" | "rediss" | "redis+unix" => Ok(Arc::new(redis::RedisStore::new(&url, options)?)),
        "s3" | "s3+http" | "s3+https" => Ok(Arc::new(s3::S3Store::new(&url, options)?)),
        #[cfg(unix)]
        "nixl+posix" | "nixl+s3" | "nixl+s3+http" | "nixl+s3+https" => {
            Ok(Arc::new(nixl::NixlStore::new(&url, options)?))
        }
        _ => Err(Error::invalid(
            "address",
            "must begin with redis(s), redis+unix, s3, s3+http(s) or nixl+",
        )),
    }
}

/// The name of an object.
fn name(prefix: &str, key: &ObjectKey) -> String {
    let mut name = String::with_capacity(prefix.len() + 64);
    name.push_str(prefix);
    for byte in key.0 {
        // Writing to a string cannot fail.
        let _ = write!(name, "{byte:02x}");
    }
    name
}

#[cfg(test)]
mod address_tests {
    use super::*;
    use alloc::format;

    #[test]
    fn addresses_are_understood_or_refused_and_passwords_are_not_shown() {
        let options = RemoteOptions::default();
        for good in [
            "redis://localhost",
            "redis://:secret@127.0.0.1:6380/3",
            "redis://me:secret@[::1]:6380",
            "redis+unix:///run/redis.sock",
            "s3+http://127.0.0.1:9000/bucket",
        ] {
            let store = open(good, &options).unwrap();
            assert!(!format!("{store:?}").contains("secret"), "{good}");
        }
        for bad in [
            "",
            "localhost",
            "http://localhost",
            "redis://",
            "redis:///3",
            "redis://localhost/x",
            "redis://localhost/-1",
            "redis+unix:///",
            "redis+unix://host/path",
            "s3://",
            "s3+http://127.0.0.1:9000",
            "s3+http://127.0.0.1:9000/",
            "s3+http://127.0.0.1:9000/a/b",
        ] {
            assert!(open(bad, &options).is_err(), "{bad}");
        }
        for tls in ["s3+https://localhost/bucket", "rediss://:secret@localhost/2"] {
            let tls = open(tls, &options);
            assert_eq!(tls.is_ok(), cfg!(feature = "remote-tls"));
            match tls {
                Ok(store) => assert!(!format!("{store:?}").contains("secret")),
                Err(error) => assert!(matches!(error, Error::Unsupported { .. }), "{error}"),
            }
        }
        for timeout in [Duration::ZERO, Duration::MAX] {
            let options = RemoteOptions { timeout, ..RemoteOptions::default() };
            assert!(open("redis://localhost", &options).is_err());
        }
    }

    #[test]
    fn names_are_the_prefix_and_the_key() {
        let mut key = ObjectKey([0; 32]);
        (key.0[0], key.0[31]) = (0xa5, 1);
        assert_eq!(name("p/", &key), format!("p/a5{}01", "00".repeat(30)));
    }
}
