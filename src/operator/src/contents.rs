//! What the Secrets with a cluster's certificates hold: read for a decision, and made by its steps.
//! Pure but for the randomness of new keys.
//!
//! The authority's Secret has the one that issues in `ca.crt` and `ca.key`; the one that is to take
//! its place in `next.crt` and `next.key`, with the time since when everybody believes it in
//! `next.trusted-since`; and those before it, without their keys, in `former.crt`. Every other one
//! has all of them in `ca.crt`, and its own certificate in `tls.crt` and `tls.key`.

use std::collections::BTreeMap;

use helios_api::v1alpha1::names;
use helios_control::{Live, Material};

use crate::OperatorError;
use crate::certificates::{self, Pair, Span};
use crate::renewal::{AUTHORITY_LIFE, Authority, Believes, Holder, Leaf, Next, Step, Terms};

const CA: &str = "ca.crt";
const CA_KEY: &str = "ca.key";
const NEXT: &str = "next.crt";
const NEXT_KEY: &str = "next.key";
const TRUSTED: &str = "next.trusted-since";
const FORMER: &str = "former.crt";
const CERTIFICATE: &str = "tls.crt";
const KEY: &str = "tls.key";

/// How long a certificate is valid that is only shown once, in seconds.
const TRIAL: i64 = 600;

/// Texts by key.
pub(crate) type Contents = BTreeMap<String, String>;

/// The authority's Secret.
#[derive(Debug, Clone)]
pub(crate) struct AuthorityKeys {
    pub(crate) secret: String,
    pub(crate) contents: Contents,
    pub(crate) ours: bool,
    pub(crate) asked: bool,
    pub(crate) stuck: bool,
    /// Whether the one that is to take its place was seen to be believed.
    pub(crate) believed: Option<bool>,
}

/// A holder's Secret.
#[derive(Debug, Clone)]
pub(crate) struct HolderKeys {
    pub(crate) secret: String,
    /// What peers know it by.
    pub(crate) names: Vec<String>,
    /// `None`: there is no such Secret yet.
    pub(crate) contents: Option<Contents>,
    pub(crate) ours: bool,
    pub(crate) reloads: bool,
    pub(crate) asked: bool,
    pub(crate) stuck: bool,
}

/// A new authority's Secret.
pub(crate) fn new_authority(now: i64) -> Result<Contents, OperatorError> {
    let pair = certificates::authority(Span::of(now, AUTHORITY_LIFE))?;
    Ok(Contents::from([
        (CA.to_owned(), pair.certificate),
        (CA_KEY.to_owned(), pair.key),
    ]))
}

impl AuthorityKeys {
    /// What is decided by.
    pub(crate) fn facts(&self) -> Result<Authority, OperatorError> {
        let lacks = |key: &str| OperatorError::Secret {
            secret: self.secret.clone(),
            key: key.to_owned(),
        };
        let issues = self.issuing().ok_or_else(|| lacks(CA_KEY))?;
        let valid = certificates::span(&issues.certificate).ok_or_else(|| lacks(CA))?;
        let next = self.pair(NEXT, NEXT_KEY);
        let next = next.and_then(|pair| certificates::span(&pair.certificate));
        let former = self.certificates(FORMER);
        Ok(Authority {
            valid,
            ours: self.ours,
            issues: certificates::fits(&issues.certificate, &issues),
            next: next.map(|valid| Next {
                valid,
                trusted: self.contents.get(TRUSTED).and_then(|at| at.parse().ok()),
                believed: self.believed,
            }),
            former: former
                .iter()
                .filter_map(|one| certificates::span(one))
                .map(|valid| valid.until)
                .collect(),
            asked: self.asked,
            stuck: self.stuck,
        })
    }

    /// All that are to be believed, the one that issues first.
    pub(crate) fn bundle(&self) -> String {
        let mut all: Vec<String> = Vec::new();
        for key in [CA, NEXT, FORMER] {
            for one in self.certificates(key) {
                if !all.contains(&one) {
                    all.push(one);
                }
            }
        }
        all.concat()
    }

    /// The one that issues.
    fn issuing(&self) -> Option<Pair> {
        self.pair(CA, CA_KEY)
    }

    fn pair(&self, certificate: &str, key: &str) -> Option<Pair> {
        Some(Pair {
            certificate: self.contents.get(certificate)?.clone(),
            key: self.contents.get(key)?.clone(),
        })
    }

    fn certificates(&self, key: &str) -> Vec<String> {
        self.contents
            .get(key)
            .map(|text| certificates::each(text))
            .unwrap_or_default()
    }

