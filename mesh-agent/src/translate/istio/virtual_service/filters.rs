//! What is done with requests besides sending them somewhere.

use std::time::Duration;

use serde::Deserialize;

use super::super::values::{SpecPercent, SpecText, duration};
use super::actions::SpecDestination;
use super::{Destination, Filters, SpecRoute, To};
use crate::model::http::{
    Abort, Authority, Cors, Fault, Fraction, PathRewrite, Pattern, Preflight, Retry, RetryOn, Rewrite, Timeouts, Value,
};
use crate::translate::report::{Report, nullable};

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", expecting = "an object")]
pub(super) struct SpecRewrite {
    #[serde(default, deserialize_with = "nullable")]
    uri: String,
    #[serde(default, deserialize_with = "nullable")]
    authority: String,
    uri_regex_rewrite: Option<SpecRegexRewrite>,
}

#[derive(Deserialize)]
#[serde(expecting = "an object")]
struct SpecRegexRewrite {
    #[serde(default, deserialize_with = "nullable")]
    r#match: String,
    #[serde(default, deserialize_with = "nullable")]
    rewrite: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", expecting = "an object")]
pub(super) struct SpecRetries {
    attempts: Option<i64>,
    per_try_timeout: Option<String>,
    #[serde(default, deserialize_with = "nullable")]
    retry_on: String,
    retry_remote_localities: Option<bool>,
    retry_ignore_previous_hosts: Option<bool>,
    backoff: Option<String>,
}

#[derive(Deserialize)]
#[serde(expecting = "an object")]
pub(super) struct SpecFault {
    delay: Option<SpecDelay>,
    abort: Option<SpecAbort>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", expecting = "an object")]
struct SpecDelay {
    fixed_delay: Option<String>,
    exponential_delay: Option<String>,
    percent: Option<u32>,
    percentage: Option<SpecPercent>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", expecting = "an object")]
struct SpecAbort {
    http_status: Option<u16>,
    grpc_status: Option<String>,
    http2_error: Option<String>,
    percentage: Option<SpecPercent>,
}

#[derive(Deserialize)]
#[serde(expecting = "an object")]
pub(super) struct SpecMirror {
    destination: SpecDestination,
    percentage: Option<SpecPercent>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", expecting = "an object")]
pub(super) struct SpecCors {
    #[serde(default, deserialize_with = "nullable")]
    allow_origin: Vec<String>,
    #[serde(default, deserialize_with = "nullable")]
    allow_origins: Vec<SpecText>,
    #[serde(default, deserialize_with = "nullable")]
    allow_methods: Vec<String>,
    #[serde(default, deserialize_with = "nullable")]
    allow_headers: Vec<String>,
    #[serde(default, deserialize_with = "nullable")]
    expose_headers: Vec<String>,
    max_age: Option<String>,
    allow_credentials: Option<bool>,
    #[serde(default, deserialize_with = "nullable")]
    unmatched_preflights: String,
}

/// gRPC's codes, by their names in the order of their numbers.
const GRPC: [&str; 17] = [
    "OK",
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
];

/// Istio's, for routes that say nothing of retries.
fn default_retry() -> Retry {
    let on = RetryOn {
        connect_failure: true,
        refused_stream: true,
        reset_before_request: true,
        grpc: vec![14, 1],
        ..RetryOn::default()
    };
    Retry {
        attempts: 2,
        on,
        per_try: None,
        backoff: Duration::from_millis(25),
        least: Duration::ZERO,
        previous_hosts: false,
    }
}

pub(super) fn read(given: SpecRoute, field: &str, namespace: &str, to: &To, report: &mut Report) -> Filters {
    let (request, response) = given.headers.read(field, report);
    let rewrite = given.rewrite.map(|r| r.read(&format!("{field}.rewrite"), report)).unwrap_or_default();
    if matches!(to, To::Redirect(_)) && rewrite != Rewrite::default() {
        report.error(&format!("{field}.rewrite"), "a redirect goes without a rewrite: remove one of the two");
    }
    let mut mirrors = Vec::new();
    if let Some(mirror) = given.mirror {
        let share = match (given.mirror_percentage, given.mirror_percent) {
            (Some(percentage), _) => percentage.read(&format!("{field}.mirrorPercentage"), report),
            (None, Some(percent)) => whole_percent(percent, &format!("{field}.mirrorPercent"), report),
            (None, None) => Some(Fraction::ALL),
        };
        mirrors.extend(mirror.read(&format!("{field}.mirror"), namespace, report).zip(share));
        if !given.mirrors.is_empty() {
            report.error(&format!("{field}.mirror"), "it stands beside mirrors: move it there");
        }
    }
    for (i, mirror) in given.mirrors.into_iter().enumerate() {
        let field = format!("{field}.mirrors[{i}]");
        let share = match mirror.percentage {
            Some(percentage) => percentage.read(&format!("{field}.percentage"), report),
            None => Some(Fraction::ALL),
        };
        mirrors.extend(mirror.destination.read(&format!("{field}.destination"), namespace, report).zip(share));
    }
    let timeout = given.timeout.and_then(|text| duration(&format!("{field}.timeout"), &text, report));
    let retry = match given.retries {
        Some(retries) => retries.read(&format!("{field}.retries"), report),
        None => Some(default_retry()),
    };
    Filters {
        rewrite,
        request,
        response,
        mirrors: mirrors as Vec<(Destination, Fraction)>,
        fault: given.fault.and_then(|f| f.read(&format!("{field}.fault"), report)),
        cors: given.cors_policy.map(|c| c.read(&format!("{field}.corsPolicy"), report)),
        // Nothing is no limit.
        timeouts: Timeouts { request: timeout.filter(|t| !t.is_zero()), backend: None },
        retry: retry.filter(|_| matches!(to, To::Destinations(_))),
    }
}

impl SpecRewrite {
    fn read(self, field: &str, report: &mut Report) -> Rewrite {
        let authority = match Value::new(&self.authority) {
            _ if self.authority.is_empty() => None,
            Some(value) if self.authority.parse::<http::uri::Authority>().is_ok() => Some(Authority(value)),
            _ => {
                report.error(&format!("{field}.authority"), format!("`{}` is no host: correct it", self.authority));
                None
            }
        };
        let path = match (self.uri.is_empty(), self.uri_regex_rewrite) {
            (true, None) => None,
            (false, None) => {
                if !self.uri.starts_with('/') {
                    let message = format!("`{}` does not begin with a slash: write `/{0}`", self.uri);
                    report.error(&format!("{field}.uri"), message);
                }
                Some(PathRewrite::Prefix(self.uri.into()))
            }
            (true, Some(regex)) => regex.read(&format!("{field}.uriRegexRewrite"), report),
            (false, Some(_)) => {
                report.error(&format!("{field}.uriRegexRewrite"), "it stands beside uri: leave only one of them");
                None
            }
        };
        if path.is_none() && authority.is_none() {
            report.warning(field, "it changes nothing: write uri, uriRegexRewrite or authority");
        }
        Rewrite { path, authority }
    }
}

impl SpecRegexRewrite {
    fn read(self, field: &str, report: &mut Report) -> Option<PathRewrite> {
        if self.r#match.is_empty() {
            report.error(&format!("{field}.match"), "it is empty: write the pattern whose matches are replaced");
            return None;
        }
        let pattern = Pattern::new(&self.r#match).map_err(|e| report.error(&format!("{field}.match"), e.to_string()));
        let pattern = pattern.ok()?;
        let named = self.rewrite.split('\\').skip(1).filter_map(|rest| rest.chars().next()?.to_digit(10)).max();
        if named.is_some_and(|group| group as usize > pattern.groups()) {
            let message = format!("the pattern has only {} groups: name no other", pattern.groups());
            report.error(&format!("{field}.rewrite"), message);
        }
        Some(PathRewrite::Pattern { pattern, substitution: self.rewrite.into() })
    }
}

impl SpecRetries {
    /// `None` for no retries at all.
    fn read(self, field: &str, report: &mut Report) -> Option<Retry> {
        let attempts = match u32::try_from(self.attempts.unwrap_or(2)) {
            Ok(attempts) => attempts,
            Err(_) => {
                let message = format!("`{}` is no number of retries: use 0 or more", self.attempts.unwrap_or_default());
                report.error(&format!("{field}.attempts"), message);
                0
            }
        };
        if self.retry_remote_localities == Some(true) {
            let message = "other localities are asked only where the own has nobody: remove it";
            report.warning(&format!("{field}.retryRemoteLocalities"), message);
        }
        let per_try = self.per_try_timeout.and_then(|text| duration(&format!("{field}.perTryTimeout"), &text, report));
        let backoff = self.backoff.and_then(|text| duration(&format!("{field}.backoff"), &text, report));
        let mut retry = Retry {
            attempts,
            per_try: per_try.filter(|t| !t.is_zero()),
            previous_hosts: self.retry_ignore_previous_hosts == Some(false),
            ..default_retry()
        };
        if let Some(backoff) = backoff {
            retry.backoff = backoff;
        }
        if !self.retry_on.is_empty() {
            retry.on = retry_on(&self.retry_on, &format!("{field}.retryOn"), report);
        }
        (attempts > 0).then_some(retry)
    }
}

/// Envoy's names, and numbers of statuses, between commas.
fn retry_on(text: &str, field: &str, report: &mut Report) -> RetryOn {
    let mut on = RetryOn::default();
    for word in text.split(',').map(str::trim).filter(|w| !w.is_empty()) {
        let grpc = GRPC.iter().position(|name| name.eq_ignore_ascii_case(&word.replace('-', "_")));
        match word {
            "5xx" => on.server_error = true,
            "gateway-error" => on.gateway_error = true,
            "reset" => on.reset = true,
            "reset-before-request" => on.reset_before_request = true,
            "connect-failure" => on.connect_failure = true,
            "refused-stream" => on.refused_stream = true,
            "retriable-4xx" => on.retriable_4xx = true,
            // Means the numbers that stand beside it.
            "retriable-status-codes" => {}
            "retriable-headers" | "envoy-ratelimited" | "http3-post-connect-failure" => {
                report.warning(field, format!("`{word}` is not honoured: such requests are not tried again"));
            }
            number if number.parse::<u16>().is_ok_and(|n| (100..600).contains(&n)) => {
                on.statuses.extend(number.parse::<u16>());
            }
            _ if matches!(grpc, Some(1 | 4 | 8 | 13 | 14)) => on.grpc.extend(grpc.map(|code| code as u16)),
            other => {
                let message = format!("`{other}` is no condition: use Envoy's, such as 5xx, reset or connect-failure");
                report.error(field, message);
            }
        }
    }
    on
}

impl SpecFault {
    fn read(self, field: &str, report: &mut Report) -> Option<Fault> {
        let delay = self.delay.and_then(|d| d.read(&format!("{field}.delay"), report));
        let abort = self.abort.and_then(|a| a.read(&format!("{field}.abort"), report));
        (delay.is_some() || abort.is_some()).then_some(Fault { delay, abort })
    }
}

impl SpecDelay {
    fn read(self, field: &str, report: &mut Report) -> Option<(Fraction, Duration)> {
        if self.exponential_delay.is_some() {
            report.error(&format!("{field}.exponentialDelay"), "it is not honoured: write fixedDelay");
        }
        let share = match (self.percentage, self.percent) {
            (Some(percentage), _) => percentage.read(&format!("{field}.percentage"), report),
            (None, Some(percent)) => whole_percent(percent, &format!("{field}.percent"), report),
            (None, None) => Some(Fraction::ALL),
        };
        let Some(text) = self.fixed_delay else {
            report.error(&format!("{field}.fixedDelay"), "it is missing: write how long requests are to wait");
            return None;
        };
        share.zip(duration(&format!("{field}.fixedDelay"), &text, report))
    }
}

impl SpecAbort {
    fn read(self, field: &str, report: &mut Report) -> Option<(Fraction, Abort)> {
        let share = match self.percentage {
            Some(percentage) => percentage.read(&format!("{field}.percentage"), report),
            None => Some(Fraction::ALL),
        };
        if self.http2_error.is_some() {
            report.error(&format!("{field}.http2Error"), "it is not honoured: write httpStatus or grpcStatus");
            return None;
        }
        let abort = match (self.http_status, self.grpc_status) {
            (Some(status), None) if (200..600).contains(&status) => Abort::Status(status),
            (Some(status), None) => {
                let message = format!("`{status}` is no status of an answer: use 200 to 599");
                report.error(&format!("{field}.httpStatus"), message);
                return None;
            }
            (None, Some(text)) => {
                let code = GRPC
                    .iter()
                    .position(|name| *name == text)
                    .or_else(|| text.parse().ok().filter(|n| *n < GRPC.len()));
                let Some(code) = code else {
                    report.error(
                        &format!("{field}.grpcStatus"),
                        format!("`{text}` is no code of gRPC: use one such as UNAVAILABLE"),
                    );
                    return None;
                };
                Abort::Grpc(code as u16)
            }
            (None, None) => {
                report.error(field, "it says not what to answer: write httpStatus or grpcStatus");
                return None;
            }
            (Some(_), Some(_)) => {
                report.error(field, "httpStatus and grpcStatus stand together: leave only one of them");
                return None;
            }
        };
        share.map(|share| (share, abort))
    }
}

impl SpecCors {
    fn read(self, field: &str, report: &mut Report) -> Cors {
        let mut origins = Vec::new();
        for (i, origin) in self.allow_origins.into_iter().enumerate() {
            origins.extend(origin.value(&format!("{field}.allowOrigins[{i}]"), report));
        }
        let legacy = self.allow_origin.into_iter().map(|origin| match origin.as_str() {
            "*" => crate::model::http::ValueMatch::Present,
            _ => crate::model::http::ValueMatch::Exact(origin.into()),
        });
        origins.extend(legacy);
        let mut list = |name: &str, given: Vec<String>| {
            if given.is_empty() {
                return None;
            }
            let value = Value::new(&given.join(","));
            if value.is_none() {
                report.error(&format!("{field}.{name}"), "it has letters that no header has: correct it");
            }
            value
        };
        let (methods, headers) = (list("allowMethods", self.allow_methods), list("allowHeaders", self.allow_headers));
        let expose = list("exposeHeaders", self.expose_headers);
        let max_age = self.max_age.and_then(|text| duration(&format!("{field}.maxAge"), &text, report));
        let unmatched = match self.unmatched_preflights.as_str() {
            "" | "UNSPECIFIED" | "FORWARD" => Preflight::Forward,
            "IGNORE" => Preflight::Answer,
            other => {
                let message = format!("`{other}` is none: use FORWARD or IGNORE");
                report.error(&format!("{field}.unmatchedPreflights"), message);
                Preflight::Forward
            }
        };
        Cors {
            origins,
            methods,
            headers,
            max_age: max_age.and_then(|age| Value::new(&age.as_secs().to_string())),
            expose,
            credentials: self.allow_credentials.unwrap_or(false),
            unmatched,
        }
    }
}

fn whole_percent(percent: u32, field: &str, report: &mut Report) -> Option<Fraction> {
    let share = Fraction::new(percent, 100);
    if share.is_none() {
        report.error(field, format!("`{percent}` is no percentage: use 0 to 100"));
    }
    share
}
