//! One line for each connection, when it has ended.

use super::{Facts, Outcome};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    #[default]
    Text,
    Json,
}

/// Writes access-log lines; shared by all workers.
pub struct AccessLog {
    format: LogFormat,
}

impl AccessLog {
    pub fn new(format: LogFormat) -> Self {
        Self { format }
    }

    /// Writes the line of a connection that has ended.
    pub fn write(&self, _facts: &Facts, _outcome: &Outcome) {
        let _ = self.format;
    }
}
