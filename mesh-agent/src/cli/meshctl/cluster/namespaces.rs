//! `meshctl namespace`: which namespaces are in the mesh, and the switch for it.

use std::io::Write;

use serde_json::{Value, json};

use super::Access;
use super::objects::{MODE, STATUS, name, namespace};
use crate::api_server::{ApiError, Kind};
use crate::cli::exit::Failure;
use crate::cli::meshctl::args::Output;
use crate::cli::meshctl::layout::{Cut, Mood, Screen, Table, column};

/// Sets or takes away the label of each namespace.
pub(super) async fn switch(
    access: &Access,
    names: &[String],
    enable: bool,
    out: &mut impl Write,
) -> anyhow::Result<()> {
    let server = access.connect().await?;
    for space in names {
        if enable && (*space == access.namespace || space == "kube-system") {
            return Err(
                Failure::usage(format!("namespace {space} cannot be in the mesh: the mesh itself needs it")).into()
            );
        }
    }
    for space in names {
        let mode = if enable { "enabled" } else { "disabled" };
        let patch = json!({"metadata": {"labels": {MODE: mode}}});
        match server.merge(&Kind::NAMESPACE, "", space, "", &patch).await {
            Ok(_) => writeln!(out, "namespace {space}: {MODE}={mode}")?,
            Err(ApiError::NotFound { .. }) => {
                return Err(
                    Failure::usage(format!("there is no namespace {space}; see `kubectl get namespaces`")).into()
                );
            }
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

pub(super) async fn list(access: &Access, output: Output, screen: Screen, out: &mut impl Write) -> anyhow::Result<()> {
    let server = access.connect().await?;
    let spaces = server.list(&Kind::NAMESPACE, None, "").await?;
    let pods = server.list(&Kind::POD, None, "").await?;
    let rows: Vec<Value> = spaces.iter().map(|space| row(space, &pods)).collect();
    if output == Output::Json {
        return Ok(writeln!(out, "{}", serde_json::to_string_pretty(&rows)?)?);
    }
    let columns = ["NAMESPACE", "MODE", "IN THE MESH", "REFUSED", "PODS"];
    let mut table = Table::new(columns.map(|title| column(title, Cut::Never)).into());
    for row in &rows {
        let cell = |key: &str| row[key].as_str().map_or_else(|| row[key].to_string(), str::to_owned);
        let mood = match (row["mode"].as_str(), row["refused"].as_u64()) {
            (_, Some(1..)) => Mood::Warning,
            (Some("enabled"), _) => Mood::Good,
            _ => Mood::Plain,
        };
        let cells = ["namespace", "mode", "enrolled", "refused", "pods"].map(|key| (cell(key), mood));
        table.row(cells.into());
    }
    Ok(out.write_all(table.render(screen).as_bytes())?)
}

fn row(space: &Value, pods: &[Value]) -> Value {
    let of_it: Vec<&Value> = pods.iter().filter(|pod| namespace(pod) == name(space)).collect();
    let with = |begin: &str| {
        let status = |pod: &&&Value| {
            pod["metadata"]["annotations"][STATUS].as_str().is_some_and(|status| status.starts_with(begin))
        };
        of_it.iter().filter(status).count()
    };
    let mode = match space["metadata"]["labels"][MODE].as_str() {
        None => "-".to_owned(),
        Some(mode @ ("enabled" | "disabled")) => mode.to_owned(),
        Some(wrong) => format!("{wrong}?"),
    };
    json!({
        "namespace": name(space), "mode": mode, "enrolled": with("enabled"), "refused": with("refused"),
        "pods": of_it.len(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_namespace_is_counted_by_its_pods() {
        let space = json!({"metadata": {"name": "shop", "labels": {MODE: "enabled"}}});
        let pod = |space: &str, status: Option<&str>| json!({"metadata": {"name": "a", "namespace": space, "annotations": status.map(|s| json!({STATUS: s}))}});
        let pods = [
            pod("shop", Some("enabled")),
            pod("shop", Some("refused: hostNetwork")),
            pod("shop", None),
            pod("other", Some("enabled")),
        ];
        let expected = json!({"namespace": "shop", "mode": "enabled", "enrolled": 1, "refused": 1, "pods": 3});
        assert_eq!(row(&space, &pods), expected);
        let wrong = json!({"metadata": {"name": "shop", "labels": {MODE: "on"}}});
        assert_eq!(row(&wrong, &[])["mode"], "on?", "a label that means nothing stands out");
    }
}
