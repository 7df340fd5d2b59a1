//! Pods that leave the mesh by their label, or come back before they have left whole. Nodes hear of a label at different
//! moments, and what one of them still does as before must not fail at another: the kernel lets the pod go at once, and its
//! listeners stay for a moment.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::handed::refresh;
use super::pods::{EnrolledPod, Enrollment, JoinError, Joined, Pod, PodEvent, TICK, same_place};
use super::{Netns, legacy, routes};
use crate::model::{SpiffeId, Workload};
use crate::redirect::Redirect;

/// For so long a pod that has left by its label still accepts: what was on its way through the mesh, and what comes from
/// agents that have not heard of it. By mutual TLS and judged as before; from the pod itself only what the kernel had taken.
pub(super) const GRACE: Duration = Duration::from_secs(2);

/// A pod that still accepts.
pub(super) struct Leaving {
    pub pod: Arc<EnrolledPod>,
    pub until: Instant,
}

impl Enrollment {
    /// A pod whose label is back before it has left whole: it keeps its listeners, and nobody is refused.
    pub(super) fn may_come_back(&self, workload: &Workload, leaving: Leaving) -> Option<Arc<EnrolledPod>> {
        let Leaving { pod, .. } = leaving;
        let moved = self.inputs.places.has_moved(&workload.uid, pod.netns.id());
        if same_place(workload, &pod.workload) && !moved && pod.netns.is_there() {
            return Some(pod);
        }
        self.part(&pod, true);
        None
    }

    /// The pod accepts no more.
    pub(super) fn part(&self, pod: &EnrolledPod, gone: bool) {
        (self.inputs.events)(PodEvent::Left { uid: pod.workload.uid.clone(), gone });
        if self.yielded {
            return;
        }
        pod.stop_listening();
        if !gone {
            // Connections that go on need the way back; it is taken away when they have ended.
            routes::unwanted(&pod.netns);
            tokio::task::spawn(restore_when_quiet(pod.netns.clone(), self.inputs.redirect.clone()));
        }
    }

    /// Lets go of a certificate that no pod has any more.
    pub(super) fn release(&self, pods: &BTreeMap<Arc<str>, Pod>, identity: &SpiffeId) {
        let leaving = self.leaving.values().map(|leaving| &leaving.pod.workload);
        if !pods.values().map(|pod| &pod.workload).chain(leaving).any(|w| w.identity == *identity) {
            self.inputs.certificates.release(identity);
        }
    }

    /// Ends the grace of those whose time is over, or that are gone.
    pub(super) fn end_grace(&mut self, pods: &BTreeMap<Arc<str>, Pod>) {
        let snapshot = self.inputs.snapshot.load_full();
        let is_gone = |pod: &EnrolledPod| {
            let known = snapshot.workload(&pod.workload.uid);
            !pod.netns.is_there() || !known.is_some_and(|w| same_place(w, &pod.workload))
        };
        let now = Instant::now();
        let over: Vec<_> = self.leaving.extract_if(.., |_, l| now >= l.until || is_gone(&l.pod)).collect();
        for (_, Leaving { pod, .. }) in over {
            self.part(&pod, is_gone(&pod));
            self.release(pods, &pod.workload.identity);
        }
    }
}

/// Takes a pod in again that has not left whole: its listeners go into the kernel's tables once more.
pub(super) async fn come_back(workload: Arc<Workload>, pod: Arc<EnrolledPod>, redirect: Arc<Redirect>) -> Joined {
    let again = workload.clone();
    let back = tokio::task::spawn_blocking(move || {
        let result = pod.listeners().ok_or(JoinError::Frozen).and_then(|listeners| {
            refresh(&again, &pod.netns, &listeners, &redirect)?;
            let legacy = legacy::established(&pod.netns).map_err(JoinError::Legacy)?;
            Ok((Arc::new(EnrolledPod::new(again, pod.netns.clone(), listeners)), legacy))
        });
        if result.is_err() {
            // Whoever takes it in anew finds the ports free.
            pod.stop_listening();
        }
        result
    });
    let result = back.await.unwrap_or_else(|e| Err(JoinError::Legacy(std::io::Error::other(e))));
    (workload, result)
}

/// Gives the routes back when no connection needs them any more; not where the pod has come back meanwhile.
async fn restore_when_quiet(netns: Arc<Netns>, redirect: Arc<Redirect>) {
    let mut tick = tokio::time::interval(TICK);
    while netns.is_there() && legacy::established(&netns).is_ok_and(|all| !all.is_empty()) {
        tick.tick().await;
    }
    // Another agent, which has taken this one's place, may have taken it in again.
    if redirect.enrolled().is_ok_and(|pods| pods.contains(&netns.cookie())) {
        return;
    }
    if let Err(e) = routes::restore_unwanted(&netns) {
        tracing::debug!("cannot take back the routes of a pod that left: {e}");
    }
}
