//! `connectionPool` and `outlierDetection`: how much one agent allows itself, and who is left out for a while.

use std::time::Duration;

use serde::Deserialize;

use crate::model::traffic::{HttpLimits, Keepalive, OutlierDetection, StatusRange, TcpLimits, Upgrade};
use crate::translate::istio::values::duration;
use crate::translate::report::{Report, nullable};

#[derive(Deserialize)]
#[serde(expecting = "an object")]
pub(super) struct SpecPool {
    #[serde(default, deserialize_with = "nullable")]
    tcp: SpecTcp,
    #[serde(default, deserialize_with = "nullable")]
    http: SpecHttp,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", expecting = "an object")]
struct SpecTcp {
    max_connections: Option<i64>,
    connect_timeout: Option<String>,
    tcp_keepalive: Option<SpecKeepalive>,
    max_connection_duration: Option<String>,
    idle_timeout: Option<String>,
}

#[derive(Deserialize)]
#[serde(expecting = "an object")]
struct SpecKeepalive {
    probes: Option<u32>,
    time: Option<String>,
    interval: Option<String>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", expecting = "an object")]
struct SpecHttp {
    http1_max_pending_requests: Option<i64>,
    http2_max_requests: Option<i64>,
    max_requests_per_connection: Option<i64>,
    max_retries: Option<i64>,
    idle_timeout: Option<String>,
    #[serde(default, deserialize_with = "nullable")]
    h2_upgrade_policy: String,
    #[serde(default, deserialize_with = "nullable")]
    use_client_protocol: bool,
    max_concurrent_streams: Option<i64>,
    #[serde(rename = "http2KeepAlive")]
    http2_keep_alive: Option<SpecHttp2KeepAlive>,
}

#[derive(Deserialize)]
#[serde(expecting = "an object")]
struct SpecHttp2KeepAlive {
    #[serde(default, deserialize_with = "nullable")]
    interval: String,
    timeout: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", expecting = "an object")]
pub(super) struct SpecOutlier {
    consecutive_errors: Option<i64>,
    #[serde(default, deserialize_with = "nullable")]
    split_external_local_origin_errors: bool,
    consecutive_local_origin_failures: Option<u32>,
    consecutive_gateway_errors: Option<u32>,
    #[serde(rename = "consecutive5xxErrors")]
    consecutive_5xx_errors: Option<u32>,
    interval: Option<String>,
    base_ejection_time: Option<String>,
    max_ejection_percent: Option<i64>,
    min_health_percent: Option<i64>,
    #[serde(default, deserialize_with = "nullable")]
    outlier_detection_http_error_codes: Vec<serde_json::Value>,
}

impl SpecPool {
    pub fn read(self, field: &str, report: &mut Report) -> (TcpLimits, HttpLimits) {
        let Self { tcp, http } = self;
        (tcp.read(&format!("{field}.tcp"), report), http.read(&format!("{field}.http"), report))
    }
}

/// Zero means that there is none, as in Istio.
fn limit(field: &str, given: Option<i64>, report: &mut Report) -> Option<u32> {
    let given = given?;
    match u32::try_from(given) {
        Ok(0) => None,
        // Istio writes so what is to be no limit.
        Ok(number) if number >= i32::MAX as u32 => None,
        Ok(number) => Some(number),
        Err(_) => {
            report.error(field, format!("`{given}` is no limit: use 1 or more"));
            None
        }
    }
}

fn time(field: String, given: Option<String>, report: &mut Report) -> Option<Duration> {
    given.and_then(|text| duration(&field, &text, report))
}

/// One of at least a millisecond, as Istio asks for.
fn positive(field: String, given: Option<String>, report: &mut Report) -> Option<Duration> {
    let found = time(field.clone(), given, report)?;
    if found < Duration::from_millis(1) {
        report.error(&field, "it is shorter than 1ms: write a longer one");
        return None;
    }
    Some(found)
}

impl SpecTcp {
    fn read(self, field: &str, report: &mut Report) -> TcpLimits {
        let keepalive = self.tcp_keepalive.map(|k| Keepalive {
            probes: k.probes.filter(|p| *p > 0),
            time: positive(format!("{field}.tcpKeepalive.time"), k.time, report),
            interval: positive(format!("{field}.tcpKeepalive.interval"), k.interval, report),
        });
        TcpLimits {
            max_connections: limit(&format!("{field}.maxConnections"), self.max_connections, report),
            connect_timeout: positive(format!("{field}.connectTimeout"), self.connect_timeout, report),
            idle_timeout: time(format!("{field}.idleTimeout"), self.idle_timeout, report),
            max_duration: positive(format!("{field}.maxConnectionDuration"), self.max_connection_duration, report),
            keepalive,
        }
    }
}

impl SpecHttp {
    fn read(self, field: &str, report: &mut Report) -> HttpLimits {
        let upgrade = match (self.h2_upgrade_policy.as_str(), self.use_client_protocol) {
            ("" | "DEFAULT" | "DO_NOT_UPGRADE", true) => Upgrade::AsClient,
            ("" | "DEFAULT" | "DO_NOT_UPGRADE", false) => Upgrade::AsDeclared,
            ("UPGRADE", false) => Upgrade::Http2,
            ("UPGRADE", true) => {
                let message = "it stands beside useClientProtocol: leave only one of them";
                report.error(&format!("{field}.h2UpgradePolicy"), message);
                Upgrade::AsDeclared
            }
            (other, _) => {
                let message = format!("`{other}` is none: use UPGRADE or DO_NOT_UPGRADE");
                report.error(&format!("{field}.h2UpgradePolicy"), message);
                Upgrade::AsDeclared
            }
        };
        let keepalive = self.http2_keep_alive.and_then(|k| {
            let interval = positive(format!("{field}.http2KeepAlive.interval"), Some(k.interval), report);
            let timeout = positive(format!("{field}.http2KeepAlive.timeout"), k.timeout, report);
            interval.map(|interval| (interval, timeout.unwrap_or(Duration::from_secs(10))))
        });
        let mut limit = |name: &str, given| limit(&format!("{field}.{name}"), given, report);
        HttpLimits {
            max_pending: limit("http1MaxPendingRequests", self.http1_max_pending_requests),
            max_requests: limit("http2MaxRequests", self.http2_max_requests),
            max_requests_per_connection: limit("maxRequestsPerConnection", self.max_requests_per_connection),
            max_retries: limit("maxRetries", self.max_retries),
            max_streams: limit("maxConcurrentStreams", self.max_concurrent_streams),
            idle_timeout: time(format!("{field}.idleTimeout"), self.idle_timeout, report),
            upgrade,
            http2_keepalive: keepalive,
        }
    }
}

impl SpecOutlier {
    pub fn read(self, field: &str, report: &mut Report) -> OutlierDetection {
        if self.consecutive_errors.is_some() {
            let message = "Istio has taken it away: write consecutive5xxErrors or consecutiveGatewayErrors";
            report.error(&format!("{field}.consecutiveErrors"), message);
        }
        if self.consecutive_local_origin_failures.is_some() && !self.split_external_local_origin_errors {
            let message = "it counts only with splitExternalLocalOriginErrors: set that to true, or remove it";
            report.warning(&format!("{field}.consecutiveLocalOriginFailures"), message);
        }
        let mut percent = |name: &str, given: Option<i64>, default: u32| match given {
            None => default,
            Some(percent @ 0..=100) => percent as u32,
            Some(other) => {
                report.error(&format!("{field}.{name}"), format!("`{other}` is no percentage: use 0 to 100"));
                default
            }
        };
        let min_health_percent = percent("minHealthPercent", self.min_health_percent, 0);
        // Nothing is what Istio's default is: Envoy's ten.
        let max_ejection_percent = match percent("maxEjectionPercent", self.max_ejection_percent, 10) {
            0 => 10,
            percent => percent,
        };
        let mut statuses = Vec::new();
        for (i, code) in self.outlier_detection_http_error_codes.iter().enumerate() {
            let range = match code {
                serde_json::Value::Number(n) => n.as_u64().and_then(|n| u16::try_from(n).ok()).map(|n| (n, n)),
                serde_json::Value::String(text) => match text.split_once('-') {
                    Some((from, to)) => from.trim().parse().ok().zip(to.trim().parse().ok()),
                    None => text.trim().parse().ok().map(|n| (n, n)),
                },
                _ => None,
            };
            match range {
                Some((from, to)) if (100..600).contains(&from) && from <= to && to < 600 => {
                    statuses.push(StatusRange { from, to });
                }
                _ => {
                    let message =
                        format!("`{code}` is no status of an answer: use 100 to 599, or a range such as 500-504");
                    report.error(&format!("{field}.outlierDetectionHttpErrorCodes[{i}]"), message);
                }
            }
        }
        let count = |given: Option<u32>, default: u32| Some(given.unwrap_or(default)).filter(|n| *n > 0);
        OutlierDetection {
            consecutive_5xx: count(self.consecutive_5xx_errors, 5),
            consecutive_gateway: count(self.consecutive_gateway_errors, 0),
            consecutive_local: count(self.consecutive_local_origin_failures, 5),
            split_local: self.split_external_local_origin_errors,
            statuses,
            interval: positive(format!("{field}.interval"), self.interval, report).unwrap_or(Duration::from_secs(10)),
            base_ejection: positive(format!("{field}.baseEjectionTime"), self.base_ejection_time, report)
                .unwrap_or(Duration::from_secs(30)),
            max_ejection_percent,
            min_health_percent,
        }
    }
}
