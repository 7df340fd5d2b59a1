//! `meshctl uninstall --kubernetes`: the mesh out of a cluster, so that nothing of it is left.
//!
//! The agents end first, since nothing may be taken out of the kernel under them; then a pod on each node removes what
//! the agent has left there; then go the objects, and the namespace last.

use std::collections::BTreeSet;
use std::io::Write;
use std::time::Duration;

use futures_util::StreamExt;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::objects::{AGENT, STATUS, is_ours, name, namespace, order};
use super::ready::{self, POLL, node_of, pods};
use super::remote::{self, Pod};
use super::turn::Turn;
use super::{Access, apply, check};
use crate::api_server::{ApiServer, Kind};
use crate::cli::exit::Failure;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::cli::meshctl) struct Uninstall {
    pub(in crate::cli::meshctl) timeout: Duration,
    /// Go on though a node could not be cleaned.
    pub(in crate::cli::meshctl) force: bool,
    /// Remove the kinds too, with all policies.
    pub(in crate::cli::meshctl) purge: bool,
}

const CLEANUP: &str = "nodemesh-cleanup";
/// For an agent to end, in seconds: it lets connections go on for five.
const GRACE: u32 = 10;
const AT_ONCE: usize = 16;
/// Of the agent's folders on a node: below which name they may be removed with all that is in them.
const OWN_FOLDER: &str = "nodemesh";
/// On the DaemonSet: the nodes that have to be cleaned.
const NODES: &str = "nodemesh.io/uninstalled-nodes";
/// What the controller writes on its ConfigMaps; one of that name without it is somebody else's.
const CONTROLLERS: &str = "app.kubernetes.io/managed-by=nodemesh";
const TRUST: &str = "nodemesh-ca-root";

pub(super) async fn uninstall(access: &Access, wish: &Uninstall, out: &mut impl Write) -> anyhow::Result<()> {
    let server = access.connect().await?;
    let mesh = access.namespace.as_str();
    check::may_uninstall(&server, access).await?;
    let ours = apply::ours(&server, mesh).await?;
    if ours.is_empty() {
        return Ok(writeln!(out, "nothing of Nodemesh is left in namespace {mesh} or beside it")?);
    }
    if server.get(&Kind::NAMESPACE, "", mesh).await?.is_none() {
        return remove_all(&server, mesh, ours, wish, out).await;
    }
    let turn = Turn::take(&server, access, "meshctl uninstall").await?;
    turn.during(remove_all(&server, mesh, ours, wish, out)).await
}

async fn remove_all(
    server: &ApiServer,
    mesh: &str,
    mut ours: Vec<Value>,
    wish: &Uninstall,
    out: &mut impl Write,
) -> anyhow::Result<()> {
    // The webhook before its controller, so that it keeps nobody waiting.
    let (webhooks, rest): (Vec<Value>, Vec<Value>) =
        ours.drain(..).partition(|o| o["kind"] == "ValidatingWebhookConfiguration");
    apply::remove(server, &webhooks, false, out).await?;
    nodes(server, mesh, wish, out).await?;
    let (kinds, mut rest): (Vec<Value>, Vec<Value>) =
        rest.into_iter().partition(|o| o["kind"] == "CustomResourceDefinition");
    rest.retain(|o| !["DaemonSet", "Namespace"].iter().any(|kind| o["kind"] == *kind));
    rest.sort_by_key(|object| std::cmp::Reverse(order(object)));
    apply::remove(server, &rest, false, out).await?;
    gone(server, mesh, "nodemesh-controller", wish.timeout).await?;
    traces(server, mesh, out).await?;
    definitions(server, &kinds, wish.purge, out).await?;
    own_namespace(server, mesh, wish.timeout, out).await?;
    Ok(writeln!(out, "Nodemesh is uninstalled")?)
}

