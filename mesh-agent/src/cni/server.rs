//! The agent's end of `cni.sock`: makes a starting pod known, and says when it is in the mesh.
//!
//! What comes in is where the pod's network is and which addresses it has; both are handed on at once, to enrolment and to
//! discovery, which do the rest as for any other pod. Then it is only looked at what becomes of it. A pod that the watch has
//! not come to yet is waited for a moment and then asked for by name; where the API server does not know either, its
//! namespace decides, as it does for the plugin without an agent. Before a pod is let go as one outside of the mesh, its
//! namespace is known afresh (`freshness`).

use std::collections::HashMap;
use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::future::BoxFuture;
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::OwnedWriteHalf;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout};

use super::freshness::{AskForNamespace, Freshness};
use super::protocol::{Answer, Attachment, Command, MAX_LINE, Request, Said, VERSION, line};
use crate::api_server::ApiError;
use crate::discovery::Hints;
use crate::enrollment::{NetnsId, Places, PodStatus};
use crate::lifecycle::{KeptFile, PrivateSocket};
use crate::model::{NodePod, NodePods, Standing};

/// How long the watch may lag behind kubelet before the API server is asked.
const LAG: Duration = Duration::from_millis(400);
/// How long it may take to answer. Together, and with what it takes to read a Namespace, they leave time before the plugin
/// stops waiting for a first word.
const ASK: Duration = Duration::from_millis(700);
/// How long what it answered may take to become known.
const TAKE: Duration = Duration::from_millis(300);
/// For a question to be written.
const QUESTION: Duration = Duration::from_secs(5);
/// No plugin waits longer.
const LONGEST: Duration = Duration::from_secs(120);
/// Pods that start at the same time; what is more waits in the socket's queue.
const AT_ONCE: usize = 512;

/// Asks the API server for one pod, by namespace and name.
pub type AskForPod = Box<dyn Fn(String, String) -> BoxFuture<'static, Result<Option<Value>, ApiError>> + Send + Sync>;

/// What the server is given.
pub struct Inputs {
    pub node_pods: watch::Receiver<Arc<NodePods>>,
    pub statuses: watch::Receiver<Arc<Vec<PodStatus>>>,
    pub places: Arc<Places>,
    pub hints: Hints,
    pub ask_for_pod: AskForPod,
    pub ask_for_namespace: AskForNamespace,
}

/// Answers plugins for as long as it runs.
pub struct CniServer {
    socket: PrivateSocket,
    desk: Arc<Desk>,
}

#[derive(Debug, thiserror::Error)]
#[error("cannot make the CNI plugin's socket {path}: {source}; choose another with --cni-socket")]
pub struct SocketError {
    path: String,
    source: io::Error,
}

struct Desk {
    inputs: Inputs,
    /// By container.
    sandboxes: Mutex<HashMap<String, Sandbox>>,
    namespaces: Freshness,
}

/// What has been told of a sandbox, to be taken back when it is gone.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Sandbox {
    namespace: String,
    name: String,
    uid: String,
    netns: NetnsId,
    addresses: Vec<IpAddr>,
}

impl CniServer {
    /// The node's lock is held: whoever had the socket before is gone, or leaves. `handed` is what it has left of it.
    pub fn bind(path: &Path, handed: Option<PrivateSocket>, inputs: Inputs) -> Result<Self, SocketError> {
        let failed = |source| SocketError { path: path.display().to_string(), source };
        let socket = match handed {
            Some(socket) => socket,
            None => PrivateSocket::bind(path).map_err(failed)?,
        };
        Ok(Self {
            socket,
            desk: Arc::new(Desk { inputs, sandboxes: Mutex::default(), namespaces: Freshness::default() }),
        })
    }

    /// Another descriptor of the socket, for the next agent, and what keeps its file there.
    pub fn to_hand_over(&self) -> io::Result<(OwnedFd, KeptFile)> {
        Ok((self.socket.std().try_clone()?.into(), self.socket.kept()))
    }

