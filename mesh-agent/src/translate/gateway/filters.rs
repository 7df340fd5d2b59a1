//! What a rule or a backend does to a request beside sending it on.

use std::collections::{BTreeSet, HashSet};
use std::sync::Arc;

use serde::Deserialize;
use serde_json::Value as Json;

use super::matches::{header_name, is_path};
use super::refs::{BackendRef, Referent};
use super::{MAX_ITEMS, at_most, cors, is_name};
use crate::model::http::{
    Action, Authority, Cors, Fraction, HeaderEdits, Mirror, PathRewrite, Redirect, RedirectPort, Respond, Rewrite,
    Target, Value,
};
use crate::translate::report::{Report, nullable};

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", expecting = "an object")]
pub(super) struct SpecFilter {
    r#type: String,
    request_header_modifier: Option<SpecHeaders>,
    response_header_modifier: Option<SpecHeaders>,
    request_mirror: Option<SpecMirror>,
    request_redirect: Option<SpecRedirect>,
    url_rewrite: Option<SpecRewrite>,
    cors: Option<cors::SpecCors>,
    external_auth: Option<Json>,
    extension_ref: Option<SpecExtension>,
}

#[derive(Deserialize)]
#[serde(expecting = "an object")]
struct SpecExtension {
    group: String,
    kind: String,
    name: String,
}

#[derive(Deserialize)]
#[serde(expecting = "an object")]
struct SpecHeaders {
    #[serde(default, deserialize_with = "nullable")]
    set: Vec<SpecHeader>,
    #[serde(default, deserialize_with = "nullable")]
    add: Vec<SpecHeader>,
    #[serde(default, deserialize_with = "nullable")]
    remove: Vec<String>,
}

