//! A file of manifests becomes objects: YAML with several documents, or JSON. Bounded, so that no file can make the
//! agent run out of memory or stack.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::Object;
use crate::model::Problem;

/// Why a file cannot be read as a whole. Half a file is not taken: the missing half could be the policy that closes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Unreadable {
    /// The text is no YAML or JSON: the line, and what is wrong there.
    Syntax { line: u64, message: String },
    /// The text is well formed, but holds something that is no object.
    Object(Problem),
    /// There is nothing in it at all: more likely half-written than meant.
    Empty,
}

impl std::fmt::Display for Unreadable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Syntax { line, message } => write!(f, "line {line}: {message}: correct it"),
            Self::Object(problem) => std::fmt::Display::fmt(problem, f),
            Self::Empty => f.write_str("the file is empty: delete it if its objects are to go"),
        }
    }
}

/// A single manifest above this many nodes (100 000 pods are in many files) is more likely an attack than a mesh.
const MAX_NODES: usize = 2_000_000;

/// Reads all objects of a file called `file`; the reference of each has the line where its document begins.
pub fn parse(file: &str, bytes: &[u8]) -> Result<Vec<Object>, Unreadable> {
    let text = std::str::from_utf8(bytes).map_err(|e| {
        let line = 1 + bytes[..e.valid_up_to()].iter().filter(|b| **b == b'\n').count() as u64;
        Unreadable::Syntax { line, message: "the text is not UTF-8".into() }
    })?;
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    if text.trim().is_empty() {
        return Err(Unreadable::Empty);
    }
    let mut objects = Vec::new();
    if text.trim_start().starts_with('{') {
        let mut documents = serde_json::Deserializer::from_str(text).into_iter::<Value>();
        loop {
            let rest = &text[documents.byte_offset()..];
            let line = line_at(text, text.len() - rest.trim_start().len());
            match documents.next() {
                None => break,
                Some(Ok(value)) => take(file, line, value, &mut objects)?,
                // Flow-style YAML begins with a brace too.
                Some(Err(_)) if objects.is_empty() && !file.ends_with(".json") => return parse_yaml(file, text),
                Some(Err(e)) => {
                    return Err(Unreadable::Syntax { line: e.line() as u64, message: without_place(&e) });
                }
            }
        }
        return Ok(objects);
    }
    parse_yaml(file, text)
}

/// What closes in place of a file that cannot be read and never could: it may hold policies, and without them its pods
/// would be open. Each text that speaks of a policy closes the namespaces that it names, or the whole mesh if it names
/// none: no connection where it speaks of an AuthorizationPolicy, none without mutual TLS for a PeerAuthentication.
pub fn closed(file: &str, bytes: &[u8], root_namespace: &str) -> Vec<Object> {
    let text = String::from_utf8_lossy(bytes);
    let mut closed = BTreeSet::new();
    for (_, document) in documents(&text) {
        let rule = match (document.contains("AuthorizationPolicy"), document.contains("PeerAuthentication")) {
            (true, _) => EVERYBODY,
            (false, true) => WITHOUT_IDENTITY,
            (false, false) => continue,
        };
        let mut namespaces = namespaces(&document).peekable();
        if namespaces.peek().is_none() {
            closed.insert((rule, root_namespace.to_owned()));
        }
        closed.extend(namespaces.map(|n| (rule, n.to_owned())));
    }
    let policy = |(rule, namespace): (&str, String)| {
        let source =
            if rule == EVERYBODY { json!({}) } else { json!({"from": [{"source": {"notPrincipals": ["*"]}}]}) };
        let value = json!({
            "apiVersion": "security.istio.io/v1",
            "kind": "AuthorizationPolicy",
            "metadata": {"name": format!("{rule} ({file} cannot be read)"), "namespace": namespace},
            "spec": {"action": "DENY", "rules": [source]},
        });
        Object::from_value(file, value).expect("the object is whole")
    };
    closed.into_iter().flat_map(policy).collect()
}

const EVERYBODY: &str = "closed";
const WITHOUT_IDENTITY: &str = "closed to plaintext";

/// The values of all `namespace:` in a text that need not be well formed.
fn namespaces(text: &str) -> impl Iterator<Item = &str> {
    text.match_indices("namespace").filter_map(|(at, word)| {
        let inside_a_word = text[..at].ends_with(|c: char| c.is_ascii_alphanumeric());
        let value = text[at + word.len()..].trim_start_matches('"').trim_start().strip_prefix(':')?;
        let value = value.trim_start_matches([' ', '\t', '"', '\'']);
        let end = value.find(|c: char| !(c.is_ascii_alphanumeric() || c == '-')).unwrap_or(value.len());
        Some(&value[..end]).filter(|v| !v.is_empty() && !inside_a_word)
    })
}

