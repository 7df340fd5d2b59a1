//! To be seen: metrics with Istio's names, one access-log line a connection, the log of the agent itself.

mod access_log;
mod metrics;
mod record;

pub use access_log::{AccessLog, LogFormat};
pub use metrics::{ConnectionCounters, Metrics};
pub use record::{Facts, Outcome, Party, Reporter, ResponseFlag, Security};
