//! A cluster's Secrets: read when they are there, made when they are not. Passwords are never
//! changed; certificates are, as `renewal` decides.
//!
//! Invariant: a Secret is written whole, and only over the version that was read; a certificate is
//! never there without its key. One that somebody else has made is not written at all.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::Duration;

use helios_api::v1alpha1::{names, valid::ValidCluster};
use helios_control::{ControlClient, Live, Material};
use hyper::Method;
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use kube::api::PostParams;
use kube::{Api, Client, ResourceExt as _};

use crate::OperatorError;
use crate::build::{labels, owner};
use crate::contents::{AuthorityKeys, Contents, HolderKeys, new_authority};
use crate::renewal::{Decision, Leaf, Step, Terms, Why, decide};

/// More steps than these are not taken in one round: each is taken once at the most.
const MOST_STEPS: usize = 64;
/// How long a program may take to let the operator in.
const ASK_LIMIT: Duration = Duration::from_secs(5);

/// What the operator itself needs of them.
#[derive(Debug)]
pub(crate) struct Secrets {
    /// The operator's own certificate for this cluster.
    pub(crate) operator: Live,
    /// What that was made of, but for its key.
    made_of: String,
    /// Password of the application's role.
    pub(crate) app_password: String,
}

impl Secrets {
    /// Others in place of these. Whoever uses the certificates goes on with the new ones; where they
    /// are the same, TLS sessions can still be resumed.
    pub(crate) fn renewed(&self, by: &Self) -> Self {
        if self.made_of != by.made_of {
            self.operator.take_over(&by.operator);
        }
        Self {
            operator: self.operator.clone(),
            made_of: by.made_of.clone(),
            app_password: by.app_password.clone(),
        }
    }
}

/// What the certificates are to be like.
#[derive(Debug, Clone, Default)]
pub(crate) struct Wanted {
    /// Seconds since the Unix epoch.
    pub(crate) now: i64,
    /// Holders, as their Secrets name them, whose programs read their files once.
    pub(crate) unchanging: BTreeSet<String>,
    /// Programs that run and read their files again.
    pub(crate) peers: Vec<Peer>,
    /// Every certificate is asked for anew.
    pub(crate) all: bool,
    /// A new authority is asked for.
    pub(crate) authority: bool,
}

/// A program that runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Peer {
    /// Its control port.
    pub(crate) address: SocketAddr,
    /// What its certificate carries.
    pub(crate) name: String,
    /// Its Pod.
    pub(crate) pod: String,
}

/// What has become of them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Renewed {
    /// What was made anew of what was there, for people.
    pub(crate) done: Vec<String>,
    /// What could not be.
    pub(crate) failed: Vec<String>,
    /// Pods whose programs do not believe a new authority.
    pub(crate) doubting: Vec<String>,
    /// Secrets of somebody else's, with the end of their certificates.
    pub(crate) others: Vec<(String, i64)>,
    /// When to look again, and when the first certificate ends.
    pub(crate) again: i64,
    pub(crate) first_end: i64,
}

/// Reads all Secrets of a cluster, makes those that are missing, and renews what is due.
pub(crate) async fn ensure(
    client: &Client,
    cluster: &ValidCluster,
    wanted: &Wanted,
) -> Result<(Secrets, Renewed), OperatorError> {
    let mut vault = Vault {
        api: Api::namespaced(client.clone(), &cluster.namespace),
        cluster,
        found: BTreeMap::new(),
    };
    let mut keys = vault.load(wanted).await?;
    let renewed = vault.renew(&mut keys, wanted).await?;
    let own = names::operator_tls_secret(&cluster.name);
    let own = keys.holders.iter().find(|holder| holder.secret == own);
    let pair = own.and_then(HolderKeys::pair);
    let pair = pair.ok_or_else(|| lacks(&names::operator_tls_secret(&cluster.name), "tls.crt"))?;
    let bundle = keys.authority.bundle();
    let material = Material::from_pem(
        bundle.as_bytes(),
        pair.certificate.as_bytes(),
        pair.key.as_bytes(),
    )?;
    let secrets = Secrets {
        operator: Live::new(&material)?,
        made_of: format!("{bundle}{}", pair.certificate),
        app_password: vault.app().await?,
    };
    Ok((secrets, renewed))
}

/// Who holds a certificate, by the names of their Secrets without `-tls`, and what peers know them
/// by.
fn holders(cluster: &ValidCluster) -> Vec<(String, Vec<String>)> {
    let name = &cluster.name;
    let mut all: Vec<_> = cluster
        .instances
        .iter()
        .map(|instance| (instance.to_string(), vec![instance.to_string()]))
        .collect();
    let proxy_names = vec![
        names::PROXY_IDENTITY.to_owned(),
        name.clone(),
        format!("{name}.{}", cluster.namespace),
        format!("{name}.{}.svc", cluster.namespace),
    ];
    all.push((names::proxy(name), proxy_names));
    let own = vec![names::OPERATOR_IDENTITY.to_owned()];
    all.push((format!("{name}-operator"), own));
    all
}

