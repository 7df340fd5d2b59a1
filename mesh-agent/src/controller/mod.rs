//! The controller in Kubernetes: the mesh's CA and what it says in the cluster's own objects. Several run beside each other.
//! All of them sign and judge; the one that holds the Lease writes.
//!
//! Comes in: the CA's Secret, pods, namespaces, policies, tokens of agents. Goes out: certificates, the trust bundle in each
//! namespace, conditions on policies, answers to the API server's question whether an object may be written. Nothing is kept
//! here: a controller that starts finds all of it in the cluster.

mod accounts;
mod admission;
mod lease;
mod scheduled;
mod secret;
mod status;
mod trust_bundle;
mod webhook;

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::api_server::{ApiError, ApiServer, Change, Kind, watch as watch_objects};
use crate::identity::{self, Accounts, Ca, CaOptions, CaServerError, CaServerOptions, JoinTokens, RunsOn};
use crate::lifecycle::Readiness;
use crate::translate::Settings;
use accounts::AgentTokens;
use lease::Election;
use scheduled::{Of, Scheduled};
use secret::Place;

/// The Service in front of the controllers, and the name of their Deployment.
pub const SERVICE: &str = "nodemesh-controller";

const DRAIN: Duration = Duration::from_secs(5);

/// Settings that may change while a controller runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Changing {
    pub settings: Settings,
    /// The longest life of a certificate.
    pub lifetime: Duration,
}

pub struct Inputs {
    pub server: ApiServer,
    /// Where the mesh is installed.
    pub namespace: String,
    pub changing: watch::Receiver<Changing>,
    /// `state_dir` is not looked at.
    pub ca: CaOptions,
    /// How often nodes ask for the roots.
    pub poll: Duration,
    pub ca_listener: TcpListener,
    pub webhook_listener: TcpListener,
    /// Further names in the controller's own certificate.
    pub names: Vec<String>,
    /// For nodes outside the cluster; `None` takes none.
    pub tokens: Option<Arc<JoinTokens>>,
    pub readiness: Readiness,
    /// In the Lease; no other process has the same.
    pub me: String,
}

/// Serves until `stop`. What the cluster lacks is said and waited for.
pub async fn run(inputs: Inputs, stop: impl Future<Output = ()>) -> Result<(), CaServerError> {
    let Inputs {
        server,
        namespace,
        changing,
        ca,
        poll,
        ca_listener,
        webhook_listener,
        mut names,
        tokens,
        readiness,
        me,
    } = inputs;
    let starting = readiness.block("the CA, the pods and the namespaces");
    let (stopping, stopped) = watch::channel(false);
    let place = Place::new(server.clone(), &namespace, ca);
    let (seen, mut secret) = watch::channel(None);
    let scheduled = Scheduled::new(changing.borrow().settings.clone());
    // Dropped with this future, which ends all of them.
    let mut beside = JoinSet::new();
    beside.spawn({
        let place = place.clone();
        async move { never(place.follow(seen).await) }
    });
    for (of, kind) in [(Of::Pods, Kind::POD), (Of::Namespaces, Kind::NAMESPACE)] {
        let (server, scheduled) = (server.clone(), scheduled.clone());
        beside.spawn(async move {
            never(follow(&server, &kind, None, "", |change| scheduled.take(of, change)).await);
        });
    }
    let (opened, open) = watch::channel(None::<Arc<Ca>>);
    beside.spawn(take_settings(changing.clone(), scheduled.clone(), place.clone(), open.clone()));
    let leader = Leader { server: server.clone(), changing, place: place.clone(), secret: secret.clone(), ca: open };
    let election = tokio::spawn({
        let election = Election::new(server.clone(), &namespace, &me);
        let mut stopped = stopped.clone();
        async move {
            let stop = async { drop(stopped.wait_for(|stopped| *stopped).await) };
            // Boxed: it is large, and moved with each change of the lead.
            election.run(|| Box::pin(leader.clone().lead()), stop).await;
        }
    });
    let serving = async {
        let mut ending = stopped.clone();
        let ca = tokio::select! {
            ca = place.open(&mut secret) => ca,
            // It has nothing to end.
            _ = ending.wait_for(|stopped| *stopped) => return Ok(()),
        };
        opened.send_replace(Some(ca.clone()));
        beside.spawn({
            let (place, ca) = (place.clone(), ca.clone());
            async move { never(place.keep(&ca, secret).await) }
        });
        scheduled.known().await;
        names.extend(service_names(&namespace));
        names.sort();
        names.dedup();
        drop(starting);
        tracing::info!(listen = ?ca_listener.local_addr().ok(), trust_domain = %ca.trust_domain(), "the CA is ready");
        let (webhook_ca, webhook_names) = (ca.clone(), names.clone());
        let options = CaServerOptions {
            listener: ca_listener,
            names,
            ca,
            tokens,
            accounts: Some(agents(AgentTokens::new(server.clone(), &namespace))),
            runs_on: runs_on(scheduled.clone()),
            poll,
        };
        let mut stopped = stopped.clone();
        tokio::select! {
            outcome = identity::serve(options, async move { drop(stopped.wait_for(|stopped| *stopped).await) }) => outcome,
            outcome = webhook::serve(webhook_listener, &webhook_ca, webhook_names) => match outcome? {},
        }
    };
    let mut stopping_early = stopped.clone();
    let outcome = tokio::select! {
        // Tells the others, and lets open requests end, below.
        () = async { stop.await; stopping.send_replace(true); std::future::pending::<()>().await } => Ok(()),
        outcome = serving => outcome,
        // Nobody's open request is waited for longer.
        () = async {
            drop(stopping_early.wait_for(|stopped| *stopped).await);
            tokio::time::sleep(DRAIN).await;
        } => Ok(()),
    };
    stopping.send_replace(true);
    // It gives the Lease back.
    let _ = election.await;
    outcome
}

