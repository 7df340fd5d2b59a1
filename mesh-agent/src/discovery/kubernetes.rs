//! The Kubernetes API as a source: each kind is listed and watched, and what is heard goes into the mesh change by change.
//!
//! Nothing is published before every kind has been listed once: half a mesh could be one without its policies. A kind
//! whose CustomResourceDefinition is not installed has no objects, until it is: it is asked for again and again. When the API server is away, everything stays as it
//! was; a Problem says so, and goes when it answers again.
//!
//! No object is kept, nor a page of them for longer than it takes to read it: `Live` keeps what is needed of each. Only the
//! pods of this node are, for the hints of the CNI plugin.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use serde_json::Value;
use tokio::runtime::Runtime;
use tokio::sync::{mpsc, oneshot};

use super::absent::Absent;
use super::hints::{self, Held, Hint};
use super::of_source;
use super::store::Publisher;
use super::versions::Versions;
use crate::api_server::{ApiError, ApiServer, Change, Kind, watch};
use crate::model::{Problem, Severity};
use crate::translate::{Live, Name, Object, Settings, Table};

/// A change is handed on when nothing more was heard for this long: a Deployment's pods change together.
const QUIET: Duration = Duration::from_millis(10);
/// But not later than this after the first of them.
const PATIENCE: Duration = Duration::from_millis(50);
/// How many times as long as it took to hand changes on it rests before the next: a fifth of a core is enough.
const REST: u32 = 4;
/// But not longer than this: a change is in force within a second.
const LONGEST_REST: Duration = Duration::from_millis(500);
/// A failure that was not followed by another for this long is over: failures come at least every 5 s, and may take 10.
const FORGIVEN: Duration = Duration::from_secs(20);
/// How often a failure is looked at that may be over.
const TICK: Duration = Duration::from_secs(1);
/// Changes that wait to be taken; whoever has more waits.
const WAITING: usize = 4;

/// The annotation that this agent writes, and compares with what it should be.
const SHOWN: &str = "nodemesh.io/status";
/// By which uid the kubelet knows a static pod.
const MIRROR: &str = "kubernetes.io/config.mirror";

/// What is read from the API. Of each group the version that all releases of the last years serve.
const KINDS: &[(Kind, Table)] = &[
    (Kind::NAMESPACE, Table::Namespace),
    (Kind::NODE, Table::Node),
    (Kind::POD, Table::Pod),
    (Kind::RUNTIME_CLASS, Table::RuntimeClass),
    (Kind::SERVICE, Table::Service),
    (Kind::ENDPOINT_SLICE, Table::EndpointSlice),
    (Kind::PEER_AUTHENTICATION, Table::PeerAuthentication),
    (Kind::AUTHORIZATION_POLICY, Table::AuthorizationPolicy),
    (Kind::VIRTUAL_SERVICE, Table::VirtualService),
    (Kind::DESTINATION_RULE, Table::DestinationRule),
    (Kind::HTTP_ROUTE, Table::HttpRoute),
    (Kind::GRPC_ROUTE, Table::GrpcRoute),
    (Kind::REFERENCE_GRANT, Table::ReferenceGrant),
];

/// What the discovery thread is told.
#[derive(Debug)]
pub(super) enum Word {
    /// Something of the kind with this index.
    Changed(usize, Change),
    Hint(Hint),
    /// Other settings, and what is wrong with those that their source has now.
    Settings(Box<Settings>, Vec<Problem>),
}

/// Where the discovery thread hears. What comes from the API server is bounded; what others say is little, and they must
/// not wait.
pub(super) struct Ears {
    changes: mpsc::Receiver<Word>,
    others: mpsc::UnboundedReceiver<Word>,
}

/// Starts to watch, on the runtime that has been entered, until the ears are dropped. `others` is what is not heard from the
/// API server.
pub(super) fn listen(server: &ApiServer, others: mpsc::UnboundedReceiver<Word>) -> Ears {
    let (tell, changes) = mpsc::channel(WAITING);
    for (index, (kind, _)) in KINDS.iter().enumerate() {
        let (server, tell) = (server.clone(), tell.clone());
        tokio::spawn(async move {
            let mut absent = Absent::default();
            loop {
                let mut changes = Box::pin(watch(&server, kind, None, ""));
                let mut wait = None;
                while wait.is_none() {
                    let Some(change) = changes.next().await else { return };
                    wait = absent.after(kind, &change);
                    if tell.send(Word::Changed(index, change)).await.is_err() {
                        return;
                    }
                }
                drop(changes);
                // Agents that were started together do not ask together.
                let wait = wait.unwrap_or_default().mul_f64(rand::random_range(0.8..1.2));
                tokio::select! {
                    () = tokio::time::sleep(wait) => {}
                    () = tell.closed() => return,
                }
            }
        });
    }
    Ears { changes, others }
}

