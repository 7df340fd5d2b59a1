//! Istio's metrics of HTTP requests: one series for each set of labels, as `traffic` has them for connections. Whoever
//! reports many requests of one kind keeps the series that it has found (`Seen`), and hashes no labels again.

use std::cell::RefCell;
use std::collections::HashMap;
use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;

use super::family::{About, Distribution, Labels, counters, histograms};
use super::traffic::{GRACE, LABELS, SEPARATOR, is_alive, missing, write_key};
use super::{Facts, Flags};
use crate::model::Snapshot;

/// What comes after `traffic::LABELS`.
const MORE: [&str; 3] = ["response_code", "response_flags", "grpc_response_status"];

const REQUESTS: About = ("istio_requests_total", "HTTP requests that were answered, or given up.");
const DURATION: About = ("istio_request_duration_milliseconds", "From a request's head to the end of its answer.");
const SENT: About = ("istio_request_bytes", "Size of requests, head and body.");
const RECEIVED: About = ("istio_response_bytes", "Size of answers, head and body.");

/// Istio's, for times and sizes alike.
const BOUNDS: [f64; 19] = [
    0.5,
    1.0,
    5.0,
    10.0,
    25.0,
    50.0,
    100.0,
    250.0,
    500.0,
    1_000.0,
    2_500.0,
    5_000.0,
    10_000.0,
    30_000.0,
    60_000.0,
    300_000.0,
    600_000.0,
    1_800_000.0,
    3_600_000.0,
];

/// How a request ended, as far as labels tell it apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ended {
    /// 0: the client left before there was an answer, as Envoy has it.
    pub code: u16,
    pub flags: Flags,
    /// Of a gRPC call; `Some(None)`: it had no status.
    pub grpc: Option<Option<u16>>,
}

/// How much it was.
#[derive(Debug, Clone, Copy)]
pub struct Measured {
    pub duration: Duration,
    pub sent: u64,
    pub received: u64,
}

/// The series that requests of one source and destination have used.
#[derive(Default)]
pub struct Seen(RefCell<Vec<(Ended, Arc<Series>)>>);

/// As many as one pair has of codes and flags in practice.
const MOST_SEEN: usize = 32;

pub(super) struct Requests {
    series: RwLock<HashMap<Box<str>, Arc<Series>>>,
    descs: Vec<Desc>,
}

pub struct Series {
    requests: AtomicU64,
    duration: Histogram,
    sent: Histogram,
    received: Histogram,
    gone: RwLock<Option<Instant>>,
}

struct Histogram {
    buckets: [AtomicU64; BOUNDS.len() + 1],
    /// In thousandths, so that it can be added to without a lock.
    sum: AtomicU64,
}

impl Requests {
    pub(super) fn new() -> Self {
        let names = || LABELS.iter().chain(&MORE).map(|l| (*l).to_owned()).collect();
        let desc = |(name, help): About| {
            Desc::new(name.to_owned(), help.to_owned(), names(), HashMap::new()).expect("names and labels are valid")
        };
        Self { series: RwLock::default(), descs: [REQUESTS, DURATION, SENT, RECEIVED].into_iter().map(desc).collect() }
    }

    pub(super) fn count(&self, facts: &Facts, seen: Option<&Seen>, ended: Ended, measured: &Measured) {
        let Some(Seen(seen)) = seen else { return self.find(facts, ended).add(measured) };
        if let Some((_, series)) = seen.borrow().iter().find(|(e, _)| *e == ended) {
            return series.add(measured);
        }
        let series = self.find(facts, ended);
        series.add(measured);
        let mut seen = seen.borrow_mut();
        if seen.len() < MOST_SEEN {
            seen.push((ended, series));
        }
    }

    fn find(&self, facts: &Facts, ended: Ended) -> Arc<Series> {
        thread_local!(static KEY: RefCell<String> = const { RefCell::new(String::new()) });
        KEY.with_borrow_mut(|key| {
            key.clear();
            write_key(key, facts, if ended.grpc.is_some() { "grpc" } else { "http" });
            let Ended { code, flags, grpc } = ended;
            write!(key, "{SEPARATOR}{code}{SEPARATOR}{flags}{SEPARATOR}").expect("writing to memory does not fail");
            if let Some(Some(status)) = grpc {
                write!(key, "{status}").expect("writing to memory does not fail");
            }
            if let Some(series) = self.series.read().unwrap_or_else(PoisonError::into_inner).get(key.as_str()) {
                return series.clone();
            }
            let mut all = self.series.write().unwrap_or_else(PoisonError::into_inner);
            all.entry(key.as_str().into()).or_insert_with(|| Arc::new(Series::new())).clone()
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
            // One that is kept by a connection is still counted into.
            let alive = is_alive(key, &missing) || Arc::strong_count(series) > 1;
            let mut gone = series.gone.write().unwrap_or_else(PoisonError::into_inner);
            if alive {
                *gone = None;
                return true;
            }
            now.saturating_duration_since(*gone.get_or_insert(now)) < GRACE
        });
        all.shrink_to_fit();
    }
}

impl Series {
    fn new() -> Self {
        let histogram = || Histogram { buckets: Default::default(), sum: AtomicU64::new(0) };
        Self {
            requests: AtomicU64::new(0),
            duration: histogram(),
            sent: histogram(),
            received: histogram(),
            gone: RwLock::new(None),
        }
    }