/// Ends the agents and cleans their nodes.
async fn nodes(server: &ApiServer, mesh: &str, wish: &Uninstall, out: &mut impl Write) -> anyhow::Result<()> {
    let Some(agent) = server.get(&Kind::DAEMON_SET, mesh, AGENT).await? else { return Ok(()) };
    // A try that was cut short has stopped the agents already; it has written down where they were.
    let mut nodes: BTreeSet<String> =
        pods(server, mesh, AGENT).await?.iter().map(|pod| node_of(pod).to_owned()).collect();
    let before = agent["metadata"]["annotations"][NODES].as_str().unwrap_or_default();
    nodes.extend(before.split(',').filter(|node| !node.is_empty()).map(str::to_owned));
    let there = server.list(&Kind::NODE, None, "").await?;
    nodes.retain(|node| there.iter().any(|n| name(n) == node));
    let mut draining = pods(server, mesh, AGENT).await?;
    draining.retain(|pod| !pod["metadata"]["deletionTimestamp"].is_null());
    let list = nodes.iter().cloned().collect::<Vec<_>>().join(",");
    // No agent may come back while its node is cleaned.
    let nowhere = json!({
        "metadata": {"annotations": {NODES: list}},
        "spec": {"template": {"spec": {"nodeSelector": {"nodemesh.io/nowhere": "true"}}}},
    });
    server.merge(&Kind::DAEMON_SET, mesh, AGENT, "", &nowhere).await?;
    writeln!(out, "  stopping  the agents of {} nodes", nodes.len())?;
    out.flush()?;
    // One that another has taken over from would go on for as long as its last connection.
    cut(server, &draining).await;
    for pod in pods(server, mesh, AGENT).await? {
        server.end_pod(mesh, name(&pod), GRACE).await?;
    }
    gone(server, mesh, AGENT, wish.timeout).await?;
    let template = &agent["spec"]["template"];
    for node in &nodes {
        let pod = cleanup_pod(template, mesh, node);
        server.delete(&Kind::POD, mesh, name(&pod)).await?;
        one_gone(server, mesh, name(&pod), wish.timeout).await?;
        server.create(&Kind::POD, mesh, &pod).await?;
    }
    let mut failed = Vec::new();
    for node in &nodes {
        match cleaned(server, mesh, node, wish.timeout).await? {
            None => writeln!(out, "  cleaned   node {node}")?,
            Some(why) => {
                writeln!(out, "  failed    node {node}: {why}")?;
                failed.push(node.as_str());
            }
        }
        out.flush()?;
    }
    if !failed.is_empty() && !wish.force {
        return Err(Failure::unavailable(format!(
            "{} not clean, so nothing else was removed; mend it and run this again, or add --force to leave it as it is",
            listed(&failed)
        ))
        .into());
    }
    server.delete(&Kind::DAEMON_SET, mesh, AGENT).await?;
    writeln!(out, "  removed   DaemonSet {AGENT}")?;
    for node in &nodes {
        server.delete(&Kind::POD, mesh, &cleanup_name(node)).await?;
    }
    gone(server, mesh, CLEANUP, wish.timeout).await
}

/// Agents that were told to end before and still have connections open: these end now. Not by the API server's `gracePeriodSeconds`
/// alone, since a container runtime that waits for a container to stop waits for as long as it was told first.
async fn cut(server: &ApiServer, draining: &[Value]) {
    let ends = draining.iter().map(|pod| async move {
        let command = ["/usr/bin/meshctl", "end"].map(str::to_owned).into();
        // That the container ends under it is no answer, and is what was asked for. What goes on is seen below.
        let _ = remote::run(&Pod::of(server, pod), command).await;
    });
    futures_util::stream::iter(ends).buffer_unordered(AT_ONCE).collect::<Vec<()>>().await;
}

fn listed(nodes: &[&str]) -> String {
    match nodes {
        [one] => format!("node {one} is"),
        several => format!("nodes {} are", several.join(", ")),
    }
}

fn cleanup_name(node: &str) -> String {
    format!("{CLEANUP}-{node}")
}

/// The agent's pod with another command: the same image, rights and folders.
fn cleanup_pod(template: &Value, mesh: &str, node: &str) -> Value {
    let mut spec = template["spec"].clone();
    spec["restartPolicy"] = "Never".into();
    // Not by the scheduler: a node that is full or cordoned has to be cleaned too.
    spec["nodeName"] = node.into();
    spec["nodeSelector"] = json!({});
    spec["tolerations"] = json!([{"operator": "Exists"}]);
    spec["terminationGracePeriodSeconds"] = 1.into();
    if let Some(container) = spec["containers"].get_mut(0) {
        for probe in ["startupProbe", "readinessProbe", "livenessProbe"] {
            container[probe] = Value::Null;
        }
        if let Some(Value::Array(args)) = container.get_mut("args") {
            // The ConfigMap may be wrong, or gone, and says nothing that is needed.
            args.retain(|arg| !arg.as_str().is_some_and(|arg| arg.starts_with("--settings")));
            args.push("--cleanup".into());
        }
        remove_named(container.get_mut("volumeMounts"), &["settings", "token"]);
    }
    remove_named(spec.get_mut("volumes"), &["settings", "token"]);
    for volume in ["sockets", "state"] {
        remove_folder(&mut spec, volume);
    }
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": cleanup_name(node),
            "namespace": mesh,
            "labels": {"app": CLEANUP, "app.kubernetes.io/name": "nodemesh", "app.kubernetes.io/part-of": "nodemesh"},
        },
        "spec": spec,
    })
}

