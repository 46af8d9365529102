//! The cluster's own authority and the certificates it issues. Pure but for randomness.

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, date_time_ymd,
};

use crate::OperatorError;

/// Name in the authority's certificate.
const AUTHORITY: &str = "helios cluster authority";

/// A certificate with its key, in PEM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Pair {
    pub(crate) certificate: String,
    pub(crate) key: String,
}

/// A new authority.
pub(crate) fn authority() -> Result<Pair, OperatorError> {
    let key = KeyPair::generate()?;
    let issuer = CertifiedIssuer::self_signed(authority_params(), &key)?;
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
) -> Result<Pair, OperatorError> {
    let issuer = Issuer::new(authority_params(), KeyPair::from_pem(&authority.key)?);
    let mut params = CertificateParams::new(names.to_vec())?;
    params.distinguished_name = named(common_name);
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![
        ExtendedKeyUsagePurpose::ServerAuth,
        ExtendedKeyUsagePurpose::ClientAuth,
    ];
    validity(&mut params);
    let key = KeyPair::generate()?;
    Ok(Pair {
        certificate: params.signed_by(&key, &issuer)?.pem(),
        key: key.serialize_pem(),
    })
}

fn authority_params() -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = named(AUTHORITY);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    validity(&mut params);
    params
}

/// Long: nothing renews them yet.
fn validity(params: &mut CertificateParams) {
    params.not_before = date_time_ymd(2020, 1, 1);
    params.not_after = date_time_ymd(2049, 12, 31);
}

fn named(common_name: &str) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    name.push(DnType::CommonName, common_name);
    name
}

#[cfg(test)]
mod tests {
    use super::*;
    use helios_control::Material;

    #[test]
    fn what_is_issued_is_believed() {
        let authority = authority().unwrap();
        let pair = issue(&authority, "helios", &["pg-1".to_owned()]).unwrap();
        let material = Material::from_pem(
            authority.certificate.as_bytes(),
            pair.certificate.as_bytes(),
            pair.key.as_bytes(),
        );
        assert!(material.is_ok());
    }
}
