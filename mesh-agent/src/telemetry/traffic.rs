//! Istio's TCP metrics: one series for each set of labels, found by its labels' text.
//!
//! Not prometheus' own `CounterVec`: five of them would hash and store the same two dozen labels five times, with a
//! lock each, for every connection, and could not say which children are still in use.

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::fmt::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering::Relaxed};
use std::sync::{PoisonError, RwLock};
use std::time::{Duration, Instant};

use prometheus::IntCounter;
use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;

use super::family::{About, Labels, counters};
use super::{ConnectionCounters, Facts, Party, Reporter, ResponseFlag, Security};
use crate::model::{Service, Snapshot, Workload};

/// In ztunnel's order. `response_flags` is not here: it differs between counters of one series.
pub(super) const LABELS: [&str; 22] = [
    "reporter",
    "source_workload",
    "source_canonical_service",
    "source_canonical_revision",
    "source_workload_namespace",
    "source_app",
    "source_version",
    "source_cluster",
    "source_principal",
    "destination_service",
    "destination_service_namespace",
    "destination_service_name",
    "destination_workload",
    "destination_canonical_service",
    "destination_canonical_revision",
    "destination_workload_namespace",
    "destination_app",
    "destination_version",
    "destination_cluster",
    "destination_principal",
    "request_protocol",
    "connection_security_policy",
];
/// Where the parts of `LABELS` lie that `sweep` looks up in a snapshot.
const SOURCE: std::ops::Range<usize> = 1..8;
const SERVICE: std::ops::Range<usize> = 9..12;
const DESTINATION: std::ops::Range<usize> = 12..19;

const OPENED: About = ("istio_tcp_connections_opened_total", "Connections that were opened.");
const CLOSED: About = ("istio_tcp_connections_closed_total", "Connections that were closed.");
const FAILED: About = ("istio_tcp_connections_failed_total", "Connections that could not be opened, or were refused.");
const SENT: About = ("istio_tcp_sent_bytes_total", "Bytes from the client to the server.");
const RECEIVED: About = ("istio_tcp_received_bytes_total", "Bytes from the server to the client.");

/// Parts the values of a key. No name of Kubernetes has it, and a value that does (it cannot) would only mislabel itself.
pub(super) const SEPARATOR: char = '\u{1f}';
/// A missing value, as Istio has it.
const UNKNOWN: &str = "unknown";
/// How long a label set outlives its workloads: several scrapes, so that the last bytes are seen.
pub(super) const GRACE: Duration = Duration::from_secs(300);

pub(super) struct Traffic {
    /// Label values, joined -> counters.
    series: RwLock<HashMap<Box<str>, Arc<Series>>>,
    descs: Vec<Desc>,
}

/// The counters of one set of labels.
struct Series {
    opened: AtomicU64,
    closed: [AtomicU64; ResponseFlag::ALL.len()],
    failed: [AtomicU64; ResponseFlag::ALL.len()],
    /// Connections that still count into it. It is not removed before they end.
    open: AtomicI64,
    bytes: ConnectionCounters,
    /// Since when its workloads are gone. Only `sweep` touches it, under the write lock.
    gone: RwLock<Option<Instant>>,
}

impl Traffic {
    pub(super) fn new() -> Self {
        let names = || LABELS.iter().chain(&["response_flags"]).map(|l| (*l).to_owned()).collect();
        let desc = |(name, help): About| {
            Desc::new(name.to_owned(), help.to_owned(), names(), HashMap::new()).expect("names and labels are valid")
        };
        Self {
            series: RwLock::default(),
            descs: [OPENED, CLOSED, FAILED, SENT, RECEIVED].into_iter().map(desc).collect(),
        }
    }

    pub(super) fn opened(&self, facts: &Facts) -> ConnectionCounters {
        self.with(facts, |series| {
            series.opened.fetch_add(1, Relaxed);
            series.open.fetch_add(1, Relaxed);
            series.bytes.clone()
        })
    }

