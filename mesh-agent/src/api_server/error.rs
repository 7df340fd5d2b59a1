//! What can go wrong with the API server: one sentence each, with the next step.

use std::error::Error;
use std::path::PathBuf;

#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    #[error("no Kubernetes API server is known ({0}); run inside a cluster, set KUBECONFIG, or give --kubeconfig")]
    NoConfig(String),
    #[error("cannot use the kubeconfig{}: {why}; correct it or name another with --kubeconfig", path.as_ref().map(|p| format!(" {}", p.display())).unwrap_or_default())]
    Kubeconfig { path: Option<PathBuf>, why: String },
    #[error("cannot reach the API server {url}: {why}; check that it runs and that this machine may connect to it")]
    Unreachable { url: String, why: String },
    #[error(
        "cannot trust the API server {url}: {why}; correct its certificate-authority in the kubeconfig, or its address"
    )]
    Untrusted { url: String, why: String },
    #[error(
        "the API server does not know who we are ({why}); renew the credentials in your kubeconfig; those of a pod are renewed by kubelet"
    )]
    Unauthorized { why: String },
    /// `why` is Kubernetes's own sentence, which names the verb, the kind and the user.
    #[error("the API server does not allow it: {why}; ask for that right")]
    Forbidden { why: String },
    #[error("{what}: there is no such object or kind ({why})")]
    NotFound { what: String, why: String },
    #[error("{what}: somebody else has changed the object meanwhile ({why})")]
    Conflict { what: String, why: String },
    #[error("{what}: the API server refuses it: {why}")]
    Refused { what: String, why: String },
    #[error("{what}: {why}")]
    Other { what: String, why: String },
}

impl ApiError {
    /// `what` was asked for, such as `get /api/v1/pods`.
    pub(super) fn from_kube(url: &str, what: &str, error: kube::Error) -> Self {
        let what = what.to_owned();
        match error {
            kube::Error::Api(status) => {
                let why = status.message.clone();
                match status.code {
                    401 => Self::Unauthorized { why },
                    403 => Self::Forbidden { why },
                    404 => Self::NotFound { what, why },
                    409 => Self::Conflict { what, why },
                    // What it cannot read of ours it calls a fault of its own.
                    500 if why.contains("unable to convert") => Self::Refused { what, why },
                    // Of an exec: the kubelet's word.
                    500 if why.contains("container not found") => Self::NotFound { what, why },
                    // It is there and cannot answer: its store is away, or it starts.
                    429 | 500 | 502 | 503 | 504 => Self::Unreachable { url: url.to_owned(), why },
                    _ => Self::Refused { what, why },
                }
            }
            // The token's file is read again before a request: what is wrong with it comes as an error of the connection.
            e if is_of_auth(&e) => Self::Unauthorized { why: format!("the token cannot be sent: {}", root_cause(&e)) },
            e @ (kube::Error::HyperError(_)
            | kube::Error::Service(_)
            | kube::Error::ReadEvents(_)
            | kube::Error::UpgradeConnection(_)) => Self::not_reached(url, root_cause(&e)),
            kube::Error::Auth(e) => Self::Unauthorized { why: e.to_string() },
            e => Self::Other { what, why: root_cause(&e) },
        }
    }

    fn not_reached(url: &str, why: String) -> Self {
        let url = url.to_owned();
        // As rustls words it.
        if why.contains("invalid peer certificate") {
            Self::Untrusted { url, why }
        } else {
            Self::Unreachable { url, why }
        }
    }

    /// Whether it may go well by itself later.
    pub fn is_temporary(&self) -> bool {
        matches!(self, Self::Unreachable { .. } | Self::Untrusted { .. })
    }
}

fn is_of_auth(error: &kube::Error) -> bool {
    let mut next: Option<&(dyn Error + 'static)> = Some(error);
    while let Some(error) = next {
        if error.is::<kube::client::AuthError>() {
            return true;
        }
        next = error.source();
    }
    false
}

/// The last of the chain says what happened; those above say only that something did.
fn root_cause(error: &kube::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = cause.to_string();
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_certificate_that_is_not_trusted_is_no_matter_of_reach() {
        let said = |why: &str| ApiError::not_reached("https://x", why.to_owned()).to_string();
        assert!(said("invalid peer certificate: UnknownIssuer").contains("certificate-authority in the kubeconfig"));
        assert!(said("Connection refused").contains("this machine may connect to it"));
    }
}