    /// A certificate of the next one, to be shown to those who are asked whether they believe it.
    pub(crate) fn trial(&self, name: &str, now: i64) -> Result<Live, OperatorError> {
        let next = self.pair(NEXT, NEXT_KEY);
        let next = next.ok_or_else(|| OperatorError::Secret {
            secret: self.secret.clone(),
            key: NEXT.to_owned(),
        })?;
        let valid = Span::of(now, TRIAL);
        let pair = certificates::issue(&next, names::SERVICE_USER, &[name.to_owned()], valid)?;
        let material = Material::from_pem(
            self.bundle().as_bytes(),
            pair.certificate.as_bytes(),
            pair.key.as_bytes(),
        )?;
        Ok(Live::new(&material)?)
    }

    /// What a step of the authority makes of it; `None`: the step is none of its.
    pub(crate) fn after(&self, step: Step, now: i64) -> Result<Option<Contents>, OperatorError> {
        let mut contents = self.contents.clone();
        match step {
            Step::Forget => {
                let mut former = self.certificates(FORMER);
                former.retain(|one| certificates::span(one).is_some_and(|v| v.until > now));
                set_former(&mut contents, &former);
            }
            Step::Announce(_) => {
                let pair = certificates::authority(Span::of(now, AUTHORITY_LIFE))?;
                contents.insert(NEXT.to_owned(), pair.certificate);
                contents.insert(NEXT_KEY.to_owned(), pair.key);
                contents.remove(TRUSTED);
            }
            Step::Trusted => {
                contents.insert(TRUSTED.to_owned(), now.to_string());
            }
            Step::Promote => {
                let former = [self.certificates(CA), self.certificates(FORMER)].concat();
                for (to, from) in [(CA, NEXT), (CA_KEY, NEXT_KEY)] {
                    if let Some(text) = contents.remove(from) {
                        contents.insert(to.to_owned(), text);
                    }
                }
                contents.remove(TRUSTED);
                set_former(&mut contents, &former);
            }
            Step::Ask | Step::Issue(..) | Step::Tell(_) => return Ok(None),
        }
        Ok(Some(contents))
    }
}

fn set_former(contents: &mut Contents, former: &[String]) {
    match former {
        [] => contents.remove(FORMER),
        some => contents.insert(FORMER.to_owned(), some.concat()),
    };
}

impl HolderKeys {
    /// What is decided by.
    pub(crate) fn facts(&self, authority: &AuthorityKeys) -> Holder {
        let wanted = certificates::each(&authority.bundle());
        let has = self.certificates_believed();
        let believes = match has {
            has if has == wanted => Believes::Same,
            has if wanted.iter().all(|one| has.contains(one)) => Believes::More,
            _ => Believes::Less,
        };
        Holder {
            leaf: self.leaf(authority),
            believes,
            ours: self.ours,
            reloads: self.reloads,
            asked: self.asked,
            stuck: self.stuck,
        }
    }

    fn certificates_believed(&self) -> Vec<String> {
        let text = self.contents.as_ref().and_then(|c| c.get(CA));
        text.map(|text| certificates::each(text))
            .unwrap_or_default()
    }

    fn leaf(&self, authority: &AuthorityKeys) -> Leaf {
        let Some(contents) = &self.contents else {
            return Leaf::Missing;
        };
        let (Some(pair), Some(issues)) = (pair(contents), authority.issuing()) else {
            return Leaf::Broken;
        };
        match certificates::span(&pair.certificate) {
            Some(valid) if certificates::fits(&issues.certificate, &pair) => Leaf::Held {
                valid,
                current: certificates::is_issued_by(&pair.certificate, &issues.certificate),
            },
            _ => Leaf::Broken,
        }
    }

    /// Its own certificate and key.
    pub(crate) fn pair(&self) -> Option<Pair> {
        self.contents.as_ref().and_then(pair)
    }

    /// Its Secret with a new certificate.
    pub(crate) fn issued(
        &self,
        authority: &AuthorityKeys,
        terms: Terms,
        now: i64,
    ) -> Result<Contents, OperatorError> {
        let facts = authority.facts()?;
        let issues = authority.issuing().filter(|_| facts.issues);
        let issues = issues.ok_or_else(|| OperatorError::Secret {
            secret: authority.secret.clone(),
            key: CA_KEY.to_owned(),
        })?;
        let valid = Span::of(now, terms.life).within(facts.valid);
        let pair = certificates::issue(&issues, names::SERVICE_USER, &self.names, valid)?;
        let mut contents = self.told(authority);
        contents.insert(CERTIFICATE.to_owned(), pair.certificate);
        contents.insert(KEY.to_owned(), pair.key);
        Ok(contents)
    }

    /// Its Secret with all authorities that are to be believed.
    pub(crate) fn told(&self, authority: &AuthorityKeys) -> Contents {
        let mut contents = self.contents.clone().unwrap_or_default();
        contents.insert(CA.to_owned(), authority.bundle());
        contents
    }
}

