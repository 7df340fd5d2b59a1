//! The Kubernetes API as a source: each kind is listed and watched, and what is heard goes into the mesh change by change.
//!
//! Nothing is published before every kind has been listed once: half a mesh could be one without its policies. A kind
//! whose CustomResourceDefinition is not installed has no objects. When the API server is away, everything stays as it
//! was; a Problem says so, and goes when it answers again.
//!
//! No object is kept, nor a page of them for longer than it takes to read it: `Live` keeps what is needed of each.

use std::collections::BTreeSet;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use serde_json::Value;
use tokio::runtime::Handle;
use tokio::sync::mpsc;

use super::of_source;
use super::store::Publisher;
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
const WAITING: usize = 64;

/// What is read from the API. Of each group the version that all releases of the last years serve.
const KINDS: &[(Kind, Table)] = &[
    (Kind::NAMESPACE, Table::Namespace),
    (Kind::NODE, Table::Node),
    (Kind::POD, Table::Pod),
    (Kind::SERVICE, Table::Service),
    (Kind::ENDPOINT_SLICE, Table::EndpointSlice),
    (Kind::PEER_AUTHENTICATION, Table::PeerAuthentication),
    (Kind::AUTHORIZATION_POLICY, Table::AuthorizationPolicy),
];

/// What the watching tasks tell the discovery thread.
pub(super) type Heard = (usize, Change);

/// Starts to watch. What is heard comes out of the other end, until that is dropped.
pub(super) fn listen(server: &ApiServer) -> mpsc::Receiver<Heard> {
    let (tell, heard) = mpsc::channel(WAITING);
    for (index, (kind, _)) in KINDS.iter().enumerate() {
        let mut changes = Box::pin(watch(server, kind, None, ""));
        let tell = tell.clone();
        tokio::spawn(async move {
            while let Some(change) = changes.next().await {
                if tell.send((index, change)).await.is_err() {
                    return;
                }
            }
        });
    }
    heard
}

/// Takes what is heard and publishes what comes of it, until the other end of `watching` is gone. The calling thread works
/// through all changes itself.
pub(super) fn follow(
    mut cluster: Cluster,
    runtime: &Handle,
    mut heard: mpsc::Receiver<Heard>,
    publisher: &Publisher,
    watching: &Receiver<()>,
) {
    let mut rested = Instant::now();
    while let Some(changed) = cluster.wait(runtime, &mut heard, rested) {
        if watching.try_recv() == Err(TryRecvError::Disconnected) {
            return;
        }
        if changed {
            let start = Instant::now();
            cluster.publish(publisher);
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
        Self { url: url.to_owned(), kinds, live: Live::new(settings), problems: Vec::new() }
    }

    /// Takes changes until they are to be handed on, not before `rested`; says whether there is anything new, or `None` at
    /// the end.
    fn wait(&mut self, runtime: &Handle, heard: &mut mpsc::Receiver<Heard>, rested: Instant) -> Option<bool> {
        let mut first = None;
        loop {
            let now = Instant::now();
            let left = match first {
                None => TICK,
                Some(first) => (first + PATIENCE).min(now + QUIET).max(rested).saturating_duration_since(now),
            };
            if left.is_zero() {
                return Some(true);
            }
            match runtime.block_on(async { tokio::time::timeout(left, heard.recv()).await }) {
                Ok(Some(change)) => {
                    if self.take(change) {
                        first.get_or_insert_with(Instant::now);
                    }
                }
                Ok(None) => return None,
                Err(_) if first.is_some() => return Some(true),
                Err(_) => return Some(self.forgive()),
            }
        }
    }

    /// Says whether anything may be different now.
    fn take(&mut self, (index, change): Heard) -> bool {
        let Self { kinds, live, .. } = self;
        let (listed, table) = (&mut kinds[index], KINDS[index].1);
        if !matches!(change, Change::Failed(_)) {
            listed.failure = None;
        }
        match change {
            Change::Begin => {
                listed.missing = Some(live.names(table));
                false
            }
            Change::Listed(value) | Change::Applied(value) => {
                let Some(object) = object(value) else { return false };
                if let Some(missing) = &mut listed.missing {
                    missing.remove(&name(&object));
                }
                live.put(&object);
                listed.known
            }
            Change::Complete => {
                let gone = listed.missing.take().unwrap_or_default();
                gone.into_iter().for_each(|name| live.remove(table, name));
                listed.known = true;
                true
            }
            Change::Deleted(value) => {
                let Some(object) = object(value) else { return false };
                live.remove(table, name(&object));
                listed.known
            }
            // The list or watch of a kind that is not installed.
            Change::Failed(ApiError::NotFound { .. }) => {
                let gone = live.names(table);
                let new = !listed.known || !gone.is_empty();
                gone.into_iter().for_each(|name| live.remove(table, name));
                *listed = Listed { known: true, ..Listed::default() };
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
            match self.live.snapshot(&before) {
                Some(next) => publisher.publish(next),
                // Who waits for a generation waits for the first answer.
                None if before.generation() == 0 => publisher.publish(before.next()),
                None => {}
            }
            if let Some(problems) = self.live.problems() {
                self.problems = problems;
            }
        }
        publisher.tell([self.of_source(), self.problems.clone()].concat());
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
    if value.get("kind").and_then(Value::as_str) == Some("Pod")
        && let Some(Value::Object(metadata)) = value.get_mut("metadata")
    {
        // They are any pod owner's to write, and could name another's network namespace.
        metadata.remove("annotations");
    }
    Object::from_value("", value).ok()?.into_iter().next()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use serde_json::json;

    use super::super::store::Published;
    use super::*;
    use crate::model::{Snapshot, TrustDomain};

    fn pod(name: &str, ip: &str) -> Value {
        json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": "shop", "uid": name,
            "annotations": {"nodemesh.io/netns": "no path"}}, "status": {"podIP": ip}})
    }

    const POD: usize = 2;
    const POLICY: usize = 6;

    /// A cluster that has said of all kinds that there is nothing, and what came of it.
    struct Test {
        cluster: Cluster,
        publisher: Publisher,
        published: Published,
    }

    impl Test {
        fn new() -> Self {
            let settings = Settings::new(TrustDomain::new("cluster.local").unwrap());
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
            let changed = self.cluster.take((index, change));
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
}
