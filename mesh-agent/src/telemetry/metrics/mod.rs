//! Prometheus metrics. In comes what the data path says of a connection (`opened`, `closed`, `failed`) and, at each
//! scrape, what the node says of itself (`NodeFacts`); out goes the text that `/metrics` serves.

use std::sync::Arc;
use std::time::Instant;

use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{Encoder, IntCounter, IntGauge, IntGaugeVec, Opts, Registry, TextEncoder};

use super::process::Process;
use super::requests::Requests;
use super::traffic::Traffic;
use super::{Ended, Facts, Measured, Outcome, Reporter, Seen};
use crate::model::Snapshot;

/// All metrics of this process. Cheap to clone.
#[derive(Clone)]
pub struct Metrics {
    registry: Registry,
    traffic: Arc<Traffic>,
    requests: Arc<Requests>,
    /// Resolved once: `sockets_open` has two children for ever.
    source_sockets: IntGauge,
    destination_sockets: IntGauge,
}

/// The counters of one open connection, resolved once; adding to them takes no lock.
#[derive(Clone)]
pub struct ConnectionCounters {
    pub sent: IntCounter,
    pub received: IntCounter,
}

/// What the node says of itself at a scrape.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NodeFacts {
    pub enrolled_pods: u64,
    /// Pods that should be enrolled and are not.
    pub refused_pods: u64,
    /// Connections older than their pod's enrolment, outside the mesh.
    pub legacy_connections: u64,
    /// Identity, and when its certificate ends, in seconds since 1970.
    pub certificates: Vec<(String, i64)>,
    pub errors: u64,
    pub warnings: u64,
    pub snapshot_generation: u64,
    /// What the kernel programs counted: event, reason, how often.
    pub kernel: Vec<(&'static str, &'static str, u64)>,
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    pub fn new() -> Self {
        let registry = Registry::new();
        let (traffic, requests) = (Arc::new(Traffic::new()), Arc::new(Requests::new()));
        let sockets =
            IntGaugeVec::new(Opts::new("istio_tcp_sockets_open", "Connections that are open now."), &["reporter"])
                .expect("name and label are valid");
        let build = IntGaugeVec::new(
            Opts::new("istio_build", "The version of this component; the value is always 1."),
            &["component", "tag"],
        )
        .expect("name and labels are valid");
        build.with_label_values(&["nodemesh", env!("CARGO_PKG_VERSION")]).set(1);
        let metrics = Self {
            registry,
            traffic: traffic.clone(),
            requests: requests.clone(),
            source_sockets: sockets.with_label_values(&["source"]),
            destination_sockets: sockets.with_label_values(&["destination"]),
        };
        metrics.register(Box::new(sockets));
        metrics.register(Box::new(build));
        metrics.register(Box::new(Shared(traffic)));
        metrics.register(Box::new(Shared(requests)));
        metrics.register(Box::new(Process::new()));
        metrics
    }

    /// Counts an opened connection (`istio_tcp_connections_opened_total`) and hands out its byte counters.
    pub fn opened(&self, facts: &Facts) -> ConnectionCounters {
        self.sockets(facts.reporter).inc();
        self.traffic.opened(facts)
    }

    /// Counts a closed one (`istio_tcp_connections_closed_total`). Bytes have been added by the caller.
    pub fn closed(&self, facts: &Facts, outcome: &Outcome) {
        self.sockets(facts.reporter).dec();
        self.traffic.closed(facts, outcome.flag);
    }

    /// Counts one that never opened (`istio_tcp_connections_failed_total`).
    pub fn failed(&self, facts: &Facts, outcome: &Outcome) {
        self.traffic.failed(facts, outcome.flag);
    }

    /// Counts a request that has ended (`istio_requests_total` and its distributions). `seen` spares the search for labels.
    pub fn request(&self, facts: &Facts, seen: Option<&Seen>, ended: Ended, measured: &Measured) {
        self.requests.count(facts, seen, ended, measured);
    }

    /// Asks `facts` at each scrape. May be called once in the life of a process.
    pub fn watch_node(&self, facts: impl Fn() -> NodeFacts + Send + Sync + 'static) {
        self.register(Box::new(NodeCollector { descs: node_descs(), facts: Box::new(facts) }));
    }

    /// Takes in a counter that another module owns, such as the access log's dropped lines.
    pub fn adopt(&self, counter: &IntCounter) {
        self.register(Box::new(counter.clone()));
    }

    /// Forgets label sets that speak of workloads or services which `snapshot` no longer has, so that memory is
    /// bounded by the mesh as it is and not as it was. To be called now and then, once a minute say.
    pub fn sweep(&self, snapshot: &Snapshot, now: Instant) {
        self.traffic.sweep(snapshot, now);
        self.requests.sweep(snapshot, now);
    }

    /// In Prometheus' text format.
    pub fn text(&self) -> String {
        let mut out = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut out).expect("writing to memory does not fail");
        String::from_utf8(out).expect("the text format is UTF-8")
    }

    /// The content type of `text`.
    pub const CONTENT_TYPE: &str = prometheus::TEXT_FORMAT;

    fn sockets(&self, reporter: Reporter) -> &IntGauge {
        match reporter {
            Reporter::Source => &self.source_sockets,
            Reporter::Destination => &self.destination_sockets,
        }
    }

    fn register(&self, collector: Box<dyn Collector>) {
        self.registry.register(collector).expect("every metric is registered once, under a name of its own");
    }
}

