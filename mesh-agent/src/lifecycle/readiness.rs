//! Is the agent ready? It is when nothing blocks it any more.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::Notify;

/// Readiness of the process. Cheap to clone. Ready from the beginning: take the blocks before it is served.
#[derive(Clone, Default)]
pub struct Readiness {
    inner: Arc<Inner>,
}

#[derive(Default)]
struct Inner {
    /// Name of what blocks -> how many of that name.
    blocks: Mutex<BTreeMap<&'static str, usize>>,
    changed: Notify,
}

/// Hold it to block readiness, drop it to go on.
#[must_use = "readiness is blocked only for as long as this is held"]
pub struct BlockReady {
    name: &'static str,
    inner: Arc<Inner>,
}

impl Readiness {
    /// `name` says in a few words what is waited for: `the first snapshot`.
    pub fn block(&self, name: &'static str) -> BlockReady {
        *self.inner.blocks.lock().unwrap_or_else(PoisonError::into_inner).entry(name).or_default() += 1;
        BlockReady { name, inner: self.inner.clone() }
    }

    /// What is still waited for; empty when ready.
    pub fn waiting_for(&self) -> Vec<&'static str> {
        self.inner.blocks.lock().unwrap_or_else(PoisonError::into_inner).keys().copied().collect()
    }

    /// Returns when nothing blocks.
    pub async fn ready(&self) {
        loop {
            // Before the look, so that a drop between look and wait is not missed.
            let changed = self.inner.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if self.waiting_for().is_empty() {
                return;
            }
            changed.await;
        }
    }
}

impl Drop for BlockReady {
    fn drop(&mut self) {
        let mut blocks = self.inner.blocks.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = blocks.get_mut(self.name) {
            *count -= 1;
            if *count == 0 {
                blocks.remove(self.name);
            }
        }
        drop(blocks);
        self.inner.changed.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn it_is_ready_when_the_last_block_is_dropped() {
        let readiness = Readiness::default();
        assert!(readiness.waiting_for().is_empty());
        let (a, b, c) = (readiness.block("programs"), readiness.block("snapshot"), readiness.block("snapshot"));
        assert_eq!(readiness.waiting_for(), ["programs", "snapshot"]);
        drop(b);
        assert_eq!(readiness.waiting_for(), ["programs", "snapshot"]);
        let waiter = tokio::spawn({
            let readiness = readiness.clone();
            async move { readiness.ready().await }
        });
        drop(a);
        assert!(!waiter.is_finished());
        drop(c);
        waiter.await.unwrap();
    }
}
