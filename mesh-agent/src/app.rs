//! Composition root: builds all parts, joins them, waits for the end. Nothing else imports all of them.
//!
//! Threads: the *control* runtime (two threads: discovery's results, enrolment, certificates, admin, metrics) and one
//! thread a worker for the data path. Control never stands in the way of a byte.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, anyhow};
use tokio::task::AbortHandle;

use crate::admin::{AdminState, serve_admin, serve_metrics};
use crate::api_server::{ApiServer, Kind};
use crate::config::{self, CertificateAuthority, Source, Token};
use crate::discovery::{self, Sources};
use crate::enrollment::{Enrollment, Inputs as EnrollmentInputs, Places, Processes, see_host_proc};
use crate::handover::{self, Given, Giver, Own, Taken};
use crate::identity::{
    self, CA_ROOT, CA_ROOT_KEY, Ca, CaClient, CaClientOptions, CaError, CaOptions, CaServerOptions, CertificateOptions,
    Certificates, Clock, Credential, JoinTokens, trusted_roots,
};
use crate::lifecycle::{Readiness, Signals};
use crate::model::{SpiffeId, TrustDomain};
use crate::proxy::{Inputs as ProxyInputs, Proxy};
use crate::redirect::{Options, Redirect};
use crate::telemetry::{AccessLog, Telemetry, logging};
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
/// How often label sets of workloads that are gone leave the metrics, and entries of sockets that are gone the kernel.
const SWEEP: Duration = Duration::from_secs(60);

/// `mesh-agent node`: serves the pods of this node until a signal ends it.
pub fn run_node(config: config::Node) -> anyhow::Result<()> {
    let log = logging::init(&config.logging.filter, config.logging.format).map_err(|e| anyhow!(e))?;
    identity::install_provider();
    raise_file_limit();
    see_host_proc(&config.host_proc);
    let runtime = control_runtime()?;
    let result = runtime.block_on(node(config, log));
    // Not dropped: that would wait for threads that are stuck.
    runtime.shutdown_timeout(Duration::from_secs(1));
    match result? {
        End::Done => Ok(()),
        End::StandBy => Err(handover::start_anew()).context("cannot start anew"),
    }
}

/// How the life of an agent ends.
enum End {
    Done,
    /// Another agent has its place, and kubelet has not said that this one shall end.
    StandBy,
}

