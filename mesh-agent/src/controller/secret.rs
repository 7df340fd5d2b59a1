//! The CA's Secret: read by every controller, written by the leader alone.
//! In: Secret `nodemesh-ca` as it changes. Out: a CA that signs with what stands there.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use tokio::sync::watch;

use super::Said;
use crate::api_server::{ApiError, ApiServer, Change, Kind, Warning};
use crate::identity::{CA_ROOT, CA_ROOT_KEY, Ca, CaOptions, Document};
use crate::telemetry::clock::seconds;

pub const CA_SECRET: &str = "nodemesh-ca";
/// An annotation of the Secret, with any value: the leader changes the root, and takes the annotation away.
pub const ROTATE_ROOT: &str = "nodemesh.io/rotate-root";
/// How often the leader looks whether something is due.
const LOOK: Duration = Duration::from_secs(60);
const RETRY: Duration = Duration::from_secs(2);
const MONTH: Duration = Duration::from_secs(30 * 86_400);

/// The Secret as it is.
#[derive(Debug, Clone, PartialEq)]
pub struct Held {
    pub document: Document,
    pub rotate: bool,
    version: String,
    /// The Secret's metadata, without what it holds.
    about: Value,
}

/// What is known of the Secret: nothing yet, that there is none, or what it holds.
pub type Seen = Option<Option<Held>>;

/// Where the Secret is, and what its CA has to be like.
#[derive(Clone)]
pub struct Place {
    pub server: ApiServer,
    pub namespace: String,
    pub options: CaOptions,
    /// What signs now, so that a Secret that is deleted by mistake can be written back.
    good: Arc<Mutex<Option<Document>>>,
    /// The longest life, in milliseconds, that a certificate may have got since this controller started: as long, an old root
    /// stays trusted.
    longest: Arc<AtomicU64>,
}

impl Place {
    pub fn new(server: ApiServer, namespace: &str, options: CaOptions) -> Self {
        let place =
            Self { server, namespace: namespace.to_owned(), options, good: Arc::default(), longest: Arc::default() };
        place.allow(place.options.lifetime);
        place
    }

