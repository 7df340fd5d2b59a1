//! Has nodes tell how they are: by the agent's program, in the agent's pod, or where there is none in a pod that is made for it
//! and taken away again.

use std::io::Write;
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use serde_json::{Value, json};

use super::node::{Places, Told};
use crate::api_server::{ApiError, ApiServer, Kind, ServerClock};
use crate::cli::exit::Failure;
use crate::cli::facts::Facts;
use crate::cli::meshctl::cluster::objects::{AGENT, name};
use crate::cli::meshctl::cluster::ready::{self, POLL};
use crate::cli::meshctl::cluster::remote::{self, Pod};
use crate::cli::meshctl::layout::wrap;
use crate::lifecycle::Signals;

/// Of its pods, and of the namespace where the mesh has none yet.
const CHECK: &str = "nodemesh-check";
/// How long a node's pod may take, the image included.
const LIMIT: Duration = Duration::from_secs(60);
const AT_ONCE: usize = 16;

/// The agent of a pod, by its own program.
pub(super) async fn agent(server: &ApiServer, pod: &Value, clock: Option<ServerClock>) -> Result<Told, Failure> {
    let container = container(&pod["spec"]);
    let words = |key: &str| container[key].as_array().into_iter().flatten().filter_map(Value::as_str);
    let command: Vec<String> = words("command").chain(words("args")).chain(["--facts"]).map(str::to_owned).collect();
    let asked = Instant::now();
    let facts = remote::ask_program(&Pod::of(server, pod), command).await?;
    Ok(told(facts, clock, asked))
}

fn told(facts: Facts, clock: Option<ServerClock>, asked: Instant) -> Told {
    Told { facts, between: clock.map(|clock| (clock.earliest(asked), clock.latest(Instant::now()))) }
}

fn container(spec: &Value) -> Value {
    let all = spec["containers"].as_array();
    all.into_iter().flatten().find(|c| c["name"] == "agent").cloned().unwrap_or_default()
}

/// Where an agent made of this template finds the node's folders.
pub(super) fn places(template: &Value) -> Places {
    let path = |volume: &str| {
        let volumes = template["spec"]["volumes"].as_array();
        let found = volumes.into_iter().flatten().find(|v| v["name"] == volume);
        found.and_then(|v| v["hostPath"]["path"].as_str()).unwrap_or_default().to_owned()
    };
    Places { cgroup: path("cgroup"), bpffs: path("bpffs"), cni_conf: path("cni-conf"), cni_bin: path("cni-bin") }
}

/// Each of `nodes` by a pod like the agent's of `template`. All that is made is gone when this returns, also where it fails or
/// is interrupted.
pub(super) async fn pods(
    server: &ApiServer,
    mesh: &str,
    template: &Value,
    nodes: &[String],
    clock: Option<ServerClock>,
    out: &mut dyn Write,
) -> anyhow::Result<Vec<(String, Result<Told, String>)>> {
    let mut signals = Signals::new()?;
    let made = server.get(&Kind::NAMESPACE, "", mesh).await?.is_none();
    let space = if made { CHECK } else { mesh };
    let what = if made { format!(" in the namespace {CHECK}, made for it,") } else { format!(" in namespace {mesh}") };
    let text = format!(
        "looking  at {} by a pod on each{what} with the agent's image and rights, gone in a moment",
        many(nodes)
    );
    writeln!(out, "{}", wrap(&text, 80, 9))?;
    out.flush()?;
    if made {
        own_namespace(server).await?;
    }
    let looking = async {
        let questions = nodes.iter().map(|node| async {
            let told = by_pod(server, space, template, node, clock).await;
            (node.clone(), told)
        });
        futures_util::stream::iter(questions).buffered(AT_ONCE).collect::<Vec<_>>().await
    };
    let told = tokio::select! {
        told = looking => Some(told),
        _ = signals.recv() => None,
    };
    // Whatever came before.
    for node in nodes {
        server.end_pod(space, &pod_name(node), 0).await?;
    }
    if made {
        server.delete(&Kind::NAMESPACE, "", CHECK).await?;
        gone(server).await?;
    }
    let told = told.ok_or_else(|| Failure::unavailable("interrupted; the pods that looked at nodes are removed"))?;
    told.into_iter().map(|(node, told)| Ok((node, told?))).collect()
}

fn many(nodes: &[String]) -> String {
    match nodes {
        [one] => format!("node {one}"),
        several => format!("{} nodes", several.len()),
    }
}

fn pod_name(node: &str) -> String {
    format!("{CHECK}-{node}")
}

