//! `meshctl upgrade`: the version of this meshctl in place of the one that runs, one node after the other.
//!
//! The controller goes first: older agents understand it. Then the agents, as the DaemonSet's update strategy says; at
//! the first node whose agent does not become ready it is stopped, and the nodes that are left keep what they have.

use std::collections::BTreeSet;
use std::io::Write;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::Instant;

use super::apply;
use super::install::{Install, record, recorded, rendered};
use super::objects::{AGENT, CONTROLLER, name};
use super::ready::{self, POLL, is_ready, node_of, pods, trouble};
use super::turn::Turn;
use super::{Access, check, handover};
use crate::api_server::{ApiServer, Kind};
use crate::cli::exit::Failure;
use crate::cli::meshctl::chart::{self, VERSION};

/// Trouble of an agent that starts may pass: its predecessor still has something, or the API server is busy.
const PATIENCE: Duration = Duration::from_secs(20);

pub(super) async fn upgrade(access: &Access, wish: &Install, out: &mut impl Write) -> anyhow::Result<()> {
    let Install { given, dry_run, .. } = wish;
    let server = access.connect().await?;
    let mesh = &access.namespace;
    let before = preflight(&server, access).await?;
    // As it was installed, unless something else is said now.
    let overrides = match recorded(&server, access).await? {
        Some(values) if given.is_empty() => values,
        Some(mut values) => {
            chart::merge(&mut values, chart::overrides(given)?);
            values
        }
        None => chart::overrides(given)?,
    };
    writeln!(out, "Nodemesh {before} -> {VERSION}, namespace {mesh}")?;
    let plan = apply::plan(&server, rendered(&overrides, mesh)?).await?;
    if *dry_run {
        return all(&server, access, wish, plan.objects, &overrides, out).await;
    }
    let turn = Turn::take(&server, access, "meshctl upgrade").await?;
    turn.during(all(&server, access, wish, plan.objects, &overrides, out)).await
}

async fn all(
    server: &ApiServer,
    access: &Access,
    wish: &Install,
    objects: Vec<Value>,
    overrides: &Value,
    out: &mut impl Write,
) -> anyhow::Result<()> {
    let Install { dry_run, timeout, yes, given: _ } = wish;
    let mesh = &access.namespace;
    if !dry_run {
        apply::trial(server, &objects).await?;
        handover::judge(server, access, &objects, *yes, out).await?;
    }
    let (agent, others): (Vec<Value>, Vec<Value>) = objects.into_iter().partition(|o| o["kind"] == "DaemonSet");
    apply::apply_all(server, &others, *dry_run, out).await?;
    if !dry_run {
        ready::wait(server, mesh, &[(Kind::DEPLOYMENT, CONTROLLER)], *timeout, out).await?;
    }
    apply::apply_all(server, &agent, *dry_run, out).await?;
    if !dry_run {
        follow(server, mesh, *timeout, out).await?;
        record(server, access, overrides).await?;
    }
    let all: Vec<Value> = others.into_iter().chain(agent).collect();
    let leftovers = apply::leftovers(access, server, &all).await?;
    apply::remove(server, &leftovers, *dry_run, out).await?;
    let end = if *dry_run { "nothing was changed (--dry-run)" } else { "all nodes are upgraded" };
    Ok(writeln!(out, "{end}")?)
}

/// What runs must be whole: an upgrade of what is broken could not be told from a broken upgrade. The answer is the
/// version that runs.
async fn preflight(server: &ApiServer, access: &Access) -> anyhow::Result<String> {
    let mesh = &access.namespace;
    check::may_install(server, access).await?;
    let Some(agent) = ready::workload(server, mesh, &Kind::DAEMON_SET, AGENT).await? else {
        return Err(Failure::usage(format!(
            "there is no Nodemesh in namespace {mesh}; install it with `meshctl install`, or name another with --namespace"
        ))
        .into());
    };
    for pod in pods(server, mesh, AGENT).await? {
        // One that drains has handed its pods over already.
        let drains = !pod["metadata"]["deletionTimestamp"].is_null();
        if !drains && !is_ready(&pod) {
            let why = trouble(&pod).unwrap_or_else(|| format!("{} on {} is not ready", name(&pod), node_of(&pod)));
            // The upgrade may be the cure: of the last upgrade's victim, whose image is wrong.
            if agent["spec"]["updateStrategy"]["type"] != "OnDelete" {
                return Err(Failure::unavailable(format!(
                    "nothing was upgraded, since what runs is not well: {why}; see `meshctl check`"
                ))
                .into());
            }
        }
    }
    let version = agent["metadata"]["labels"]["app.kubernetes.io/version"].as_str();
    Ok(version.unwrap_or("of unknown version").to_owned())
}

/// Says of each node when its agent is the new one, and stops where one does not become ready in time.
async fn follow(server: &ApiServer, mesh: &str, timeout: Duration, out: &mut impl Write) -> anyhow::Result<()> {
    let mut told = BTreeSet::new();
    let mut last = Instant::now();
    loop {
        let agent = ready::workload(server, mesh, &Kind::DAEMON_SET, AGENT).await?.unwrap_or_default();
        let progress = ready::progress(&agent);
        if !progress.seen {
            // The newest revision would be that of before.
            tokio::time::sleep(POLL).await;
            continue;
        }
        let newest = ready::revision(server, mesh, &agent).await?;
        let pods = pods(server, mesh, AGENT).await?;
        let new = |pod: &&Value| pod["metadata"]["labels"]["controller-revision-hash"] == *newest;
        for pod in pods.iter().filter(new).filter(|pod| is_ready(pod)) {
            if told.insert(node_of(pod).to_owned()) {
                let seconds = last.elapsed().as_secs_f64();
                writeln!(out, "  ready     {} ({seconds:.1} s), {} of {}", node_of(pod), told.len(), progress.wanted)?;
                out.flush()?;
                last = Instant::now();
            }
        }
        // Not as the DaemonSet's status has it: it counts an agent that drains as the node's until it has ended.
        if told.len() as u64 >= progress.wanted {
            return Ok(());
        }
        let ill = pods.iter().filter(new).find_map(|pod| trouble(pod).filter(|_| last.elapsed() > PATIENCE));
        let late = last.elapsed() > timeout;
        if ill.is_some() || late {
            stop(server, mesh).await?;
            let why = ill.unwrap_or_else(|| format!("no agent became ready within {} s", timeout.as_secs()));
            return Err(Failure::unavailable(format!(
                "stopped after {} of {} nodes: {why}; the others keep what they have, and `meshctl upgrade` goes on \
                 once it is mended",
                told.len(),
                progress.wanted
            ))
            .into());
        }
        tokio::time::sleep(POLL).await;
    }
}

/// No further node, not even if this one recovers. The next upgrade sets the strategy anew.
async fn stop(server: &ApiServer, mesh: &str) -> anyhow::Result<()> {
    let patch = json!({"spec": {"updateStrategy": {"type": "OnDelete", "rollingUpdate": null}}});
    server.merge(&Kind::DAEMON_SET, mesh, AGENT, "", &patch).await?;
    Ok(())
}
