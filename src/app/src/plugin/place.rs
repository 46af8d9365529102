//! The way to the API server, and what its errors mean to a person.

use std::time::Duration;

use helios_api::v1alpha1::{HeliosCluster, names};
use k8s_openapi::api::core::v1::Pod;
use kube::api::ListParams;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Api, Client, Config};

use super::args::PlaceArgs;
use crate::failure::Failure;

/// How long connecting to the API server may take.
const CONNECT: Duration = Duration::from_secs(10);
/// How long one request may take; longer ones are streams.
const REQUEST: Duration = Duration::from_secs(60);

/// An API server and a namespace on it.
#[derive(Clone)]
pub(super) struct Place {
    pub(super) client: Client,
    pub(super) namespace: String,
}

impl Place {
    /// Reads the kubeconfig. Does not connect.
    pub(super) async fn find(args: &PlaceArgs) -> Result<Self, Failure> {
        let usage = |e: &dyn std::fmt::Display| Failure::usage(e.to_string());
        let options = KubeConfigOptions {
            context: args.context.clone(),
            ..KubeConfigOptions::default()
        };
        let mut config = if let Some(path) = &args.kubeconfig {
            let file = Kubeconfig::read_from(path).map_err(|e| usage(&e))?;
            Config::from_custom_kubeconfig(file, &options)
                .await
                .map_err(|e| usage(&e))?
        } else if args.context.is_some() {
            Config::from_kubeconfig(&options)
                .await
                .map_err(|e| usage(&e))?
        } else {
            Config::infer().await.map_err(|e| {
                Failure::usage(format!("no kubeconfig, and this is no Pod either: {e}"))
            })?
        };
        config.connect_timeout = Some(CONNECT);
        let namespace = args
            .namespace
            .clone()
            .unwrap_or_else(|| config.default_namespace.clone());
        let client = Client::try_from(config).map_err(|e| failure(&e))?;
        Ok(Self { client, namespace })
    }

    /// The clusters of the namespace.
    pub(super) fn clusters(&self) -> Api<HeliosCluster> {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    /// The Pods of the namespace.
    pub(super) fn pods(&self) -> Api<Pod> {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    /// A cluster by its name.
    pub(super) async fn cluster(&self, name: &str) -> Result<HeliosCluster, Failure> {
        limited(self.clusters().get(name)).await
    }

    /// Pods of a cluster with `component` as their label, in the order of their names.
    pub(super) async fn pods_of(
        &self,
        cluster: &str,
        component: &str,
    ) -> Result<Vec<Pod>, Failure> {
        let selector = format!(
            "{}={cluster},{}={component}",
            names::CLUSTER,
            names::COMPONENT
        );
        let list = ListParams::default().labels(&selector);
        let mut pods = limited(self.pods().list(&list)).await?.items;
        pods.sort_by(|a, b| a.metadata.name.cmp(&b.metadata.name));
        Ok(pods)
    }
}

/// A request's result within the limit.
pub(super) async fn limited<T>(
    request: impl Future<Output = Result<T, kube::Error>>,
) -> Result<T, Failure> {
    match tokio::time::timeout(REQUEST, request).await {
        Ok(result) => result.map_err(|e| failure(&e)),
        Err(_) => Err(Failure::unreachable(format!(
            "the API server did not answer within {REQUEST:?}"
        ))),
    }
}

/// What an error of the API server or of the way to it means.
pub(super) fn failure(error: &kube::Error) -> Failure {
    match error {
        kube::Error::Api(status) if status.code == 404 => {
            // An API that is not there has no object to name.
            let named = status.details.as_ref().is_some_and(|d| !d.name.is_empty());
            if named {
                Failure::failed(status.message.clone())
            } else {
                Failure::failed(
                    "the API server knows no HeliosClusters; is the operator's chart installed?",
                )
            }
        }
        kube::Error::Api(status) if status.code == 401 => Failure::failed(
            "the API server does not know you; look at the user of the kubeconfig's context",
        ),
        kube::Error::Api(status) => Failure::failed(status.message.clone()),
        kube::Error::Service(why) => {
            Failure::unreachable(format!("the API server does not answer: {}", chain(&**why)))
        }
        kube::Error::HyperError(why) => {
            Failure::unreachable(format!("the API server does not answer: {}", chain(why)))
        }
        kube::Error::Auth(why) => Failure::failed(format!("could not log in: {}", chain(why))),
        other => Failure::failed(other.to_string()),
    }
}

/// An error with its causes: the outermost often says nothing.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(next) = cause {
        let more = next.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = next.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(code: u16, name: &str, message: &str) -> kube::Error {
        let status = serde_json::json!({
            "status": "Failure", "code": code, "message": message, "reason": "",
            "details": {"name": name, "kind": "heliosclusters"},
        });
        kube::Error::Api(Box::new(serde_json::from_value(status).unwrap()))
    }

    #[test]
    fn an_object_that_is_missing_is_told_from_a_definition_that_is() {
        let object = failure(&status(404, "pg", "heliosclusters \"pg\" not found"));
        assert_eq!(object.message(), "heliosclusters \"pg\" not found");
        let definition = failure(&status(404, "", "404 page not found"));
        assert!(definition.message().contains("chart"), "{definition}");
        assert_eq!((object.code(), definition.code()), (1, 1));
    }

    #[tokio::test]
    async fn a_server_that_is_not_there_has_a_status_of_its_own() {
        let config = Config::new("http://127.0.0.1:1".parse().unwrap());
        let place = Place {
            client: Client::try_from(config).unwrap(),
            namespace: "default".to_owned(),
        };
        let error = place.cluster("pg").await.unwrap_err();
        assert_eq!(error.code(), 3, "{error}");
        assert!(error.message().contains("does not answer"), "{error}");
    }

    #[tokio::test]
    async fn a_context_that_is_not_there_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config");
        std::fs::write(
            &path,
            "apiVersion: v1\nkind: Config\ncurrent-context: here\n",
        )
        .unwrap();
        let args = PlaceArgs {
            kubeconfig: Some(path),
            context: Some("elsewhere".to_owned()),
            ..PlaceArgs::default()
        };
        let Err(error) = Place::find(&args).await else {
            panic!("it was found");
        };
        assert_eq!(error.code(), 2);
        assert!(error.message().contains("elsewhere"), "{error}");
    }
}
