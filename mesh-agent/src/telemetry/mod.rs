//! To be seen: metrics with Istio's names, one access-log line a connection, the log of the agent itself.

mod access_line;
mod access_log;
pub(crate) mod clock;
mod family;
#[cfg(test)]
pub(crate) mod fixtures;
mod flags;
pub mod logging;
mod metrics;
mod process;
mod record;
mod request_line;
mod requests;
mod traffic;

pub use access_log::{AccessLog, LogFormat};
pub use flags::Flags;
pub use metrics::{ConnectionCounters, Metrics, NodeFacts};
pub use record::{Facts, Outcome, Party, Reporter, ResponseFlag, Security};
pub use request_line::RequestLine;
pub use requests::{Ended, Measured, Seen};

/// What the data path reports to.
pub struct Telemetry {
    pub metrics: Metrics,
    pub access_log: AccessLog,
    /// Connections to port 15001 that the kernel has no destination for; they were reset.
    pub original_dst_missing: prometheus::IntCounter,
}

impl Telemetry {
    pub fn new(access_log: AccessLog) -> Self {
        let metrics = Metrics::new();
        let original_dst_missing = prometheus::IntCounter::new(
            "nodemesh_original_destination_missing_total",
            "Redirected connections whose destination was not on record; they were reset.",
        );
        let original_dst_missing = original_dst_missing.expect("the name is a metric's name");
        metrics.adopt(&original_dst_missing);
        metrics.adopt(access_log.dropped());
        Self { metrics, access_log, original_dst_missing }
    }

    /// Writes the access-log line of a connection that has ended.
    pub fn log(&self, facts: &Facts, outcome: &Outcome) {
        self.access_log.write(facts, outcome);
    }
}
