//! Values: what the chart says, over it a profile, over that the user's files, and last what `--set` says.

use std::path::PathBuf;

use serde_json::{Map, Value};

use super::{FILES, file, schema, yaml};
use crate::cli::exit::Failure;
use crate::config::{Controller, Written};

/// What the user wants of an installation.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(in crate::cli::meshctl) struct Given {
    pub(in crate::cli::meshctl) profile: Option<String>,
    pub(in crate::cli::meshctl) files: Vec<PathBuf>,
    /// `a.b=c`, as Helm has it.
    pub(in crate::cli::meshctl) set: Vec<String>,
}

pub(in crate::cli::meshctl) const DEFAULT_PROFILE: &str = "default";

impl Given {
    pub(in crate::cli::meshctl) fn is_empty(&self) -> bool {
        self.profile.is_none() && self.files.is_empty() && self.set.is_empty()
    }
}

/// Names of the profiles, each with the first sentence of its file.
pub(in crate::cli::meshctl) fn profiles() -> Vec<(&'static str, &'static str)> {
    let of = |(path, text): &(&'static str, &'static str)| {
        let name = path.strip_prefix("profiles/")?.strip_suffix(".yaml")?;
        let about = text.lines().next().and_then(|line| line.strip_prefix("# ")).unwrap_or_default();
        Some((name, about))
    };
    FILES.iter().filter_map(of).collect()
}

/// What is said beyond the chart's own values.
pub(in crate::cli::meshctl) fn overrides(given: &Given) -> Result<Value, Failure> {
    let profile = given.profile.as_deref().unwrap_or(DEFAULT_PROFILE);
    let Some(text) = file(&format!("profiles/{profile}.yaml")) else {
        let names: Vec<&str> = profiles().into_iter().map(|(name, _)| name).collect();
        return Err(Failure::usage(format!("there is no profile `{profile}`; there are {}", names.join(", "))));
    };
    let mut values = parsed(&format!("profile {profile}"), text)?;
    for path in &given.files {
        let text = std::fs::read_to_string(path).map_err(|e| {
            Failure::usage(format!("cannot read the values in {}: {e}; name a file with -f", path.display()))
        })?;
        merge(&mut values, parsed(&path.display().to_string(), &text)?);
    }
    for text in &given.set {
        set(&mut values, text).map_err(|why| Failure::usage(format!("--set {text}: {why}")))?;
    }
    Ok(values)
}

fn parsed(what: &str, text: &str) -> Result<Value, Failure> {
    match yaml::parse(text) {
        Ok(Value::Null) => Ok(Value::Object(Map::new())),
        Ok(value @ Value::Object(_)) => Ok(value),
        Ok(_) => Err(Failure::usage(format!("{what}: values are a map, one `name: value` a line"))),
        Err(why) => Err(Failure::usage(format!("{what}: {why}"))),
    }
}

/// With the chart's own values under them, all checked.
pub(in crate::cli::meshctl) fn complete(overrides: &Value) -> Result<Value, Failure> {
    let mut values = parsed("values.yaml of the chart", file("values.yaml").unwrap_or_default())?;
    merge(&mut values, overrides.clone());
    let schema: Value = serde_json::from_str(file("values.schema.json").unwrap_or_default())
        .map_err(|e| Failure::usage(format!("values.schema.json of the chart: {e}")))?;
    schema::check(&values, &schema, "").map_err(Failure::usage)?;
    let mut written = Written::default();
    written.parse("settings", &yaml::print(&values["settings"])).map_err(|e| Failure::usage(e.to_string()))?;
    if values["settings"].get("caDir").is_none() {
        Controller::check_for_tools(&written).map_err(|e| Failure::usage(e.to_string()))?;
    }
    Ok(values)
}

/// As Helm merges: maps key by key, null takes a key away, all else replaces what was there.
pub(in crate::cli::meshctl) fn merge(under: &mut Value, over: Value) {
    match (under, over) {
        (Value::Object(under), Value::Object(over)) => {
            for (key, value) in over {
                if value.is_null() {
                    under.remove(&key);
                } else {
                    match under.get_mut(&key) {
                        Some(there) if there.is_object() && value.is_object() => merge(there, value),
                        _ => {
                            under.insert(key, value);
                        }
                    }
                }
            }
        }
        (under, over) => *under = over,
    }
}

/// `a.b=c,d[0]=e`: see `helm help install`.
pub(super) fn set(values: &mut Value, text: &str) -> Result<(), String> {
    for one in split(text, ',') {
        let mut parts = split(&one, '=').into_iter();
        let key = parts.next().unwrap_or_default();
        let value = parts.collect::<Vec<_>>().join("=");
        if key.trim().is_empty() || !one.contains('=') {
            return Err("write it as name=value".to_owned());
        }
        let mut at = &mut *values;
        for part in split(&key, '.') {
            let part = unescape(&part);
            let (name, indexes) = part.split_once('[').map_or((part.as_str(), ""), |(name, rest)| (name, rest));
            if name.is_empty() {
                return Err(format!("`{key}` has an empty part"));
            }
            at = member(at, name);
            for index in indexes.split('[').filter(|index| !index.is_empty()) {
                let number = index.strip_suffix(']').and_then(|n| n.parse::<usize>().ok());
                // More than any list of the chart has: a typing error would take the memory of the machine.
                let number = number.filter(|n| *n < 1000).ok_or_else(|| format!("`[{index}` is no place in a list"))?;
                at = place(at, number);
            }
        }
        *at = match value.strip_prefix('{').and_then(|v| v.strip_suffix('}')) {
            Some("") => Value::Array(Vec::new()),
            Some(items) => split(items, ',').iter().map(|item| scalar(&unescape(item))).collect(),
            None => scalar(&unescape(&value)),
        };
    }
    Ok(())
}

fn member<'a>(at: &'a mut Value, name: &str) -> &'a mut Value {
    if !at.is_object() {
        *at = Value::Object(Map::new());
    }
    at.as_object_mut().expect("it was made a map").entry(name).or_insert(Value::Null)
}

fn place(at: &mut Value, number: usize) -> &mut Value {
    if !at.is_array() {
        *at = Value::Array(Vec::new());
    }
    let items = at.as_array_mut().expect("it was made a list");
    if items.len() <= number {
        items.resize(number + 1, Value::Null);
    }
    &mut items[number]
}

/// At each `by` that is not escaped and not within braces; escapes stay.
fn split(text: &str, by: char) -> Vec<String> {
    let mut parts = vec![String::new()];
    let (mut escaped, mut depth) = (false, 0_u32);
    for c in text.chars() {
        match c {
            '{' if !escaped => depth += 1,
            '}' if !escaped => depth = depth.saturating_sub(1),
            _ => {}
        }
        if c == by && !escaped && depth == 0 {
            parts.push(String::new());
            continue;
        }
        escaped = c == '\\' && !escaped;
        parts.last_mut().expect("there is always one").push(c);
    }
    parts
}

fn unescape(text: &str) -> String {
    let mut out = String::new();
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        out.push(if c == '\\' { chars.next().unwrap_or(c) } else { c });
    }
    out
}

fn scalar(text: &str) -> Value {
    match text {
        "true" => Value::Bool(true),
        "false" => Value::Bool(false),
        "null" => Value::Null,
        // `007` is a text, `7` is a number.
        "0" => 0.into(),
        number if !number.starts_with('0') => number.parse::<i64>().map_or_else(|_| number.into(), Value::from),
        text => text.into(),
    }
}
