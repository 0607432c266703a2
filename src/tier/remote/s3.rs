//! Objects in a bucket of an S3-compatible store: a request an object, signed by `rusty-s3`, sent
//! by `ureq`, which keeps connections open. Requests of a batch follow each other; what a tier has
//! under way at once are its threads.

use alloc::borrow::ToOwned;
use alloc::string::String;
#[cfg(unix)]
use alloc::vec::Vec;
use core::fmt;
use core::time::Duration;
use std::io::{self, Read};
use std::time::Instant;

use rusty_s3::{Bucket, Credentials, S3Action, UrlStyle};
use ureq::config::ConfigBuilder;
use ureq::http::Response;
use ureq::typestate::AgentScope;
use ureq::{Agent, Body};
use url::Url;

use super::refusal::{self, Refusal};
use super::{RemoteOptions, name};
use crate::error::{Error, Result};
use crate::tier::{Get, ObjectKey, Outcome, Put, Store};

/// How long a signature is good for: longer than any call takes, clocks that differ included.
const SIGNED_FOR: Duration = Duration::from_secs(3600);

type AgentConfig = ConfigBuilder<AgentScope>;

/// The store.
pub(super) struct S3Store {
    bucket: Bucket,
    /// Of another than Amazon's.
    #[cfg_attr(not(unix), expect(dead_code, reason = "NIXL is told"))]
    endpoint: Option<String>,
    credentials: Option<Credentials>,
    agent: Agent,
    options: RemoteOptions,
    refusal: Refusal,
}

impl fmt::Debug for S3Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("S3Store").field(&self.bucket.base_url().as_str()).finish()
    }
}

impl S3Store {
    pub fn new(url: &Url, options: &RemoteOptions) -> Result<Self> {
        let bad = |why| Error::invalid("address", why);
        let region = std::env::var("AWS_REGION").unwrap_or_else(|_| "us-east-1".into());
        let host = url.host_str().filter(|host| !host.is_empty());
        let host = host.ok_or(bad("must name a host or a bucket"))?;
        let (address, style, bucket) = match url.scheme().strip_prefix("s3+") {
            Some(scheme) => {
                let bucket = url.path().trim_start_matches('/').trim_end_matches('/');
                if bucket.is_empty() || bucket.contains('/') {
                    return Err(bad("must end with the name of a bucket"));
                }
                let port = url.port().map(|port| alloc::format!(":{port}")).unwrap_or_default();
                (alloc::format!("{scheme}://{host}{port}"), UrlStyle::Path, bucket)
            }
            None => {
                let endpoint = alloc::format!("https://s3.{region}.amazonaws.com");
                (endpoint, UrlStyle::VirtualHost, host)
            }
        };
        if address.starts_with("https") && cfg!(not(feature = "remote-tls")) {
            return Err(Error::Unsupported { what: "a remote store over TLS" });
        }
        let endpoint = Url::parse(&address).map_err(|_| bad("is not a URL"))?;
        let bucket = Bucket::new(endpoint, style, bucket.to_owned(), region)
            .map_err(|_| bad("is not that of a bucket"))?;
        let agent = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .timeout_connect(Some(options.connect_timeout));
        let agent = if address.starts_with("https") { trusting(agent)? } else { agent };
        let agent = agent.build().new_agent();
        let (credentials, options) = (Credentials::from_env(), options.clone());
        let endpoint = (url.scheme() != "s3").then_some(address);
        let refusal = Refusal::default();
        Ok(Self { bucket, endpoint, credentials, agent, options, refusal })
    }

    /// The same store, as NIXL's plugin for S3 is told of it.
    #[cfg(unix)]
    pub fn nixl_parameters(&self) -> Vec<(&'static str, String)> {
        let url = self.bucket.base_url();
        let mut parameters = alloc::vec![
            ("bucket", self.bucket.name().into()),
            ("region", self.bucket.region().into()),
            ("scheme", url.scheme().into()),
            // Objects have checksums of ours, and not every server knows those of the SDK.
            ("req_checksum", "required".into()),
            ("resp_checksum", "required".into()),
        ];
        match &self.endpoint {
            Some(endpoint) => parameters.push(("endpoint_override", endpoint.clone())),
            None => parameters.push(("use_virtual_addressing", "true".into())),
        }
        #[cfg(feature = "remote-tls")]
        if let Some(path) = super::tls::authorities_file() {
            parameters.push(("ca_bundle", path.to_string_lossy().into_owned()));
        }
        if let Some(credentials) = &self.credentials {
            parameters.push(("access_key", credentials.key().into()));
            parameters.push(("secret_key", credentials.secret().into()));
            parameters.extend(credentials.token().map(|token| ("session_token", token.into())));
        }
        parameters
    }

    fn deadline(&self) -> Instant {
        Instant::now() + self.options.timeout
    }

    fn name(&self, key: &ObjectKey) -> String {
        name(&self.options.prefix, key)
    }

    fn head(&self, key: &ObjectKey, deadline: Instant) -> Outcome {
        let name = self.name(key);
        let action = self.bucket.head_object(self.credentials.as_ref(), &name);
        let request = self.agent.head(action.sign(SIGNED_FOR).as_str());
        let answer = request.config().timeout_global(Some(left(deadline))).build().call();
        self.outcome(&answer)
    }

