//! Time, second tries and sessions of a rule.

use std::time::Duration;

use serde::Deserialize;

use super::matches::{header_name, is_token};
use crate::model::ObjectRef;
use crate::model::http::{Persistence, PersistenceKind, Retry, RetryOn, Timeouts};
use crate::translate::report::{Report, nullable};

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", expecting = "an object")]
pub(super) struct SpecTimeouts {
    request: Option<String>,
    backend_request: Option<String>,
}

#[derive(Deserialize)]
#[serde(expecting = "an object")]
pub(super) struct SpecRetry {
    #[serde(default, deserialize_with = "nullable")]
    codes: Vec<i64>,
    attempts: Option<u32>,
    backoff: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", expecting = "an object")]
pub(super) struct SpecPersistence {
    session_name: Option<String>,
    absolute_timeout: Option<String>,
    idle_timeout: Option<String>,
    #[serde(default, deserialize_with = "nullable")]
    r#type: String,
    cookie_config: Option<SpecCookie>,
    cookie: Option<SpecCookie>,
    header: Option<SpecHeader>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", expecting = "an object")]
struct SpecCookie {
    #[serde(default, deserialize_with = "nullable")]
    lifetime_type: String,
    name: Option<String>,
    path: Option<String>,
}

#[derive(Deserialize)]
#[serde(expecting = "an object")]
struct SpecHeader {
    name: Option<String>,
}

/// Where the API leaves it open: what Istio does.
const ATTEMPTS: u32 = 2;
const BACKOFF: Duration = Duration::from_millis(25);

impl SpecTimeouts {
    pub fn read(self, field: &str, report: &mut Report) -> Timeouts {
        let request = duration(&format!("{field}.request"), self.request, report);
        let backend = duration(&format!("{field}.backendRequest"), self.backend_request, report);
        if let (Some(request), Some(backend)) = (request, backend)
            && !request.is_zero()
            && backend > request
        {
            report.error(
                &format!("{field}.backendRequest"),
                "one try cannot take longer than all together: make it less than `request`",
            );
        }
        // Zero is no limit.
        Timeouts { request: request.filter(|d| !d.is_zero()), backend: backend.filter(|d| !d.is_zero()) }
    }
}

impl SpecRetry {
    pub fn read(self, field: &str, report: &mut Report) -> Retry {
        for (i, code) in self.codes.iter().enumerate().filter(|(_, code)| !(400..=599).contains(*code)) {
            report.error(
                &format!("{field}.codes[{i}]"),
                format!("{code} is no status that is tried again: use 400 to 599"),
            );
        }
        if self.attempts == Some(0) {
            report.error(&format!("{field}.attempts"), "0 tries are none: write 1 or more, or remove `retry`");
        }
        let least = duration(&format!("{field}.backoff"), self.backoff, report);
        let mut statuses: Vec<u16> = self.codes.iter().filter_map(|code| (*code).try_into().ok()).collect();
        statuses.sort_unstable();
        statuses.dedup();
        Retry {
            attempts: self.attempts.unwrap_or(ATTEMPTS),
            // Whatever the codes: the API wants every failed connection tried again.
            on: RetryOn { connect_failure: true, reset: true, refused_stream: true, statuses, ..RetryOn::default() },
            per_try: None,
            // Not in step with others that began at the same time.
            backoff: least.map_or(BACKOFF, |least| least * 2),
            least: least.unwrap_or_default(),
            previous_hosts: false,
        }
    }
}

impl SpecPersistence {
    /// `i` is the rule's place in its route `at`.
    pub fn read(self, field: &str, at: &ObjectRef, i: usize, report: &mut Report) -> Option<Persistence> {
        let absolute = duration(&format!("{field}.absoluteTimeout"), self.absolute_timeout, report);
        let idle = duration(&format!("{field}.idleTimeout"), self.idle_timeout, report);
        let is_cookie = match self.r#type.as_str() {
            "" => self.header.is_none(),
            "Cookie" => true,
            "Header" => false,
            other => {
                report
                    .error(&format!("{field}.type"), format!("`{other}` is no kind of session: use Cookie or Header"));
                return None;
            }
        };
        let cookies = [("cookieConfig", self.cookie_config), ("cookie", self.cookie)];
        let cookie = cookies.into_iter().find_map(|(key, cookie)| Some((format!("{field}.{key}"), cookie?)));
        if let Some((at, _)) = cookie.as_ref().filter(|_| !is_cookie) {
            report.error(at, "a session in a header has no cookie: remove it, or use type Cookie");
        }
        if is_cookie && self.header.is_some() {
            report.error(
                &format!("{field}.header"),
                "a session in a cookie has no header: remove it, or use type Header",
            );
        }
        let (at_cookie, cookie) = cookie.unwrap_or_default();
        let kind = match (is_cookie, cookie.lifetime_type.as_str()) {
            (false, _) => PersistenceKind::Header,
            (true, "" | "Session") => PersistenceKind::SessionCookie,
            (true, "Permanent") => PersistenceKind::PermanentCookie,
            (true, other) => {
                let message = format!("`{other}` is no lifetime of a cookie: use Session or Permanent");
                report.error(&format!("{at_cookie}.lifetimeType"), message);
                return None;
            }
        };
        if kind == PersistenceKind::PermanentCookie && absolute.is_none() {
            report.error(&format!("{field}.absoluteTimeout"), "a permanent cookie must end some time: write when");
        }
        if cookie.path.is_some() {
            report.warning(
                &format!("{at_cookie}.path"),
                "the cookie's path is not honoured yet: it is sent to all paths of the host",
            );
        }
        let given = self.session_name.map(|name| ("sessionName", name));
        let given = given.or(cookie.name.map(|name| ("cookie.name", name)));
        let given = given.or(self.header.and_then(|header| header.name).map(|name| ("header.name", name)));
        let name = match given {
            Some((key, name)) => {
                let field = format!("{field}.{key}");
                if !is_token(&name) || name.len() > 128 {
                    report.error(&field, format!("`{name}` is no name of a session: use letters, digits and `-`"));
                } else if !is_cookie {
                    header_name(&field, &name, report);
                }
                name
            }
            // Of its own, so that two rules never take each other's.
            None => format!("nodemesh-{}-{}-{i}", at.namespace, at.name),
        };
        let message = "sessions are not honoured yet: each request may go to another endpoint";
        report.warning(field, message);
        let some = |d: Option<Duration>| d.filter(|d| !d.is_zero());
        Some(Persistence { kind, name: name.into(), absolute: some(absolute), idle: some(idle) })
    }
}

/// A duration of GEP-2257, such as `1h30m` or `100ms`.
fn duration(field: &str, text: Option<String>, report: &mut Report) -> Option<Duration> {
    let text = text?;
    let found = parse(&text);
    if found.is_none() {
        report.error(field, format!("`{text}` is no duration of the API: write it such as 10s, 1m30s or 100ms"));
    }
    found
}

fn parse(text: &str) -> Option<Duration> {
    let mut rest = text;
    let mut sum = Duration::ZERO;
    for _ in 0..4 {
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        let number: u32 = rest.get(..digits).filter(|_| (1..=5).contains(&digits))?.parse().ok()?;
        rest = &rest[digits..];
        let units = [("ms", Duration::from_millis(1)), ("s", Duration::from_secs(1))];
        let more = [("m", Duration::from_secs(60)), ("h", Duration::from_secs(3600))];
        let (unit, one) = units.into_iter().chain(more).find(|(unit, _)| rest.starts_with(unit))?;
        rest = &rest[unit.len()..];
        sum += one * number;
        if rest.is_empty() {
            return Some(sum);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_those_of_the_gateway_api() {
        let good = [("0s", 0), ("100ms", 100), ("1h30m", 5_400_000), ("1m1s1ms", 61_001), ("99999h", 359_996_400_000)];
        for (text, millis) in good {
            assert_eq!(parse(text), Some(Duration::from_millis(millis)), "{text}");
        }
        for text in ["", "s", "1", "1d", "1.5s", "-1s", "1 s", "100000s", "1s1s1s1s1s", "1us", "ß", "1ß"] {
            assert_eq!(parse(text), None, "{text}");
        }
    }
}
