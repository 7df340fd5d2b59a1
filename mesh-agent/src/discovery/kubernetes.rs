//! The Kubernetes API as a source: each kind is listed and watched, and what is heard is gathered until it is quiet.
//!
//! Nothing is published before every kind has been listed once: half a mesh could be one without its policies. A kind
//! whose CustomResourceDefinition is not installed has no objects. When the API server is away, everything stays as it
//! was; a Problem says so, and goes when it answers again.

use std::collections::BTreeMap;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use serde_json::Value;

use super::hints::{self, Held, Hint};
use super::of_source;
use crate::api_server::{ApiError, ApiServer, Change, Kind, watch};
use crate::model::{Problem, Severity};
use crate::translate::{Object, Settings};

/// A change is translated when nothing more was heard for this long: a Deployment's pods change together.
const QUIET: Duration = Duration::from_millis(20);
/// But not later than this after the first of them.
const PATIENCE: Duration = Duration::from_millis(200);
/// A failure that was not followed by another for this long is over: failures come at least every 5 s, and may take 10.
const FORGIVEN: Duration = Duration::from_secs(20);
/// How often a failure is looked at that may be over.
const TICK: Duration = Duration::from_secs(1);

/// The annotation that this agent writes, and compares with what it should be.
const SHOWN: &str = "nodemesh.io/status";

/// What is read from the API. Of each group the version that all releases of the last years serve.
const KINDS: &[Kind] = &[
    Kind::NAMESPACE,
    Kind::NODE,
    Kind::POD,
    Kind::RUNTIME_CLASS,
    Kind::SERVICE,
    Kind::ENDPOINT_SLICE,
    Kind::PEER_AUTHENTICATION,
    Kind::AUTHORIZATION_POLICY,
];

/// Where pods are in `KINDS`.
const POD: usize = 2;

/// What the discovery thread is told.
#[derive(Debug)]
pub(super) enum Word {
    /// Something of the kind with this index.
    Changed(usize, Change),
    Hint(Hint),
    /// Other settings, and what is wrong with those that their source has now.
    Settings(Box<Settings>, Vec<Problem>),
}

/// Starts to watch; what is heard goes to `heard` until its other end is gone.
pub(super) fn listen(server: &ApiServer, heard: &mpsc::Sender<Word>) {
    for (index, kind) in KINDS.iter().enumerate() {
        let mut changes = Box::pin(watch(server, kind, None, ""));
        let heard = heard.clone();
        tokio::spawn(async move {
            while let Some(change) = changes.next().await {
                if heard.send(Word::Changed(index, change)).is_err() {
                    return;
                }
            }
        });
    }
}

/// All objects as the API server last gave them.
pub(super) struct Cluster {
    url: String,
    kinds: Vec<Listed>,
    settings: Option<(Settings, Vec<Problem>)>,
    hints: Held,
}

#[derive(Default)]
struct Listed {
    objects: BTreeMap<(String, String), Object>,
    /// A list that is being read; it counts when it is whole.
    next: Option<BTreeMap<(String, String), Object>>,
    /// Whether a list was whole once, or there is no such kind.
    known: bool,
    failure: Option<(Instant, ApiError)>,
}

impl Cluster {
    pub fn new(url: &str) -> Self {
        let kinds = KINDS.iter().map(|_| Listed::default()).collect();
        Self { url: url.to_owned(), kinds, settings: None, hints: Held::default() }
    }

    /// Waits for changes and takes them; says whether anything may have changed, or `None` at the end.
    pub fn wait(&mut self, heard: &mpsc::Receiver<Word>) -> Option<bool> {
        let mut changed = match heard.recv_timeout(TICK) {
            Ok(first) => self.hear(first),
            Err(RecvTimeoutError::Timeout) => return Some(self.forgive()),
            Err(RecvTimeoutError::Disconnected) => return None,
        };
        let start = Instant::now();
        loop {
            let left = PATIENCE.saturating_sub(start.elapsed()).min(QUIET);
            match heard.recv_timeout(left) {
                Ok(more) => changed |= self.hear(more),
                // A list that is being read is waited for, unless it takes long.
                Err(RecvTimeoutError::Timeout) => return Some(changed),
                Err(RecvTimeoutError::Disconnected) => return None,
            }
            if start.elapsed() > PATIENCE {
                return Some(changed);
            }
        }
    }

