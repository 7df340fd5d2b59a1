//! How a mesh is that is installed: its workloads, what each agent says, the versions of all parts, certificates.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, SystemTime};

use futures_util::StreamExt;
use serde_json::Value;

use super::ask;
use super::finding::{Finding, fine, skipped, warning, wrong};
use super::node::Told;
use crate::admin::views::StatusView;
use crate::api_server::{ApiError, ApiServer, Kind, ServerClock};
use crate::cli::exit::{Exit, Failure};
use crate::cli::meshctl::chart::VERSION;
use crate::cli::meshctl::cluster::objects::{AGENT, CONTROLLER, name};
use crate::cli::meshctl::cluster::ready::{self, is_ready, node_of, pods, trouble};
use crate::cli::meshctl::cluster::remote::{self, Pod};
use crate::cli::meshctl::layout::age;
use crate::identity::{CertificateInfo, Validity, validities};
use crate::telemetry::clock::parse_rfc3339;

const AT_ONCE: usize = 16;
/// Time enough to change a root in.
const ROOT_SOON: Duration = Duration::from_secs(30 * 86_400);

pub(super) async fn workloads(server: &ApiServer, mesh: &str, now: SystemTime) -> anyhow::Result<Vec<Finding>> {
    let mut found = Vec::new();
    for (kind, name) in &ready::WORKLOADS {
        let Some(object) = ready::workload(server, mesh, kind, name).await? else {
            found.push(wrong(format!("{} {name} is missing; run `meshctl install` again", kind.kind)));
            continue;
        };
        let progress = ready::progress(&object);
        let all = pods(server, mesh, name).await?;
        let (draining, alive): (Vec<&Value>, Vec<&Value>) = all.iter().partition(|pod| ends_at(pod).is_some());
        // Not as the status of a DaemonSet has it: it counts an agent that drains as its node's until it has ended.
        let ready = alive.iter().filter(|pod| is_ready(pod));
        let ready = match *kind == Kind::DAEMON_SET {
            // While one takes over from another a node has two.
            true => ready.map(|pod| node_of(pod)).collect::<BTreeSet<_>>().len(),
            false => ready.count(),
        } as u64;
        let text = format!("{} {name}: {ready} of {} ready", kind.kind, progress.wanted);
        found.push(match ready >= progress.wanted && progress.seen {
            true => fine(text),
            false => wrong(format!("{text}; see below, or `kubectl -n {mesh} describe {} {name}`", kind.kind)),
        });
        for pod in draining {
            found.push(drains(pod, &alive, now));
        }
        for pod in alive.iter().filter(|pod| !is_ready(pod)) {
            let line = ready::log_line(server, mesh, super::super::objects::name(pod)).await;
            found.push(not_ready(pod, line));
        }
    }
    Ok(found)
}

/// When a pod that was told to end must have ended.
fn ends_at(pod: &Value) -> Option<i64> {
    pod["metadata"]["deletionTimestamp"].as_str().map(|text| parse_rfc3339(text).unwrap_or_default())
}

/// An agent whose place another has goes on for its open connections; one without a successor leaves its node closed.
fn drains(pod: &Value, alive: &[&Value], now: SystemTime) -> Finding {
    let ends = ends_at(pod).unwrap_or_default();
    let now = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs().try_into().unwrap_or(i64::MAX);
    let rest = u64::try_from(ends - now).unwrap_or_default();
    let until = pod["metadata"]["deletionTimestamp"].as_str().unwrap_or_default();
    let successor = alive.iter().any(|other| is_ready(other) && node_of(other) == node_of(pod));
    let pod_name = name(pod);
    match (rest, successor) {
        (0, _) => wrong(format!("{pod_name} should have ended at {until}; is the node reachable?")),
        (_, true) => fine(format!("{pod_name} drains its open connections, until {until} at most ({})", age(rest))),
        (_, false) => warning(format!("{pod_name} ends, by {until} at most ({}), and no other serves yet", age(rest))),
    }
    .on(node_of(pod))
}

fn not_ready(pod: &Value, log: Option<String>) -> Finding {
    let why = trouble(pod).unwrap_or_else(|| format!("{} is not ready", name(pod)));
    let log = log.map(|line| format!("; its log ends with \"{line}\"")).unwrap_or_default();
    wrong(format!("{why}{log}")).on(node_of(pod))
}

/// What an agent says of itself and of its node.
pub(super) struct Agent {
    pub(super) node: String,
    pub(super) status: Result<StatusView, Failure>,
    pub(super) certificates: Result<Vec<CertificateInfo>, Failure>,
    pub(super) told: Result<Told, Failure>,
}