/// Two checks at once would take each other's pods away.
async fn own_namespace(server: &ApiServer) -> anyhow::Result<()> {
    let space = json!({
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {"name": CHECK, "labels": {"pod-security.kubernetes.io/enforce": "privileged"}},
    });
    let left = server.get(&Kind::NAMESPACE, "", CHECK).await?;
    if left.is_some_and(|space| !space["metadata"]["deletionTimestamp"].is_null()) {
        gone(server).await?;
    }
    match server.create(&Kind::NAMESPACE, "", &space).await {
        Ok(_) => Ok(()),
        Err(ApiError::Conflict { .. }) => Err(Failure::unavailable(format!(
            "there is a namespace {CHECK} already: another `meshctl check --nodes` runs, or was cut off; wait for it, or \
             `kubectl delete namespace {CHECK}`"
        ))
        .into()),
        Err(e) => Err(e.into()),
    }
}

/// Waits until the namespace is gone. One that something holds goes later.
async fn gone(server: &ApiServer) -> Result<(), ApiError> {
    let start = Instant::now();
    while server.get(&Kind::NAMESPACE, "", CHECK).await?.is_some() && start.elapsed() < LIMIT {
        tokio::time::sleep(POLL).await;
    }
    Ok(())
}

/// Pods of a look that was cut off in the middle.
pub(in crate::cli::meshctl::cluster) async fn forget(server: &ApiServer, space: &str) -> Result<(), ApiError> {
    for pod in server.list(&Kind::POD, Some(space), &format!("app={CHECK}")).await? {
        server.end_pod(space, name(&pod), 0).await?;
    }
    Ok(())
}

/// What a node has told in its pod. The inner error is of that node alone.
async fn by_pod(
    server: &ApiServer,
    space: &str,
    template: &Value,
    node: &str,
    clock: Option<ServerClock>,
) -> anyhow::Result<Result<Told, String>> {
    let pod = pod(template, space, node);
    let start = Instant::now();
    // One of an earlier check that was cut off.
    while server.end_pod(space, name(&pod), 0).await? && start.elapsed() < LIMIT {
        tokio::time::sleep(POLL).await;
    }
    loop {
        match server.create(&Kind::POD, space, &pod).await {
            Ok(_) => break,
            // A namespace that is new has no service account yet.
            Err(ApiError::Forbidden { why }) if why.contains("serviceaccount") && start.elapsed() < LIMIT => {
                tokio::time::sleep(POLL).await;
            }
            Err(e) => return Err(e.into()),
        }
    }
    let asked = Instant::now();
    loop {
        let there = server.get(&Kind::POD, space, name(&pod)).await?.unwrap_or_default();
        let phase = there["status"]["phase"].as_str().unwrap_or_default();
        if phase == "Succeeded" || phase == "Failed" {
            let line = ready::log_line(server, space, name(&pod)).await.unwrap_or_default();
            return Ok(match serde_json::from_str::<Facts>(&line) {
                Ok(facts) => Ok(told(facts, clock, asked)),
                Err(_) if line.is_empty() => Err("the program that was to look at it ended without a word".to_owned()),
                Err(_) => Err(line.trim_start_matches("mesh-agent: ").to_owned()),
            });
        }
        let why = match ready::trouble(&there) {
            Some(why) => Some(why),
            None => unmountable(server, space, name(&pod)).await?,
        };
        match why {
            Some(why) => return Ok(Err(why)),
            None if start.elapsed() > LIMIT => {
                let limit = LIMIT.as_secs();
                return Ok(Err(format!("no pod has run there within {limit} s")));
            }
            None => tokio::time::sleep(POLL).await,
        }
    }
}

/// A folder of the node that is not there shows in an Event only.
async fn unmountable(server: &ApiServer, space: &str, pod: &str) -> Result<Option<String>, ApiError> {
    let selector = format!("involvedObject.name%3D{pod},reason%3DFailedMount");
    let path = format!("{}?fieldSelector={selector}", Kind::EVENT.path(space, None));
    let events = server.request("GET", &path, None, None).await?;
    let message = events["items"][0]["message"].as_str().map(str::to_owned);
    // `MountVolume.SetUp failed for volume "x" : hostPath type check failed: /y is not a directory`
    Ok(message.map(|text| text.rsplit(" : ").next().unwrap_or_default().to_owned()))
}

