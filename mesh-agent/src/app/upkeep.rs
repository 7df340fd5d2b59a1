//! What goes on beside the traffic for as long as the process lives.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::anyhow;
use arc_swap::ArcSwap;

use crate::config::{self, Source};
use crate::discovery::Sources;
use crate::redirect::{Redirect, kubelet_cgroup};
use crate::telemetry::Telemetry;

/// How often kubelet's cgroup is looked for.
const PROBES: Duration = Duration::from_secs(1);
/// How often label sets of workloads that are gone leave the metrics, and entries of sockets that are gone the kernel.
const SWEEP: Duration = Duration::from_secs(60);

pub(super) async fn sweep(telemetry: Arc<Telemetry>, sources: Sources, redirect: Arc<Redirect>) {
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
pub(super) async fn follow_probes(redirect: Arc<Redirect>, present: Arc<ArcSwap<config::Node>>) {
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
pub(super) async fn log_problems(mut sources: Sources) {
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
pub(super) fn raise_file_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let most = limit.maximum;
    if setrlimit(Resource::Nofile, Rlimit { current: Some(1 << 20), maximum: Some(1 << 20) }).is_err()
        && setrlimit(Resource::Nofile, Rlimit { current: most, maximum: most }).is_err()
    {
        tracing::warn!("the limit of open files cannot be raised; it stays at {:?}", limit.current);
    }
}
