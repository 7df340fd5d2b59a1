//! Rules for HTTP as text: a line for each thing that a rule asks or does, and nothing for what it does not.

use std::fmt::Write as _;
use std::time::Duration;

use crate::model::ServiceKey;
use crate::model::http::{
    Action, Backend, Cors, HeaderEdits, HttpMatch, HttpRoutes, HttpRule, Mirror, Name, PathMatch, PathRewrite,
    Persistence, Redirect, Respond, Retry, RetryOn, Rewrite, RouteTable, SourceMatch, Target, Timeouts, Value,
    ValueMatch,
};

pub(super) fn render(key: &ServiceKey, routes: &HttpRoutes, out: &mut String) {
    writeln!(out, "http {}/{}:{}", key.namespace, key.name, key.port).unwrap();
    if let Some(general) = &routes.general {
        table(general, out);
    }
    for (namespace, own) in &routes.by_namespace {
        writeln!(out, "  for clients of {namespace}").unwrap();
        table(own, out);
    }
}

fn table(table: &RouteTable, out: &mut String) {
    for rule in &table.rules {
        for line in lines(rule) {
            writeln!(out, "  {line}").unwrap();
        }
    }
    if table.rules.is_empty() {
        out.push_str("  no rule\n");
    }
}

fn lines(rule: &HttpRule) -> Vec<String> {
    let HttpRule {
        object,
        place,
        name,
        matches,
        action,
        rewrite,
        request,
        response,
        mirrors,
        fault,
        cors,
        timeouts,
        retry,
        persistence,
    } = rule;
    let named = name.as_ref().map(|name| format!(" named {name}")).unwrap_or_default();
    let mut lines = vec![format!("{object} {place}{named}")];
    lines.extend(matches.iter().map(|m| format!("  if {}", asked(m))));
    match action {
        Action::Forward(to) if to.is_empty() => lines.push("  to nobody".into()),
        Action::Forward(to) => lines.extend(to.iter().map(backend)),
        Action::Redirect(Redirect { status, scheme, host, port, path }) => {
            let mut line = format!("  redirect {status} port {port:?}");
            let parts =
                [("scheme", scheme.as_deref().map(str::to_owned)), ("host", host.as_deref().map(str::to_owned))];
            for (key, value) in parts.into_iter().chain([("path", path.as_ref().map(new_path))]) {
                line += &value.map(|value| format!(", {key} {value}")).unwrap_or_default();
            }
            lines.push(line);
        }
        Action::Respond(Respond { status, body }) => lines.push(format!("  answer {status} {body:?}")),
    }
    let Rewrite { path, authority } = rewrite;
    lines.extend(path.as_ref().map(|path| format!("  rewrite path {}", new_path(path))));
    lines.extend(authority.as_ref().map(|host| format!("  rewrite host {}", host.0)));
    lines.extend(
        [("request", request), ("response", response)]
            .iter()
            .filter_map(|(what, e)| edits(what, e))
            .map(|e| format!("  {e}")),
    );
    for Mirror { target: to, share } in mirrors {
        lines.push(format!("  copy {}/1000000 to {}", share.millionths(), target(to)));
    }
    lines.extend(fault.as_ref().map(|fault| format!("  fault {fault:?}")));
    if let Some(Cors { origins, methods, headers, max_age, expose, credentials, unmatched }) = cors {
        let origins: Vec<_> = origins.iter().map(|o| value_match("", o)).collect();
        let mut line = format!("  cors from {}, others {unmatched:?}", origins.join(" or "));
        for (key, value) in [("methods", methods), ("headers", headers), ("max-age", max_age), ("expose", expose)] {
            line += &value.as_ref().map(|value| format!(", {key} {value}")).unwrap_or_default();
        }
        lines.push(if *credentials { line + ", credentials" } else { line });
    }
    let Timeouts { request, backend } = timeouts;
    lines.extend(request.map(|d| format!("  at most {d:?}")));
    lines.extend(backend.map(|d| format!("  each try at most {d:?}")));
    lines.extend(retry.as_ref().map(again));
    if let Some(Persistence { kind, name, absolute, idle }) = persistence {
        let end = |what: &str, d: &Option<Duration>| d.map(|d| format!(", {what} {d:?}")).unwrap_or_default();
        lines.push(format!("  session {kind:?} {name}{}{}", end("absolute", absolute), end("idle", idle)));
    }
    lines
}

