//! `loadBalancer`: which endpoint gets a request.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;

use super::Balancer;
use crate::model::http::Name;
use crate::model::traffic::{Balance, Distribution, HashBy, HashTable, LocalityPolicy, Near, Place, SlowStart};
use crate::translate::istio::values::duration;
use crate::translate::report::{Report, nullable};

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", expecting = "an object")]
pub(super) struct SpecBalancer {
    #[serde(default, deserialize_with = "nullable")]
    simple: String,
    consistent_hash: Option<SpecHash>,
    locality_lb_setting: Option<SpecLocality>,
    warmup_duration_secs: Option<String>,
    warmup: Option<SpecWarmup>,
    zone_aware_lb_setting: Option<serde_json::Value>,
    backend_utilization: Option<serde_json::Value>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", expecting = "an object")]
struct SpecHash {
    #[serde(default, deserialize_with = "nullable")]
    http_header_name: String,
    http_cookie: Option<SpecCookie>,
    #[serde(default, deserialize_with = "nullable")]
    use_source_ip: bool,
    #[serde(default, deserialize_with = "nullable")]
    http_query_parameter_name: String,
    ring_hash: Option<SpecRing>,
    maglev: Option<SpecMaglev>,
    minimum_ring_size: Option<u32>,
}

#[derive(Deserialize)]
#[serde(expecting = "an object")]
struct SpecCookie {
    #[serde(default, deserialize_with = "nullable")]
    name: String,
    #[serde(default, deserialize_with = "nullable")]
    path: String,
    ttl: Option<String>,
    #[serde(default, deserialize_with = "nullable")]
    attributes: Vec<serde_json::Value>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", expecting = "an object")]
struct SpecRing {
    minimum_ring_size: Option<u32>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", expecting = "an object")]
struct SpecMaglev {
    table_size: Option<u32>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", expecting = "an object")]
struct SpecLocality {
    #[serde(default, deserialize_with = "nullable")]
    distribute: Vec<SpecDistribute>,
    #[serde(default, deserialize_with = "nullable")]
    failover: Vec<SpecFailover>,
    #[serde(default, deserialize_with = "nullable")]
    failover_priority: Vec<String>,
    enabled: Option<bool>,
}

#[derive(Deserialize)]
#[serde(expecting = "an object")]
struct SpecDistribute {
    #[serde(default, deserialize_with = "nullable")]
    from: String,
    #[serde(default, deserialize_with = "nullable")]
    to: BTreeMap<String, u32>,
}

#[derive(Deserialize)]
#[serde(expecting = "an object")]
struct SpecFailover {
    #[serde(default, deserialize_with = "nullable")]
    from: String,
    #[serde(default, deserialize_with = "nullable")]
    to: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", expecting = "an object")]
struct SpecWarmup {
    #[serde(default, deserialize_with = "nullable")]
    duration: String,
    minimum_percent: Option<f64>,
    aggression: Option<f64>,
}

/// Envoy's limit: a table takes 4 bytes a place.
const MAX_TABLE: u32 = 5_000_011;
const MAX_RING: u32 = 8 * 1024 * 1024;

impl SpecBalancer {
    pub fn read(self, field: &str, report: &mut Report) -> Balancer {
        for (name, value) in
            [("zoneAwareLbSetting", &self.zone_aware_lb_setting), ("backendUtilization", &self.backend_utilization)]
        {
            if value.is_some() {
                report.warning(&format!("{field}.{name}"), "it is not honoured: endpoints are chosen as without it");
            }
        }
        let balance = match (self.simple.as_str(), self.consistent_hash) {
            ("", None) | ("UNSPECIFIED", None) => None,
            ("", Some(hash)) => hash.read(&format!("{field}.consistentHash"), report),
            ("LEAST_REQUEST" | "LEAST_CONN", None) => Some(Balance::LeastRequest),
            ("ROUND_ROBIN", None) => Some(Balance::RoundRobin),
            ("RANDOM", None) => Some(Balance::Random),
            ("PASSTHROUGH", None) => Some(Balance::Passthrough),
            (_, Some(_)) => {
                report.error(&format!("{field}.simple"), "it stands beside consistentHash: leave only one of them");
                None
            }
            (other, None) => {
                let message = format!("`{other}` is none: use LEAST_REQUEST, ROUND_ROBIN, RANDOM or PASSTHROUGH");
                report.error(&format!("{field}.simple"), message);
                None
            }
        };
        let slow_start = match (self.warmup, self.warmup_duration_secs) {
            (Some(warmup), _) => warmup.read(&format!("{field}.warmup"), report),
            (None, Some(text)) => duration(&format!("{field}.warmupDurationSecs"), &text, report).map(plain_start),
            (None, None) => None,
        };
        if slow_start.is_some() && !matches!(balance, None | Some(Balance::LeastRequest | Balance::RoundRobin)) {
            let message = "only LEAST_REQUEST and ROUND_ROBIN know a slow start: use one of them, or remove it";
            report.warning(&format!("{field}.warmup"), message);
        }
        let locality = self.locality_lb_setting.and_then(|l| l.read(&format!("{field}.localityLbSetting"), report));
        Balancer { balance, locality, slow_start: slow_start.filter(|s| !s.duration.is_zero()) }
    }
}

fn plain_start(duration: Duration) -> SlowStart {
    SlowStart { duration, least_percent: 10, aggression: 1000 }
}

impl SpecWarmup {
    fn read(self, field: &str, report: &mut Report) -> Option<SlowStart> {
        let read = duration(&format!("{field}.duration"), &self.duration, report)?;
        let least = self.minimum_percent.unwrap_or(10.0);
        if !(0.0..=100.0).contains(&least) {
            let message = format!("`{least}` is no percentage: use 0 to 100");
            report.error(&format!("{field}.minimumPercent"), message);
        }
        let aggression = self.aggression.unwrap_or(1.0);
        if !(1.0..=1000.0).contains(&aggression) {
            report.error(
                &format!("{field}.aggression"),
                format!("`{aggression}` is too small or too big: use 1 or more"),
            );
        }
        let aggression = (aggression * 1000.0).round() as u32;
        Some(SlowStart { duration: read, least_percent: least.round() as u32, aggression })
    }
}

impl SpecHash {
    fn read(self, field: &str, report: &mut Report) -> Option<Balance> {
        let cookie = self.http_cookie.and_then(|c| c.read(&format!("{field}.httpCookie"), report));
        let header = (!self.http_header_name.is_empty()).then(|| Name::new(&self.http_header_name));
        if let Some(None) = header {
            let message = format!("`{}` is no name of a header: use letters, digits and `-`", self.http_header_name);
            report.error(&format!("{field}.httpHeaderName"), message);
        }
        let query = (!self.http_query_parameter_name.is_empty()).then(|| Arc::from(self.http_query_parameter_name));
        let mut ways = [
            header.flatten().map(HashBy::Header),
            cookie,
            self.use_source_ip.then_some(HashBy::SourceIp),
            query.map(HashBy::Query),
        ]
        .into_iter()
        .flatten();
        let by = ways.next();
        if ways.next().is_some() {
            report.error(field, "two keys stand together: leave only one of them");
        }
        if by.is_none() && !report.is_broken() {
            let message = "it has no key: write httpHeaderName, httpCookie, useSourceIp or httpQueryParameterName";
            report.error(field, message);
        }
        let table = match (self.maglev, self.ring_hash) {
            (Some(_), Some(_)) => {
                report.error(field, "ringHash and maglev stand together: leave only one of them");
                return None;
            }
            (Some(maglev), None) => {
                let size = maglev.table_size.unwrap_or(65_537);
                if !is_prime(size) || size > MAX_TABLE {
                    let message = format!("`{size}` is no size of a table: use a prime number up to {MAX_TABLE}");
                    report.error(&format!("{field}.maglev.tableSize"), message);
                }
                HashTable::Maglev { size }
            }
            (None, ring) => {
                let given = ring.and_then(|r| r.minimum_ring_size).or(self.minimum_ring_size);
                let least = given.unwrap_or(1024);
                if least > MAX_RING {
                    let message = format!("`{least}` points are too many: use up to {MAX_RING}");
                    report.error(&format!("{field}.ringHash.minimumRingSize"), message);
                }
                HashTable::Ring { least: least.max(1) }
            }
        };
        by.map(|by| Balance::Hash { by, table })
    }
}

fn is_prime(number: u32) -> bool {
    number > 1
        && (2..)
            .take_while(|d| u64::from(*d) * u64::from(*d) <= u64::from(number))
            .all(|d: u32| !number.is_multiple_of(d))
}

impl SpecCookie {
    fn read(self, field: &str, report: &mut Report) -> Option<HashBy> {
        let ttl = self.ttl.and_then(|text| duration(&format!("{field}.ttl"), &text, report));
        let token = |c: u8| c.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&c);
        if self.name.is_empty() || !self.name.bytes().all(token) {
            let message = format!("`{}` is no name of a cookie: use letters, digits, `-` and `_`", self.name);
            report.error(&format!("{field}.name"), message);
        }
        if !self.path.bytes().all(|c| (0x20..0x7f).contains(&c) && c != b';') {
            report.error(&format!("{field}.path"), "it has letters that no cookie has: correct it");
        }
        if !self.attributes.is_empty() {
            report.warning(&format!("{field}.attributes"), "they are not honoured: the cookie is set without them");
        }
        Some(HashBy::Cookie { name: self.name.into(), path: self.path.into(), ttl })
    }
}

impl SpecLocality {
    fn read(self, field: &str, report: &mut Report) -> Option<LocalityPolicy> {
        if self.enabled == Some(false) {
            return Some(LocalityPolicy::Off);
        }
        let given = [!self.distribute.is_empty(), !self.failover.is_empty(), !self.failover_priority.is_empty()];
        if given[0] && (given[1] || given[2]) {
            let message = "distribute stands beside failover or failoverPriority: leave only one of them";
            report.error(field, message);
            return None;
        }
        if given[1] && given[2] {
            let message = "failover is not honoured beside failoverPriority: write the order of regions there";
            report.warning(&format!("{field}.failover"), message);
        }
        if given[0] {
            let read = |(i, d): (usize, SpecDistribute)| d.read(&format!("{field}.distribute[{i}]"), report);
            return Some(LocalityPolicy::Distribute(self.distribute.into_iter().enumerate().map(read).collect()));
        }
        if given[2] {
            let near = self.failover_priority.iter().enumerate();
            let near = near.filter_map(|(i, text)| near_of(text, &format!("{field}.failoverPriority[{i}]"), report));
            return Some(LocalityPolicy::Priority(near.collect()));
        }
        let regions = self.failover.into_iter().enumerate().map(|(i, f)| {
            if f.from.contains('/') || f.to.contains('/') || f.from.is_empty() || f.to.is_empty() || f.from == f.to {
                let message = format!("`{}` to `{}` is no way between regions: write two regions", f.from, f.to);
                report.error(&format!("{field}.failover[{i}]"), message);
            }
            (f.from.into(), f.to.into())
        });
        Some(LocalityPolicy::Failover(regions.collect()))
    }
}

impl SpecDistribute {
    fn read(self, field: &str, report: &mut Report) -> Distribution {
        let from = place(&self.from, &format!("{field}.from"), report);
        let sum: u64 = self.to.values().map(|w| u64::from(*w)).sum();
        if sum != 100 {
            report.error(&format!("{field}.to"), format!("the shares add up to {sum}: make it 100"));
        }
        let to = self.to.iter().map(|(to, share)| (place(to, &format!("{field}.to[{to}]"), report), *share));
        Distribution { from, to: to.collect() }
    }
}

/// `region/zone/subzone`; `*` at the end stands for all.
fn place(text: &str, field: &str, report: &mut Report) -> Place {
    let mut parts = text.split('/');
    let mut next = |what: &str| match parts.next() {
        Some("*") | None => "",
        Some(part) => {
            if part.is_empty() || part.contains('*') {
                report.error(field, format!("`{text}` has no {what} that can be compared: write it, or `*`"));
            }
            part
        }
    };
    let (region, zone, subzone) = (next("region"), next("zone"), next("subzone"));
    if !subzone.is_empty() {
        report.warning(field, "subzones are not known here: the zone counts");
    }
    if region.is_empty() && !zone.is_empty() {
        report.error(field, format!("`{text}` has a zone behind `*`: name the region"));
    }
    Place { region: region.into(), zone: zone.into() }
}

fn near_of(text: &str, field: &str, report: &mut Report) -> Option<Near> {
    let (label, value) = match text.split_once('=') {
        Some((label, value)) => (label, Some(Arc::from(value))),
        None => (text, None),
    };
    match label {
        "topology.kubernetes.io/region" => Some(Near::Region(value)),
        "topology.kubernetes.io/zone" => Some(Near::Zone(value)),
        "kubernetes.io/hostname" => Some(Near::Node(value)),
        // One network and one cluster: all have it in common.
        "topology.istio.io/network" | "topology.istio.io/cluster" if value.is_none() => None,
        other => {
            let message = format!(
                "label `{other}` is not honoured: use topology.kubernetes.io/region, topology.kubernetes.io/zone or \
                 kubernetes.io/hostname"
            );
            report.warning(field, message);
            None
        }
    }
}
