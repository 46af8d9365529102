//! Checks of a server's certificate, as far as the `sslmode` asks for them.

use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{CertificateError, DigitallySignedStruct, Error, SignatureScheme};
use x509_parser::prelude::{FromDer as _, X509Certificate};

use super::{Provider, TlsError, common_name, store};

/// Believes a server when its chain and name are what the mode asks for.
#[derive(Debug)]
pub(super) struct ServerCertificates {
    /// `None`: whoever it is.
    chain: Option<Chain>,
    provider: Provider,
}

#[derive(Debug)]
struct Chain {
    verifier: Arc<WebPkiServerVerifier>,
    roots: Vec<CertificateDer<'static>>,
    check_name: bool,
}

impl ServerCertificates {
    pub(super) fn new(
        roots: Option<Vec<CertificateDer<'static>>>,
        check_name: bool,
        provider: Provider,
    ) -> Result<Self, TlsError> {
        let chain = roots
            .map(|roots| {
                let trusted = store(roots.clone())?;
                let builder =
                    WebPkiServerVerifier::builder_with_provider(trusted, provider.clone());
                let verifier = builder.build();
                Ok::<_, TlsError>(Chain {
                    verifier: verifier.map_err(|e| TlsError::Setup(e.to_string()))?,
                    roots,
                    check_name,
                })
            })
            .transpose()?;
        Ok(Self { chain, provider })
    }
}

impl Chain {
    fn check(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<(), Error> {
        // A self-signed server certificate that is its own root, as many installations have:
        // webpki takes no authority for a server, OpenSSL (and so libpq) does.
        let checked = if self.roots.iter().any(|root| root == certificate) {
            check_dates(certificate, now).and_then(|()| {
                let parsed = rustls::server::ParsedCertificate::try_from(certificate)?;
                rustls::client::verify_server_name(&parsed, name)
            })
        } else {
            self.verifier
                .verify_server_cert(certificate, intermediates, name, ocsp, now)
                .map(drop)
        };
        match checked {
            // The name comes last: all else was found good.
            Err(Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) if !self.check_name || is_common_name(certificate, name) => Ok(()),
            checked => checked,
        }
    }
}

fn check_dates(certificate: &CertificateDer<'_>, now: UnixTime) -> Result<(), Error> {
    let (_, parsed) = X509Certificate::from_der(certificate)
        .map_err(|_| Error::InvalidCertificate(CertificateError::BadEncoding))?;
    let now = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
    let validity = parsed.validity();
    if now < validity.not_before.timestamp() {
        return Err(Error::InvalidCertificate(CertificateError::NotValidYet));
    }
    if now > validity.not_after.timestamp() {
        return Err(Error::InvalidCertificate(CertificateError::Expired));
    }
    Ok(())
}

/// libpq goes by the common name when the certificate has no alternative names at all.
fn is_common_name(certificate: &CertificateDer<'_>, name: &ServerName<'_>) -> bool {
    let Ok((_, parsed)) = X509Certificate::from_der(certificate) else {
        return false;
    };
    if !matches!(parsed.subject_alternative_name(), Ok(None)) {
        return false;
    }
    common_name(certificate).is_some_and(|cn| cn.eq_ignore_ascii_case(&name.to_str()))
}

impl ServerCertVerifier for ServerCertificates {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        if let Some(chain) = &self.chain {
            chain.check(end_entity, intermediates, server_name, ocsp_response, now)?;
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls12_signature(message, cert, dss, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, cert, dss, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}