    /// Certificates may live as long from now on.
    pub fn allow(&self, lifetime: Duration) {
        self.longest.fetch_max(u64::try_from(lifetime.as_millis()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    fn is_good(&self, document: &Document) {
        *self.good.lock().unwrap_or_else(PoisonError::into_inner) = Some(document.clone());
    }

    /// For sentences.
    fn name(&self) -> String {
        format!("Secret {}/{CA_SECRET}", self.namespace)
    }

    fn held(&self, value: &Value) -> Held {
        let text = |path| value.pointer(path).and_then(Value::as_str).unwrap_or_default().to_owned();
        let data = value["data"].as_object().into_iter().flatten();
        // What is no text is told apart from what is missing: it is no PEM.
        let decode = |coded: &Value| {
            let bytes = STANDARD.decode(coded.as_str().unwrap_or_default()).unwrap_or_default();
            String::from_utf8_lossy(&bytes).into_owned()
        };
        let keys: BTreeMap<String, String> = data.map(|(key, coded)| (key.clone(), decode(coded))).collect();
        Held {
            document: Document::new(&self.name(), keys),
            rotate: value["metadata"]["annotations"].get(ROTATE_ROOT).is_some(),
            version: text("/metadata/resourceVersion"),
            about: json!({"metadata": value["metadata"]}),
        }
    }

    /// Tells each version of the Secret.
    pub async fn follow(&self, seen: watch::Sender<Seen>) -> Infallible {
        let fields = format!("metadata.name={CA_SECRET}");
        let mut listed = None;
        super::follow(&self.server, &Kind::SECRET, Some(&self.namespace), &fields, |change| match change {
            Change::Begin => listed = None,
            Change::Listed(value) => listed = Some(self.held(&value)),
            Change::Complete => drop(seen.send_replace(Some(listed.take()))),
            Change::Applied(value) => drop(seen.send_replace(Some(Some(self.held(&value))))),
            Change::Deleted(_) => drop(seen.send_replace(Some(None))),
            Change::Failed(_) => {}
        })
        .await
    }

    /// The CA, when there is one that can sign. What hinders it is said once.
    pub async fn open(&self, seen: &mut watch::Receiver<Seen>) -> Arc<Ca> {
        let mut said = Said::default();
        loop {
            let now = seen.borrow_and_update().clone();
            match now {
                Some(Some(held)) if !held.document.is_empty() => {
                    match Ca::of_secret(&held.document, self.options.clone()) {
                        Ok(ca) => {
                            self.is_good(&held.document);
                            return ca;
                        }
                        Err(e) => {
                            let sentence = format!("the CA cannot be used, so nothing is signed: {e}");
                            self.refuse(&held, &sentence, &mut said).await;
                        }
                    }
                }
                Some(_) => said.warn(&format!("{} is not there yet; the controller that leads makes it", self.name())),
                None => {}
            }
            // A clock that was wrong, or a certificate that becomes valid, is no change of the Secret.
            let _ = tokio::time::timeout(LOOK, seen.changed()).await;
        }
    }

    /// Keeps `ca` equal to the Secret. What is broken, or gone, leaves it as it is.
    pub async fn keep(&self, ca: &Ca, mut seen: watch::Receiver<Seen>) -> Infallible {
        let (mut said, mut wrong) = (Said::default(), false);
        loop {
            tokio::select! {
                changed = seen.changed() => if changed.is_err() {
                    std::future::pending::<Infallible>().await;
                },
                // It may only not be valid yet.
                () = tokio::time::sleep(LOOK), if wrong => {}
            }
            let now = seen.borrow_and_update().clone();
            wrong = false;
            match now {
                Some(Some(held)) => match ca.take(&held.document) {
                    Ok(()) => {
                        self.is_good(&held.document);
                        said.clear();
                    }
                    Err(e) => {
                        wrong = true;
                        let sentence = format!("the CA signs on as before, for what was changed is wrong: {e}");
                        self.refuse(&held, &sentence, &mut said).await;
                    }
                },
                Some(None) => said.error(&format!(
                    "{} has been deleted: the controller that leads writes it back; to begin with a new root, stop all \
                     controllers first",
                    self.name()
                )),
                None => {}
            }
        }
    }

    /// Says it in the log and on the Secret, once.
    async fn refuse(&self, held: &Held, sentence: &str, said: &mut Said) {
        said.error(sentence);
        let warning = Warning {
            kind: "Secret",
            object: &held.about,
            reason: "NodemeshCaRefused",
            message: sentence,
            component: super::SERVICE,
            time: &seconds(self.options.clock.now()),
        };
        if let Err(e) = self.server.warn(warning).await {
            tracing::debug!("no Event can be written: {e}");
        }
    }

    /// The leader's part: makes the Secret, and does what is due.
    pub async fn lead(&self, mut seen: watch::Receiver<Seen>) -> Infallible {
        let (mut problem, mut expiring) = (Said::default(), Said::default());
        loop {
            let now = seen.borrow_and_update().clone();
            let wait = match self.step(now.as_ref(), &mut expiring).await {
                Ok(()) => {
                    problem.clear();
                    LOOK
                }
                // Another version is about to be heard of.
                Err(Hindrance::Api(ApiError::Conflict { .. })) => RETRY,
                Err(Hindrance::Api(e)) => {
                    problem.error(&format!("{} cannot be written: {e}; it is tried again every 2 s", self.name()));
                    RETRY
                }
                Err(Hindrance::Ca(text)) => {
                    problem.error(&text);
                    LOOK
                }
            };
            let _ = tokio::time::timeout(wait, seen.changed()).await;
        }
    }

    async fn step(&self, seen: Option<&Option<Held>>, expiring: &mut Said) -> Result<(), Hindrance> {
        // Not known yet is not the same as not there.
        let Some(seen) = seen else { return Ok(()) };
        let (domain, now) = (&self.options.trust_domain, self.options.clock.now());
        let failed = |e: crate::identity::CaError| Hindrance::Ca(format!("the CA cannot go on: {e}"));
        let Some(held) = seen.as_ref().filter(|held| !held.document.is_empty()) else {
            let known = self.good.lock().unwrap_or_else(PoisonError::into_inner).clone();
            let (document, done) = match known {
                Some(known) => (known, "is written back, with the root that it had"),
                None => {
                    self.may_begin().await?;
                    (Document::first(&self.name(), domain, now).map_err(failed)?, "is made, with a new root")
                }
            };
            self.write(&document, seen.as_ref().map(|held| held.version.as_str())).await?;
            tracing::info!("{} {done}", self.name());
            return Ok(());
        };
        let lifetime = Duration::from_millis(self.longest.load(Ordering::Relaxed));
        let announce = self.options.announce;
        let next = held.document.next(domain, lifetime, announce, held.rotate, now);
        if held.rotate && next.is_err() {
            // It would be refused for ever.
            self.unannotate(&held.version).await?;
        }
        match next.map_err(failed)? {
            Some(next) => {
                self.write(&next.document, Some(&held.version)).await?;
                tracing::info!("{}: {}", self.name(), next.done);
            }
            None => self.warn_of_end(held, now, expiring),
        }
        Ok(())
    }

    /// A mesh that has roots has a CA whose key is lost. Another root, which nobody trusts yet, would cut off every agent that
    /// runs, so a person has to want it.
    async fn may_begin(&self) -> Result<(), Hindrance> {
        let roots = self.server.get(&Kind::CONFIG_MAP, &self.namespace, CA_ROOT).await?;
        match roots.is_some_and(|map| map["data"][CA_ROOT_KEY].as_str().is_some_and(|pem| !pem.trim().is_empty())) {
            false => Ok(()),
            true => Err(Hindrance::Ca(format!(
                "{} is gone, and the mesh trusts the root that it had: write it back from a backup; or, to begin with a new \
                 root, delete ConfigMap {}/{CA_ROOT}, then restart the agents",
                self.name(),
                self.namespace
            ))),
        }
    }

    fn warn_of_end(&self, held: &Held, now: SystemTime, expiring: &mut Said) {
        let end = held.document.not_after(&self.options.trust_domain, now);
        match end.filter(|end| held.document.is_brought() && now + MONTH >= *end) {
            Some(end) => {
                let at = crate::telemetry::clock::Rfc3339(end);
                expiring
                    .warn(&format!("the CA that you have brought in {} expires at {at}; bring a new one", self.name()));
            }
            None => expiring.clear(),
        }
    }

    /// `version`: what is replaced; `None` makes the Secret, and fails where another was faster.
    async fn write(&self, document: &Document, version: Option<&str>) -> Result<(), ApiError> {
        let data: BTreeMap<&String, String> =
            document.keys().iter().map(|(key, text)| (key, STANDARD.encode(text))).collect();
        let mut secret = json!({
            "apiVersion": "v1",
            "kind": "Secret",
            "type": "Opaque",
            "metadata": {"name": CA_SECRET, "labels": {"app.kubernetes.io/managed-by": "nodemesh"}},
            "data": data,
        });
        let Some(version) = version else {
            return self.server.create(&Kind::SECRET, &self.namespace, &secret).await.map(drop);
        };
        // Labels, owners and type stay those that the Secret has.
        let Some(mut old) = self.server.get(&Kind::SECRET, &self.namespace, CA_SECRET).await? else {
            let what = self.name();
            return Err(ApiError::Conflict { what, why: "it has just been deleted".to_owned() });
        };
        old["metadata"]["resourceVersion"] = version.into();
        old["data"] = secret["data"].take();
        if let Some(annotations) = old["metadata"]["annotations"].as_object_mut() {
            annotations.remove(ROTATE_ROOT);
        }
        self.server.replace(&Kind::SECRET, &self.namespace, CA_SECRET, &old).await.map(drop)
    }

    async fn unannotate(&self, version: &str) -> Result<(), ApiError> {
        let patch = json!({"metadata": {"resourceVersion": version, "annotations": {(ROTATE_ROOT): null}}});
        self.server.merge(&Kind::SECRET, &self.namespace, CA_SECRET, "", &patch).await.map(drop)
    }
}

enum Hindrance {
    Api(ApiError),
    Ca(String),
}

impl From<ApiError> for Hindrance {
    fn from(error: ApiError) -> Self {
        Self::Api(error)
    }
}