    /// Settings that have come since the last call.
    pub fn new_settings(&mut self) -> Option<(Settings, Vec<Problem>)> {
        self.settings.take()
    }

    fn hear(&mut self, word: Word) -> bool {
        match word {
            Word::Changed(index, change) => self.change(index, change),
            Word::Settings(settings, problems) => {
                self.settings = Some((*settings, problems));
                true
            }
            Word::Hint(hint) => self.take_hint(hint),
        }
    }

    fn take_hint(&mut self, hint: Hint) -> bool {
        let listed = &mut self.kinds[POD];
        let known = |pods: &BTreeMap<(String, String), Object>, namespace: String, name: String, uid: &str| {
            pods.get(&(namespace, name)).filter(|pod| hints::uid(pod.value()) == uid).map(|pod| pod.value().clone())
        };
        let pod = match hint {
            Hint::Addresses { namespace, name, uid, addresses } => {
                let known = known(&listed.objects, namespace, name, &uid);
                if !self.hints.add(uid, &addresses, known.as_ref()) {
                    return false;
                }
                known.map(|mut pod| {
                    self.hints.adorn(&mut pod);
                    pod
                })
            }
            Hint::Withdrawn { namespace, name, uid, addresses } => {
                let before = self.hints.withdraw(&uid, &addresses);
                before.zip(known(&listed.objects, namespace, name, &uid)).map(|(before, mut pod)| {
                    hints::set(&mut pod, &before);
                    pod
                })
            }
            // Where there is no hint any more, the pod has gone meanwhile.
            Hint::Found(mut pod) if self.hints.has(hints::uid(&pod)) => {
                self.hints.adorn(&mut pod);
                let is_new = object(pod.clone()).is_some_and(|(key, _)| !listed.objects.contains_key(&key));
                is_new.then_some(pod)
            }
            Hint::Found(_) => None,
        };
        let Some((key, object)) = pod.and_then(object) else { return false };
        listed.objects.insert(key, object);
        listed.known
    }

    fn change(&mut self, index: usize, mut change: Change) -> bool {
        match &mut change {
            Change::Listed(pod) | Change::Applied(pod) if index == POD => self.hints.adorn(pod),
            Change::Deleted(pod) if index == POD => self.hints.forget(hints::uid(pod)),
            _ => {}
        }
        let listed = &mut self.kinds[index];
        if !matches!(change, Change::Failed(_)) {
            listed.failure = None;
        }
        match change {
            Change::Begin => listed.next = Some(BTreeMap::new()),
            Change::Listed(value) => {
                if let Some((key, object)) = object(value) {
                    // An object that was known and has not changed keeps its value, so that it is not translated again.
                    let object =
                        listed.objects.get(&key).filter(|o| same_version(o, &object)).cloned().unwrap_or(object);
                    listed.next.get_or_insert_default().insert(key, object);
                }
            }
            Change::Complete => {
                if let Some(next) = listed.next.take() {
                    listed.objects = next;
                }
                listed.known = true;
                return true;
            }
            Change::Applied(value) => {
                if let Some((key, object)) = object(value) {
                    listed.objects.insert(key, object);
                    return listed.known;
                }
            }
            Change::Deleted(value) => {
                if let Some((key, _)) = object(value) {
                    listed.objects.remove(&key);
                    return listed.known;
                }
            }
            // The list or watch of a kind that is not installed.
            Change::Failed(ApiError::NotFound { .. }) => {
                let gone = !std::mem::take(&mut listed.objects).is_empty();
                (listed.next, listed.failure) = (None, None);
                return !std::mem::replace(&mut listed.known, true) || gone;
            }
            Change::Failed(error) => {
                let new = listed.failure.is_none();
                if new {
                    tracing::debug!("{error}");
                }
                listed.failure = Some((Instant::now(), error));
                return new;
            }
        }
        false
    }

    /// Forgets failures that are over; says whether there was one.
    fn forgive(&mut self) -> bool {
        let mut changed = false;
        for listed in &mut self.kinds {
            if listed.failure.as_ref().is_some_and(|(at, _)| at.elapsed() > FORGIVEN) {
                listed.failure = None;
                changed = true;
            }
        }
        changed
    }

    /// Whether every kind has been listed.
    pub fn is_known(&self) -> bool {
        self.kinds.iter().all(|listed| listed.known)
    }

    pub fn objects(&self) -> Vec<Object> {
        self.kinds.iter().flat_map(|listed| listed.objects.values().cloned()).collect()
    }

