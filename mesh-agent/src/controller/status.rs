//! What the mesh thinks of each policy, as a condition on the policy. In: AuthorizationPolicies and PeerAuthentications as
//! they change. Out: `nodemesh.io/Accepted` in their status, written by the leader, and only where it differs.
//!
//! Istio's status has no list that merges by type: an apply would take the whole list away from whoever else writes there.
//! So the list is read, ours is put in, and it is written if nobody has changed the object meanwhile.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use futures_util::StreamExt;
use futures_util::stream;
use serde_json::{Value, json};
use tokio::sync::watch;

use super::{Changing, Said};
use crate::api_server::{ApiError, ApiServer, Change, Kind};
use crate::model::{Problem, Severity};
use crate::telemetry::clock::seconds;
use crate::translate::{Memory, Object, Settings, judge, translate};

pub const CONDITION: &str = "nodemesh.io/Accepted";
const KINDS: [Kind; 2] = [Kind::AUTHORIZATION_POLICY, Kind::PEER_AUTHENTICATION];
/// Policies that are applied together are judged together.
const QUIET: Duration = Duration::from_millis(50);
const RETRY: Duration = Duration::from_secs(5);
const AT_ONCE: usize = 8;
/// The API's own limit for a condition's message is 32 KiB; nobody reads so far.
const LONGEST: usize = 4096;

/// Kind (as index), namespace, name.
type Name = (usize, String, String);

#[derive(Default)]
struct Policies {
    objects: BTreeMap<Name, Judged>,
    listing: [BTreeMap<Name, ()>; 2],
    memory: Memory,
}

struct Judged {
    object: Object,
    alone: Vec<Problem>,
}

/// A status that has to be written.
struct Due {
    name: Name,
    patch: Value,
}

/// Writes until it is dropped.
pub async fn keep(server: &ApiServer, mut changing: watch::Receiver<Changing>) -> Infallible {
    let policies = Mutex::new(Policies::default());
    let (changed, mut heard) = watch::channel(());
    let take = |kind: usize, change: Change| {
        policies.lock().unwrap_or_else(PoisonError::into_inner).take(kind, change);
        changed.send_replace(());
    };
    let write = async {
        let mut said = Said::default();
        loop {
            heard.borrow_and_update();
            let settings = changing.borrow_and_update().settings.clone();
            let due = policies.lock().unwrap_or_else(PoisonError::into_inner).due(&settings, SystemTime::now());
            let answers: Vec<Option<ApiError>> = stream::iter(due)
                .map(|Due { name: (kind, namespace, name), patch }| async move {
                    server.merge(&KINDS[kind], &namespace, &name, "/status", &patch).await.err()
                })
                .buffer_unordered(AT_ONCE)
                .collect()
                .await;
            let mut failed = false;
            for error in answers.into_iter().flatten() {
                match error {
                    // It has changed, or gone: the watch tells of it.
                    ApiError::Conflict { .. } | ApiError::NotFound { .. } => {}
                    e => {
                        failed = true;
                        said.warn(&format!(
                            "the condition of a policy cannot be written: {e}; it is tried again every 5 s"
                        ));
                    }
                }
            }
            if !failed {
                said.clear();
            }
            tokio::select! {
                _ = heard.changed() => {}
                Ok(()) = changing.changed() => {}
                () = tokio::time::sleep(RETRY), if failed => {}
            }
            tokio::time::sleep(QUIET).await;
        }
    };
    tokio::select! {
        never = super::follow(server, &KINDS[0], None, "", |change| take(0, change)) => never,
        never = super::follow(server, &KINDS[1], None, "", |change| take(1, change)) => never,
        never = write => never,
    }
}

impl Policies {
    fn take(&mut self, kind: usize, change: Change) {
        match change {
            Change::Begin => self.listing[kind].clear(),
            Change::Listed(value) | Change::Applied(value) => self.put(kind, value),
            Change::Complete => {
                let listed = std::mem::take(&mut self.listing[kind]);
                self.objects.retain(|name, _| name.0 != kind || listed.contains_key(name));
            }
            Change::Deleted(value) => drop(self.objects.remove(&name_of(kind, &value))),
            Change::Failed(_) => {}
        }
    }

