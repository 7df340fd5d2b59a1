//! `meshctl manifest` and `meshctl profile`: what would be installed, and how it differs.

use std::io::Write;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::install::rendered;
use super::objects::{kind_of, name, namespace, order, title};
use super::{Access, apply, diff};
use crate::cli::exit::Failure;
use crate::cli::meshctl::args::Output;
use crate::cli::meshctl::chart::{self, Given, yaml};
use crate::cli::meshctl::layout::{Cut, Mood, Screen, Table, column};

/// What Helm would print, and the namespace, in an order in which `kubectl apply` takes it.
pub(super) fn generate(access: &Access, given: &Given, output: Output, out: &mut impl Write) -> anyhow::Result<()> {
    let mut rendered = rendered(&chart::overrides(given)?, &access.namespace)?;
    rendered.objects.sort_by_key(|document| order(&document.object));
    match output {
        Output::Json => {
            let objects: Vec<&Value> = rendered.crds.iter().chain(&rendered.objects).map(|d| &d.object).collect();
            writeln!(out, "{}", serde_json::to_string_pretty(&objects)?)?;
        }
        Output::Table | Output::Wide => out.write_all(rendered.text().as_bytes())?,
    }
    Ok(())
}

/// Two files of manifests. Fails where they differ, so that a script can go by it.
pub(super) fn diff_files(old: &Path, new: &Path, out: &mut impl Write) -> anyhow::Result<()> {
    let differences = diff::manifests(&read(old)?, &read(new)?);
    print(&differences, out)?;
    match differences.len() {
        0 => Ok(writeln!(out, "no object differs")?),
        n => Err(Failure::data(format!("{n} objects differ between {} and {}", old.display(), new.display())).into()),
    }
}

fn read(path: &Path) -> anyhow::Result<Vec<Value>> {
    let text = std::fs::read_to_string(path)
        .map_err(|e| Failure::usage(format!("cannot read {}: {e}; name a file of manifests", path.display())))?;
    let mut objects = Vec::new();
    for document in yaml::documents(&text) {
        match yaml::parse(&document) {
            Ok(Value::Array(items)) => objects.extend(items),
            Ok(Value::Null) => {}
            Ok(object) => objects.push(object),
            Err(why) => return Err(Failure::data(format!("{}: {why}", path.display())).into()),
        }
    }
    Ok(objects)
}

/// What an installation would change in the cluster, as the API server itself sees it.
pub(super) async fn diff_cluster(access: &Access, given: &Given, out: &mut impl Write) -> anyhow::Result<()> {
    let rendered = rendered(&chart::overrides(given)?, &access.namespace)?;
    let server = access.connect().await?;
    let plan = apply::plan(&server, rendered).await?;
    let mut differences = Vec::new();
    for object in &plan.objects {
        let kind = kind_of(object)?;
        let Some(before) = server.get(kind, namespace(object), name(object)).await? else {
            differences.push((title(object), vec!["is new".to_owned()]));
            continue;
        };
        let after = server.apply(kind, namespace(object), name(object), "", object, apply::MANAGER, true).await?;
        let lines = diff::lines(&diff::as_written(&before), &diff::as_written(&after));
        if !lines.is_empty() {
            differences.push((title(object), lines));
        }
    }
    let mut leftovers = apply::leftovers(access, &server, &plan.objects).await?;
    leftovers.sort_by_key(order);
    differences.extend(leftovers.iter().map(|object| (title(object), vec!["is taken away".to_owned()])));
    print(&differences, out)?;
    if differences.is_empty() {
        writeln!(out, "the cluster has what would be installed")?;
    }
    Ok(())
}

fn print(differences: &[(String, Vec<String>)], out: &mut impl Write) -> anyhow::Result<()> {
    for (at, lines) in differences {
        writeln!(out, "{at}")?;
        for line in lines {
            writeln!(out, "  {line}")?;
        }
    }
    Ok(())
}

pub(super) fn profile_list(screen: Screen, out: &mut impl Write) -> anyhow::Result<()> {
    let mut table = Table::new(vec![column("PROFILE", Cut::Never), column("FOR", Cut::End)]);
    for (name, about) in chart::profiles() {
        table.row(vec![(name.to_owned(), Mood::Plain), (about.to_owned(), Mood::Plain)]);
    }
    Ok(out.write_all(table.render(screen).as_bytes())?)
}

/// All values of an installation, with the chart's own.
pub(super) fn profile_dump(given: &Given, output: Output, out: &mut impl Write) -> anyhow::Result<()> {
    let values = chart::complete(&chart::overrides(given)?)?;
    match output {
        Output::Json => writeln!(out, "{}", serde_json::to_string_pretty(&values)?)?,
        Output::Table | Output::Wide => out.write_all(yaml::print(&values).as_bytes())?,
    }
    Ok(())
}

pub(super) fn profile_diff(old: &str, new: &str, out: &mut impl Write) -> anyhow::Result<()> {
    let of = |profile: &str| -> anyhow::Result<Value> {
        let given = Given { profile: Some(profile.to_owned()), ..Given::default() };
        Ok(chart::complete(&chart::overrides(&given)?)?)
    };
    let lines = diff::lines(&of(old)?, &of(new)?);
    for line in &lines {
        writeln!(out, "{line}")?;
    }
    if lines.is_empty() {
        writeln!(out, "the profiles {old} and {new} say the same")?;
    }
    Ok(())
}

/// What `manifest diff` compares.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::cli::meshctl) enum Compared {
    Files(PathBuf, PathBuf),
    Cluster(Given),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_generated_can_be_applied_from_top_to_bottom() {
        let access = Access { kubeconfig: None, context: None, namespace: "mesh".to_owned() };
        let mut out = Vec::new();
        generate(&access, &Given::default(), Output::Table, &mut out).unwrap();
        let text = String::from_utf8(out).unwrap();
        let objects: Vec<Value> = yaml::documents(&text).iter().map(|text| yaml::parse(text).unwrap()).collect();
        let place = |kind: &str| objects.iter().position(|object| object["kind"] == kind).unwrap();
        let first = objects.iter().position(|object| namespace(object) == "mesh").unwrap();
        assert!(place("Namespace") < first, "an object is before its namespace");
        assert!(place("ServiceAccount") < place("DaemonSet"));
        assert!(place("ConfigMap") < place("DaemonSet"));
        assert_eq!(place("ValidatingWebhookConfiguration"), objects.len() - 1, "it is of no use before its controller");
    }
}