    pub(super) fn closed(&self, facts: &Facts, flag: ResponseFlag) {
        self.with(facts, |series| {
            series.closed[flag as usize].fetch_add(1, Relaxed);
            series.open.fetch_sub(1, Relaxed);
        });
    }

    pub(super) fn failed(&self, facts: &Facts, flag: ResponseFlag) {
        self.with(facts, |series| series.failed[flag as usize].fetch_add(1, Relaxed));
    }

    /// Finds the series of `facts`, or makes it, and uses it under the lock that keeps `sweep` away.
    fn with<T>(&self, facts: &Facts, act: impl FnOnce(&Series) -> T) -> T {
        thread_local!(static KEY: RefCell<String> = const { RefCell::new(String::new()) });
        KEY.with_borrow_mut(|key| {
            key.clear();
            write_key(key, facts, "tcp");
            if let Some(series) = self.series.read().unwrap_or_else(PoisonError::into_inner).get(key.as_str()) {
                return act(series);
            }
            let mut all = self.series.write().unwrap_or_else(PoisonError::into_inner);
            act(all.entry(key.as_str().into()).or_insert_with(|| Arc::new(Series::new())))
        })
    }

    /// See `Metrics::sweep`.
    pub(super) fn sweep(&self, snapshot: &Snapshot, now: Instant) {
        let missing = {
            let all = self.series.read().unwrap_or_else(PoisonError::into_inner);
            missing(all.keys().map(|key| &**key), snapshot)
        };
        let mut all = self.series.write().unwrap_or_else(PoisonError::into_inner);
        all.retain(|key, series| {
            let alive = is_alive(key, &missing);
            let mut gone = series.gone.write().unwrap_or_else(PoisonError::into_inner);
            if alive || series.open.load(Relaxed) > 0 {
                *gone = None;
                return true;
            }
            now.saturating_duration_since(*gone.get_or_insert(now)) < GRACE
        });
        all.shrink_to_fit();
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.series.read().expect("no writer panics").len()
    }
}

impl Collector for Traffic {
    fn desc(&self) -> Vec<&Desc> {
        self.descs.iter().collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        // Copied out first, so that a scrape of many series does not hold up a connection with new labels.
        let all: Vec<(Box<str>, Arc<Series>)> = {
            let series = self.series.read().unwrap_or_else(PoisonError::into_inner);
            series.iter().map(|(key, series)| (key.clone(), series.clone())).collect()
        };
        let plain = |about, value: fn(&Series) -> u64| {
            counters(about, all.iter().map(|(key, series)| (labels(key, ResponseFlag::None), value(series))))
        };
        let flagged = |about, values: fn(&Series) -> &[AtomicU64]| {
            let samples = all.iter().flat_map(|(key, series)| {
                ResponseFlag::ALL
                    .iter()
                    .zip(values(series))
                    .map(move |(flag, n)| (key, *flag, n.load(Relaxed)))
                    .filter(|(_, _, n)| *n > 0)
            });
            counters(about, samples.map(|(key, flag, n)| (labels(key, flag), n)))
        };
        vec![
            plain(OPENED, |s| s.opened.load(Relaxed)),
            flagged(CLOSED, |s| &s.closed),
            flagged(FAILED, |s| &s.failed),
            plain(SENT, |s| s.bytes.sent.get()),
            plain(RECEIVED, |s| s.bytes.received.get()),
        ]
        .into_iter()
        // A family without a sample is an error to the encoder.
        .filter(|family| !family.get_metric().is_empty())
        .collect()
    }
}

impl Series {
    fn new() -> Self {
        let counter = |(name, help): About| IntCounter::new(name, help).expect("the name is valid");
        Self {
            opened: AtomicU64::new(0),
            closed: Default::default(),
            failed: Default::default(),
            open: AtomicI64::new(0),
            bytes: ConnectionCounters { sent: counter(SENT), received: counter(RECEIVED) },
            gone: RwLock::new(None),
        }
    }
}

