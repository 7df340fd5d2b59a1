//! Pods that pass from one agent of the node to the next. Comes in: what the agent before had of each. Goes out: the same
//! pods, served by this one; their listeners were never closed, so that nobody was refused.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use tokio::sync::oneshot;

use super::legacy::Tuple;
use super::pods::{EnrolledPod, Enrollment, JoinError, Pod, PodEvent, State, entry_of};
use super::{Listeners, Netns, routes};
use crate::model::Workload;
use crate::redirect::Redirect;

/// An enrolled pod, as one agent hands it to another.
#[derive(Debug, Clone)]
pub struct Handed {
    pub uid: Arc<str>,
    pub netns: Arc<Netns>,
    pub listeners: Arc<Listeners>,
    /// Connections older than the enrolment: only the first agent could tell them from its own.
    pub legacy: HashSet<Tuple>,
}

/// What enrolment is told when another agent takes over.
#[derive(Debug)]
pub enum Order {
    /// Nobody joins or leaves from now on; answered with all who are enrolled.
    Freeze(oneshot::Sender<Vec<Handed>>),
    /// The other agent has not come about.
    GoOn,
    /// The other agent has the pods now: the kernel and the pods' namespaces are its own.
    Yield,
}

/// How far a hand-over has come.
#[derive(Debug)]
pub(super) enum Stage {
    Serving,
    /// Pods that are just being taken in are waited for.
    Freezing(oneshot::Sender<Vec<Handed>>),
    Frozen,
    /// Only what is gone is still noticed, so that its connections end.
    Yielded,
}

impl Enrollment {
    /// Takes pods over from the agent before; to be called before `run`.
    pub fn adopt(&mut self, pods: Vec<Handed>) {
        self.handed = pods;
    }

    /// Serves the pods that were handed over, at once, and only then brings the kernel up to date: their listeners are in
    /// its tables already.
    pub(super) async fn adopt_all(&mut self, pods: &mut BTreeMap<Arc<str>, Pod>) {
        let snapshot = self.inputs.snapshot.load_full();
        let mut adopted = Vec::new();
        for Handed { uid, netns, listeners, legacy } in std::mem::take(&mut self.handed) {
            // Another than it was when the agent before looked; or it is no pod of the mesh any more. What the kernel has of
            // it is looked at like that of any earlier agent.
            let Some(workload) = snapshot.workload(&uid).filter(|w| self.is_wanted(w) && netns.is_there()).cloned()
            else {
                continue;
            };
            let pod = Arc::new(EnrolledPod::new(workload.clone(), netns, listeners.clone()));
            (self.inputs.events)(PodEvent::Joined(pod.clone()));
            adopted.push((workload.clone(), pod.clone(), listeners));
            pods.insert(uid, Pod { workload, state: State::Enrolled { pod, legacy } });
        }
        let redirect = self.inputs.redirect.clone();
        let refresh = tokio::task::spawn_blocking(move || {
            let refreshed = adopted.into_iter().map(|(workload, pod, listeners)| {
                let result = refresh(&workload, &pod.netns, &listeners, &redirect);
                (workload, result)
            });
            refreshed.filter_map(|(workload, result)| Some((workload, result.err()?))).collect::<Vec<_>>()
        });
        for (workload, error) in refresh.await.unwrap_or_default() {
            let Some(pod) = pods.remove(&workload.uid) else { continue };
            tracing::error!(pod = %format!("{}/{}", workload.namespace, workload.name), "cannot keep it: {error}");
            self.leave(pods, pod, true);
        }
    }

    /// All who are enrolled.
    pub(super) fn to_hand_over(pods: &BTreeMap<Arc<str>, Pod>) -> Vec<Handed> {
        let handed = pods.iter().filter_map(|(uid, pod)| match &pod.state {
            State::Enrolled { pod, legacy } => Some(Handed {
                uid: uid.clone(),
                netns: pod.netns.clone(),
                listeners: pod.listeners()?,
                legacy: legacy.clone(),
            }),
            State::Joining(_) | State::Failed(_) | State::Due(_) => None,
        });
        handed.collect()
    }
}

/// What `join` does, for a pod that has all of it already: other programs may have to take the place of the older ones.
pub(super) fn refresh(
    workload: &Workload,
    netns: &Netns,
    listeners: &Listeners,
    redirect: &Redirect,
) -> Result<(), JoinError> {
    routes::prepare(netns)?;
    redirect.enroll(&entry_of(workload, netns, listeners), netns.fd())?;
    Ok(())
}
