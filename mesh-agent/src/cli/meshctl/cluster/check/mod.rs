//! `meshctl check`: whether a cluster can take the mesh, and how it is once it has.
//!
//! The API server tells what it knows; each agent tells of its node, in its own pod. Where no agent runs a node can be looked at
//! only by a pod, which is made on request.

mod ask;
mod cluster;
mod finding;
mod mesh;
mod node;

use std::collections::BTreeSet;
use std::io::Write;
use std::time::{Instant, SystemTime};

use serde_json::Value;

pub(super) use self::ask::forget;
use self::finding::{Finding, Level, fine, gathered, print, skipped, unless_forbidden, warning, wrong};
use super::install::{installed_in, recorded, rendered};
use super::{Access, objects};
use crate::api_server::{ApiError, ApiServer, Kind, ServerClock};
use crate::cli::exit::Failure;
use crate::cli::facts::Facts;
use crate::cli::meshctl::args::Output;
use crate::cli::meshctl::chart::{self, Given};
use crate::identity::Validity;

/// What is to be looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::cli::meshctl) struct Check {
    /// What would be installed, where nothing is yet.
    pub(in crate::cli::meshctl) given: Given,
    /// Nodes without an agent too, by a pod on each.
    pub(in crate::cli::meshctl) nodes: bool,
}

/// Fails where something is wrong, so that a script can go by it.
pub(super) async fn check(access: &Access, wish: &Check, output: Output, out: &mut impl Write) -> anyhow::Result<()> {
    let overrides = chart::overrides(&wish.given)?;
    let server = access.connect().await?;
    let clock = server.clock().await?;
    let mesh = &access.namespace;
    let mut found = vec![cluster::version(&server).await?];
    if found[0].level == Level::Wrong {
        // It does not know what else is asked for.
        return done(&found, output, out);
    }
    let installed = installed(&server, mesh).await;
    let mut rights = cluster::rights(&server, access, "patch").await?;
    if rights.level == Level::Wrong && matches!(&installed, Ok(Some(there)) if there == mesh) {
        // Who may only look may do so.
        rights.level = Level::Warning;
    }
    found.push(rights);
    let nodes = server.list(&Kind::NODE, None, "").await;
    found.extend(unless_forbidden("the nodes", nodes.as_deref().map(cluster::of_nodes).map_err(again))?);
    let values = recorded(&server, access).await.ok().flatten().unwrap_or_else(|| overrides.clone());
    let istio_labels = values["settings"]["istioLabels"] == true;
    found.extend(unless_forbidden("other meshes", cluster::neighbours(&server, istio_labels).await)?);
    let looked =
        Looked { server: &server, access, wish, overrides: &overrides, clock, nodes: nodes.unwrap_or_default() };
    // JSON stays JSON.
    let mut nothing = std::io::sink();
    let progress: &mut dyn Write = if output == Output::Json { &mut nothing } else { out };
    let rest = match installed {
        Ok(None) => looked.before(progress).await,
        Ok(Some(there)) if there == *mesh => looked.after(progress).await,
        Ok(Some(there)) => Ok(vec![cluster::elsewhere(&there)]),
        Err(e) => Err(e),
    };
    found.extend(unless_forbidden("the mesh itself", rest)?);
    done(&gathered(found), output, out)
}

fn done(found: &[Finding], output: Output, out: &mut impl Write) -> anyhow::Result<()> {
    print(found, output, out)?;
    match found.iter().filter(|finding| finding.level == Level::Wrong).count() {
        0 => Ok(()),
        1 => Err(Failure::data("one thing is wrong; what to do stands with it").into()),
        n => Err(Failure::data(format!("{n} things are wrong; what to do stands with each")).into()),
    }
}

/// Where a mesh is installed. Who may not see what belongs to no namespace may see whether it is in this one.
async fn installed(server: &ApiServer, mesh: &str) -> anyhow::Result<Option<String>> {
    match installed_in(server).await {
        Err(e) if matches!(e.downcast_ref(), Some(ApiError::Forbidden { .. })) => {
            let agent = server.get(&Kind::DAEMON_SET, mesh, objects::AGENT).await?;
            Ok(agent.map(|_| mesh.to_owned()))
        }
        found => found,
    }
}

/// The same error once more: it is told, and decides what else can be seen.
fn again(error: &ApiError) -> anyhow::Error {
    match error {
        ApiError::Forbidden { why } => ApiError::Forbidden { why: why.clone() }.into(),
        other => Failure::unavailable(other.to_string()).into(),
    }
}

struct Looked<'a> {
    server: &'a ApiServer,
    access: &'a Access,
    wish: &'a Check,
    overrides: &'a Value,
    clock: Option<ServerClock>,
    nodes: Vec<Value>,
}

