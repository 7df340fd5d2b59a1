//! The Kubernetes API server, as far as more than one part needs it: a client, the kinds, errors that are sentences.
//!
//! Comes in: the pod's service account, or a kubeconfig. Objects are plain JSON: `translate` reads what it needs of them,
//! and a field that is wrong gets a Problem with its path, which generated types could not give.

mod clock;
mod error;
mod event;
mod kind;
mod watch;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use kube::config::{KubeConfigOptions, Kubeconfig};
use serde_json::Value;

pub use clock::ServerClock;
pub use error::ApiError;
pub use event::Warning;
pub use kind::Kind;
pub use watch::{Change, watch};

/// For the TCP connection and TLS; a request that waits longer than `REQUEST_LIMIT` is given up.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);
const REQUEST_LIMIT: Duration = Duration::from_secs(30);
/// Objects in one answer to `list`.
const PAGE: usize = 500;

/// Who asks, for the field managers of what we write.
pub const MANAGER: &str = "nodemesh";

/// Where the API server is and who we are there. Cheap to clone.
#[derive(Clone)]
pub struct ApiServer {
    client: kube::Client,
    url: String,
    namespace: String,
}

impl ApiServer {
    /// With the kubeconfig at `file` and its `context`, or where neither is given: as the pod's service account inside a
    /// cluster, else as `$KUBECONFIG` or the user's own kubeconfig say. Nothing is asked yet.
    pub async fn connect(file: Option<&Path>, context: Option<&str>) -> Result<Self, ApiError> {
        let mut config = match (file, context) {
            (None, None) => kube::Config::infer().await.map_err(|e| ApiError::NoConfig(e.to_string()))?,
            (file, context) => from_kubeconfig(file, context).await?,
        };
        config.connect_timeout = Some(CONNECT_LIMIT);
        let url = config.cluster_url.to_string().trim_end_matches('/').to_owned();
        let namespace = config.default_namespace.clone();
        let client = kube::Client::try_from(config).map_err(|e| ApiError::NoConfig(e.to_string()))?;
        Ok(Self { client, url, namespace })
    }

    pub fn client(&self) -> kube::Client {
        self.client.clone()
    }

    /// What `error` of another call with this client means; `what` was done.
    pub fn error(&self, what: &str, error: kube::Error) -> ApiError {
        ApiError::from_kube(&self.url, what, error)
    }