async fn node(config: config::Node, log: logging::LogLevel) -> anyhow::Result<End> {
    let started = Instant::now();
    let mut signals = Signals::new().context("cannot wait for signals")?;
    let readiness = Readiness::default();
    let starting = readiness.block("the programs in the kernel and the pods of this node");
    let in_kernel = Options {
        bpffs: config.bpffs.clone(),
        node: config.node_name.clone(),
        cgroup: config.cgroup.clone(),
        probe_cgroup: config.probe_cgroup.clone(),
        kernel_log: config.kernel_log,
        original_dst_entries: config.orig_dst_entries,
    };
    if !handover::stand_by(config.pod_dir.as_ref(), &in_kernel, &mut signals).await? {
        return Ok(End::Done);
    }
    let handover_socket = handover::socket_path(&config.admin_socket);
    let predecessor = match config.take_over {
        true => handover::find(&handover_socket, &config.node_name).await?,
        false => None,
    };
    let own = match predecessor {
        None => Some(Own::bind(&config, &in_kernel)?),
        Some(_) => None,
    };
    let mut serving: Vec<AbortHandle> =
        own.iter().map(|own| own.serve_readiness(&readiness)).collect::<io::Result<_>>()?;
    let last_good = Some(config.state_dir.join("last-good-node.json"));
    let (sources, certificates) = tokio::select! {
        started = async { anyhow::Ok((sources(&config, last_good).await?, certificates(&config).await?)) } => started?,
        // In Kubernetes it may wait for long, for the API server or the controller.
        stop = signals.recv() => {
            tracing::info!(signal = stop.name(), "stopped before it was ready");
            return Ok(End::Done);
        }
    };
    let access_log = config.access_log.map_or_else(AccessLog::off, AccessLog::new);
    let telemetry = Arc::new(Telemetry::new(access_log));
    let prepared = Redirect::prepare(&in_kernel)?;
    let (own, taken) = match (own, predecessor) {
        (Some(own), _) => (own, Taken::default()),
        (None, None) => unreachable!("with no agent before it has all of its own"),
        (None, Some(predecessor)) => {
            let snapshot = sources.snapshot.load_full();
            let taken = tokio::select! {
                taken = predecessor.take(&config, &in_kernel, &snapshot, &certificates) => taken?,
                stop = signals.recv() => {
                    tracing::info!(signal = stop.name(), "stopped before it had taken over");
                    return Ok(End::Done);
                }
            };
            serving.push(taken.0.serve_readiness(&readiness)?);
            taken
        }
    };
    let redirect = Arc::new(prepared.begin()?);
    let (sockets, admin_file) = own.to_hand_over(&config).context("cannot keep the agent's sockets")?;
    let Own { lock, metrics: metrics_listener, readiness: readiness_listener, admin: admin_socket } = own;
    // It is served by another descriptor; none may stay here when the place is given away.
    drop(readiness_listener);
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
    let mut enrollment = Enrollment::new(EnrollmentInputs {
        node: name,
        snapshot: sources.snapshot.clone(),
        changed: sources.changed.clone(),
        problems: sources.problems.clone(),
        redirect: redirect.clone(),
        certificates: certificates.clone(),
        places: Arc::new(match &config.source {
            Source::Directory(_) => Places::Manifests,
            Source::Kubernetes(_) => Places::Processes(Processes::new(&config.host_proc)),
        }),
        events,
    });
    let pods = enrollment.statuses();
    let settled = enrollment.settled();
    let orders = enrollment.orders();
    enrollment.adopt(taken.pods);
    let enrolling = tokio::spawn(enrollment.run());

    let admin = Arc::new(AdminState {
        node: config.node_name.clone(),
        started,
        certificate_authority: authority_in_words(&config.ca),
        snapshot: sources.snapshot.clone(),
        problems: sources.problems.clone(),
        certificates: Box::new(move || certificates.list()),
        pods: Box::new(move || pods.load().to_vec()),
        connections: Box::new(proxy.lister()),
        kernel: {
            let redirect = redirect.clone();
            Box::new(move || redirect.counters().unwrap_or_default())
        },
        readiness: readiness.clone(),
        log,
    });
    let facts = admin.clone();
    telemetry.metrics.watch_node(move || facts.node_facts());
    serving.push(tokio::spawn(serve_admin(admin_socket, admin)).abort_handle());
    serving.push(tokio::spawn(serve_metrics(metrics_listener, telemetry.metrics.clone())).abort_handle());
    tokio::spawn(sweep(telemetry.clone(), sources.clone(), redirect.clone()));
    tokio::spawn(log_problems(sources.clone()));

    tokio::select! {
        // A pod that cannot be taken in does not hold up the others: it stays closed, and is reported.
        () = settled.wait() => {}
        stop = signals.recv() => return stopped(stop.name(), enrolling, proxy, Duration::ZERO).await,
    }
    drop(starting);
    tracing::info!(node = config.node_name, after = ?started.elapsed(), "ready");
    let pod = config.pod_dir;
    pod.iter().try_for_each(|pod| pod.set_ready(true))?;
    let giver = Giver {
        node: config.node_name,
        orders,
        proxy: proxy.clone(),
        redirect,
        sockets,
        serving,
        files: vec![admin_file],
    };
    let mut successor = handover::serve(&handover_socket, giver).context("cannot wait for a next agent")?;
    let (why, given) = tokio::select! {
        given = successor.given() => ("another agent", Some(given)),
        stop = signals.recv() => match successor.is_preparing() {
            false => (stop.name(), None),
            true => {
                tracing::info!(signal = stop.name(), "an agent prepares to take over, and is waited for");
                let given = tokio::select! {
                    given = tokio::time::timeout(config.drain_timeout, successor.prepared()) => given.ok().flatten(),
                    _ = signals.recv() => None,
                };
                (stop.name(), given)
            }
        },
    };
    pod.iter().try_for_each(|pod| pod.set_ready(false))?;
    match given {
        Some(Given::Handed { pid, version, connections }) => {
            tracing::info!("handed over to agent PID {pid} ({version}); {connections} connections drain");
            pod.iter().try_for_each(|pod| pod.set_handed_over(true))?;
            let asked = drained(&mut signals, enrolling, proxy, config.drain_timeout).await;
            Ok(if pod.is_some() && !asked { End::StandBy } else { End::Done })
        }
        Some(Given::Leave { .. }) | None => tokio::select! {
            done = stopped(why, enrolling, proxy, config.drain_timeout) => done,
            // The second signal.
            _ = signals.recv() => Ok(End::Done),
        },
    }
}