struct Keys {
    authority: AuthorityKeys,
    holders: Vec<HolderKeys>,
}

struct Vault<'a> {
    api: Api<Secret>,
    cluster: &'a ValidCluster,
    /// As the API server has them.
    found: BTreeMap<String, Secret>,
}

impl Vault<'_> {
    async fn load(&mut self, wanted: &Wanted) -> Result<Keys, OperatorError> {
        let ca = names::ca_secret(&self.cluster.name);
        let contents = match self.read(&ca).await? {
            Some(contents) => contents,
            None => {
                let new = new_authority(wanted.now)?;
                self.create(&ca, "Opaque", &new).await?
            }
        };
        let mut authority = AuthorityKeys {
            ours: self.is_ours(&ca),
            secret: ca,
            contents,
            asked: false,
            stuck: false,
            believed: None,
        };
        // One that is on its way is as new as one can be.
        authority.asked = wanted.authority && authority.facts()?.next.is_none();
        let mut all = Vec::new();
        for (holder, names) in holders(self.cluster) {
            let secret = names::tls_secret(&holder);
            let contents = self.read(&secret).await?;
            all.push(HolderKeys {
                ours: contents.is_none() || self.is_ours(&secret),
                names,
                contents,
                reloads: !wanted.unchanging.contains(&holder),
                asked: wanted.all,
                stuck: false,
                secret,
            });
        }
        let holders = all;
        Ok(Keys { authority, holders })
    }

    /// Takes one step after the other until there is none.
    async fn renew(&mut self, keys: &mut Keys, wanted: &Wanted) -> Result<Renewed, OperatorError> {
        let terms = Terms::of(&self.cluster.spec.certificates);
        let mut renewed = Renewed::default();
        for _ in 0..MOST_STEPS {
            let authority = keys.authority.facts()?;
            let facts = keys.holders.iter().map(|h| h.facts(&keys.authority));
            let facts: Vec<_> = facts.collect();
            match decide(terms, &authority, &facts, wanted.now) {
                Decision::Do(Step::Ask) => {
                    let trial = keys.authority.trial(names::OPERATOR_IDENTITY, wanted.now)?;
                    renewed.doubting = doubting(&trial, &wanted.peers).await?;
                    keys.authority.believed = Some(renewed.doubting.is_empty());
                }
                Decision::Do(step) => {
                    self.take(step, keys, (terms, wanted.now), &mut renewed)
                        .await?;
                }
                Decision::Rest { again, first_end } => {
                    renewed.again = again;
                    renewed.first_end = first_end;
                    break;
                }
            }
        }
        let authority = keys.authority.facts()?;
        let name = &keys.authority.secret;
        if !authority.ours {
            renewed.others.push((name.clone(), authority.valid.until));
        }
        if !authority.issues {
            let why = format!("\"{name}\": ca.key is not the key of ca.crt");
            renewed.failed.push(why);
        }
        for holder in keys.holders.iter().filter(|holder| !holder.ours) {
            if let Leaf::Held { valid, .. } = holder.facts(&keys.authority).leaf {
                renewed.others.push((holder.secret.clone(), valid.until));
            }
        }
        Ok(renewed)
    }

    /// Takes one step. What cannot be written stays as it was, unless there was nothing: without it
    /// the cluster cannot be.
    async fn take(
        &mut self,
        step: Step,
        keys: &mut Keys,
        (terms, now): (Terms, i64),
        renewed: &mut Renewed,
    ) -> Result<(), OperatorError> {
        if let Some(contents) = keys.authority.after(step, now)? {
            let secret = keys.authority.secret.clone();
            match self.replace(&secret, &contents).await {
                Ok(contents) => {
                    keys.authority.contents = contents;
                    keys.authority.asked = false;
                    renewed.done.extend(said_of_authority(step));
                }
                Err(error) => {
                    keys.authority.stuck = true;
                    renewed.failed.push(format!("\"{secret}\": {error}"));
                }
            }
            return Ok(());
        }
        let (Step::Issue(number, _) | Step::Tell(number)) = step else {
            return Ok(());
        };
        let Keys { authority, holders } = keys;
        let Some(holder) = holders.get_mut(number) else {
            return Ok(());
        };
        let contents = match step {
            Step::Issue(..) => holder.issued(authority, terms, now)?,
            _ => holder.told(authority),
        };
        let written = match &holder.contents {
            None => {
                let kind = "kubernetes.io/tls";
                Ok(self.create(&holder.secret, kind, &contents).await?)
            }
            Some(_) => self.replace(&holder.secret, &contents).await,
        };
        match written {
            Ok(contents) => {
                holder.contents = Some(contents);
                holder.asked = false;
                renewed.done.extend(said_of_holder(step, &holder.secret));
            }
            Err(error) => {
                holder.stuck = true;
                let secret = &holder.secret;
                renewed.failed.push(format!("\"{secret}\": {error}"));
            }
        }
        Ok(())
    }

    async fn read(&mut self, name: &str) -> Result<Option<Contents>, OperatorError> {
        let Some(secret) = self.api.get_opt(name).await? else {
            return Ok(None);
        };
        Ok(Some(self.keep(name, secret)))
    }

    /// Fails when there is one already.
    async fn create(
        &mut self,
        name: &str,
        kind: &str,
        contents: &Contents,
    ) -> Result<Contents, OperatorError> {
        let secret: Secret = serde_json::from_value(serde_json::json!({
            "metadata": {
                "name": name,
                "labels": labels(self.cluster, None),
                "ownerReferences": [owner(self.cluster)],
            },
            "type": kind,
            "stringData": contents,
        }))?;
        let made = self.api.create(&PostParams::default(), &secret).await?;
        Ok(self.keep(name, made))
    }

    /// Fails when it is another one than that which was read.
    async fn replace(
        &mut self,
        name: &str,
        contents: &Contents,
    ) -> Result<Contents, OperatorError> {
        let mut secret = self.found.get(name).cloned().unwrap_or_default();
        let mut data = secret.data.take().unwrap_or_default();
        // What is no text is not ours to change.
        data.retain(|_, value| std::str::from_utf8(&value.0).is_err());
        let bytes = |text: &String| ByteString(text.clone().into_bytes());
        data.extend(
            contents
                .iter()
                .map(|(key, text)| (key.clone(), bytes(text))),
        );
        secret.data = Some(data);
        let made = self
            .api
            .replace(name, &PostParams::default(), &secret)
            .await?;
        Ok(self.keep(name, made))
    }

    /// Remembers what the API server has; what is no text is left out.
    fn keep(&mut self, name: &str, secret: Secret) -> Contents {
        let data = secret.data.clone().unwrap_or_default();
        self.found.insert(name.to_owned(), secret);
        let text =
            |(key, value): (String, ByteString)| Some((key, String::from_utf8(value.0).ok()?));
        data.into_iter().filter_map(text).collect()
    }

    /// Whether this operator has made it, or one before it.
    fn is_ours(&self, name: &str) -> bool {
        let managed = |secret: &Secret| {
            let by = secret.labels().get("app.kubernetes.io/managed-by");
            by.map(String::as_str) == Some(names::FIELD_MANAGER)
        };
        self.found.get(name).is_some_and(managed)
    }

    /// The Secret that applications read.
    async fn app(&mut self) -> Result<String, OperatorError> {
        let name = names::app_secret(&self.cluster.name);
        let contents = match self.read(&name).await? {
            Some(contents) => contents,
            None => {
                let new = app_secret(self.cluster, &random_password());
                self.create(&name, "kubernetes.io/basic-auth", &new).await?
            }
        };
        let password = contents.get("password").cloned();
        password.ok_or_else(|| lacks(&name, "password"))
    }
}

