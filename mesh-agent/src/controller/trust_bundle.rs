//! The trust bundle: a ConfigMap in every namespace, from which agents, and whoever else wants to check a certificate of
//! the mesh, learn the roots. Kept right by the leader: made with a new namespace, repaired when it was changed.

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream;
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::Instant;

use super::Said;
use crate::api_server::{ApiError, ApiServer, Change, Kind, MANAGER};
use crate::identity::{Bundle, CA_ROOT, CA_ROOT_KEY};

const LABEL: &str = "app.kubernetes.io/managed-by";
/// Requests at once: a new root has to get into thousands of namespaces without holding up everybody else's requests.
const AT_ONCE: usize = 8;
const RETRY: Duration = Duration::from_secs(2);

#[derive(Default)]
struct State {
    /// Those that are not about to go.
    namespaces: BTreeSet<String>,
    /// Namespace -> what stands there, or `None` where the object is not as it should be.
    maps: BTreeMap<String, Option<String>>,
    /// Lists that are being read.
    listing: [BTreeSet<String>; 2],
    known: [bool; 2],
}

/// Writes until it is dropped.
pub async fn keep(server: &ApiServer, mut roots: watch::Receiver<Option<Bundle>>) -> Infallible {
    let state = std::sync::Mutex::new(State::default());
    let (changed, mut heard) = watch::channel(());
    let take = |of: usize, change: Change| {
        state.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take(of, change);
        changed.send_replace(());
    };
    let fields = format!("metadata.name={CA_ROOT}");
    let write = async {
        let (mut said, mut later) = (Said::default(), BTreeMap::<String, Instant>::new());
        loop {
            // Before the look, so that what comes meanwhile is looked at again.
            heard.borrow_and_update();
            let pem = roots.borrow_and_update().as_ref().map(Bundle::pem);
            let wrong = match &pem {
                Some(pem) => state.lock().unwrap_or_else(std::sync::PoisonError::into_inner).wrong(pem),
                None => Vec::new(),
            };
            later.retain(|namespace, _| wrong.contains(namespace));
            let due: Vec<String> = wrong
                .into_iter()
                .filter(|namespace| later.get(namespace).is_none_or(|at| *at <= Instant::now()))
                .collect();
            let pem = pem.unwrap_or_default();
            let answers: Vec<(String, Result<Value, ApiError>)> = stream::iter(due)
                .map(|namespace| async {
                    let answer = apply(server, &namespace, &pem).await;
                    (namespace, answer)
                })
                .buffer_unordered(AT_ONCE)
                .collect()
                .await;
            let mut failed = None;
            for (namespace, answer) in answers {
                match answer {
                    Ok(map) => {
                        let mut state = state.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                        state.maps.insert(namespace, content(&map));
                    }
                    // The namespace has gone or is about to: the watch says so soon.
                    Err(ApiError::NotFound { .. }) => drop(later.insert(namespace, Instant::now() + RETRY)),
                    Err(ApiError::Forbidden { why }) if why.contains("is being terminated") => {
                        later.insert(namespace, Instant::now() + RETRY);
                    }
                    Err(e) => {
                        failed = Some(format!(
                            "the roots cannot be written to ConfigMap {namespace}/{CA_ROOT}: {e}; it is tried again every 2 s"
                        ));
                        later.insert(namespace, Instant::now() + RETRY);
                    }
                }
            }
            match failed {
                Some(sentence) => said.error(&sentence),
                None if later.is_empty() => said.clear(),
                None => {}
            }
            let again = later.values().min().copied();
            let timer = async {
                match again {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            // Ends of channels live in this function, and the CA.
            tokio::select! {
                _ = heard.changed() => {}
                Ok(()) = roots.changed() => {}
                () = timer => {}
            }
        }
    };
    tokio::select! {
        never = super::follow(server, &Kind::NAMESPACE, None, "", |change| take(0, change)) => never,
        never = super::follow(server, &Kind::CONFIG_MAP, None, &fields, |change| take(1, change)) => never,
        never = write => never,
    }
}

/// Makes it, or takes over the fields that are ours.
async fn apply(server: &ApiServer, namespace: &str, pem: &str) -> Result<Value, ApiError> {
    let map = json!({
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": CA_ROOT, "labels": {(LABEL): "nodemesh"}},
        "data": {(CA_ROOT_KEY): pem},
    });
    server.apply(&Kind::CONFIG_MAP, namespace, CA_ROOT, "", &map, MANAGER, false).await
}

/// The roots in it; `None` where something of ours is missing.
fn content(map: &Value) -> Option<String> {
    let labelled = map["metadata"]["labels"][LABEL] == "nodemesh";
    map["data"][CA_ROOT_KEY].as_str().filter(|_| labelled).map(str::to_owned)
}

impl State {
    fn take(&mut self, of: usize, change: Change) {
        match change {
            Change::Begin => self.listing[of].clear(),
            Change::Listed(value) | Change::Applied(value) => {
                let text = |path| value.pointer(path).and_then(Value::as_str).unwrap_or_default().to_owned();
                let name = if of == 0 { text("/metadata/name") } else { text("/metadata/namespace") };
                let stays = value["metadata"]["deletionTimestamp"].is_null();
                self.listing[of].insert(name.clone());
                match of {
                    0 if stays => drop(self.namespaces.insert(name)),
                    0 => drop(self.namespaces.remove(&name)),
                    _ => drop(self.maps.insert(name, content(&value))),
                }
            }
            Change::Complete => {
                let listed = std::mem::take(&mut self.listing[of]);
                match of {
                    0 => self.namespaces.retain(|name| listed.contains(name)),
                    _ => self.maps.retain(|name, _| listed.contains(name)),
                }
                self.known[of] = true;
            }
            Change::Deleted(value) => {
                let text = |path| value.pointer(path).and_then(Value::as_str).unwrap_or_default().to_owned();
                match of {
                    0 => drop(self.namespaces.remove(&text("/metadata/name"))),
                    _ => drop(self.maps.remove(&text("/metadata/namespace"))),
                }
            }
            Change::Failed(_) => {}
        }
    }

    /// Where the ConfigMap is missing or wrong; empty before all is known.
    fn wrong(&self, pem: &str) -> Vec<String> {
        if self.known != [true, true] {
            return Vec::new();
        }
        let is_right = |namespace: &String| self.maps.get(namespace).is_some_and(|map| map.as_deref() == Some(pem));
        self.namespaces.iter().filter(|namespace| !is_right(namespace)).cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn namespace(name: &str) -> Value {
        json!({"metadata": {"name": name}})
    }

    fn map(namespace: &str, pem: &str, label: &str) -> Value {
        json!({
            "metadata": {"name": CA_ROOT, "namespace": namespace, "labels": {(LABEL): label}},
            "data": {(CA_ROOT_KEY): pem},
        })
    }

    fn state() -> State {
        let mut state = State::default();
        for change in [Change::Begin, Change::Listed(namespace("a")), Change::Listed(namespace("b")), Change::Complete]
        {
            state.take(0, change);
        }
        assert!(state.wrong("PEM").is_empty(), "the ConfigMaps are not known yet");
        for change in [Change::Begin, Change::Listed(map("a", "PEM", "nodemesh")), Change::Complete] {
            state.take(1, change);
        }
        state
    }

    #[test]
    fn what_is_missing_or_was_changed_is_wrong() {
        let mut state = state();
        assert_eq!(state.wrong("PEM"), ["b"]);
        assert_eq!(state.wrong("NEW"), ["a", "b"]);
        state.take(1, Change::Applied(map("b", "PEM", "nodemesh")));
        assert!(state.wrong("PEM").is_empty());
        for spoilt in [map("b", "other", "nodemesh"), map("b", "PEM", "x"), json!({"metadata": {"namespace": "b"}})] {
            state.take(1, Change::Applied(spoilt));
            assert_eq!(state.wrong("PEM"), ["b"]);
        }
        state.take(1, Change::Deleted(map("a", "PEM", "nodemesh")));
        assert_eq!(state.wrong("PEM"), ["a", "b"]);
    }

    #[test]
    fn a_namespace_that_is_about_to_go_is_left_alone() {
        let mut state = state();
        let mut going = namespace("b");
        going["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z".into();
        state.take(0, Change::Applied(going));
        assert!(state.wrong("PEM").is_empty());
        state.take(0, Change::Applied(namespace("c")));
        assert_eq!(state.wrong("PEM"), ["c"]);
        state.take(0, Change::Deleted(namespace("c")));
        assert!(state.wrong("PEM").is_empty());
    }
}
