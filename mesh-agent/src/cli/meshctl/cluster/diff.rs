//! What differs between two objects, field by field.

use std::collections::BTreeSet;

use serde_json::Value;

use super::super::chart::yaml;

/// What the API server adds to an object, and changes by itself.
const SERVERS: [&str; 7] =
    ["managedFields", "resourceVersion", "generation", "creationTimestamp", "uid", "selfLink", "deletionTimestamp"];

/// Without what only the API server writes.
pub(super) fn as_written(object: &Value) -> Value {
    let mut object = object.clone();
    if let Some(map) = object.as_object_mut() {
        map.remove("status");
    }
    if let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut) {
        metadata.retain(|key, _| !SERVERS.contains(&key.as_str()));
    }
    object
}

/// A line for each field that differs: `spec.replicas: 2 -> 3`.
pub(super) fn lines(old: &Value, new: &Value) -> Vec<String> {
    let mut found = Vec::new();
    walk(old, new, "", &mut found);
    found
}

fn walk(old: &Value, new: &Value, path: &str, found: &mut Vec<String>) {
    match (old, new) {
        (Value::Object(a), Value::Object(b)) => {
            let keys: BTreeSet<&String> = a.keys().chain(b.keys()).collect();
            for key in keys {
                let at = match path {
                    "" => key.clone(),
                    file if file.ends_with(':') => format!("{file} {key}"),
                    path => format!("{path}.{key}"),
                };
                walk(a.get(key).unwrap_or(&Value::Null), b.get(key).unwrap_or(&Value::Null), &at, found);
            }
        }
        (Value::Array(a), Value::Array(b)) => {
            let named = |items: &[Value]| items.iter().all(|item| item["name"].is_string());
            if !a.is_empty() && !b.is_empty() && named(a) && named(b) {
                let names: BTreeSet<&str> = a.iter().chain(b).filter_map(|item| item["name"].as_str()).collect();
                let find = |items: &[Value], name: &str| items.iter().find(|i| i["name"] == name).cloned();
                for name in names {
                    let (a, b) = (find(a, name).unwrap_or_default(), find(b, name).unwrap_or_default());
                    walk(&a, &b, &format!("{path}[{name}]"), found);
                }
                return;
            }
            for i in 0..a.len().max(b.len()) {
                let at = format!("{path}[{i}]");
                walk(a.get(i).unwrap_or(&Value::Null), b.get(i).unwrap_or(&Value::Null), &at, found);
            }
        }
        (a, b) if a == b => {}
        // Files in ConfigMaps are texts, which two writers of YAML quote differently.
        (a, b) => match (file(a), file(b)) {
            (Some(a), Some(b)) => walk(&a, &b, &format!("{path}:"), found),
            _ => found.push(format!("{path}: {} -> {}", shown(a), shown(b))),
        },
    }
}

fn file(value: &Value) -> Option<Value> {
    value.as_str().and_then(|text| yaml::parse(text).ok()).filter(Value::is_object)
}

fn shown(value: &Value) -> String {
    match value {
        Value::Null => "nothing".to_owned(),
        Value::Object(map) if map.is_empty() => "{}".to_owned(),
        Value::Object(_) | Value::Array(_) => {
            let text = value.to_string();
            if text.chars().count() > 60 { text.chars().take(59).chain(['…']).collect() } else { text }
        }
        scalar => scalar.to_string(),
    }
}

/// The objects of two manifests that differ, each with its lines; one that is only in one of them has one line.
pub(super) fn manifests(old: &[Value], new: &[Value]) -> Vec<(String, Vec<String>)> {
    let key = |object: &Value| {
        let namespace = super::objects::namespace(object);
        let place = if namespace.is_empty() { String::new() } else { format!(" in {namespace}") };
        format!("{}{place}", super::objects::title(object))
    };
    let keys: BTreeSet<String> = old.iter().chain(new).map(key).collect();
    let find = |objects: &[Value], wanted: &str| objects.iter().find(|o| key(o) == wanted).cloned();
    let mut found = Vec::new();
    for at in keys {
        let lines = match (find(old, &at), find(new, &at)) {
            (Some(old), Some(new)) => lines(&old, &new),
            (Some(_), None) => vec!["is taken away".to_owned()],
            (None, _) => vec!["is new".to_owned()],
        };
        if !lines.is_empty() {
            found.push((at, lines));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn fields_are_named_by_their_paths() {
        let pod =
            |image: &str, args: Value| json!({"spec": {"containers": [{"name": "a", "image": image, "args": args}]}});
        assert_eq!(
            lines(&pod("x:1", json!(["-a"])), &pod("x:2", json!(["-a", "-b"]))),
            [r#"spec.containers[a].args[1]: nothing -> "-b""#, r#"spec.containers[a].image: "x:1" -> "x:2""#]
        );
        assert!(lines(&pod("x", json!([])), &pod("x", json!([]))).is_empty());
    }

    #[test]
    fn a_file_in_a_config_map_is_compared_by_its_meaning() {
        let map = |text: &str| json!({"data": {"f.yaml": text}});
        assert!(lines(&map("a: \"x\"\nb: 1\n"), &map("b: 1\na: x")).is_empty());
        assert_eq!(
            lines(&map("a: x"), &map("a: y\nb: {}")),
            [r#"data.f.yaml: a: "x" -> "y""#, "data.f.yaml: b: nothing -> {}"]
        );
        assert_eq!(lines(&map("plain"), &map("other")).len(), 1);
    }

    #[test]
    fn objects_of_one_manifest_only_are_told() {
        let object = |name: &str| json!({"kind": "Service", "metadata": {"name": name, "namespace": "n"}});
        let found = manifests(&[object("a"), object("b")], &[object("b"), object("c")]);
        let expected = [("Service a in n", "is taken away"), ("Service c in n", "is new")];
        assert_eq!(found, expected.map(|(at, line)| (at.to_owned(), vec![line.to_owned()])));
    }
}
