//! Which node runs a pod with which identity: all that the CA has to know of a cluster. Comes in: pods and namespaces as
//! they change. Goes out: the answer to the CA's one question, also for a pod that has no address yet.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;
use serde_json::Value;
use tokio::sync::watch;

use crate::api_server::Change;
use crate::model::SpiffeId;
use crate::translate::{Candidate, NamespaceMode, NoCandidate, Object, Settings};

/// An agent may hear of a pod or of a label before this controller does.
const PATIENCE: Duration = Duration::from_secs(1);

/// Namespace and name.
type PodName = (String, String);

pub struct Scheduled {
    settings: ArcSwap<Settings>,
    state: Mutex<State>,
    changed: watch::Sender<u64>,
}

#[derive(Default)]
struct State {
    nodes: HashMap<String, HashMap<PodName, Candidate>>,
    /// On which node each pod is.
    places: HashMap<PodName, String>,
    namespaces: HashMap<String, NamespaceMode>,
    listed: [Listed; 2],
}

/// A list that is being read.
#[derive(Default)]
struct Listed {
    seen: HashSet<PodName>,
    known: bool,
}

#[derive(Clone, Copy)]
pub enum Of {
    Pods = 0,
    Namespaces = 1,
}

impl Scheduled {
    pub fn new(settings: Settings) -> Arc<Self> {
        let (changed, _) = watch::channel(0);
        Arc::new(Self { settings: ArcSwap::from_pointee(settings), state: Mutex::default(), changed })
    }

    /// Goes over to other settings. A trust domain stays what it was.
    pub fn set(&self, settings: Settings) {
        self.settings.store(Arc::new(settings));
        self.changed.send_modify(|count| *count += 1);
    }

    /// Takes what was heard of pods or namespaces.
    pub fn take(&self, of: Of, change: Change) {
        let (settings, mut state) = (self.settings.load(), self.state());
        match change {
            Change::Begin => state.listed[of as usize].seen.clear(),
            Change::Listed(value) => {
                let name = name_of(&value);
                state.listed[of as usize].seen.insert(name.clone());
                state.put(&settings, of, name, value);
            }
            Change::Complete => {
                let seen = std::mem::take(&mut state.listed[of as usize].seen);
                state.keep(of, &seen);
                state.listed[of as usize].known = true;
            }
            Change::Applied(value) => {
                let name = name_of(&value);
                state.listed[of as usize].seen.insert(name.clone());
                state.put(&settings, of, name, value);
            }
            Change::Deleted(value) => state.remove(of, &name_of(&value)),
            // What was known stays.
            Change::Failed(_) => return,
        }
        drop(state);
        self.changed.send_modify(|count| *count += 1);
    }

    /// Returns when pods and namespaces have been listed once.
    pub async fn known(&self) {
        let mut changed = self.changed.subscribe();
        while !self.state().listed.iter().all(|listed| listed.known) {
            // The sender is in `self`.
            let _ = changed.changed().await;
        }
    }

    /// Whether `node` runs a pod of the mesh with this identity; waits for news of one, but not for long.
    pub async fn runs_on(&self, node: &str, identity: &SpiffeId) -> bool {
        let mut changed = self.changed.subscribe();
        let wait = async {
            while !self.runs_now(node, identity) {
                let _ = changed.changed().await;
            }
        };
        tokio::time::timeout(PATIENCE, wait).await.is_ok()
    }

