//! `logs`: the containers' output, of several Pods at once with the Pod's name in front.

use futures_util::{AsyncBufReadExt as _, TryStreamExt as _};
use helios_api::v1alpha1::names;
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt as _;
use kube::api::LogParams;

use super::args::LogsArgs;
use super::place::{Place, failure, limited};
use crate::failure::Failure;
use crate::out;

/// Containers whose output is the component's.
const CONTAINERS: [&str; 2] = ["postgres", "proxy"];

/// `kubectl helios logs`.
pub(super) async fn run(place: &Place, args: &LogsArgs) -> Result<(), Failure> {
    let name = &args.cluster.cluster;
    place.cluster(name).await?;
    let component = if args.proxies { "proxy" } else { "instance" };
    let mut pods = place.pods_of(name, component).await?;
    if let Some(instance) = &args.instance {
        pods.retain(|p| {
            p.labels().get(names::INSTANCE).map(String::as_str) == Some(instance.as_str())
        });
        if pods.is_empty() {
            return Err(Failure::failed(format!(
                "there is no Pod of instance \"{instance}\" in cluster {name}"
            )));
        }
    }
    if pods.is_empty() {
        return Err(Failure::failed(format!(
            "cluster {name} has no Pods of that kind"
        )));
    }
    let several = pods.len() > 1;
    let streams = pods.iter().map(|pod| print(place, pod, args, several));
    let results = tokio::select! {
        results = futures_util::future::join_all(streams) => results,
        _ = tokio::signal::ctrl_c() => return Err(Failure::interrupted()),
    };
    let mut failed = None;
    for (pod, result) in pods.iter().zip(results) {
        if let Err(error) = result {
            out::note(&format!("{}: {error}", pod.name_any()));
            failed = Some(error.code());
        }
    }
    failed.map_or(Ok(()), |code| Err(Failure::silent(code)))
}

async fn print(place: &Place, pod: &Pod, args: &LogsArgs, several: bool) -> Result<(), Failure> {
    let name = pod.name_any();
    let mut params = LogParams {
        container: container(pod),
        follow: args.follow,
        previous: args.previous,
        tail_lines: args.tail,
        ..LogParams::default()
    };
    params.timestamps = false;
    let pods = place.pods();
    let prefix = if several {
        format!("{name}: ")
    } else {
        String::new()
    };
    let stream = limited(pods.log_stream(&name, &params)).await?;
    let mut lines = stream.lines();
    while let Some(line) = lines
        .try_next()
        .await
        .map_err(|e| failure(&kube::Error::ReadEvents(e)))?
    {
        out::print(&format!("{prefix}{line}"));
    }
    Ok(())
}

/// The container that matters.
pub(super) fn container(pod: &Pod) -> Option<String> {
    let spec = pod.spec.as_ref()?;
    let known = |c: &&k8s_openapi::api::core::v1::Container| CONTAINERS.contains(&&*c.name);
    spec.containers.iter().find(known).map(|c| c.name.clone())
}