/// Nobody can remove the folder that is mounted for him: the one above is mounted instead.
fn remove_folder(spec: &mut Value, volume: &str) {
    let place =
        |spec: &Value, list: &str| spec.pointer(list)?.as_array()?.iter().position(|item| item["name"] == volume);
    let (volumes, mounts) = ("/volumes", "/containers/0/volumeMounts");
    let (Some(at), Some(mount)) = (place(spec, volumes), place(spec, mounts)) else { return };
    let path = spec["volumes"][at]["hostPath"]["path"].as_str().unwrap_or_default().to_owned();
    let Some((above, OWN_FOLDER)) = path.trim_end_matches('/').rsplit_once('/') else { return };
    if above.is_empty() {
        return;
    }
    let there = format!("/host/above-{volume}");
    spec["volumes"][at]["hostPath"] = json!({"path": above, "type": "Directory"});
    spec["containers"][0]["volumeMounts"][mount]["mountPath"] = there.as_str().into();
    if let Some(args) = spec["containers"][0]["args"].as_array_mut() {
        if volume == "sockets"
            && !args.iter().any(|arg| arg.as_str().is_some_and(|arg| arg.starts_with("--admin-socket")))
        {
            // Where it is seen whether an agent still runs.
            args.push(format!("--admin-socket={there}/{OWN_FOLDER}/admin.sock").into());
        }
        args.push(format!("--remove-folder={there}/{OWN_FOLDER}").into());
    }
}

fn remove_named(list: Option<&mut Value>, names: &[&str]) {
    if let Some(Value::Array(items)) = list {
        items.retain(|item| !names.iter().any(|name| item["name"] == *name));
    }
}

/// Waits for a node's clean-up; says why it failed.
async fn cleaned(server: &ApiServer, mesh: &str, node: &str, timeout: Duration) -> anyhow::Result<Option<String>> {
    let pod = cleanup_name(node);
    let start = Instant::now();
    loop {
        let there = server.get(&Kind::POD, mesh, &pod).await?.unwrap_or_default();
        match there["status"]["phase"].as_str() {
            Some("Succeeded") => return Ok(None),
            Some("Failed") => {
                let line = ready::log_line(server, mesh, &pod).await;
                return Ok(Some(line.unwrap_or_else(|| "it ended without a word".to_owned())));
            }
            _ if start.elapsed() > timeout => {
                let why = ready::trouble(&there).unwrap_or_else(|| format!("{pod} has not run"));
                return Ok(Some(format!("{why} within {} s", timeout.as_secs())));
            }
            _ => tokio::time::sleep(POLL).await,
        }
    }
}

/// Waits until no pod of this kind is left.
async fn gone(server: &ApiServer, mesh: &str, app: &str, timeout: Duration) -> anyhow::Result<()> {
    let start = Instant::now();
    loop {
        let left = pods(server, mesh, app).await?;
        let Some(pod) = left.first() else { return Ok(()) };
        if start.elapsed() > timeout {
            return Err(Failure::unavailable(format!(
                "{} on {} did not end within {} s; is that node reachable? mend or remove it, then run this again",
                name(pod),
                node_of(pod),
                timeout.as_secs()
            ))
            .into());
        }
        tokio::time::sleep(POLL).await;
    }
}

async fn one_gone(server: &ApiServer, mesh: &str, pod: &str, timeout: Duration) -> anyhow::Result<()> {
    let start = Instant::now();
    while server.get(&Kind::POD, mesh, pod).await?.is_some() {
        if start.elapsed() > timeout {
            return Err(Failure::unavailable(format!(
                "{pod} of an earlier try does not end; remove it, then run this again"
            ))
            .into());
        }
        tokio::time::sleep(POLL).await;
    }
    Ok(())
}

/// What controller and agents have written at other places.
async fn traces(server: &ApiServer, mesh: &str, out: &mut impl Write) -> anyhow::Result<()> {
    let mut count = 0;
    for map in server.list(&Kind::CONFIG_MAP, None, CONTROLLERS).await? {
        if name(&map) == TRUST {
            count += usize::from(server.delete(&Kind::CONFIG_MAP, namespace(&map), TRUST).await?);
        }
    }
    if count > 0 {
        writeln!(out, "  removed   ConfigMap {TRUST} from {count} namespaces")?;
    }
    if server.delete(&Kind::LEASE, mesh, "nodemesh-controller").await? {
        writeln!(out, "  removed   Lease nodemesh-controller")?;
    }
    let patch = json!({"metadata": {"annotations": {STATUS: null}}});
    let mut count = 0;
    for pod in server.list(&Kind::POD, None, "").await? {
        if !pod["metadata"]["annotations"][STATUS].is_null() {
            server.merge(&Kind::POD, namespace(&pod), name(&pod), "", &patch).await?;
            count += 1;
        }
    }
    if count > 0 {
        writeln!(out, "  removed   annotation {STATUS} from {count} pods")?;
    }
    Ok(())
}