/// All that run, whether they are ready or not: one that is not has the more to tell.
pub(super) async fn agents(server: &ApiServer, mesh: &str, clock: Option<ServerClock>) -> Result<Vec<Agent>, ApiError> {
    let all = pods(server, mesh, AGENT).await?;
    let runs = |pod: &&Value| ends_at(pod).is_none() && pod["status"]["phase"] == "Running";
    // Of two of a node the newer: it takes over, and is asked what it waits for.
    let mut newest: BTreeMap<&str, &Value> = BTreeMap::new();
    for pod in all.iter().filter(runs) {
        let age = |pod: &Value| pod["metadata"]["creationTimestamp"].as_str().unwrap_or_default().to_owned();
        let there = newest.entry(node_of(pod)).or_insert(pod);
        if age(pod) > age(there) {
            *there = pod;
        }
    }
    let questions = newest.into_values().map(|pod| async move {
        let place = Pod::of(server, pod);
        Agent {
            node: node_of(pod).to_owned(),
            status: remote::ask(&place, &["status"]).await,
            certificates: remote::ask(&place, &["certificates"]).await,
            told: ask::agent(server, pod, clock).await,
        }
    });
    Ok(futures_util::stream::iter(questions).buffered(AT_ONCE).collect().await)
}

/// What an agent's views say. One that cannot be asked has said so.
pub(super) fn of_agent(agent: &Agent, now: SystemTime) -> Vec<Finding> {
    let node = &agent.node;
    let status = match &agent.status {
        Ok(status) => status,
        // Who may only look sees what the API server knows.
        Err(failure) if failure.exit == Exit::NoPermission => return vec![skipped(&failure.message).on(node)],
        Err(failure) => return vec![wrong(&failure.message).on(node)],
    };
    let mut found = Vec::new();
    if !status.ready {
        found.push(wrong(format!("the agent waits for {}", status.waiting_for.join(", "))));
    }
    let plural = |n: usize, one: &str| if n == 1 { format!("1 {one}") } else { format!("{n} {one}s") };
    if status.errors > 0 {
        let errors = plural(status.errors, "error");
        found.push(warning(format!("{errors} in the configuration; see `meshctl problems --node {node}`")));
    }
    if status.refused_pods > 0 {
        let refused = plural(status.refused_pods, "pod");
        let text = format!("{refused} could not be taken into the mesh; see `meshctl workloads --node {node}`");
        found.push(warning(text));
    }
    match &agent.certificates {
        Ok(certificates) => found.extend(of_certificates(certificates, node, now)),
        Err(failure) => found.push(wrong(&failure.message)),
    }
    if found.is_empty() {
        let (pods, certificates) = (plural(status.enrolled_pods, "pod"), plural(status.certificates, "certificate"));
        found.push(fine(match status.enrolled_pods {
            0 => "no pod is in the mesh yet; `meshctl namespace enable NAME` takes those of a namespace in".to_owned(),
            _ => format!("{pods} in the mesh, {certificates} good and renewed in time"),
        }));
    }
    found.into_iter().map(|finding| finding.on(node)).collect()
}

fn of_certificates(all: &[CertificateInfo], node: &str, now: SystemTime) -> Vec<Finding> {
    let now = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs().try_into().unwrap_or(i64::MAX);
    let see = format!("see `meshctl certificates --node {node}`");
    let (mut missing, mut late) = (Vec::new(), Vec::new());
    for certificate in all {
        let (from, until) = (parse_rfc3339(&certificate.not_before), parse_rfc3339(&certificate.not_after));
        match (from, until) {
            (Some(from), Some(until)) if until > now => {
                // It is renewed at half its life, and tried again from then on.
                if (until - now) * 4 < until - from {
                    late.push((&certificate.identity, until - now));
                }
            }
            _ => missing.push(&certificate.identity),
        }
    }
    let mut found = Vec::new();
    if let Some(first) = missing.first() {
        found.push(wrong(format!(
            "{} of {} identities have no certificate that is good, such as {first}; {see}",
            missing.len(),
            all.len()
        )));
    }
    if let Some((first, rest)) = late.iter().min_by_key(|(_, rest)| *rest) {
        let rest = age(u64::try_from(*rest).unwrap_or_default());
        found.push(warning(format!("the certificate of {first} is good for {rest} only and not renewed; {see}")));
    }
    found
}

