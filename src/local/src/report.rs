//! What a running cluster says of itself: status, connection string, why it does not come up.

use std::path::Path;
use std::time::Duration;

use helios_api::InstanceName;
use helios_api::agent::InstanceState;
use helios_cluster::{ClusterState, Contact, InstanceView, Mode};

use crate::agents::Trouble;
use crate::cluster::Inner;
use crate::error::LocalError;
use crate::files;
use crate::options::ProxyAuth;
use crate::status::{InstanceStatus, LocalStatus};

/// What to do about a primary that does not come back.
const LOST_PRIMARY: &str = "correct the cause and start again; if its data are lost, \
    \"helios local failover --accept-data-loss\", given while the cluster starts, promotes the most \
    advanced standby";

impl Inner {
    /// The error of a start that came to nothing; `None` for the limit: it was given up.
    pub(crate) fn not_up(&self, role: &str, limit: Option<Duration>) -> LocalError {
        let state = self.state.borrow().clone();
        let primary = state
            .primary_name()
            .or(state.members.keys().next())
            .cloned();
        let views = self.agents.views();
        let stuck = views.keys().find(|name| match role {
            "primary" => Some(*name) == primary.as_ref(),
            _ => Some(*name) != primary.as_ref() && !is_standby(&views[*name]),
        });
        let Some(name) = stuck.or(primary.as_ref()) else {
            return LocalError::Control("the cluster has no instances".to_owned());
        };
        let trouble = self.agents.trouble(name);
        let log = match (&trouble, self.agents.config(name)) {
            (Some(Trouble::Ended(_)), _) | (_, None) => self.layout.agent_log(name),
            (_, Some(config)) => config.log_file(),
        };
        let why = match (trouble, views.get(name).map(|view| &view.contact)) {
            (Some(trouble), _) => trouble.to_string(),
            (None, Some(Contact::Answers(agent))) => {
                format!("its state is {:?}", agent.instance)
            }
            (None, _) => "its agent does not answer".to_owned(),
        };
        let why = match limit {
            Some(limit) => format!("{} s have passed; {why}", limit.as_secs()),
            None => why,
        };
        let gone = role == "primary" && state.primary.is_some() && state.members.len() > 1;
        LocalError::NotUp {
            instance: name.to_string(),
            why,
            log_tail: files::tail(&log, 10),
            log,
            hint: match gone {
                true => LOST_PRIMARY,
                false => "correct the cause and start again; what is there already is kept",
            },
        }
    }

    pub(crate) fn connection_string(&self, with_password: bool) -> String {
        let Some(proxy) = self.proxy.get() else {
            return String::new();
        };
        let address = proxy.address();
        let (host, port) = address.rsplit_once(':').unwrap_or((&address, "5432"));
        let quoted = |text: &str| {
            let plain = |b: u8| b.is_ascii_alphanumeric() || b"_-./".contains(&b);
            match text.bytes().all(plain) && !text.is_empty() {
                true => text.to_owned(),
                false => format!("'{}'", text.replace('\\', "\\\\").replace('\'', "\\'")),
            }
        };
        let (user, database) = (
            quoted(&self.credentials.user),
            quoted(&self.credentials.database),
        );
        let host = host.trim_matches(['[', ']']);
        let mut text = format!("host={host} port={port} user={user} dbname={database}");
        if with_password && self.auth == ProxyAuth::Scram {
            text.push_str(" password=");
            text.push_str(&quoted(&self.credentials.password));
        }
        text
    }

    pub(crate) async fn status(&self) -> LocalStatus {
        let state = self.state.borrow().clone();
        let (phase, step) = match &state.mode {
            Mode::Bootstrap => ("bootstrap".to_owned(), None),
            Mode::Steady => ("steady".to_owned(), None),
            Mode::Moving(m) => (format!("{:?}", m.kind).to_lowercase(), Some(m.step.phase())),
        };
        let proxy = match self.proxy.get() {
            Some(proxy) => Some(proxy.status().await),
            None => None,
        };
        // Only what is proven counts: see `SyncState`.
        let synchronous = match state.sync.is_settled() {
            true => state.sync.target().into_iter().collect(),
            false => Vec::new(),
        };
        LocalStatus {
            data_dir: self.layout.root().to_owned(),
            pid: std::process::id(),
            connection_string: self.connection_string(false),
            http: self.proxy.get().and_then(|proxy| proxy.http_address()),
            epoch: state.epoch,
            timeline: state.primary.as_ref().map(|p| p.timeline),
            primary: state.primary_name().cloned(),
            phase,
            step,
            instances: self.instances(&state, &synchronous),
            synchronous,
            proxy,
            operations: state.operations,
        }
    }

    fn instances(&self, state: &ClusterState, synchronous: &[InstanceName]) -> Vec<InstanceStatus> {
        let views = self.agents.views();
        let reported = |name: &InstanceName| match &views.get(name)?.contact {
            Contact::Answers(agent) => Some(agent.instance.clone()),
            Contact::Silent { .. } => None,
        };
        let head = state.primary_name().and_then(reported);
        let one = |(name, view): (&InstanceName, &InstanceView)| {
            let now = reported(name);
            let role = match &now {
                Some(InstanceState::Primary { .. }) => "primary",
                Some(InstanceState::Standby { .. }) => "standby",
                _ => "none",
            };
            let lag_bytes = match (&now, &head) {
                (
                    Some(InstanceState::Standby { received, .. }),
                    Some(InstanceState::Primary { position, .. }),
                ) => Some(position.0.saturating_sub(received.0)),
                _ => None,
            };
            InstanceStatus {
                name: name.clone(),
                role: role.to_owned(),
                endpoint: view.endpoint.clone(),
                trouble: (self.agents.trouble(name).map(|t| t.to_string())).or_else(|| {
                    // Commits wait for a synchronous one, so it was there a moment ago.
                    (!synchronous.contains(name))
                        .then(|| self.receives_nothing(state, name, (&now, &head)))?
                }),
                fenced: state.members.get(name).is_some_and(|m| m.fenced),
                synchronous: synchronous.contains(name),
                lag_bytes,
                state: now,
                postmaster_pid: postmaster_pid(&self.layout.instance_data(name)),
            }
        };
        views.iter().map(one).collect()
    }

    /// What a standby that runs without receiving anything says in its log: its disk may be full,
    /// or its primary refuse it.
    fn receives_nothing(
        &self,
        state: &ClusterState,
        name: &InstanceName,
        (standby, primary): (&Option<InstanceState>, &Option<InstanceState>),
    ) -> Option<String> {
        let deaf = matches!(standby, Some(InstanceState::Standby { heard_ms: None, .. }));
        let fed = matches!(primary, Some(InstanceState::Primary { .. }));
        if !deaf || !fed || state.moving().is_some() {
            return None;
        }
        let log = files::tail(&self.agents.config(name)?.log_file(), 10);
        let is_error = |line: &&str| {
            ["FATAL:", "ERROR:", "PANIC:"]
                .iter()
                .any(|w| line.contains(w))
        };
        let why = log
            .lines()
            .rfind(is_error)
            .unwrap_or("its log does not say why");
        Some(format!("it receives nothing from the primary; {why}"))
    }
}

fn is_standby(view: &InstanceView) -> bool {
    matches!(&view.contact, Contact::Answers(agent)
        if matches!(agent.instance, InstanceState::Standby { .. }))
}

/// The postmaster's process id, as its data directory tells.
pub(crate) fn postmaster_pid(data: &Path) -> Option<i32> {
    let text = std::fs::read_to_string(data.join("postmaster.pid")).ok()?;
    text.lines().next()?.trim().parse().ok()
}
