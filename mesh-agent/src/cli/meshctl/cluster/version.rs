//! `meshctl version`: of this program, and of what runs in the cluster.

use std::io::Write;

use serde_json::json;

use super::Access;
use super::objects::{AGENT, CONTROLLER, name};
use super::ready::{node_of, pods};
use crate::cli::meshctl::args::Output;
use crate::cli::meshctl::chart::VERSION;
use crate::cli::meshctl::layout::{Cut, Mood, Screen, Table, column};

/// The client's version is told even where no cluster answers; the failure comes after it.
pub(super) async fn version(
    access: &Access,
    client_only: bool,
    output: Output,
    screen: Screen,
    out: &mut impl Write,
) -> anyhow::Result<()> {
    let mut rows = Vec::new();
    let asked = if client_only { Ok(()) } else { gather(access, &mut rows).await };
    if output == Output::Json {
        writeln!(out, "{}", serde_json::to_string_pretty(&json!({"client": VERSION, "cluster": rows}))?)?;
        return asked;
    }
    writeln!(out, "meshctl {VERSION}")?;
    if !rows.is_empty() {
        let columns = ["POD", "NODE", "VERSION", "IMAGE"];
        let cuts = [Cut::End, Cut::End, Cut::Never, Cut::Start];
        let mut table = Table::new(columns.into_iter().zip(cuts).map(|(title, cut)| column(title, cut)).collect());
        for row in &rows {
            let mood = if row["version"] == VERSION { Mood::Plain } else { Mood::Warning };
            let cell = |key: &str| (row[key].as_str().unwrap_or_default().to_owned(), mood);
            table.row(["pod", "node", "version", "image"].map(cell).into());
        }
        out.write_all(table.render(screen).as_bytes())?;
    } else if asked.is_ok() && !client_only {
        writeln!(out, "no Nodemesh runs in namespace {}", access.namespace)?;
    }
    asked
}

async fn gather(access: &Access, rows: &mut Vec<serde_json::Value>) -> anyhow::Result<()> {
    let server = access.connect().await?;
    for app in [CONTROLLER, AGENT] {
        for pod in pods(&server, &access.namespace, app).await? {
            rows.push(json!({
                "pod": name(&pod),
                "node": node_of(&pod),
                "version": pod["metadata"]["labels"]["app.kubernetes.io/version"],
                "image": pod["spec"]["containers"][0]["image"],
            }));
        }
    }
    Ok(())
}
