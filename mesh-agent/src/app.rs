//! Composition root: builds all parts, joins them, waits for the end. Nothing else imports all of them.
//!
//! Threads: the *control* runtime (two threads: discovery's results, enrolment, certificates, admin, metrics) and one
//! thread a worker for the data path. Control never stands in the way of a byte.

mod authority;
mod controller;
mod live;
mod starting;
mod upkeep;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use arc_swap::ArcSwap;
use tokio::task::AbortHandle;

use self::authority::{authority_in_words, certificates};
pub use self::controller::{join_token, revoke_token, rotate_root, run_controller};
use self::live::Follower;
use self::starting::Starting;
use self::upkeep::{follow_probes, log_problems, raise_file_limit, sweep};
use crate::admin::{AdminState, serve_admin, serve_metrics};
use crate::api_server::ApiServer;
use crate::config::{self, Live, Source};
use crate::discovery::{self, Sources};
use crate::enrollment::{Enrollment, Inputs as EnrollmentInputs, Places, Processes, see_host_proc};
use crate::handover::{self, Given, Giver, Own, Taken, Turn};
use crate::identity;
use crate::lifecycle::{Liveness, Pen, Readiness, Signals};
use crate::proxy::{Inputs as ProxyInputs, Proxy};
use crate::redirect::{Options, Redirect, read_kernel_types};
use crate::telemetry::{AccessLog, Telemetry, logging};
use crate::translate::Settings;

/// Where the name of the agent's pod is, in Kubernetes.
pub const POD_NAME: &str = "NODEMESH_POD_NAME";

/// `mesh-agent node`: serves the pods of this node until a signal ends it.
pub fn run_node(config: config::Node, live: Live) -> anyhow::Result<()> {
    let log = logging::init(&config.logging.filter, config.logging.format).map_err(|e| anyhow!(e))?;
    identity::install_provider();
    raise_file_limit();
    see_host_proc(&config.host_proc);
    let runtime = control_runtime()?;
    // Outlives the other: no signal is lost between serving and standing by.
    let standing_by = current_runtime()?;
    let mut signals = standing_by.block_on(async { Signals::new() }).context("cannot wait for signals")?;
    let pod_name = std::env::var(POD_NAME).ok();
    let turn = Turn::of(&config.admin_socket, pod_name.as_deref());
    let in_kernel = in_kernel(&config);
    let end = runtime.block_on(node(config, live, log, pod_name, &in_kernel, &turn, &mut signals));
    // Not dropped: that would wait for threads that are stuck.
    runtime.shutdown_timeout(Duration::from_secs(1));
    match end? {
        End::Stopped => turn.forget(),
        End::HandedOver => standing_by.block_on(turn.stand_by(&in_kernel, &mut signals))?,
    }
    Ok(())
}

/// How an agent comes to its end without an error.
enum End {
    /// A signal has asked for it, or whoever takes its place but can't take over.
    Stopped,
    /// Another agent serves the pods, and nobody has asked this one to end.
    HandedOver,
}

