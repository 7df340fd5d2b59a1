//! Making the cluster's objects be what the chart says, and taking away those that it says no more.

use std::io::Write;
use std::time::Duration;

use serde_json::Value;

use super::objects::{KINDS, OURS, is_ours, kind_of, name, namespace, order, title};
use super::{Access, diff};
use crate::api_server::{ApiError, ApiServer, Kind};
use crate::cli::exit::Failure;
use crate::cli::meshctl::chart::Rendered;

/// Who owns the fields that an installation sets.
pub(super) const MANAGER: &str = "meshctl";
/// Written by meshctl itself beside the chart's objects: with which values it was installed.
pub(super) const RECORD: &str = "nodemesh-install";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Done {
    Created,
    Changed,
    Same,
}

/// What there is to apply, in order.
pub(super) struct Plan {
    pub(super) objects: Vec<Value>,
    /// Kinds that somebody else has installed, and which stay as they are.
    pub(super) foreign: Vec<String>,
}

/// Kinds that are there from elsewhere are left alone, and so is a namespace.
pub(super) async fn plan(server: &ApiServer, rendered: Rendered) -> anyhow::Result<Plan> {
    let (mut objects, mut foreign) = (Vec::new(), Vec::new());
    for document in rendered.crds.into_iter().chain(rendered.objects) {
        let object = document.object;
        let kind = kind_of(&object)?;
        if *kind == Kind::CUSTOM_RESOURCE_DEFINITION || *kind == Kind::NAMESPACE {
            let there = server.get(kind, "", name(&object)).await?;
            if there.is_some_and(|there| !is_ours(&there)) {
                foreign.push(title(&object));
                continue;
            }
        }
        objects.push(object);
    }
    objects.sort_by_key(order);
    Ok(Plan { objects, foreign })
}

/// Applies one object, or looks what would become of it.
pub(super) async fn apply(server: &ApiServer, object: &Value, dry_run: bool) -> anyhow::Result<Done> {
    let (kind, space, name) = (kind_of(object)?, namespace(object), name(object));
    let before = server.get(kind, space, name).await?;
    if before.is_none() && dry_run {
        // Its namespace may be missing too, which a trial would stumble over.
        return Ok(Done::Created);
    }
    let after = server.apply(kind, space, name, "", object, MANAGER, dry_run).await?;
    Ok(match before {
        None => Done::Created,
        Some(before) if diff::as_written(&before) == diff::as_written(&after) => Done::Same,
        Some(_) => Done::Changed,
    })
}

/// Kinds into which a user's values go.
const BY_VALUES: [&str; 5] = ["ConfigMap", "Service", "PodDisruptionBudget", "Deployment", "DaemonSet"];

/// Whether the API server takes the objects that values make: what it refuses must not be found out half way. The namespace
/// must be there.
pub(super) async fn trial(server: &ApiServer, objects: &[Value]) -> anyhow::Result<()> {
    for object in objects.iter().filter(|o| BY_VALUES.iter().any(|kind| o["kind"] == *kind)) {
        let (kind, space, name) = (kind_of(object)?, namespace(object), name(object));
        match server.apply(kind, space, name, "", object, MANAGER, true).await {
            Err(ApiError::Refused { why, .. }) => {
                let why = reason(&why);
                return Err(Failure::usage(format!(
                    "nothing was installed, since the API server refuses the {}: {why}; correct that value",
                    title(object)
                ))
                .into());
            }
            tried => drop(tried?),
        }
    }
    Ok(())
}

/// Of `failed to convert ...: unable to convert unstructured object to apps/v1, Kind=X: reason` only what tells more.
fn reason(why: &str) -> &str {
    let converted =
        why.split_once("unable to convert unstructured object to ").and_then(|(_, rest)| rest.split_once(": "));
    converted.map_or(why, |(_, reason)| reason).trim_end_matches('.')
}