    fn runs_now(&self, node: &str, identity: &SpiffeId) -> bool {
        let (settings, state) = (self.settings.load(), self.state());
        let mut pods = state.nodes.get(node).into_iter().flat_map(HashMap::values);
        pods.any(|pod| {
            pod.identity == *identity && pod.is_enrolled(&settings, state.namespaces.get(&pod.namespace).copied())
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn put(&mut self, settings: &Settings, of: Of, name: PodName, value: Value) {
        let Some(object) = Object::from_value("", value).ok().and_then(|mut all| all.pop()) else { return };
        match of {
            Of::Pods => match Candidate::new(settings, &object) {
                Ok(candidate) => {
                    self.remove(of, &name);
                    self.places.insert(name.clone(), candidate.node.clone());
                    self.nodes.entry(candidate.node.clone()).or_default().insert(name, candidate);
                }
                Err(NoCandidate::Outside) => self.remove(of, &name),
                Err(NoCandidate::Broken) => {}
            },
            Of::Namespaces => {
                if let Some(mode) = NamespaceMode::new(&object) {
                    self.namespaces.insert(name.1, mode);
                }
            }
        }
    }

    fn remove(&mut self, of: Of, name: &PodName) {
        match of {
            Of::Pods => {
                let Some(node) = self.places.remove(name) else { return };
                if let Some(pods) = self.nodes.get_mut(&node) {
                    pods.remove(name);
                    if pods.is_empty() {
                        self.nodes.remove(&node);
                    }
                }
            }
            Of::Namespaces => drop(self.namespaces.remove(&name.1)),
        }
    }

    fn keep(&mut self, of: Of, seen: &HashSet<PodName>) {
        match of {
            Of::Pods => {
                let gone: Vec<PodName> = self.places.keys().filter(|name| !seen.contains(*name)).cloned().collect();
                gone.iter().for_each(|name| self.remove(of, name));
            }
            Of::Namespaces => self.namespaces.retain(|name, _| seen.contains(&(String::new(), name.clone()))),
        }
    }
}

fn name_of(value: &Value) -> PodName {
    let text = |path| value.pointer(path).and_then(Value::as_str).unwrap_or_default().to_owned();
    (text("/metadata/namespace"), text("/metadata/name"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::model::TrustDomain;

    fn id(account: &str) -> SpiffeId {
        SpiffeId::new(&TrustDomain::new("cluster.local").unwrap(), "shop", account).unwrap()
    }

    fn pod(name: &str, node: &str, account: &str) -> Value {
        json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": "shop"},
            "spec": {"nodeName": node, "serviceAccountName": account}, "status": {"phase": "Pending"},
        })
    }

    fn namespace(mode: &str) -> Value {
        json!({
            "apiVersion": "v1", "kind": "Namespace",
            "metadata": {"name": "shop", "labels": {"nodemesh.io/mode": mode}},
        })
    }

    fn scheduled() -> Arc<Scheduled> {
        let scheduled = Scheduled::new(Settings::new(TrustDomain::new("cluster.local").unwrap()));
        scheduled.take(Of::Namespaces, Change::Applied(namespace("enabled")));
        scheduled.take(Of::Pods, Change::Applied(pod("web", "n1", "web")));
        scheduled
    }

    #[tokio::test(start_paused = true)]
    async fn an_identity_is_given_on_the_pods_own_node_alone() {
        let scheduled = scheduled();
        assert!(scheduled.runs_on("n1", &id("web")).await);
        assert!(!scheduled.runs_on("n2", &id("web")).await);
        assert!(!scheduled.runs_on("n1", &id("db")).await);
        scheduled.take(Of::Pods, Change::Applied(pod("web", "n2", "web")));
        assert!(!scheduled.runs_on("n1", &id("web")).await);
        scheduled.take(Of::Pods, Change::Deleted(pod("web", "n2", "web")));
        assert!(!scheduled.runs_on("n2", &id("web")).await);
        assert!(scheduled.state().nodes.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_pod_that_is_not_enrolled_gets_none_and_a_wrong_label_changes_nothing() {
        let scheduled = scheduled();
        scheduled.take(Of::Namespaces, Change::Applied(namespace("enabeld")));
        assert!(scheduled.runs_on("n1", &id("web")).await, "the last good label stays in force");
        scheduled.take(Of::Namespaces, Change::Applied(namespace("disabled")));
        assert!(!scheduled.runs_on("n1", &id("web")).await);
    }

    #[tokio::test(start_paused = true)]
    async fn istio_labels_count_from_the_moment_they_are_to_be_read() {
        let scheduled = scheduled();
        let labelled = json!({
            "apiVersion": "v1", "kind": "Namespace",
            "metadata": {"name": "shop", "labels": {"istio.io/dataplane-mode": "ambient"}},
        });
        scheduled.take(Of::Namespaces, Change::Applied(labelled));
        assert!(!scheduled.runs_on("n1", &id("web")).await);
        let asking = tokio::spawn({
            let scheduled = scheduled.clone();
            async move { scheduled.runs_on("n1", &id("web")).await }
        });
        tokio::time::sleep(PATIENCE / 2).await;
        let settings = Settings::new(TrustDomain::new("cluster.local").unwrap());
        scheduled.set(Settings { istio_labels: true, ..settings.clone() });
        assert!(asking.await.unwrap(), "an agent may have heard of it first");
        scheduled.set(settings);
        assert!(!scheduled.runs_on("n1", &id("web")).await);
    }

    #[tokio::test(start_paused = true)]
    async fn a_question_waits_for_a_pod_that_is_about_to_be_heard_of() {
        let scheduled = scheduled();
        let asking = tokio::spawn({
            let scheduled = scheduled.clone();
            async move { scheduled.runs_on("n1", &id("late")).await }
        });
        tokio::time::sleep(PATIENCE / 2).await;
        scheduled.take(Of::Pods, Change::Applied(pod("late", "n1", "late")));
        assert!(asking.await.unwrap());
    }

    #[tokio::test(start_paused = true)]
    async fn a_list_that_is_read_anew_takes_away_what_is_not_in_it() {
        let scheduled = scheduled();
        for change in [Change::Begin, Change::Listed(pod("db", "n1", "db"))] {
            scheduled.take(Of::Pods, change);
        }
        assert!(scheduled.runs_on("n1", &id("web")).await, "half a list says nothing");
        scheduled.take(Of::Pods, Change::Complete);
        assert!(!scheduled.runs_on("n1", &id("web")).await);
        assert!(scheduled.runs_on("n1", &id("db")).await);
        let waits = tokio::time::timeout(Duration::from_secs(1), scheduled.known());
        assert!(waits.await.is_err(), "namespaces are not listed yet");
        scheduled.take(Of::Namespaces, Change::Complete);
        scheduled.known().await;
    }
}