    /// For sentences.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The pod's own namespace, or that of the kubeconfig's context.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// The object, or `None` where there is none. `namespace` is not looked at for kinds without one.
    pub async fn get(&self, kind: &Kind, namespace: &str, name: &str) -> Result<Option<Value>, ApiError> {
        match self.request("GET", &kind.path(namespace, Some(name)), None, None).await {
            Ok(value) => Ok(Some(value)),
            Err(ApiError::NotFound { .. }) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// All objects of a kind, of one namespace or of all; `selector` is a label selector, empty for none.
    pub async fn list(&self, kind: &Kind, namespace: Option<&str>, selector: &str) -> Result<Vec<Value>, ApiError> {
        let mut objects = Vec::new();
        let mut next = String::new();
        loop {
            let path = kind.path(namespace.unwrap_or_default(), None);
            let query = format!("limit={PAGE}&labelSelector={}&continue={}", escape(selector), escape(&next));
            let mut page = self.request("GET", &format!("{path}?{query}"), None, None).await?;
            if let Some(Value::Array(items)) = page.get_mut("items").map(Value::take) {
                objects.extend(items);
            }
            match page.pointer("/metadata/continue").and_then(Value::as_str) {
                Some(token) if !token.is_empty() => token.clone_into(&mut next),
                _ => return Ok(objects),
            }
        }
    }

    /// Its clock, as an answer tells it. `None`: something on the way keeps that to itself.
    pub async fn clock(&self) -> Result<Option<ServerClock>, ApiError> {
        let failed = |e| ApiError::from_kube(&self.url, "get /version", e);
        let request = http::Request::get("/version").body(kube::client::Body::empty());
        let request = request.map_err(|e| ApiError::Other { what: "get /version".to_owned(), why: e.to_string() })?;
        let asked = Instant::now();
        let answer = match tokio::time::timeout(REQUEST_LIMIT, self.client.send(request)).await {
            Ok(answer) => answer.map_err(failed)?,
            Err(_) => return Ok(None),
        };
        let date = answer.headers().get(http::header::DATE).and_then(|date| date.to_str().ok());
        Ok(date.and_then(|date| ServerClock::new(date, asked, Instant::now())))
    }

    pub async fn create(&self, kind: &Kind, namespace: &str, object: &Value) -> Result<Value, ApiError> {
        self.request("POST", &kind.path(namespace, None), Some(object), None).await
    }

    /// Replaces the object whole; fails with `Conflict` where its `metadata.resourceVersion` is not the present one.
    pub async fn replace(&self, kind: &Kind, namespace: &str, name: &str, object: &Value) -> Result<Value, ApiError> {
        self.request("PUT", &kind.path(namespace, Some(name)), Some(object), None).await
    }

    /// Server-side apply: makes the object or changes the fields that `object` names, as the field manager `manager`.
    /// `sub` is a subresource such as `/status`, or empty. `dry_run` changes nothing.
    pub async fn apply(
        &self,
        kind: &Kind,
        namespace: &str,
        name: &str,
        sub: &str,
        object: &Value,
        manager: &str,
        dry_run: bool,
    ) -> Result<Value, ApiError> {
        let dry_run = if dry_run { "&dryRun=All" } else { "" };
        let path = format!("{}{sub}?fieldManager={manager}&force=true{dry_run}", kind.path(namespace, Some(name)));
        self.request("PATCH", &path, Some(object), Some("application/apply-patch+yaml")).await
    }

    /// A JSON merge patch (RFC 7386).
    pub async fn merge(
        &self,
        kind: &Kind,
        namespace: &str,
        name: &str,
        sub: &str,
        patch: &Value,
    ) -> Result<Value, ApiError> {
        let path = format!("{}{sub}", kind.path(namespace, Some(name)));
        self.request("PATCH", &path, Some(patch), Some("application/merge-patch+json")).await
    }

    /// Ends a pod, also one that is ending already and has more time than `seconds`. Says whether it was there.
    pub async fn end_pod(&self, namespace: &str, name: &str, seconds: u32) -> Result<bool, ApiError> {
        let path = format!("{}?gracePeriodSeconds={seconds}", Kind::POD.path(namespace, Some(name)));
        match self.request("DELETE", &path, None, None).await {
            Ok(_) => Ok(true),
            Err(ApiError::NotFound { .. }) => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// Says whether it was there.
    pub async fn delete(&self, kind: &Kind, namespace: &str, name: &str) -> Result<bool, ApiError> {
        let path = format!("{}?propagationPolicy=Background", kind.path(namespace, Some(name)));
        match self.request("DELETE", &path, None, None).await {
            Ok(_) => Ok(true),
            Err(ApiError::NotFound { .. }) => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// One request with a JSON answer; `path` begins with `/api` or `/apis`.
    pub async fn request(
        &self,
        method: &str,
        path: &str,
        body: Option<&Value>,
        content_type: Option<&str>,
    ) -> Result<Value, ApiError> {
        let body = body.map(|b| b.to_string().into_bytes()).unwrap_or_default();
        let request = http::Request::builder()
            .method(method)
            .uri(path)
            .header(http::header::ACCEPT, "application/json")
            .header(http::header::CONTENT_TYPE, content_type.unwrap_or("application/json"))
            .body(body)
            .map_err(|e| ApiError::Other { what: path.to_owned(), why: e.to_string() })?;
        let what = format!("{} {}", method.to_lowercase(), path.split('?').next().unwrap_or_default());
        match tokio::time::timeout(REQUEST_LIMIT, self.client.request(request)).await {
            Ok(answer) => answer.map_err(|e| ApiError::from_kube(&self.url, &what, e)),
            Err(_) => Err(ApiError::Unreachable {
                url: self.url.clone(),
                why: format!("no answer to `{what}` within {} s", REQUEST_LIMIT.as_secs()),
            }),
        }
    }
}

async fn from_kubeconfig(file: Option<&Path>, context: Option<&str>) -> Result<kube::Config, ApiError> {
    let failed =
        // A parser's picture of the place does not fit into a sentence.
        |e: kube::config::KubeconfigError| {
            let why = e.to_string().lines().next().unwrap_or_default().to_owned();
            ApiError::Kubeconfig { path: file.map(PathBuf::from), why }
        };
    let kubeconfig = match file {
        Some(file) => Kubeconfig::read_from(file),
        None => Kubeconfig::read(),
    };
    let options = KubeConfigOptions { context: context.map(str::to_owned), ..KubeConfigOptions::default() };
    kube::Config::from_custom_kubeconfig(kubeconfig.map_err(failed)?, &options).await.map_err(failed)
}

/// Of a query's value: all but letters, digits and `-._~` (RFC 3986, 2.3).
fn escape(text: &str) -> String {
    let mut out = String::new();
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => out.push(char::from(byte)),
            _ => out.push_str(&format!("%{byte:02X}")),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_stays_one_value_in_a_query() {
        assert_eq!(escape("a=b,c in (d)&x"), "a%3Db%2Cc%20in%20%28d%29%26x");
    }

    #[tokio::test]
    async fn a_token_that_cannot_be_sent_is_no_server_that_is_away() {
        let folder = tempfile::tempdir().unwrap();
        let (token, file) = (folder.path().join("token"), folder.path().join("config"));
        std::fs::write(&token, "rub\nbish").unwrap();
        let text = serde_json::json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "c",
            "clusters": [{"name": "c", "cluster": {"server": "http://127.0.0.1:1"}}],
            "users": [{"name": "u", "user": {"tokenFile": token}}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        });
        std::fs::write(&file, text.to_string()).unwrap();
        let server = ApiServer::connect(Some(&file), None).await.unwrap();
        let error = server.get(&Kind::POD, "a", "b").await.unwrap_err();
        assert!(matches!(error, ApiError::Unauthorized { .. }), "{error}");
    }
}
