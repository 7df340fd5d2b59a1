//! Composition root: builds all parts, joins them, waits for the end. Nothing else imports all of them.
//!
//! Threads: the *control* runtime (two threads: discovery's results, enrolment, certificates, admin, metrics) and one
//! thread a worker for the data path. Control never stands in the way of a byte.

mod live;
mod starting;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, anyhow};
use arc_swap::ArcSwap;

use self::live::Follower;
use crate::admin::{AdminSocket, AdminState, bind, serve_admin, serve_metrics, serve_readiness};
use crate::api_server::{ApiServer, Kind};
use crate::config::{self, CertificateAuthority, Live, Source, Token};
use crate::controller;
use crate::discovery::{self, Sources};
use crate::enrollment::{Enrollment, Inputs as EnrollmentInputs, Places, Processes, see_host_proc};
use crate::identity::{
    self, CA_ROOT, CA_ROOT_KEY, Ca, CaClient, CaClientOptions, CaError, CaOptions, CaServerOptions, CertificateOptions,
    Certificates, Clock, Credential, JoinTokens, TokenError, trusted_roots,
};
use crate::lifecycle::{Readiness, Signals};
use crate::model::{SpiffeId, TrustDomain};
use crate::proxy::{Inputs as ProxyInputs, Proxy};
use crate::redirect::{Options, Redirect, kubelet_cgroup};
use crate::telemetry::{AccessLog, Metrics, Telemetry, logging};
use crate::translate::Settings;

/// For one request to one controller.
const CA_DEADLINE: Duration = Duration::from_secs(10);
/// How often nodes ask for the roots: a change of the root takes a few of these.
const ROOTS_POLL: Duration = Duration::from_secs(30);
/// A file in the controller's state directory: `rotate-root` asks the controller that runs.
const ROTATE_ROOT: &str = "rotate-root";
const REQUEST_POLL: Duration = Duration::from_secs(1);
/// How often the agent looks for the controller's roots when it starts.
const BUNDLE_RETRY: Duration = Duration::from_secs(1);
/// How often kubelet's cgroup is looked for.
const PROBES: Duration = Duration::from_secs(5);
/// How often label sets of workloads that are gone leave the metrics, and entries of sockets that are gone the kernel.
const SWEEP: Duration = Duration::from_secs(60);

/// `mesh-agent node`: serves the pods of this node until a signal ends it.
pub fn run_node(config: config::Node, live: Live) -> anyhow::Result<()> {
    let log = logging::init(&config.logging.filter, config.logging.format).map_err(|e| anyhow!(e))?;
    identity::install_provider();
    raise_file_limit();
    see_host_proc(&config.host_proc);
    let runtime = control_runtime()?;
    let result = runtime.block_on(node(config, live, log));
    // Not dropped: that would wait for threads that are stuck.
    runtime.shutdown_timeout(Duration::from_secs(1));
    result
}

