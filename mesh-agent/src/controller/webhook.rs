//! The port where the API server asks whether an object may be written: HTTPS, with a certificate of the mesh's own CA.
//! And what makes the API server know that certificate: the leader puts the roots into the ValidatingWebhookConfiguration.
//!
//! Bounded in connections, bytes and time. Who asks is not checked: an answer changes nothing and tells no secret.

use std::convert::Infallible;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;

use super::{Said, admission};
use crate::api_server::{ApiServer, Change, Kind};
use crate::identity::{Bundle, Ca, CaServerError, server_tls};

/// The ValidatingWebhookConfiguration.
pub const CONFIGURATION: &str = "nodemesh";
const PATH: &str = "/validate";
/// Each API server keeps a few.
const MAX_CONNECTIONS: usize = 64;
/// An object has 3 MB at the most, and a review has the old and the new one.
const MAX_BYTES: usize = 8 * 1024 * 1024;
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);
/// The API server waits 5 s, as the chart sets it.
const BODY_LIMIT: Duration = Duration::from_secs(5);
const CONNECTION_LIMIT: Duration = Duration::from_secs(600);
const RETRY: Duration = Duration::from_secs(2);

/// Answers until it is dropped; `names` are those by which the API server calls.
pub async fn serve(listener: TcpListener, ca: &Arc<Ca>, names: Vec<String>) -> Result<Infallible, CaServerError> {
    let (tls, renew) = server_tls(ca, names, b"http/1.1")?;
    let accept = async {
        let (tls, places) = (TlsAcceptor::from(tls), Arc::new(Semaphore::new(MAX_CONNECTIONS)));
        // Dropped with this future, which ends all connections.
        let mut connections = JoinSet::new();
        loop {
            let place = places.clone().acquire_owned().await.expect("the semaphore is never closed");
            let stream = match listener.accept().await {
                Ok((stream, _)) => stream,
                Err(problem) => {
                    tracing::warn!(%problem, "the webhook's port can't accept a connection; it is tried again in 100 ms");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            while connections.try_join_next().is_some() {}
            let tls = tls.clone();
            connections.spawn(async move {
                let _place = place;
                let Ok(Ok(stream)) = tokio::time::timeout(HANDSHAKE_LIMIT, tls.accept(stream)).await else {
                    tracing::debug!("a handshake with the webhook's port has failed or has taken too long");
                    return;
                };
                let connection = http1::Builder::new().timer(TokioTimer::new()).serve_connection(
                    TokioIo::new(stream),
                    service_fn(async |request| Ok::<_, Infallible>(page(request).await)),
                );
                // How a client leaves is its own business.
                let _ = tokio::time::timeout(CONNECTION_LIMIT, connection).await;
            });
        }
    };
    tokio::select! {
        never = accept => never,
        never = renew => match never {},
    }
}

async fn page(request: Request<Incoming>) -> Response<Full<Bytes>> {
    match (request.method(), request.uri().path()) {
        (&Method::POST, PATH) => {}
        (_, PATH) => return text(StatusCode::METHOD_NOT_ALLOWED, "only POST here\n".to_owned()),
        (_, path) => return text(StatusCode::NOT_FOUND, format!("no page {path}; there is {PATH}\n")),
    }
    let body = Limited::new(request.into_body(), MAX_BYTES).collect();
    let body = match tokio::time::timeout(BODY_LIMIT, body).await {
        Ok(Ok(body)) => body.to_bytes(),
        Ok(Err(e)) => return text(StatusCode::BAD_REQUEST, format!("the request cannot be read: {e}\n")),
        Err(_) => return text(StatusCode::REQUEST_TIMEOUT, "the request has taken too long\n".to_owned()),
    };
    let review = serde_json::from_slice::<Value>(&body).map_err(|e| format!("the request is no JSON: {e}"));
    match review.and_then(|review| admission::answer(&review)) {
        Ok(answer) => {
            let mut page = Response::new(Full::new(answer.to_string().into()));
            page.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
            page
        }
        Err(why) => text(StatusCode::BAD_REQUEST, format!("{why}\n")),
    }
}

fn text(status: StatusCode, text: String) -> Response<Full<Bytes>> {
    let mut page = Response::new(Full::new(text.into()));
    *page.status_mut() = status;
    page.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    page
}

/// Keeps the roots in the configuration right, until it is dropped. Nothing else of it is touched.
pub async fn keep_known(server: &ApiServer, mut roots: watch::Receiver<Option<Bundle>>) -> Infallible {
    let known = Mutex::new(None::<Value>);
    let (changed, mut heard) = watch::channel(());
    let take = |change: Change| {
        let value = match change {
            Change::Listed(value) | Change::Applied(value) => Some(value),
            Change::Begin | Change::Deleted(_) => None,
            Change::Complete | Change::Failed(_) => return,
        };
        *known.lock().unwrap_or_else(PoisonError::into_inner) = value;
        changed.send_replace(());
    };
    let write = async {
        let mut said = Said::default();
        loop {
            heard.borrow_and_update();
            let pem = roots.borrow_and_update().as_ref().map(Bundle::pem).unwrap_or_default();
            let patch = known.lock().unwrap_or_else(PoisonError::into_inner).as_ref().and_then(|c| patch(c, &pem));
            let mut wait = None;
            if let Some(patch) = patch {
                let path = Kind::VALIDATING_WEBHOOK.path("", Some(CONFIGURATION));
                match server.request("PATCH", &path, Some(&patch), Some("application/json-patch+json")).await {
                    Ok(_) => said.clear(),
                    Err(e) => {
                        said.warn(&format!(
                            "the roots cannot be written into ValidatingWebhookConfiguration {CONFIGURATION}, so objects are \
                             written without being judged: {e}; it is tried again every 2 s"
                        ));
                        wait = Some(RETRY);
                    }
                }
            }
            let timer = async {
                match wait {
                    Some(wait) => tokio::time::sleep(wait).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                _ = heard.changed() => {}
                Ok(()) = roots.changed() => {}
                () = timer => {}
            }
        }
    };
    let fields = format!("metadata.name={CONFIGURATION}");
    tokio::select! {
        never = super::follow(server, &Kind::VALIDATING_WEBHOOK, None, &fields, take) => never,
        never = write => never,
    }
}

/// A JSON patch (RFC 6902) that fails where the configuration is no longer the one that was looked at.
fn patch(configuration: &Value, pem: &str) -> Option<Value> {
    if pem.is_empty() {
        return None;
    }
    let coded = STANDARD.encode(pem);
    let webhooks = configuration["webhooks"].as_array()?;
    let wrong = webhooks.iter().enumerate().filter(|(_, w)| w["clientConfig"]["caBundle"] != coded.as_str());
    let mut patch: Vec<Value> = wrong
        .map(|(i, _)| json!({"op": "add", "path": format!("/webhooks/{i}/clientConfig/caBundle"), "value": coded}))
        .collect();
    if patch.is_empty() {
        return None;
    }
    let version = &configuration["metadata"]["resourceVersion"];
    patch.insert(0, json!({"op": "test", "path": "/metadata/resourceVersion", "value": version}));
    Some(patch.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_wrong_of_the_configuration_is_patched() {
        let coded = STANDARD.encode("PEM");
        let configuration = json!({
            "metadata": {"resourceVersion": "5"},
            "webhooks": [{"clientConfig": {"caBundle": coded}}, {"clientConfig": {"caBundle": "Cg=="}}],
        });
        let patch = patch(&configuration, "PEM").unwrap();
        assert_eq!(
            patch,
            json!([
                {"op": "test", "path": "/metadata/resourceVersion", "value": "5"},
                {"op": "add", "path": "/webhooks/1/clientConfig/caBundle", "value": coded},
            ])
        );
        let right = json!({"webhooks": [{"clientConfig": {"caBundle": coded}}]});
        assert_eq!(super::patch(&right, "PEM"), None);
        assert_eq!(super::patch(&configuration, ""), None, "without roots nothing is known to be wrong");
    }
}
