//! The access-log line of an HTTP request: Envoy's default fields in ztunnel's form, beside the parties as a connection's
//! line has them.

use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

use super::access_line::{Value, party, put, quote};
use super::clock::Rfc3339;
use super::{Ended, Facts, Measured};

/// What a line tells of a request that has ended.
pub struct RequestLine<'a> {
    pub facts: &'a Facts,
    /// The client's address; several clients' requests share the connection that `facts` are of.
    pub source: Option<SocketAddr>,
    pub ended: Ended,
    pub measured: Measured,
    pub method: &'a str,
    /// As it was asked, with its query.
    pub path: &'a str,
    pub authority: &'a str,
    /// `HTTP/1.1`, `HTTP/2` and so on.
    pub protocol: &'a str,
    pub request_id: &'a str,
    /// Until the head of the server's answer was there.
    pub upstream: Option<Duration>,
    /// The rule: object and place in it.
    pub route: Option<&'a dyn std::fmt::Display>,
    pub attempts: u32,
    pub error: Option<&'a str>,
}

impl RequestLine<'_> {
    pub(super) fn write_text(&self, line: &mut Vec<u8>, now: SystemTime) {
        put(line, format_args!("{} {} access: request complete", Rfc3339(now), self.level()));
        self.fields(|name, value| {
            put(line, format_args!(" {name}="));
            match value {
                Value::Bare(v) => put(line, format_args!("{v}")),
                Value::Quoted(v) => quote(line, v),
                Value::Number(n) => put(line, format_args!("{n}")),
            }
        });
        line.push(b'\n');
    }

    pub(super) fn write_json(&self, line: &mut Vec<u8>, now: SystemTime) {
        let (time, level) = (Rfc3339(now), self.level().to_ascii_lowercase());
        put(line, format_args!(r#"{{"time":"{time}","level":"{level}","scope":"access","message":"request complete""#));
        self.fields(|name, value| {
            put(line, format_args!(r#","{name}":"#));
            match value {
                Value::Bare(v) | Value::Quoted(v) => quote(line, v),
                Value::Number(n) => put(line, format_args!("{n}")),
            }
        });
        line.extend_from_slice(b"}\n");
    }

    fn level(&self) -> &'static str {
        if self.error.is_some() || self.ended.code >= 500 { "WARN" } else { "INFO" }
    }

    fn fields(&self, mut put: impl FnMut(&str, Value<'_>)) {
        let Self { facts, ended, measured, method, path, authority, protocol, .. } = self;
        if let Some(a) = &self.source {
            put("src.addr", Value::Bare(a));
        }
        party(&facts.source, ["src.workload", "src.namespace", "src.identity"], &mut put);
        if let Some(a) = facts.hbone_address.as_ref().or(facts.destination.address.as_ref()) {
            put("dst.addr", Value::Bare(a));
        }
        if let Some(s) = &facts.service {
            put("dst.service", Value::Quoted(&s.hostname));
        }
        party(&facts.destination, ["dst.workload", "dst.namespace", "dst.identity"], &mut put);
        put("direction", Value::Quoted(&"outbound"));
        put("method", Value::Quoted(method));
        put("path", Value::Quoted(path));
        put("protocol", Value::Quoted(protocol));
        put("authority", Value::Quoted(authority));
        put("response_code", Value::Number(ended.code.into()));
        if let Some(Some(status)) = ended.grpc {
            put("grpc_status", Value::Number(status.into()));
        }
        put("response_flags", Value::Quoted(&ended.flags));
        put("bytes_sent", Value::Number(measured.sent));
        put("bytes_recv", Value::Number(measured.received));
        put("duration", Value::Quoted(&format_args!("{}ms", measured.duration.as_millis())));
        if let Some(upstream) = self.upstream {
            put("upstream_service_time", Value::Quoted(&format_args!("{}ms", upstream.as_millis())));
        }
        if !self.request_id.is_empty() {
            put("request_id", Value::Quoted(&self.request_id));
        }
        if let Some(route) = self.route {
            put("route", Value::Quoted(&route));
        }
        if self.attempts > 1 {
            put("attempts", Value::Number(self.attempts.into()));
        }
        if let Some(e) = self.error {
            put("error", Value::Quoted(&e));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::fixtures::facts;
    use super::*;
    use crate::telemetry::{Flags, Reporter};

    #[test]
    fn a_line_cannot_be_forged_by_a_path() {
        let facts = facts(Reporter::Source);
        let line = RequestLine {
            facts: &facts,
            source: facts.source.address,
            ended: Ended { code: 503, flags: Flags::CONNECT_FAILURE, grpc: None },
            measured: Measured { duration: Duration::from_millis(12), sent: 1, received: 2 },
            method: "GET",
            path: "/a\" response_code=200 x=\"\n",
            authority: "cart",
            protocol: "HTTP/1.1",
            request_id: "7",
            upstream: Some(Duration::from_millis(3)),
            route: Some(&"HTTPRoute shop/cart spec.rules[0]"),
            attempts: 2,
            error: Some("cannot reach it"),
        };
        let mut text = Vec::new();
        line.write_text(&mut text, SystemTime::UNIX_EPOCH);
        let text = String::from_utf8(text).unwrap();
        assert_eq!(text.matches('\n').count(), 1);
        let rest = "1970-01-01T00:00:00.000000Z WARN access: request complete src.addr=10.0.1.2:40000 \
                    src.workload=\"web-1\" src.namespace=\"shop\" src.identity=\"spiffe://cluster.local/ns/shop/sa/web\" \
                    dst.addr=10.0.2.3:8080 dst.service=\"cart.shop.svc.cluster.local\" dst.workload=\"cart-1\" \
                    dst.namespace=\"shop\" dst.identity=\"spiffe://cluster.local/ns/shop/sa/cart\" \
                    direction=\"outbound\" method=\"GET\" path=\"/a\\\" response_code=200 x=\\\"\\n\" \
                    protocol=\"HTTP/1.1\" authority=\"cart\" response_code=503 response_flags=\"UF\" bytes_sent=1 \
                    bytes_recv=2 duration=\"12ms\" upstream_service_time=\"3ms\" request_id=\"7\" \
                    route=\"HTTPRoute shop/cart spec.rules[0]\" attempts=2 error=\"cannot reach it\"\n";
        assert_eq!(text, rest);
        let mut json = Vec::new();
        line.write_json(&mut json, SystemTime::UNIX_EPOCH);
        let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
        assert_eq!((&json["path"], &json["response_code"]), (&line.path.into(), &503.into()));
    }
}
