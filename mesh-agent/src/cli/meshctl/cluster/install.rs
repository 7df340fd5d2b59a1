//! `meshctl install`: the chart's objects into a cluster, in order, until all of it is ready. Can be run again.

use std::io::Write;
use std::time::Duration;

use serde_json::{Value, json};

use super::apply::{self, MANAGER, RECORD};
use super::objects::{AGENT, CLUSTER_ROLE_BINDING};
use super::turn::Turn;
use super::{Access, check, handover, ready};
use crate::api_server::{ApiServer, Kind};
use crate::cli::exit::Failure;
use crate::cli::meshctl::chart::{self, Given, VERSION};
use crate::cli::meshctl::layout::wrap;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::cli::meshctl) struct Install {
    pub(in crate::cli::meshctl) given: Given,
    pub(in crate::cli::meshctl) dry_run: bool,
    pub(in crate::cli::meshctl) timeout: Duration,
    /// Go on though connections will be cut.
    pub(in crate::cli::meshctl) yes: bool,
}

/// The chart as meshctl installs it: with the namespace, which Helm makes by itself.
pub(super) fn rendered(overrides: &Value, namespace: &str) -> anyhow::Result<chart::Rendered> {
    let mut overrides = overrides.clone();
    if overrides["namespace"]["create"].is_null() {
        overrides["namespace"] = json!({"create": true});
    }
    chart::render(&chart::complete(&overrides)?, namespace)
}

pub(super) async fn install(access: &Access, wish: &Install, out: &mut impl Write) -> anyhow::Result<()> {
    let Install { given, dry_run, .. } = wish;
    let overrides = chart::overrides(given)?;
    let rendered = rendered(&overrides, &access.namespace)?;
    let server = access.connect().await?;
    check::may_install(&server, access).await?;
    let profile = given.profile.as_deref().unwrap_or("default");
    writeln!(out, "Nodemesh {VERSION}, profile {profile}, namespace {}", access.namespace)?;
    let plan = apply::plan(&server, rendered).await?;
    for foreign in &plan.foreign {
        writeln!(out, "  left      {foreign}: it is there already, from elsewhere")?;
    }
    if *dry_run {
        apply::apply_all(&server, &plan.objects, true, out).await?;
        let leftovers = apply::leftovers(access, &server, &plan.objects).await?;
        apply::remove(&server, &leftovers, true, out).await?;
        return Ok(writeln!(out, "nothing was changed (--dry-run)")?);
    }
    // The turn is noted in it.
    if server.get(&Kind::NAMESPACE, "", &access.namespace).await?.is_none() {
        let is_it = |object: &&Value| object["kind"] == *Kind::NAMESPACE.kind;
        let space: Vec<Value> = plan.objects.iter().filter(is_it).cloned().collect();
        apply::apply_all(&server, &space, false, out).await?;
    }
    let turn = Turn::take(&server, access, "meshctl install").await?;
    turn.during(all(&server, access, wish, &plan.objects, &overrides, out)).await
}

async fn all(
    server: &ApiServer,
    access: &Access,
    wish: &Install,
    objects: &[Value],
    overrides: &Value,
    out: &mut impl Write,
) -> anyhow::Result<()> {
    apply::trial(server, objects).await?;
    handover::judge(server, access, objects, wish.yes, out).await?;
    apply::apply_all(server, objects, false, out).await?;
    let leftovers = apply::leftovers(access, server, objects).await?;
    apply::remove(server, &leftovers, false, out).await?;
    record(server, access, overrides).await?;
    ready::wait(server, &access.namespace, &ready::WORKLOADS, wish.timeout, out).await?;
    let next = "Nodemesh is installed. `meshctl namespace enable NAME` brings the pods of a namespace into the mesh, \
                `meshctl check` looks at all of it.";
    Ok(writeln!(out, "{}", wrap(next, 80, 0))?)
}

/// Keeps with what it was installed, for the next upgrade.
pub(super) async fn record(server: &ApiServer, access: &Access, overrides: &Value) -> anyhow::Result<()> {
    let object = json!({
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {
            "name": RECORD,
            "namespace": access.namespace,
            "labels": {"app.kubernetes.io/name": "nodemesh", "app.kubernetes.io/part-of": "nodemesh"},
        },
        "data": {"version": VERSION, "values.yaml": chart::yaml::print(overrides)},
    });
    server.apply(&Kind::CONFIG_MAP, &access.namespace, RECORD, "", &object, MANAGER, false).await?;
    Ok(())
}

/// The values of the last installation by meshctl. `None`: there was none.
pub(super) async fn recorded(server: &ApiServer, access: &Access) -> anyhow::Result<Option<Value>> {
    let Some(record) = server.get(&Kind::CONFIG_MAP, &access.namespace, RECORD).await? else { return Ok(None) };
    let text = record["data"]["values.yaml"].as_str().unwrap_or_default();
    match chart::yaml::parse(text) {
        Ok(values) => Ok(Some(values)),
        Err(why) => Err(Failure::data(format!(
            "ConfigMap {RECORD} in namespace {} does not say with which values it was installed ({why}); give them \
             again with -f or --set",
            access.namespace
        ))
        .into()),
    }
}

/// Where a mesh is installed already, if anywhere.
pub(super) async fn installed_in(server: &ApiServer) -> anyhow::Result<Option<String>> {
    let binding = server.get(&CLUSTER_ROLE_BINDING, "", AGENT).await?;
    Ok(binding.and_then(|b| b["subjects"][0]["namespace"].as_str().map(str::to_owned)))
}
