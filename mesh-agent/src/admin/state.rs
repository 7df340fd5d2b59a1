//! What the admin pages are made from: handles to read by, and the views that are made of them.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use futures_util::future::BoxFuture;
use serde::Serialize;
use tokio::sync::watch;

use super::views::{EndpointView, KernelCounter, PolicyView, PortView, ServiceView, StatusView, WorkloadView};
use crate::enrollment::PodStatus;
use crate::identity::CertificateInfo;
use crate::lifecycle::Readiness;
use crate::model::{
    AuthorizationPolicy, MtlsMode, OutboundPolicy, Problem, Service, Severity, Snapshot, Transport, Workload,
};
use crate::proxy::connections::ConnectionInfo;
use crate::telemetry::NodeFacts;
use crate::telemetry::clock::parse_rfc3339;
use crate::telemetry::logging::LogLevel;

/// A question to another module. Closures, so that the pages can read and have nothing to change.
pub type Ask<T> = Box<dyn Fn() -> T + Send + Sync>;

pub struct AdminState {
    pub node: String,
    /// Its pod, in Kubernetes.
    pub pod: Option<String>,
    pub started: Instant,
    /// In words: `embedded`, or the controllers' addresses.
    pub certificate_authority: String,
    pub snapshot: Arc<ArcSwap<Snapshot>>,
    pub problems: watch::Receiver<Arc<Vec<Problem>>>,
    pub certificates: Ask<Vec<CertificateInfo>>,
    pub pods: Ask<Vec<PodStatus>>,
    /// Asks all workers; they may take a moment.
    pub connections: Ask<BoxFuture<'static, Vec<ConnectionInfo>>>,
    pub kernel: Ask<Vec<(&'static str, &'static str, u64)>>,
    pub readiness: Readiness,
    pub log: LogLevel,
}

/// A worker that hangs must not hang `meshctl status` too: that is when it is needed.
const CONNECTIONS_TIMEOUT: Duration = Duration::from_secs(2);

impl AdminState {
    /// What `Metrics::watch_node` asks for at each scrape.
    pub fn node_facts(&self) -> NodeFacts {
        let pods = (self.pods)();
        let (errors, warnings) = self.problem_counts();
        NodeFacts {
            enrolled_pods: count(&pods, |p| p.enrolled),
            refused_pods: count(&pods, |p| p.problem.is_some()),
            legacy_connections: pods.iter().map(|p| p.legacy_connections).sum(),
            certificates: (self.certificates)()
                .into_iter()
                .filter_map(|c| Some((c.identity, parse_rfc3339(&c.not_after)?)))
                .collect(),
            errors: errors as u64,
            warnings: warnings as u64,
            snapshot_generation: self.snapshot.load().generation(),
            kernel: (self.kernel)(),
        }
    }

    /// One after the other: all at once would be larger than all that the agent keeps.
    pub(super) fn workloads(&self) -> impl Iterator<Item = WorkloadView> + use<> {
        let pods: BTreeMap<String, PodStatus> = (self.pods)().into_iter().map(|p| (p.uid.clone(), p)).collect();
        let node = self.node.clone();
        let workloads = by_name(self.snapshot.load().workloads(), |w| (&w.namespace, &w.name));
        workloads.into_iter().map(move |w| workload(&w, &node, pods.get(&*w.uid)))
    }

    pub(super) fn services(&self) -> impl Iterator<Item = ServiceView> + use<> {
        let snapshot = self.snapshot.load_full();
        let services = by_name(snapshot.services(), |s| (&s.namespace, &s.name));
        services.into_iter().map(move |s| service(&s, &snapshot))
    }

    pub(super) fn policies(&self) -> Vec<PolicyView> {
        let snapshot = self.snapshot.load();
        let mut all: BTreeMap<(String, String), PolicyView> = BTreeMap::new();
        for workload in snapshot.judged() {
            for policy in workload.rules.iter().flat_map(|rules| &rules.policies) {
                all.entry((policy.namespace.to_string(), policy.name.to_string()))
                    .or_insert_with(|| policy_view(policy))
                    .workloads
                    .push(format!("{}/{}", workload.namespace, workload.name));
            }
        }
        let mut views: Vec<_> = all.into_values().collect();
        for view in &mut views {
            view.workloads.sort();
        }
        views
    }

    pub(super) fn certificates(&self) -> Vec<CertificateInfo> {
        let mut all = (self.certificates)();
        all.sort_by(|a, b| a.identity.cmp(&b.identity));
        all
    }

    pub(super) async fn connections(&self) -> Result<Vec<ConnectionInfo>, String> {
        match tokio::time::timeout(CONNECTIONS_TIMEOUT, (self.connections)()).await {
            Ok(mut all) => {
                all.sort_by(|a, b| (&a.pod, &a.direction, &a.source).cmp(&(&b.pod, &b.direction, &b.source)));
                Ok(all)
            }
            Err(_) => Err(format!("the workers did not list their connections within {CONNECTIONS_TIMEOUT:?}")),
        }
    }

    pub(super) fn problems(&self) -> Vec<Problem> {
        let mut all = self.problems.borrow().to_vec();
        all.sort();
        all
    }

    fn problem_counts(&self) -> (usize, usize) {
        let all = self.problems.borrow();
        let errors = all.iter().filter(|p| p.severity == Severity::Error).count();
        (errors, all.len() - errors)
    }

