//! The cluster's own authority and the certificates it issues: made, and read. Pure but for
//! randomness; what is to be made, and when, is decided in `renewal`.

use helios_control::{Live, Material};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, date_time_ymd,
};
use x509_parser::pem::Pem;
use x509_parser::prelude::X509Certificate;

use crate::OperatorError;

/// Beginning of the name in an authority's certificate. The rest is its own: where two of the same
/// name are believed, OpenSSL looks at one of them only.
const AUTHORITY: &str = "helios cluster authority";
/// Certificates are valid from a moment ago on: clocks differ.
const BACKDATED: i64 = 3600;
/// The last line of a certificate.
const END: &str = "-----END CERTIFICATE-----";

/// A certificate with its key, in PEM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Pair {
    pub(crate) certificate: String,
    pub(crate) key: String,
}

/// From when until when something is valid, in seconds since the Unix epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) from: i64,
    pub(crate) until: i64,
}

impl Span {
    /// For somebody who begins to use it now.
    pub(crate) fn of(now: i64, seconds: i64) -> Self {
        Self {
            from: now.saturating_sub(BACKDATED),
            until: now.saturating_add(seconds),
        }
    }

    /// The end of the span, but not behind another one's.
    pub(crate) fn within(self, other: Self) -> Self {
        Self {
            until: self.until.min(other.until),
            ..self
        }
    }
}

/// A new authority.
pub(crate) fn authority(valid: Span) -> Result<Pair, OperatorError> {
    use rand::RngExt as _;
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::default();
    let own: u32 = rand::rng().random();
    params.distinguished_name = named(&format!("{AUTHORITY} {own:08x}"));
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.use_authority_key_identifier_extension = true;
    set_validity(&mut params, valid);
    let issuer = CertifiedIssuer::self_signed(params, &key)?;
    Ok(Pair {
        certificate: issuer.pem(),
        key: key.serialize_pem(),
    })
}

/// A certificate of the authority for both ends of a connection. `common_name` is the role that
/// PostgreSQL lets in with it, `names` are what peers know the holder by.
pub(crate) fn issue(
    authority: &Pair,
    common_name: &str,
    names: &[String],
    valid: Span,
) -> Result<Pair, OperatorError> {
    let key = KeyPair::from_pem(&authority.key)?;
    let issuer = Issuer::from_ca_cert_pem(&authority.certificate, key)?;
    let mut params = CertificateParams::new(names.to_vec())?;
    params.distinguished_name = named(common_name);
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![
        ExtendedKeyUsagePurpose::ServerAuth,
        ExtendedKeyUsagePurpose::ClientAuth,
    ];
    params.use_authority_key_identifier_extension = true;
    set_validity(&mut params, valid);
    let key = KeyPair::generate()?;
    Ok(Pair {
        certificate: params.signed_by(&key, &issuer)?.pem(),
        key: key.serialize_pem(),
    })
}

fn set_validity(params: &mut CertificateParams, valid: Span) {
    let seconds = |at: i64| std::time::Duration::from_secs(u64::try_from(at).unwrap_or_default());
    let epoch = date_time_ymd(1970, 1, 1);
    params.not_before = epoch + seconds(valid.from);
    params.not_after = epoch + seconds(valid.until);
}

fn named(common_name: &str) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    name.push(DnType::CommonName, common_name);
    name
}

/// When the first certificate of a text is valid; `None` when there is none that can be read.
pub(crate) fn span(pem: &str) -> Option<Span> {
    with_first(pem, |certificate| {
        let valid = certificate.validity();
        Span {
            from: valid.not_before.timestamp(),
            until: valid.not_after.timestamp(),
        }
    })
}

/// Whether the first certificate of `pem` was issued by the first one of `authority`.
pub(crate) fn is_issued_by(pem: &str, authority: &str) -> bool {
    let checked = with_first(authority, |authority| {
        with_first(pem, |certificate| {
            certificate.issuer() == authority.subject()
                && certificate
                    .verify_signature(Some(authority.public_key()))
                    .is_ok()
        })
    });
    checked.flatten().unwrap_or_default()
}

/// Whether the key belongs to the certificate, and all of it can be used.
pub(crate) fn fits(authorities: &str, pair: &Pair) -> bool {
    let material = Material::from_pem(
        authorities.as_bytes(),
        pair.certificate.as_bytes(),
        pair.key.as_bytes(),
    );
    material.and_then(|material| Live::new(&material)).is_ok()
}

/// The certificates of a text, each by itself.
pub(crate) fn each(pem: &str) -> Vec<String> {
    let parts = pem.split_inclusive(END).filter(|part| part.contains(END));
    parts.map(|part| format!("{}\n", part.trim())).collect()
}

fn with_first<T>(pem: &str, look: impl FnOnce(&X509Certificate<'_>) -> T) -> Option<T> {
    let first = Pem::iter_from_buffer(pem.as_bytes()).next()?.ok()?;
    let certificate = first.parse_x509().ok()?;
    Some(look(&certificate))
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: i64 = 1_900_000_000;
    const DAY: i64 = 86_400;

    #[test]
    fn what_is_issued_is_believed_and_read() {
        let valid = Span::of(NOW, 10 * DAY);
        let first = authority(Span::of(NOW, 100 * DAY)).unwrap();
        let second = authority(Span::of(NOW, 100 * DAY)).unwrap();
        let pair = issue(&first, "helios", &["pg-1".to_owned()], valid).unwrap();
        assert!(fits(&first.certificate, &pair));
        assert_eq!(span(&pair.certificate), Some(valid));
        assert!(is_issued_by(&pair.certificate, &first.certificate));
        assert!(!is_issued_by(&pair.certificate, &second.certificate));
        // A key of another pair, and what is no certificate.
        let other = issue(&first, "helios", &["pg-1".to_owned()], valid).unwrap();
        let mixed = Pair {
            key: other.key,
            ..pair.clone()
        };
        assert!(!fits(&first.certificate, &mixed));
        assert_eq!(span("nothing"), None);
        assert!(!is_issued_by("nothing", &first.certificate));
        // Several in a row.
        let both = format!("{}{}", second.certificate, first.certificate);
        assert_eq!(each(&both).concat(), both);
        assert_eq!(each(&both).len(), 2);
        assert!(fits(&both, &pair));
    }

    /// Two authorities are told apart by name: a library that looks for one by name finds the right
    /// one.
    #[test]
    fn authorities_have_names_of_their_own() {
        let names: Vec<String> = (0..2)
            .map(|_| authority(Span::of(NOW, DAY)).unwrap())
            .map(|a| with_first(&a.certificate, |c| c.subject().to_string()).unwrap())
            .collect();
        assert!(names[0].starts_with("CN=helios cluster authority "));
        assert_ne!(names[0], names[1]);
    }
}
