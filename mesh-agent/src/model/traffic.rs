//! How the clients of a service's port share out its endpoints: balancing, health, limits. Made of Istio's DestinationRule.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;

use super::http::Name;
use super::{ObjectRef, Service};

/// What holds for one port of a service, by who asks.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct Destinations {
    /// For clients of all namespaces that have none of their own.
    pub general: Option<Arc<Destination>>,
    /// For clients of one namespace alone, in place of `general`.
    pub by_namespace: BTreeMap<Arc<str>, Arc<Destination>>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Destination {
    /// The object it was written in.
    pub object: Arc<ObjectRef>,
    pub policy: Arc<TrafficPolicy>,
    pub subsets: BTreeMap<Arc<str>, Arc<Subset>>,
}

/// Some of a port's endpoints, by their pods' labels.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Subset {
    /// The service with this port alone, and of its endpoints these alone; there may be none.
    pub service: Arc<Service>,
    pub policy: Arc<TrafficPolicy>,
}

/// Absent parts are as if there were no rule.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct TrafficPolicy {
    /// In place of the service's own algorithm.
    pub balance: Option<Balance>,
    pub locality: Option<LocalityPolicy>,
    pub slow_start: Option<SlowStart>,
    pub outlier: Option<OutlierDetection>,
    pub tcp: TcpLimits,
    pub http: HttpLimits,
    pub retry_budget: Option<RetryBudget>,
    /// Why nothing is sent there at all. The Problem says it too.
    pub closed: Option<Arc<str>>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Balance {
    RoundRobin,
    Random,
    /// Of two that are drawn, the one with fewer requests (of connections where no requests are read) in progress.
    LeastRequest,
    /// The address that the client has called, without any choice.
    Passthrough,
    /// What is alike goes to one endpoint, as long as it is there.
    Hash {
        by: HashBy,
        table: HashTable,
    },
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum HashBy {
    Header(Name),
    /// A request without it gets one, where `ttl` is given: zero for a session cookie.
    Cookie {
        name: Arc<str>,
        path: Arc<str>,
        ttl: Option<Duration>,
    },
    SourceIp,
    Query(Arc<str>),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum HashTable {
    /// At least so many points on the ring.
    Ring { least: u32 },
    /// A table of so many places, a prime number.
    Maglev { size: u32 },
}

/// Which localities are preferred. Failing over wants outlier detection, as in Istio; what is not ready counts always.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum LocalityPolicy {
    /// No locality is preferred.
    Off,
    /// The first whose client matches: its shares, by locality. What no share names gets nothing.
    Distribute(Vec<Distribution>),
    /// Same zone, then same region, then the regions that are named for the client's, then all others.
    Failover(Vec<(Arc<str>, Arc<str>)>),
    /// The more of these an endpoint has in common with the client, counted from the first until one differs, the nearer.
    Priority(Vec<Near>),
}

/// `*` in a place, and all that is left away, stands for everything.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Place {
    pub region: Arc<str>,
    pub zone: Arc<str>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Distribution {
    pub from: Place,
    /// Weights sum up to 100.
    pub to: Vec<(Place, u32)>,
}

/// A label of `failoverPriority`; with a value the endpoint must have that one, whatever the client has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Near {
    Region(Option<Arc<str>>),
    Zone(Option<Arc<str>>),
    Node(Option<Arc<str>>),
}

/// An endpoint that has become ready gets its share little by little.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct SlowStart {
    pub duration: Duration,
    /// Of its full weight, at the begin.
    pub least_percent: u32,
    /// In thousandths; 1000 is a straight line. The share is `(time / duration) ^ (1 / aggression)`.
    pub aggression: u32,
}

/// When an endpoint is left out for a while, by what it answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct OutlierDetection {
    /// So many in a row of 500 to 599, and of what counts as that: broken and refused connections. `None`: not looked at.
    pub consecutive_5xx: Option<u32>,
    /// So many in a row of 502, 503, 504, and of broken and refused connections.
    pub consecutive_gateway: Option<u32>,
    /// So many in a row of broken and refused connections, looked at where `split_local` is.
    pub consecutive_local: Option<u32>,
    /// Whether broken and refused connections are counted on their own and not as answers.
    pub split_local: bool,
    /// Answers that count as errors, in place of 500 to 599.
    pub statuses: Vec<StatusRange>,
    /// How often it is looked whether an endpoint may come back.
    pub interval: Duration,
    /// An endpoint is out for this, times how often it was before.
    pub base_ejection: Duration,
    /// At most so many percent are out at a time; one may always be.
    pub max_ejection_percent: u32,
    /// With fewer percent healthy than this, nobody is left out.
    pub min_health_percent: u32,
}

/// Both ends belong to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct StatusRange {
    pub from: u16,
    pub to: u16,
}

/// What one agent allows itself towards all endpoints together. Absent means no limit.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct TcpLimits {
    pub max_connections: Option<u32>,
    pub connect_timeout: Option<Duration>,
    /// A connection on which nothing moves for so long is closed. Zero: never.
    pub idle_timeout: Option<Duration>,
    pub max_duration: Option<Duration>,
    pub keepalive: Option<Keepalive>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Keepalive {
    pub probes: Option<u32>,
    pub time: Option<Duration>,
    pub interval: Option<Duration>,
}

/// What one agent allows itself towards all endpoints together. Absent means no limit.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct HttpLimits {
    /// Requests that wait for a connection.
    pub max_pending: Option<u32>,
    /// Requests in progress.
    pub max_requests: Option<u32>,
    pub max_requests_per_connection: Option<u32>,
    /// Second tries in progress.
    pub max_retries: Option<u32>,
    /// Of a connection that carries nothing. Zero: never.
    pub idle_timeout: Option<Duration>,
    pub max_streams: Option<u32>,
    pub upgrade: Upgrade,
    pub http2_keepalive: Option<(Duration, Duration)>,
}

/// What is spoken towards endpoints.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Upgrade {
    /// What the port declares.
    #[default]
    AsDeclared,
    /// HTTP/2, also where HTTP/1 is declared.
    Http2,
    /// What the client speaks.
    AsClient,
}

/// Second tries in progress are at most this share of the requests in progress.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct RetryBudget {
    /// In thousandths of a percent.
    pub millipercent: u32,
    pub least: u32,
}

impl Destinations {
    /// What holds for clients of a namespace.
    pub fn of(&self, namespace: &str) -> Option<&Arc<Destination>> {
        self.by_namespace.get(namespace).or(self.general.as_ref())
    }

    pub fn is_empty(&self) -> bool {
        self.general.is_none() && self.by_namespace.is_empty()
    }
}
