//! The filter CORS.

use serde::Deserialize;

use super::matches::{header_name, is_method};
use super::{MAX_ITEMS, at_most};
use crate::model::http::{Cors, Pattern, Preflight, Value, ValueMatch};
use crate::translate::report::{Report, nullable};

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", expecting = "an object")]
pub(super) struct SpecCors {
    #[serde(default, deserialize_with = "nullable")]
    allow_origins: Vec<String>,
    #[serde(default, deserialize_with = "nullable")]
    allow_credentials: bool,
    #[serde(default, deserialize_with = "nullable")]
    allow_methods: Vec<String>,
    #[serde(default, deserialize_with = "nullable")]
    allow_headers: Vec<String>,
    #[serde(default, deserialize_with = "nullable")]
    expose_headers: Vec<String>,
    max_age: Option<i64>,
}

const MAX_NAMES: usize = 64;
/// Seconds, as the API has it.
const MAX_AGE: i64 = 5;

impl SpecCors {
    pub fn read(self, field: &str, report: &mut Report) -> Option<Cors> {
        let Self { allow_origins, allow_credentials, allow_methods, allow_headers, mut expose_headers, max_age } = self;
        let lists = [
            ("allowOrigins", &allow_origins, MAX_NAMES),
            ("allowMethods", &allow_methods, MAX_ITEMS),
            ("allowHeaders", &allow_headers, MAX_NAMES),
            ("exposeHeaders", &expose_headers, MAX_NAMES),
        ];
        for (key, list, limit) in lists {
            let field = format!("{field}.{key}");
            at_most(limit, list.len(), &field, report);
            if list.len() > 1 && list.iter().any(|item| item == "*") && key != "exposeHeaders" {
                report.error(&field, "`*` is everything, and stands alone: remove it or the others");
            }
        }
        for (i, method) in allow_methods.iter().enumerate().filter(|(_, m)| *m != "*" && !is_method(m)) {
            report.error(
                &format!("{field}.allowMethods[{i}]"),
                format!("`{method}` is no method of the API: correct it"),
            );
        }
        for (key, list) in [("allowHeaders", &allow_headers), ("exposeHeaders", &expose_headers)] {
            for (i, name) in list.iter().enumerate().filter(|(_, name)| *name != "*") {
                header_name(&format!("{field}.{key}[{i}]"), name, report);
            }
        }
        if allow_credentials && expose_headers.iter().any(|name| name == "*") {
            let message = "with credentials a browser takes `*` for a name, so that it is left away: name the headers";
            report.warning(&format!("{field}.exposeHeaders"), message);
            expose_headers.retain(|name| name != "*");
        }
        let max_age = max_age.unwrap_or(MAX_AGE);
        if !(1..=i64::from(i32::MAX)).contains(&max_age) {
            report.error(&format!("{field}.maxAge"), format!("{max_age} is no time: write seconds, 1 or more"));
        }
        if allow_origins.is_empty() {
            report.warning(&format!("{field}.allowOrigins"), "nobody is allowed anything: write the origins it is for");
        }
        let mut origins = Vec::with_capacity(allow_origins.len());
        for (i, text) in allow_origins.iter().enumerate() {
            match origin(text) {
                Some(origin) => origins.push(origin),
                None => {
                    let message = format!("`{text}` is no origin: write `https://host`, `https://*.host` or `*`");
                    report.error(&format!("{field}.allowOrigins[{i}]"), message);
                }
            }
        }
        let list = |names: Vec<String>| (!names.is_empty()).then(|| Value::new(&names.join(","))).flatten();
        Some(Cors {
            origins,
            methods: list(allow_methods),
            headers: list(allow_headers),
            max_age: Value::new(&max_age.to_string()),
            expose: list(expose_headers),
            credentials: allow_credentials,
            unmatched: Preflight::Answer,
        })
    }
}

/// Browsers write origins in lower case, and no port where it is the scheme's own.
fn origin(text: &str) -> Option<ValueMatch> {
    if text == "*" {
        return Some(ValueMatch::Present);
    }
    let (scheme, rest) = text.split_once("://")?;
    let usual = match scheme {
        "http" => 80,
        "https" => 443,
        _ => return None,
    };
    let (host, port) = match rest.split_once(':') {
        Some((host, port)) if port.len() <= 5 => (host, port.parse::<u16>().ok().filter(|port| *port > 0)?),
        Some(_) => return None,
        None => (rest, usual),
    };
    let host = host.to_ascii_lowercase();
    let port = if port == usual { String::new() } else { format!(":{port}") };
    let label = |label: &str| !label.is_empty() && label.bytes().all(|c| c.is_ascii_alphanumeric() || c == b'-');
    let pattern = |tail: &str| Pattern::new(&format!("{scheme}://[^/:]+{tail}{port}")).ok().map(ValueMatch::Pattern);
    match host.strip_prefix('*') {
        None => host.split('.').all(label).then(|| ValueMatch::Exact(format!("{scheme}://{host}{port}").into())),
        Some("") => pattern(""),
        Some(tail) => {
            let names = tail.strip_prefix('.')?;
            names.split('.').all(label).then(|| pattern(&tail.replace('.', "\\.")))?
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_origin_is_what_a_browser_writes() {
        let cases = [
            ("https://Shop.example", "https://shop.example", true),
            ("https://shop.example:443", "https://shop.example", true),
            ("http://shop.example:443", "http://shop.example:443", true),
            ("https://shop.example", "https://shop.example:8443", false),
            ("https://*.shop.example", "https://a.b.shop.example", true),
            ("https://*.shop.example", "https://shop.example", false),
            ("https://*.shop.example", "https://evil.example/.shop.example", false),
            ("https://*.shop.example", "https://a.shop.example.evil", false),
            ("https://*.shop.example", "https://a.shopxexample", false),
            ("http://*", "http://anything", true),
            ("http://*", "https://anything", false),
            ("http://*:8080", "http://a:8080", true),
            ("*", "null", true),
        ];
        for (written, asked, expected) in cases {
            let found = match origin(written).unwrap() {
                ValueMatch::Exact(text) => *text == *asked,
                ValueMatch::Pattern(pattern) => pattern.matches(asked),
                ValueMatch::Present => true,
                other => panic!("{other:?}"),
            };
            assert_eq!(found, expected, "{written} {asked}");
        }
    }

    #[test]
    fn what_is_no_origin_is_refused() {
        let wrong =
            ["", "shop.example", "ftp://a", "https://", "https://a/", "https://a:0", "https://a:x", "https://a*.b"];
        for text in wrong.iter().chain(&["https://*a", "https://a:999999", "https://a..b", "https://*.", "null"]) {
            assert_eq!(origin(text), None, "{text}");
        }
    }
}
