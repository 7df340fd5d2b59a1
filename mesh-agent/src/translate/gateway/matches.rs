//! What rules ask of a request, and which of two that match comes first.

use std::cmp::Reverse;
use std::sync::Arc;

use serde::Deserialize;

use super::{MAX_ITEMS, at_most};
use crate::model::http::{HttpMatch, Name, PathMatch, Pattern, ValueMatch};
use crate::translate::report::{Report, nullable};

/// What comes first has the smaller one. What the numbers count, the kind of route says; only those of one kind meet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::translate) struct Rank(Reverse<[usize; 5]>);

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", expecting = "an object")]
pub(super) struct SpecHttp {
    #[serde(default, deserialize_with = "nullable")]
    path: SpecPath,
    #[serde(default, deserialize_with = "nullable")]
    method: String,
    #[serde(default, deserialize_with = "nullable")]
    headers: Vec<SpecValue>,
    #[serde(default, deserialize_with = "nullable")]
    query_params: Vec<SpecValue>,
}

#[derive(Default, Deserialize)]
#[serde(expecting = "an object")]
struct SpecPath {
    #[serde(default, deserialize_with = "nullable")]
    r#type: String,
    value: Option<String>,
}

#[derive(Deserialize)]
#[serde(expecting = "an object")]
struct SpecValue {
    #[serde(default, deserialize_with = "nullable")]
    r#type: String,
    name: String,
    value: String,
}

#[derive(Default, Deserialize)]
#[serde(expecting = "an object")]
pub(super) struct SpecGrpc {
    method: Option<SpecMethod>,
    #[serde(default, deserialize_with = "nullable")]
    headers: Vec<SpecValue>,
}

#[derive(Deserialize)]
#[serde(expecting = "an object")]
struct SpecMethod {
    #[serde(default, deserialize_with = "nullable")]
    r#type: String,
    #[serde(default, deserialize_with = "nullable")]
    service: String,
    #[serde(default, deserialize_with = "nullable")]
    method: String,
}

const METHODS: [&str; 9] = ["GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"];
const MAX_PATH: usize = 1024;
const MAX_VALUE: usize = 4096;

pub(super) fn is_method(text: &str) -> bool {
    METHODS.contains(&text)
}

impl SpecHttp {
    /// Whether it asks for a prefix of the path, as `ReplacePrefixMatch` needs it.
    pub fn has_prefix(&self) -> bool {
        matches!(self.path.r#type.as_str(), "" | "PathPrefix")
    }

    pub fn read(self, field: &str, report: &mut Report) -> Option<(Rank, HttpMatch)> {
        let path = self.path.read(&format!("{field}.path"), report)?;
        let mut found = HttpMatch::default();
        if !self.method.is_empty() {
            if !is_method(&self.method) {
                let message = format!("`{}` is no method of the API: use one of {}", self.method, METHODS.join(", "));
                report.error(&format!("{field}.method"), message);
            }
            found.method = Some(ValueMatch::Exact(self.method.into()));
        }
        headers(self.headers, field, &mut found, report);
        at_most(MAX_ITEMS, self.query_params.len(), &format!("{field}.queryParams"), report);
        for (i, param) in self.query_params.into_iter().enumerate() {
            let field = format!("{field}.queryParams[{i}]");
            if !is_token(&param.name) {
                report
                    .error(&format!("{field}.name"), format!("`{}` is no name of a parameter: correct it", param.name));
            }
            let name: Arc<str> = param.name.as_str().into();
            let Some(value) = param.value(&field, report) else { continue };
            if found.query.iter().any(|(known, _)| *known == name) {
                only_the_first(&field, &name, report);
                continue;
            }
            found.query.push((name, value));
        }
        // A pattern comes between: it says more than a prefix, which may be the one of everything.
        let (kind, length) = match &path {
            PathMatch::Exact(_) => (2, 0),
            PathMatch::Pattern(_) => (1, 0),
            PathMatch::Prefix(prefix) | PathMatch::Elements(prefix) => (0, prefix.chars().count()),
        };
        let method = usize::from(found.method.is_some());
        let rank = Rank(Reverse([2 * MAX_PATH * kind + length, method, count(&found), found.query.len(), 0]));
        found.path = Some(path);
        Some((rank, found))
    }
}

impl SpecPath {
    fn read(self, field: &str, report: &mut Report) -> Option<PathMatch> {
        let value = self.value.unwrap_or_else(|| "/".to_owned());
        let field = &format!("{field}.value");
        match self.r#type.as_str() {
            "RegularExpression" => pattern(field, &value, report).map(PathMatch::Pattern),
            exact @ ("" | "PathPrefix" | "Exact") => {
                if let Some(wrong) = wrong_path(&value) {
                    report.error(field, wrong);
                    return None;
                }
                Some(if exact == "Exact" { PathMatch::Exact(value.into()) } else { PathMatch::elements(&value) })
            }
            other => {
                let message =
                    format!("`{other}` is no way to compare paths: use Exact, PathPrefix or RegularExpression");
                report.error(field.trim_end_matches(".value"), message);
                None
            }
        }
    }
}

