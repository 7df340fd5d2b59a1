//! `mesh-agent controller`, beside a directory of manifests or in Kubernetes, and the commands to it.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, anyhow};
use arc_swap::ArcSwap;
use tokio::sync::watch;

use super::control_runtime;
use super::live::Follower;
use super::upkeep::log_problems;
use crate::admin::{bind, serve_health, serve_metrics};
use crate::api_server::ApiServer;
use crate::config::{self, Live, Source};
use crate::controller;
use crate::discovery;
use crate::identity::{self, Ca, CaError, CaOptions, CaServerOptions, JoinTokens, TokenError, trusted_roots};
use crate::lifecycle::{Liveness, Readiness, Signals};
use crate::model::{SpiffeId, TrustDomain};
use crate::telemetry::{Metrics, logging};
use crate::translate::Settings;

/// How often nodes ask for the roots: a change of the root takes a few of these.
const ROOTS_POLL: Duration = Duration::from_secs(30);
/// A file in the controller's state directory: `rotate-root` asks the controller that runs.
const ROTATE_ROOT: &str = "rotate-root";
const REQUEST_POLL: Duration = Duration::from_secs(1);

/// `mesh-agent controller`: the CA of a mesh, until a signal ends it.
pub fn run_controller(config: config::Controller, live: Live) -> anyhow::Result<()> {
    let log = logging::init(&config.logging.filter, config.logging.format).map_err(|e| anyhow!(e))?;
    identity::install_provider();
    let runtime = control_runtime()?;
    let result = runtime.block_on(async {
        match config.source.clone() {
            Source::Directory(directory) => standalone_controller(config, &directory).await,
            Source::Kubernetes(kubernetes) => cluster_controller(config, kubernetes, live, log).await,
        }
    });
    runtime.shutdown_timeout(Duration::from_secs(1));
    result
}

async fn standalone_controller(config: config::Controller, directory: &Path) -> anyhow::Result<()> {
    let mut signals = Signals::new().context("cannot wait for signals")?;
    let ca = open_ca(&config)?;
    let tokens = Arc::new(JoinTokens::open(&config.state_dir)?);
    let last_good = Some(config.state_dir.join("last-good-controller.json"));
    let options = discovery::Options { last_good, ..discovery::Options::new(directory, controller_settings(&config)) };
    let sources = discovery::start(options)?;
    tokio::spawn(log_problems(sources.clone()));
    let listener = identity::bind(config.listen).await?;
    let snapshot = sources.snapshot.clone();
    let runs_on = Arc::new(move |node: &str, identity: &SpiffeId| {
        let runs = snapshot.load().workloads().any(|w| w.is_on(node) && w.identity == *identity);
        Box::pin(std::future::ready(runs)) as _
    });
    tokio::spawn(take_requests(ca.clone(), config.state_dir.join(ROTATE_ROOT)));
    tracing::info!(listen = %config.listen, trust_domain = %config.trust_domain, "the CA is ready");
    let options = CaServerOptions {
        listener,
        names: config.sans,
        ca,
        tokens: Some(tokens),
        accounts: None,
        runs_on,
        poll: ROOTS_POLL,
    };
    identity::serve(options, async {
        signals.recv().await;
    })
    .await?;
    Ok(())
}

/// All that it knows is in the cluster; the state directory is looked at only for the secret of join tokens.
async fn cluster_controller(
    config: config::Controller,
    kubernetes: config::Kubernetes,
    live: Live,
    log: logging::LogLevel,
) -> anyhow::Result<()> {
    let mut signals = Signals::new().context("cannot wait for signals")?;
    let readiness_listener = bind(config.readiness_address, "readiness", "--readiness-address")?;
    let metrics_listener = bind(config.metrics_address, "metrics", "--metrics-address")?;
    let ca_listener = identity::bind(config.listen).await?;
    let webhook_listener = bind(config.webhook_address, "the webhook", "--webhook-address")?;
    let webhook_listener = tokio::net::TcpListener::from_std(webhook_listener)?;
    let server = ApiServer::connect(kubernetes.kubeconfig.as_deref(), None).await?;
    let tokens = match JoinTokens::existing(&config.state_dir) {
        Ok(tokens) => Some(Arc::new(tokens)),
        Err(TokenError::NoSecret(_)) => None,
        Err(e) => return Err(e.into()),
    };
    let readiness = Readiness::default();
    let (change, changing) = watch::channel(what_changes(&config));
    let follower = Follower {
        server: server.clone(),
        namespace: kubernetes.namespace.clone(),
        workload: ("deployment", controller::SERVICE),
        live,
        read: Live::controller,
        present: Arc::new(ArcSwap::from_pointee(config.clone())),
        keep: None,
        apply: Box::new(move |config, problems| {
            for problem in problems {
                tracing::warn!("{problem}");
            }
            if log.get() != config.logging.filter
                && let Err(e) = log.set(&config.logging.filter)
            {
                tracing::error!("{e}");
            }
            change.send_if_modified(|known| {
                let next = what_changes(config);
                let news = *known != next;
                *known = next;
                news
            });
        }),
    };
    tokio::spawn(follower.run());
    let liveness = Liveness::default();
    tokio::spawn(liveness.pulse("control").keep());
    let inputs = controller::Inputs {
        server,
        namespace: kubernetes.namespace,
        changing,
        ca: ca_options(&config),
        poll: ROOTS_POLL,
        ca_listener,
        webhook_listener,
        names: config.sans.clone(),
        tokens,
        readiness: readiness.clone(),
        me: format!("{}_{:08x}", config::Machine::here().hostname, rand::random::<u32>()),
    };
    let serving = controller::run(inputs, async move {
        let stop = signals.recv().await;
        tracing::info!(signal = stop.name(), "stopping");
    });
    // After `run` has blocked it.
    tokio::pin!(serving);
    tokio::select! {
        biased;
        outcome = &mut serving => Ok(outcome?),
        outcome = serve_health(readiness_listener, readiness, liveness) => Ok(outcome?),
        outcome = serve_metrics(metrics_listener, Metrics::new()) => Ok(outcome?),
    }
}

