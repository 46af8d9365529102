//! A certificate with its key, and the authority that both sides believe.

use std::path::PathBuf;
use std::sync::Arc;

use rustls::crypto::ring;
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use serde::{Deserialize, Serialize};

use crate::error::{Part, TlsError};
use crate::files::FileSet;

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

impl TlsFiles {
    /// All of them, in the order of [`Material::of_files`].
    #[must_use]
    pub fn paths(&self) -> Vec<PathBuf> {
        [Part::Authority, Part::Certificate, Part::Key]
            .map(|part| self.of(part))
            .into()
    }

    fn of(&self, part: Part) -> PathBuf {
        match part {
            Part::Authority => &self.ca,
            Part::Certificate => &self.certificate,
            Part::Key => &self.key,
        }
        .clone()
    }
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
        Self::of_files(files, &FileSet::new(files.paths()).read()?)
    }

    /// What the files held, in the order of [`TlsFiles::paths`].
    ///
    /// # Errors
    /// One does not hold what it should, or certificate and key do not belong together; the error
    /// names the file.
    pub fn of_files(files: &TlsFiles, contents: &[Vec<u8>]) -> Result<Self, TlsError> {
        let [ca, certificate, key] = contents else {
            return Err(TlsError::Material("these are not three files".to_owned()));
        };
        let material = Self::from_pem(ca, certificate, key).map_err(|error| {
            let (path, why) = match error {
                TlsError::Part { part, why } => (files.of(part), why),
                other => return other,
            };
            TlsError::File { path, why }
        })?;
        match material.client() {
            Ok(_) => Ok(material),
            Err(error) => Err(TlsError::Pair {
                certificate: files.certificate.clone(),
                key: files.key.clone(),
                why: error.to_string(),
            }),
        }
    }

    /// Reads them from memory.
    ///
    /// # Errors
    /// A text does not hold what it should.
    pub fn from_pem(ca: &[u8], certificate: &[u8], key: &[u8]) -> Result<Self, TlsError> {
        let wrong = |part, why: String| TlsError::Part { part, why };
        let mut roots = RootCertStore::empty();
        for root in certificates(Part::Authority, ca)? {
            roots
                .add(root)
                .map_err(|e| wrong(Part::Authority, e.to_string()))?;
        }
        Ok(Self {
            roots: Arc::new(roots),
            chain: certificates(Part::Certificate, certificate)?,
            key: PrivateKeyDer::from_pem_slice(key).map_err(|e| wrong(Part::Key, e.to_string()))?,
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

fn certificates(part: Part, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let wrong = |why: String| TlsError::Part { part, why };
    let found: Vec<_> = CertificateDer::pem_slice_iter(pem)
        .collect::<Result<_, _>>()
        .map_err(|e| wrong(e.to_string()))?;
    if found.is_empty() {
        return Err(wrong("it holds no certificate".to_owned()));
    }
    Ok(found)
}

fn setup(error: rustls::Error) -> TlsError {
    TlsError::Material(error.to_string())
}