    pub(super) async fn status(&self) -> StatusView {
        let pods = (self.pods)();
        let certificates = (self.certificates)();
        let (errors, warnings) = self.problem_counts();
        let waiting_for: Vec<String> = self.readiness.waiting_for().into_iter().map(str::to_owned).collect();
        let open_connections = self.connections().await.map_or(0, |all| all.len());
        let snapshot = self.snapshot.load();
        StatusView {
            node: self.node.clone(),
            pod: self.pod.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            uptime_seconds: self.started.elapsed().as_secs(),
            ready: waiting_for.is_empty(),
            waiting_for,
            trust_domain: snapshot.settings().trust_domain.to_string(),
            outbound_policy: match snapshot.settings().outbound {
                OutboundPolicy::AllowAny => "ALLOW_ANY".to_owned(),
                OutboundPolicy::RegistryOnly => "REGISTRY_ONLY".to_owned(),
            },
            certificate_authority: self.certificate_authority.clone(),
            snapshot_generation: snapshot.generation(),
            workloads: snapshot.count_workloads(),
            services: snapshot.count_services(),
            enrolled_pods: pods.iter().filter(|p| p.enrolled).count(),
            refused_pods: pods.iter().filter(|p| p.problem.is_some()).count(),
            legacy_connections: pods.iter().map(|p| p.legacy_connections).sum(),
            open_connections,
            certificates: certificates.len(),
            certificates_missing: certificates.iter().filter(|c| c.state != "ready" && c.state != "renewing").count(),
            errors,
            warnings,
            log: self.log.get(),
            kernel: (self.kernel)()
                .into_iter()
                .map(|(event, reason, count)| KernelCounter {
                    event: event.to_owned(),
                    reason: reason.to_owned(),
                    count,
                })
                .collect(),
        }
    }
}

/// In the order of namespace and name.
pub(super) fn by_name<'a, T: 'a>(
    items: impl Iterator<Item = &'a Arc<T>>,
    name: fn(&T) -> (&Arc<str>, &Arc<str>),
) -> Vec<Arc<T>> {
    let mut items: Vec<_> = items.cloned().collect();
    items.sort_by(|a, b| name(a).cmp(&name(b)));
    items
}

fn workload(workload: &Workload, node: &str, pod: Option<&PodStatus>) -> WorkloadView {
    let local = workload.is_on(node);
    let state = match (local, workload.transport, pod) {
        (false, ..) => "remote",
        (true, _, Some(PodStatus { enrolled: true, .. })) => "enrolled",
        (true, _, Some(PodStatus { problem: Some(_), .. })) => "refused",
        (true, Transport::Hbone, _) => "waiting",
        (true, Transport::Plain, _) => "outside",
    };
    let mtls = workload.rules.as_ref().map(|rules| {
        std::iter::once(mode(rules.mtls.default).to_owned())
            .chain(rules.mtls.ports.iter().map(|(port, m)| format!("{port}={}", mode(*m))))
            .collect::<Vec<_>>()
            .join(", ")
    });
    let policies = workload.rules.iter().flat_map(|rules| &rules.policies);
    WorkloadView {
        namespace: workload.namespace.to_string(),
        name: workload.name.to_string(),
        uid: workload.uid.to_string(),
        addresses: workload.addresses.to_vec(),
        node: workload.node.to_string(),
        local,
        identity: workload.identity.to_string(),
        workload: workload.names.workload.to_string(),
        transport: match workload.transport {
            Transport::Hbone => "hbone".to_owned(),
            Transport::Plain => "plain".to_owned(),
        },
        state: state.to_owned(),
        problem: pod.and_then(|p| p.problem.clone()),
        legacy_connections: pod.map_or(0, |p| p.legacy_connections),
        mtls: mtls.unwrap_or_default(),
        policies: policies.map(|p| format!("{}/{}", p.namespace, p.name)).collect(),
        region: workload.locality.region.to_string(),
        zone: workload.locality.zone.to_string(),
    }
}

fn count<T>(all: &[T], which: impl Fn(&T) -> bool) -> u64 {
    all.iter().filter(|t| which(t)).count() as u64
}

fn mode(mode: MtlsMode) -> &'static str {
    match mode {
        MtlsMode::Strict => "STRICT",
        MtlsMode::Permissive => "PERMISSIVE",
        MtlsMode::Disable => "DISABLE",
    }
}

fn service(service: &Service, snapshot: &Snapshot) -> ServiceView {
    ServiceView {
        namespace: service.namespace.to_string(),
        name: service.name.to_string(),
        hostname: service.hostname.to_string(),
        addresses: service.addresses.clone(),
        ports: service
            .ports
            .iter()
            .map(|port| PortView {
                port: port.port,
                name: port.name.to_string(),
                endpoints: port
                    .endpoints
                    .iter()
                    .map(|e| EndpointView {
                        address: e.address.to_string(),
                        ready: e.ready,
                        workload: snapshot.workload_at(e.address.ip()).map(|w| format!("{}/{}", w.namespace, w.name)),
                    })
                    .collect(),
            })
            .collect(),
        algorithm: word(&service.algorithm),
        scope: word(&service.scope),
    }
}

fn policy_view(policy: &AuthorizationPolicy) -> PolicyView {
    PolicyView {
        namespace: policy.namespace.to_string(),
        name: policy.name.to_string(),
        action: word(&policy.action),
        dry_run: policy.dry_run,
        rules: policy.rules.iter().filter_map(|r| serde_json::to_value(r).ok()).collect(),
        workloads: Vec::new(),
    }
}

/// A unit enum in the word that its serde form has.
fn word(value: &impl Serialize) -> String {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(word)) => word,
        _ => String::new(),
    }
}