/// Another agent serves the pods; what is open here ends in its own time. Policy still cuts what it no longer allows. Returns
/// whether a signal has asked for the end.
async fn drained(
    signals: &mut Signals,
    enrolling: tokio::task::JoinHandle<()>,
    proxy: Arc<Proxy>,
    patience: Duration,
) -> bool {
    let end = proxy.end(patience);
    tokio::pin!(end);
    let mut asked = false;
    loop {
        tokio::select! {
            () = &mut end => break,
            stop = signals.recv() => {
                if asked {
                    break;
                }
                asked = true;
                tracing::info!(signal = stop.name(), "open connections drain already; a second signal cuts them");
            }
        }
    }
    enrolling.abort();
    tracing::info!("the last connection has ended");
    asked
}

/// Stops accepting and lets connections end. Pods stay enrolled in the kernel: until the next agent comes, what they open
/// is refused, and nothing passes in plaintext.
async fn stopped(
    why: &str,
    enrolling: tokio::task::JoinHandle<()>,
    proxy: Arc<Proxy>,
    patience: Duration,
) -> anyhow::Result<End> {
    tracing::info!(why, ?patience, "draining");
    enrolling.abort();
    // Its clone of the proxy, inside `events`, goes with it.
    let _ = enrolling.await;
    proxy.drain(patience).await;
    Ok(End::Done)
}

/// `mesh-agent controller`: the CA of a mesh, until a signal ends it.
pub fn run_controller(config: config::Controller) -> anyhow::Result<()> {
    logging::init(&config.logging.filter, config.logging.format).map_err(|e| anyhow!(e))?;
    identity::install_provider();
    control_runtime()?.block_on(async {
        let mut signals = Signals::new().context("cannot wait for signals")?;
        let ca = open_ca(&config)?;
        let tokens = Arc::new(JoinTokens::open(&config.state_dir)?);
        let mut settings = Settings::new(config.trust_domain.clone());
        settings.istio_labels = config.istio_labels;
        let last_good = Some(config.state_dir.join("last-good-controller.json"));
        let sources = match &config.source {
            Source::Directory(directory) => {
                discovery::start(discovery::Options { last_good, ..discovery::Options::new(directory, settings) })?
            }
            Source::Kubernetes(kubernetes) => {
                let server = ApiServer::connect(kubernetes.kubeconfig.as_deref(), None).await?;
                discovery::start_kubernetes(&server, settings).await?
            }
        };
        tokio::spawn(log_problems(sources.clone()));
        let listener = identity::bind(config.listen).await?;
        let snapshot = sources.snapshot.clone();
        let runs_on = Arc::new(move |node: &str, identity: &SpiffeId| {
            snapshot.load().workloads().any(|w| w.is_on(node) && w.identity == *identity)
        });
        tokio::spawn(take_requests(ca.clone(), config.state_dir.join(ROTATE_ROOT)));
        tracing::info!(listen = %config.listen, trust_domain = %config.trust_domain, "the CA is ready");
        let options = CaServerOptions { listener, names: config.sans, ca, tokens, runs_on, poll: ROOTS_POLL };
        identity::serve(options, async {
            signals.recv().await;
        })
        .await?;
        Ok(())
    })
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