fn pair(contents: &Contents) -> Option<Pair> {
    Some(Pair {
        certificate: contents.get(CERTIFICATE)?.clone(),
        key: contents.get(KEY)?.clone(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::renewal::{DAY, Decision, TRUST_FIRST, decide};

    const NOW: i64 = 1_900_000_000;
    const TERMS: Terms = Terms {
        life: 90 * DAY,
        before: None,
    };

    fn keys() -> (AuthorityKeys, HolderKeys) {
        let authority = AuthorityKeys {
            secret: "pg-ca".to_owned(),
            contents: new_authority(NOW).unwrap(),
            ours: true,
            asked: false,
            stuck: false,
            believed: None,
        };
        let holder = HolderKeys {
            secret: "pg-1-tls".to_owned(),
            names: vec!["pg-1".to_owned()],
            contents: None,
            ours: true,
            reloads: true,
            asked: false,
            stuck: false,
        };
        (authority, holder)
    }

    /// Carries out every step until there is none; the steps.
    fn settle(authority: &mut AuthorityKeys, holder: &mut HolderKeys, now: i64) -> Vec<Step> {
        let mut steps = Vec::new();
        loop {
            let holders = [holder.facts(authority)];
            match decide(TERMS, &authority.facts().unwrap(), &holders, now) {
                Decision::Rest { .. } => return steps,
                Decision::Do(step) => {
                    match step {
                        Step::Issue(..) => {
                            holder.contents = Some(holder.issued(authority, TERMS, now).unwrap());
                        }
                        Step::Ask => authority.believed = Some(true),
                        Step::Tell(_) => holder.contents = Some(holder.told(authority)),
                        _ => {
                            let after = authority.after(step, now).unwrap();
                            authority.contents = after.unwrap();
                            authority.asked = false;
                        }
                    }
                    steps.push(step);
                }
            }
        }
    }

    #[test]
    fn a_holder_goes_from_one_authority_to_the_next() {
        use crate::renewal::Why::{Asked, Missing, Replaced};
        let (mut authority, mut holder) = keys();
        let steps = settle(&mut authority, &mut holder, NOW);
        assert_eq!(steps, [Step::Issue(0, Missing)]);
        let first = authority.contents[CA].clone();
        assert_eq!(holder.contents.as_ref().unwrap()[CA], first);

        authority.asked = true;
        let steps = settle(&mut authority, &mut holder, NOW);
        assert_eq!(steps, [Step::Announce(Asked), Step::Tell(0), Step::Trusted]);
        let next = authority.contents[NEXT].clone();
        assert_eq!(authority.bundle(), format!("{first}{next}"));
        assert_eq!(holder.contents.as_ref().unwrap()[CA], authority.bundle());
        // Still the first one's.
        let before = holder.pair().unwrap();
        assert!(certificates::is_issued_by(&before.certificate, &first));

        let later = NOW + TRUST_FIRST;
        let steps = settle(&mut authority, &mut holder, later);
        assert_eq!(
            steps,
            [Step::Ask, Step::Promote, Step::Issue(0, Replaced)],
            "and the bundle's order has changed with it"
        );
        assert_eq!(authority.contents[CA], next);
        assert_eq!(authority.contents[FORMER], first);
        assert!(!authority.contents.contains_key(NEXT_KEY));
        let after = holder.pair().unwrap();
        assert!(certificates::is_issued_by(&after.certificate, &next));
        assert!(certificates::fits(&authority.bundle(), &after));

        // The first one has ended.
        let end = NOW + AUTHORITY_LIFE;
        holder.reloads = false;
        let steps = settle(&mut authority, &mut holder, end);
        assert_eq!(steps[0], Step::Forget);
        assert!(!authority.contents.contains_key(FORMER));
    }

    #[test]
    fn a_secret_that_cannot_be_used_is_broken_or_said() {
        let (authority, mut holder) = keys();
        let leaf = |contents: Option<Contents>| {
            let holder = HolderKeys {
                contents,
                ..holder.clone()
            };
            holder.facts(&authority).leaf
        };
        let good = holder.issued(&authority, TERMS, NOW).unwrap();
        let other = holder.issued(&authority, TERMS, NOW).unwrap();
        assert!(matches!(
            leaf(Some(good.clone())),
            Leaf::Held { current: true, .. }
        ));
        let mut mixed = good.clone();
        mixed.insert(KEY.to_owned(), other[KEY].clone());
        let mut none = good.clone();
        none.remove(CERTIFICATE);
        for contents in [mixed, none] {
            assert_eq!(leaf(Some(contents)), Leaf::Broken);
        }
        assert_eq!(leaf(None), Leaf::Missing);
        holder.contents = Some(good);
        let mut lost = authority;
        assert!(lost.facts().unwrap().issues);
        let stranger = new_authority(NOW).unwrap();
        lost.contents
            .insert(CA_KEY.to_owned(), stranger[CA_KEY].clone());
        assert!(!lost.facts().unwrap().issues);
        assert!(holder.issued(&lost, TERMS, NOW).is_err());
        lost.contents.remove(CA_KEY);
        let error = lost.facts().unwrap_err().to_string();
        assert!(error.contains("pg-ca") && error.contains(CA_KEY), "{error}");
    }
}
