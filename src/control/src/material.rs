//! A certificate with its key, and the authority that both sides believe.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::crypto::ring;
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use serde::{Deserialize, Serialize};

use crate::TlsError;

/// Where they lie, as PEM files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsFiles {
    /// The authority's certificate.
    pub ca: PathBuf,
    /// Our chain, our certificate first.
    pub certificate: PathBuf,
    /// Its key.
    pub key: PathBuf,
}

/// Certificates that have been read.
#[derive(Debug)]
pub struct Material {
    roots: Arc<RootCertStore>,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
}

impl Material {
    /// Reads them from files.
    ///
    /// # Errors
    /// A file cannot be read, or does not hold what it should.
    pub fn load(files: &TlsFiles) -> Result<Self, TlsError> {
        Self::from_pem(
            &read(&files.ca)?,
            &read(&files.certificate)?,
            &read(&files.key)?,
        )
    }

    /// Reads them from memory.
    ///
    /// # Errors
    /// A text does not hold what it should.
    pub fn from_pem(ca: &[u8], certificate: &[u8], key: &[u8]) -> Result<Self, TlsError> {
        let wrong = |what: &str, why: String| TlsError::Material(format!("{what}: {why}"));
        let mut roots = RootCertStore::empty();
        for root in certificates("authority", ca)? {
            roots
                .add(root)
                .map_err(|e| wrong("authority", e.to_string()))?;
        }
        Ok(Self {
            roots: Arc::new(roots),
            chain: certificates("certificate", certificate)?,
            key: PrivateKeyDer::from_pem_slice(key).map_err(|e| wrong("key", e.to_string()))?,
        })
    }

    /// A server that every client has to show a certificate of the authority to.
    pub(crate) fn server(&self) -> Result<Arc<ServerConfig>, TlsError> {
        let provider = Arc::new(ring::default_provider());
        let verifier = WebPkiClientVerifier::builder_with_provider(
            Arc::clone(&self.roots),
            Arc::clone(&provider),
        )
        .build()
        .map_err(|e| TlsError::Material(e.to_string()))?;
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(setup)?
            .with_client_cert_verifier(verifier)
            .with_single_cert(self.chain.clone(), self.key.clone_key())
            .map_err(setup)?;
        Ok(Arc::new(config))
    }

    /// A client that believes servers of the authority, and shows its certificate.
    pub(crate) fn client(&self) -> Result<Arc<ClientConfig>, TlsError> {
        let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .map_err(setup)?
            .with_root_certificates(Arc::clone(&self.roots))
            .with_client_auth_cert(self.chain.clone(), self.key.clone_key())
            .map_err(setup)?;
        Ok(Arc::new(config))
    }
}

fn read(path: &Path) -> Result<Vec<u8>, TlsError> {
    std::fs::read(path).map_err(|e| TlsError::File {
        path: path.to_owned(),
        why: e.to_string(),
    })
}

fn certificates(what: &str, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let wrong = |why: String| TlsError::Material(format!("{what}: {why}"));
    let found: Vec<_> = CertificateDer::pem_slice_iter(pem)
        .collect::<Result<_, _>>()
        .map_err(|e| wrong(e.to_string()))?;
    if found.is_empty() {
        return Err(wrong("there is none".to_owned()));
    }
    Ok(found)
}

fn setup(error: rustls::Error) -> TlsError {
    TlsError::Material(error.to_string())
}
