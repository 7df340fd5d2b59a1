//! One question, one answer: over an agent's admin socket, or by the meshctl in its pod.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Limited};
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use super::cluster::remote::{self, Pod};
use crate::admin::views::LoggingView;
use crate::cli::exit::{Exit, Failure};

pub(super) enum Client {
    Socket(Socket),
    Pod(Box<Pod>),
}

pub(super) struct Socket {
    path: PathBuf,
}

/// An agent that is busy answers within milliseconds; one that hangs should be said to hang.
const TIMEOUT: Duration = Duration::from_secs(10);
/// A config dump of a large mesh has some tens of megabytes.
const MAX_ANSWER: usize = 512 * 1024 * 1024;

impl Client {
    pub(super) fn new(socket: &Path) -> Self {
        Self::Socket(Socket { path: socket.to_owned() })
    }

    pub(super) async fn get<T: DeserializeOwned>(&self, page: &str) -> Result<T, Failure> {
        match self {
            Self::Socket(socket) => socket.ask(Method::GET, page).await,
            Self::Pod(pod) => match page {
                "/logging" => remote::ask(pod, &["log"]).await,
                // `/config_dump` is `config-dump`.
                page => remote::ask(pod, &[&page.trim_start_matches('/').replace('_', "-")]).await,
            },
        }
    }

    pub(super) async fn set_log_level(&self, level: &str) -> Result<LoggingView, Failure> {
        match self {
            Self::Socket(socket) => socket.ask(Method::PUT, &format!("/logging?level={level}")).await,
            Self::Pod(pod) => remote::ask(pod, &["log", level]).await,
        }
    }
}

impl Socket {
    async fn ask<T: DeserializeOwned>(&self, method: Method, page: &str) -> Result<T, Failure> {
        let socket = self.path.display();
        let (status, body) = tokio::time::timeout(TIMEOUT, self.exchange(method, page)).await.map_err(|_| {
            Failure::unavailable(format!("the agent on {socket} did not answer {page} within {TIMEOUT:?}; see its log"))
        })??;
        if status == StatusCode::OK {
            return serde_json::from_slice(&body).map_err(|e| {
                Failure::unavailable(format!(
                    "cannot read what the agent on {socket} says of {page} ({e}); use the meshctl of its version"
                ))
            });
        }
        let text = String::from_utf8_lossy(&body);
        let exit = if status == StatusCode::BAD_REQUEST { Exit::Usage } else { Exit::Unavailable };
        Err(Failure { exit, message: format!("the agent on {socket} refused {page}: {}", text.trim_end()) })
    }

    async fn exchange(&self, method: Method, page: &str) -> Result<(StatusCode, Bytes), Failure> {
        let stream = UnixStream::connect(&self.path).await.map_err(|e| self.unreachable(&e))?;
        let broken = |e: &dyn std::fmt::Display| {
            Failure::unavailable(format!("the agent on {} broke off: {e}; see its log", self.path.display()))
        };
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|e| broken(&e))?;
        let request = Request::builder()
            .method(method)
            .uri(page)
            .header("host", "nodemesh")
            .body(Empty::<Bytes>::new())
            .map_err(|_| Failure::usage(format!("`{page}` cannot be asked for")))?;
        let answer = async {
            let response = sender.send_request(request).await.map_err(|e| broken(&e))?;
            let status = response.status();
            let body = Limited::new(response.into_body(), MAX_ANSWER).collect().await.map_err(|e| broken(&e))?;
            Ok((status, body.to_bytes()))
        };
        tokio::pin!(answer);
        tokio::select! {
            answer = &mut answer => answer,
            // The connection's end lets the answer see its own.
            _ = connection => answer.await,
        }
    }

    fn unreachable(&self, error: &io::Error) -> Failure {
        let socket = self.path.display();
        match error.kind() {
            io::ErrorKind::PermissionDenied => {
                Failure::no_permission(format!("may not open {socket}; ask as root, for example with sudo"))
            }
            io::ErrorKind::NotFound => Failure::unavailable(format!(
                "no agent on {socket}; start one with `mesh-agent node`, or name its socket with --socket"
            )),
            io::ErrorKind::ConnectionRefused => Failure::unavailable(format!(
                "the agent on {socket} is gone; start it again with `mesh-agent node`, or name another with --socket"
            )),
            _ => Failure::unavailable(format!("cannot ask the agent on {socket}: {error}; is that its admin socket?")),
        }
    }
}
