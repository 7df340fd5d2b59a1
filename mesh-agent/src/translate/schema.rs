//! The names of all fields of an object, to find those that are not. Wrong types are found where the fields are read.

use serde_json::Value;

use super::Object;
use super::report::Report;

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
/// is not known. `false` if an object or list stands where it must not: then the fields cannot be read (serde would take
/// a list for an object, by position).
pub(super) fn check(object: &Object, spec: &Shape, report: &mut Report) -> bool {
    let mut readable = true;
    for (key, value) in object.value().as_object().into_iter().flatten() {
        match key.as_str() {
            "apiVersion" | "kind" | "metadata" | "status" => {}
            "spec" => readable &= walk("spec", value, spec, report),
            _ => unknown(key, report),
        }
    }
    readable
}

fn walk(path: &str, value: &Value, shape: &Shape, report: &mut Report) -> bool {
    let mut readable = true;
    match (shape, value) {
        (Shape::Fields(fields), Value::Object(map)) => {
            for (key, value) in map {
                let path = format!("{path}.{key}");
                match fields.iter().find(|(name, _)| name == key) {
                    Some((_, shape)) => readable &= walk(&path, value, shape, report),
                    None => unknown(&path, report),
                }
            }
        }
        (Shape::ListOf(shape), Value::Array(list)) => {
            for (i, value) in list.iter().enumerate() {
                // Nothing as an item would be an empty rule or source, which matches everybody.
                if value.is_null() {
                    report.error(&format!("{path}[{i}]"), "the item is empty: remove it or write what it is to say");
                    readable = false;
                }
                readable &= walk(&format!("{path}[{i}]"), value, shape, report);
            }
        }
        (Shape::MapOf(shape), Value::Object(map)) => {
            for (key, value) in map {
                readable &= walk(&format!("{path}.{key}"), value, shape, report);
            }
        }
        (Shape::Any, _) | (_, Value::Null) => {}
        (Shape::Fields(_) | Shape::MapOf(_), _) => {
            report.error(path, "expected an object with fields: correct what stands here");
            readable = false;
        }
        (Shape::ListOf(_), _) => {
            report.error(path, "expected a list: correct what stands here");
            readable = false;
        }
    }
    readable
}

fn unknown(path: &str, report: &mut Report) {
    report.error(path, "this kind has no such field: remove it or correct its name");
}