async fn node(
    config: config::Node,
    live: Live,
    log: logging::LogLevel,
    pod_name: Option<String>,
    in_kernel: &Options,
    turn: &Turn,
    signals: &mut Signals,
) -> anyhow::Result<End> {
    let started = Instant::now();
    let readiness = Readiness::default();
    let liveness = Liveness::default();
    tokio::spawn(liveness.pulse("control").keep());
    let starting = readiness.block("the programs in the kernel and the pods of this node");
    if !turn.wait(in_kernel, signals).await? {
        return Ok(End::Stopped);
    }
    let handover_socket = handover::socket_path(&config.admin_socket);
    let predecessor = match config.take_over {
        true => handover::find(&handover_socket, &config.node_name).await?,
        false => None,
    };
    let own = match predecessor {
        None => Some(Own::bind(&config, in_kernel)?),
        Some(_) => None,
    };
    // Before the mesh is in memory.
    read_kernel_types();
    let mut serving: Vec<AbortHandle> =
        own.iter().map(|own| own.serve_health(&readiness, &liveness)).collect::<io::Result<_>>()?;
    let last_good = Some(config.state_dir.join("last-good-node.json"));
    let pen = Pen::default();
    let (sources, certificates) = tokio::select! {
        started = async { anyhow::Ok((sources(&config, last_good, &pen).await?, certificates(&config).await?)) } => started?,
        // In Kubernetes it may wait for long, for the API server or the controller.
        stop = signals.recv() => {
            tracing::info!(signal = stop.name(), "stopped before it was ready");
            return Ok(End::Stopped);
        }
    };
    let telemetry = Arc::new(Telemetry::new(AccessLog::new(config.access_log)));
    let prepared = Redirect::prepare(in_kernel)?;
    let (own, taken) = match (own, predecessor) {
        (Some(own), _) => (own, Taken::default()),
        (None, None) => unreachable!("with no agent before it has all of its own"),
        (None, Some(predecessor)) => {
            let snapshot = sources.snapshot.load_full();
            let taken = tokio::select! {
                taken = predecessor.take(&config, in_kernel, &snapshot, &certificates) => taken?,
                stop = signals.recv() => {
                    tracing::info!(signal = stop.name(), "stopped before it had taken over");
                    return Ok(End::Stopped);
                }
            };
            serving.push(taken.0.serve_health(&readiness, &liveness)?);
            taken
        }
    };
    let redirect = Arc::new(prepared.begin()?);
    let (mut sockets, admin_file) = own.to_hand_over(&config).context("cannot keep the agent's sockets")?;
    let Own { lock, metrics: metrics_listener, readiness: readiness_listener, admin: admin_socket, cni } = own;
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
        liveness,
    })?);
    let events = {
        let proxy = proxy.clone();
        Box::new(move |event| proxy.pod_event(event))
    };
    let places = Arc::new(match &config.source {
        Source::Directory(_) => Places::Manifests,
        Source::Kubernetes(_) => Places::Processes(Processes::new(&config.host_proc, sources.node_pods.clone())),
    });
    let mut enrollment = Enrollment::new(EnrollmentInputs {
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
    let orders = enrollment.orders();
    enrollment.adopt(taken.pods);
    let enrolling = tokio::spawn(enrollment.run());
    let Starting { tasks, socket } =
        starting::serve_starting_pods(&config, &sources, places, pods.clone(), &readiness, cni, &pen).await?;
    serving.extend(tasks);
    let mut files = vec![admin_file];
    if let Some((socket, file)) = socket {
        sockets.push(socket);
        files.push(file);
    }

    let admin = Arc::new(AdminState {
        node: config.node_name.clone(),
        // Not a setting: it is what the pod is called.
        pod: pod_name,
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
    serving.push(tokio::spawn(serve_admin(admin_socket, admin)).abort_handle());
    serving.push(tokio::spawn(serve_metrics(metrics_listener, telemetry.metrics.clone())).abort_handle());
    tokio::spawn(sweep(telemetry.clone(), sources.clone(), redirect.clone()));
    tokio::spawn(log_problems(sources.clone()));
    let present = Arc::new(ArcSwap::from_pointee(config.clone()));
    tokio::spawn(follow_probes(redirect.clone(), present.clone()));
    if let Source::Kubernetes(kubernetes) = &config.source {
        let (telemetry, settings_to) = (telemetry.clone(), sources.settings.clone());
        let follower = Follower {
            server: ApiServer::connect(kubernetes.kubeconfig.as_deref(), None).await?,
            namespace: kubernetes.namespace.clone(),
            workload: ("daemonset", "nodemesh-agent"),
            live,
            read: Live::node,
            present: present.clone(),
            keep: Some((config.state_dir.join(config::LAST_GOOD_SETTINGS), pen.clone())),
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
    let giver = Giver { node: config.node_name, orders, proxy: proxy.clone(), redirect, sockets, serving, files, pen };
    let mut successor = handover::serve(&handover_socket, giver).context("cannot wait for a next agent")?;
    let (why, given) = tokio::select! {
        given = successor.given() => ("another agent", Some(given)),
        stop = signals.recv() => match successor.is_preparing() {
            false => (stop.name(), None),
            true => {
                tracing::info!(signal = stop.name(), "an agent prepares to take over, and is waited for");
                let given = tokio::select! {
                    given = tokio::time::timeout(present.load().drain_timeout, successor.prepared()) => given.ok().flatten(),
                    _ = signals.recv() => None,
                };
                (stop.name(), given)
            }
        },
    };
    match given {
        Some(Given::Handed { pid, version, connections }) => {
            tracing::info!("handed over to agent PID {pid} ({version}); {connections} connections drain");
            turn.is_over()?;
            match drained(signals, enrolling, proxy, present.load().upgrade_drain).await {
                true => Ok(End::Stopped),
                false => Ok(End::HandedOver),
            }
        }
        Some(Given::Leave { .. }) | None => tokio::select! {
            done = stopped(why, enrolling, proxy, present.load().drain_timeout) => done,
            // The second signal.
            _ = signals.recv() => Ok(End::Stopped),
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
    Ok(End::Stopped)
}

fn control_runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("control")
        .enable_all()
        .build()
        .context("cannot start the control threads")
}

/// For one thing at a time, on the thread that waits for it.
fn current_runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start the main thread")
}

fn in_kernel(config: &config::Node) -> Options {
    Options {
        bpffs: config.bpffs.clone(),
        node: config.node_name.clone(),
        cgroup: config.cgroup.clone(),
        probe_cgroup: config.probe_cgroup.clone(),
        kernel_log: config.kernel_log,
        original_dst_entries: config.orig_dst_entries,
    }
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

async fn sources(config: &config::Node, last_good: Option<PathBuf>, pen: &Pen) -> anyhow::Result<Sources> {
    Ok(match &config.source {
        Source::Directory(directory) => {
            let pen = pen.clone();
            let options = discovery::Options::new(directory, settings(config));
            discovery::start(discovery::Options { last_good, pen, ..options })?
        }
        Source::Kubernetes(kubernetes) => {
            let server = ApiServer::connect(kubernetes.kubeconfig.as_deref(), None).await?;
            discovery::start_kubernetes(&server, settings(config)).await?
        }
    })
}