/// The root that agents trust, and what signs, where we may see it.
pub(super) async fn authority(
    server: &ApiServer,
    mesh: &str,
    now: SystemTime,
) -> anyhow::Result<(Vec<Finding>, Vec<Validity>)> {
    const ROTATE: &str = "change it with `mesh-agent controller rotate-root`, or bring a new one";
    let Some(bundle) = server.get(&Kind::CONFIG_MAP, mesh, "nodemesh-ca-root").await? else {
        let text = "ConfigMap nodemesh-ca-root is missing, so no agent knows whom to trust; see the controller's log";
        return Ok((vec![wrong(text)], Vec::new()));
    };
    let roots = match validities(bundle["data"]["root-cert.pem"].as_str().unwrap_or_default()) {
        Ok(roots) if !roots.is_empty() => roots,
        Ok(_) => {
            return Ok((
                vec![wrong("ConfigMap nodemesh-ca-root has no certificate; see the controller's log")],
                Vec::new(),
            ));
        }
        Err(e) => {
            return Ok((vec![wrong(format!("ConfigMap nodemesh-ca-root: {e}; see the controller's log"))], Vec::new()));
        }
    };
    let mut found = vec![of_authority("root certificate", &roots, now, ROTATE)];
    let secret = match server.get(&Kind::SECRET, mesh, "nodemesh-ca").await {
        Err(ApiError::Forbidden { .. }) => {
            found.push(skipped("the certificate that signs, since you may not read the Secret nodemesh-ca"));
            None
        }
        secret => secret?,
    };
    if let Some(signer) = secret.and_then(|secret| signer(&secret)) {
        found.push(of_authority("certificate that signs", &[signer], now, ROTATE));
    }
    Ok((found, roots))
}

/// Of the Secret, in Istio's form or cert-manager's: the first certificate of the chain.
fn signer(secret: &Value) -> Option<Validity> {
    use base64::Engine;
    let text = ["ca-cert.pem", "tls.crt"].iter().find_map(|key| secret["data"][key].as_str())?;
    let pem = base64::engine::general_purpose::STANDARD.decode(text).ok()?;
    validities(&String::from_utf8(pem).ok()?).ok()?.first().copied()
}

/// The one of several that is good the longest counts: a change of root has two for a while.
fn of_authority(what: &str, all: &[Validity], now: SystemTime, next: &str) -> Finding {
    let until = all.iter().map(|one| one.not_after).max().unwrap_or(SystemTime::UNIX_EPOCH);
    match until.duration_since(now) {
        Err(_) => wrong(format!("the {what} has expired, so nothing is trusted; {next}")),
        Ok(rest) if rest < ROOT_SOON => warning(format!("the {what} is good for {} only; {next}", age(rest.as_secs()))),
        Ok(rest) => fine(format!("the {what} is good for {}", age(rest.as_secs()))),
    }
}

/// Versions as the programs themselves have them: labels say only what was installed.
pub(super) async fn versions(server: &ApiServer, mesh: &str, agents: &[Agent]) -> Result<Vec<Finding>, ApiError> {
    let mut controllers = Vec::new();
    let all = pods(server, mesh, CONTROLLER).await?;
    for pod in all.iter().filter(|pod| is_ready(pod)) {
        let command = ["/usr/bin/mesh-agent", "--version"].map(str::to_owned).into();
        // Who may not ask is told so of the agents.
        let Ok(said) = remote::run(&Pod::of(server, pod), command).await else { continue };
        let said = String::from_utf8_lossy(&said);
        controllers.extend(said.split_whitespace().last().map(str::to_owned));
    }
    let agents = agents.iter().filter_map(|agent| Some(agent.status.as_ref().ok()?.version.clone())).collect();
    Ok(of_versions(VERSION, controllers, agents))
}

fn of_versions(own: &str, mut controllers: Vec<String>, mut agents: Vec<String>) -> Vec<Finding> {
    for versions in [&mut controllers, &mut agents] {
        versions.sort_by_key(|version| numbers(version));
        versions.dedup();
    }
    if controllers.iter().chain(&agents).all(|version| version == own) {
        let all = !controllers.is_empty() && !agents.is_empty();
        return all.then(|| fine(format!("meshctl, controllers and agents are {own}"))).into_iter().collect();
    }
    let mut found = Vec::new();
    let newest = |versions: &[String]| versions.last().map(|version| numbers(version));
    if controllers.first().map(|version| numbers(version)) < newest(&agents) && !controllers.is_empty() {
        found.push(wrong(format!(
            "controllers ({}) are older than agents ({}), whom they may not understand; run `meshctl upgrade`",
            controllers.join(", "),
            agents.join(", ")
        )));
    }
    let listed = |all: &[String]| if all.is_empty() { "not known".to_owned() } else { all.join(", ") };
    let next = match newest(&agents).max(newest(&controllers)) > Some(numbers(own)) {
        true => "use the meshctl of that version",
        false => "`meshctl upgrade` brings them together",
    };
    found.push(warning(format!(
        "meshctl is {own}, controllers are {}, agents {}; {next}",
        listed(&controllers),
        listed(&agents)
    )));
    found
}

