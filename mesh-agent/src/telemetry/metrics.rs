//! Prometheus metrics.

use prometheus::IntCounter;

use super::{Facts, Outcome};

/// All metrics of this process.
pub struct Metrics {}

/// The counters of one open connection, resolved once; adding to them takes no lock.
#[derive(Clone)]
pub struct ConnectionCounters {
    pub sent: IntCounter,
    pub received: IntCounter,
}

impl Metrics {
    pub fn new() -> Self {
        Self {}
    }

    /// Counts an opened connection (`istio_tcp_connections_opened_total`) and hands out its byte counters.
    pub fn opened(&self, _facts: &Facts) -> ConnectionCounters {
        unimplemented!()
    }

    /// Counts a closed one (`istio_tcp_connections_closed_total`). Bytes have been added by the caller.
    pub fn closed(&self, _facts: &Facts, _outcome: &Outcome) {
        unimplemented!()
    }

    /// Counts one that never opened (`istio_tcp_connections_failed_total`).
    pub fn failed(&self, _facts: &Facts, _outcome: &Outcome) {
        unimplemented!()
    }
}
