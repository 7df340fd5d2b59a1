//! The Helm chart of `deploy/helm/nodemesh`, embedded: values come in, the objects of the mesh go out.
//!
//! It is rendered as Helm renders it, but for what the chart does not use: the templates know `toJson` and `toYaml` and
//! Go's own functions, and `.Values`, `.Release` and `.Chart`. `cargo xtask chart` compares the two.

mod schema;
mod values;
pub(super) mod yaml;

use std::collections::HashMap;

use anyhow::anyhow;
use gtmpl_ng::{Context, FuncError, Template, Value as Part};
use serde_json::Value;

pub(super) use values::{Given, complete, merge, overrides, profiles};

/// Paths and texts.
const FILES: &[(&str, &str)] = include!(concat!(env!("OUT_DIR"), "/chart.rs"));

/// The release's name, which no object shows.
const RELEASE: &str = "nodemesh";

/// One object, as text with its comments and as data.
#[derive(Debug, Clone)]
pub(super) struct Document {
    file: &'static str,
    text: String,
    pub(super) object: Value,
}

/// What is installed.
#[derive(Debug)]
pub(super) struct Rendered {
    /// Kinds that are installed only where they are missing.
    pub(super) crds: Vec<Document>,
    pub(super) objects: Vec<Document>,
}

impl Rendered {
    /// As Helm prints it.
    pub(super) fn text(&self) -> String {
        let mut out = String::new();
        for Document { file, text, .. } in self.crds.iter().chain(&self.objects) {
            out += &format!("---\n# Source: {RELEASE}/{file}\n{}\n", text.trim());
        }
        out
    }
}

pub(super) fn file(path: &str) -> Option<&'static str> {
    FILES.iter().find(|(name, _)| *name == path).map(|(_, text)| *text)
}

/// The version that the chart installs.
pub(super) const VERSION: &str = env!("CARGO_PKG_VERSION");

/// The chart with complete `values`, in `namespace`.
pub(super) fn render(values: &Value, namespace: &str) -> anyhow::Result<Rendered> {
    let context = serde_json::json!({
        "Values": values,
        "Release": {"Name": RELEASE, "Namespace": namespace, "Service": "Helm"},
        "Chart": {"Name": RELEASE, "Version": VERSION, "AppVersion": VERSION},
    });
    let context = Context::from(part(&context));
    let (mut crds, mut objects) = (Vec::new(), Vec::new());
    for (path, text) in FILES {
        if path.starts_with("crds/") {
            crds.extend(documents(path, text)?);
        } else if path.starts_with("templates/") && path.ends_with(".yaml") {
            let helpers = file("templates/_names.tpl").unwrap_or_default();
            let mut template = Template::with_name(*path);
            template.add_funcs(&[("toJson", to_json as gtmpl_ng::Func), ("toYaml", to_yaml as gtmpl_ng::Func)]);
            template
                .parse(format!("{helpers}{text}"))
                .map_err(|e| anyhow!("the chart's {path} cannot be read: {e}"))?;
            let text = template.render(&context).map_err(|e| anyhow!("the chart's {path} cannot be rendered: {e}"))?;
            objects.extend(documents(path, &text)?);
        }
    }
    Ok(Rendered { crds, objects })
}

fn documents(file: &'static str, text: &str) -> anyhow::Result<Vec<Document>> {
    let mut found = Vec::new();
    for text in yaml::documents(text) {
        let object =
            yaml::parse(&text).map_err(|why| anyhow!("the chart's {file} became something else than YAML: {why}"))?;
        if !object.is_null() {
            found.push(Document { file, text, object });
        }
    }
    Ok(found)
}

fn to_json(arguments: &[Part]) -> Result<Part, FuncError> {
    one(arguments).map(|value| Part::String(value.to_string()))
}

fn to_yaml(arguments: &[Part]) -> Result<Part, FuncError> {
    one(arguments).map(|value| Part::String(yaml::print(&value).trim_end().to_owned()))
}

fn one(arguments: &[Part]) -> Result<Value, FuncError> {
    match arguments {
        [argument] => Ok(value(argument)),
        _ => Err(FuncError::ExactlyXArgs("toJson".to_owned(), 1)),
    }
}

/// A value as templates know it.
fn part(value: &Value) -> Part {
    match value {
        Value::Null => Part::Nil,
        Value::Bool(b) => Part::Bool(*b),
        Value::Number(n) => match (n.as_u64(), n.as_i64(), n.as_f64()) {
            (Some(n), ..) => Part::from(n),
            (_, Some(n), _) => Part::from(n),
            (.., n) => Part::from(n.unwrap_or_default()),
        },
        Value::String(text) => Part::String(text.clone()),
        Value::Array(items) => Part::Array(items.iter().map(part).collect()),
        Value::Object(map) => Part::Map(map.iter().map(|(k, v)| (k.clone(), part(v))).collect::<HashMap<_, _>>()),
    }
}

fn value(part: &Part) -> Value {
    match part {
        Part::NoValue | Part::Nil | Part::Function(_) => Value::Null,
        Part::Bool(b) => Value::Bool(*b),
        Part::Number(n) => match (n.as_u64(), n.as_i64(), n.as_f64()) {
            (Some(n), ..) => n.into(),
            (_, Some(n), _) => n.into(),
            (.., n) => n.into(),
        },
        Part::String(text) => Value::String(text.clone()),
        Part::Array(items) => items.iter().map(value).collect(),
        Part::Object(map) | Part::Map(map) => map.iter().map(|(k, v)| (k.clone(), value(v))).collect(),
    }
}

#[cfg(test)]
mod tests;