/// Asks the leader for a new root: what was done, a sentence.
pub async fn rotate_root(server: &ApiServer, namespace: &str) -> Result<String, ApiError> {
    let patch = serde_json::json!({"metadata": {"annotations": {(secret::ROTATE_ROOT): "asked"}}});
    server.merge(&Kind::SECRET, namespace, secret::CA_SECRET, "", &patch).await?;
    Ok("the controller that leads is asked for a new root; see its log. It signs when all nodes trust it".to_owned())
}

/// What the leader needs for its part.
#[derive(Clone)]
struct Leader {
    server: ApiServer,
    changing: watch::Receiver<Changing>,
    place: Place,
    secret: watch::Receiver<secret::Seen>,
    ca: watch::Receiver<Option<Arc<Ca>>>,
}

impl Leader {
    /// Writes until it is dropped. All in this one future, so that nothing of it goes on when the Lease is lost.
    async fn lead(self) -> Infallible {
        let Self { server, changing, place, secret, mut ca } = self;
        let with_ca = async {
            let ca = match ca.wait_for(Option::is_some).await.map(|ca| ca.clone()) {
                Ok(Some(ca)) => ca,
                _ => std::future::pending().await,
            };
            tokio::select! {
                never = trust_bundle::keep(&server, ca.trusted()) => never,
                never = webhook::keep_known(&server, ca.trusted()) => never,
            }
        };
        tokio::select! {
            never = place.lead(secret) => never,
            never = status::keep(&server, changing) => never,
            never = with_ca => never,
        }
    }
}

/// Puts settings in force as they change, until it is dropped.
async fn take_settings(
    mut changing: watch::Receiver<Changing>,
    scheduled: Arc<Scheduled>,
    place: Place,
    mut ca: watch::Receiver<Option<Arc<Ca>>>,
) {
    loop {
        let Changing { settings, lifetime } = changing.borrow_and_update().clone();
        scheduled.set(settings);
        place.allow(lifetime);
        if let Some(ca) = &*ca.borrow_and_update() {
            ca.set_lifetime(lifetime);
        }
        // Ends of channels live elsewhere, and longer.
        tokio::select! {
            Ok(()) = changing.changed() => {}
            Ok(()) = ca.changed() => {}
            else => return,
        }
    }
}

/// As clients inside the cluster dial the Service.
fn service_names(namespace: &str) -> [String; 2] {
    [format!("{SERVICE}.{namespace}.svc"), format!("{SERVICE}.{namespace}")]
}

fn agents(tokens: Arc<AgentTokens>) -> Accounts {
    Arc::new(move |token, peer| {
        let tokens = tokens.clone();
        Box::pin(async move { tokens.node_of(&token, peer).await })
    })
}

fn runs_on(scheduled: Arc<Scheduled>) -> RunsOn {
    Arc::new(move |node, identity| {
        let (scheduled, node, identity) = (scheduled.clone(), node.to_owned(), identity.clone());
        Box::pin(async move { scheduled.runs_on(&node, &identity).await })
    })
}

fn never(never: Infallible) {
    match never {}
}

/// Hands on every change of a kind; what hinders it is said once.
async fn follow(
    server: &ApiServer,
    kind: &Kind,
    namespace: Option<&str>,
    fields: &str,
    mut take: impl FnMut(Change),
) -> Infallible {
    let mut changes = std::pin::pin!(watch_objects(server, kind, namespace, fields));
    let mut said = Said::default();
    while let Some(change) = changes.next().await {
        match &change {
            // The list or watch of a kind that is not installed.
            Change::Failed(ApiError::NotFound { .. }) => {}
            Change::Failed(e) => said.warn(&format!("{} cannot be read: {e}; what was known stays", kind.plural)),
            Change::Complete | Change::Applied(_) | Change::Deleted(_) => said.clear(),
            Change::Begin | Change::Listed(_) => {}
        }
        take(change);
    }
    // A watch ends only with its listener.
    std::future::pending().await
}

/// What was said last of one thing that is tried again and again: each sentence is logged once.
#[derive(Default)]
struct Said(String);

impl Said {
    fn warn(&mut self, sentence: &str) {
        if self.is_new(sentence) {
            tracing::warn!("{sentence}");
        }
    }

    fn error(&mut self, sentence: &str) {
        if self.is_new(sentence) {
            tracing::error!("{sentence}");
        }
    }

    fn is_new(&mut self, sentence: &str) -> bool {
        let new = self.0 != sentence;
        if new {
            sentence.clone_into(&mut self.0);
        }
        new
    }

    /// It has gone well.
    fn clear(&mut self) {
        self.0.clear();
    }
}