/// What is wrong with a path that is compared as it stands, if anything.
fn wrong_path(path: &str) -> Option<String> {
    if !path.starts_with('/') {
        return Some(format!("`{path}` does not begin with a slash: write `/{path}`"));
    }
    for never in ["//", "/./", "/../", "%2f", "%2F", "#"] {
        if path.contains(never) {
            return Some(format!("`{path}` has `{never}` in it, which no path of a request has: remove it"));
        }
    }
    if path.ends_with("/.") || path.ends_with("/..") {
        return Some(format!("`{path}` ends with dots, which no path of a request does: remove them"));
    }
    (!is_path(path)).then(|| format!("`{path}` has letters that no path has: write them with `%`, and without a query"))
}

/// Letters that may stand in a path, and not too many.
pub(super) fn is_path(path: &str) -> bool {
    let mut letters = path.bytes();
    while let Some(letter) = letters.next() {
        let good = match letter {
            b'%' => [letters.next(), letters.next()].iter().all(|c| c.is_some_and(|c| c.is_ascii_hexdigit())),
            c => c.is_ascii_alphanumeric() || b"-/._~!$&'()*+,;=:@".contains(&c),
        };
        if !good {
            return false;
        }
    }
    path.len() <= MAX_PATH
}

fn headers(given: Vec<SpecValue>, field: &str, found: &mut HttpMatch, report: &mut Report) {
    at_most(MAX_ITEMS, given.len(), &format!("{field}.headers"), report);
    for (i, header) in given.into_iter().enumerate() {
        let field = format!("{field}.headers[{i}]");
        let name = header_name(&format!("{field}.name"), &header.name, report);
        let value = header.value(&field, report);
        let (Some(name), Some(value)) = (name, value) else { continue };
        // HTTP/2 has no such header; what both have is the authority. Hosts are compared without regard to case.
        if name.0 == "host" {
            let value = match value {
                ValueMatch::Exact(host) => ValueMatch::ExactIgnoringCase(host),
                other => other,
            };
            match found.authority {
                None => found.authority = Some(value),
                Some(_) => only_the_first(&field, "host", report),
            }
            continue;
        }
        match found.headers.iter().any(|(known, _)| *known == name) {
            true => only_the_first(&field, name.0.as_str(), report),
            false => found.headers.push((name, value)),
        }
    }
}

fn count(found: &HttpMatch) -> usize {
    found.headers.len() + usize::from(found.authority.is_some())
}

fn only_the_first(field: &str, name: &str, report: &mut Report) {
    report.warning(field, format!("`{name}` stands here twice, and only the first counts: remove this one"));
}