    /// Until it is dropped. Questions that are open then end without an answer, so that the next agent is asked at once.
    pub async fn run(self) {
        let listener = match self.socket.listener() {
            Ok(listener) => listener,
            Err(e) => return tracing::error!("the CNI plugin's socket cannot be served: {e}"),
        };
        let places = Arc::new(Semaphore::new(AT_ONCE));
        let mut questions = JoinSet::new();
        loop {
            while questions.try_join_next().is_some() {}
            let Ok(place) = places.clone().acquire_owned().await else { return };
            match listener.accept().await {
                Ok((stream, _)) => {
                    let desk = self.desk.clone();
                    questions.spawn(async move {
                        desk.serve(stream).await;
                        drop(place);
                    });
                }
                Err(e) => {
                    tracing::warn!("the CNI plugin's socket: {e}");
                    // Out of descriptors: it would fail again at once.
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }
}

impl Desk {
    async fn serve(&self, stream: UnixStream) {
        let (read, mut write) = stream.into_split();
        let mut read = BufReader::new(read.take(MAX_LINE));
        let mut question = Vec::new();
        match timeout(QUESTION, read.read_until(b'\n', &mut question)).await {
            Ok(Ok(_)) => {}
            Ok(Err(_)) | Err(_) => return,
        }
        let command = match serde_json::from_slice(&question) {
            Ok(Request { version: VERSION, command }) => command,
            Ok(_) | Err(_) => return say(&mut write, Said::Unknown).await,
        };
        let said = match command {
            Command::Add(attachment) => {
                let hung_up = async {
                    let mut byte = [0];
                    let _ = read.read(&mut byte).await;
                };
                tokio::select! {
                    said = self.add(&attachment, &mut write) => said,
                    // Nobody waits any more; what is known of the sandbox stays until its DEL.
                    () = hung_up => return,
                }
            }
            Command::Check(attachment) => self.check(&attachment),
            Command::Del { container } => {
                self.gone(|other| *other == container);
                Said::Done
            }
            Command::Gc { containers } => {
                self.gone(|other| !containers.contains(other));
                Said::Done
            }
        };
        say(&mut write, said).await;
    }

    async fn add(&self, asked: &Attachment, write: &mut OwnedWriteHalf) -> Said {
        let Inputs { node_pods, statuses, ask_for_pod, ask_for_namespace, hints, .. } = &self.inputs;
        let (mut node_pods, mut statuses) = (node_pods.clone(), statuses.clone());
        let pod = format!("pod {}/{}", asked.namespace, asked.name);
        let wait = Duration::from_millis(asked.wait).min(LONGEST);
        let start = Instant::now();
        let mut uid = asked.uid.clone();
        let mut told = if uid.is_empty() { None } else { Some(self.tell(asked, &uid)) };
        let (mut api_asked, mut is_fresh, mut waiting) = (false, false, false);
        loop {
            let now = node_pods.borrow_and_update().clone();
            let enrolled = statuses.borrow_and_update().clone();
            let lagging = start.elapsed() < LAG;
            let known = find(&now, asked, &uid);
            let in_mesh = now.enabled_namespaces.contains(asked.namespace.as_str());
            let hindrance = match known {
                Some((known_uid, NodePod { standing: Standing::Enabled, .. })) => {
                    // The uid of a static pod is another in the API.
                    if told.is_none() || **known_uid != *uid {
                        self.gone(|container| *container == asked.container);
                        uid = known_uid.to_string();
                        told = Some(self.tell(asked, known_uid));
                    }
                    let netns = match &told {
                        Some(Ok(netns)) => Some(*netns),
                        Some(Err(e)) => {
                            return Said::Failed {
                                message: format!(
                                    "{pod} is in the mesh, and the agent cannot see its network namespace {}: {e}; mount \
                                     the node's /run/netns into the agent's pod",
                                    asked.netns.display()
                                ),
                            };
                        }
                        None => None,
                    };
                    match enrolled.iter().find(|status| *status.uid == **known_uid) {
                        Some(status) if status.enrolled && status.netns == netns => return Said::Enrolled,
                        status => Some(hindrance(status)),
                    }
                }
                Some((_, NodePod { standing: Standing::Refused(_), .. })) => return Said::Outside,
                // The label may be on the way, or the Namespace itself.
                Some((_, NodePod { standing: Standing::Outside | Standing::Unclear, .. })) if !is_fresh && !in_mesh => {
                    is_fresh = true;
                    self.namespaces.renew(ask_for_namespace, hints, &asked.namespace).await;
                    continue;
                }
                Some((_, NodePod { standing: Standing::Outside, .. })) => return Said::Outside,
                Some((_, NodePod { standing: Standing::Unclear, .. })) if lagging => None,
                Some((_, NodePod { standing: Standing::Unclear, .. })) => return Said::Outside,
                None if lagging => None,
                None if !api_asked => {
                    api_asked = true;
                    let renew = async {
                        if !is_fresh && !in_mesh {
                            self.namespaces.renew(ask_for_namespace, hints, &asked.namespace).await;
                        }
                    };
                    let ask = timeout(ASK, ask_for_pod(asked.namespace.clone(), asked.name.clone()));
                    let ((), answer) = tokio::join!(renew, ask);
                    is_fresh = true;
                    if let Ok(Ok(Some(found))) = answer
                        && let Some(its_uid) = uid_if_it_is(&found, &uid)
                    {
                        if its_uid != uid {
                            self.gone(|container| *container == asked.container);
                        }
                        told = Some(self.tell(asked, &its_uid));
                        uid = its_uid;
                        // Where that takes long, what is known decides.
                        let _ = timeout(TAKE, hints.found(found)).await;
                    }
                    continue;
                }
                None if in_mesh => {
                    Some("the API server has not told of it yet, see whether it can be reached".to_owned())
                }
                None => return Said::Outside,
            };
            if let Some(hindrance) = &hindrance {
                if start.elapsed() >= wait {
                    return Said::Failed {
                        message: format!(
                            "{pod} is in the mesh and was not taken in within {} s: {hindrance}; kubelet tries again by \
                             itself",
                            wait.as_secs_f32().round()
                        ),
                    };
                }
                if !waiting {
                    waiting = true;
                    say(write, Said::Waiting).await;
                }
            }
            let until = if lagging { start + LAG } else { start + wait };
            tokio::select! {
                changed = node_pods.changed() => if changed.is_err() { return Said::Unknown },
                changed = statuses.changed() => if changed.is_err() { return Said::Unknown },
                () = sleep_until(until.min(start + wait.max(LAG))) => {}
            }
        }
    }

    fn check(&self, asked: &Attachment) -> Said {
        let now = self.inputs.node_pods.borrow().clone();
        match find(&now, asked, &asked.uid) {
            Some((uid, NodePod { standing: Standing::Enabled, .. })) => {
                let statuses = self.inputs.statuses.borrow().clone();
                match statuses.iter().find(|status| *status.uid == **uid) {
                    Some(status) if status.enrolled => Said::Enrolled,
                    status => Said::Failed {
                        message: format!(
                            "pod {}/{} is to be in the mesh and is not: {}",
                            asked.namespace,
                            asked.name,
                            hindrance(status)
                        ),
                    },
                }
            }
            _ => Said::Outside,
        }
    }

    /// Hands on what the runtime says of the pod; asking twice changes nothing.
    fn tell(&self, asked: &Attachment, uid: &str) -> io::Result<NetnsId> {
        let Inputs { places, hints, .. } = &self.inputs;
        let netns = places.tell(uid, &asked.netns)?;
        let (namespace, name) = (asked.namespace.clone(), asked.name.clone());
        let sandbox = Sandbox { namespace, name, uid: uid.to_owned(), netns, addresses: asked.addresses.clone() };
        self.lock().insert(asked.container.clone(), sandbox);
        hints.addresses(&asked.namespace, &asked.name, uid, &asked.addresses);
        Ok(netns)
    }

    /// Takes back what was told of containers that are gone.
    fn gone(&self, is_gone: impl Fn(&String) -> bool) {
        let gone: Vec<Sandbox> =
            self.lock().extract_if(|container, _| is_gone(container)).map(|(_, sandbox)| sandbox).collect();
        for Sandbox { namespace, name, uid, netns, addresses } in gone {
            self.inputs.places.forget(&uid, netns);
            self.inputs.hints.withdraw(&namespace, &name, &uid, &addresses);
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, Sandbox>> {
        self.sandboxes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn say(write: &mut OwnedWriteHalf, said: Said) {
    // A plugin that has gone needs no answer; one that does not read gets none.
    let _ = timeout(QUESTION, write.write_all(&line(&Answer::new(said)))).await;
}

fn find<'a>(pods: &'a NodePods, asked: &Attachment, uid: &str) -> Option<(&'a Arc<str>, &'a NodePod)> {
    if let Some(known) = pods.pods.get_key_value(uid) {
        return Some(known);
    }
    let mut named = pods.pods.iter().filter(|(_, pod)| *pod.namespace == *asked.namespace && *pod.name == *asked.name);
    // The runtime may give none; of a static pod it gives that of its file.
    named.find(|(_, pod)| uid.is_empty() || pod.static_uid.as_deref() == Some(uid))
}

fn hindrance(status: Option<&PodStatus>) -> String {
    match status.map(|status| status.problem.as_deref()) {
        None => "the mesh does not know its address yet, see the log of this node's agent".to_owned(),
        Some(None | Some(PodStatus::JOINING)) => {
            "it has no certificate yet, see the log of this node's agent and of the controller".to_owned()
        }
        Some(Some(problem)) => problem.to_owned(),
    }
}

/// The uid in the API of the pod that the runtime calls `uid`: the kubelet knows a static pod by another one.
fn uid_if_it_is(pod: &Value, uid: &str) -> Option<String> {
    let its = pod.pointer("/metadata/uid")?.as_str()?;
    let mirrored = pod.pointer("/metadata/annotations/kubernetes.io~1config.mirror").and_then(Value::as_str);
    (uid.is_empty() || its == uid || mirrored == Some(uid)).then(|| its.to_owned())
}

#[cfg(test)]
mod tests;
