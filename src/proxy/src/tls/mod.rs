//! TLS on both sides: what the proxy shows its clients, and how it looks at servers.
//!
//! Files are read when the configuration is made, and looked at again when somebody asks for it
//! ([`ServerTls::look`], [`BackendTls::look`]); a handshake reads none. Invariant: what new files hold
//! counts from the next connection on, and what cannot be used changes nothing.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use sha2::{Digest as _, Sha256, Sha384, Sha512};
use x509_parser::prelude::{FromDer as _, X509Certificate};

use renewed::{Renewed, Text};
use verify::ServerCertificates;

mod renewed;
mod verify;

/// The protocol's name in ALPN, as PostgreSQL 17 has it.
const ALPN: &[u8] = b"postgresql";

/// How much TLS towards a server is worth, with libpq's meanings
/// (<https://www.postgresql.org/docs/current/libpq-ssl.html>).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SslMode {
    /// Never.
    #[default]
    Disable,
    /// When the server has it; without any check of who it is.
    Prefer,
    /// Always; its chain is checked when a root certificate is configured.
    Require,
    /// Always; its chain must end at the root certificate.
    VerifyCa,
    /// Always; chain and host name are checked.
    VerifyFull,
}

/// Certificate files that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read.
    #[error(transparent)]
    Read(#[from] helios_control::TlsError),
    /// The file holds no such thing.
    #[error("could not load {what} from \"{}\": {why}", path.display())]
    File {
        /// What was looked for.
        what: &'static str,
        /// Where.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// Certificate, key and authorities do not make a configuration.
    #[error("could not set up TLS: {0}")]
    Setup(String),
    /// A mode that checks the server needs to know whom to believe.
    #[error("sslmode verify-ca and verify-full need a root certificate (sslrootcert)")]
    NoRoot,
}

/// A certificate with its key, as PEM files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CertificateFiles {
    /// The chain, our certificate first.
    pub certificate: PathBuf,
    /// Its key.
    pub key: PathBuf,
}

impl CertificateFiles {
    fn paths(&self) -> [PathBuf; 2] {
        [self.certificate.clone(), self.key.clone()]
    }
}

/// TLS towards servers. Clones change together.
#[derive(Clone, Default)]
pub struct BackendTls {
    mode: SslMode,
    config: Option<Arc<Renewed<ClientConfig>>>,
}

impl BackendTls {
    /// No TLS.
    #[must_use]
    pub fn disabled() -> Self {
        Self::default()
    }

    /// TLS as `mode` says, believing the authorities of `root`, showing `client`'s certificate.
    ///
    /// # Errors
    ///
    /// A file cannot be used, or the mode needs a root certificate.
    pub fn new(
        mode: SslMode,
        root: Option<&Path>,
        client: Option<&CertificateFiles>,
    ) -> Result<Self, TlsError> {
        if mode == SslMode::Disable {
            return Ok(Self::disabled());
        }
        let check_chain = match (mode, root) {
            (SslMode::VerifyCa | SslMode::VerifyFull, None) => return Err(TlsError::NoRoot),
            (SslMode::VerifyCa | SslMode::VerifyFull | SslMode::Require, Some(path)) => Some(path),
            _ => None,
        };
        let checked = check_chain.is_some();
        let own = client.map(CertificateFiles::paths).into_iter().flatten();
        let paths = check_chain.map(Path::to_owned).into_iter().chain(own);
        let make = move |files: &[Text<'_>]| client_config(mode, checked, files);
        let config = Some(Arc::new(Renewed::new(paths.collect(), make)?));
        Ok(Self { mode, config })
    }

    /// How much it is worth.
    #[must_use]
    pub fn mode(&self) -> SslMode {
        self.mode
    }

    /// Looks at the files again: what they hold now counts from the next connection on. Whether it
    /// is something else than before; what cannot be used is warned about.
    pub fn look(&self) -> bool {
        self.config.as_ref().is_some_and(|config| config.look())
    }

    pub(crate) fn config(&self) -> Option<Arc<ClientConfig>> {
        self.config.as_ref().map(|config| config.now())
    }
}

impl std::fmt::Debug for BackendTls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "BackendTls({:?})", self.mode)
    }
}

/// The files are the root certificates, where the chain is `checked`, then our certificate and key,
/// where there are any.
fn client_config(
    mode: SslMode,
    checked: bool,
    files: &[Text<'_>],
) -> Result<ClientConfig, TlsError> {
    let (root, own) = match files {
        [root, own @ ..] if checked => (Some(*root), own),
        own => (None, own),
    };
    let provider = Arc::new(ring::default_provider());
    let roots = root.map(certificates).transpose()?;
    let check_name = mode == SslMode::VerifyFull;
    let verifier = ServerCertificates::new(roots, check_name, provider.clone())?;
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(setup)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier));
    let mut config = match own {
        [certificate, private] => builder
            .with_client_auth_cert(certificates(*certificate)?, key(*private)?)
            .map_err(setup)?,
        _ => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![ALPN.to_vec()];
    Ok(config)
}

/// TLS towards clients. Clones change together.
#[derive(Clone)]
pub struct ServerTls(Arc<Renewed<Shown>>);

