//! What Kubernetes shows of a pod: the annotation `nodemesh.io/status` and, where something is wrong, an Event.
//!
//! Comes in: who is to be in the mesh (`NodePods`) and who is (`PodStatus`). Goes out: patches, slowly and one after the
//! other, and again where they fail. Nothing waits for it: a pod is in the mesh whether Kubernetes shows it or not.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::api_server::{ApiError, ApiServer, Kind};
use crate::enrollment::PodStatus;
use crate::model::{NodePod, NodePods, Standing};
use crate::telemetry::clock::seconds;

/// Between two requests: twenty a second are few for an API server, and a node has some hundred pods.
const PACE: Duration = Duration::from_millis(50);
/// A pod is looked at again: what failed may go well, what was written may have been undone.
const AGAIN: Duration = Duration::from_secs(5);
/// A pod that is taken in within this time is not worth an Event.
const PATIENCE: Duration = Duration::from_secs(10);
const TICK: Duration = Duration::from_secs(1);
/// An Event's message may have 1024 bytes, its name 253.
const LONGEST_MESSAGE: usize = 1000;
const LONGEST_NAME: usize = 230;

const ANNOTATION: &str = "nodemesh.io/status";
/// The reason of the Event that tells of a wrong label.
const LABEL: &str = "NodemeshLabel";

/// One thing to be said about a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Note {
    /// The annotation's value; `None` takes it away.
    Status(Option<String>),
    Event {
        reason: &'static str,
        message: String,
    },
}

/// What has been said, by the pod's uid.
#[derive(Default)]
struct Board {
    /// What was written, and when: for a while it counts more than what the watch shows.
    written: HashMap<Arc<str>, (Option<String>, Instant)>,
    not_before: HashMap<Arc<str>, Instant>,
    /// The last Event's message.
    told: HashMap<Arc<str>, String>,
    /// The same of the label.
    told_labels: HashMap<Arc<str>, String>,
    in_trouble_since: HashMap<Arc<str>, Instant>,
}

/// Shows the pods of `node` until nobody tells any more.
pub async fn show_pods(
    server: ApiServer,
    node: String,
    mut node_pods: watch::Receiver<Arc<NodePods>>,
    mut statuses: watch::Receiver<Arc<Vec<PodStatus>>>,
) {
    let mut board = Board::default();
    let mut said = String::new();
    let mut tick = tokio::time::interval(TICK);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        let pods = node_pods.borrow_and_update().clone();
        let enrolled = statuses.borrow_and_update().clone();
        for (uid, note) in board.due(&pods, &enrolled, Instant::now()) {
            let Some(pod) = pods.pods.get(&uid) else { continue };
            let result = send(&server, &node, &uid, pod, &note).await;
            match &result {
                Ok(()) => said.clear(),
                Err(e) if e.to_string() != said => {
                    said = e.to_string();
                    let name = format!("{}/{}", pod.namespace, pod.name);
                    tracing::warn!(pod = name, "Kubernetes does not show the pod's state: {said}; it is tried again");
                }
                Err(_) => {}
            }
            board.sent(uid, note, result.is_ok(), Instant::now());
            tokio::time::sleep(PACE).await;
        }
        tokio::select! {
            changed = node_pods.changed() => if changed.is_err() { return },
            changed = statuses.changed() => if changed.is_err() { return },
            _ = tick.tick() => {}
        }
    }
}

impl Board {
    /// What is to be said now.
    fn due(&mut self, pods: &NodePods, statuses: &[PodStatus], now: Instant) -> Vec<(Arc<str>, Note)> {
        fn keep<T>(map: &mut HashMap<Arc<str>, T>, pods: &NodePods) {
            map.retain(|uid, _| pods.pods.contains_key(uid));
        }
        keep(&mut self.written, pods);
        keep(&mut self.not_before, pods);
        keep(&mut self.told, pods);
        keep(&mut self.told_labels, pods);
        keep(&mut self.in_trouble_since, pods);
        let statuses: HashMap<&str, &PodStatus> = statuses.iter().map(|s| (s.uid.as_str(), s)).collect();
        let mut due = Vec::new();
        for (uid, pod) in &pods.pods {
            if self.not_before.get(uid).is_some_and(|time| now < *time) {
                continue;
            }
            let status = statuses.get(&**uid).copied();
            let shown = match self.written.get(uid) {
                Some((written, at)) if now < *at + AGAIN => written,
                _ => &pod.shown,
            };
            let refused = shown.as_ref().is_some_and(|shown| shown.starts_with("refused"));
            let wanted = match &pod.standing {
                Standing::Enabled if status.is_some_and(|s| s.enrolled) => Some("enabled".to_owned()),
                Standing::Enabled if refused => None,
                // On its way, or for a moment without an agent: it was and will be in the mesh.
                Standing::Enabled | Standing::Unclear => shown.clone(),
                Standing::Outside => None,
                Standing::Refused(why) => Some(format!("refused: {why}")),
            };
            let differs = wanted != *shown;
            if let Some(message) = self.trouble(uid, pod, status, differs, now) {
                due.push((uid.clone(), message));
            }
            if differs {
                due.push((uid.clone(), Note::Status(wanted)));
            }
            match &pod.wrong_label {
                Some(message) if self.told_labels.get(uid) != Some(message) => {
                    due.push((uid.clone(), Note::Event { reason: LABEL, message: message.clone() }));
                }
                Some(_) => {}
                None => drop(self.told_labels.remove(uid)),
            }
        }
        due
    }