/// The registry wants a box of its own.
struct Shared<T>(Arc<T>);

impl<T: Collector> Collector for Shared<T> {
    fn desc(&self) -> Vec<&Desc> {
        self.0.desc()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        self.0.collect()
    }
}

struct NodeCollector {
    descs: Vec<Desc>,
    facts: Box<dyn Fn() -> NodeFacts + Send + Sync>,
}

const GAUGES: [(&str, &str); 5] = [
    ("nodemesh_enrolled_pods", "Pods of this node that are in the mesh."),
    ("nodemesh_refused_pods", "Pods of this node that should be in the mesh and are not; see `meshctl workloads`."),
    ("nodemesh_legacy_connections", "Open connections older than their pod's enrolment, outside the mesh."),
    ("nodemesh_snapshot_generation", "Counts up with each change of the configuration in force."),
    ("nodemesh_problems", "Problems in the configuration, by severity; see `meshctl problems`."),
];
const CERTIFICATE: (&str, &str) =
    ("nodemesh_certificate_expiry_timestamp_seconds", "When a workload's certificate ends, in seconds since 1970.");
const KERNEL: (&str, &str) = ("nodemesh_kernel_events_total", "What the eBPF programs did, by event and reason.");

fn node_descs() -> Vec<Desc> {
    let labelled = |name: &str| match name {
        "nodemesh_problems" => vec!["severity".to_owned()],
        name if name == CERTIFICATE.0 => vec!["identity".to_owned()],
        name if name == KERNEL.0 => vec!["event".to_owned(), "reason".to_owned()],
        _ => Vec::new(),
    };
    GAUGES
        .iter()
        .chain([&CERTIFICATE, &KERNEL])
        .map(|(name, help)| {
            Desc::new((*name).to_owned(), (*help).to_owned(), labelled(name), Default::default())
                .expect("names and labels are valid")
        })
        .collect()
}

impl Collector for NodeCollector {
    fn desc(&self) -> Vec<&Desc> {
        self.descs.iter().collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        use super::family::{counters, gauges};
        // Whole: a new fact cannot be forgotten here.
        let NodeFacts {
            enrolled_pods,
            refused_pods,
            legacy_connections,
            certificates,
            errors,
            warnings,
            snapshot_generation,
            kernel,
        } = (self.facts)();
        let [enrolled, refused, legacy, generation, problems] = GAUGES;
        let one = |about, value: u64| gauges(about, [(vec![], value as f64)]);
        vec![
            one(enrolled, enrolled_pods),
            one(refused, refused_pods),
            one(legacy, legacy_connections),
            one(generation, snapshot_generation),
            gauges(
                problems,
                [(vec![("severity", "error")], errors as f64), (vec![("severity", "warning")], warnings as f64)],
            ),
            gauges(CERTIFICATE, certificates.iter().map(|(id, end)| (vec![("identity", id.as_str())], *end as f64))),
            counters(
                KERNEL,
                kernel.iter().map(|(event, reason, n)| (vec![("event", *event), ("reason", *reason)], *n)),
            ),
        ]
        .into_iter()
        // A family without a sample is an error to the encoder.
        .filter(|family| !family.get_metric().is_empty())
        .collect()
    }
}

#[cfg(test)]
mod tests;
