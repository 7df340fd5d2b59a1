//! Waiting until Deployment and DaemonSet are what they should be, and why they are not.

use std::collections::BTreeSet;
use std::io::Write;
use std::time::Duration;

use serde_json::Value;
use tokio::time::Instant;

use super::objects::{AGENT, CONTROLLER, name};
use crate::api_server::{ApiError, ApiServer, Kind};
use crate::cli::exit::Failure;
use crate::cli::meshctl::layout::wrap;

/// How often is looked: a person waits.
pub(super) const POLL: Duration = Duration::from_millis(300);

/// How far a workload is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Progress {
    pub(super) ready: u64,
    pub(super) wanted: u64,
    /// Its controller has taken up the last change.
    pub(super) seen: bool,
    /// All of the newest version, and none of an older one left.
    pub(super) done: bool,
}

/// What its status says.
pub(super) fn progress(object: &Value) -> Progress {
    let (spec, status) = (&object["spec"], &object["status"]);
    let number = |name: &str| status[name].as_u64().unwrap_or_default();
    let seen = number("observedGeneration") >= object["metadata"]["generation"].as_u64().unwrap_or_default();
    let (wanted, ready, updated, others) = if object["kind"] == "DaemonSet" {
        (number("desiredNumberScheduled"), number("numberAvailable"), number("updatedNumberScheduled"), 0)
    } else {
        let wanted = spec["replicas"].as_u64().unwrap_or(1);
        let updated = number("updatedReplicas");
        (wanted, number("availableReplicas"), updated, number("replicas").saturating_sub(updated))
    };
    Progress { ready, wanted, seen, done: seen && ready >= wanted && updated >= wanted && others == 0 }
}

/// The two workloads of a mesh, by kind and name.
pub(super) const WORKLOADS: [(Kind, &str); 2] = [(Kind::DEPLOYMENT, CONTROLLER), (Kind::DAEMON_SET, AGENT)];

pub(super) async fn workload(
    server: &ApiServer,
    mesh: &str,
    kind: &Kind,
    name: &str,
) -> Result<Option<Value>, ApiError> {
    let mut found = server.get(kind, mesh, name).await?;
    if let Some(object) = &mut found {
        object["kind"] = (*kind.kind).into();
    }
    Ok(found)
}

/// Waits until each of them is ready, and says so as it becomes so. What is wrong with a pod meanwhile is said once.
pub(super) async fn wait(
    server: &ApiServer,
    mesh: &str,
    workloads: &[(Kind, &str)],
    timeout: Duration,
    out: &mut impl Write,
) -> anyhow::Result<()> {
    let start = Instant::now();
    let mut left: Vec<&(Kind, &str)> = workloads.iter().collect();
    let mut told = BTreeSet::new();
    loop {
        let mut still = Vec::new();
        for one @ (kind, name) in left {
            let Some(object) = workload(server, mesh, kind, name).await? else {
                return Err(Failure::unavailable(format!(
                    "{} {name} is gone from namespace {mesh}: somebody removed it meanwhile; run this again",
                    kind.kind
                ))
                .into());
            };
            let Progress { ready, wanted, seen, done } = progress(&object);
            let done = done || seen && *kind == Kind::DAEMON_SET && served(server, mesh, &object).await? >= wanted;
            if done {
                let seconds = start.elapsed().as_secs_f64();
                writeln!(out, "  ready     {} {name}: {ready} of {wanted} ({seconds:.1} s)", kind.kind)?;
            } else {
                still.push(one);
            }
        }
        out.flush()?;
        left = still;
        let Some((kind, first)) = left.first() else { return Ok(()) };
        for (_, name) in &left {
            for pod in pods(server, mesh, name).await? {
                if let Some(trouble) = trouble(&pod)
                    && told.insert(trouble.clone())
                {
                    writeln!(out, "{}", format_args!("  {}", wrap(&format!("not yet   {trouble}"), 78, 12)))?;
                    out.flush()?;
                }
            }
        }
        if start.elapsed() > timeout {
            let why = last_words(server, mesh, first).await;
            return Err(Failure::unavailable(format!(
                "{} {first} was not ready within {} s: {why}; it goes on in the background, and this can be run again",
                kind.kind,
                timeout.as_secs()
            ))
            .into());
        }
        tokio::time::sleep(POLL).await;
    }
}

/// On how many nodes an agent of the newest revision is ready. The status of the DaemonSet counts one that drains as the
/// node's until it has ended, which may be an hour after another has taken over from it.
async fn served(server: &ApiServer, mesh: &str, agent: &Value) -> anyhow::Result<u64> {
    let newest = revision(server, mesh, agent).await?;
    let pods = pods(server, mesh, AGENT).await?;
    let new = |pod: &&Value| is_ready(pod) && pod["metadata"]["labels"]["controller-revision-hash"] == *newest;
    Ok(pods.iter().filter(new).map(node_of).collect::<BTreeSet<_>>().len() as u64)
}

/// The hash that pods of the newest revision carry.
pub(super) async fn revision(server: &ApiServer, mesh: &str, agent: &Value) -> anyhow::Result<String> {
    let all = server.list(&Kind::CONTROLLER_REVISION, Some(mesh), &format!("app={AGENT}")).await?;
    let of_it = all.iter().filter(|r| r["metadata"]["ownerReferences"][0]["uid"] == agent["metadata"]["uid"]);
    let newest = of_it.max_by_key(|r| r["revision"].as_u64());
    let hash = newest.and_then(|r| r["metadata"]["labels"]["controller-revision-hash"].as_str());
    Ok(hash.unwrap_or_default().to_owned())
}

