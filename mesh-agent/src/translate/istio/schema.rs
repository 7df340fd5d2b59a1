//! The names of all fields of an object, to find those that are not. Wrong types are found where the fields are read.

use serde_json::Value;

use crate::translate::Object;
use crate::translate::report::Report;

/// What may stand in a place.
pub(super) enum Shape {
    /// Anything: its content is no business of this check.
    Any,
    Fields(&'static [(&'static str, Shape)]),
    ListOf(&'static Shape),
    /// Keys of the user's own.
    MapOf(&'static Shape),
}

/// Reports each field of `spec` that the API does not have: most often a slip of the pen, and what it was meant to say
/// is not known.
pub(super) fn check(object: &Object, spec: &Shape, report: &mut Report) {
    for (key, value) in object.value().as_object().into_iter().flatten() {
        match key.as_str() {
            "apiVersion" | "kind" | "metadata" | "status" => {}
            "spec" => walk("spec", value, spec, report),
            _ => unknown(key, report),
        }
    }
}

fn walk(path: &str, value: &Value, shape: &Shape, report: &mut Report) {
    match (shape, value) {
        (Shape::Fields(fields), Value::Object(map)) => {
            for (key, value) in map {
                let path = format!("{path}.{key}");
                match fields.iter().find(|(name, _)| name == key) {
                    Some((_, shape)) => walk(&path, value, shape, report),
                    None => unknown(&path, report),
                }
            }
        }
        (Shape::ListOf(shape), Value::Array(list)) => {
            for (i, value) in list.iter().enumerate() {
                walk(&format!("{path}[{i}]"), value, shape, report);
            }
        }
        (Shape::MapOf(shape), Value::Object(map)) => {
            for (key, value) in map {
                walk(&format!("{path}.{key}"), value, shape, report);
            }
        }
        (Shape::Any | Shape::Fields(_) | Shape::ListOf(_) | Shape::MapOf(_), _) => {}
    }
}

fn unknown(path: &str, report: &mut Report) {
    report.error(path, "this kind has no such field: remove it or correct its name");
}
