//! Texts that stand in several places: durations, percentages, hosts, headers.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Deserialize;

use crate::model::http::{Fraction, HeaderEdits, Name, Pattern, Value, ValueMatch};
use crate::translate::report::{Report, nullable};

/// `exact`, `prefix` or `regex`.
#[derive(Debug, Default, Deserialize)]
#[serde(expecting = "an object with exact, prefix or regex")]
pub(super) struct SpecText {
    exact: Option<String>,
    prefix: Option<String>,
    regex: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(expecting = "an object")]
pub(super) struct SpecPercent {
    #[serde(default, deserialize_with = "nullable")]
    value: f64,
}

#[derive(Debug, Default, Deserialize)]
#[serde(expecting = "an object")]
pub(super) struct SpecHeaders {
    #[serde(default, deserialize_with = "nullable")]
    request: SpecEdits,
    #[serde(default, deserialize_with = "nullable")]
    response: SpecEdits,
}

#[derive(Debug, Default, Deserialize)]
#[serde(expecting = "an object")]
struct SpecEdits {
    #[serde(default, deserialize_with = "nullable")]
    set: BTreeMap<String, String>,
    #[serde(default, deserialize_with = "nullable")]
    add: BTreeMap<String, String>,
    #[serde(default, deserialize_with = "nullable")]
    remove: Vec<String>,
}

/// Which one of three a text is compared by.
pub(super) enum Text {
    Exact(String),
    Prefix(String),
    Pattern(Pattern),
    /// None of the three.
    Nothing,
}

impl SpecText {
    pub fn read(self, field: &str, report: &mut Report) -> Option<Text> {
        let Self { exact, prefix, regex } = self;
        match (exact, prefix, regex) {
            (None, None, None) => Some(Text::Nothing),
            (Some(text), None, None) => Some(Text::Exact(text)),
            (None, Some(text), None) => Some(Text::Prefix(text)),
            (None, None, Some(text)) => {
                let pattern = Pattern::new(&text).map_err(|e| report.error(&format!("{field}.regex"), e.to_string()));
                pattern.ok().map(Text::Pattern)
            }
            _ => {
                report.error(field, "exact, prefix and regex stand together: leave only one of them");
                None
            }
        }
    }

    /// As a value; where nothing stands, it need only be there.
    pub fn value(self, field: &str, report: &mut Report) -> Option<ValueMatch> {
        Some(match self.read(field, report)? {
            Text::Exact(text) => ValueMatch::Exact(text.into()),
            Text::Prefix(text) => ValueMatch::Prefix(text.into()),
            Text::Pattern(pattern) => ValueMatch::Pattern(pattern),
            Text::Nothing => ValueMatch::Present,
        })
    }
}

impl SpecPercent {
    pub fn read(&self, field: &str, report: &mut Report) -> Option<Fraction> {
        let share = Fraction::percent(self.value);
        if share.is_none() {
            report.error(&format!("{field}.value"), format!("`{}` is no percentage: use 0 to 100", self.value));
        }
        share
    }
}

impl SpecHeaders {
    /// Those of the request, and of the response.
    pub fn read(self, field: &str, report: &mut Report) -> (HeaderEdits, HeaderEdits) {
        let field = format!("{field}.headers");
        (
            self.request.read(&format!("{field}.request"), report),
            self.response.read(&format!("{field}.response"), report),
        )
    }
}

impl SpecEdits {
    fn read(self, field: &str, report: &mut Report) -> HeaderEdits {
        let pairs = |what: &str, given: BTreeMap<String, String>, report: &mut Report| {
            let mut pairs = Vec::new();
            for (key, text) in given {
                let field = format!("{field}.{what}[{key}]");
                let Some(name) = header_name(&field, &key, report) else { continue };
                if has_command(&text) {
                    let message = "Envoy's `%COMMANDS%` are not honoured: the text is sent as it stands";
                    report.warning(&field, message);
                }
                match Value::new(&text) {
                    Some(value) => pairs.push((name, value)),
                    None => report.error(&field, "the value has letters that no header has: correct it"),
                }
            }
            pairs
        };
        let set = pairs("set", self.set, report);
        let add = pairs("add", self.add, report);
        let remove = self.remove.iter().enumerate();
        let remove =
            remove.filter_map(|(i, name)| header_name(&format!("{field}.remove[{i}]"), name, report)).collect();
        HeaderEdits { remove, set, add }
    }
}

/// Whether Envoy would put something else in its place: `%START_TIME%`.
fn has_command(text: &str) -> bool {
    let mut parts = text.split('%').skip(1).step_by(2);
    text.matches('%').count() > 1
        && parts.any(|p| p.starts_with(|c: char| c.is_ascii_uppercase()) && !p.contains(char::is_whitespace))
}