    /// Each thing that goes wrong, once.
    pub fn problems(&self) -> Vec<Problem> {
        let mut problems = Vec::new();
        let mut away = None;
        for (listed, kind) in self.kinds.iter().zip(KINDS) {
            let Some((_, error)) = &listed.failure else { continue };
            if error.is_temporary() {
                away = Some(error);
                continue;
            }
            let outcome = if listed.known { "what was known stays in force" } else { "the mesh waits for it" };
            let message = format!("{} cannot be read: {error}; {outcome}", kind.plural);
            problems.push(of_source(self.url.clone(), Severity::Warning, message));
        }
        if let Some(error) = away {
            let outcome = match self.is_known() {
                true => "the mesh runs on with what it knows, and catches up by itself",
                false => "pods that were in the mesh stay closed until it answers",
            };
            problems.push(of_source(self.url.clone(), Severity::Warning, format!("{error}; {outcome}")));
        }
        problems
    }
}

fn same_version(known: &Object, new: &Object) -> bool {
    let version =
        |o: &Object| o.value().pointer("/metadata/resourceVersion").and_then(Value::as_str).map(str::to_owned);
    version(known).is_some_and(|v| version(new) == Some(v))
}

/// `None` for what is no object, which the API server does not give.
fn object(mut value: Value) -> Option<((String, String), Object)> {
    trim(&mut value);
    let object = Object::from_value("", value).ok()?.into_iter().next()?;
    let reference = object.reference();
    Some(((reference.namespace.clone(), reference.name.clone()), object))
}

