//! The text of a list of CNI plugins: our entry put in, and cut out again so that the text is what it was.
//!
//! The file is the cluster's, written by its network and perhaps by a person: its form, its comments in odd keys and its
//! order stay. What cannot be understood is not touched.

use std::path::Path;

use serde_json::{Value, json};

use super::PLUGIN;
use super::json::{elements, member};
use super::spec::{DEFAULT_TIMEOUT, VERSIONS, timeout};

/// What our entry says.
#[derive(Debug, Clone, Copy)]
pub(super) struct Entry<'a> {
    pub socket: &'a Path,
    pub members: &'a Path,
}

impl Entry<'_> {
    fn written(&self, timeout: u64) -> String {
        json!({"type": PLUGIN, "socket": self.socket, "members": self.members, "timeoutSeconds": timeout}).to_string()
    }

    /// Further keys are the user's.
    fn is_right(&self, entry: &Value) -> bool {
        let path = |key: &str| entry[key].as_str().map(Path::new);
        path("socket") == Some(self.socket)
            && path("members") == Some(self.members)
            && entry.get("timeoutSeconds").is_none_or(|seconds| timeout(seconds).is_some())
    }
}

/// The list with our entry as its last; `None` where it is so already. The error is the end of a sentence.
pub(super) fn with_entry(text: &str, entry: Entry<'_>) -> Result<Option<String>, String> {
    let list = object(text)?;
    let plugins = list["plugins"].as_array().ok_or("it has no list `plugins`")?;
    if !plugins.iter().any(|plugin| !is_ours(plugin)) {
        return Err("its list `plugins` has none that makes the network".to_owned());
    }
    check_version(&list)?;
    let ours: Vec<&Value> = plugins.iter().filter(|plugin| is_ours(plugin)).collect();
    if let ([only], Some(last)) = (ours.as_slice(), plugins.last())
        && is_ours(last)
        && entry.is_right(only)
    {
        return Ok(None);
    }
    // How long pods may wait is the user's to say.
    let seconds = ours.iter().find_map(|entry| timeout(&entry["timeoutSeconds"])).unwrap_or(DEFAULT_TIMEOUT);
    let mut text = without_entry(text).unwrap_or_else(|| text.to_owned());
    let last = places(&text).and_then(|places| places.last().cloned()).ok_or("its list `plugins` cannot be found")?;
    let new = format!(",{}{}", white_space_before(&text, last.start), entry.written(seconds));
    text.insert_str(last.end, &new);
    Ok(Some(text))
}

/// The list without our entries, else as it was byte by byte; `None` where it has none.
pub(super) fn without_entry(text: &str) -> Option<String> {
    let mut text = text.to_owned();
    let mut found = false;
    loop {
        let places = places(&text)?;
        let is_ours = |text: &str| serde_json::from_str(text).is_ok_and(|plugin| is_ours(&plugin));
        let Some(at) = places.iter().rposition(|place| is_ours(&text[place.clone()])) else {
            return found.then_some(text);
        };
        found = true;
        let cut = match (at.checked_sub(1), places.get(at + 1)) {
            (Some(before), _) => places[before].end..places[at].end,
            (None, Some(next)) => places[at].start..next.start,
            (None, None) => places[at].clone(),
        };
        text.replace_range(cut, "");
    }
}

/// A configuration of one plugin as a list of it and our entry.
pub(super) fn as_list(text: &str, entry: Entry<'_>) -> Result<String, String> {
    let plugin = object(text)?;
    if plugin.get("plugins").is_some() {
        return Err("it is a list of plugins, which container runtimes read only in a .conflist".to_owned());
    }
    if plugin["type"].as_str().is_none_or(str::is_empty) {
        return Err("it has no `type`".to_owned());
    }
    if is_ours(&plugin) {
        return Err(format!("it has {PLUGIN} alone, and none that makes the network"));
    }
    let name = plugin["name"].as_str().filter(|name| !name.is_empty()).ok_or("it has no `name`")?;
    check_version(&plugin)?;
    let (version, name) = (&plugin["cniVersion"], json!(name));
    let text = text.trim();
    let ours = entry.written(DEFAULT_TIMEOUT);
    Ok(format!(
        "{{\n  \"cniVersion\": {version},\n  \"name\": {name},\n  \"plugins\": [\n    {text},\n    {ours}\n  ]\n}}\n"
    ))
}

fn object(text: &str) -> Result<Value, String> {
    let value: Value = serde_json::from_str(text).map_err(|e| format!("it is no JSON: {e}"))?;
    if value.is_object() { Ok(value) } else { Err("it is no JSON object".to_owned()) }
}

fn is_ours(plugin: &Value) -> bool {
    plugin["type"] == PLUGIN
}

/// A version that our plugin does not speak would keep every pod of the node from starting.
fn check_version(list: &Value) -> Result<(), String> {
    let known = |version: &Value| version.as_str().is_some_and(|version| VERSIONS.contains(&version));
    if let Some(versions) = list.get("cniVersions") {
        let all = versions.as_array().is_some_and(|all| !all.is_empty() && all.iter().all(known));
        if !all {
            return Err(format!(
                "its cniVersions {versions} are not all known; {PLUGIN} knows {}",
                VERSIONS.join(", ")
            ));
        }
        if list.get("cniVersion").is_none() {
            return Ok(());
        }
    }
    match &list["cniVersion"] {
        version if known(version) => Ok(()),
        Value::Null => Err(format!("it has no cniVersion; {PLUGIN} knows {}", VERSIONS.join(", "))),
        version => Err(format!("its cniVersion {version} is not known; {PLUGIN} knows {}", VERSIONS.join(", "))),
    }
}

fn places(text: &str) -> Option<Vec<std::ops::Range<usize>>> {
    elements(text, member(text, "plugins")?)
}

/// What parts an element from what is before it: a line break with its indentation, or a blank.
fn white_space_before(text: &str, at: usize) -> &str {
    let start = text[..at].trim_end().len();
    let space = &text[start..at];
    if space.contains('\n') { space } else { " " }
}

#[cfg(test)]
mod tests;
