//! The form of an access-log line: pure, (time, facts, outcome) -> bytes.

use std::io::Write;
use std::time::SystemTime;

use super::clock::Rfc3339;
use super::{Facts, Outcome, Party, Reporter, ResponseFlag};

/// A value, and how it is written: ztunnel quotes names in the text form, and not addresses and numbers.
pub(super) enum Value<'a> {
    Bare(&'a dyn std::fmt::Display),
    Quoted(&'a dyn std::fmt::Display),
    Number(u64),
}

/// `2026-08-22T10:11:12.000123Z INFO access: connection complete src.addr=... direction="outbound" ...`
pub(super) fn write_text(line: &mut Vec<u8>, now: SystemTime, facts: &Facts, outcome: &Outcome) {
    put(line, format_args!("{} {} access: {}", Rfc3339(now), level(outcome), message(outcome)));
    fields(facts, outcome, |name, value| {
        put(line, format_args!(" {name}="));
        match value {
            Value::Bare(v) => put(line, format_args!("{v}")),
            Value::Quoted(v) => quote(line, v),
            Value::Number(n) => put(line, format_args!("{n}")),
        }
    });
    line.push(b'\n');
}

/// The same as one JSON object.
pub(super) fn write_json(line: &mut Vec<u8>, now: SystemTime, facts: &Facts, outcome: &Outcome) {
    let level = level(outcome).to_ascii_lowercase();
    let (time, message) = (Rfc3339(now), message(outcome));
    put(line, format_args!(r#"{{"time":"{time}","level":"{level}","scope":"access","message":"{message}""#));
    fields(facts, outcome, |name, value| {
        put(line, format_args!(r#","{name}":"#));
        match value {
            Value::Bare(v) | Value::Quoted(v) => quote(line, v),
            Value::Number(n) => put(line, format_args!("{n}")),
        }
    });
    line.extend_from_slice(b"}\n");
}

/// All fields, in order; what is not known is left out.
fn fields(facts: &Facts, outcome: &Outcome, mut put: impl FnMut(&str, Value<'_>)) {
    let Facts { reporter, source, destination, hbone_address, service, security: _ } = facts;
    let Outcome { flag, bytes_sent, bytes_received, duration, error, audited } = outcome;
    let [address, workload, namespace, identity] = ["src.addr", "src.workload", "src.namespace", "src.identity"];
    if let Some(a) = &source.address {
        put(address, Value::Bare(a));
    }
    party(source, [workload, namespace, identity], &mut put);
    if let Some(a) = &destination.address {
        put("dst.addr", Value::Bare(a));
    }
    if let Some(a) = hbone_address {
        put("dst.hbone_addr", Value::Bare(a));
    }
    if let Some(s) = service {
        put("dst.service", Value::Quoted(&s.hostname));
    }
    party(destination, ["dst.workload", "dst.namespace", "dst.identity"], &mut put);
    let direction = match reporter {
        Reporter::Source => "outbound",
        Reporter::Destination => "inbound",
    };
    put("direction", Value::Quoted(&direction));
    put("bytes_sent", Value::Number(*bytes_sent));
    put("bytes_recv", Value::Number(*bytes_received));
    put("duration", Value::Quoted(&format_args!("{}ms", duration.as_millis())));
    put("response_flags", Value::Quoted(&flag.as_str()));
    if !audited.is_empty() {
        put("audit_policies", Value::Quoted(&audited.join(",")));
    }
    if let Some(e) = error {
        put("error", Value::Quoted(e));
    }
}

pub(super) fn party(party: &Party, [workload, namespace, identity]: [&str; 3], put: &mut impl FnMut(&str, Value<'_>)) {
    if let Some(w) = &party.workload {
        put(workload, Value::Quoted(&w.name));
        put(namespace, Value::Quoted(&w.namespace));
    }
    if let Some(id) = &party.identity {
        put(identity, Value::Quoted(id));
    }
}

fn message(outcome: &Outcome) -> &'static str {
    match outcome.flag {
        ResponseFlag::None | ResponseFlag::PolicyChanged => "connection complete",
        ResponseFlag::Denied
        | ResponseFlag::ConnectFailure
        | ResponseFlag::TlsFailure
        | ResponseFlag::TunnelFailure
        | ResponseFlag::IdentityError
        | ResponseFlag::NoRoute
        | ResponseFlag::NoHealthyUpstream => "connection failed",
    }
}

fn level(outcome: &Outcome) -> &'static str {
    match (outcome.flag, &outcome.error) {
        (ResponseFlag::None, None) => "INFO",
        _ => "WARN",
    }
}

pub(super) fn put(line: &mut Vec<u8>, text: std::fmt::Arguments<'_>) {
    line.write_fmt(text).expect("writing to memory does not fail");
}

/// In quotes, so that no value (an error may repeat what a peer sent) can end the line or forge a field.
pub(super) fn quote(line: &mut Vec<u8>, value: &dyn std::fmt::Display) {
    line.push(b'"');
    let start = line.len();
    put(line, format_args!("{value}"));
    if line[start..].iter().any(|b| *b < 0x20 || matches!(b, b'"' | b'\\' | 0x7f)) {
        let raw = line.split_off(start);
        for byte in raw {
            match byte {
                b'"' | b'\\' => line.extend_from_slice(&[b'\\', byte]),
                b'\n' => line.extend_from_slice(b"\\n"),
                b'\r' => line.extend_from_slice(b"\\r"),
                b'\t' => line.extend_from_slice(b"\\t"),
                0x7f | ..0x20 => put(line, format_args!("\\u{byte:04x}")),
                _ => line.push(byte),
            }
        }
    }
    line.push(b'"');
}