impl SpecValue {
    fn value(self, field: &str, report: &mut Report) -> Option<ValueMatch> {
        let at = format!("{field}.value");
        if self.value.is_empty() || self.value.len() > MAX_VALUE {
            report.error(&at, "the value is empty or too long: write 1 to 4096 letters");
            return None;
        }
        match self.r#type.as_str() {
            "" | "Exact" => Some(ValueMatch::Exact(self.value.into())),
            "RegularExpression" => pattern(&at, &self.value, report).map(ValueMatch::Pattern),
            other => {
                let message = format!("`{other}` is no way to compare values: use Exact or RegularExpression");
                report.error(&format!("{field}.type"), message);
                None
            }
        }
    }
}

fn pattern(field: &str, text: &str, report: &mut Report) -> Option<Pattern> {
    Pattern::new(text).map_err(|e| report.error(field, e.to_string())).ok()
}

pub(super) fn header_name(field: &str, text: &str, report: &mut Report) -> Option<Name> {
    let name = Name::new(text);
    if name.is_none() {
        report.error(field, format!("`{text}` is no name of a header: use letters, digits and `-`"));
    }
    name
}

/// What names of headers, cookies and parameters are made of.
pub(super) fn is_token(text: &str) -> bool {
    !text.is_empty()
        && text.len() <= 256
        && text.bytes().all(|c| c.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&c))
}

impl SpecGrpc {
    pub fn read(self, field: &str, report: &mut Report) -> Option<(Rank, HttpMatch)> {
        let mut found = HttpMatch::default();
        let (mut service, mut method) = (0, 0);
        if let Some(spec) = self.method {
            (service, method) = (spec.service.chars().count(), spec.method.chars().count());
            found.path = Some(spec.read(&format!("{field}.method"), report)?);
        }
        headers(self.headers, field, &mut found, report);
        Some((Rank(Reverse([service, method, count(&found), 0, 0])), found))
    }
}

impl SpecMethod {
    /// A method is the path `/service/method`.
    fn read(self, field: &str, report: &mut Report) -> Option<PathMatch> {
        let Self { r#type, service, method } = self;
        if service.is_empty() && method.is_empty() {
            report.error(field, "it names neither service nor method: write at least one, or leave `method` away");
            return None;
        }
        match r#type.as_str() {
            "" | "Exact" => {
                let (good_service, good_method) = (is_service(&service), is_identifier(&method));
                if !service.is_empty() && !good_service {
                    report.error(
                        &format!("{field}.service"),
                        format!("`{service}` is no gRPC service: write `package.Service`"),
                    );
                }
                if !method.is_empty() && !good_method {
                    report.error(
                        &format!("{field}.method"),
                        format!("`{method}` is no gRPC method: write its name alone"),
                    );
                }
                match (good_service, good_method) {
                    (true, true) => Some(PathMatch::Exact(format!("/{service}/{method}").into())),
                    (true, false) if method.is_empty() => Some(PathMatch::elements(&format!("/{service}"))),
                    (false, true) if service.is_empty() => {
                        pattern(field, &format!("/[^/]+/{method}"), report).map(PathMatch::Pattern)
                    }
                    _ => None,
                }
            }
            "RegularExpression" => {
                let mut part = |name: &str, text: &str| match text {
                    "" => Some("[^/]+".to_owned()),
                    // Alone first, so that its own brackets are whole.
                    text => pattern(&format!("{field}.{name}"), text, report).map(|_| format!("(?:{text})")),
                };
                let (service, method) = (part("service", &service), part("method", &method));
                pattern(field, &format!("/{}/{}", service?, method?), report).map(PathMatch::Pattern)
            }
            other => {
                let message = format!("`{other}` is no way to compare methods: use Exact or RegularExpression");
                report.error(&format!("{field}.type"), message);
                None
            }
        }
    }
}

fn is_identifier(text: &str) -> bool {
    let mut letters = text.bytes();
    letters.next().is_some_and(|c| c.is_ascii_alphabetic() || c == b'_')
        && letters.all(|c| c.is_ascii_alphanumeric() || c == b'_')
        && text.len() <= MAX_PATH
}

fn is_service(text: &str) -> bool {
    !text.is_empty() && text.strip_prefix('.').unwrap_or(text).split('.').all(is_identifier)
}