    fn put(&mut self, kind: usize, mut value: Value) {
        if let Some(metadata) = value["metadata"].as_object_mut() {
            metadata.remove("managedFields");
        }
        let name = name_of(kind, &value);
        self.listing[kind].insert(name.clone(), ());
        let Some(object) = Object::from_value("", value).ok().and_then(|mut all| all.pop()) else { return };
        let alone = judge(&object);
        self.objects.insert(name, Judged { object, alone });
    }

    fn due(&mut self, settings: &Settings, now: SystemTime) -> Vec<Due> {
        let objects: Vec<Object> = self.objects.values().map(|judged| judged.object.clone()).collect();
        let translation = translate(settings, &objects, &self.memory);
        self.memory = translation.memory;
        let mut due = Vec::new();
        for (name, Judged { object, alone }) in &self.objects {
            let together = translation.problems.iter().filter(|p| {
                // An error is known from the object alone; here it would end with what is in force in its place, which
                // only an agent knows.
                p.object == *object.reference() && p.severity == Severity::Warning && !alone.contains(p)
            });
            let problems: Vec<&Problem> = alone.iter().chain(together).collect();
            if let Some(patch) = patch(object.value(), &problems, now) {
                due.push(Due { name: name.clone(), patch });
            }
        }
        due
    }
}

fn name_of(kind: usize, value: &Value) -> Name {
    let text = |path| value.pointer(path).and_then(Value::as_str).unwrap_or_default().to_owned();
    (kind, text("/metadata/namespace"), text("/metadata/name"))
}

/// What has to be written, or `None` where the condition says it already.
fn patch(object: &Value, problems: &[&Problem], now: SystemTime) -> Option<Value> {
    let broken = problems.iter().any(|p| p.severity == Severity::Error);
    let (status, reason) = match (broken, problems.is_empty()) {
        (true, _) => ("False", "Invalid"),
        (false, true) => ("True", "Accepted"),
        (false, false) => ("True", "AcceptedInPart"),
    };
    let generation = object["metadata"]["generation"].as_i64().unwrap_or(0);
    let message = message(problems);
    let conditions = object["status"]["conditions"].as_array().map(Vec::as_slice).unwrap_or_default();
    let old = conditions.iter().find(|condition| condition["type"] == CONDITION);
    // Istio's own definition lets it be a text.
    let observed =
        |c: &Value| c["observedGeneration"].as_i64().or_else(|| c["observedGeneration"].as_str()?.parse().ok());
    let same = old.is_some_and(|c| {
        c["status"] == status && c["reason"] == reason && c["message"] == message && observed(c) == Some(generation)
    });
    if same {
        return None;
    }
    let since = old.filter(|c| c["status"] == status).and_then(|c| c["lastTransitionTime"].as_str());
    let ours = json!({
        "type": CONDITION,
        "status": status,
        "reason": reason,
        "message": message,
        "lastTransitionTime": since.map_or_else(|| seconds(now), str::to_owned),
        "observedGeneration": generation,
    });
    let mut all: Vec<Value> = conditions.iter().filter(|c| c["type"] != CONDITION).cloned().collect();
    all.push(ours);
    // With the version: a list that somebody has changed meanwhile must not be written over.
    let version = &object["metadata"]["resourceVersion"];
    Some(json!({"metadata": {"resourceVersion": version}, "status": {"conditions": all}}))
}

