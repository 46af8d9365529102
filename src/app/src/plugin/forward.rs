//! Connections into a Pod through the API server, which asks for `pods/portforward`.

use std::net::SocketAddr;
use std::time::Duration;

use hyper::Method;
use k8s_openapi::api::core::v1::Pod;
use kube::{Api, ResourceExt as _};
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncWrite, copy_bidirectional};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

use super::place::{Place, limited};
use crate::failure::Failure;
use crate::out;

/// How long a proxy's answer may take.
const ANSWER: Duration = Duration::from_secs(20);
/// Connections that are forwarded at a time; psql makes one, and another to cancel.
const CONNECTIONS: usize = 64;

/// Whether a Pod runs, and is not on its way out.
pub(super) fn runs(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|s| s.phase.as_deref());
    phase == Some("Running") && pod.metadata.deletion_timestamp.is_none()
}

/// Whether a Pod is sent clients to.
pub(super) fn is_ready(pod: &Pod) -> bool {
    let conditions = pod
        .status
        .iter()
        .flat_map(|s| s.conditions.iter().flatten());
    let ready = conditions
        .into_iter()
        .any(|c| c.type_ == "Ready" && c.status == "True");
    ready && runs(pod)
}

/// A connection to a port of a Pod's loopback interface.
async fn open(
    pods: &Api<Pod>,
    pod: &str,
    port: u16,
) -> Result<impl AsyncRead + AsyncWrite + Unpin + Send + 'static, Failure> {
    let mut forwarder = limited(pods.portforward(pod, &[port])).await?;
    forwarder
        .take_stream(port)
        .ok_or_else(|| Failure::failed(format!("port {port} of Pod {pod} cannot be forwarded")))
}

/// Asks a proxy for something that it shows on its loopback interface.
pub(super) async fn get<T: DeserializeOwned>(
    place: &Place,
    pod: &Pod,
    port: u16,
    path: &str,
) -> Result<T, Failure> {
    let name = pod.name_any();
    let stream = open(&place.pods(), &name, port).await?;
    let failed = |why: &dyn std::fmt::Display| Failure::failed(format!("Pod {name}: {why}"));
    let asked = helios_control::http::exchange(stream, Method::GET, path, Vec::new());
    let (status, body) = tokio::time::timeout(ANSWER, asked)
        .await
        .map_err(|_| failed(&format!("no answer within {ANSWER:?}")))?
        .map_err(|why| failed(&why))?;
    if !status.is_success() {
        return Err(failed(&format!("status {status}")));
    }
    serde_json::from_slice(&body).map_err(|e| failed(&e))
}

/// A port of this machine that leads to a port of a Pod, for as long as this lives.
pub(super) struct Local {
    pub(super) address: SocketAddr,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Local {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Listens on a free port of the loopback interface.
pub(super) async fn listen(place: &Place, pod: &Pod, port: u16) -> Result<Local, Failure> {
    let failed = |e| Failure::failed(format!("could not listen on 127.0.0.1: {e}"));
    let listener = TcpListener::bind("127.0.0.1:0").await.map_err(failed)?;
    let address = listener.local_addr().map_err(failed)?;
    let (pods, name) = (place.pods(), pod.name_any());
    let task = tokio::spawn(async move {
        let room = std::sync::Arc::new(Semaphore::new(CONNECTIONS));
        while let Ok(permit) = std::sync::Arc::clone(&room).acquire_owned().await {
            let Ok((mut near, _)) = listener.accept().await else {
                return;
            };
            let (pods, name) = (pods.clone(), name.clone());
            tokio::spawn(async move {
                let _permit = permit;
                match open(&pods, &name, port).await {
                    // Either side may end it at any time; psql says what it makes of that.
                    Ok(mut far) => drop(copy_bidirectional(&mut near, &mut far).await),
                    Err(error) => out::note(&error.to_string()),
                }
            });
        }
    });
    Ok(Local { address, task })
}