/// The Pods of those who do not let somebody in with this certificate, or do not answer.
async fn doubting(trial: &Live, peers: &[Peer]) -> Result<Vec<String>, OperatorError> {
    let clients = peers.iter().map(|peer| {
        let client = ControlClient::new(peer.address, &peer.name, trial)?;
        Ok::<_, OperatorError>((client, peer.pod.clone()))
    });
    let clients = clients.collect::<Result<Vec<_>, _>>()?;
    let asked = clients.iter().map(async |(client, pod)| {
        let asked = client.call(Method::GET, "/v1/state", Vec::new(), ASK_LIMIT);
        // Whatever it says: it has let us in.
        asked.await.err().map(|error| {
            tracing::info!(pod, %error, "a new authority is not believed");
            pod.clone()
        })
    });
    let all = futures_util::future::join_all(asked).await;
    Ok(all.into_iter().flatten().collect())
}

fn said_of_authority(step: Step) -> Option<String> {
    Some(match step {
        Step::Announce(why) => {
            let why = why.as_str();
            format!("a new authority is believed from now on ({why})")
        }
        Step::Promote => "the new authority issues certificates from now on".to_owned(),
        Step::Forget => "an authority that has ended is believed no more".to_owned(),
        _ => return None,
    })
}

fn said_of_holder(step: Step, secret: &str) -> Option<String> {
    match step {
        Step::Issue(_, why) if why != Why::Missing => {
            let why = why.as_str();
            Some(format!("\"{secret}\" has a new certificate ({why})"))
        }
        _ => None,
    }
}

fn lacks(secret: &str, key: &str) -> OperatorError {
    OperatorError::Secret {
        secret: secret.to_owned(),
        key: key.to_owned(),
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