async fn node(config: config::Node, live: Live, log: logging::LogLevel) -> anyhow::Result<()> {
    let started = Instant::now();
    let mut signals = Signals::new().context("cannot wait for signals")?;
    // Whatever can fail on its own fails before the kernel is touched: ports, files, rights.
    let metrics_listener = bind(config.metrics_address, "metrics", "--metrics-address")?;
    let readiness_listener = bind(config.readiness_address, "readiness", "--readiness-address")?;
    let admin_socket = AdminSocket::bind(&config.admin_socket)?;
    let readiness = Readiness::default();
    let starting = readiness.block("the programs in the kernel and the pods of this node");
    tokio::spawn(serve_readiness(readiness_listener, readiness.clone()));

    let in_kernel = Options {
        bpffs: config.bpffs.clone(),
        node: config.node_name.clone(),
        cgroup: config.cgroup.clone(),
        probe_cgroup: config.probe_cgroup.clone(),
        kernel_log: config.kernel_log,
        original_dst_entries: config.orig_dst_entries,
    };
    let lock = Redirect::lock(&in_kernel)?;
    let last_good = Some(config.state_dir.join("last-good-node.json"));
    let (sources, certificates) = tokio::select! {
        started = async { anyhow::Ok((sources(&config, last_good).await?, certificates(&config).await?)) } => started?,
        // In Kubernetes it may wait for long, for the API server or the controller.
        stop = signals.recv() => {
            tracing::info!(signal = stop.name(), "stopped before it was ready");
            return Ok(());
        }
    };
    let telemetry = Arc::new(Telemetry::new(AccessLog::new(config.access_log)));
    let redirect = Arc::new(Redirect::start(&in_kernel)?);
    lock.for_life();

    let name: Arc<str> = config.node_name.as_str().into();
    let proxy = Arc::new(Proxy::start(ProxyInputs {
        node: name.clone(),
        workers: config.workers,
        snapshot: sources.snapshot.clone(),
        changed: sources.changed.clone(),
        redirect: redirect.clone(),
        certificates: certificates.clone(),
        telemetry: telemetry.clone(),
    })?);
    let events = {
        let proxy = proxy.clone();
        Box::new(move |event| proxy.pod_event(event))
    };
    let places = Arc::new(match &config.source {
        Source::Directory(_) => Places::Manifests,
        Source::Kubernetes(_) => Places::Processes(Processes::new(&config.host_proc)),
    });
    let enrollment = Enrollment::new(EnrollmentInputs {
        node: name,
        snapshot: sources.snapshot.clone(),
        changed: sources.changed.clone(),
        problems: sources.problems.clone(),
        redirect: redirect.clone(),
        certificates: certificates.clone(),
        places: places.clone(),
        events,
    });
    let pods = enrollment.statuses();
    let settled = enrollment.settled();
    let enrolling = tokio::spawn(enrollment.run());
    starting::serve_starting_pods(&config, &sources, places, pods.clone(), &readiness).await?;

    let admin = Arc::new(AdminState {
        node: config.node_name.clone(),
        started,
        certificate_authority: authority_in_words(&config.ca),
        snapshot: sources.snapshot.clone(),
        problems: sources.problems.clone(),
        certificates: {
            let certificates = certificates.clone();
            Box::new(move || certificates.list())
        },
        pods: Box::new(move || pods.borrow().to_vec()),
        connections: Box::new(proxy.lister()),
        kernel: {
            let redirect = redirect.clone();
            Box::new(move || redirect.counters().unwrap_or_default())
        },
        readiness: readiness.clone(),
        log: log.clone(),
    });
    let facts = admin.clone();
    telemetry.metrics.watch_node(move || facts.node_facts());
    tokio::spawn(serve_admin(admin_socket, admin));
    tokio::spawn(serve_metrics(metrics_listener, telemetry.metrics.clone()));
    tokio::spawn(sweep(telemetry.clone(), sources.clone(), redirect.clone()));
    tokio::spawn(log_problems(sources.clone()));
    let present = Arc::new(ArcSwap::from_pointee(config.clone()));
    tokio::spawn(follow_probes(redirect.clone(), present.clone()));
    if let Source::Kubernetes(kubernetes) = &config.source {
        let (telemetry, settings_to) = (telemetry.clone(), sources.settings.clone());
        let follower = Follower {
            server: ApiServer::connect(kubernetes.kubeconfig.as_deref(), None).await?,
            namespace: kubernetes.namespace.clone(),
            live,
            node: present.clone(),
            apply: Box::new(move |node, problems| {
                if log.get() != node.logging.filter
                    && let Err(e) = log.set(&node.logging.filter)
                {
                    tracing::error!("{e}");
                }
                telemetry.access_log.set(node.access_log);
                certificates.set_lifetime(node.cert_lifetime);
                if let Some(to) = &settings_to {
                    to.set(settings(node), problems);
                }
            }),
        };
        tokio::spawn(follower.run());
    }

    tokio::select! {
        // A pod that cannot be taken in does not hold up the others: it stays closed, and is reported.
        () = settled.wait() => {}
        stop = signals.recv() => return stopped(stop.name(), enrolling, proxy, Duration::ZERO).await,
    }
    drop(starting);
    tracing::info!(node = config.node_name, after = ?started.elapsed(), "ready");
    let stop = signals.recv().await;
    tokio::select! {
        done = stopped(stop.name(), enrolling, proxy, present.load().drain_timeout) => done,
        // The second signal.
        _ = signals.recv() => Ok(()),
    }
}