fn asked(m: &HttpMatch) -> String {
    let HttpMatch { path, ignore_path_case, method, scheme, authority, headers, without_headers, query, source } = m;
    let mut parts = Vec::new();
    parts.extend(path.as_ref().map(|path| match path {
        PathMatch::Exact(path) => format!("path is {path}"),
        PathMatch::Prefix(path) => format!("path begins with {path}"),
        PathMatch::Elements(path) => format!("path is below {path}/"),
        PathMatch::Pattern(path) => format!("path like {}", path.as_str()),
    }));
    if *ignore_path_case {
        parts.push("whatever the case".into());
    }
    for (what, value) in [("method", method), ("scheme", scheme), ("authority", authority)] {
        parts.extend(value.as_ref().map(|value| value_match(what, value)));
    }
    let header = |what: &str, (name, value): &(Name, ValueMatch)| value_match(&format!("{what} {}", name.0), value);
    parts.extend(headers.iter().map(|h| header("header", h)));
    parts.extend(without_headers.iter().map(|h| header("no header", h)));
    parts.extend(query.iter().map(|(name, value)| value_match(&format!("query {name}"), value)));
    let SourceMatch { namespace, labels } = source;
    parts.extend(namespace.as_ref().map(|namespace| format!("client of {namespace}")));
    parts.extend(labels.iter().map(|(key, value)| format!("client with {key}={value}")));
    if parts.is_empty() { "anything".into() } else { parts.join(", ") }
}

fn value_match(what: &str, value: &ValueMatch) -> String {
    let text = match value {
        ValueMatch::Exact(text) => format!("is {text}"),
        ValueMatch::ExactIgnoringCase(text) => format!("is {text} in any case"),
        ValueMatch::Prefix(text) => format!("begins with {text}"),
        ValueMatch::Pattern(pattern) => format!("like {}", pattern.as_str()),
        ValueMatch::Present => "any".into(),
    };
    if what.is_empty() { text } else { format!("{what} {text}") }
}

fn backend(backend: &Backend) -> String {
    let Backend { weight, target: to, request, response } = backend;
    let mut line = format!("  to {} weight {weight}", target(to));
    for (what, e) in [("request", request), ("response", response)] {
        line += &edits(what, e).map(|e| format!(", {e}")).unwrap_or_default();
    }
    line
}

fn target(target: &Target) -> String {
    match target {
        Target::Service { namespace, name, port, subset } => {
            let subset = subset.as_ref().map(|subset| format!(" subset {subset}")).unwrap_or_default();
            format!("{namespace}/{name}:{port}{subset}")
        }
        Target::Broken { reason } => format!("nobody ({reason})"),
    }
}

fn new_path(path: &PathRewrite) -> String {
    match path {
        PathRewrite::Full(path) => format!("{path}"),
        PathRewrite::Elements(path) => format!("{path}/..."),
        PathRewrite::Prefix(path) => format!("{path}..."),
        PathRewrite::Pattern { pattern, substitution } => format!("{} -> {substitution}", pattern.as_str()),
    }
}

fn edits(what: &str, edits: &HeaderEdits) -> Option<String> {
    let HeaderEdits { remove, set, add } = edits;
    let pair = |verb: &str, (name, value): &(Name, Value)| format!("{verb} {}={value}", name.0);
    let mut parts: Vec<_> = remove.iter().map(|name| format!("remove {}", name.0)).collect();
    parts.extend(set.iter().map(|p| pair("set", p)));
    parts.extend(add.iter().map(|p| pair("add", p)));
    (!parts.is_empty()).then(|| format!("{what} {}", parts.join(" ")))
}

fn again(retry: &Retry) -> String {
    let Retry { attempts, on, per_try, backoff, least, previous_hosts } = retry;
    let RetryOn {
        connect_failure,
        reset,
        reset_before_request,
        refused_stream,
        server_error,
        gateway_error,
        retriable_4xx,
        statuses,
        grpc,
        headers,
    } = on;
    let named = [
        ("connect-failure", connect_failure),
        ("reset", reset),
        ("reset-before-request", reset_before_request),
        ("refused-stream", refused_stream),
        ("5xx", server_error),
        ("gateway-error", gateway_error),
        ("retriable-4xx", retriable_4xx),
    ];
    let mut when: Vec<_> = named.iter().filter(|(_, on)| **on).map(|(name, _)| (*name).to_owned()).collect();
    when.extend(statuses.iter().map(u16::to_string));
    when.extend(grpc.iter().map(|code| format!("grpc {code}")));
    when.extend(headers.iter().map(|(name, value)| value_match(name.0.as_str(), value)));
    let per_try = per_try.map(|d| format!(", each at most {d:?}")).unwrap_or_default();
    let again = if *previous_hosts { ", also the same host" } else { "" };
    format!("  again {attempts} times on {}, pause {least:?} to {backoff:?}{per_try}{again}", when.join(" "))
}
