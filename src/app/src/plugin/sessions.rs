//! `sessions`: each proxy is asked on its loopback port, which only `pods/portforward` leads to.
//!
//! Invariant: a proxy that could not be asked is said, and the command fails: what is missing must
//! not look like everything.

use helios_api::control::SessionInfo;
use helios_api::protection::ProtectionReport;
use helios_api::v1alpha1::names;
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt as _;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::args::ProxySessionsArgs;
use super::forward;
use super::place::Place;
use crate::commands::{protection, show};
use crate::failure::Failure;
use crate::{out, table};

/// What one proxy said.
#[derive(Debug, Serialize)]
struct Answer<T> {
    proxy: String,
    #[serde(flatten)]
    content: T,
}

/// `kubectl helios sessions`.
pub(super) async fn run(place: &Place, args: &ProxySessionsArgs) -> Result<(), Failure> {
    let name = &args.cluster.cluster;
    place.cluster(name).await?;
    let pods = place.pods_of(name, "proxy").await?;
    if pods.is_empty() {
        return Err(Failure::failed(format!("cluster {name} has no proxies")));
    }
    let silent = if args.protection {
        let (reports, silent) = ask::<ProtectionReport>(place, &pods, "/v1/protection").await;
        let all = merge(reports.into_iter().map(|(_, report)| report).collect());
        match args.json {
            true => json(&all)?,
            false => out::print(&protection::describe(&all)),
        }
        silent
    } else {
        let (lists, silent) = ask::<Vec<SessionInfo>>(place, &pods, "/v1/sessions").await;
        let sessions = flatten(lists);
        match args.json {
            true => json(&sessions)?,
            false => out::print(&render(&sessions)),
        }
        silent
    };
    if silent > 0 {
        let all = pods.len();
        return Err(Failure::failed(format!(
            "{silent} of {all} proxies could not be asked: this is not everything"
        )));
    }
    Ok(())
}

/// What each proxy says; and how many say nothing.
async fn ask<T: DeserializeOwned>(
    place: &Place,
    pods: &[Pod],
    path: &str,
) -> (Vec<(String, T)>, usize) {
    let asked = pods.iter().map(async |pod| {
        if !forward::runs(pod) {
            return Err(Failure::failed(format!(
                "Pod {} does not run",
                pod.name_any()
            )));
        }
        let answer = forward::get(place, pod, names::INSPECT_PORT, path).await?;
        Ok((pod.name_any(), answer))
    });
    let mut answers = Vec::new();
    let mut silent = 0;
    for answer in futures_util::future::join_all(asked).await {
        match answer {
            Ok(answer) => answers.push(answer),
            Err(error) => {
                silent += 1;
                out::note(&error.to_string());
            }
        }
    }
    (answers, silent)
}

fn flatten(lists: Vec<(String, Vec<SessionInfo>)>) -> Vec<Answer<SessionInfo>> {
    let mut all = Vec::new();
    for (proxy, mut sessions) in lists {
        sessions.sort_by_key(|s| s.id);
        all.extend(sessions.into_iter().map(|content| Answer {
            proxy: proxy.clone(),
            content,
        }));
    }
    all
}

fn render(sessions: &[Answer<SessionInfo>]) -> String {
    let rows: Vec<Vec<String>> = sessions
        .iter()
        .map(|s| {
            let mut row = vec![s.proxy.clone()];
            row.extend(show::session(&s.content));
            row
        })
        .collect();
    let head: Vec<&str> = std::iter::once("PROXY").chain(show::SESSION_HEAD).collect();
    table::render(&head, &rows)
}

/// One report of several: since the first of them, the same users' rows added up.
fn merge(reports: Vec<ProtectionReport>) -> ProtectionReport {
    let since = reports.iter().map(|r| r.since).reduce(f64::min);
    let mut all = ProtectionReport {
        since: since.unwrap_or_default(),
        rows: Vec::new(),
    };
    for row in reports.into_iter().flat_map(|r| r.rows) {
        let same = all.rows.iter_mut().find(|r| {
            (&r.database, &r.user, &r.application, r.reason)
                == (&row.database, &row.user, &row.application, row.reason)
        });
        match same {
            None => all.rows.push(row),
            Some(there) => {
                there.transactions += row.transactions;
                there.statements += row.statements;
                there.transaction_seconds += row.transaction_seconds;
                there.idle_seconds += row.idle_seconds;
            }
        }
    }
    all
}

fn json<T: Serialize>(value: &T) -> Result<(), Failure> {
    let text = serde_json::to_string(value)
        .map_err(|e| Failure::failed(format!("could not write JSON: {e}")))?;
    out::print(&text);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use helios_api::protection::{ProtectionRow, Unprotected};
    use serde_json::json;

    fn row(user: &str, reason: Option<Unprotected>, transactions: u64) -> ProtectionRow {
        ProtectionRow {
            database: "app".into(),
            user: user.into(),
            application: "till".into(),
            reason,
            transactions,
            statements: 1,
            transaction_seconds: 1.0,
            idle_seconds: 2.0,
        }
    }

    #[test]
    fn reports_of_proxies_add_up() {
        let why = Some(Unprotected::TemporaryObject);
        let one = ProtectionReport {
            since: 20.0,
            rows: vec![row("a", None, 3), row("a", why, 1)],
        };
        let two = ProtectionReport {
            since: 10.0,
            rows: vec![row("a", None, 4), row("b", None, 5)],
        };
        let all = merge(vec![one, two]);
        let seen: Vec<_> = all
            .rows
            .iter()
            .map(|r| (&*r.user, r.reason, r.transactions, r.statements))
            .collect();
        assert_eq!(
            seen,
            [("a", None, 7, 2), ("a", why, 1, 1), ("b", None, 5, 1)]
        );
        assert!((all.since - 10.0).abs() < 1e-9);
    }

    #[test]
    fn sessions_are_listed_with_their_proxy() {
        let session: SessionInfo = serde_json::from_value(json!({
            "id": 7, "state": "in transaction", "user": "app", "database": "app",
            "application": "till", "client": "10.0.0.9:4000", "instance": "pg-1",
            "transaction_age_ms": 1500, "journal_bytes": 96, "migrations": 2, "unprotected": null,
        }))
        .unwrap();
        let text = render(&flatten(vec![("pg-proxy-a".to_owned(), vec![session])]));
        assert_eq!(
            text,
            "\
PROXY       SESSION  STATE           USER  DATABASE  APPLICATION  CLIENT         INSTANCE  IN TRANSACTION  JOURNAL  MOVES  PROTECTED
pg-proxy-a  7        in transaction  app   app       till         10.0.0.9:4000  pg-1      1.5s            96 B     2      yes
"
        );
    }
}