/// What the series of these keys speak of and the mesh no longer has.
pub(super) fn missing<'a>(keys: impl Iterator<Item = &'a str>, snapshot: &Snapshot) -> HashSet<String> {
    // What series speak of, less what is there: the mesh may be a thousand times larger than what this node speaks with.
    let mut missing: HashSet<String> =
        keys.flat_map(|key| [SOURCE, SERVICE, DESTINATION].map(|part| part_of(key, part).to_owned())).collect();
    let mut key = String::new();
    let mut is_there = |write: &dyn Fn(&mut String)| {
        key.clear();
        write(&mut key);
        missing.remove(&key);
    };
    snapshot.workloads().for_each(|w| is_there(&|k: &mut String| write_workload(k, Some(w))));
    snapshot.services().for_each(|s| is_there(&|k: &mut String| write_service(k, Some(s))));
    is_there(&|k: &mut String| write_workload(k, None));
    is_there(&|k: &mut String| write_service(k, None));
    missing
}

/// Whether the mesh has all that a key speaks of.
pub(super) fn is_alive(key: &str, missing: &HashSet<String>) -> bool {
    [SOURCE, SERVICE, DESTINATION].into_iter().all(|part| !missing.contains(part_of(key, part)))
}

fn labels(key: &str, flag: ResponseFlag) -> Labels<'_> {
    let mut labels: Labels<'_> = LABELS.iter().copied().zip(key.split(SEPARATOR)).collect();
    labels.push(("response_flags", flag.as_str()));
    labels
}

/// The values of `facts` for `LABELS`.
pub(super) fn write_key(key: &mut String, facts: &Facts, protocol: &str) {
    key.push_str(match facts.reporter {
        Reporter::Source => "source",
        Reporter::Destination => "destination",
    });
    key.push(SEPARATOR);
    write_workload(key, facts.source.workload.as_deref());
    key.push(SEPARATOR);
    write_principal(key, &facts.source);
    key.push(SEPARATOR);
    write_service(key, facts.service.as_deref());
    key.push(SEPARATOR);
    write_workload(key, facts.destination.workload.as_deref());
    key.push(SEPARATOR);
    write_principal(key, &facts.destination);
    key.push(SEPARATOR);
    key.push_str(protocol);
    key.push(SEPARATOR);
    // The specification: only the server's side says it, at the client's it is `unknown`.
    key.push_str(match (facts.reporter, facts.security) {
        (Reporter::Destination, Security::MutualTls) => "mutual_tls",
        (Reporter::Destination, Security::None) | (Reporter::Source, _) => UNKNOWN,
    });
}

fn write_workload(key: &mut String, workload: Option<&Workload>) {
    join(
        key,
        workload.map(|w| {
            let n = &*w.names;
            [&n.workload, &n.canonical_name, &n.canonical_revision, &w.namespace, &n.app, &n.version, &w.cluster]
                .map(|value| &**value)
        }),
    );
}

fn write_service(key: &mut String, service: Option<&Service>) {
    join(key, service.map(|s| [&s.hostname, &s.namespace, &s.name].map(|value| &**value)));
}

fn join<const N: usize>(key: &mut String, values: Option<[&str; N]>) {
    for (i, value) in values.unwrap_or([UNKNOWN; N]).into_iter().enumerate() {
        if i > 0 {
            key.push(SEPARATOR);
        }
        key.push_str(if value.is_empty() { UNKNOWN } else { value });
    }
}

fn write_principal(key: &mut String, party: &Party) {
    match &party.identity {
        Some(id) => write!(key, "{id}").expect("writing to memory does not fail"),
        None => key.push_str(UNKNOWN),
    }
}

/// The values `range` of a key, still joined.
fn part_of(key: &str, range: std::ops::Range<usize>) -> &str {
    let start = |n: usize| match n {
        0 => 0,
        n => key.match_indices(SEPARATOR).nth(n - 1).map_or(key.len(), |(at, _)| at + SEPARATOR.len_utf8()),
    };
    let (from, to) = (start(range.start), start(range.end));
    key[from..to].strip_suffix(SEPARATOR).unwrap_or(&key[from..to])
}
