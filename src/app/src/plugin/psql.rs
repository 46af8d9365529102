//! `psql`: this machine's own psql through a forwarded port, with what the application's Secret
//! says. The password is in psql's environment, not on a command line.

use std::os::unix::process::ExitStatusExt as _;

use helios_api::v1alpha1::names;
use k8s_openapi::api::core::v1::Secret;
use kube::{Api, ResourceExt as _};

use super::args::ConnectArgs;
use super::forward;
use super::place::{Place, limited};
use crate::failure::Failure;
use crate::out;

/// `kubectl helios psql`.
pub(super) async fn run(place: &Place, args: &ConnectArgs) -> Result<(), Failure> {
    let name = &args.cluster.cluster;
    place.cluster(name).await?;
    let secrets: Api<Secret> = Api::namespaced(place.client.clone(), &place.namespace);
    let secret = limited(secrets.get(&names::app_secret(name))).await?;
    let value = |key: &str| value(&secret, key);
    let pods = place.pods_of(name, "proxy").await?;
    let Some(pod) = pods.iter().find(|p| forward::is_ready(p)) else {
        return Err(Failure::failed(format!(
            "no proxy of cluster {name} is ready"
        )));
    };
    let local = forward::listen(place, pod, names::POSTGRES_PORT).await?;
    let mut command = tokio::process::Command::new("psql");
    command
        .args(&args.args)
        .env("PGHOST", local.address.ip().to_string())
        .env("PGPORT", local.address.port().to_string())
        .env("PGUSER", value("username")?)
        .env("PGPASSWORD", value("password")?)
        .env("PGDATABASE", value("dbname")?)
        .env("PGSSLMODE", "require");
    // Ctrl-C is psql's: it cancels a statement there.
    let mut interrupts = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::interrupt())
        .map_err(|e| Failure::failed(format!("could not listen for signals: {e}")))?;
    let mut child = command.spawn().map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => {
            Failure::failed("psql is not on this machine (Debian: postgresql-client)")
        }
        _ => Failure::failed(format!("could not start psql: {e}")),
    })?;
    let status = loop {
        tokio::select! {
            status = child.wait() => break status,
            _ = interrupts.recv() => {}
        }
    };
    let status = status.map_err(|e| Failure::failed(format!("psql: {e}")))?;
    if status.success() {
        return Ok(());
    }
    if let Some(signal) = status.signal() {
        out::note(&format!("psql was ended by signal {signal}"));
    }
    let code = status.code().and_then(|c| u8::try_from(c).ok());
    Err(Failure::silent(code.unwrap_or(1)))
}

fn value(secret: &Secret, key: &str) -> Result<String, Failure> {
    let data = secret.data.as_ref().and_then(|d| d.get(key));
    data.and_then(|v| String::from_utf8(v.0.clone()).ok())
        .ok_or_else(|| Failure::failed(format!("Secret {} has no \"{key}\"", secret.name_any())))
}