/// Says what was done, a line for each object that is another now.
pub(super) async fn apply_all(
    server: &ApiServer,
    objects: &[Value],
    dry_run: bool,
    out: &mut impl Write,
) -> anyhow::Result<()> {
    let mut same = 0;
    for object in objects {
        let word = match (apply(server, object, dry_run).await?, dry_run) {
            (Done::Created, false) => "created",
            (Done::Changed, false) => "changed",
            (Done::Created, true) => "would create",
            (Done::Changed, true) => "would change",
            (Done::Same, _) => {
                same += 1;
                continue;
            }
        };
        writeln!(out, "  {word:9} {}", title(object))?;
        if !dry_run && object["kind"] == *Kind::CUSTOM_RESOURCE_DEFINITION.kind {
            established(server, name(object)).await?;
        }
    }
    if same > 0 {
        writeln!(out, "  {:9} {same} {}", "as it was:", if same == 1 { "object" } else { "objects" })?;
    }
    Ok(())
}

/// A kind can be used a moment after its definition is there.
async fn established(server: &ApiServer, name: &str) -> anyhow::Result<()> {
    let limit = tokio::time::Instant::now() + Duration::from_secs(30);
    loop {
        let there = server.get(&Kind::CUSTOM_RESOURCE_DEFINITION, "", name).await?.unwrap_or_default();
        let conditions = there["status"]["conditions"].as_array();
        if conditions.into_iter().flatten().any(|c| c["type"] == "Established" && c["status"] == "True") {
            return Ok(());
        }
        if tokio::time::Instant::now() > limit {
            return Err(Failure::unavailable(format!(
                "the API server does not take up the kind {name}; see `kubectl describe crd {name}`, then run this again"
            ))
            .into());
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Objects of ours that `objects` does not name: left by an older version, or by other values.
pub(super) async fn leftovers(access: &Access, server: &ApiServer, objects: &[Value]) -> Result<Vec<Value>, ApiError> {
    let mut found = Vec::new();
    for object in ours(server, &access.namespace).await? {
        let kept = objects.iter().any(|o| o["kind"] == object["kind"] && name(o) == name(&object));
        // Kinds hold what users have written; a namespace holds everything; the record is no part of the chart.
        let stays = ["CustomResourceDefinition", "Namespace", "Lease"].iter().any(|kind| object["kind"] == *kind)
            || name(&object) == RECORD;
        if !kept && !stays {
            found.push(object);
        }
    }
    Ok(found)
}

/// All objects of ours: of the mesh's namespace, and those without one.
pub(super) async fn ours(server: &ApiServer, mesh: &str) -> Result<Vec<Value>, ApiError> {
    let mut found = Vec::new();
    for kind in &KINDS {
        let place = kind.namespaced.then_some(mesh);
        for mut object in server.list(kind, place, OURS).await? {
            // Items of a list do not say of which kind they are.
            object["kind"] = (*kind.kind).into();
            object["apiVersion"] = kind.api_version().into();
            found.push(object);
        }
    }
    Ok(found)
}

/// Takes objects away, and says so.
pub(super) async fn remove(
    server: &ApiServer,
    objects: &[Value],
    dry_run: bool,
    out: &mut impl Write,
) -> anyhow::Result<()> {
    for object in objects {
        let word = if dry_run { "would remove" } else { "removed" };
        if dry_run || server.delete(kind_of(object)?, namespace(object), name(object)).await? {
            writeln!(out, "  {word:9} {}", title(object))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_refusal_the_reason_is_told() {
        let long = "failed to convert new object (a/b; apps/v1, Kind=DaemonSet) to proper version: unable to convert \
                    unstructured object to apps/v1, Kind=DaemonSet: quantities must match '^x$'";
        assert_eq!(reason(long), "quantities must match '^x$'");
        assert_eq!(reason("spec.x: Invalid value: \"y\"."), "spec.x: Invalid value: \"y\"");
    }
}
