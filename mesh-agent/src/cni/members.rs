//! Who is in the mesh, written down by the agent for the time when it does not answer.
//!
//! The plugin has no credentials, and the runtime tells it no labels: a pod's namespace, name and uid are all it knows. So
//! the agent keeps a file beside its state (it must be there after the node's restart too, when pods start before the
//! agent) with the namespaces that are in the mesh, and each pod of this node as the API server last described it, also
//! pods that have not started yet.
//!
//! Without an agent the plugin decides so. A pod that the file knows by uid: as the file says. Any other pod: as its
//! namespace. That leaves two cases that cannot be known, both only for pods that came to the node while no agent ran: one
//! that left the mesh by its own label, in a namespace that is in the mesh, waits with the others (else every pod of the
//! namespace could start in plaintext); one that is in the mesh by its own label alone, in another namespace, starts (else
//! pods that have nothing to do with the mesh could not), and the agent takes it in as soon as it is back. Without a file
//! that can be read nobody is held up: the file is written before the plugin is installed, and atomically, so that it is
//! missing only where somebody took it away, and then to hold up all would stop the node's own services.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::spec::Pod;
use crate::lifecycle::files::{self, FileError};
use crate::model::{NodePods, Standing};

/// A pod is about a hundred bytes.
const MAX_BYTES: u64 = 16 * 1024 * 1024;
const VERSION: u32 = 1;

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Members {
    version: u32,
    /// Those that are in the mesh.
    namespaces: BTreeSet<String>,
    /// Of this node, by uid: whether it is in the mesh.
    pods: BTreeMap<String, bool>,
}

impl Members {
    pub fn of(pods: &NodePods) -> Self {
        Self {
            version: VERSION,
            namespaces: pods.enabled_namespaces.iter().map(ToString::to_string).collect(),
            pods: pods.pods.iter().map(|(uid, pod)| (uid.to_string(), pod.standing == Standing::Enabled)).collect(),
        }
    }

    /// `None` where there is no file that can be read.
    pub fn read(path: &Path) -> Option<Self> {
        let text = files::read_up_to(path, MAX_BYTES).ok()?;
        serde_json::from_str(&text).ok().filter(|members: &Self| members.version == VERSION)
    }

    pub fn write(&self, path: &Path) -> Result<(), FileError> {
        files::write_private(path, &serde_json::to_vec(self).expect("plain data"))
    }

    /// Whether the pod is in the mesh, as far as it is known here.
    pub fn has(&self, pod: &Pod) -> bool {
        self.pods.get(&pod.uid).copied().unwrap_or_else(|| self.namespaces.contains(&pod.namespace))
    }
}

/// Writes the file whenever something has changed, until nobody tells any more, and again after a failure. `written` is called
/// when it is there for the first time: the plugin is not to be there without it.
pub async fn keep_members(path: PathBuf, mut pods: watch::Receiver<Arc<NodePods>>, written: impl FnOnce() + Send) {
    let (mut first, mut known, mut said) = (Some(written), None, String::new());
    loop {
        let members = Members::of(&pods.borrow_and_update());
        let failed = if known.as_ref() == Some(&members) {
            false
        } else {
            let (at, content) = (path.clone(), members.clone());
            let result = tokio::task::spawn_blocking(move || content.write(&at)).await;
            let hindrance = match result {
                Ok(Ok(())) => String::new(),
                Ok(Err(e)) => e.to_string(),
                Err(e) => e.to_string(),
            };
            let failed = !hindrance.is_empty();
            if failed && hindrance != said {
                tracing::error!("the CNI plugin cannot be told who is in the mesh: {hindrance}; it is tried again");
            }
            said = hindrance;
            if !failed {
                known = Some(members);
                if let Some(written) = first.take() {
                    written();
                }
            }
            failed
        };
        let again = tokio::time::sleep(std::time::Duration::from_secs(5));
        tokio::select! {
            changed = pods.changed() => if changed.is_err() { return },
            () = again, if failed => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::NodePod;

    fn pod(namespace: &str, uid: &str) -> Pod {
        Pod { namespace: namespace.into(), name: "web".into(), uid: uid.into() }
    }

    fn members() -> Members {
        let standing = |standing| NodePod { standing, ..NodePod::default() };
        Members::of(&NodePods {
            enabled_namespaces: ["shop".into()].into(),
            pods: [
                ("in".into(), standing(Standing::Enabled)),
                ("out".into(), standing(Standing::Outside)),
                ("refused".into(), standing(Standing::Refused("a sandbox".into()))),
            ]
            .into(),
        })
    }

    #[test]
    fn a_pod_that_is_known_counts_as_known_and_all_others_as_their_namespace() {
        let members = members();
        for (namespace, uid, expected) in [
            ("shop", "in", true),
            ("shop", "out", false),
            ("shop", "refused", false),
            ("shop", "new", true),
            ("shop", "", true),
            ("other", "in", true),
            ("other", "new", false),
            ("kube-system", "", false),
        ] {
            assert_eq!(members.has(&pod(namespace, uid)), expected, "{namespace} {uid}");
        }
    }

    #[test]
    fn a_file_that_cannot_be_read_says_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("members.json");
        assert_eq!(Members::read(&path), None);
        members().write(&path).unwrap();
        assert_eq!(Members::read(&path), Some(members()));
        for bad in ["", "{", "[]", r#"{"version":2,"namespaces":[],"pods":{}}"#, r#"{"version":1,"namespaces":"shop"}"#]
        {
            std::fs::write(&path, bad).unwrap();
            assert_eq!(Members::read(&path), None, "{bad}");
        }
    }

    #[tokio::test]
    async fn the_file_follows_what_is_known() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("members.json");
        let (tell, told) = watch::channel(Arc::new(NodePods::default()));
        let (written, is_written) = tokio::sync::oneshot::channel();
        let keeping = tokio::spawn(keep_members(path.clone(), told, move || {
            let _ = written.send(());
        }));
        is_written.await.unwrap();
        assert!(!Members::read(&path).unwrap().has(&pod("shop", "")), "it is there from the beginning");
        tell.send_replace(Arc::new(NodePods { enabled_namespaces: ["shop".into()].into(), ..NodePods::default() }));
        let follows = async {
            while !Members::read(&path).unwrap().has(&pod("shop", "")) {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(std::time::Duration::from_secs(60), follows).await.unwrap();
        drop(tell);
        keeping.await.unwrap();
    }
    #[tokio::test(start_paused = true)]
    async fn a_file_that_cannot_be_written_is_written_when_it_can() {
        let folder = tempfile::tempdir().unwrap();
        // As on a full disk: there is no place for it.
        let path = folder.path().join("later/members.json");
        let (_tell, told) = watch::channel(Arc::new(NodePods::default()));
        let (written, mut is_written) = tokio::sync::oneshot::channel();
        let keeping = tokio::spawn(keep_members(path.clone(), told, move || {
            let _ = written.send(());
        }));
        tokio::time::sleep(std::time::Duration::from_secs(20)).await;
        assert!(is_written.try_recv().is_err() && !keeping.is_finished(), "the agent goes on, and installs no plugin");
        std::fs::create_dir(folder.path().join("later")).unwrap();
        is_written.await.unwrap();
        assert!(Members::read(&path).is_some());
        keeping.abort();
    }
}
