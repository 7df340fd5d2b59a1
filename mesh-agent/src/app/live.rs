//! Follows the ConfigMap `nodemesh`: what may change while agent or controller run does, and what is wrong is told and not
//! taken.

use std::sync::Arc;
use std::time::SystemTime;

use arc_swap::ArcSwap;
use futures_util::StreamExt;
use serde_json::Value;

use crate::api_server::{ApiServer, Change, Kind, Warning, watch};
use crate::config::{Changed, ConfigError, Live};
use crate::model::{ObjectRef, Problem, Severity};
use crate::telemetry::clock::seconds;

/// The settings' object, and its key.
const NAME: &str = "nodemesh";
const KEY: &str = "nodemesh.yaml";

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
}

impl<C: Clone + PartialEq + Send + Sync + 'static> Follower<C> {
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
            }
            Err(e) => {
                let message = format!("{e}; the last good settings stay in force");
                (self.apply)(&present, vec![self.problem(Severity::Error, message.clone())]);
                let warning = Warning {
                    kind: "ConfigMap",
                    object,
                    reason: "NodemeshSettingsRefused",
                    message: &message,
                    component: name,
                    time: &seconds(SystemTime::now()),
                };
                if let Err(e) = self.server.warn(warning).await {
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
}
