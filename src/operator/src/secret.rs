//! What a cluster's Secrets hold: read when they are there, made when they are not, never changed.

use std::collections::BTreeMap;

use helios_api::v1alpha1::{names, valid::ValidCluster};
use helios_control::{Live, Material};
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use kube::api::PostParams;
use kube::{Api, Client};

use crate::OperatorError;
use crate::build::{labels, owner};
use crate::certificates::{self, Pair};

/// What the operator itself needs of them.
#[derive(Debug)]
pub(crate) struct Secrets {
    /// The operator's own certificate for this cluster.
    pub(crate) operator: Live,
    /// Password of the application's role.
    pub(crate) app_password: String,
}

/// Reads all Secrets of a cluster, making those that are missing.
pub(crate) async fn ensure(
    client: &Client,
    cluster: &ValidCluster,
) -> Result<Secrets, OperatorError> {
    let vault = Vault {
        api: Api::namespaced(client.clone(), &cluster.namespace),
        cluster,
    };
    let name = &cluster.name;
    let ca = vault
        .pair(&names::ca_secret(name), certificates::authority)
        .await?;
    for instance in &cluster.instances {
        let names = [instance.to_string()];
        vault.issued(&ca, instance.as_str(), &names).await?;
    }
    let proxy_names = [
        names::PROXY_IDENTITY.to_owned(),
        name.clone(),
        format!("{name}.{}", cluster.namespace),
        format!("{name}.{}.svc", cluster.namespace),
    ];
    vault.issued(&ca, &names::proxy(name), &proxy_names).await?;
    let own = format!("{name}-operator");
    let own = vault
        .issued(&ca, &own, &[names::OPERATOR_IDENTITY.to_owned()])
        .await?;
    Ok(Secrets {
        operator: Live::new(&Material::from_pem(
            ca.certificate.as_bytes(),
            own.certificate.as_bytes(),
            own.key.as_bytes(),
        )?)?,
        app_password: vault.app().await?,
    })
}

struct Vault<'a> {
    api: Api<Secret>,
    cluster: &'a ValidCluster,
}

impl Vault<'_> {
    /// A Secret's content, made by `make` when there is none. Created and never replaced: losing a
    /// key that is in use cuts every connection.
    async fn content(
        &self,
        name: &str,
        kind: &str,
        make: impl FnOnce() -> Result<BTreeMap<String, String>, OperatorError>,
    ) -> Result<BTreeMap<String, ByteString>, OperatorError> {
        if let Some(secret) = self.api.get_opt(name).await? {
            return Ok(secret.data.unwrap_or_default());
        }
        let secret: Secret = serde_json::from_value(serde_json::json!({
            "metadata": {
                "name": name,
                "labels": labels(self.cluster, None),
                "ownerReferences": [owner(self.cluster)],
            },
            "type": kind,
            "stringData": make()?,
        }))?;
        let made = self.api.create(&PostParams::default(), &secret).await?;
        Ok(made.data.unwrap_or_default())
    }

    async fn pair(
        &self,
        name: &str,
        make: impl FnOnce() -> Result<Pair, OperatorError>,
    ) -> Result<Pair, OperatorError> {
        let content = self
            .content(name, "Opaque", || {
                let pair = make()?;
                Ok(BTreeMap::from([
                    ("ca.crt".to_owned(), pair.certificate),
                    ("ca.key".to_owned(), pair.key),
                ]))
            })
            .await?;
        Ok(Pair {
            certificate: text(&content, name, "ca.crt")?,
            key: text(&content, name, "ca.key")?,
        })
    }

    async fn issued(
        &self,
        ca: &Pair,
        holder: &str,
        names: &[String],
    ) -> Result<Pair, OperatorError> {
        let name = names::tls_secret(holder);
        let make = || {
            let pair = certificates::issue(ca, names::SERVICE_USER, names)?;
            Ok(BTreeMap::from([
                ("ca.crt".to_owned(), ca.certificate.clone()),
                ("tls.crt".to_owned(), pair.certificate),
                ("tls.key".to_owned(), pair.key),
            ]))
        };
        let content = self.content(&name, "kubernetes.io/tls", make).await?;
        Ok(Pair {
            certificate: text(&content, &name, "tls.crt")?,
            key: text(&content, &name, "tls.key")?,
        })
    }

    /// The Secret that applications read.
    async fn app(&self) -> Result<String, OperatorError> {
        let name = names::app_secret(&self.cluster.name);
        let make = || Ok(app_secret(self.cluster, &random_password()));
        let content = self
            .content(&name, "kubernetes.io/basic-auth", make)
            .await?;
        text(&content, &name, "password")
    }
}

fn app_secret(cluster: &ValidCluster, password: &str) -> BTreeMap<String, String> {
    let initdb = &cluster.spec.bootstrap.initdb;
    let (user, database) = (&initdb.owner, &initdb.database);
    let host = format!("{}.{}.svc", cluster.name, cluster.namespace);
    let port = names::POSTGRES_PORT;
    let (in_user, in_database) = (escape(user), escape(database));
    [
        ("username", user.clone()),
        ("password", password.to_owned()),
        ("host", host.clone()),
        ("port", port.to_string()),
        ("dbname", database.clone()),
        (
            "uri",
            format!("postgresql://{in_user}:{password}@{host}:{port}/{in_database}"),
        ),
        (
            "jdbc-uri",
            format!(
                "jdbc:postgresql://{host}:{port}/{in_database}?user={in_user}&password={password}"
            ),
        ),
    ]
    .map(|(key, value)| (key.to_owned(), value))
    .into()
}

/// Percent-encoding of everything that is not unreserved (RFC 3986, section 2.3).
fn escape(text: &str) -> String {
    let one = |b: u8| match b {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
            char::from(b).to_string()
        }
        _ => format!("%{b:02X}"),
    };
    text.bytes().map(one).collect()
}

fn text(
    content: &BTreeMap<String, ByteString>,
    secret: &str,
    key: &str,
) -> Result<String, OperatorError> {
    content
        .get(key)
        .and_then(|value| String::from_utf8(value.0.clone()).ok())
        .ok_or_else(|| OperatorError::Secret {
            secret: secret.to_owned(),
            key: key.to_owned(),
        })
}

/// 32 letters and digits: 190 bits.
fn random_password() -> String {
    use rand::RngExt as _;
    rand::rng()
        .sample_iter(rand::distr::Alphanumeric)
        .take(32)
        .map(char::from)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_in_addresses_are_escaped() {
        assert_eq!(escape("app"), "app");
        assert_eq!(escape("a b/ü"), "a%20b%2F%C3%BC");
    }
}