impl Ears {
    async fn next(&mut self) -> Option<Word> {
        tokio::select! {
            biased;
            Some(word) = self.others.recv() => Some(word),
            word = self.changes.recv() => word,
        }
    }
}

/// Takes what is heard and publishes what comes of it, until the other end of `watching` is gone. The watches run on the
/// calling thread too: what is read and what is kept of it then share one heap, and a hundred thousand objects that came and
/// went leave no holes in another.
pub(super) fn follow(
    mut cluster: Cluster,
    runtime: &Runtime,
    mut ears: Ears,
    publisher: &Publisher,
    watching: &Receiver<()>,
) {
    let mut rested = Instant::now();
    while let Some(changed) = cluster.wait(runtime, &mut ears, rested) {
        if watching.try_recv() == Err(TryRecvError::Disconnected) {
            return;
        }
        if changed {
            let start = Instant::now();
            cluster.publish(publisher);
            cluster.waiting.clear();
            rested = Instant::now() + (start.elapsed() * REST).min(LONGEST_REST);
        }
    }
}

/// The mesh as the API server last gave it.
pub(super) struct Cluster {
    url: String,
    kinds: Vec<Listed>,
    live: Live,
    /// What is wrong with objects.
    problems: Vec<Problem>,
    /// What is wrong with the settings as their source has them now.
    of_settings: Vec<Problem>,
    node: Option<Arc<str>>,
    /// The pods of this node as they are in force.
    own: BTreeMap<Name, Value>,
    hints: Held,
    /// Of Namespaces, which are also told by hints.
    versions: Versions,
    /// Those who wait until what they have told is published.
    waiting: Vec<oneshot::Sender<()>>,
}

#[derive(Default)]
struct Listed {
    /// While a list is being read: those that it has not named yet. What is left when it is whole is gone.
    missing: Option<BTreeSet<Name>>,
    /// Whether a list was whole once, or there is no such kind.
    known: bool,
    failure: Option<(Instant, ApiError)>,
}

impl Cluster {
    pub fn new(url: &str, settings: Settings) -> Self {
        let kinds = KINDS.iter().map(|_| Listed::default()).collect();
        Self {
            url: url.to_owned(),
            kinds,
            node: settings.node.clone(),
            live: Live::new(settings),
            problems: Vec::new(),
            of_settings: Vec::new(),
            own: BTreeMap::new(),
            hints: Held::default(),
            versions: Versions::default(),
            waiting: Vec::new(),
        }
    }

    /// Takes changes until they are to be handed on, not before `rested`; says whether there is anything new, or `None` at
    /// the end.
    fn wait(&mut self, runtime: &Runtime, ears: &mut Ears, rested: Instant) -> Option<bool> {
        let mut first: Option<Instant> = None;
        loop {
            let now = Instant::now();
            let left = match first {
                None => TICK,
                Some(_) if !self.waiting.is_empty() => return Some(true),
                Some(first) => (first + PATIENCE).min(now + QUIET).max(rested).saturating_duration_since(now),
            };
            if left.is_zero() {
                return Some(true);
            }
            match runtime.block_on(async { tokio::time::timeout(left, ears.next()).await }) {
                Ok(Some(word)) => {
                    if self.hear(word) {
                        first.get_or_insert_with(Instant::now);
                    }
                    if first.is_none() {
                        // Nothing new, and nothing on its way.
                        self.waiting.clear();
                    }
                }
                Ok(None) => return None,
                Err(_) if first.is_some() => return Some(true),
                Err(_) => return Some(self.forgive()),
            }
        }
    }

    /// Says whether anything may be different now.
    fn hear(&mut self, word: Word) -> bool {
        match word {
            Word::Changed(index, change) => self.change(index, change),
            Word::Settings(settings, problems) => {
                self.live.set_settings(*settings);
                self.of_settings = problems;
                true
            }
            Word::Hint(hint) => self.take_hint(hint),
        }
    }