/// `0.10.2-rc1` as something that can be compared.
fn numbers(version: &str) -> Vec<u64> {
    version.split(|c: char| !c.is_ascii_digit()).map(|part| part.parse().unwrap_or_default()).collect()
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use serde_json::json;

    use super::super::finding::Level;
    use super::*;

    fn at(text: &str) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(parse_rfc3339(text).unwrap().try_into().unwrap())
    }

    #[test]
    fn an_agent_that_drains_is_not_one_that_is_not_ready() {
        let pod = |node: &str, until: Option<&str>| {
            json!({"metadata": {"name": "old", "deletionTimestamp": until}, "spec": {"nodeName": node},
                   "status": {"conditions": [{"type": "Ready", "status": "True"}]}})
        };
        let old = pod("n1", Some("2026-08-22T10:11:12Z"));
        let (new, far) = (pod("n1", None), pod("n2", None));
        let drained = drains(&old, &[&new], at("2026-08-22T10:01:12Z"));
        assert_eq!(drained.level, Level::Fine);
        assert!(drained.text.contains("until 2026-08-22T10:11:12Z at most (10m)"), "{drained:?}");
        assert_eq!(drained.nodes, ["n1"]);
        assert_eq!(drains(&old, &[&far], at("2026-08-22T10:01:12Z")).level, Level::Warning, "nobody serves n1");
        assert_eq!(drains(&old, &[&new], at("2026-08-22T10:12:12Z")).level, Level::Wrong, "it is overdue");
    }

    fn certificate(identity: &str, from: &str, until: &str) -> CertificateInfo {
        CertificateInfo {
            identity: identity.to_owned(),
            state: "ready".to_owned(),
            serial: String::new(),
            not_before: from.to_owned(),
            not_after: until.to_owned(),
            roots: Vec::new(),
            problem: None,
        }
    }

    #[test]
    fn certificates_are_judged_by_their_time() {
        let now = at("2026-08-22T12:00:00Z");
        let judged = |all: &[CertificateInfo]| of_certificates(all, "n1", now);
        let good = certificate("good", "2026-08-22T00:00:00Z", "2026-08-23T00:00:00Z");
        assert_eq!(judged(std::slice::from_ref(&good)), []);
        let late = judged(&[certificate("late", "2026-08-21T13:00:00Z", "2026-08-22T13:00:00Z")]);
        assert!(late[0].level == Level::Warning && late[0].text.contains("late is good for 1h only"), "{late:?}");
        let ended = certificate("ended", "2026-08-21T10:00:00Z", "2026-08-22T10:00:00Z");
        let none = certificate("none", "", "");
        let bad = judged(&[good, ended, none]);
        assert!(bad[0].level == Level::Wrong && bad[0].text.contains("2 of 3"), "{bad:?}");
    }

    #[test]
    fn a_root_is_told_before_it_expires() {
        let until = |text: &str| Validity { not_before: at("2020-01-01T00:00:00Z"), not_after: at(text) };
        let judged = |all: &[Validity]| of_authority("root", all, at("2026-08-22T12:00:00Z"), "next").level;
        assert_eq!(judged(&[until("2030-01-01T00:00:00Z")]), Level::Fine);
        assert_eq!(judged(&[until("2026-09-01T00:00:00Z")]), Level::Warning);
        assert_eq!(judged(&[until("2026-08-22T11:59:59Z")]), Level::Wrong);
        assert_eq!(judged(&[until("2026-09-01T00:00:00Z"), until("2030-01-01T00:00:00Z")]), Level::Fine);
        assert_eq!(judged(&[]), Level::Wrong);
    }

    #[test]
    fn versions_that_differ_say_who_is_to_follow_whom() {
        let judged = |controllers: &[&str], agents: &[&str]| {
            let owned = |all: &[&str]| all.iter().map(|v| (*v).to_owned()).collect();
            of_versions("0.9.0", owned(controllers), owned(agents))
        };
        assert_eq!(judged(&["0.9.0", "0.9.0"], &["0.9.0"])[0].level, Level::Fine);
        let behind = judged(&["0.8.0"], &["0.8.0", "0.8.0"]);
        assert!(behind.len() == 1 && behind[0].text.contains("meshctl upgrade"), "{behind:?}");
        let ahead = judged(&["0.10.0"], &["0.10.0"]);
        assert!(ahead[0].text.contains("use the meshctl of that version"), "{ahead:?}");
        let wrong = judged(&["0.8.0"], &["0.8.0", "0.9.0"]);
        assert!(wrong[0].level == Level::Wrong && wrong[0].text.contains("controllers (0.8.0) are older"), "{wrong:?}");
        assert_eq!(judged(&[], &[]), []);
    }
}
