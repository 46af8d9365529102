//! From the object to what exists for it, in steps: dereference, validate, build, apply; then the
//! cluster's conductor is told.
//!
//! Invariant: an object that is wrong changes nothing but its own conditions.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use helios_api::v1alpha1::unknown;
use helios_api::v1alpha1::valid::{Invalid, ValidCluster};
use helios_api::v1alpha1::{ConditionType, HeliosCluster, names};
use k8s_openapi::api::apps::v1::{Deployment, StatefulSet};
use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::api::{DynamicObject, Patch, PatchParams};
use kube::core::GroupVersion;
use kube::runtime::controller::{Action, Controller};
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use kube::runtime::reflector::{self, ObjectRef, Store};
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Api, Client, Resource as _, ResourceExt as _};
use tokio_util::sync::CancellationToken;

use crate::build::{self, Built, Offers};
use crate::conductor::{self, Handle, Input, Verdict};
use crate::metrics::Metrics;
use crate::{OperatorError, Options, renewing, volumes};

/// What exists for a cluster is compared with what should so often, if its spec has not changed:
/// the status changes with every step of a move, and that is no time for twenty requests.
const AGAIN: Duration = Duration::from_secs(30);
/// One that could not be dealt with, after so long: doubled up to the longest.
const FIRST_RETRY: Duration = Duration::from_millis(500);
const LONGEST_RETRY: Duration = Duration::from_secs(60);

/// Namespace and name.
type Key = (String, String);
/// Identity and generation.
type Spec = (Option<String>, Option<i64>);