fn parse_yaml(file: &str, text: &str) -> Result<Vec<Object>, Unreadable> {
    let mut objects = Vec::new();
    for (first_line, document) in documents(text) {
        let value: Value = serde_saphyr::from_str_with_options(&document, yaml_options()).map_err(|e| {
            let line = e.location().map_or(first_line, |l| first_line + l.line().max(1) - 1);
            Unreadable::Syntax { line, message: one_line(&e) }
        })?;
        let blank = document.lines().take_while(|l| l.trim().is_empty() || l.trim_start().starts_with('#')).count();
        // A document of comments, or between two markers.
        if !value.is_null() {
            take(file, first_line + blank as u64, value, &mut objects)?;
        }
    }
    Ok(objects)
}

fn take(file: &str, line: u64, value: Value, objects: &mut Vec<Object>) -> Result<(), Unreadable> {
    objects.extend(Object::from_value(&format!("{file}:{line}"), value).map_err(Unreadable::Object)?);
    Ok(())
}

fn yaml_options() -> serde_saphyr::Options {
    let mut options = serde_saphyr::Options::default();
    if let Some(budget) = &mut options.budget {
        // Kubernetes objects nest to about 20; aliases are rare in manifests. The replay limits stop a "billion laughs".
        budget.max_depth = 64;
        budget.max_nodes = MAX_NODES;
        budget.max_events = 2 * MAX_NODES;
        budget.max_aliases = 1000;
        budget.max_anchors = 1000;
    }
    options.alias_limits.max_total_replayed_events = 100_000;
    options.alias_limits.max_replay_stack_depth = 16;
    options.duplicate_keys = serde_saphyr::DuplicateKeyPolicy::Error;
    options.with_snippet = false;
    // YAML 1.2: `no`, `on` and `y` are texts, so that a pod may be called so. A field that wants a boolean says it.
    options.strict_booleans = true;
    options
}

/// The documents of a YAML stream with their first lines. By the specification a line that begins with `---` and a
/// blank always begins a document, whatever stands before it, so they can be told apart without parsing: an error gets
/// the line of the file, and each document a budget of its own.
fn documents(text: &str) -> Vec<(u64, String)> {
    let mut documents = Vec::new();
    let mut current = (1, String::new());
    for (i, line) in text.split_inclusive('\n').enumerate() {
        let marker =
            |m: &str| line.strip_prefix(m).is_some_and(|r| r.is_empty() || r.starts_with([' ', '\t', '\r', '\n']));
        if marker("---") {
            if only_directives(&current.1) {
                current.1.clear();
            }
            documents.push(std::mem::replace(&mut current, (i as u64 + 1, String::new())));
            current.1.push_str("   ");
            current.1.push_str(&line[3..]);
        } else if marker("...") {
            documents.push(std::mem::replace(&mut current, (i as u64 + 2, String::new())));
        } else {
            current.1.push_str(line);
        }
    }
    documents.push(current);
    documents.retain(|(_, text)| !text.trim().is_empty());
    documents
}

/// Directives stand before the marker and hold for the document behind it; they have no meaning for us.
fn only_directives(text: &str) -> bool {
    text.lines().all(|l| l.trim().is_empty() || l.starts_with(['%', '#']))
}

fn line_at(text: &str, offset: usize) -> u64 {
    1 + text.as_bytes()[..offset].iter().filter(|b| **b == b'\n').count() as u64
}

/// serde_json ends its message with the place, which is told separately.
fn without_place(error: &serde_json::Error) -> String {
    let text = error.to_string();
    text.rsplit_once(" at line ").map_or(text.clone(), |(message, _)| message.to_owned())
}

/// The first line of the parser's message, without the place that is told separately.
fn one_line(error: &serde_saphyr::Error) -> String {
    let text = error.without_snippet().to_string();
    let first = text.lines().map(str::trim).find(|l| !l.is_empty()).unwrap_or("not readable").to_owned();
    let first = first.strip_prefix("error: ").unwrap_or(&first).to_owned();
    // It goes on with advice for programmers.
    let first = first.split(", set DuplicateKeyPolicy").next().unwrap_or(&first).to_owned();
    match first.rfind(" at line ") {
        Some(at) => first[..at].to_owned(),
        None => first,
    }
}