fn what_changes(config: &config::Controller) -> controller::Changing {
    controller::Changing { settings: controller_settings(config), lifetime: config.cert_lifetime }
}

fn controller_settings(config: &config::Controller) -> Settings {
    Settings {
        cluster_domain: config.cluster_domain.as_str().into(),
        root_namespace: config.root_namespace.as_str().into(),
        istio_labels: config.istio_labels,
        ..Settings::new(config.trust_domain.clone())
    }
}

/// `mesh-agent controller token`: a join token for the node `node`, good for `ttl`.
pub fn join_token(config: config::Controller, node: &str, ttl: Duration) -> anyhow::Result<String> {
    let tokens = JoinTokens::open(&config.state_dir)?;
    let roots = trusted_roots(&ca_options(&config))?;
    Ok(tokens.issue(node, roots.fingerprints(), SystemTime::now() + ttl)?)
}

/// `mesh-agent controller revoke-token`: what was done, a sentence.
pub fn revoke_token(config: &config::Controller, token_or_id: &str) -> anyhow::Result<String> {
    let id = JoinTokens::existing(&config.state_dir)?.revoke(token_or_id)?;
    Ok(format!("join token {id} is revoked; certificates that were signed with it are good until they expire"))
}

/// `mesh-agent controller rotate-root`: what was done, a sentence.
pub fn rotate_root(config: config::Controller) -> anyhow::Result<String> {
    if let Source::Kubernetes(kubernetes) = &config.source {
        return control_runtime()?.block_on(async {
            identity::install_provider();
            let server = ApiServer::connect(kubernetes.kubeconfig.as_deref(), None).await?;
            Ok(controller::rotate_root(&server, &kubernetes.namespace).await?)
        });
    }
    // It alone may change its CA, and knows which nodes must learn the new root first: signed too soon, they would trust
    // nobody.
    if !Ca::is_running(&ca_options(&config).state_dir)? {
        return Err(CaError::NoController(config.state_dir).into());
    }
    ask_controller(&config.state_dir.join(ROTATE_ROOT))
}

/// Leaves a request in the state directory of the controller that runs, and waits until it has taken it.
fn ask_controller(request: &Path) -> anyhow::Result<String> {
    std::fs::write(request, "").with_context(|| format!("cannot write {}", request.display()))?;
    let deadline = Instant::now() + REQUEST_POLL * 10;
    while request.exists() {
        if Instant::now() > deadline {
            let _ = std::fs::remove_file(request);
            return Err(anyhow!("the controller that holds {} does not answer; see its log", request.display()));
        }
        std::thread::sleep(REQUEST_POLL / 10);
    }
    Ok("the controller has announced a new root; see its log. It signs when all nodes trust it".to_owned())
}

/// Takes requests that `rotate-root` leaves.
async fn take_requests(ca: Arc<Ca>, request: PathBuf) {
    let mut tick = tokio::time::interval(REQUEST_POLL);
    loop {
        tick.tick().await;
        if request.exists() {
            match ca.rotate_root() {
                Ok(root) => tracing::info!(root, "a new root is announced"),
                Err(e) => tracing::error!("cannot change the root: {e}"),
            }
            if let Err(e) = std::fs::remove_file(&request) {
                tracing::error!("cannot remove {}: {e}", request.display());
                return;
            }
        }
    }
}

fn ca_options(config: &config::Controller) -> CaOptions {
    let state = config.state_dir.join("ca");
    let trust_domain: TrustDomain = config.trust_domain.clone();
    CaOptions {
        brought: config.ca_dir.clone(),
        lifetime: config.cert_lifetime,
        announce: ROOTS_POLL * 4,
        ..CaOptions::new(state, trust_domain)
    }
}

fn open_ca(config: &config::Controller) -> anyhow::Result<Arc<Ca>> {
    Ok(Ca::open(ca_options(config))?)
}
