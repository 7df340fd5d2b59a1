//! Headers that are changed.

use http::HeaderMap;

use crate::model::http::HeaderEdits;

/// Removes, sets, adds, in this order.
pub fn apply(edits: &HeaderEdits, headers: &mut HeaderMap) {
    for name in &edits.remove {
        headers.remove(&name.0);
    }
    for (name, value) in &edits.set {
        headers.insert(name.0.clone(), value.0.clone());
    }
    for (name, value) in &edits.add {
        headers.append(name.0.clone(), value.0.clone());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::http::{Name, Value};

    #[test]
    fn removes_then_sets_then_adds() {
        let pair = |name: &str, value: &str| (Name::new(name).unwrap(), Value::new(value).unwrap());
        let edits = HeaderEdits {
            remove: vec![Name::new("X-Gone").unwrap(), Name::new("x-back").unwrap()],
            set: vec![pair("x-one", "1"), pair("x-back", "new")],
            add: vec![pair("x-two", "2")],
        };
        let mut headers = HeaderMap::new();
        for (name, value) in
            [("x-gone", "a"), ("x-gone", "b"), ("x-one", "a"), ("x-one", "b"), ("x-two", "1"), ("x-back", "old")]
        {
            headers.append(name, value.parse().unwrap());
        }
        apply(&edits, &mut headers);
        let mut found: Vec<_> = headers.iter().map(|(n, v)| (n.as_str(), v.to_str().unwrap())).collect();
        found.sort_unstable();
        assert_eq!(found, [("x-back", "new"), ("x-one", "1"), ("x-two", "1"), ("x-two", "2")]);
    }
}