/// Takes away what nobody reads and is large.
fn trim(value: &mut Value) {
    let mut drop = |at: &str, keys: &[&str]| {
        if let Some(Value::Object(map)) = value.pointer_mut(at) {
            map.retain(|key, _| !keys.contains(&key.as_str()));
        }
    };
    drop("/metadata", &["managedFields", "finalizers", "selfLink", "generateName"]);
    let is_pod = value.get("kind").and_then(Value::as_str) == Some("Pod");
    if let Some(Value::Object(annotations)) = value.pointer_mut("/metadata/annotations") {
        annotations.retain(|key, _| is_pod && key == SHOWN);
    }
    match value.get("kind").and_then(Value::as_str) {
        Some("Pod") => {
            let keep = |value: &mut Value, at: &str, keys: &[&str]| {
                if let Some(Value::Object(map)) = value.pointer_mut(at) {
                    map.retain(|key, _| keys.contains(&key.as_str()));
                }
            };
            let spec = ["nodeName", "serviceAccountName", "serviceAccount", "hostNetwork", "runtimeClassName"];
            keep(value, "/spec", &[&spec[..], &["containers"]].concat());
            keep(value, "/status", &["phase", "podIP", "podIPs", "conditions"]);
            if let Some(Value::Array(containers)) = value.pointer_mut("/spec/containers") {
                for container in containers {
                    if let Value::Object(map) = container {
                        map.retain(|key, _| key == "ports");
                    }
                }
            }
        }
        Some("Node") => {
            if let Value::Object(map) = value {
                map.remove("spec");
                map.remove("status");
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pod(name: &str, version: &str) -> Value {
        json!({"apiVersion": "v1", "kind": "Pod", "metadata": {
            "name": name, "namespace": "shop", "resourceVersion": version, "managedFields": [{"manager": "x"}],
            "annotations": {"nodemesh.io/netns": "/run/netns/other"}},
            "spec": {"nodeName": "n1", "containers": [{"name": "c", "env": [{"name": "SECRET", "value": "s"}]}]}})
    }

    fn known() -> Cluster {
        let mut cluster = Cluster::new("https://api");
        for index in 0..KINDS.len() {
            cluster.change(index, Change::Begin);
            cluster.change(index, Change::Complete);
        }
        cluster
    }

    #[test]
    fn nothing_counts_before_every_kind_is_listed() {
        let mut cluster = Cluster::new("https://api");
        for index in 0..KINDS.len() - 1 {
            cluster.change(index, Change::Begin);
            cluster.change(index, Change::Complete);
            assert!(!cluster.is_known());
        }
        let missing = ApiError::NotFound { what: "watch".into(), why: "no such kind".into() };
        cluster.change(KINDS.len() - 1, Change::Failed(missing));
        assert!(cluster.is_known(), "a kind that is not installed has no objects");
        assert!(cluster.problems().is_empty());
    }

    #[test]
    fn a_list_counts_when_it_is_whole() {
        let mut cluster = known();
        assert!(cluster.change(POD, Change::Applied(pod("a", "1"))));
        cluster.change(POD, Change::Begin);
        cluster.change(POD, Change::Listed(pod("b", "2")));
        assert_eq!(cluster.objects()[0].reference().name, "a");
        cluster.change(POD, Change::Complete);
        let names: Vec<_> = cluster.objects().iter().map(|o| o.reference().name.clone()).collect();
        assert_eq!(names, ["b"]);
        cluster.change(POD, Change::Deleted(pod("b", "3")));
        assert!(cluster.objects().is_empty());
    }

    #[test]
    fn what_is_listed_again_unchanged_stays_the_same_object() {
        let mut cluster = known();
        cluster.change(POD, Change::Applied(pod("a", "1")));
        let before = cluster.objects();
        for (version, same) in [("1", true), ("2", false)] {
            cluster.change(POD, Change::Begin);
            cluster.change(POD, Change::Listed(pod("a", version)));
            cluster.change(POD, Change::Complete);
            assert_eq!(cluster.objects()[0].is_same(&before[0]), same);
        }
    }

    #[test]
    fn an_api_server_that_is_away_changes_nothing_and_is_said_once() {
        let mut cluster = known();
        cluster.change(POD, Change::Applied(pod("a", "1")));
        for index in 0..KINDS.len() {
            let away = ApiError::Unreachable { url: "https://api".into(), why: "connection refused".into() };
            cluster.change(index, Change::Failed(away));
        }
        assert_eq!(cluster.objects().len(), 1);
        let problems = cluster.problems();
        assert_eq!(problems.len(), 1, "{problems:?}");
        assert!(problems[0].message.ends_with("runs on with what it knows, and catches up by itself"));
        for index in 0..KINDS.len() {
            cluster.change(index, Change::Begin);
        }
        assert!(cluster.problems().is_empty());
    }

    #[test]
    fn a_hint_makes_a_pod_known_at_its_address_before_the_api_server_does() {
        let mut cluster = known();
        let mut starting = pod("a", "1");
        starting["metadata"]["uid"] = json!("u");
        let of = |cluster: &Cluster| cluster.objects()[0].value()["status"]["podIPs"].clone();
        let hint = |name: &str| Hint::Addresses {
            namespace: "shop".into(),
            name: name.into(),
            uid: "u".into(),
            addresses: vec!["10.0.0.1".parse().unwrap()],
        };
        // The hint first, as when the watch lags behind; then the pod, asked for alone.
        assert!(!cluster.hear(Word::Hint(hint("a"))));
        assert!(cluster.hear(Word::Hint(Hint::Found(starting.clone()))));
        assert_eq!(of(&cluster), json!([{"ip": "10.0.0.1"}]));
        cluster.change(POD, Change::Applied(starting.clone()));
        assert_eq!(of(&cluster), json!([{"ip": "10.0.0.1"}]), "the watch has none yet");
        starting["status"]["podIPs"] = json!([{"ip": "10.0.0.2"}]);
        cluster.change(POD, Change::Applied(starting.clone()));
        assert_eq!(of(&cluster), json!([{"ip": "10.0.0.2"}]));
        // A new sandbox, and its end.
        assert!(cluster.hear(Word::Hint(hint("a"))));
        assert_eq!(of(&cluster), json!([{"ip": "10.0.0.1"}]));
        let Hint::Addresses { namespace, name, uid, addresses } = hint("a") else { unreachable!() };
        assert!(cluster.hear(Word::Hint(Hint::Withdrawn { namespace, name, uid, addresses })));
        assert_eq!(of(&cluster), json!([{"ip": "10.0.0.2"}]));
        // A pod that is gone stays so.
        cluster.hear(Word::Hint(hint("a")));
        cluster.change(POD, Change::Deleted(starting.clone()));
        assert!(!cluster.hear(Word::Hint(Hint::Found(starting))));
        assert!(cluster.objects().is_empty());
    }

    #[test]
    fn what_nobody_reads_is_not_kept() {
        let mut value = pod("a", "1");
        trim(&mut value);
        let text = value.to_string();
        for gone in ["managedFields", "SECRET", "netns"] {
            assert!(!text.contains(gone), "{text}");
        }
    }
}
