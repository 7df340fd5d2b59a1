//! Whether values are what the chart's `values.schema.json` says, in one sentence where not.
//!
//! It knows the words of JSON Schema that the file uses; a test finds others.

use serde_json::Value;

/// The words that are judged here.
#[cfg(test)]
pub(super) const WORDS: [&str; 8] =
    ["type", "properties", "additionalProperties", "items", "enum", "minLength", "minimum", "pattern"];

/// The first thing that is wrong with `value`, called `path`.
pub(super) fn check(value: &Value, schema: &Value, path: &str) -> Result<(), String> {
    let types: Vec<&str> = match &schema["type"] {
        Value::String(one) => vec![one],
        Value::Array(several) => several.iter().filter_map(Value::as_str).collect(),
        _ => Vec::new(),
    };
    if !types.is_empty() && !types.iter().any(|kind| is(value, kind)) {
        return Err(format!(
            "`{path}` is {}; it has to be {}",
            shown(value),
            types.iter().map(|kind| in_words(kind)).collect::<Vec<_>>().join(" or ")
        ));
    }
    if let Some(allowed) = schema["enum"].as_array()
        && !allowed.contains(value)
    {
        let allowed: Vec<&str> = allowed.iter().filter_map(Value::as_str).collect();
        return Err(format!("`{path}` is {}; it has to be one of {}", shown(value), allowed.join(", ")));
    }
    if let Some(least) = schema["minimum"].as_f64()
        && value.as_f64().is_some_and(|n| n < least)
    {
        return Err(format!("`{path}` is {value}; it has to be {least} at least"));
    }
    if schema["minLength"].as_u64().is_some_and(|n| n > 0) && value.as_str() == Some("") {
        return Err(format!("`{path}` is empty; write a value or leave it out"));
    }
    if schema["pattern"].as_str() == Some("^/") && value.as_str().is_some_and(|text| !text.starts_with('/')) {
        return Err(format!("`{path}` is {}; it has to be a path from the root", shown(value)));
    }
    for (key, inner) in value.as_object().into_iter().flatten() {
        let at = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
        match (schema["properties"].get(key), &schema["additionalProperties"]) {
            (Some(known), _) => check(inner, known, &at)?,
            (None, Value::Bool(false)) => return Err(unknown(&at, key, path, &schema["properties"])),
            (None, others) => check(inner, others, &at)?,
        }
    }
    for (i, item) in value.as_array().into_iter().flatten().enumerate() {
        check(item, &schema["items"], &format!("{path}[{i}]"))?;
    }
    Ok(())
}

fn is(value: &Value, kind: &str) -> bool {
    match kind {
        "object" => value.is_object(),
        "array" => value.is_array(),
        "string" => value.is_string(),
        "boolean" => value.is_boolean(),
        "integer" => value.is_i64() || value.is_u64(),
        "number" => value.is_number(),
        _ => false,
    }
}

fn in_words(kind: &str) -> &str {
    match kind {
        "object" => "a map",
        "array" => "a list",
        "string" => "a text",
        "boolean" => "true or false",
        "integer" => "a whole number",
        "number" => "a number",
        other => other,
    }
}

fn shown(value: &Value) -> String {
    match value {
        Value::Object(_) => "a map".to_owned(),
        Value::Array(_) => "a list".to_owned(),
        Value::Null => "nothing".to_owned(),
        scalar => scalar.to_string(),
    }
}

fn unknown(at: &str, key: &str, path: &str, known: &Value) -> String {
    let near = known.as_object().into_iter().flatten().map(|(name, _)| name).min_by_key(|name| distance(name, key));
    let near = near.filter(|name| distance(name, key) <= 2.max(key.len() / 3));
    let next = match (near, path) {
        (Some(name), "") => format!("did you mean `{name}`?"),
        (Some(name), path) => format!("did you mean `{path}.{name}`?"),
        (None, _) => "`meshctl profile dump` shows them all".to_owned(),
    };
    format!("there is no value `{at}`; {next}")
}

/// How many letters have to be added, taken away or changed to make one word of the other.
fn distance(a: &str, b: &str) -> usize {
    let (a, b) = (a.to_lowercase().into_bytes(), b.to_lowercase().into_bytes());
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.iter().enumerate() {
        let mut before = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let changed = before + usize::from(x != y);
            before = row[j + 1];
            row[j + 1] = changed.min(before + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}