/// What all reconciliations share.
pub(crate) struct World {
    pub(crate) client: Client,
    pub(crate) options: Options,
    pub(crate) recorder: Recorder,
    pub(crate) pods: Store<Pod>,
    pub(crate) metrics: Metrics,
    offers: Offers,
    conductors: Mutex<HashMap<Key, Handle>>,
    failures: Mutex<HashMap<Key, u32>>,
    /// Which spec (by the object's identity and generation) was applied, and until when that is
    /// enough.
    applied: Mutex<HashMap<Key, (Spec, Instant)>>,
    /// Cancelled when this process may not go on.
    pub(crate) fatal: CancellationToken,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn api<K>(client: &Client, namespace: Option<&str>) -> Api<K>
where
    K: kube::Resource<Scope = k8s_openapi::NamespaceResourceScope>,
    K::DynamicType: Default,
{
    match namespace {
        Some(name) => Api::namespaced(client.clone(), name),
        None => Api::all(client.clone()),
    }
}

/// Works until cancelled, or until it may not any more.
pub(crate) async fn run(
    client: Client,
    options: Options,
    metrics: Metrics,
    stop: CancellationToken,
) -> Result<(), OperatorError> {
    let reporter = Reporter {
        controller: names::FIELD_MANAGER.to_owned(),
        instance: Some(options.identity.clone()),
    };
    let (pods, writer) = reflector::store();
    let namespace = options.namespace.clone();
    let namespace = namespace.as_deref();
    let world = Arc::new(World {
        recorder: Recorder::new(client.clone(), reporter),
        offers: offers(&client).await?,
        client: client.clone(),
        options,
        pods,
        metrics,
        conductors: Mutex::default(),
        failures: Mutex::default(),
        applied: Mutex::default(),
        fatal: CancellationToken::new(),
    });
    let ours = watcher::Config::default().labels(names::CLUSTER);
    let follow = follow_pods(
        Arc::clone(&world),
        writer,
        api::<Pod>(&client, namespace),
        ours.clone(),
    );
    let controller = Controller::new(
        api::<HeliosCluster>(&client, namespace),
        watcher::Config::default(),
    )
    .owns(api::<StatefulSet>(&client, namespace), ours.clone())
    .owns(api::<Deployment>(&client, namespace), ours)
    .run(reconcile, retry, Arc::clone(&world))
    .for_each(|_| async {});
    let result = tokio::select! {
        () = controller => Ok(()),
        () = follow => Ok(()),
        () = stop.cancelled() => Ok(()),
        () = world.fatal.cancelled() => Err(OperatorError::LeaseLost),
    };
    for handle in lock(&world.conductors).values() {
        handle.stop.cancel();
    }
    result
}

/// What the API server offers of what is wanted.
async fn offers(client: &Client) -> Result<Offers, OperatorError> {
    for version in ["v1", "v1beta1"] {
        let group = GroupVersion::gv("policy", version);
        match kube::discovery::pinned_group(client, &group).await {
            Ok(found) if found.recommended_kind("PodDisruptionBudget").is_some() => {
                return Ok(Offers {
                    budgets: Some(version),
                });
            }
            Ok(_) => {}
            Err(kube::Error::Api(status)) if status.code == 404 => {}
            Err(kube::Error::Discovery(_)) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(Offers { budgets: None })
}

/// Keeps the store of Pods, and wakes the conductor of a cluster whose Pod has changed.
async fn follow_pods(
    world: Arc<World>,
    writer: reflector::store::Writer<Pod>,
    pods: Api<Pod>,
    config: watcher::Config,
) {
    let stream = watcher(pods, config)
        .default_backoff()
        .reflect(writer)
        .touched_objects();
    let mut stream = std::pin::pin!(stream);
    while let Some(event) = stream.next().await {
        match event {
            Ok(pod) => {
                let cluster = pod.labels().get(names::CLUSTER).cloned();
                let key = (
                    pod.namespace().unwrap_or_default(),
                    cluster.unwrap_or_default(),
                );
                if let Some(handle) = lock(&world.conductors).get(&key) {
                    handle.poke.notify_one();
                }
            }
            Err(error) => tracing::warn!(%error, "watch of Pods failed"),
        }
    }
}

fn key(cluster: &HeliosCluster) -> Key {
    (cluster.namespace().unwrap_or_default(), cluster.name_any())
}

fn retry(cluster: Arc<HeliosCluster>, error: &OperatorError, world: Arc<World>) -> Action {
    tracing::warn!(cluster = cluster.name_any(), %error, "reconciliation failed");
    let (namespace, name) = key(&cluster);
    world.metrics.failed((&namespace, &name));
    let mut failures = lock(&world.failures);
    let count = failures.entry(key(&cluster)).or_default();
    *count = count.saturating_add(1).min(16);
    let pause = FIRST_RETRY.saturating_mul(1 << count.saturating_sub(1));
    Action::requeue(pause.min(LONGEST_RETRY))
}

async fn reconcile(
    cluster: Arc<HeliosCluster>,
    world: Arc<World>,
) -> Result<Action, OperatorError> {
    let key = key(&cluster);
    if cluster.metadata.deletion_timestamp.is_some() {
        if let Some(handle) = lock(&world.conductors).remove(&key) {
            handle.stop.cancel();
        }
        lock(&world.applied).remove(&key);
        return Ok(Action::await_change());
    }
    let paused = cluster
        .annotations()
        .get(names::RECONCILE)
        .is_some_and(|v| v == "paused");
    let spec = (cluster.uid(), cluster.metadata.generation);
    let fresh = lock(&world.applied)
        .get(&key)
        .is_some_and(|(of, until)| *of == spec && Instant::now() < *until);
    let asked = cluster.annotations().contains_key(names::RENEW);
    let mut again = AGAIN;
    if !paused && (!fresh || asked) {
        match prepare(&cluster, &world).await {
            Ok((input, due)) => {
                hand_over(&world, &key, input);
                again = again.min(due);
                lock(&world.applied).insert(key.clone(), (spec, Instant::now() + again));
            }
            Err(OperatorError::Invalid(invalid)) => {
                refuse(&cluster, &world, &key, &invalid).await?;
            }
            Err(error) => return Err(error),
        }
    }
    if let Some(handle) = lock(&world.conductors).get(&key) {
        let request = cluster.annotations().get(names::SWITCHOVER).cloned();
        let fenced = cluster.annotations().get(names::FENCED).cloned();
        handle.request(request, fenced, paused);
    }
    lock(&world.failures).remove(&key);
    Ok(Action::requeue(again))
}

/// The four steps up to what the conductor needs; and in how long something is due.
async fn prepare(
    cluster: &HeliosCluster,
    world: &World,
) -> Result<(Input, Duration), OperatorError> {
    let valid = ValidCluster::new(cluster)?;
    build::check(&valid)?;
    let mut claims =
        dereference(&valid, cluster.metadata.creation_timestamp.as_ref(), world).await?;
    let renewing::Kept {
        secrets,
        verdict: certificates,
        again,
    } = renewing::keep(cluster, &valid, world).await?;
    let objects = build::objects(&valid, &world.options.image, world.offers)?;
    for object in objects {
        let applied = apply(&world.client, &valid.namespace, &object).await;
        claims.note(&object, applied)?;
    }
    let budgets = match world.offers.budgets {
        Some(_) => Verdict::good(
            ConditionType::ApisAvailable,
            "AllAvailable",
            "the API server offers everything that is used",
        ),
        None => Verdict::bad(
            ConditionType::ApisAvailable,
            "NoPodDisruptionBudgets",
            "the API server offers no PodDisruptionBudgets; nothing limits evictions",
        ),
    };
    let unknown = unknown::fields(cluster);
    let spec = match unknown.is_empty() {
        true => Verdict::good(
            ConditionType::Valid,
            "Valid",
            "every field can be used as it is",
        ),
        // The API server has dropped them: what is left is valid.
        false => Verdict::good(
            ConditionType::Valid,
            "UnknownFields",
            &format!("what is known is used; {}", unknown.join("; ")),
        ),
    };
    let input = Input {
        verdicts: vec![spec, budgets, volumes::verdict(&claims), certificates],
        kept: claims.kept().clone(),
        template: build::template(&valid),
        server: build::server_settings(&valid),
        cluster: valid,
        secrets: Arc::new(secrets),
        request: cluster.annotations().get(names::SWITCHOVER).cloned(),
        paused: false,
        fenced: cluster.annotations().get(names::FENCED).cloned(),
    };
    Ok((input, again))
}

/// Looks at what is there already and may not be changed.
async fn dereference(
    valid: &ValidCluster,
    created: Option<&Time>,
    world: &World,
) -> Result<volumes::Claims, OperatorError> {
    let mut claims = volumes::Claims::default();
    let api: Api<PersistentVolumeClaim> = Api::namespaced(world.client.clone(), &valid.namespace);
    for instance in &valid.instances {
        let log = names::wal_volume(instance.as_str());
        let there = (
            api.get_opt(instance.as_str()).await?,
            api.get_opt(&log).await?,
        );
        let both = (there.0.is_some(), there.1.is_some());
        volumes::check_log(instance.as_str(), both, valid.spec.wal_storage.is_some())?;
        if let Some(data) = &there.0 {
            claims.date(instance, data, created);
        }
        for wanted in build::claims(valid, instance) {
            let is_log = wanted.name == log;
            let Some(volume) = (if is_log { &there.1 } else { &there.0 }) else {
                continue;
            };
            claims.look(&wanted.name, volume);
            volumes::check(&wanted, volume)?;
        }
    }
    Ok(claims)
}

/// Server-side apply: only what the operator says is changed, and taken back when it no longer
/// says it.
async fn apply(client: &Client, namespace: &str, object: &Built) -> Result<(), OperatorError> {
    let api: Api<DynamicObject> = Api::namespaced_with(client.clone(), namespace, &object.resource);
    let params = PatchParams::apply(names::FIELD_MANAGER).force();
    api.patch(&object.name, &params, &Patch::Apply(&object.body))
        .await?;
    Ok(())
}

/// Tells the cluster's conductor, or starts one.
fn hand_over(world: &Arc<World>, key: &Key, input: Input) {
    let mut conductors = lock(&world.conductors);
    if let Some(handle) = conductors.get(key) {
        if handle.uid == input.cluster.uid && !handle.stop.is_cancelled() {
            handle.change(input);
            return;
        }
        handle.stop.cancel();
    }
    conductors.insert(key.clone(), conductor::start(Arc::clone(world), input));
}

/// Says what is wrong, in a condition and in an Event. What runs goes on as it is.
async fn refuse(
    cluster: &HeliosCluster,
    world: &World,
    key: &Key,
    invalid: &Invalid,
) -> Result<(), OperatorError> {
    let verdict = Verdict::bad(ConditionType::Valid, "Invalid", &invalid.to_string());
    let known = lock(&world.conductors)
        .get(key)
        .map(|h| h.verdict(&verdict));
    let new = match known {
        Some(new) => new,
        None => conductor::report_invalid(&world.client, cluster, &verdict).await?,
    };
    if new {
        let event = Event {
            type_: EventType::Warning,
            reason: "Invalid".to_owned(),
            note: Some(invalid.to_string()),
            action: "Validate".to_owned(),
            secondary: None,
        };
        world
            .recorder
            .publish(&event, &cluster.object_ref(&()))
            .await?;
    }
    Ok(())
}

impl World {
    /// The Pods of one cluster.
    pub(crate) fn pods_of(&self, namespace: &str, cluster: &str) -> Vec<Arc<Pod>> {
        self.pods
            .state()
            .into_iter()
            .filter(|pod| {
                pod.namespace().as_deref() == Some(namespace)
                    && pod.labels().get(names::CLUSTER).map(String::as_str) == Some(cluster)
            })
            .collect()
    }

    /// Publishes an Event about a cluster; failing to is no reason to stop.
    pub(crate) async fn event(&self, cluster: &ValidCluster, event: Event) {
        let mut reference =
            ObjectRef::<HeliosCluster>::new(&cluster.name).within(&cluster.namespace);
        reference.extra.uid = Some(cluster.uid.clone());
        if let Err(error) = self.recorder.publish(&event, &reference.into()).await {
            tracing::debug!(%error, "event was not published");
        }
    }
}

#[cfg(test)]
#[path = "reconcile_tests.rs"]
pub(crate) mod tests;