pub(super) async fn pods(server: &ApiServer, mesh: &str, app: &str) -> Result<Vec<Value>, ApiError> {
    server.list(&Kind::POD, Some(mesh), &format!("app={app}")).await
}

pub(super) fn node_of(pod: &Value) -> &str {
    pod["spec"]["nodeName"].as_str().unwrap_or("no node")
}

pub(super) fn is_ready(pod: &Value) -> bool {
    let conditions = pod["status"]["conditions"].as_array();
    pod["metadata"]["deletionTimestamp"].is_null()
        && conditions.into_iter().flatten().any(|c| c["type"] == "Ready" && c["status"] == "True")
}

/// Why a pod will not become ready by itself, where its status knows.
pub(super) fn trouble(pod: &Value) -> Option<String> {
    let at = format!("{} on {}", name(pod), node_of(pod));
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let conditions = pod["status"]["conditions"].as_array();
    for condition in conditions.into_iter().flatten() {
        if condition["type"] == "PodScheduled" && condition["status"] == "False" {
            return Some(format!("{}: {}", name(pod), text(&condition["message"])));
        }
    }
    for container in pod["status"]["containerStatuses"].as_array().into_iter().flatten() {
        let waiting = &container["state"]["waiting"];
        let reason = text(&waiting["reason"]);
        if reason == "CrashLoopBackOff" {
            let ended = &container["lastState"]["terminated"];
            let code = ended["exitCode"].as_i64().unwrap_or_default();
            return Some(format!("{at}: its program ends with {code} again and again"));
        }
        if !["", "ContainerCreating", "PodInitializing"].contains(&reason.as_str()) {
            let message = text(&waiting["message"]);
            let message = message.lines().next().unwrap_or_default();
            return Some(format!("{at}: {reason}: {message}"));
        }
    }
    None
}

/// Of the first pod that is not ready: its trouble, or the end of its log.
async fn last_words(server: &ApiServer, mesh: &str, app: &str) -> String {
    let pods = pods(server, mesh, app).await.unwrap_or_default();
    let Some(pod) = pods.iter().find(|pod| !is_ready(pod)) else {
        return "none of its pods is there; see `kubectl -n ".to_owned() + mesh + " get events`";
    };
    let trouble = trouble(pod).unwrap_or_else(|| format!("{} on {} is not ready", name(pod), node_of(pod)));
    match log_line(server, mesh, name(pod)).await {
        Some(line) => format!("{trouble}; its log ends with \"{line}\""),
        None => trouble,
    }
}

/// The last line that a pod has written; of the run before, where this one has said nothing yet.
pub(super) async fn log_line(server: &ApiServer, mesh: &str, pod: &str) -> Option<String> {
    for previous in [false, true] {
        let path = format!("{}/log?tailLines=1&previous={previous}", Kind::POD.path(mesh, Some(pod)));
        let request = http::Request::get(path).body(Vec::new()).ok()?;
        let text = server.client().request_text(request).await.unwrap_or_default();
        if let Some(line) = text.lines().last().filter(|line| !line.trim().is_empty()) {
            return Some(line.trim().to_owned());
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_daemon_set_is_ready_when_all_its_nodes_have_the_newest() {
        let set = |observed, updated, available| {
            progress(&json!({
                "kind": "DaemonSet", "metadata": {"generation": 2},
                "status": {"observedGeneration": observed, "desiredNumberScheduled": 3,
                           "updatedNumberScheduled": updated, "numberAvailable": available},
            }))
        };
        assert_eq!(set(2, 3, 3), Progress { ready: 3, wanted: 3, seen: true, done: true });
        assert!(!set(1, 3, 3).done, "its controller has not seen the change");
        assert!(!set(2, 2, 3).done, "one is of the old version");
        assert!(!set(2, 3, 2).done);
    }

    #[test]
    fn a_deployment_is_ready_when_the_old_are_gone() {
        let set = |replicas| {
            progress(&json!({
                "kind": "Deployment", "metadata": {"generation": 1}, "spec": {"replicas": 2},
                "status": {"observedGeneration": 1, "replicas": replicas, "updatedReplicas": 2, "availableReplicas": 2},
            }))
        };
        assert!(set(2).done);
        assert!(!set(3).done);
    }

    #[test]
    fn a_pod_in_trouble_says_why() {
        let pod = |state: Value| json!({"metadata": {"name": "a"}, "spec": {"nodeName": "n1"}, "status": {"containerStatuses": [state]}});
        let image = pod(json!({"state": {"waiting": {"reason": "ErrImageNeverPull", "message": "no image"}}}));
        assert_eq!(trouble(&image).as_deref(), Some("a on n1: ErrImageNeverPull: no image"));
        let crash = json!({"state": {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 5m0s"}},
                           "lastState": {"terminated": {"exitCode": 64}}});
        assert_eq!(trouble(&pod(crash)).as_deref(), Some("a on n1: its program ends with 64 again and again"));
        assert_eq!(trouble(&pod(json!({"state": {"waiting": {"reason": "ContainerCreating"}}}))), None);
    }
}