    /// The Event that is due. `new` says that the annotation does not show it yet.
    fn trouble(
        &mut self,
        uid: &Arc<str>,
        pod: &NodePod,
        status: Option<&PodStatus>,
        new: bool,
        now: Instant,
    ) -> Option<Note> {
        let problem = status.and_then(|s| s.problem.as_deref()).filter(|problem| *problem != PodStatus::JOINING);
        let (reason, message) = match (&pod.standing, problem) {
            (Standing::Refused(why), _) if new => ("NodemeshRefused", why.as_str()),
            (Standing::Enabled, Some(problem)) => {
                let since = *self.in_trouble_since.entry(uid.clone()).or_insert(now);
                if now < since + PATIENCE {
                    return None;
                }
                ("NodemeshFailed", problem)
            }
            (Standing::Refused(_), _) => return None,
            (Standing::Enabled | Standing::Outside | Standing::Unclear, _) => {
                if status.is_none_or(|s| s.enrolled) {
                    // Should it fail again, that is news.
                    self.in_trouble_since.remove(uid);
                    self.told.remove(uid);
                }
                return None;
            }
        };
        if self.told.get(uid).is_some_and(|told| told == message) {
            return None;
        }
        Some(Note::Event { reason, message: message.to_owned() })
    }

    fn sent(&mut self, uid: Arc<str>, note: Note, well: bool, now: Instant) {
        if !well {
            self.not_before.insert(uid, now + AGAIN);
            return;
        }
        match note {
            Note::Status(value) => {
                self.written.insert(uid, (value, now));
            }
            Note::Event { reason: LABEL, message } => {
                self.told_labels.insert(uid, message);
            }
            Note::Event { message, .. } => {
                self.told.insert(uid, message);
            }
        }
    }
}

async fn send(server: &ApiServer, node: &str, uid: &str, pod: &NodePod, note: &Note) -> Result<(), ApiError> {
    let result = match note {
        Note::Status(value) => {
            // With the uid, so that a new pod of the same name is not taken for this one.
            let patch = json!({"metadata": {"uid": uid, "annotations": {ANNOTATION: value}}});
            server.merge(&Kind::POD, &pod.namespace, &pod.name, "", &patch).await
        }
        Note::Event { reason, message } => {
            let event = event(node, uid, pod, reason, message, SystemTime::now());
            server.create(&Kind::EVENT, &pod.namespace, &event).await
        }
    };
    match result {
        // The pod is gone or another; the Event was there from an earlier run.
        Ok(_) | Err(ApiError::NotFound { .. } | ApiError::Conflict { .. }) => Ok(()),
        Err(e) => Err(e),
    }
}

fn event(node: &str, uid: &str, pod: &NodePod, reason: &str, message: &str, now: SystemTime) -> Value {
    // The same name for the same thing, so that a restart of the agent does not say it again.
    let mut hasher = DefaultHasher::new();
    (uid, reason, message).hash(&mut hasher);
    let name = format!("{}.{:016x}", shortened(&pod.name, LONGEST_NAME).trim_end_matches(['-', '.']), hasher.finish());
    let seconds = seconds(now);
    json!({
        "apiVersion": "v1", "kind": "Event",
        "metadata": {"name": name, "namespace": &*pod.namespace},
        "involvedObject": {
            "apiVersion": "v1", "kind": "Pod", "namespace": &*pod.namespace, "name": &*pod.name, "uid": uid,
        },
        "type": "Warning", "reason": reason, "message": shortened(message, LONGEST_MESSAGE),
        "source": {"component": "nodemesh-agent", "host": node},
        "firstTimestamp": seconds, "lastTimestamp": seconds, "count": 1,
    })
}

fn shortened(text: &str, longest: usize) -> &str {
    &text[..text.floor_char_boundary(longest)]
}

#[cfg(test)]
mod tests {
    use super::*;

    const WHY: &str = "a pod in the host's network cannot be in the mesh";

    fn pods(standing: Standing, shown: Option<&str>) -> NodePods {
        let pod = NodePod {
            namespace: "shop".into(),
            name: "web".into(),
            standing,
            shown: shown.map(str::to_owned),
            wrong_label: None,
        };
        NodePods { pods: [("u".into(), pod)].into(), ..NodePods::default() }
    }

    fn status(enrolled: bool, problem: Option<&str>) -> Vec<PodStatus> {
        vec![PodStatus {
            uid: "u".into(),
            namespace: "shop".into(),
            name: "web".into(),
            addresses: Vec::new(),
            enrolled,
            problem: problem.map(str::to_owned),
            legacy_connections: 0,
            netns: None,
        }]
    }

    fn annotation(text: &str) -> Vec<Note> {
        vec![Note::Status(Some(text.to_owned()))]
    }

