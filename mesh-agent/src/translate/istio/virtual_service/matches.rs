//! What a route asks of a request.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::super::values::{SpecText, Text};
use super::MESH;
use crate::model::http::{HttpMatch, Name, PathMatch, SourceMatch};
use crate::translate::report::{Labels, Report, nullable};

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", expecting = "an object")]
pub(super) struct SpecMatch {
    uri: Option<SpecText>,
    scheme: Option<SpecText>,
    method: Option<SpecText>,
    authority: Option<SpecText>,
    #[serde(default, deserialize_with = "nullable")]
    headers: BTreeMap<String, Option<SpecText>>,
    port: Option<u16>,
    #[serde(default, deserialize_with = "nullable")]
    source_labels: Labels,
    #[serde(default, deserialize_with = "nullable")]
    gateways: Vec<String>,
    #[serde(default, deserialize_with = "nullable")]
    query_params: BTreeMap<String, Option<SpecText>>,
    #[serde(default, deserialize_with = "nullable")]
    ignore_uri_case: bool,
    #[serde(default, deserialize_with = "nullable")]
    without_headers: BTreeMap<String, Option<SpecText>>,
    #[serde(default, deserialize_with = "nullable")]
    source_namespace: String,
    #[serde(default, deserialize_with = "nullable")]
    stat_prefix: String,
}

impl SpecMatch {
    /// With the port that it is for. `None`: it is for gateways alone, or broken.
    pub fn read(self, field: &str, report: &mut Report) -> Option<(Option<u16>, HttpMatch)> {
        if !self.stat_prefix.is_empty() {
            let message = "names of Envoy's own metrics are not honoured: give the route a name, which metrics show";
            report.warning(&format!("{field}.statPrefix"), message);
        }
        if self.port == Some(0) {
            report.error(&format!("{field}.port"), "`0` is no port: use 1 to 65535");
        }
        let mut text = |name: &str, given: Option<SpecText>| {
            let field = format!("{field}.{name}");
            let given = given?;
            given.value(&field, report)
        };
        let (scheme, method) = (text("scheme", self.scheme), text("method", self.method));
        let authority = text("authority", self.authority);
        let path = self.uri.and_then(|uri| path(uri, &format!("{field}.uri"), report));
        if self.ignore_uri_case && matches!(path, Some(PathMatch::Pattern(_))) {
            let message = "a regex looks at case: write `(?i)` at its beginning instead";
            report.error(&format!("{field}.ignoreUriCase"), message);
        }
        let found = HttpMatch {
            path,
            ignore_path_case: self.ignore_uri_case,
            method,
            scheme,
            authority,
            headers: headers(self.headers, &format!("{field}.headers"), report),
            without_headers: headers(self.without_headers, &format!("{field}.withoutHeaders"), report),
            query: self
                .query_params
                .into_iter()
                .filter_map(|(name, wanted)| {
                    let field = format!("{field}.queryParams[{name}]");
                    Some((name.into(), wanted.unwrap_or_default().value(&field, report)?))
                })
                .collect(),
            source: SourceMatch {
                namespace: (!self.source_namespace.is_empty()).then(|| self.source_namespace.into()),
                labels: self.source_labels.into_iter().map(|(k, v)| (k.into(), v.into())).collect(),
            },
        };
        let is_for_mesh = self.gateways.is_empty() || self.gateways.iter().any(|g| g == MESH);
        is_for_mesh.then_some((self.port, found))
    }
}

fn path(uri: SpecText, field: &str, report: &mut Report) -> Option<PathMatch> {
    Some(match uri.read(field, report)? {
        Text::Exact(text) => PathMatch::Exact(text.into()),
        Text::Prefix(text) => PathMatch::Prefix(text.into()),
        Text::Pattern(pattern) => PathMatch::Pattern(pattern),
        Text::Nothing => {
            report.error(field, "it says nothing: write exact, prefix or regex");
            return None;
        }
    })
}

fn headers(
    given: BTreeMap<String, Option<SpecText>>,
    field: &str,
    report: &mut Report,
) -> Vec<(Name, crate::model::http::ValueMatch)> {
    let mut found = Vec::new();
    for (key, wanted) in given {
        let field = format!("{field}[{key}]");
        let Some(name) = Name::new(&key) else {
            let message = match key.as_str() {
                ":authority" | ":method" | ":path" | ":scheme" => {
                    "it is no header: use the fields authority, method, uri and scheme of the match"
                }
                _ => "no header has such a name: use letters, digits and `-`",
            };
            report.error(&field, message);
            continue;
        };
        let Some(value) = wanted.unwrap_or_default().value(&field, report) else { continue };
        found.push((name, value));
    }
    found
}
