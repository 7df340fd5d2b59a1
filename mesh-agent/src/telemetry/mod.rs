//! To be seen: metrics with Istio's names, one access-log line a connection, the log of the agent itself.

mod access_line;
mod access_log;
pub(crate) mod clock;
mod family;
#[cfg(test)]
pub(crate) mod fixtures;
pub mod logging;
mod metrics;
mod process;
mod record;
mod traffic;

pub use access_log::{AccessLog, LogFormat};
pub use metrics::{ConnectionCounters, Metrics, NodeFacts};
pub use record::{Facts, Outcome, Party, Reporter, ResponseFlag, Security};
