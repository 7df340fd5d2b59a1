//! Follows the ConfigMap `nodemesh`: what may change while the agent runs does, and what is wrong is told and not taken. What
//! was last good is kept on the node, for an agent that starts while the ConfigMap is gone.

use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use arc_swap::ArcSwap;
use futures_util::StreamExt;
use serde_json::{Value, json};

use crate::api_server::{ApiError, ApiServer, Change, Kind, watch};
use crate::config::{self, LAST_GOOD_SETTINGS, Live};
use crate::lifecycle::{Pen, files};
use crate::model::{ObjectRef, Problem, Severity};
use crate::telemetry::clock::Rfc3339;

/// The settings' object, and its key.
const NAME: &str = "nodemesh";
const KEY: &str = "nodemesh.yaml";

const GONE: &str = "NodemeshSettingsGone";

type Apply = Box<dyn Fn(&config::Node, Vec<Problem>) + Send + Sync>;

/// What follows the settings.
pub(super) struct Follower {
    pub server: ApiServer,
    pub namespace: String,
    pub live: Live,
    /// In force.
    pub node: Arc<ArcSwap<config::Node>>,
    /// Puts settings in force; the Problems are those of the text that its source has now.
    pub apply: Apply,
    /// What the node's files are written with.
    pub pen: Pen,
}

impl Follower {
    pub async fn run(mut self) {
        let mut changes =
            Box::pin(watch(&self.server, &Kind::CONFIG_MAP, Some(&self.namespace), &format!("metadata.name={NAME}")));
        let mut taken: Option<String> = None;
        // The ConfigMap as it was last seen; while a list is read, whether it has named it.
        let (mut last, mut listed) = (Value::Null, false);
        while let Some(change) = changes.next().await {
            let object = match change {
                Change::Listed(object) | Change::Applied(object) => {
                    listed = true;
                    object
                }
                Change::Failed(e) => {
                    tracing::debug!("settings cannot be followed: {e}");
                    continue;
                }
                Change::Begin => {
                    listed = false;
                    continue;
                }
                Change::Complete if listed => continue,
                Change::Complete | Change::Deleted(_) => {
                    taken = None;
                    self.gone(&last).await;
                    continue;
                }
            };
            last = json!({"metadata": {
                "uid": object["metadata"]["uid"], "resourceVersion": object["metadata"]["resourceVersion"],
            }});
            let text = object["data"][KEY].as_str().unwrap_or_default();
            if taken.as_deref() == Some(text) {
                continue;
            }
            let first = taken.is_none();
            taken = Some(text.to_owned());
            self.take(&object, text, first).await;
        }
    }

    /// The process was started with the text that is read first, or nearly: its change is not worth a line.
    async fn take(&mut self, object: &Value, text: &str, first: bool) {
        let present = self.node.load_full();
        let at = format!("ConfigMap {}/{NAME}", self.namespace);
        match self.live.read(&at, text, &present) {
            Ok(changed) => {
                let problems = match changed.waiting.as_slice() {
                    [] => Vec::new(),
                    names => {
                        let names = names.join(", ");
                        let message = format!(
                            "{names}: in force once the agents are started again: `kubectl -n {} rollout restart \
                             daemonset/nodemesh-agent`",
                            self.namespace
                        );
                        vec![self.problem(Severity::Warning, message)]
                    }
                };
                if !first && *present != changed.node {
                    tracing::info!("the settings of {at} are in force");
                }
                (self.apply)(&changed.node, problems);
                self.node.store(Arc::new(changed.node));
                self.keep(text, &present.state_dir).await;
            }
            Err(e) => {
                let message = format!("{e}; the last good settings stay in force");
                (self.apply)(&present, vec![self.problem(Severity::Error, message.clone())]);
                self.tell(object, "NodemeshSettingsRefused", &message).await;
            }
        }
    }

    /// For an agent that starts without the ConfigMap.
    async fn keep(&self, text: &str, state_dir: &Path) {
        let (path, text, pen) = (state_dir.join(LAST_GOOD_SETTINGS), text.to_owned(), self.pen.clone());
        let written = tokio::task::spawn_blocking(move || {
            pen.write(|| match files::read(&path) {
                Ok(known) if known == text => Ok(()),
                _ => files::write_private(&path, text.as_bytes()),
            })
        });
        if let Ok(Some(Err(e))) = written.await {
            tracing::warn!("the settings cannot be kept for an agent that starts without ConfigMap {NAME}: {e}");
        }
    }

    /// The last good settings stay.
    async fn gone(&self, last: &Value) {
        let message = format!(
            "ConfigMap {}/{NAME} is gone; the last good settings stay in force on each node: put it back with `meshctl upgrade`",
            self.namespace
        );
        (self.apply)(&self.node.load(), vec![self.problem(Severity::Warning, message.clone())]);
        self.tell(last, GONE, &message).await;
    }

    fn problem(&self, severity: Severity, message: String) -> Problem {
        let object = ObjectRef {
            file: String::new(),
            kind: "ConfigMap".into(),
            namespace: self.namespace.clone(),
            name: NAME.into(),
        };
        Problem { severity, object: Arc::new(object), field: KEY.into(), message }
    }

    /// One Event for each version of the settings, whichever of the agents is the first to write it: its name says which.
    async fn tell(&self, object: &Value, reason: &str, message: &str) {
        let version = object["metadata"]["resourceVersion"].as_str().unwrap_or("unknown");
        let now = Rfc3339(SystemTime::now()).to_string();
        let seconds = now.split('.').next().unwrap_or_default().to_owned() + "Z";
        let suffix = if reason == GONE { ".gone" } else { "" };
        let event = json!({
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": format!("{NAME}.{version}{suffix}"), "namespace": self.namespace},
            "involvedObject": {
                "apiVersion": "v1", "kind": "ConfigMap", "namespace": self.namespace, "name": NAME,
                "uid": object["metadata"]["uid"], "resourceVersion": version,
            },
            "type": "Warning",
            "reason": reason,
            "message": message,
            "source": {"component": "nodemesh-agent"},
            "firstTimestamp": seconds,
            "lastTimestamp": seconds,
            "count": 1,
        });
        match self.server.create(&Kind::EVENT, &self.namespace, &event).await {
            Ok(_) | Err(ApiError::Conflict { .. }) => {}
            Err(e) => tracing::warn!("no Event can be written: {e}"),
        }
    }
}
