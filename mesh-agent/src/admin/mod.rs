//! To look inside: metrics and readiness over TCP, everything else over a Unix socket that only root may open. Reads
//! what the other modules hand it and changes nothing, but for the log level.

mod http;
mod pages;
mod socket;
mod state;
pub mod views;

pub use http::{bind, serve_health, serve_metrics};
pub use pages::serve_admin;
pub use socket::AdminSocket;
pub use state::AdminState;

/// One sentence: what cannot be listened on, and what to do.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct AdminError {
    message: String,
    /// Told in the message already; kept for the exit code.
    kind: std::io::ErrorKind,
}

impl AdminError {
    fn new(kind: std::io::ErrorKind, message: impl Into<String>) -> Self {
        Self { message: message.into(), kind }
    }

    pub fn kind(&self) -> std::io::ErrorKind {
        self.kind
    }
}

#[cfg(test)]
pub(crate) mod tests;