    fn take_hint(&mut self, hint: Hint) -> bool {
        let known = |own: &BTreeMap<Name, Value>, namespace: &str, name: &str, uid: &str| {
            own.get(&(namespace.into(), name.into())).filter(|pod| hints::uid(pod) == uid).cloned()
        };
        let pod = match hint {
            Hint::Addresses { namespace, name, uid, addresses } => {
                let known = known(&self.own, &namespace, &name, &uid);
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
                before.zip(known(&self.own, &namespace, &name, &uid)).map(|(before, mut pod)| {
                    hints::set(&mut pod, &before);
                    pod
                })
            }
            // Where there is no hint any more, the pod has gone meanwhile.
            Hint::Found(mut pod, told) => {
                self.waiting.push(told);
                let expected = self.hints.has(hints::uid(&pod));
                self.hints.adorn(&mut pod);
                let is_new = || object(pod.clone()).is_some_and(|o| !self.live.has(Table::Pod, &name(&o)));
                (expected && is_new()).then_some(pod)
            }
            Hint::Namespace(namespace, told) => {
                self.waiting.push(told);
                return self.take_namespace(namespace);
            }
        };
        let Some(object) = pod.and_then(object) else { return false };
        self.put(&object);
        self.kinds.iter().zip(KINDS).any(|(listed, (_, table))| *table == Table::Pod && listed.known)
    }

    /// One that was asked for alone.
    fn take_namespace(&mut self, namespace: Value) -> bool {
        let version = Versions::of(&namespace);
        let Some(object) = object(namespace).filter(|o| o.kind() == "Namespace") else { return false };
        let is_new = self.versions.is_newer(&name(&object), version);
        if is_new {
            self.put(&object);
        }
        is_new
    }

    fn put(&mut self, object: &Object) {
        self.live.put(object);
        if object.kind() != "Pod" {
            return;
        }
        let node = object.value().pointer("/spec/nodeName").and_then(Value::as_str);
        match self.node.is_some() && node == self.node.as_deref() {
            true => drop(self.own.insert(name(object), object.value().clone())),
            false => drop(self.own.remove(&name(object))),
        }
    }

    fn remove(&mut self, table: Table, name: Name) {
        if table == Table::Pod {
            self.own.remove(&name);
        }
        self.live.remove(table, name);
    }

