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
mod tests {
    use super::*;

    fn entry() -> Entry<'static> {
        Entry { socket: Path::new("/run/nodemesh/cni.sock"), members: Path::new("/var/lib/nodemesh/cni-members.json") }
    }

    const OURS: &str = r#"{"members":"/var/lib/nodemesh/cni-members.json","socket":"/run/nodemesh/cni.sock","timeoutSeconds":30,"type":"mesh-cni"}"#;
    const PRETTY: &str = r#"{
  "cniVersion": "1.0.0",
  "name": "pods", "//": "a ] and a \" and \"plugins\": [",
  "plugins": [
    { "type": "bridge", "ipam": { "ranges": [[{"subnet": "10.1.0.0/24"}]] } },
    {
      "type": "portmap", "capabilities": {"portMappings": true}
    }
  ]
}
"#;

    #[test]
    fn an_entry_that_was_put_in_is_cut_out_without_a_trace() {
        for text in [
            PRETTY,
            r#"{"cniVersion":"0.3.1","name":"x","plugins":[{"type":"bridge"}]}"#,
            "{\"plugins\":[\r\n\t{\"type\":\"a\"} ,\r\n\t{\"type\":\"b\"}\r\n\t] , \"cniVersion\":\"1.1.0\"}",
            r#"{"plugins":[{"type":"old"}],"cniVersion":"0.4.0","plugins":[ {"type":"b"} ]}"#,
            r#"{"cniVersions":["1.0.0","1.1.0"],"plug\u0069ns":[{"type":"a"}]}"#,
        ] {
            let with = with_entry(text, entry()).unwrap().unwrap();
            let list: Value = serde_json::from_str(&with).unwrap();
            let plugins = list["plugins"].as_array().unwrap();
            assert_eq!(plugins.last().unwrap(), &serde_json::from_str::<Value>(OURS).unwrap(), "{with}");
            assert_eq!(with_entry(&with, entry()).unwrap(), None, "it is right: {with}");
            assert_eq!(without_entry(&with).as_deref(), Some(text));
            assert_eq!(without_entry(text), None);
        }
        let with = with_entry(PRETTY, entry()).unwrap().unwrap();
        assert!(with.contains(&format!("    }},\n    {OURS}\n  ]\n}}\n")), "{with}");
    }

    #[test]
    fn an_entry_that_is_not_right_is_put_right() {
        let list = |plugins: &str| format!(r#"{{"cniVersion":"1.0.0","plugins":[{plugins}]}}"#);
        let right = list(&format!(r#"{{"type":"bridge"}}, {OURS}"#));
        for plugins in [
            format!(r#"{OURS},{{"type":"bridge"}}"#),
            format!(r#"{{"type":"bridge"}},{OURS},{OURS}"#),
            r#"{"type":"bridge"},{"type":"mesh-cni"}"#.to_owned(),
            format!(r#"{{"type":"bridge"}},{}"#, OURS.replace("30", "-3")),
            format!(r#"{{"type":"bridge"}},{}"#, OURS.replace("30", "\"soon\"")),
            format!(r#"{{"type":"bridge"}},{}"#, OURS.replace("cni.sock", "other.sock")),
        ] {
            assert_eq!(with_entry(&list(&plugins), entry()).unwrap().as_ref(), Some(&right), "{plugins}");
        }
        // What the user has said stays.
        let longer = OURS.replace("30", "60");
        let moved = list(&format!(r#"{longer},{{"type":"bridge"}}"#));
        assert!(with_entry(&moved, entry()).unwrap().unwrap().ends_with(&format!("{longer}]}}")));
        let more = OURS.replace("30", "60,\"note\":1");
        assert_eq!(with_entry(&list(&format!(r#"{{"type":"bridge"}},{more}"#)), entry()).unwrap(), None);
    }

    #[test]
    fn what_cannot_be_understood_is_not_touched() {
        for (text, why) in [
            ("", "it is no JSON: "),
            (r#"{"cniVersion":"1.0.0","plugins":[{"type":"bridge"}"#, "it is no JSON: "),
            ("\u{feff}{}", "it is no JSON: "),
            ("[]", "it is no JSON object"),
            (r#"{"cniVersion":"1.0.0"}"#, "it has no list `plugins`"),
            (r#"{"cniVersion":"1.0.0","plugins":{}}"#, "it has no list `plugins`"),
            (r#"{"cniVersion":"1.0.0","plugins":[]}"#, "its list `plugins` has none that makes the network"),
            (r#"{"cniVersion":"1.0.0","plugins":[{"type":"mesh-cni"}]}"#, "its list `plugins` has none that makes"),
            (r#"{"plugins":[{"type":"bridge"}]}"#, "it has no cniVersion; mesh-cni knows 0.3.0, "),
            (r#"{"cniVersion":"0.2.0","plugins":[{"type":"bridge"}]}"#, "its cniVersion \"0.2.0\" is not known; "),
            (r#"{"cniVersion":"2.0.0","plugins":[{"type":"bridge"}]}"#, "its cniVersion \"2.0.0\" is not known; "),
            (
                r#"{"cniVersions":["1.1.0","9.0.0"],"plugins":[{"type":"b"}]}"#,
                "its cniVersions [\"1.1.0\",\"9.0.0\"] are",
            ),
        ] {
            let error = with_entry(text, entry()).unwrap_err();
            assert!(error.starts_with(why), "{text}: {error}");
        }
    }

    #[test]
    fn a_single_configuration_becomes_a_list() {
        let text = "{\"cniVersion\":\"0.3.1\",\"name\":\"a \\\"b\\\"\",\"type\":\"bridge\"}\n";
        let list = as_list(text, entry()).unwrap();
        let value: Value = serde_json::from_str(&list).unwrap();
        assert_eq!((&value["name"], &value["cniVersion"]), (&json!("a \"b\""), &json!("0.3.1")));
        assert_eq!(value["plugins"][0]["type"], "bridge");
        assert_eq!(with_entry(&list, entry()).unwrap(), None);
        for (text, why) in [
            ("{", "it is no JSON"),
            (r#"{"cniVersion":"1.0.0","name":"x","plugins":[]}"#, "it is a list of plugins"),
            (r#"{"cniVersion":"1.0.0","name":"x"}"#, "it has no `type`"),
            (r#"{"cniVersion":"1.0.0","type":"bridge"}"#, "it has no `name`"),
            (r#"{"name":"x","type":"bridge"}"#, "it has no cniVersion"),
            (r#"{"cniVersion":"1.0.0","name":"x","type":"mesh-cni"}"#, "it has mesh-cni alone"),
        ] {
            let error = as_list(text, entry()).unwrap_err();
            assert!(error.starts_with(why), "{text}: {error}");
        }
    }
}
