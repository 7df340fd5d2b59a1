//! One Kubernetes object as a plain JSON value, with the name that Problems use.

use std::sync::Arc;

use serde_json::Value;

use crate::model::{ObjectRef, Problem, Severity};

/// What makes an object the same object when its content changes.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    group: Arc<str>,
    kind: String,
    namespace: String,
    name: String,
}

/// An object as its source gave it. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Object {
    reference: Arc<ObjectRef>,
    group: Arc<str>,
    version: Arc<str>,
    value: Arc<Value>,
}

/// Kinds of the core that have no namespace; for all others a missing one means `default`, as for kubectl.
const WITHOUT_NAMESPACE: &[&str] = &["Namespace", "Node"];

/// Lists in lists are refused beyond this depth.
const MAX_LIST_DEPTH: usize = 4;

impl Object {
    /// The objects in `value`: one, or those of a `List`. `file` is where it was read, empty for the Kubernetes API.
    pub fn from_value(file: &str, value: Value) -> Result<Vec<Self>, Problem> {
        let mut objects = Vec::new();
        collect(file, "", value, 0, &mut objects)?;
        Ok(objects)
    }

    pub fn key(&self) -> Key {
        Key {
            group: self.group.clone(),
            kind: self.reference.kind.clone(),
            namespace: self.reference.namespace.clone(),
            name: self.reference.name.clone(),
        }
    }

    pub fn reference(&self) -> &Arc<ObjectRef> {
        &self.reference
    }

    /// `security.istio.io`; empty for the core.
    pub fn group(&self) -> &str {
        &self.group
    }

    pub fn version(&self) -> &str {
        &self.version
    }

    pub fn kind(&self) -> &str {
        &self.reference.kind
    }

    pub fn value(&self) -> &Value {
        &self.value
    }

    /// The value, to be kept beyond the object.
    pub fn shared_value(&self) -> Arc<Value> {
        self.value.clone()
    }

    /// Whether `other` is this very value at this very place. A cheap question: equal values read twice are not the same.
    pub fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.value, &other.value) && self.reference == other.reference && self.version == other.version
    }
}

/// Whether objects of this API group are read by the mesh, now or later.
pub(super) fn is_ours(group: &str) -> bool {
    matches!(group, "" | "discovery.k8s.io" | "node.k8s.io") || is_mesh_api(group)
}

/// The Istio API and the Gateway API.
pub(super) fn is_mesh_api(group: &str) -> bool {
    group.ends_with(".istio.io") || group.starts_with("gateway.networking.")
}

fn collect(file: &str, path: &str, value: Value, depth: usize, objects: &mut Vec<Object>) -> Result<(), Problem> {
    let text = |key: &str| value.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
    let metadata = |key: &str| value.pointer(&format!("/metadata/{key}")).and_then(Value::as_str).unwrap_or_default();
    let (api_version, kind) = (text("apiVersion"), text("kind"));
    let core = matches!(api_version.as_str(), "v1");
    let namespace = match metadata("namespace") {
        _ if core && WITHOUT_NAMESPACE.contains(&kind.as_str()) => "",
        _ if kind == "RuntimeClass" && api_version.starts_with("node.k8s.io/") => "",
        "" => "default",
        given => given,
    };
    let name = metadata("name");
    let fault = |field: &str, message: &str| {
        let (namespace, name) = if name.is_empty() { ("", "(without a name)") } else { (namespace, name) };
        let object = ObjectRef {
            file: file.into(),
            kind: kind.clone(),
            namespace: namespace.into(),
            name: if kind.is_empty() { String::new() } else { name.into() },
        };
        Err(Problem {
            severity: Severity::Error,
            object: Arc::new(object),
            field: format!("{path}{field}"),
            message: message.into(),
        })
    };
    if !value.is_object() {
        return fault("", "this is no Kubernetes object: write one with apiVersion, kind and metadata");
    }
    if kind.is_empty() {
        return fault("kind", "the object has no kind: write what it is, such as `kind: Pod`");
    }
    if api_version.is_empty() {
        return fault("apiVersion", "the object has no apiVersion: write it, such as `apiVersion: v1`");
    }
    // `List`, and the typed lists that `kubectl get -o yaml --raw` gives.
    if kind.ends_with("List") && value.get("items").is_some() {
        if depth >= MAX_LIST_DEPTH {
            return fault("items", "lists are nested too deep: write the objects as documents of their own");
        }
        let item_kind = kind.strip_suffix("List").unwrap_or_default().to_owned();
        let mut value = value;
        let items = match value.get_mut("items").map(Value::take) {
            Some(Value::Array(items)) => items,
            Some(Value::Null) | None => Vec::new(),
            Some(_) => {
                let name = "(without a name)".to_owned();
                let object = ObjectRef { file: file.into(), kind, namespace: String::new(), name };
                return Err(Problem {
                    severity: Severity::Error,
                    object: Arc::new(object),
                    field: format!("{path}items"),
                    message: "expected a list of objects".into(),
                });
            }
        };
        for (i, mut item) in items.into_iter().enumerate() {
            // Items of a typed list carry no kind of their own.
            if let Some(map) = item.as_object_mut().filter(|m| !item_kind.is_empty() && !m.contains_key("kind")) {
                map.insert("kind".into(), item_kind.clone().into());
                map.entry("apiVersion").or_insert_with(|| api_version.clone().into());
            }
            collect(file, &format!("{path}items[{i}]."), item, depth + 1, objects)?;
        }
        return Ok(());
    }
    let (group, version) = api_version.split_once('/').unwrap_or(("", &api_version));
    if name.is_empty() {
        // A Kustomization and its like need no name, and are not ours to judge.
        return if is_ours(group) {
            fault("metadata.name", "the object has no name: write metadata.name")
        } else {
            Ok(())
        };
    }
    let reference = ObjectRef { file: file.into(), kind: kind.clone(), namespace: namespace.into(), name: name.into() };
    objects.push(Object {
        reference: Arc::new(reference),
        group: group.into(),
        version: version.into(),
        value: Arc::new(value),
    });
    Ok(())
}