/// What one client is shown: a handshake and the login behind it go by the same.
pub(crate) struct Shown {
    config: Arc<ServerConfig>,
    end_point: Option<Vec<u8>>,
}

impl ServerTls {
    /// Shows this certificate; asks for the client's when there is an authority to check it with.
    ///
    /// # Errors
    ///
    /// A file cannot be used.
    pub fn new(files: &CertificateFiles, client_ca: Option<&Path>) -> Result<Self, TlsError> {
        let authority = client_ca.map(Path::to_owned);
        let paths = files.paths().into_iter().chain(authority).collect();
        Ok(Self(Arc::new(Renewed::new(paths, Shown::new)?)))
    }

    /// Looks at the files again: what they hold now counts from the next connection on. Whether it
    /// is something else than before; what cannot be used is warned about.
    pub fn look(&self) -> bool {
        self.0.look()
    }

    /// For one connection.
    pub(crate) fn now(&self) -> Arc<Shown> {
        self.0.now()
    }
}

impl Shown {
    /// The files are our certificate, its key, and the clients' authorities, where there are any.
    fn new(files: &[Text<'_>]) -> Result<Self, TlsError> {
        let provider = Arc::new(ring::default_provider());
        let builder = ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .map_err(setup)?;
        let [certificate, private, authority @ ..] = files else {
            return Err(TlsError::Setup("there is no certificate".to_owned()));
        };
        let builder = match authority.first() {
            None => builder.with_no_client_auth(),
            Some(file) => builder.with_client_cert_verifier(
                WebPkiClientVerifier::builder_with_provider(store(certificates(*file)?)?, provider)
                    // Whether a certificate is needed is the authentication method's decision.
                    .allow_unauthenticated()
                    .build()
                    .map_err(|e| TlsError::Setup(e.to_string()))?,
            ),
        };
        let chain = certificates(*certificate)?;
        let end_point = chain.first().and_then(|first| end_point_hash(first));
        let mut config = builder
            .with_single_cert(chain, key(*private)?)
            .map_err(setup)?;
        config.alpn_protocols = vec![ALPN.to_vec()];
        let config = Arc::new(config);
        Ok(Self { config, end_point })
    }

    pub(crate) fn config(&self) -> Arc<ServerConfig> {
        self.config.clone()
    }

    /// Hash of our certificate for channel binding; `None` when its algorithm has no hash for it.
    pub(crate) fn end_point(&self) -> Option<&[u8]> {
        self.end_point.as_deref()
    }
}

impl std::fmt::Debug for ServerTls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ServerTls(..)")
    }
}

/// The hash that stands for a certificate in channel binding (tls-server-end-point, RFC 5929,
/// section 4.1): its signature's hash function, SHA-256 in place of MD5 and SHA-1.
pub(crate) fn end_point_hash(certificate: &[u8]) -> Option<Vec<u8>> {
    let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
    match parsed.signature_algorithm.algorithm.to_id_string().as_str() {
        // RSA and ECDSA with SHA-1, RSA with MD5, RSA and ECDSA with SHA-256.
        "1.2.840.113549.1.1.5"
        | "1.2.840.10045.4.1"
        | "1.2.840.113549.1.1.4"
        | "1.2.840.113549.1.1.11"
        | "1.2.840.10045.4.3.2" => Some(Sha256::digest(certificate).to_vec()),
        "1.2.840.113549.1.1.12" | "1.2.840.10045.4.3.3" => {
            Some(Sha384::digest(certificate).to_vec())
        }
        "1.2.840.113549.1.1.13" | "1.2.840.10045.4.3.4" => {
            Some(Sha512::digest(certificate).to_vec())
        }
        // Ed25519 and RSASSA-PSS: not defined, or not by the algorithm alone.
        _ => None,
    }
}

/// The common name of a certificate's subject; `None` when there is not exactly one.
pub(crate) fn common_name(certificate: &[u8]) -> Option<String> {
    let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
    let mut names = parsed.subject().iter_common_name();
    match (names.next(), names.next()) {
        (Some(name), None) => name.as_str().ok().map(str::to_owned),
        _ => None,
    }
}

fn certificates(file: Text<'_>) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let failed = |why: String| TlsError::File {
        what: "certificates",
        path: file.path.to_owned(),
        why,
    };
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(file.pem).collect();
    match found {
        Ok(list) if list.is_empty() => Err(failed("it holds no certificate".to_owned())),
        Ok(list) => Ok(list),
        Err(e) => Err(failed(e.to_string())),
    }
}

fn key(file: Text<'_>) -> Result<PrivateKeyDer<'static>, TlsError> {
    PrivateKeyDer::from_pem_slice(file.pem).map_err(|e| TlsError::File {
        what: "private key",
        path: file.path.to_owned(),
        why: e.to_string(),
    })
}

fn store(certificates: Vec<CertificateDer<'static>>) -> Result<Arc<RootCertStore>, TlsError> {
    let mut store = RootCertStore::empty();
    for certificate in certificates {
        store.add(certificate).map_err(setup)?;
    }
    Ok(Arc::new(store))
}

fn setup(error: rustls::Error) -> TlsError {
    TlsError::Setup(error.to_string())
}

/// Algorithms for the checks of signatures.
type Provider = Arc<CryptoProvider>;