/// Stops accepting and lets connections end. Pods stay enrolled in the kernel: until the next agent comes, what they open
/// is refused, and nothing passes in plaintext.
async fn stopped(
    signal: &str,
    enrolling: tokio::task::JoinHandle<()>,
    proxy: Arc<Proxy>,
    patience: Duration,
) -> anyhow::Result<()> {
    tracing::info!(signal, ?patience, "draining");
    enrolling.abort();
    // Its clone of the proxy, inside `events`, goes with it.
    let _ = enrolling.await;
    proxy.drain(patience).await;
    Ok(())
}

/// `mesh-agent controller`: the CA of a mesh, until a signal ends it.
pub fn run_controller(config: config::Controller) -> anyhow::Result<()> {
    logging::init(&config.logging.filter, config.logging.format).map_err(|e| anyhow!(e))?;
    identity::install_provider();
    let runtime = control_runtime()?;
    let result = runtime.block_on(async {
        match config.source.clone() {
            Source::Directory(directory) => standalone_controller(config, &directory).await,
            Source::Kubernetes(kubernetes) => cluster_controller(config, kubernetes).await,
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
async fn cluster_controller(config: config::Controller, kubernetes: config::Kubernetes) -> anyhow::Result<()> {
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
    let inputs = controller::Inputs {
        server,
        namespace: kubernetes.namespace,
        settings: controller_settings(&config),
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
        outcome = serve_readiness(readiness_listener, readiness) => Ok(outcome?),
        outcome = serve_metrics(metrics_listener, Metrics::new()) => Ok(outcome?),
    }
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

fn control_runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("control")
        .enable_all()
        .build()
        .context("cannot start the control threads")
}

fn settings(config: &config::Node) -> Settings {
    let standalone = matches!(config.source, Source::Directory(_));
    Settings {
        cluster_domain: config.cluster_domain.as_str().into(),
        cluster: config.cluster_id.as_str().into(),
        root_namespace: config.root_namespace.as_str().into(),
        istio_labels: config.istio_labels,
        outbound: config.outbound_policy,
        node: Some(config.node_name.as_str().into()),
        standalone_node: standalone.then(|| config.node_name.as_str().into()),
        endpoints_from_pods: standalone,
        ..Settings::new(config.trust_domain.clone())
    }
}

async fn sources(config: &config::Node, last_good: Option<PathBuf>) -> anyhow::Result<Sources> {
    Ok(match &config.source {
        Source::Directory(directory) => {
            discovery::start(discovery::Options { last_good, ..discovery::Options::new(directory, settings(config)) })?
        }
        Source::Kubernetes(kubernetes) => {
            let server = ApiServer::connect(kubernetes.kubeconfig.as_deref(), None).await?;
            discovery::start_kubernetes(&server, settings(config)).await?
        }
    })
}

async fn certificates(config: &config::Node) -> anyhow::Result<Certificates> {
    let options = CertificateOptions {
        trust_domains: vec![config.trust_domain.clone()],
        lifetime: config.cert_lifetime,
        clock: Clock::system(),
    };
    match &config.ca {
        CertificateAuthority::Embedded => {
            let state = config.state_dir.join("ca");
            let ca = CaOptions { lifetime: config.cert_lifetime, ..CaOptions::new(state, config.trust_domain.clone()) };
            Ok(Certificates::embedded(Ca::open(ca)?, options))
        }
        CertificateAuthority::Remote { addresses, token } => {
            let credential = match token {
                Token::Join(file) => Credential::Join { token: read_token(file)?, node: config.node_name.clone() },
                Token::ServiceAccount(file) => Credential::ServiceAccount {
                    token_file: file.clone(),
                    roots_pem: trust_bundle(&config.source).await?,
                },
            };
            let client = CaClient::new(CaClientOptions {
                addresses: addresses.clone(),
                credential,
                state_dir: config.state_dir.join("identity"),
                deadline: CA_DEADLINE,
            })?;
            Ok(Certificates::remote(client, options))
        }
    }
}

/// The roots as the controller has written them into the mesh's namespace; waits for them.
async fn trust_bundle(source: &Source) -> anyhow::Result<String> {
    let Source::Kubernetes(kubernetes) = source else {
        return Err(anyhow!("--ca-token-file is for Kubernetes: give --source kubernetes, or --join-token-file"));
    };
    let server = ApiServer::connect(kubernetes.kubeconfig.as_deref(), None).await?;
    let mut said = String::new();
    loop {
        let found = server.get(&Kind::CONFIG_MAP, &kubernetes.namespace, CA_ROOT).await;
        let hindrance = match found {
            Ok(map) => match map.as_ref().and_then(|m| m["data"][CA_ROOT_KEY].as_str()) {
                Some(roots) if !roots.is_empty() => return Ok(roots.to_owned()),
                _ => format!(
                    "the controller has not written ConfigMap {}/{CA_ROOT} yet: see its log",
                    kubernetes.namespace
                ),
            },
            Err(e) => e.to_string(),
        };
        if said != hindrance {
            tracing::warn!("no certificate can be asked for: {hindrance}; it is tried again each second");
            said = hindrance;
        }
        tokio::time::sleep(BUNDLE_RETRY).await;
    }
}

fn read_token(path: &Path) -> anyhow::Result<String> {
    let text = std::fs::read_to_string(path).with_context(|| {
        format!("cannot read the join token {}; make one with `mesh-agent controller token`", path.display())
    })?;
    Ok(text.trim().to_owned())
}

fn authority_in_words(ca: &CertificateAuthority) -> String {
    match ca {
        CertificateAuthority::Embedded => "embedded".to_owned(),
        CertificateAuthority::Remote { addresses, .. } => addresses.join(", "),
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

async fn sweep(telemetry: Arc<Telemetry>, sources: Sources, redirect: Arc<Redirect>) {
    let mut tick = tokio::time::interval(SWEEP);
    loop {
        tick.tick().await;
        telemetry.metrics.sweep(&sources.snapshot.load(), Instant::now());
        if let Err(e) = redirect.sweep() {
            tracing::warn!("cannot sweep the kernel's maps: {e}");
        }
    }
}

/// Lets kubelet probe pods: its cgroup is another after each restart of it.
async fn follow_probes(redirect: Arc<Redirect>, present: Arc<ArcSwap<config::Node>>) {
    let config = present.load();
    if config.probe_cgroup.is_none() && matches!(config.source, Source::Directory(_)) {
        return;
    }
    let mut said = String::new();
    let mut tick = tokio::time::interval(PROBES);
    loop {
        tick.tick().await;
        let (redirect, config) = (redirect.clone(), present.load_full());
        let done = tokio::task::spawn_blocking(move || {
            let root = config.cgroup.as_deref().unwrap_or(Path::new("/sys/fs/cgroup"));
            let found = config.probe_cgroup.clone().or_else(|| kubelet_cgroup(&config.host_proc, root));
            if found.is_none() {
                let proc = config.host_proc.display();
                return Err(anyhow!("no kubelet with a cgroup of its own is found in {proc}; give --probe-cgroup"));
            }
            Ok(redirect.let_probe(found.as_deref())?)
        });
        let hindrance = match done.await {
            Ok(Ok(())) => String::new(),
            Ok(Err(e)) => e.to_string(),
            Err(e) => e.to_string(),
        };
        if said != hindrance && !hindrance.is_empty() {
            tracing::warn!("probes of pods that want mutual TLS are refused: {hindrance}");
        }
        said = hindrance;
    }
}

/// Each Problem once, when it appears, and once when it has gone.
async fn log_problems(mut sources: Sources) {
    let mut known = Vec::new();
    loop {
        let now = sources.problems.borrow_and_update().clone();
        for problem in now.iter().filter(|p| !known.contains(*p)) {
            tracing::warn!(severity = ?problem.severity, "{problem}");
        }
        for problem in known.iter().filter(|p| !now.contains(p)) {
            tracing::info!("resolved: {problem}");
        }
        known = now.to_vec();
        if sources.problems.changed().await.is_err() {
            return;
        }
    }
}

/// Two descriptors a connection, and one a tunnel: the usual 1024 are nothing.
fn raise_file_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let most = limit.maximum;
    if setrlimit(Resource::Nofile, Rlimit { current: Some(1 << 20), maximum: Some(1 << 20) }).is_err()
        && setrlimit(Resource::Nofile, Rlimit { current: most, maximum: most }).is_err()
    {
        tracing::warn!("the limit of open files cannot be raised; it stays at {:?}", limit.current);
    }
}
