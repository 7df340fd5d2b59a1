//! Which rule a request falls under.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::Arc;

use http::{HeaderMap, HeaderName, Method};

use crate::model::http::{HttpMatch, HttpRule, PathMatch, RouteTable, SourceMatch, ValueMatch};

/// The parts of a request's head that rules speak of.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    pub method: &'a Method,
    /// As `normal_path` gives it, without the query.
    pub path: &'a str,
    /// Without the question mark.
    pub query: Option<&'a str>,
    pub scheme: &'a str,
    pub authority: &'a str,
    pub headers: &'a HeaderMap,
    pub client: Client<'a>,
}

/// Who asks.
#[derive(Debug, Clone, Copy)]
pub struct Client<'a> {
    pub namespace: &'a str,
    pub labels: &'a BTreeMap<Arc<str>, Arc<str>>,
}

/// A rule, and the match of it that holds: a rewrite of a prefix needs to know which.
#[derive(Debug, Clone, Copy)]
pub struct Found<'t> {
    pub rule: &'t Arc<HttpRule>,
    pub matched: &'t HttpMatch,
}

/// The first rule that matches.
pub fn find<'t>(table: &'t RouteTable, request: &Request<'_>) -> Option<Found<'t>> {
    table.rules.iter().find_map(|rule| {
        let matched = rule.matches.iter().find(|m| matches(m, request))?;
        Some(Found { rule, matched })
    })
}

fn matches(wanted: &HttpMatch, request: &Request<'_>) -> bool {
    let HttpMatch { path, ignore_path_case, method, scheme, authority, headers, without_headers, query, source } =
        wanted;
    // What costs least comes first.
    let text = |wanted: &Option<ValueMatch>, found: &str| wanted.as_ref().is_none_or(|w| value(w, found));
    text(method, request.method.as_str())
        && path.as_ref().is_none_or(|p| path_matches(p, request.path, *ignore_path_case))
        && text(scheme, request.scheme)
        && text(authority, request.authority)
        && headers.iter().all(|(name, wanted)| header(&name.0, wanted, request.headers))
        && !without_headers.iter().any(|(name, unwanted)| header(&name.0, unwanted, request.headers))
        && query.iter().all(|(name, wanted)| query_matches(name, wanted, request.query))
        && source_matches(source, &request.client)
}

fn path_matches(wanted: &PathMatch, path: &str, ignore_case: bool) -> bool {
    let begins = |prefix: &str| match ignore_case {
        true => path.as_bytes().get(..prefix.len()).is_some_and(|b| b.eq_ignore_ascii_case(prefix.as_bytes())),
        false => path.starts_with(prefix),
    };
    match wanted {
        PathMatch::Exact(exact) if ignore_case => path.eq_ignore_ascii_case(exact),
        PathMatch::Exact(exact) => path == &**exact,
        PathMatch::Prefix(prefix) => begins(prefix),
        PathMatch::Elements(prefix) => begins(prefix) && matches!(path.as_bytes().get(prefix.len()), None | Some(b'/')),
        PathMatch::Pattern(pattern) => pattern.matches(path),
    }
}

pub(super) fn value(wanted: &ValueMatch, found: &str) -> bool {
    match wanted {
        ValueMatch::Exact(exact) => found == &**exact,
        ValueMatch::ExactIgnoringCase(exact) => found.eq_ignore_ascii_case(exact),
        ValueMatch::Prefix(prefix) => found.starts_with(&**prefix),
        ValueMatch::Pattern(pattern) => pattern.matches(found),
        ValueMatch::Present => true,
    }
}

/// A header that stands there several times is one whose values are joined by commas (RFC 9110, 5.3). A value that is no
/// UTF-8 is there, and like no text.
pub(super) fn header(name: &HeaderName, wanted: &ValueMatch, headers: &HeaderMap) -> bool {
    let mut values = headers.get_all(name).iter();
    let Some(first) = values.next() else { return false };
    if matches!(wanted, ValueMatch::Present) {
        return true;
    }
    let Ok(first) = std::str::from_utf8(first.as_bytes()) else { return false };
    let mut found = Cow::Borrowed(first);
    for next in values {
        let Ok(next) = std::str::from_utf8(next.as_bytes()) else { return false };
        let all = found.to_mut();
        all.push(',');
        all.push_str(next);
    }
    value(wanted, &found)
}

fn query_matches(name: &str, wanted: &ValueMatch, query: Option<&str>) -> bool {
    let mut pairs = query.unwrap_or_default().split('&').map(|pair| pair.split_once('=').unwrap_or((pair, "")));
    pairs.find(|(n, _)| *n == name).is_some_and(|(_, found)| value(wanted, found))
}

fn source_matches(wanted: &SourceMatch, client: &Client<'_>) -> bool {
    wanted.namespace.as_ref().is_none_or(|n| **n == *client.namespace)
        && wanted.labels.iter().all(|(key, label)| client.labels.get(key) == Some(label))
}

/// The path as it is judged, and as it goes on: `.` and `..` resolved, also where a client hides them as `%2e`, and `\` as
/// `/`. Else a rule for `/admin` could be walked around. As Istio's default, BASE, has it.
pub fn normal_path(path: &str) -> Cow<'_, str> {
    if !path.split(['/', '\\']).any(|element| dots(element) > 0) && !path.contains('\\') {
        return Cow::Borrowed(path);
    }
    let mut kept: Vec<&str> = Vec::new();
    let mut is_folder = false;
    for element in path.split(['/', '\\']).skip(1) {
        is_folder = dots(element) > 0;
        match dots(element) {
            0 => kept.push(element),
            1 => {}
            _ => _ = kept.pop(),
        }
    }
    if is_folder {
        kept.push("");
    }
    Cow::Owned(format!("/{}", kept.join("/")))
}

/// 1 for `.`, 2 for `..`, else 0.
fn dots(element: &str) -> usize {
    let (mut rest, mut dots) = (element, 0);
    while !rest.is_empty() {
        rest = match rest.as_bytes() {
            [b'.', ..] => &rest[1..],
            [b'%', b'2', b'e' | b'E', ..] => &rest[3..],
            _ => return 0,
        };
        dots += 1;
    }
    if dots > 2 { 0 } else { dots }
}

#[cfg(test)]
mod tests;