    fn due(board: &mut Board, pods: &NodePods, statuses: &[PodStatus], now: Instant) -> Vec<Note> {
        board.due(pods, statuses, now).into_iter().map(|(_, note)| note).collect()
    }

    #[test]
    fn the_annotation_follows_the_pod() {
        let refused = format!("refused: {WHY}");
        let in_mesh = status(true, None);
        let joining = status(false, Some(PodStatus::JOINING));
        let take_away = vec![Note::Status(None)];
        for (standing, shown, statuses, expected) in [
            (Standing::Enabled, None, &in_mesh, annotation("enabled")),
            (Standing::Enabled, Some("enabled"), &in_mesh, vec![]),
            (Standing::Enabled, None, &joining, vec![]),
            (Standing::Enabled, Some("enabled"), &joining, vec![]),
            (Standing::Enabled, Some(refused.as_str()), &joining, take_away.clone()),
            (Standing::Outside, Some("enabled"), &vec![], take_away),
            (Standing::Outside, None, &vec![], vec![]),
            (Standing::Unclear, Some("enabled"), &vec![], vec![]),
            (Standing::Refused(WHY.into()), Some(refused.as_str()), &vec![], vec![]),
        ] {
            let found = due(&mut Board::default(), &pods(standing.clone(), shown), statuses, Instant::now());
            assert_eq!(found, expected, "{standing:?} {shown:?}");
        }
        let found = due(&mut Board::default(), &pods(Standing::Refused(WHY.into()), None), &[], Instant::now());
        let event = Note::Event { reason: "NodemeshRefused", message: WHY.into() };
        assert_eq!(found, [vec![event], annotation(&refused)].concat());
    }

    #[test]
    fn what_was_written_is_not_written_again_unless_it_is_undone() {
        let (mut board, now) = (Board::default(), Instant::now());
        let (pods, in_mesh) = (pods(Standing::Enabled, None), status(true, None));
        assert_eq!(due(&mut board, &pods, &in_mesh, now), annotation("enabled"));
        board.sent("u".into(), annotation("enabled")[0].clone(), true, now);
        assert!(due(&mut board, &pods, &in_mesh, now).is_empty(), "the watch lags behind");
        assert_eq!(due(&mut board, &pods, &in_mesh, now + AGAIN), annotation("enabled"));
        board.sent("u".into(), annotation("enabled")[0].clone(), false, now + AGAIN);
        assert!(due(&mut board, &pods, &in_mesh, now + AGAIN).is_empty(), "it failed: not at once again");
        assert_eq!(due(&mut board, &pods, &in_mesh, now + AGAIN * 2), annotation("enabled"));
    }

    #[test]
    fn a_failure_that_lasts_is_an_event_once() {
        let (mut board, now) = (Board::default(), Instant::now());
        let (pods, failing) = (pods(Standing::Enabled, None), status(false, Some("no certificate: x")));
        assert!(due(&mut board, &pods, &failing, now).is_empty());
        let note = Note::Event { reason: "NodemeshFailed", message: "no certificate: x".into() };
        let later = now + PATIENCE;
        assert_eq!(due(&mut board, &pods, &failing, later), std::slice::from_ref(&note));
        board.sent("u".into(), note.clone(), true, later);
        assert!(due(&mut board, &pods, &failing, later + AGAIN).is_empty());
        // It went well, and fails again.
        due(&mut board, &pods, &status(true, None), later);
        assert!(due(&mut board, &pods, &failing, later).is_empty());
        assert_eq!(due(&mut board, &pods, &failing, later + PATIENCE), [note]);
    }

    #[test]
    fn a_label_that_is_wrong_is_told_once() {
        let (mut board, now) = (Board::default(), Instant::now());
        let mut pods = pods(Standing::Outside, None);
        let pod = pods.pods.get_mut("u").unwrap();
        pod.wrong_label = Some("`on` is no mode".to_owned());
        let notes = board.due(&pods, &[], now);
        let said = Note::Event { reason: LABEL, message: "`on` is no mode".to_owned() };
        assert_eq!(notes, [("u".into(), said.clone())]);
        board.sent("u".into(), said, true, now);
        assert_eq!(board.due(&pods, &[], now), []);
        pods.pods.get_mut("u").unwrap().wrong_label = Some("`of` is no mode".to_owned());
        assert_eq!(board.due(&pods, &[], now).len(), 1, "another value is news");
    }

    #[test]
    fn an_event_has_a_name_that_kubernetes_takes() {
        let long = "a.".repeat(126) + "a";
        let pod = NodePod { namespace: "shop".into(), name: long.as_str().into(), ..NodePod::default() };
        let event = event("n1", "u", &pod, "NodemeshFailed", &"ä".repeat(2000), SystemTime::UNIX_EPOCH);
        let name = event["metadata"]["name"].as_str().unwrap();
        assert!(name.len() <= 253 && !name.contains(".."), "{name}");
        assert!(event["message"].as_str().unwrap().len() <= LONGEST_MESSAGE);
        assert_eq!(event["firstTimestamp"], "1970-01-01T00:00:00Z");
    }
}
