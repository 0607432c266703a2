//! TLS as remote stores use it: rustls, with the certificates of Mozilla's list, or with those that
//! `SSL_CERT_FILE` in the environment names instead, as for OpenSSL: a file of certificates in PEM, of
//! an authority of one's own. Certificates are checked always, the server's name included.

use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use std::io;
use std::path::PathBuf;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore};

use crate::error::{Error, Result};

/// The file that names authorities.
pub(super) fn authorities_file() -> Option<PathBuf> {
    std::env::var_os("SSL_CERT_FILE").filter(|path| !path.is_empty()).map(PathBuf::from)
}

/// The authorities of that file; none where there is no such file named.
///
/// # Errors
/// `TierFailed` where it cannot be read or holds none.
pub(super) fn authorities() -> Result<Vec<CertificateDer<'static>>> {
    let Some(path) = authorities_file() else { return Ok(Vec::new()) };
    let what = "reading the certificates that SSL_CERT_FILE names";
    let bytes = std::fs::read(path)
        .map_err(|error| Error::TierFailed { what, os_code: error.raw_os_error().unwrap_or(0) })?;
    let found: core::result::Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&bytes).collect();
    let found = found.ok().filter(|found| !found.is_empty());
    found.ok_or(Error::TierFailed { what, os_code: 0 })
}

/// How a server is spoken to.
#[derive(Debug, Clone)]
pub(super) struct Tls {
    config: Arc<ClientConfig>,
    server: ServerName<'static>,
}

impl Tls {
    /// # Errors
    /// Those of [`authorities`]; `InvalidArgument` for a host that has no name.
    pub fn new(host: &str) -> Result<Self> {
        let mut roots = RootCertStore::empty();
        let own = authorities()?;
        match own.is_empty() {
            true => roots.extend(webpki_roots::TLS_SERVER_ROOTS.iter().cloned()),
            false => drop(roots.add_parsable_certificates(own)),
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|_| Error::Unsupported { what: "TLS" })?
            .with_root_certificates(roots)
            .with_no_client_auth();
        let server = ServerName::try_from(String::from(host)).map_err(|_| {
            Error::invalid("address", "must name a host that a certificate can name")
        })?;
        Ok(Self { config: Arc::new(config), server })
    }

    /// The client's side of a connection that is to be made.
    pub fn client(&self) -> io::Result<ClientConnection> {
        ClientConnection::new(self.config.clone(), self.server.clone()).map_err(io::Error::other)
    }
}

/// Whether a connection failed for the server's certificate.
pub(super) fn is_certificate(error: &io::Error) -> bool {
    let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    matches!(inner, Some(rustls::Error::InvalidCertificate(_)))
}
