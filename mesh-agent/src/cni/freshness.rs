//! Whether what is known of a namespace is fresh enough to let one of its pods start outside of the mesh.
//!
//! Kinds are watched apart: a pod may be known while the label that its Namespace was just given is still on the way. So a
//! Namespace that is not known to be in the mesh is read before its pods are let go, by one request for all of them that
//! start within a second. An API server that does not answer in time holds nobody up: for a while it is not asked again.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::future::BoxFuture;
use serde_json::Value;
use tokio::time::{Instant, timeout};

use crate::api_server::ApiError;
use crate::discovery::Hints;

/// How long it may take to read a Namespace, and then to make it known.
const ASK: Duration = Duration::from_millis(400);
/// What was read counts for this long.
const FRESH: Duration = Duration::from_secs(1);
/// For how long an API server that did not answer is not asked.
const PAUSE: Duration = Duration::from_secs(5);

/// Asks the API server for one Namespace.
pub type AskForNamespace = Box<dyn Fn(String) -> BoxFuture<'static, Result<Option<Value>, ApiError>> + Send + Sync>;

/// When a namespace was read; held while it is.
type Read = Arc<tokio::sync::Mutex<Option<Instant>>>;

#[derive(Default)]
pub(super) struct Freshness {
    reads: Mutex<HashMap<String, Read>>,
    not_before: Mutex<Option<Instant>>,
}

impl Freshness {
    /// Reads the namespace anew, unless that was done within a second; when this returns, what is known says so.
    pub async fn renew(&self, ask: &AskForNamespace, hints: &Hints, namespace: &str) {
        let read = self.read(namespace);
        let mut read = read.lock().await;
        let pausing = lock(&self.not_before).is_some_and(|time| Instant::now() < time);
        if pausing || read.is_some_and(is_fresh) {
            return;
        }
        // What it said is true of this moment or a later one.
        let asked = Instant::now();
        match timeout(ASK, ask(namespace.to_owned())).await {
            Ok(Ok(found)) => {
                *read = Some(asked);
                if let Some(found) = found
                    && timeout(ASK, hints.namespace(found)).await.is_err()
                {
                    tracing::warn!(
                        namespace,
                        "a namespace that was read does not become known; its pods start by what was"
                    );
                }
            }
            answer => {
                if let Ok(Err(e)) = answer {
                    tracing::debug!(namespace, "pods start by what is known of their namespace: {e}");
                }
                *lock(&self.not_before) = Some(Instant::now() + PAUSE);
            }
        }
    }

    fn read(&self, namespace: &str) -> Read {
        let mut reads = lock(&self.reads);
        // Whoever is at it holds another clone.
        reads.retain(|_, read| Arc::strong_count(read) > 1 || read.try_lock().is_ok_and(|at| at.is_some_and(is_fresh)));
        reads.entry(namespace.to_owned()).or_default().clone()
    }
}

fn is_fresh(read: Instant) -> bool {
    read.elapsed() < FRESH
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use serde_json::json;

    use super::*;

    /// An API server that answers after `delay`, and how often it was asked.
    fn api(delay: Duration) -> (AskForNamespace, Arc<AtomicUsize>) {
        let asked = Arc::new(AtomicUsize::default());
        let count = asked.clone();
        let ask: AskForNamespace = Box::new(move |name| {
            count.fetch_add(1, Ordering::Relaxed);
            Box::pin(async move {
                tokio::time::sleep(delay).await;
                Ok(Some(json!({"metadata": {"name": name}})))
            })
        });
        (ask, asked)
    }

    #[tokio::test(start_paused = true)]
    async fn pods_that_start_together_ask_once_and_those_later_again() {
        let (ask, asked) = api(Duration::from_millis(50));
        let (freshness, hints) = (Freshness::default(), Hints::default());
        let together = (0..20).map(|_| freshness.renew(&ask, &hints, "shop"));
        futures_util::future::join_all(together).await;
        assert_eq!(asked.load(Ordering::Relaxed), 1);
        freshness.renew(&ask, &hints, "other").await;
        assert_eq!(asked.load(Ordering::Relaxed), 2, "each namespace for itself");
        tokio::time::advance(FRESH).await;
        freshness.renew(&ask, &hints, "shop").await;
        assert_eq!(asked.load(Ordering::Relaxed), 3);
        assert_eq!(lock(&freshness.reads).len(), 1, "what is no more fresh is forgotten");
    }

    #[tokio::test(start_paused = true)]
    async fn an_api_server_that_is_away_holds_up_one_pod_for_a_moment() {
        let (ask, asked) = api(Duration::from_secs(60));
        let (freshness, hints) = (Freshness::default(), Hints::default());
        let start = Instant::now();
        for namespace in ["shop", "shop", "other"] {
            freshness.renew(&ask, &hints, namespace).await;
        }
        assert!(start.elapsed() < ASK * 2, "{:?}", start.elapsed());
        assert_eq!(asked.load(Ordering::Relaxed), 1);
        tokio::time::advance(PAUSE).await;
        freshness.renew(&ask, &hints, "other").await;
        assert_eq!(asked.load(Ordering::Relaxed), 2);
    }
}
