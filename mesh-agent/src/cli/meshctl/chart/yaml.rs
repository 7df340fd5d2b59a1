//! YAML as far as a chart needs it: documents, data out of text, text out of data.

use serde_json::Value;

/// The documents of a stream, each with its comments.
pub(in crate::cli::meshctl) fn documents(text: &str) -> Vec<String> {
    let mut documents = vec![String::new()];
    for line in text.lines() {
        match (line.trim_end() == "---", documents.last_mut()) {
            (true, _) | (false, None) => documents.push(String::new()),
            (false, Some(document)) => {
                document.push_str(line);
                document.push('\n');
            }
        }
    }
    documents
        .retain(|document| document.lines().any(|line| !line.trim().is_empty() && !line.trim_start().starts_with('#')));
    documents
}

/// One document. An empty one, or one of comments, is null.
pub(in crate::cli::meshctl) fn parse(text: &str) -> Result<Value, String> {
    if documents(text).is_empty() {
        return Ok(Value::Null);
    }
    let mut options = serde_saphyr::Options::default();
    options.duplicate_keys = serde_saphyr::DuplicateKeyPolicy::Error;
    options.with_snippet = false;
    options.strict_booleans = true;
    serde_saphyr::from_str_with_options(text, options).map_err(|e| {
        let text = e.to_string();
        text.lines().next().unwrap_or("it is no YAML").to_owned()
    })
}

/// Data as block YAML; ends with a line's end.
pub(in crate::cli::meshctl) fn print(value: &Value) -> String {
    let mut out = String::new();
    block(value, 0, &mut out);
    out
}

/// A value at the beginning of a line.
fn block(value: &Value, indent: usize, out: &mut String) {
    match value {
        Value::Object(map) if !map.is_empty() => {
            for (key, value) in map {
                out.extend(std::iter::repeat_n(' ', indent));
                out.push_str(&text(key));
                out.push(':');
                after(value, indent, out);
            }
        }
        Value::Array(items) if !items.is_empty() => {
            for item in items {
                out.extend(std::iter::repeat_n(' ', indent));
                out.push('-');
                let mut inner = String::new();
                block(item, indent + 2, &mut inner);
                // Its first line stands behind the dash.
                out.push(' ');
                out.push_str(inner.trim_start_matches(' '));
            }
        }
        scalar => {
            out.push_str(&plain(scalar));
            out.push('\n');
        }
    }
}

/// A value behind a key.
fn after(value: &Value, indent: usize, out: &mut String) {
    match value {
        Value::Object(map) if !map.is_empty() => {
            out.push('\n');
            block(value, indent + 2, out);
        }
        Value::Array(items) if !items.is_empty() => {
            out.push('\n');
            block(value, indent, out);
        }
        scalar => {
            out.push(' ');
            out.push_str(&plain(scalar));
            out.push('\n');
        }
    }
}

fn plain(value: &Value) -> String {
    match value {
        Value::String(string) => text(string),
        Value::Object(_) => "{}".to_owned(),
        Value::Array(_) => "[]".to_owned(),
        other => other.to_string(),
    }
}

/// Without quotes where no reader, of YAML 1.1 neither, could take it for something else.
fn text(string: &str) -> String {
    let harmless = |c: char| c.is_ascii_alphanumeric() || "-_./$%+".contains(c);
    let words = ["true", "false", "yes", "no", "on", "off", "y", "n", "null", "~"];
    let begins_well = string.chars().next().is_some_and(|c| c.is_ascii_alphabetic() || c == '/' || c == '$');
    let inside = string.chars().enumerate().all(|(i, c)| {
        harmless(c)
            || c == ' ' && i + 1 < string.len()
            // `a:b` is a text, `a: b` and `a:` are maps.
            || c == ':' && string[i + 1..].starts_with(harmless)
    });
    if begins_well && inside && string.is_ascii() && !words.contains(&string.to_lowercase().as_str()) {
        return string.to_owned();
    }
    Value::from(string).to_string()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_is_printed_is_read_again() {
        let value = json!({
            "a": {"b": [1, "2", true, null, 1.5], "empty": {}, "none": []},
            "words": ["off", "yes", "", " a", "a: b", "a:b", "10:30", "#x", "a #b", "-x", "0.0.0.0:15020", "é", "a\nb"],
            "list": [{"x": 1, "y": [{"z": {}}]}, [["deep"]]],
            "off": "24h",
        });
        assert_eq!(parse(&print(&value)).unwrap(), value, "{}", print(&value));
    }

    #[test]
    fn it_reads_well() {
        let value = json!({"agent": {"args": ["--a=b", "c"], "resources": {"requests": {"cpu": "100m"}}}});
        let expected = "agent:\n  args:\n  - \"--a=b\"\n  - c\n  resources:\n    requests:\n      cpu: \"100m\"\n";
        assert_eq!(print(&value), expected);
    }

    #[test]
    fn documents_without_content_are_none() {
        assert_eq!(documents("# only\n---\n\n---\na: 1\n---\nb: 2\n"), ["a: 1\n", "b: 2\n"]);
    }
}