fn message(problems: &[&Problem]) -> String {
    if problems.is_empty() {
        return "all of it is in force".to_owned();
    }
    let mut text = String::new();
    for problem in problems {
        let sentence = super::admission::sentence(problem);
        if text.len() + sentence.len() > LONGEST {
            text += "; and more, which `meshctl problems` shows";
            break;
        }
        if !text.is_empty() {
            text += "; ";
        }
        text += &sentence;
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::TrustDomain;

    fn policy(name: &str, spec: Value, status: Value) -> Value {
        json!({
            "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
            "metadata": {"name": name, "namespace": "shop", "generation": 3, "resourceVersion": "70"},
            "spec": spec, "status": status,
        })
    }

    fn peers(name: &str, created: &str) -> Value {
        json!({
            "apiVersion": "security.istio.io/v1", "kind": "PeerAuthentication",
            "metadata": {"name": name, "namespace": "shop", "generation": 1, "creationTimestamp": created},
            "spec": {"mtls": {"mode": "STRICT"}},
        })
    }

    fn due(objects: Vec<(usize, Value)>) -> Vec<Due> {
        let mut policies = Policies::default();
        for (kind, value) in objects {
            policies.take(kind, Change::Applied(value));
        }
        policies.due(&Settings::new(TrustDomain::new("cluster.local").unwrap()), SystemTime::UNIX_EPOCH)
    }

    fn ours(due: &Due) -> &Value {
        due.patch["status"]["conditions"].as_array().unwrap().last().unwrap()
    }

    #[test]
    fn each_policy_is_told_what_the_mesh_thinks_of_it() {
        let http = json!({"action": "ALLOW", "rules": [{"to": [{"operation": {"methods": ["GET"]}}]}]});
        let found = due(vec![
            (0, policy("bad", json!({"action": "ALOW"}), json!({}))),
            (0, policy("good", json!({}), json!({}))),
            (0, policy("part", http, json!({}))),
        ]);
        let said: Vec<(&str, &str)> =
            found.iter().map(|d| (d.name.2.as_str(), ours(d)["reason"].as_str().unwrap())).collect();
        assert_eq!(said, [("bad", "Invalid"), ("good", "Accepted"), ("part", "AcceptedInPart")]);
        assert_eq!(ours(&found[0])["status"], "False");
        let message = ours(&found[0])["message"].as_str().unwrap();
        assert_eq!(message, "spec.action: `ALOW` is no action: use ALLOW, DENY, AUDIT or CUSTOM");
        assert_eq!(
            (&ours(&found[0])["observedGeneration"], &found[0].patch["metadata"]["resourceVersion"]),
            (&json!(3), &json!("70"))
        );
    }

    #[test]
    fn nothing_is_written_where_it_stands_already_and_conditions_of_others_stay() {
        let other = json!({"type": "istio.io/WaypointAccepted", "status": "True"});
        let first = due(vec![(0, policy("a", json!({}), json!({"conditions": [other]})))]);
        let status = first[0].patch["status"].clone();
        assert_eq!(status["conditions"][0], other);
        assert!(due(vec![(0, policy("a", json!({}), status.clone()))]).is_empty());
        // What changes its mind changes its time; what only says other words does not.
        let broken = due(vec![(0, policy("a", json!({"action": "x"}), status.clone()))]);
        assert_eq!(broken[0].patch["status"]["conditions"].as_array().unwrap().len(), 2);
        let mut newer = policy("a", json!({}), status);
        newer["metadata"]["generation"] = 4.into();
        newer["status"]["conditions"][1]["lastTransitionTime"] = "2020-01-01T00:00:00Z".into();
        let again = due(vec![(0, newer)]);
        assert_eq!(ours(&again[0])["lastTransitionTime"], "2020-01-01T00:00:00Z");
        assert_eq!(ours(&again[0])["observedGeneration"], 4);
    }

    #[test]
    fn of_two_that_contradict_each_other_the_one_that_does_not_count_is_told() {
        let found = due(vec![(1, peers("new", "2026-01-02T00:00:00Z")), (1, peers("old", "2026-01-01T00:00:00Z"))]);
        assert_eq!(ours(&found[0])["reason"], "AcceptedInPart");
        assert!(ours(&found[0])["message"].as_str().unwrap().contains("PeerAuthentication shop/old is older"));
        assert_eq!(ours(&found[1])["reason"], "Accepted");
    }
}
