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
//! that can be read nobody is held up, and that is noted (`unjudged`): the file is written before the plugin is installed,
//! atomically, and anew when somebody took it away or changed it, so that it is missing only where that was done while no
//! agent ran.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::spec::Pod;
use crate::lifecycle::Pen;
use crate::lifecycle::files::{self, FileError};
use crate::model::{NodePods, Standing};

/// A pod is about a hundred bytes.
const MAX_BYTES: u64 = 16 * 1024 * 1024;
const VERSION: u32 = 1;
/// How often it is looked whether the file is still as it was written, and tried again where it could not be.
const LOOK: Duration = Duration::from_secs(5);

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
            pods: pods
                .pods
                .iter()
                // The runtime knows a static pod by the other one.
                .flat_map(|(uid, pod)| [Some((uid, pod)), pod.static_uid.as_ref().map(|uid| (uid, pod))])
                .flatten()
                .map(|(uid, pod)| (uid.to_string(), pod.standing == Standing::Enabled))
                .collect(),
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

/// Writes the file whenever something has changed, there or here, until nobody tells any more or the pen is put down, and again
/// after a failure. `written` is called when it is there for the first time: the plugin is not to be there without it.
pub async fn keep_members(
    path: PathBuf,
    pen: Pen,
    mut pods: watch::Receiver<Arc<NodePods>>,
    written: impl FnOnce() + Send,
) {
    let (mut first, mut kept, mut said) = (Some(written), None, String::new());
    loop {
        let members = Members::of(&pods.borrow_and_update());
        let (at, pen, before) = (path.clone(), pen.clone(), kept.take());
        let done = tokio::task::spawn_blocking(move || pen.write(|| keep(&at, members, before))).await;
        let hindrance = match done {
            Ok(Some(Ok(now))) => {
                kept = Some(now);
                if let Some(written) = first.take() {
                    written();
                }
                String::new()
            }
            Ok(None) => return,
            Ok(Some(Err(e))) => e.to_string(),
            Err(e) => e.to_string(),
        };
        if !hindrance.is_empty() && hindrance != said {
            tracing::error!("the CNI plugin cannot be told who is in the mesh: {hindrance}; it is tried again");
        }
        said = hindrance;
        tokio::select! {
            changed = pods.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(LOOK) => {}
        }
    }
}

/// What the file holds, and how it looked when it was written.
type Kept = (Members, Option<Stamp>);

/// Makes the file hold `members`. `before` is what it should hold now, where that is known.
fn keep(path: &Path, members: Members, before: Option<Kept>) -> Result<Kept, FileError> {
    let present = Stamp::of(path);
    if let Some((known, stamp)) = before {
        if stamp == present && known == members {
            return Ok((known, stamp));
        }
        if stamp != present {
            tracing::warn!(
                "{} was removed or changed by another program and is written anew: by it pods start while no agent runs",
                path.display()
            );
        }
    }
    if let Some(folder) = path.parent() {
        files::create_private_dir(folder)?;
    }
    members.write(path)?;
    Ok((members, Stamp::of(path)))
}

/// Tells a file from another that has taken its place or its content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp(u64, u64, SystemTime);

impl Stamp {
    /// `None` where there is no file.
    fn of(path: &Path) -> Option<Self> {
        let meta = fs::metadata(path).ok()?;
        Some(Self(meta.ino(), meta.len(), meta.modified().ok()?))
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
            fs::write(&path, bad).unwrap();
            assert_eq!(Members::read(&path), None, "{bad}");
        }
    }

    #[tokio::test]
    async fn the_file_follows_what_is_known() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("members.json");
        let (tell, told) = watch::channel(Arc::new(NodePods::default()));
        let (written, is_written) = tokio::sync::oneshot::channel();
        let keeping = tokio::spawn(keep_members(path.clone(), Pen::default(), told, move || {
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
        tokio::time::timeout(Duration::from_secs(60), follows).await.unwrap();
        drop(tell);
        keeping.await.unwrap();
    }
    #[tokio::test(start_paused = true)]
    async fn a_file_that_cannot_be_written_is_written_when_it_can() {
        let folder = tempfile::tempdir().unwrap();
        // As on a full disk: there is no place for it.
        let path = folder.path().join("later/members.json");
        fs::write(folder.path().join("later"), "").unwrap();
        let (_tell, told) = watch::channel(Arc::new(NodePods::default()));
        let (written, mut is_written) = tokio::sync::oneshot::channel();
        let keeping = tokio::spawn(keep_members(path.clone(), Pen::default(), told, move || {
            let _ = written.send(());
        }));
        tokio::time::sleep(Duration::from_secs(20)).await;
        assert!(is_written.try_recv().is_err() && !keeping.is_finished(), "the agent goes on, and installs no plugin");
        fs::remove_file(folder.path().join("later")).unwrap();
        is_written.await.unwrap();
        assert!(Members::read(&path).is_some());
        keeping.abort();
    }

    #[test]
    fn the_runtime_knows_a_static_pod_by_the_uid_of_its_file() {
        let pod = NodePod { standing: Standing::Enabled, static_uid: Some("file".into()), ..NodePod::default() };
        let members = Members::of(&NodePods { pods: [("api".into(), pod)].into(), ..NodePods::default() });
        assert!(members.has(&self::pod("other", "api")) && members.has(&self::pod("other", "file")));
    }

    #[tokio::test(start_paused = true)]
    async fn a_file_that_is_taken_away_or_changed_is_written_anew_but_not_after_the_pen_is_down() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state/members.json");
        fs::create_dir(path.parent().unwrap()).unwrap();
        let pods = NodePods { enabled_namespaces: ["shop".into()].into(), ..NodePods::default() };
        let (tell, told) = watch::channel(Arc::new(pods));
        let pen = Pen::default();
        let keeping = tokio::spawn(keep_members(path.clone(), pen.clone(), told, || ()));
        let is_whole = || Members::read(&path).is_some_and(|members| members.has(&pod("shop", "")));
        let comes_back = async || {
            while !is_whole() {
                tokio::time::sleep(LOOK).await;
            }
        };
        comes_back().await;
        for spoil in [
            (|path| fs::remove_file(path).unwrap()) as fn(&Path),
            |path| fs::write(path, "{").unwrap(),
            |path| fs::remove_dir_all(path.parent().unwrap()).unwrap(),
        ] {
            spoil(&path);
            assert!(!is_whole());
            comes_back().await;
        }
        pen.put_down();
        fs::remove_file(&path).unwrap();
        tell.send_replace(Arc::default());
        keeping.await.unwrap();
        assert!(!path.exists());
    }
}