/// The agent's pod, with `--facts`, without what would make something on the node.
fn pod(template: &Value, space: &str, node: &str) -> Value {
    let mut container = container(&template["spec"]);
    for key in ["startupProbe", "readinessProbe", "livenessProbe", "resources"] {
        container[key] = Value::Null;
    }
    if let Some(Value::Array(args)) = container.get_mut("args") {
        args.retain(|arg| !arg.as_str().is_some_and(|arg| arg.starts_with("--settings")));
        args.push("--facts".into());
    }
    let wanted = ["bpffs", "proc", "cgroup", "cni-conf", "cni-bin"];
    let is_wanted = |item: &Value| wanted.iter().any(|name| item["name"] == *name);
    if let Some(Value::Array(mounts)) = container.get_mut("volumeMounts") {
        mounts.retain(is_wanted);
        for mount in mounts.iter_mut().filter(|mount| mount["name"] != "bpffs") {
            mount["readOnly"] = true.into();
        }
    }
    let mut volumes: Vec<Value> = template["spec"]["volumes"].as_array().cloned().unwrap_or_default();
    volumes.retain(is_wanted);
    for volume in &mut volumes {
        volume["hostPath"]["type"] = "Directory".into();
    }
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": pod_name(node), "namespace": space, "labels": {"app": CHECK}},
        "spec": {
            "nodeName": node,
            "restartPolicy": "Never",
            "hostNetwork": true,
            "automountServiceAccountToken": false,
            "enableServiceLinks": false,
            "terminationGracePeriodSeconds": 0,
            // It ends also where nobody is left to remove it.
            "activeDeadlineSeconds": LIMIT.as_secs() * 2,
            "tolerations": [{"operator": "Exists"}],
            "imagePullSecrets": template["spec"]["imagePullSecrets"],
            "containers": [container],
            "volumes": volumes,
        },
    })
}

/// Those of the cluster's nodes on which an agent of this template is to run.
pub(super) fn fit(nodes: &[Value], template: &Value) -> Vec<String> {
    let wanted = template["spec"]["nodeSelector"].as_object();
    let fits =
        |node: &&Value| wanted.into_iter().flatten().all(|(key, value)| node["metadata"]["labels"][key] == *value);
    nodes.iter().filter(fits).map(|node| name(node).to_owned()).collect()
}

/// The template of the agents: of those that are installed, or of those that would be.
pub(super) async fn template(server: &ApiServer, mesh: &str) -> Result<Option<Value>, ApiError> {
    Ok(server.get(&Kind::DAEMON_SET, mesh, AGENT).await?.map(|agent| agent["spec"]["template"].clone()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::meshctl::chart::{Given, complete, overrides, render};

    fn agents() -> Value {
        let values = complete(&overrides(&Given::default()).unwrap()).unwrap();
        let rendered = render(&values, "mesh").unwrap();
        let agent = rendered.objects.into_iter().map(|d| d.object).find(|o| o["kind"] == "DaemonSet").unwrap();
        agent["spec"]["template"].clone()
    }

    #[test]
    fn a_node_is_looked_at_with_the_agents_rights_and_nothing_is_made_on_it() {
        let template = agents();
        let pod = pod(&template, "there", "n1");
        let (spec, container) = (&pod["spec"], &pod["spec"]["containers"][0]);
        let agent = &template["spec"]["containers"][0];
        assert_eq!((&spec["nodeName"], &container["image"]), (&json!("n1"), &agent["image"]));
        assert_eq!(container["securityContext"], agent["securityContext"]);
        let args: Vec<&str> = container["args"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
        assert_eq!((args.first(), args.last()), (Some(&"node"), Some(&"--facts")));
        for volume in spec["volumes"].as_array().unwrap() {
            assert_eq!(volume["hostPath"]["type"], "Directory", "{volume} might be made");
        }
        let names: Vec<&str> =
            container["volumeMounts"].as_array().unwrap().iter().filter_map(|m| m["name"].as_str()).collect();
        assert_eq!(names, ["bpffs", "proc", "cgroup", "cni-conf", "cni-bin"]);
    }

    #[test]
    fn folders_are_named_as_the_node_has_them() {
        let Places { cgroup, bpffs, cni_conf, cni_bin } = places(&agents());
        assert_eq!((cgroup.as_str(), bpffs.as_str()), ("/sys/fs/cgroup", "/sys/fs/bpf"));
        assert_eq!((cni_conf.as_str(), cni_bin.as_str()), ("/etc/cni/net.d", "/opt/cni/bin"));
    }

    #[test]
    fn nodes_without_an_agent_are_left_out() {
        let node = |name: &str, os: &str| json!({"metadata": {"name": name, "labels": {"kubernetes.io/os": os}}});
        assert_eq!(fit(&[node("a", "linux"), node("b", "windows")], &agents()), ["a"]);
    }
}