    fn add(&self, measured: &Measured) {
        let Measured { duration, sent, received } = *measured;
        self.requests.fetch_add(1, Relaxed);
        self.duration.add(duration.as_secs_f64() * 1000.0);
        self.sent.add(sent as f64);
        self.received.add(received as f64);
    }
}

impl Histogram {
    fn add(&self, value: f64) {
        let bucket = BOUNDS.iter().position(|bound| value <= *bound).unwrap_or(BOUNDS.len());
        self.buckets[bucket].fetch_add(1, Relaxed);
        self.sum.fetch_add((value * 1000.0) as u64, Relaxed);
    }

    fn read(&self) -> Distribution {
        let mut count = 0;
        let buckets = BOUNDS.iter().zip(&self.buckets).map(|(bound, n)| {
            count += n.load(Relaxed);
            (*bound, count)
        });
        let buckets = buckets.collect();
        count += self.buckets[BOUNDS.len()].load(Relaxed);
        Distribution { buckets, count, sum: self.sum.load(Relaxed) as f64 / 1000.0 }
    }
}

fn labels(key: &str) -> Labels<'_> {
    LABELS.iter().chain(&MORE).copied().zip(key.split(SEPARATOR)).collect()
}

impl Collector for Requests {
    fn desc(&self) -> Vec<&Desc> {
        self.descs.iter().collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let all: Vec<(Box<str>, Arc<Series>)> = {
            let series = self.series.read().unwrap_or_else(PoisonError::into_inner);
            series.iter().map(|(key, series)| (key.clone(), series.clone())).collect()
        };
        let distribution = |about, of: fn(&Series) -> &Histogram| {
            histograms(about, all.iter().map(|(key, series)| (labels(key), of(series).read())))
        };
        vec![
            counters(REQUESTS, all.iter().map(|(key, series)| (labels(key), series.requests.load(Relaxed)))),
            distribution(DURATION, |s| &s.duration),
            distribution(SENT, |s| &s.sent),
            distribution(RECEIVED, |s| &s.received),
        ]
        .into_iter()
        // A family without a sample is an error to the encoder.
        .filter(|family| !family.get_metric().is_empty())
        .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::super::fixtures::{facts, snapshot, workload};
    use super::*;
    use crate::telemetry::{Metrics, Reporter};

    const OK: Ended = Ended { code: 200, flags: Flags::NONE, grpc: None };

    fn measured(millis: u64) -> Measured {
        Measured { duration: Duration::from_millis(millis), sent: 100, received: 7_000 }
    }

    #[test]
    fn requests_are_counted_by_code_flag_and_grpc_status() {
        let (metrics, facts, seen) = (Metrics::new(), facts(Reporter::Source), Seen::default());
        for seen in [None, Some(&seen), Some(&seen)] {
            metrics.request(&facts, seen, OK, &measured(7));
        }
        let late = Ended { code: 504, flags: Flags::TIMEOUT | Flags::RETRIES_EXHAUSTED, grpc: None };
        metrics.request(&facts, Some(&seen), late, &measured(20_000));
        metrics.request(&facts, Some(&seen), Ended { grpc: Some(Some(5)), ..OK }, &measured(1));
        let text = metrics.text();
        let value = |name: &str, parts: &[&str]| {
            let lines = text.lines().filter(|l| l.starts_with(name) && parts.iter().all(|p| l.contains(p)));
            lines.map(|l| l.rsplit(' ').next().unwrap().parse::<f64>().unwrap()).sum::<f64>()
        };
        let ok = ["response_code=\"200\"", "request_protocol=\"http\"", "response_flags=\"-\"", "reporter=\"source\""];
        assert_eq!(value("istio_requests_total", &ok), 3.0);
        assert_eq!(
            value("istio_requests_total", &["destination_service_name=\"cart\"", "source_app=\"web-app\""]),
            5.0
        );
        assert_eq!(value("istio_requests_total", &["response_flags=\"UT,URX\"", "response_code=\"504\""]), 1.0);
        let grpc = ["request_protocol=\"grpc\"", "grpc_response_status=\"5\""];
        assert_eq!(value("istio_requests_total", &grpc), 1.0);
        let bucket = |bound: &str| {
            let le = format!("le=\"{bound}\"");
            value("istio_request_duration_milliseconds_bucket", &[ok[0], ok[1], &le])
        };
        assert_eq!([bucket("5"), bucket("10"), bucket("+Inf")], [0.0, 3.0, 3.0]);
        assert_eq!(value("istio_request_duration_milliseconds_sum", &[ok[0], ok[1]]), 21.0);
        assert_eq!(value("istio_response_bytes_sum", &[]), 35_000.0);
        assert_eq!(value("istio_request_bytes_count", &[]), 5.0);
    }

    #[test]
    fn what_is_gone_is_forgotten_when_nobody_holds_it() {
        let (requests, facts, seen) = (Requests::new(), facts(Reporter::Source), Seen::default());
        requests.count(&facts, Some(&seen), OK, &measured(1));
        let empty = snapshot(vec![workload("shop", "other", "10.0.9.9")], vec![]);
        let count = || requests.series.read().unwrap().len();
        let start = Instant::now();
        requests.sweep(&empty, start);
        requests.sweep(&empty, start + GRACE * 2);
        assert_eq!(count(), 1, "a connection still counts into it");
        drop(seen);
        requests.sweep(&empty, start + GRACE * 2);
        requests.sweep(&empty, start + GRACE * 4);
        assert_eq!(count(), 0);
    }
}