    /// Says whether anything may be different now.
    fn change(&mut self, index: usize, mut change: Change) -> bool {
        let table = KINDS[index].1;
        match &mut change {
            Change::Listed(pod) | Change::Applied(pod) if table == Table::Pod => self.hints.adorn(pod),
            Change::Deleted(pod) if table == Table::Pod => self.hints.forget(hints::uid(pod)),
            _ => {}
        }
        let version = match &change {
            Change::Listed(value) | Change::Applied(value) | Change::Deleted(value) => Versions::of(value),
            Change::Begin | Change::Complete | Change::Failed(_) => None,
        };
        let listed = &mut self.kinds[index];
        if !matches!(change, Change::Failed(_)) {
            listed.failure = None;
        }
        let known = listed.known;
        match change {
            Change::Begin => {
                listed.missing = Some(self.live.names(table));
                false
            }
            Change::Listed(value) | Change::Applied(value) => {
                let Some(object) = object(value) else { return false };
                if let Some(missing) = &mut listed.missing {
                    missing.remove(&name(&object));
                }
                if table == Table::Namespace && !self.versions.follows(&name(&object), version) {
                    return false;
                }
                self.put(&object);
                known
            }
            Change::Complete => {
                listed.known = true;
                let gone = listed.missing.take().unwrap_or_default();
                gone.iter().filter(|_| table == Table::Namespace).for_each(|name| self.versions.forget(name));
                gone.into_iter().for_each(|name| self.remove(table, name));
                true
            }
            Change::Deleted(value) => {
                let Some(object) = object(value) else { return false };
                if table == Table::Namespace && !self.versions.ends(&name(&object), version) {
                    return false;
                }
                self.remove(table, name(&object));
                known
            }
            // The list or watch of a kind that is not installed.
            Change::Failed(ApiError::NotFound { .. }) => {
                *listed = Listed { known: true, ..Listed::default() };
                let gone = self.live.names(table);
                let new = !known || !gone.is_empty();
                gone.into_iter().for_each(|name| self.remove(table, name));
                new
            }
            Change::Failed(error) => {
                let new = listed.failure.is_none();
                if new {
                    tracing::debug!("{error}");
                }
                listed.failure = Some((Instant::now(), error));
                new
            }
        }
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

    /// Before all is known only what hinders it is told.
    fn publish(&mut self, publisher: &Publisher) {
        if self.is_known() {
            let before = publisher.snapshot();
            let next = self.live.snapshot(&before);
            publisher.tell_of_pods(self.live.node_pods());
            match next {
                Some(next) => publisher.publish(next),
                // Who waits for a generation waits for the first answer.
                None if before.generation() == 0 => publisher.publish(before.next(before.settings().clone())),
                None => {}
            }
            if let Some(problems) = self.live.problems() {
                self.problems = problems;
            }
        }
        publisher.tell([self.of_source(), self.of_settings.clone(), self.problems.clone()].concat());
    }

    /// Whether every kind has been listed.
    fn is_known(&self) -> bool {
        self.kinds.iter().all(|listed| listed.known)
    }

    /// Each thing that goes wrong with the API server, once.
    fn of_source(&self) -> Vec<Problem> {
        let mut problems = Vec::new();
        let mut away = None;
        for (listed, (kind, _)) in self.kinds.iter().zip(KINDS) {
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

fn name(object: &Object) -> Name {
    let at = object.reference();
    (at.namespace.as_str().into(), at.name.as_str().into())
}

/// `None` for what is no object, which the API server does not give.
fn object(mut value: Value) -> Option<Object> {
    if value.get("kind").and_then(Value::as_str) == Some("Pod") {
        trim(&mut value);
    }
    Object::from_value("", value).ok()?.into_iter().next()
}

/// Takes away from a pod what nobody reads and is large.
fn trim(pod: &mut Value) {
    let mut keep = |at: &str, keys: &[&str]| {
        if let Some(Value::Object(map)) = pod.pointer_mut(at) {
            map.retain(|key, _| keys.contains(&key.as_str()));
        }
    };
    // Others are any pod owner's to write, and could name another's network namespace.
    keep("/metadata/annotations", &[SHOWN, MIRROR]);
    let spec = ["nodeName", "serviceAccountName", "serviceAccount", "hostNetwork", "runtimeClassName", "containers"];
    keep("/spec", &spec);
    keep("/status", &["phase", "podIP", "podIPs", "conditions"]);
    if let Some(Value::Array(containers)) = pod.pointer_mut("/spec/containers") {
        for container in containers {
            if let Value::Object(map) = container {
                map.retain(|key, _| key == "ports");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::store::Published;
    use super::*;
    use crate::model::{Snapshot, Standing, TrustDomain};

    fn pod(name: &str, ip: &str) -> Value {
        json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": "shop", "uid": name,
            "annotations": {"nodemesh.io/netns": "no path"}},
            "spec": {"nodeName": "n1", "containers": [{"name": "c", "env": [{"name": "SECRET", "value": "s"}]}]},
            "status": {"podIP": ip}})
    }

    const POD: usize = 2;
    const POLICY: usize = 7;

    /// A cluster that has said of all kinds that there is nothing, and what came of it.
    struct Test {
        cluster: Cluster,
        publisher: Publisher,
        published: Published,
    }

    impl Test {
        fn new() -> Self {
            let mut settings = Settings::new(TrustDomain::new("cluster.local").unwrap());
            settings.node = Some("n1".into());
            let (publisher, published) = Publisher::new(&settings);
            Self { cluster: Cluster::new("https://api", settings), publisher, published }
        }

        fn known() -> Self {
            let mut test = Self::new();
            for index in 0..KINDS.len() {
                test.take(index, Change::Begin);
                test.take(index, Change::Complete);
            }
            test
        }

        fn take(&mut self, index: usize, change: Change) -> bool {
            self.hear(Word::Changed(index, change))
        }

        fn hear(&mut self, word: Word) -> bool {
            let changed = self.cluster.hear(word);
            self.cluster.publish(&self.publisher);
            changed
        }

        fn snapshot(&self) -> Arc<Snapshot> {
            self.published.snapshot.load_full()
        }

        fn pods(&self) -> Vec<String> {
            let mut pods: Vec<_> = self.snapshot().workloads().map(|w| w.name.to_string()).collect();
            pods.sort();
            pods
        }

        fn problems(&self) -> Vec<String> {
            self.published.problems.borrow().iter().map(ToString::to_string).collect()
        }
    }

    #[test]
    fn nothing_counts_before_every_kind_is_listed() {
        let mut test = Test::new();
        for index in 0..KINDS.len() - 1 {
            test.take(index, Change::Begin);
            if index == POD {
                test.take(index, Change::Listed(pod("a", "10.0.0.1")));
            }
            test.take(index, Change::Complete);
            assert_eq!(test.snapshot().generation(), 0);
        }
        let missing = ApiError::NotFound { what: "watch".into(), why: "no such kind".into() };
        test.take(KINDS.len() - 1, Change::Failed(missing));
        assert_eq!(test.pods(), ["a"], "a kind that is not installed has no objects");
        assert!(test.problems().is_empty());
    }

    #[test]
    fn what_a_list_does_not_name_is_gone_when_it_is_whole() {
        let mut test = Test::known();
        assert!(test.take(POD, Change::Applied(pod("a", "10.0.0.1"))));
        test.take(POD, Change::Begin);
        test.take(POD, Change::Listed(pod("b", "10.0.0.2")));
        assert_eq!(test.pods(), ["a", "b"]);
        // It broke off and begins anew.
        test.take(POD, Change::Begin);
        test.take(POD, Change::Listed(pod("b", "10.0.0.2")));
        test.take(POD, Change::Complete);
        assert_eq!(test.pods(), ["b"]);
        test.take(POD, Change::Deleted(pod("b", "10.0.0.2")));
        assert!(test.pods().is_empty());
    }

    #[test]
    fn what_is_heard_again_unchanged_makes_no_new_snapshot() {
        let mut test = Test::known();
        test.take(POD, Change::Applied(pod("a", "10.0.0.1")));
        let before = test.snapshot();
        test.take(POD, Change::Begin);
        test.take(POD, Change::Listed(pod("a", "10.0.0.1")));
        test.take(POD, Change::Complete);
        assert!(Arc::ptr_eq(&before, &test.snapshot()));
        test.take(POD, Change::Applied(pod("a", "10.0.0.2")));
        assert!(!Arc::ptr_eq(&before, &test.snapshot()));
    }

    #[test]
    fn a_policy_that_breaks_stays_as_it_was_and_is_gone_when_it_is_deleted() {
        let policy = |action: &str| {
            json!({"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
                "metadata": {"name": "p", "namespace": "shop", "annotations": {"istio.io/dry-run": "true"}},
                "spec": {"action": action, "rules": [{}]}})
        };
        let mut test = Test::known();
        test.take(POD, Change::Applied(pod("a", "10.0.0.1")));
        for (action, said) in [("DENY", None), ("DNEY", Some("the last good version stays in force"))] {
            test.take(POLICY, Change::Applied(policy(action)));
            let snapshot = test.snapshot();
            let a = snapshot.workload("a").unwrap();
            let dry_run: Vec<_> = a.rules.as_ref().unwrap().policies.iter().map(|p| p.dry_run).collect();
            assert_eq!(dry_run, [true], "annotations of policies count");
            assert_eq!(test.problems().iter().any(|p| said.is_some_and(|said| p.contains(said))), said.is_some());
        }
        test.take(POLICY, Change::Deleted(policy("DENY")));
        assert!(test.snapshot().workload("a").unwrap().rules.as_ref().unwrap().policies.is_empty());
        assert!(test.problems().is_empty());
    }

    /// The Gateway API's definitions are the user's, and may be installed after the mesh, and removed before it.
    #[test]
    fn routes_count_as_soon_as_their_kind_is_installed_and_are_gone_with_it() {
        let route = KINDS.iter().position(|(_, table)| *table == Table::HttpRoute).unwrap();
        let service = KINDS.iter().position(|(_, table)| *table == Table::Service).unwrap();
        let missing = || ApiError::NotFound { what: "watch".into(), why: "no such kind".into() };
        let mut test = Test::known();
        test.take(route, Change::Failed(missing()));
        let web = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web", "namespace": "shop"},
            "spec": {"clusterIP": "10.96.0.1", "ports": [{"port": 80}]}});
        test.take(service, Change::Applied(web));
        assert_eq!(test.snapshot().http_ports().count(), 0);
        let parents = json!([{"group": "", "kind": "Service", "name": "web"}]);
        let given = json!({"apiVersion": "gateway.networking.k8s.io/v1", "kind": "HTTPRoute",
            "metadata": {"name": "web", "namespace": "shop"},
            "spec": {"parentRefs": parents, "rules": [{"backendRefs": [{"name": "web", "port": 80}]}]}});
        test.take(route, Change::Begin);
        test.take(route, Change::Listed(given));
        test.take(route, Change::Complete);
        assert_eq!(test.snapshot().http_ports().count(), 1);
        assert!(test.problems().is_empty());
        test.take(route, Change::Failed(missing()));
        assert_eq!(test.snapshot().http_ports().count(), 0);
    }

    #[test]
    fn an_api_server_that_is_away_changes_nothing_and_is_said_once() {
        let mut test = Test::known();
        test.take(POD, Change::Applied(pod("a", "10.0.0.1")));
        for index in 0..KINDS.len() {
            let away = ApiError::Unreachable { url: "https://api".into(), why: "connection refused".into() };
            test.take(index, Change::Failed(away));
        }
        assert_eq!(test.pods(), ["a"]);
        let problems = test.problems();
        assert_eq!(problems.len(), 1, "{problems:?}");
        assert!(problems[0].ends_with("runs on with what it knows, and catches up by itself"));
        for index in 0..KINDS.len() {
            test.take(index, Change::Begin);
        }
        assert!(test.problems().is_empty());
    }

    #[test]
    fn a_hint_makes_a_pod_known_at_its_address_before_the_api_server_does() {
        let mut test = Test::known();
        let mut starting = pod("a", "");
        let of = |test: &Test| test.snapshot().workloads().map(|w| w.addresses[0].to_string()).collect::<Vec<_>>();
        let (namespace, name, uid) = ("shop".to_owned(), "a".to_owned(), "a".to_owned());
        let hint = || Hint::Addresses {
            namespace: namespace.clone(),
            name: name.clone(),
            uid: uid.clone(),
            addresses: vec!["10.0.0.1".parse().unwrap()],
        };
        // The hint first, as when the watch lags behind; then the pod, asked for alone.
        assert!(!test.hear(Word::Hint(hint())));
        let found = |pod: &Value| Word::Hint(Hint::Found(pod.clone(), oneshot::channel().0));
        assert!(test.hear(found(&starting)));
        assert_eq!(of(&test), ["10.0.0.1"]);
        test.take(POD, Change::Applied(starting.clone()));
        assert_eq!(of(&test), ["10.0.0.1"], "the watch has none yet");
        starting["status"] = json!({"podIPs": [{"ip": "10.0.0.2"}]});
        test.take(POD, Change::Applied(starting.clone()));
        assert_eq!(of(&test), ["10.0.0.2"]);
        // A new sandbox, and its end.
        assert!(test.hear(Word::Hint(hint())));
        assert_eq!(of(&test), ["10.0.0.1"]);
        let addresses = vec!["10.0.0.1".parse().unwrap()];
        let (namespace, name, uid) = (namespace.clone(), name.clone(), uid.clone());
        assert!(test.hear(Word::Hint(Hint::Withdrawn { namespace, name, uid, addresses })));
        assert_eq!(of(&test), ["10.0.0.2"]);
        // A pod that is gone stays so.
        test.hear(Word::Hint(hint()));
        test.take(POD, Change::Deleted(starting.clone()));
        assert!(!test.hear(found(&starting)));
        assert!(of(&test).is_empty());
    }

    fn namespace(version: &str, mode: &str) -> Value {
        json!({"apiVersion": "v1", "kind": "Namespace",
            "metadata": {"name": "shop", "resourceVersion": version, "labels": {"nodemesh.io/mode": mode}}})
    }

    #[test]
    fn a_namespace_that_was_asked_for_counts_until_the_watch_is_as_far() {
        const NAMESPACE: usize = 0;
        let mut test = Test::known();
        test.take(NAMESPACE, Change::Applied(namespace("5", "disabled")));
        test.take(POD, Change::Applied(pod("a", "10.0.0.1")));
        let asked = |version: &str, mode: &str| {
            let (told, _) = oneshot::channel();
            Word::Hint(Hint::Namespace(namespace(version, mode), told))
        };
        let in_mesh = |test: &Test| test.published.node_pods.borrow().pods["a"].standing == Standing::Enabled;
        assert!(!test.hear(asked("4", "enabled")), "a late answer");
        assert!(!in_mesh(&test));
        assert!(test.hear(asked("9", "enabled")));
        assert!(in_mesh(&test));
        for older in [Change::Applied(namespace("7", "disabled")), Change::Deleted(namespace("8", "disabled"))] {
            test.take(NAMESPACE, older);
            assert!(in_mesh(&test), "the watch is behind");
        }
        test.take(NAMESPACE, Change::Applied(namespace("9", "enabled")));
        assert!(in_mesh(&test));
        test.take(NAMESPACE, Change::Applied(namespace("10", "disabled")));
        assert!(!in_mesh(&test));
        // A list that lacks it is its end.
        test.take(NAMESPACE, Change::Begin);
        test.take(NAMESPACE, Change::Complete);
        assert!(test.published.node_pods.borrow().enabled_namespaces.is_empty());
        assert!(test.hear(asked("12", "enabled")));
        assert!(in_mesh(&test), "it was made anew");
    }

    #[test]
    fn who_tells_of_a_namespace_waits_until_it_is_published() {
        let mut test = Test::known();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let (tell, others) = mpsc::unbounded_channel();
        let (_changes, changes) = mpsc::channel(1);
        let mut ears = Ears { changes, others };
        // A publication before it took so long that the next has to wait.
        let rested = Instant::now() + Duration::from_secs(600);
        for (version, is_new) in [("5", true), ("5", false)] {
            let (told, mut known) = oneshot::channel();
            tell.send(Word::Hint(Hint::Namespace(namespace(version, "enabled"), told))).unwrap();
            let changed = test.cluster.wait(&runtime, &mut ears, rested);
            if is_new {
                assert_eq!(changed, Some(true));
                assert_eq!(known.try_recv(), Err(oneshot::error::TryRecvError::Empty));
                test.cluster.publish(&test.publisher);
                test.cluster.waiting.clear();
            }
            assert_eq!(known.try_recv(), Err(oneshot::error::TryRecvError::Closed));
        }
    }

    #[test]
    fn of_pods_only_those_of_this_node_are_kept_and_without_what_nobody_reads() {
        let mut test = Test::known();
        test.take(POD, Change::Applied(pod("a", "10.0.0.1")));
        let mut elsewhere = pod("b", "10.0.0.2");
        elsewhere["spec"]["nodeName"] = json!("n2");
        test.take(POD, Change::Applied(elsewhere));
        assert_eq!(test.pods(), ["a", "b"]);
        let kept: Vec<_> = test.cluster.own.values().map(Value::to_string).collect();
        assert_eq!(kept.len(), 1);
        for gone in ["SECRET", "netns"] {
            assert!(!kept[0].contains(gone), "{kept:?}");
        }
        test.take(POD, Change::Deleted(pod("a", "10.0.0.1")));
        assert!(test.cluster.own.is_empty());
    }

    #[test]
    fn of_a_static_pod_it_is_known_how_the_node_calls_it() {
        let hash = "0123456789abcdef0123456789abcdef";
        let mut test = Test::known();
        for (said, known) in
            [(hash, Some(hash)), ("3c1b8a52-1f0e-4a0d-9d3e-6d1f0c0a7b11", None), (&hash[1..], None), ("", None)]
        {
            let mut mirror = pod("a", "10.0.0.1");
            mirror["metadata"]["annotations"] = json!({MIRROR: said});
            test.take(POD, Change::Applied(mirror));
            assert_eq!(test.published.node_pods.borrow().pods["a"].static_uid.as_deref(), known, "{said}");
        }
    }

    #[test]
    fn other_settings_mean_something_else_at_once() {
        let mut test = Test::known();
        let mut labelled = pod("a", "10.0.0.1");
        labelled["metadata"]["labels"] = json!({"istio.io/dataplane-mode": "ambient"});
        test.take(POD, Change::Applied(labelled));
        let transport = |test: &Test| test.snapshot().workload("a").unwrap().transport;
        assert_eq!(transport(&test), crate::model::Transport::Plain);
        let mut settings = Settings::new(TrustDomain::new("cluster.local").unwrap());
        (settings.node, settings.istio_labels) = (Some("n1".into()), true);
        settings.outbound = crate::model::OutboundPolicy::RegistryOnly;
        test.hear(Word::Settings(Box::new(settings), Vec::new()));
        assert_eq!(transport(&test), crate::model::Transport::Hbone);
        assert_eq!(test.snapshot().settings().outbound, crate::model::OutboundPolicy::RegistryOnly);
    }
}
