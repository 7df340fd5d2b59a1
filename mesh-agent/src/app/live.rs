//! Follows the ConfigMap `nodemesh`: what may change while agent or controller run does, and what is wrong is told and not
//! taken. What was last good is kept on the node, for an agent that starts while the ConfigMap is gone.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use arc_swap::ArcSwap;
use futures_util::StreamExt;
use serde_json::{Value, json};

use crate::api_server::{ApiServer, Change, Kind, Warning, watch};
use crate::config::{Changed, ConfigError, Live};
use crate::lifecycle::{Pen, files};
use crate::model::{ObjectRef, Problem, Severity};
use crate::telemetry::clock::seconds;

/// The settings' object, and its key.
const NAME: &str = "nodemesh";
const KEY: &str = "nodemesh.yaml";

const REFUSED: &str = "NodemeshSettingsRefused";
const GONE: &str = "NodemeshSettingsGone";

type Read<C> = fn(&mut Live, &str, &str, &C) -> Result<Changed<C>, ConfigError>;
type Apply<C> = Box<dyn Fn(&C, Vec<Problem>) + Send + Sync>;

/// What follows the settings of one kind of process.
pub(super) struct Follower<C> {
    pub server: ApiServer,
    pub namespace: String,
    /// What runs this process, as `kubectl rollout restart` wants it: a kind and a name.
    pub workload: (&'static str, &'static str),
    pub live: Live,
    pub read: Read<C>,
    /// In force.
    pub present: Arc<ArcSwap<C>>,
    /// Puts settings in force; the Problems are those of the text that its source has now.
    pub apply: Apply<C>,
    /// Where on the node the text that was last good is kept, and what the node's files are written with.
    pub keep: Option<(PathBuf, Pen)>,
}

impl<C: Clone + PartialEq + Send + Sync + 'static> Follower<C> {
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
                "name": NAME, "namespace": self.namespace,
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
        let present = self.present.load_full();
        let (kind, name) = self.workload;
        let at = format!("ConfigMap {}/{NAME}", self.namespace);
        match (self.read)(&mut self.live, &at, text, &present) {
            Ok(changed) => {
                let problems = match changed.waiting.as_slice() {
                    [] => Vec::new(),
                    names => {
                        let names = names.join(", ");
                        let message = format!(
                            "{names}: in force once {name} is started again: `kubectl -n {} rollout restart {kind}/{name}`",
                            self.namespace
                        );
                        vec![self.problem(Severity::Warning, message)]
                    }
                };
                if !first && *present != changed.now {
                    tracing::info!("the settings of {at} are in force");
                }
                (self.apply)(&changed.now, problems);
                self.present.store(Arc::new(changed.now));
                self.keep(text).await;
            }
            Err(e) => {
                let message = format!("{e}; the last good settings stay in force");
                (self.apply)(&present, vec![self.problem(Severity::Error, message.clone())]);
                self.tell(object, REFUSED, &message).await;
            }
        }
    }

    /// For an agent that starts without the ConfigMap.
    async fn keep(&self, text: &str) {
        let Some((path, pen)) = self.keep.clone() else { return };
        let text = text.to_owned();
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
            "ConfigMap {}/{NAME} is gone; the last good settings stay in force: put it back with `meshctl upgrade`",
            self.namespace
        );
        (self.apply)(&self.present.load(), vec![self.problem(Severity::Warning, message.clone())]);
        let never_seen = json!({"metadata": {"name": NAME, "namespace": self.namespace}});
        self.tell(if last.is_null() { &never_seen } else { last }, GONE, &message).await;
    }

    async fn tell(&self, object: &Value, reason: &'static str, message: &str) {
        let time = &seconds(SystemTime::now());
        let warning = Warning { kind: "ConfigMap", object, reason, message, component: self.workload.1, time };
        if let Err(e) = self.server.warn(warning).await {
            tracing::warn!("no Event can be written: {e}");
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
}