    /// What an answer says; where it refuses whoever asks that is remembered, until one does not.
    fn outcome(&self, answer: &core::result::Result<Response<Body>, ureq::Error>) -> Outcome {
        let status = match answer {
            Ok(answer) => answer.status().as_u16(),
            Err(error) => {
                if is_certificate(error) {
                    self.refusal.note(Some(refusal::CERTIFICATE));
                }
                return Outcome::Failed;
            }
        };
        let outcome = outcome(status);
        match (outcome, status) {
            (_, 401 | 403) => self.refusal.note(Some(refusal::KEY)),
            (Outcome::Done, _) => self.refusal.note(None),
            // What is missing is so in a bucket that is not there, too.
            _ => {}
        }
        outcome
    }

    fn put_one(&self, put: &Put, deadline: Instant) -> Outcome {
        let name = self.name(&put.key);
        let action = self.bucket.put_object(self.credentials.as_ref(), &name);
        let request = self.agent.put(action.sign(SIGNED_FOR).as_str());
        let request = request.config().timeout_global(Some(left(deadline))).build();
        match self.outcome(&request.send(put.object)) {
            // A bucket that is not there is no missing object.
            Outcome::Absent => {
                self.refusal.note(Some(refusal::BUCKET));
                Outcome::Failed
            }
            outcome => outcome,
        }
    }

    fn get_one(&self, get: &mut Get, deadline: Instant) -> Outcome {
        let name = self.name(&get.key);
        let action = self.bucket.get_object(self.credentials.as_ref(), &name);
        let request = self.agent.get(action.sign(SIGNED_FOR).as_str());
        let request = request.config().timeout_global(Some(left(deadline))).build();
        let answer = request.call();
        let outcome = self.outcome(&answer);
        let Ok(mut answer) = answer else { return outcome };
        if outcome != Outcome::Done {
            return outcome;
        }
        let bytes = get.object.len() as u64;
        if answer.body().content_length().is_some_and(|length| length != bytes) {
            return Outcome::Bad;
        }
        let mut body = answer.body_mut().with_config().limit(bytes + 1).reader();
        match body.read_exact(get.object).and_then(|()| body.read(&mut [0])) {
            Ok(0) => Outcome::Done,
            Ok(_) => Outcome::Bad,
            // Of no stated length, and shorter.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Outcome::Bad,
            Err(_) => Outcome::Failed,
        }
    }
}

/// What is left until the deadline; not nothing, which would be no limit.
fn left(deadline: Instant) -> Duration {
    deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1))
}

#[cfg(feature = "remote-tls")]
fn is_certificate(error: &ureq::Error) -> bool {
    use rustls::Error::InvalidCertificate;
    match error {
        ureq::Error::Io(error) => super::tls::is_certificate(error),
        ureq::Error::Rustls(error) => matches!(error, InvalidCertificate(_)),
        _ => false,
    }
}

#[cfg(not(feature = "remote-tls"))]
fn is_certificate(_: &ureq::Error) -> bool {
    false
}

/// Agents that trust those whom all remote stores trust.
#[cfg(feature = "remote-tls")]
fn trusting(config: AgentConfig) -> Result<AgentConfig> {
    use ureq::tls::{Certificate, RootCerts, TlsConfig};
    let own = super::tls::authorities()?;
    if own.is_empty() {
        return Ok(config);
    }
    let own = own.iter().map(|certificate| Certificate::from_der(certificate).to_owned());
    let roots = RootCerts::Specific(alloc::sync::Arc::new(own.collect()));
    Ok(config.tls_config(TlsConfig::builder().root_certs(roots).build()))
}

#[cfg(not(feature = "remote-tls"))]
fn trusting(config: AgentConfig) -> Result<AgentConfig> {
    Ok(config)
}

fn outcome(status: u16) -> Outcome {
    match status {
        200 | 204 => Outcome::Done,
        404 => Outcome::Absent,
        507 => Outcome::Full,
        _ => Outcome::Failed,
    }
}

impl Store for S3Store {
    fn refusal(&self) -> Option<&'static str> {
        self.refusal.get()
    }

    fn knows(&self, _: &ObjectKey) -> Option<bool> {
        None
    }

    /// Looks no further than the first that is missing: objects of a chain are of no use without
    /// those before them.
    fn exists(&self, keys: &[ObjectKey], found: &mut [bool]) -> bool {
        let deadline = self.deadline();
        found.fill(false);
        for (n, key) in keys.iter().enumerate() {
            match self.head(key, deadline) {
                Outcome::Done => found[n] = true,
                Outcome::Absent => return true,
                _ => return false,
            }
        }
        true
    }

    fn put(&self, objects: &[Put], outcomes: &mut [Outcome]) {
        let deadline = self.deadline();
        each(objects, outcomes, |put| self.put_one(put, deadline));
    }

    fn get(&self, objects: &mut [Get], outcomes: &mut [Outcome]) {
        let deadline = self.deadline();
        each(objects, outcomes, |get| self.get_one(get, deadline));
    }

    fn remove(&self, keys: &[ObjectKey]) {
        let deadline = self.deadline();
        for key in keys {
            let name = self.name(key);
            let action = self.bucket.delete_object(self.credentials.as_ref(), &name);
            let request = self.agent.delete(action.sign(SIGNED_FOR).as_str());
            // What stays there is verified again when it is next asked for.
            let _ = request.config().timeout_global(Some(left(deadline))).build().call();
        }
    }
}

/// One after the other; after one that failed the rest is not tried.
fn each<T>(
    items: impl IntoIterator<Item = T>,
    outcomes: &mut [Outcome],
    mut one: impl FnMut(T) -> Outcome,
) {
    let mut failed = false;
    for (item, outcome) in items.into_iter().zip(outcomes) {
        *outcome = if failed { Outcome::Failed } else { one(item) };
        failed |= *outcome == Outcome::Failed;
    }
}
