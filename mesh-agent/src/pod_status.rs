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
use crate::model::{NodePod, NodePods, Standing, Unjudged};
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

const FAILED: &str = "NodemeshFailed";
const UNJUDGED: &str = "the pod started while no agent of nodemesh ran on its node and the agent's list of namespaces could \
    not be read, so that it did not wait for the mesh: connections from before it was taken in are outside of it; make the \
    pod anew where that matters";

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
    /// Pods that started while nobody could say whether they are in the mesh.
    unjudged: Vec<Unjudged>,
}

/// Shows the pods of `node` until nobody tells any more. `unjudged` are those that started without having been judged.
pub async fn show_pods(
    server: ApiServer,
    node: String,
    mut node_pods: watch::Receiver<Arc<NodePods>>,
    mut statuses: watch::Receiver<Arc<Vec<PodStatus>>>,
    unjudged: Vec<Unjudged>,
) {
    let mut board = Board { unjudged, ..Board::default() };
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
            board.sent(&uid, pod, note, result.is_ok(), Instant::now());
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
            if pod.standing == Standing::Enabled && self.unjudged.iter().any(|unjudged| unjudged.is(uid, pod)) {
                due.push((uid.clone(), Note::Event { reason: FAILED, message: UNJUDGED.to_owned() }));
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
                (FAILED, problem)
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

    fn sent(&mut self, uid: &Arc<str>, pod: &NodePod, note: Note, well: bool, now: Instant) {
        if !well {
            self.not_before.insert(uid.clone(), now + AGAIN);
            return;
        }
        match note {
            Note::Status(value) => {
                self.written.insert(uid.clone(), (value, now));
            }
            Note::Event { message, .. } if message == UNJUDGED => {
                self.unjudged.retain(|unjudged| !unjudged.is(uid, pod));
            }
            Note::Event { reason: LABEL, message } => {
                self.told_labels.insert(uid.clone(), message);
            }
            Note::Event { message, .. } => {
                self.told.insert(uid.clone(), message);
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
            match server.create(&Kind::EVENT, &pod.namespace, &event).await {
                // What was said before and is news again; or the agent before said it.
                Err(ApiError::Conflict { .. }) => recur(server, &pod.namespace, &event).await,
                result => result,
            }
        }
    };
    match result {
        // The pod is gone or another; the Event is just made or counted by another agent.
        Ok(_) | Err(ApiError::NotFound { .. } | ApiError::Conflict { .. }) => Ok(()),
        Err(e) => Err(e),
    }
}

/// Counts once more what `event` tells again. The agent has no right to read Events; the answer to a patch is one.
async fn recur(server: &ApiServer, namespace: &str, event: &Value) -> Result<Value, ApiError> {
    let name = event["metadata"]["name"].as_str().unwrap_or_default();
    let seen = json!({"lastTimestamp": event["lastTimestamp"]});
    let present = server.merge(&Kind::EVENT, namespace, name, "", &seen).await?;
    let count = present["count"].as_u64().unwrap_or(1) + 1;
    let version = &present["metadata"]["resourceVersion"];
    let counted = json!({"metadata": {"resourceVersion": version}, "count": count});
    server.merge(&Kind::EVENT, namespace, name, "", &counted).await
}

fn event(node: &str, uid: &str, pod: &NodePod, reason: &str, message: &str, now: SystemTime) -> Value {
    // The same name for the same thing, so that what recurs, also after a restart of the agent, is one Event with a count.
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
    use std::sync::Mutex;

    use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};

    use super::*;

    const WHY: &str = "a pod in the host's network cannot be in the mesh";

    fn pods(standing: Standing, shown: Option<&str>) -> NodePods {
        let pod = NodePod {
            namespace: "shop".into(),
            name: "web".into(),
            standing,
            shown: shown.map(str::to_owned),
            ..NodePod::default()
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
        board.sent(&"u".into(), &pods.pods["u"], annotation("enabled")[0].clone(), true, now);
        assert!(due(&mut board, &pods, &in_mesh, now).is_empty(), "the watch lags behind");
        assert_eq!(due(&mut board, &pods, &in_mesh, now + AGAIN), annotation("enabled"));
        board.sent(&"u".into(), &pods.pods["u"], annotation("enabled")[0].clone(), false, now + AGAIN);
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
        board.sent(&"u".into(), &pods.pods["u"], note.clone(), true, later);
        assert!(due(&mut board, &pods, &failing, later + AGAIN).is_empty());
        // It went well, and fails again.
        due(&mut board, &pods, &status(true, None), later);
        assert!(due(&mut board, &pods, &failing, later).is_empty());
        assert_eq!(due(&mut board, &pods, &failing, later + PATIENCE), [note]);
    }

    #[test]
    fn a_pod_that_nobody_judged_is_told_of_where_it_is_in_the_mesh() {
        let unjudged = |name: &str| Unjudged { namespace: "shop".into(), name: name.into(), uid: "u".into() };
        let mut board = Board { unjudged: vec![unjudged("web"), unjudged("other")], ..Board::default() };
        let now = Instant::now();
        assert!(due(&mut board, &pods(Standing::Outside, None), &[], now).is_empty());
        let (pods, in_mesh) = (pods(Standing::Enabled, Some("enabled")), status(true, None));
        let note = Note::Event { reason: FAILED, message: UNJUDGED.to_owned() };
        assert_eq!(due(&mut board, &pods, &in_mesh, now), std::slice::from_ref(&note));
        board.sent(&"u".into(), &pods.pods["u"], note, true, now);
        assert!(due(&mut board, &pods, &in_mesh, now).is_empty(), "once");
    }

    #[test]
    fn a_label_that_is_wrong_is_told_once() {
        let (mut board, now) = (Board::default(), Instant::now());
        let mut pods = pods(Standing::Outside, None);
        let pod = pods.pods.get_mut("u").unwrap();
        pod.wrong_label = Some("`on` is no mode".to_owned());
        let notes = due(&mut board, &pods, &[], now);
        let said = Note::Event { reason: LABEL, message: "`on` is no mode".to_owned() };
        assert_eq!(notes, std::slice::from_ref(&said));
        board.sent(&"u".into(), &pods.pods["u"], said, true, now);
        assert_eq!(due(&mut board, &pods, &[], now), []);
        pods.pods.get_mut("u").unwrap().wrong_label = Some("`of` is no mode".to_owned());
        assert_eq!(due(&mut board, &pods, &[], now).len(), 1, "another value is news");
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

    /// An API server with one Event, if it has one; what it was asked comes out.
    async fn api_server(folder: &std::path::Path, event: Option<Value>) -> (ApiServer, Arc<Mutex<Vec<String>>>) {
        crate::identity::install_provider();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let config = folder.join("kubeconfig");
        let text = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "c",
            "clusters": [{"name": "c", "cluster": {"server": format!("http://{address}")}}],
            "users": [{"name": "u", "user": {}}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        });
        std::fs::write(&config, text.to_string()).unwrap();
        let asked: Arc<Mutex<Vec<String>>> = Arc::default();
        let log = asked.clone();
        tokio::spawn(async move {
            let mut event = event;
            while let Ok((stream, _)) = listener.accept().await {
                let mut stream = BufReader::new(stream);
                let (mut head, mut length) = (String::new(), 0);
                while !head.ends_with("\r\n\r\n") {
                    let start = head.len();
                    assert!(stream.read_line(&mut head).await.unwrap() > 0, "{head}");
                    if let Some(value) = head[start..].to_ascii_lowercase().strip_prefix("content-length:") {
                        length = value.trim().parse().unwrap();
                    }
                }
                let mut body = vec![0; length];
                stream.read_exact(&mut body).await.unwrap();
                let body: Value = serde_json::from_slice(&body).unwrap();
                let (status, answer) = match &mut event {
                    None => {
                        event = Some(body);
                        ("201 Created", event.clone().unwrap())
                    }
                    Some(_) if head.starts_with("POST") => (
                        "409 Conflict",
                        json!({"kind": "Status", "status": "Failure", "reason": "AlreadyExists", "code": 409,
                            "message": "it is there"}),
                    ),
                    Some(present) => {
                        let (Value::Object(present), Value::Object(patch)) = (&mut *present, body) else { panic!() };
                        present.extend(patch.into_iter().filter(|(key, _)| key != "metadata"));
                        ("200 OK", Value::Object(present.clone()))
                    }
                };
                log.lock().unwrap().push(format!("{} {answer}", head.split(' ').next().unwrap()));
                let (answer, close) = (answer.to_string(), "connection: close\r\ncontent-type: application/json");
                let text = format!("HTTP/1.1 {status}\r\n{close}\r\ncontent-length: {}\r\n\r\n{answer}", answer.len());
                stream.write_all(text.as_bytes()).await.unwrap();
            }
        });
        (ApiServer::connect(Some(&config), None).await.unwrap(), asked)
    }

    #[tokio::test]
    async fn an_event_that_recurs_is_counted() {
        let folder = tempfile::tempdir().unwrap();
        let (server, asked) = api_server(folder.path(), None).await;
        let pod = NodePod { namespace: "shop".into(), name: "web".into(), ..NodePod::default() };
        let note = Note::Event { reason: FAILED, message: "no certificate".into() };
        let mut counts = Vec::new();
        for _ in 0..3 {
            send(&server, "n1", "u", &pod, &note).await.unwrap();
            let last = asked.lock().unwrap().last().unwrap().clone();
            let (_, event) = last.split_once(' ').unwrap();
            let event: Value = serde_json::from_str(event).unwrap();
            assert!(event["lastTimestamp"].as_str() >= event["firstTimestamp"].as_str());
            counts.push(event["count"].clone());
        }
        assert_eq!(counts, [1, 2, 3]);
        assert!(asked.lock().unwrap().iter().all(|asked| !asked.starts_with("GET")), "it has no right to read Events");
    }
}