/// A definition goes only with all objects of its kind, which are the user's.
async fn definitions(server: &ApiServer, kinds: &[Value], purge: bool, out: &mut impl Write) -> anyhow::Result<()> {
    for definition in kinds {
        let text = |path: &str| definition.pointer(path).and_then(Value::as_str).unwrap_or_default().to_owned();
        let kind = Kind {
            group: text("/spec/group").into(),
            version: "v1".into(),
            plural: text("/spec/names/plural").into(),
            kind: text("/spec/names/kind").into(),
            namespaced: true,
        };
        let count = server.list(&kind, None, "").await?.len();
        if count > 0 && !purge {
            writeln!(out, "  left      {}: {count} of that kind are there, and --purge removes them too", kind.kind)?;
        } else if server.delete(&Kind::CUSTOM_RESOURCE_DEFINITION, "", name(definition)).await? {
            writeln!(out, "  removed   CustomResourceDefinition {}", name(definition))?;
        }
    }
    Ok(())
}

/// Only one that an installation has made.
async fn own_namespace(server: &ApiServer, mesh: &str, timeout: Duration, out: &mut impl Write) -> anyhow::Result<()> {
    let Some(space) = server.get(&Kind::NAMESPACE, "", mesh).await? else { return Ok(()) };
    if !is_ours(&space) {
        if server.get(&Kind::SECRET, mesh, "nodemesh-ca").await?.is_some() {
            writeln!(out, "  left      Secret nodemesh-ca in namespace {mesh}: the CA's key")?;
        }
        return Ok(writeln!(out, "  left      Namespace {mesh}, which was there before")?);
    }
    server.delete(&Kind::NAMESPACE, "", mesh).await?;
    let start = Instant::now();
    while server.get(&Kind::NAMESPACE, "", mesh).await?.is_some() {
        if start.elapsed() > timeout {
            return Err(Failure::unavailable(format!(
                "namespace {mesh} is still being removed after {} s; see `kubectl get namespace {mesh} -o yaml` for what holds it",
                timeout.as_secs()
            ))
            .into());
        }
        tokio::time::sleep(POLL).await;
    }
    Ok(writeln!(out, "  removed   Namespace {mesh}")?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::meshctl::chart::{Given, complete, overrides, render};

    #[test]
    fn a_node_is_cleaned_by_the_agents_own_pod() {
        let values = complete(&overrides(&Given::default()).unwrap()).unwrap();
        let rendered = render(&values, "mesh").unwrap();
        let agent = rendered.objects.iter().map(|d| &d.object).find(|o| o["kind"] == "DaemonSet").unwrap();
        let pod = cleanup_pod(&agent["spec"]["template"], "mesh", "n1");
        let container = &pod["spec"]["containers"][0];
        let args: Vec<&str> = container["args"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
        assert!(args.first() == Some(&"node") && args.contains(&"--cleanup"), "{args:?}");
        assert!(args.contains(&"--cgroup=/host/cgroup") && !args.iter().any(|a| a.starts_with("--settings")));
        assert_eq!(pod["spec"]["nodeName"], "n1");
        assert_eq!(container["livenessProbe"], Value::Null);
        assert_eq!(container["securityContext"], agent["spec"]["template"]["spec"]["containers"][0]["securityContext"]);
        let volumes: Vec<&str> =
            pod["spec"]["volumes"].as_array().unwrap().iter().filter_map(|v| v["name"].as_str()).collect();
        assert!(volumes.contains(&"bpffs") && !volumes.contains(&"token"), "{volumes:?}");
        // The agent's folders go with all that is in them: by the ones above, where they lie.
        for (volume, above) in [("sockets", "/run"), ("state", "/var/lib")] {
            let is_it = |item: &&Value| item["name"] == volume;
            let found = pod["spec"]["volumes"].as_array().unwrap().iter().find(is_it).unwrap();
            assert_eq!(found["hostPath"]["path"], above);
            let mount = container["volumeMounts"].as_array().unwrap().iter().find(is_it).unwrap();
            let folder = format!("--remove-folder={}/nodemesh", mount["mountPath"].as_str().unwrap());
            assert!(args.contains(&folder.as_str()), "{folder} is not in {args:?}");
        }
    }

    #[test]
    fn a_folder_that_is_not_the_agents_alone_stays() {
        for path in ["/var/lib/other", "/nodemesh", "/run/nodemesh/deeper", ""] {
            let mut spec = json!({
                "volumes": [{"name": "state", "hostPath": {"path": path}}],
                "containers": [{"args": [], "volumeMounts": [{"name": "state", "mountPath": "/var/lib/nodemesh"}]}],
            });
            let before = spec.clone();
            remove_folder(&mut spec, "state");
            assert_eq!(spec, before, "{path}");
        }
    }
}