#[derive(Deserialize)]
#[serde(expecting = "an object")]
struct SpecHeader {
    name: String,
    value: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", expecting = "an object")]
struct SpecMirror {
    backend_ref: BackendRef,
    percent: Option<f64>,
    fraction: Option<SpecFraction>,
}

#[derive(Deserialize)]
#[serde(expecting = "an object")]
struct SpecFraction {
    numerator: u32,
    denominator: Option<u32>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", expecting = "an object")]
struct SpecRedirect {
    scheme: Option<String>,
    hostname: Option<String>,
    path: Option<SpecPath>,
    port: Option<u16>,
    status_code: Option<i64>,
}

#[derive(Deserialize)]
#[serde(expecting = "an object")]
struct SpecRewrite {
    hostname: Option<String>,
    path: Option<SpecPath>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", expecting = "an object")]
struct SpecPath {
    r#type: String,
    replace_full_path: Option<String>,
    replace_prefix_match: Option<String>,
}

/// Which filters a route may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Allowed {
    Http,
    Grpc,
}

/// All filters of one list, put together.
#[derive(Default)]
pub(super) struct Filters {
    pub request: HeaderEdits,
    pub response: HeaderEdits,
    pub rewrite: Rewrite,
    pub mirrors: Vec<(Referent, Mirror)>,
    /// In place of any backend.
    pub answer: Option<Action>,
    pub cors: Option<Cors>,
    /// A filter that cannot be carried out: nothing goes on that it should have seen.
    pub closed: Option<(Arc<str>, u16)>,
    /// The fields of those that a single backend cannot have here.
    pub of_rules: Vec<(String, &'static str)>,
}

/// `has_prefix` says whether the one match of the rule is a prefix of the path.
pub(super) fn filters(
    given: Vec<SpecFilter>,
    field: &str,
    allowed: Allowed,
    has_prefix: bool,
    here: &Arc<str>,
    report: &mut Report,
) -> Filters {
    at_most(MAX_ITEMS, given.len(), field, report);
    let mut found = Filters::default();
    let mut seen = BTreeSet::new();
    for (i, filter) in given.into_iter().enumerate() {
        let field = format!("{field}[{i}]");
        let once = !matches!(filter.r#type.as_str(), "RequestMirror" | "ExtensionRef");
        if !seen.insert(filter.r#type.clone()) && once {
            report.error(&field, format!("{} stands twice: put both into one", filter.r#type));
        }
        filter.read(&field, allowed, has_prefix, here, &mut found, report);
    }
    if seen.contains("URLRewrite") && seen.contains("RequestRedirect") {
        report.error(field, "URLRewrite and RequestRedirect cannot both be done: remove one of the two");
    }
    found
}

impl SpecFilter {
    fn read(
        self,
        field: &str,
        allowed: Allowed,
        has_prefix: bool,
        here: &Arc<str>,
        found: &mut Filters,
        report: &mut Report,
    ) {
        let Self {
            r#type,
            request_header_modifier,
            response_header_modifier,
            request_mirror,
            request_redirect,
            url_rewrite,
            cors,
            external_auth,
            extension_ref,
        } = self;
        let present = [
            ("RequestHeaderModifier", "requestHeaderModifier", request_header_modifier.is_some()),
            ("ResponseHeaderModifier", "responseHeaderModifier", response_header_modifier.is_some()),
            ("RequestMirror", "requestMirror", request_mirror.is_some()),
            ("ExtensionRef", "extensionRef", extension_ref.is_some()),
            ("RequestRedirect", "requestRedirect", request_redirect.is_some()),
            ("URLRewrite", "urlRewrite", url_rewrite.is_some()),
            ("CORS", "cors", cors.is_some()),
            ("ExternalAuth", "externalAuth", external_auth.is_some()),
        ];
        let known = if allowed == Allowed::Http { &present[..] } else { &present[..4] };
        let Some((_, own, _)) = known.iter().find(|(name, ..)| *name == r#type) else {
            let names: Vec<_> = known.iter().map(|(name, ..)| *name).collect();
            let message = format!("`{type}` is no filter of this kind: use one of {}", names.join(", "));
            report.error(&format!("{field}.type"), message);
            return;
        };
        for (_, key, there) in present {
            match (key == *own, there) {
                (true, false) => report.error(field, format!("`{type}` has no `{own}`: write what it is to do")),
                (false, true) => {
                    let message = format!("`{key}` means nothing in a filter of type {type}: make it one of its own");
                    report.error(&format!("{field}.{key}"), message);
                }
                _ => {}
            }
        }
        let of_rules = |found: &mut Filters, name| found.of_rules.push((field.to_owned(), name));
        let field = format!("{field}.{own}");
        if let Some(spec) = request_header_modifier {
            found.request = spec.read(&field, report);
        } else if let Some(spec) = response_header_modifier {
            found.response = spec.read(&field, report);
        } else if let Some(spec) = request_mirror {
            found.mirrors.extend(spec.read(&field, here, report));
            of_rules(found, "RequestMirror");
        } else if let Some(spec) = request_redirect {
            found.answer = spec.read(&field, has_prefix, report);
            of_rules(found, "RequestRedirect");
        } else if let Some(spec) = url_rewrite {
            found.rewrite = spec.read(&field, has_prefix, report);
            of_rules(found, "URLRewrite");
        } else if let Some(spec) = cors {
            found.cors = spec.read(&field, report);
            of_rules(found, "CORS");
        } else if external_auth.is_some() {
            found.closed = Some(("ExternalAuth is not honoured yet".into(), 403));
            report.warning(
                &field,
                "nobody can be asked yet, so that what this is to guard is answered with 403: remove it, or use an AuthorizationPolicy",
            );
        } else if let Some(SpecExtension { group, kind, name }) = extension_ref {
            found.closed.get_or_insert_with(|| (format!("no extension {kind}.{group} is known").into(), 500));
            let message = format!(
                "{kind} {name} of {group} is not known to this mesh, so that what it is to change is answered with 500: remove it"
            );
            report.warning(&field, message);
        }
    }
}

/// What belongs to the connection or tells where a message ends: whoever changes it makes two servers read two things.
const OF_CONNECTIONS: [&str; 9] = [
    "connection",
    "content-length",
    "host",
    "keep-alive",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
];

impl SpecHeaders {
    fn read(self, field: &str, report: &mut Report) -> HeaderEdits {
        let mut edits = HeaderEdits::default();
        let mut seen = HashSet::new();
        let mut name = |field: &str, text: &str, report: &mut Report| {
            let name = header_name(field, text, report)?;
            if OF_CONNECTIONS.contains(&name.0.as_str()) {
                let message = match name.0.as_str() {
                    "host" => "the host is no header in HTTP/2: change it with URLRewrite".to_owned(),
                    other => format!("`{other}` is the connection's own, and no rule may change it: remove it"),
                };
                report.error(field, message);
                return None;
            }
            if !seen.insert(name.0.clone()) {
                report.error(field, format!("`{}` is changed twice: do one thing with each header", name.0));
            }
            Some(name)
        };
        let of = [("set", self.set), ("add", self.add)];
        for (key, list) in of {
            at_most(MAX_ITEMS, list.len(), &format!("{field}.{key}"), report);
            for (i, header) in list.into_iter().enumerate() {
                let field = format!("{field}.{key}[{i}]");
                let name = name(&format!("{field}.name"), &header.name, report);
                let value =
                    Value::new(&header.value).filter(|_| !header.value.is_empty() && header.value.len() <= 4096);
                let Some(value) = value else {
                    report.error(
                        &format!("{field}.value"),
                        "this is no value of a header: write 1 to 4096 letters of ASCII",
                    );
                    continue;
                };
                let Some(name) = name else { continue };
                if key == "set" { edits.set.push((name, value)) } else { edits.add.push((name, value)) }
            }
        }
        at_most(MAX_ITEMS, self.remove.len(), &format!("{field}.remove"), report);
        for (i, text) in self.remove.iter().enumerate() {
            edits.remove.extend(name(&format!("{field}.remove[{i}]"), text, report));
        }
        edits
    }
}

impl SpecMirror {
    fn read(self, field: &str, here: &Arc<str>, report: &mut Report) -> Option<(Referent, Mirror)> {
        let share = match (self.percent, self.fraction) {
            (None, None) => Fraction::ALL,
            (Some(_), Some(_)) => {
                report.error(field, "percent and fraction stand beside each other: remove one of the two");
                return None;
            }
            (Some(percent), None) => {
                let share = Fraction::percent(percent).filter(|_| percent.fract() == 0.0);
                share.or_else(|| {
                    let message = format!(
                        "{percent} is no percentage of the API: write a whole number of 0 to 100, or use `fraction`"
                    );
                    report.error(&format!("{field}.percent"), message);
                    None
                })?
            }
            (None, Some(SpecFraction { numerator, denominator })) => {
                let share = Fraction::new(numerator, denominator.unwrap_or(100));
                share.or_else(|| {
                    report.error(
                        &format!("{field}.fraction"),
                        "this is no share: the denominator is greater than 0 and not less than the numerator",
                    );
                    None
                })?
            }
        };
        let referent = self.backend_ref.referent(format!("{field}.backendRef"), here, report);
        // The target is filled in when it is known to be there.
        Some((referent, Mirror { target: Target::Broken { reason: "".into() }, share }))
    }
}

impl SpecRedirect {
    fn read(self, field: &str, has_prefix: bool, report: &mut Report) -> Option<Action> {
        let path = self.path.map(|path| path.read(&format!("{field}.path"), has_prefix, report));
        if let Some(scheme) = self.scheme.as_deref().filter(|s| !matches!(*s, "http" | "https")) {
            report.error(&format!("{field}.scheme"), format!("`{scheme}` is no scheme here: use http or https"));
        }
        if let Some(host) = self.hostname.as_deref().filter(|host| !is_name(host)) {
            report.error(&format!("{field}.hostname"), wrong_host(host));
        }
        if self.port == Some(0) {
            report.error(&format!("{field}.port"), "0 is no port: use 1 to 65535");
        }
        let status = self.status_code.unwrap_or(302);
        if !matches!(status, 301 | 302 | 303 | 307 | 308) {
            let message = format!("{status} is no redirect of the API: use 301, 302, 303, 307 or 308");
            report.error(&format!("{field}.statusCode"), message);
        }
        let path = match path {
            Some(None) => return None,
            Some(path) => path,
            None => None,
        };
        Some(Action::Redirect(Redirect {
            status: u16::try_from(status).ok()?,
            scheme: self.scheme.map(Into::into),
            host: self.hostname.map(Into::into),
            port: self.port.map_or(RedirectPort::OfScheme, RedirectPort::Number),
            path,
        }))
    }
}

impl SpecRewrite {
    fn read(self, field: &str, has_prefix: bool, report: &mut Report) -> Rewrite {
        let authority = self.hostname.and_then(|host| match is_name(&host) {
            true => Value::new(&host).map(Authority),
            false => {
                report.error(&format!("{field}.hostname"), wrong_host(&host));
                None
            }
        });
        Rewrite { path: self.path.and_then(|path| path.read(&format!("{field}.path"), has_prefix, report)), authority }
    }
}

fn wrong_host(host: &str) -> String {
    format!("`{host}` is no host: write a name in lower case, without a port and without `*`")
}

impl SpecPath {
    fn read(self, field: &str, has_prefix: bool, report: &mut Report) -> Option<PathRewrite> {
        let Self { r#type, replace_full_path, replace_prefix_match } = self;
        let (key, text, other) = match r#type.as_str() {
            "ReplaceFullPath" => ("replaceFullPath", replace_full_path, replace_prefix_match),
            "ReplacePrefixMatch" => ("replacePrefixMatch", replace_prefix_match, replace_full_path),
            other => {
                let message =
                    format!("`{other}` is no way to change a path: use ReplaceFullPath or ReplacePrefixMatch");
                report.error(&format!("{field}.type"), message);
                return None;
            }
        };
        if other.is_some() {
            report.error(field, format!("{type} goes with `{key}` alone: remove the other"));
        }
        let Some(text) = text else {
            report.error(field, format!("{type} has no `{key}`: write the new path"));
            return None;
        };
        let is_prefix = key == "replacePrefixMatch";
        if is_prefix && !has_prefix {
            let message = "a prefix can be replaced only where the rule has exactly one match, of type PathPrefix: \
                           make a rule for each match";
            report.error(&format!("{field}.{key}"), message);
        }
        if !(text.starts_with('/') || is_prefix && text.is_empty()) || !is_path(&text) {
            let message = format!("`{text}` is no path: begin it with a slash, and write no query");
            report.error(&format!("{field}.{key}"), message);
        }
        let text = text.into();
        Some(if is_prefix { PathRewrite::Elements(text) } else { PathRewrite::Full(text) })
    }
}

/// What a closed rule answers.
pub(super) fn refusal(status: u16) -> Action {
    Action::Respond(Respond { status, body: bytes::Bytes::new() })
}