impl Looked<'_> {
    /// By the API server's clock, or this machine's where that is not known.
    fn now(&self) -> SystemTime {
        self.clock.map_or_else(SystemTime::now, |clock| clock.earliest(Instant::now()))
    }

    async fn before(&self, out: &mut dyn Write) -> anyhow::Result<Vec<Finding>> {
        let mut found = vec![fine("Nodemesh is not installed; `meshctl install` does it")];
        let rendered = rendered(self.overrides, &self.access.namespace)?;
        let agent = rendered.objects.iter().map(|d| &d.object).find(|o| o["kind"] == "DaemonSet");
        let template = agent.map(|agent| agent["spec"]["template"].clone()).unwrap_or_default();
        let nodes = ask::fit(&self.nodes, &template);
        found.extend(self.by_pods(&template, &nodes, false, &[], out).await?);
        Ok(found)
    }

    /// What only a pod can see of these nodes.
    async fn by_pods(
        &self,
        template: &Value,
        nodes: &[String],
        installed: bool,
        roots: &[Validity],
        out: &mut dyn Write,
    ) -> anyhow::Result<Vec<Finding>> {
        if nodes.is_empty() {
            return Ok(Vec::new());
        }
        if !self.wish.nodes {
            let mut found = skipped(
                "kernel features, cgroup2, bpffs, CNI and clock; `meshctl check --nodes` looks, by a pod on each node for \
                 a moment",
            );
            found.nodes = nodes.to_vec();
            return Ok(vec![found]);
        }
        let places = ask::places(template);
        let told = ask::pods(self.server, &self.access.namespace, template, nodes, self.clock, out).await?;
        Ok(told
            .into_iter()
            .flat_map(|(name, told)| match told {
                Ok(told) => node::judge(&told, &places, installed, roots),
                Err(why) => {
                    vec![wrong(format!("it cannot be looked at: {why}; mend it, as an agent needs the same")).on(&name)]
                }
            })
            .collect())
    }

    async fn after(&self, out: &mut dyn Write) -> anyhow::Result<Vec<Finding>> {
        let (server, mesh, now) = (self.server, &self.access.namespace, self.now());
        let mut found = mesh::workloads(server, mesh, now).await?;
        let agents = mesh::agents(server, mesh, self.clock).await?;
        found.extend(mesh::versions(server, mesh, &agents).await?);
        let (of_authority, roots) = mesh::authority(server, mesh, now).await?;
        found.extend(of_authority);
        let template = ask::template(server, mesh).await?.unwrap_or_default();
        let places = ask::places(&template);
        let mut seen = BTreeSet::new();
        for agent in &agents {
            found.extend(mesh::of_agent(agent, now));
            match &agent.told {
                Ok(told) => {
                    seen.insert(agent.node.clone());
                    found.extend(node::judge(told, &places, true, &roots));
                }
                // It could not be asked for anything, and has said so.
                Err(_) if agent.status.is_err() => {}
                Err(failure) => {
                    let text = format!("it does not tell how its node is: {}", failure.message);
                    found.push(warning(text).on(&agent.node));
                }
            }
        }
        let mut rest = ask::fit(&self.nodes, &template);
        rest.retain(|node| !seen.contains(node));
        found.extend(self.by_pods(&template, &rest, true, &roots, out).await?);
        Ok(found)
    }
}

/// What an installation needs, before it changes anything.
pub(super) async fn may_install(server: &ApiServer, access: &Access) -> anyhow::Result<()> {
    let fails = |finding: Finding| match finding.level {
        Level::Wrong => Err(Failure::unavailable(format!("nothing was changed: {}", finding.text))),
        _ => Ok(()),
    };
    // One after the other: each is asked what only the one before makes sure of.
    fails(cluster::version(server).await?)?;
    fails(cluster::rights(server, access, "patch").await?)?;
    if let Some(mesh) = installed_in(server).await?.filter(|mesh| *mesh != access.namespace) {
        fails(cluster::elsewhere(&mesh))?;
    }
    Ok(())
}

/// What an uninstallation needs.
pub(super) async fn may_uninstall(server: &ApiServer, access: &Access) -> anyhow::Result<()> {
    match cluster::rights(server, access, "delete").await? {
        Finding { level: Level::Wrong, text, .. } => {
            Err(Failure::no_permission(format!("nothing was changed: {text}")).into())
        }
        _ => Ok(()),
    }
}

/// What the agent of a pod tells of its node and of itself.
pub(super) async fn facts_of(server: &ApiServer, pod: &Value) -> Result<Facts, Failure> {
    ask::agent(server, pod, None).await.map(|told| told.facts)
}

/// What an agent of this template tells, tried on one node beside the agent that runs there. The error is a sentence: of what
/// it would fail on.
pub(super) async fn try_out(
    server: &ApiServer,
    mesh: &str,
    template: &Value,
    node: &str,
) -> anyhow::Result<Result<Facts, String>> {
    let nodes = [node.to_owned()];
    let mut told = ask::pods(server, mesh, template, &nodes, None, &mut std::io::sink()).await?;
    let Some((_, told)) = told.pop() else { return Ok(Err("it could not be looked at".to_owned())) };
    let told = match told {
        Ok(told) => told,
        Err(why) => return Ok(Err(why)),
    };
    let judged = node::judge(&told, &ask::places(template), true, &[]);
    // What its folders are like is no reason not to replace what serves there already.
    let kernel =
        judged.into_iter().find(|finding| finding.level == Level::Wrong && !told.facts.kernel.refused.is_empty());
    Ok(kernel.map_or(Ok(told.facts), |finding| Err(finding.text)))
}

/// For other commands that want to know of an installation before they ask for its pods.
pub(super) fn not_installed(mesh: &str) -> Failure {
    Failure::unavailable(format!(
        "no agent of Nodemesh runs in namespace {mesh}; install it with `meshctl install`, or give --mesh-namespace"
    ))
}
