//! Labels, annotations and the names of what belongs to a cluster, written down once.

/// API group of the custom resources.
pub const GROUP: &str = "heliosdb.io";
/// Field manager of everything that the operator applies.
pub const FIELD_MANAGER: &str = "helios-operator";

/// Asks for a switchover: `auto`, or an instance's name. Removed once the request is durable.
pub const SWITCHOVER: &str = "heliosdb.io/switchover";
/// Names of instances that are to be stopped and to stay so, with commas in between; or `*`.
pub const FENCED: &str = "heliosdb.io/fenced";
/// `paused`: the operator changes nothing about the cluster.
pub const RECONCILE: &str = "heliosdb.io/reconcile";
/// `certificates`: every certificate is renewed now; `authority`: so is what issues them. Removed
/// once it is done.
pub const RENEW: &str = "heliosdb.io/renew-certificates";

/// Label: name of the cluster.
pub const CLUSTER: &str = "heliosdb.io/cluster";
/// Label of instances' Pods: name of the instance.
pub const INSTANCE: &str = "heliosdb.io/instance";
/// Label of instances' Pods: `primary` or `replica`.
pub const ROLE: &str = "heliosdb.io/role";
/// Label: `instance` or `proxy`.
pub const COMPONENT: &str = "heliosdb.io/component";
/// Annotation of instances' Pods: what of the spec they were built from. A Pod with another one is
/// replaced; what operator it was built by does not count.
pub const TEMPLATE: &str = "heliosdb.io/template";
/// Annotation of a Pod template: what it was built from, so that a change restarts it.
pub const CONFIG_HASH: &str = "heliosdb.io/config-hash";
/// Annotation of Pods: their program reads its certificates again when these are renewed. Those of
/// an earlier operator do not.
pub const RELOADS: &str = "heliosdb.io/reloads-certificates";

/// Superuser that agents, proxies and operator log in with.
pub const SERVICE_USER: &str = "helios";

/// Port of PostgreSQL and of the proxy.
pub const POSTGRES_PORT: u16 = 5432;
/// Port of the control API of agents and proxies (mutual TLS).
pub const CONTROL_PORT: u16 = 8443;
/// Port of a proxy's loopback interface that sessions are shown on (`kubectl helios sessions`
/// forwards it); nothing can be commanded there.
pub const INSPECT_PORT: u16 = 9188;
/// Port of probes and metrics.
pub const HTTP_PORT: u16 = 9187;

/// Name in the operator's client certificate; nobody else may command agents and proxies.
pub const OPERATOR_IDENTITY: &str = "operator.helios";
/// Name in the certificates of proxies.
pub const PROXY_IDENTITY: &str = "proxy.helios";

/// Name of instance number `number`, counted from 1.
#[must_use]
pub fn instance(cluster: &str, number: i32) -> String {
    format!("{cluster}-{number}")
}

/// Name of the claim of an instance's volume for its write-ahead log; that of its data has the
/// instance's name.
#[must_use]
pub fn wal_volume(instance: &str) -> String {
    format!("{instance}-wal")
}

/// Name of the proxies' Deployment.
#[must_use]
pub fn proxy(cluster: &str) -> String {
    format!("{cluster}-proxy")
}

/// Name of the Service in front of the primary.
#[must_use]
pub fn primary_service(cluster: &str) -> String {
    format!("{cluster}-primary")
}

/// Name of the Service in front of the standbys.
#[must_use]
pub fn replicas_service(cluster: &str) -> String {
    format!("{cluster}-replicas")
}

/// Name of the Secret for applications.
#[must_use]
pub fn app_secret(cluster: &str) -> String {
    format!("{cluster}-app")
}

/// Name of the Secret with the service user's password.
#[must_use]
pub fn service_secret(cluster: &str) -> String {
    format!("{cluster}-service")
}

/// Name of the Secret with the cluster's certificate authority.
#[must_use]
pub fn ca_secret(cluster: &str) -> String {
    format!("{cluster}-ca")
}

/// Name of the Secret with the certificate of an instance, of the proxies or of the operator.
#[must_use]
pub fn tls_secret(owner: &str) -> String {
    format!("{owner}-tls")
}

/// Name of the Secret with the operator's certificate for one cluster.
#[must_use]
pub fn operator_tls_secret(cluster: &str) -> String {
    tls_secret(&format!("{cluster}-operator"))
}
