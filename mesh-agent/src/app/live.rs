//! Follows the ConfigMap `nodemesh`: what may change while the agent runs does, and what is wrong is told and not taken.

use std::sync::Arc;

use arc_swap::ArcSwap;
use futures_util::StreamExt;
use serde_json::{Value, json};

use crate::api_server::{ApiError, ApiServer, Change, Kind, watch};
use crate::config::{self, Live};
use crate::model::{ObjectRef, Problem, Severity};

/// The settings' object, and its key.
const NAME: &str = "nodemesh";
const KEY: &str = "nodemesh.yaml";

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
}

impl Follower {
    pub async fn run(mut self) {
        let mut changes =
            Box::pin(watch(&self.server, &Kind::CONFIG_MAP, Some(&self.namespace), &format!("metadata.name={NAME}")));
        let mut taken: Option<String> = None;
        while let Some(change) = changes.next().await {
            let object = match change {
                Change::Listed(object) | Change::Applied(object) => object,
                Change::Failed(e) => {
                    tracing::debug!("settings cannot be followed: {e}");
                    continue;
                }
                // Without it the last good settings stay.
                Change::Begin | Change::Complete | Change::Deleted(_) => continue,
            };
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
            }
            Err(e) => {
                let message = format!("{e}; the last good settings stay in force");
                (self.apply)(&present, vec![self.problem(Severity::Error, message.clone())]);
                if let Err(e) = self.tell(object, &message).await {
                    tracing::warn!("no Event can be written: {e}");
                }
            }
        }
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
    async fn tell(&self, object: &Value, message: &str) -> Result<(), ApiError> {
        let version = object["metadata"]["resourceVersion"].as_str().unwrap_or_default();
        let event = json!({
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": format!("{NAME}.{version}"), "namespace": self.namespace},
            "involvedObject": {
                "apiVersion": "v1", "kind": "ConfigMap", "namespace": self.namespace, "name": NAME,
                "uid": object["metadata"]["uid"], "resourceVersion": version,
            },
            "type": "Warning",
            "reason": "NodemeshSettingsRefused",
            "message": message,
            "source": {"component": "nodemesh-agent"},
            "firstTimestamp": object["metadata"]["managedFields"][0]["time"],
            "count": 1,
        });
        match self.server.create(&Kind::EVENT, &self.namespace, &event).await {
            Ok(_) | Err(ApiError::Conflict { .. }) => Ok(()),
            Err(e) => Err(e),
        }
    }
}