/// `None`, and an error, for what can be no name, or belongs to the connection and not to rules.
pub(super) fn header_name(field: &str, text: &str, report: &mut Report) -> Option<Name> {
    const OF_THE_CONNECTION: &[&str] =
        &["connection", "content-length", "host", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade"];
    let Some(name) = Name::new(text) else {
        let message = match text {
            ":authority" => "write `rewrite.authority` to change it".to_owned(),
            _ => format!("`{text}` is no name of a header: use letters, digits and `-`"),
        };
        report.error(field, message);
        return None;
    };
    if OF_THE_CONNECTION.contains(&name.0.as_str()) {
        let message = match name.0.as_str() {
            "host" => "write `rewrite.authority` to change it".to_owned(),
            name => format!("`{name}` belongs to the connection, and rules cannot change it: remove it"),
        };
        report.error(field, message);
        return None;
    }
    Some(name)
}

/// A DNS name, or an IP address.
pub(super) fn is_host(text: &str) -> bool {
    let label =
        |l: &str| !l.is_empty() && l.len() <= 63 && l.bytes().all(|c| c.is_ascii_alphanumeric() || b"-_".contains(&c));
    text.parse::<std::net::IpAddr>().is_ok() || text.len() <= 253 && text.split('.').all(label)
}

/// `1h30m`, `2.5s`, `10ms`. No unit is longer than an hour, none shorter than a nanosecond.
pub(super) fn duration(field: &str, text: &str, report: &mut Report) -> Option<Duration> {
    let found = parse_duration(text);
    if found.is_none() {
        report.error(field, format!("`{text}` is no duration: write it as 5s, 250ms or 1h30m"));
    }
    found
}

fn parse_duration(text: &str) -> Option<Duration> {
    const UNITS: &[(&str, u64)] = &[
        ("ns", 1),
        ("us", 1_000),
        ("ms", 1_000_000),
        ("s", 1_000_000_000),
        ("m", 60_000_000_000),
        ("h", 3_600_000_000_000),
    ];
    let mut rest = text;
    let mut nanos: u64 = 0;
    if rest.is_empty() {
        return None;
    }
    while !rest.is_empty() {
        let at = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let (number, after) = rest.split_at(at);
        let end = after.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(after.len());
        let (unit, after) = after.split_at(end);
        let (_, unit) = UNITS.iter().find(|(name, _)| *name == unit)?;
        let (whole, part) = number.split_once('.').unwrap_or((number, ""));
        if whole.is_empty() && part.is_empty() || part.contains('.') || part.len() > 9 {
            return None;
        }
        let whole: u64 = if whole.is_empty() { 0 } else { whole.parse().ok()? };
        let mut of_unit = whole.checked_mul(*unit)?;
        if !part.is_empty() {
            let digits: u64 = part.parse().ok()?;
            of_unit = of_unit.checked_add(digits.checked_mul(*unit)? / 10_u64.pow(part.len() as u32))?;
        }
        nanos = nanos.checked_add(of_unit)?;
        rest = after;
    }
    Some(Duration::from_nanos(nanos))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_as_go_writes_them() {
        for (text, expected) in [
            ("5s", Some(5_000)),
            ("0s", Some(0)),
            ("250ms", Some(250)),
            ("1h30m", Some(5_400_000)),
            ("0.5s", Some(500)),
            (".5s", Some(500)),
            ("1.25h", Some(4_500_000)),
            ("1m0.5s", Some(60_500)),
            ("", None),
            ("5", None),
            ("s", None),
            ("-5s", None),
            ("5 s", None),
            ("5d", None),
            (".s", None),
            ("1.2.3s", None),
            ("99999999999999999999s", None),
            ("9999999999h", None),
        ] {
            assert_eq!(parse_duration(text), expected.map(Duration::from_millis), "{text}");
        }
    }

    #[test]
    fn envoys_commands_are_seen() {
        for (text, expected) in [
            ("%START_TIME%", true),
            ("at %DOWNSTREAM_REMOTE_ADDRESS%:%PROTOCOL%", true),
            ("%REQ(x-id)%", true),
            ("100%", false),
            ("50% to 60%", false),
            ("plain", false),
        ] {
            assert_eq!(has_command(text), expected, "{text}");
        }
    }

    #[test]
    fn hosts() {
        for (text, expected) in [
            ("reviews", true),
            ("a.b-c.d", true),
            ("10.0.0.1", true),
            ("::1", true),
            ("", false),
            ("a..b", false),
            ("a b", false),
        ] {
            assert_eq!(is_host(text), expected, "{text}");
        }
    }
}
