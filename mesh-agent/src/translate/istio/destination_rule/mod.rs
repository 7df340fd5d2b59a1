//! DestinationRule: how the endpoints of a host are shared out, and which of them make a subset. In: the object as JSON. Out:
//! its policies, read; which service its host is, and which pods a subset has, `traffic` finds out.
//!
//! It restricts nobody, so one that could never be read closes nothing. But what cannot be done as it says, and would send
//! in the clear what it wants encrypted, is not done at all.

mod balance;
mod pool;
mod shapes;

use std::collections::BTreeSet;
use std::sync::Arc;

use serde::Deserialize;

use self::balance::SpecBalancer;
use self::pool::{SpecOutlier, SpecPool};
use super::Metadata;
use super::values::is_host;
use super::visible::Visible;
use crate::model::traffic::{
    Balance, HttpLimits, LocalityPolicy, OutlierDetection, RetryBudget, SlowStart, TcpLimits, TrafficPolicy,
};
use crate::translate::report::{Labels, Report, nullable};
use crate::translate::{Object, schema};

#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::translate) struct DestinationRule {
    pub namespace: Arc<str>,
    pub name: Arc<str>,
    pub created: Option<String>,
    /// As written.
    pub host: Arc<str>,
    pub visible: Visible,
    pub policy: Policy,
    pub subsets: Vec<Subset>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::translate) struct Subset {
    pub name: Arc<str>,
    pub labels: Labels,
    pub policy: Policy,
}

/// What one `trafficPolicy` says.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(in crate::translate) struct Policy {
    parts: Parts,
    retry_budget: Option<RetryBudget>,
    ports: Vec<(u16, Parts)>,
}

/// Each is taken as a whole from the more special place that has it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct Parts {
    balance: Option<Balancer>,
    pool: Option<(TcpLimits, HttpLimits)>,
    outlier: Option<OutlierDetection>,
    /// Why what it wants of TLS cannot be done, where that is so.
    tls: Option<Option<Arc<str>>>,
}

#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct Balancer {
    balance: Option<Balance>,
    locality: Option<LocalityPolicy>,
    slow_start: Option<SlowStart>,
}

#[derive(Deserialize)]
#[serde(expecting = "an object")]
struct Manifest {
    metadata: Metadata,
    #[serde(default, deserialize_with = "nullable")]
    spec: Spec,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", expecting = "an object")]
struct Spec {
    #[serde(default, deserialize_with = "nullable")]
    host: String,
    #[serde(default, deserialize_with = "nullable")]
    traffic_policy: SpecPolicy,
    #[serde(default, deserialize_with = "nullable")]
    subsets: Vec<SpecSubset>,
    #[serde(default, deserialize_with = "nullable")]
    export_to: Vec<String>,
    workload_selector: Option<serde_json::Value>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", expecting = "an object")]
struct SpecSubset {
    #[serde(default, deserialize_with = "nullable")]
    name: String,
    #[serde(default, deserialize_with = "nullable")]
    labels: Labels,
    #[serde(default, deserialize_with = "nullable")]
    traffic_policy: SpecPolicy,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", expecting = "an object")]
struct SpecPolicy {
    load_balancer: Option<SpecBalancer>,
    connection_pool: Option<SpecPool>,
    outlier_detection: Option<SpecOutlier>,
    tls: Option<SpecTls>,
    #[serde(default, deserialize_with = "nullable")]
    port_level_settings: Vec<SpecOfPort>,
    tunnel: Option<serde_json::Value>,
    proxy_protocol: Option<serde_json::Value>,
    retry_budget: Option<SpecBudget>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", expecting = "an object")]
struct SpecOfPort {
    port: Option<SpecPort>,
    load_balancer: Option<SpecBalancer>,
    connection_pool: Option<SpecPool>,
    outlier_detection: Option<SpecOutlier>,
    tls: Option<SpecTls>,
}

#[derive(Deserialize)]
#[serde(expecting = "an object")]
struct SpecPort {
    #[serde(default, deserialize_with = "nullable")]
    number: u16,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", expecting = "an object")]
struct SpecTls {
    #[serde(default, deserialize_with = "nullable")]
    mode: String,
    #[serde(default, deserialize_with = "nullable")]
    subject_alt_names: Vec<String>,
    #[serde(default, deserialize_with = "nullable")]
    sni: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", expecting = "an object")]
struct SpecBudget {
    percent: Option<f64>,
    min_retry_concurrency: Option<u32>,
    budget_interval: Option<String>,
}

/// The data path does not look at them yet.
const NOT_YET: &str = "it is checked, but not honoured yet: endpoints are used as without it";

pub(in crate::translate) fn destination_rule(object: &Object, report: &mut Report) -> Option<DestinationRule> {
    if !schema::check(object, &shapes::SPEC, report) {
        return None;
    }
    let Manifest { metadata, spec } = report.read(object)?;
    let at = object.reference();
    let namespace: Arc<str> = at.namespace.as_str().into();
    let host = spec.host.strip_prefix("*.").unwrap_or(&spec.host);
    if spec.host.is_empty() {
        report.error("spec.host", "it is missing: write a name such as reviews.shop.svc.cluster.local");
    } else if spec.host != "*" && !is_host(host) {
        let message = format!("`{}` is no host: write a name such as reviews.shop.svc.cluster.local", spec.host);
        report.error("spec.host", message);
    }
    if spec.workload_selector.is_some() {
        let message = "rules for some clients of a namespace are not honoured yet: remove it, or the rule is left out";
        report.error("spec.workloadSelector", message);
    }
    let visible = Visible::read(&spec.export_to, &namespace, "spec.exportTo", report);
    let policy = spec.traffic_policy.read("spec.trafficPolicy", report);
    let mut names = BTreeSet::new();
    let mut subsets = Vec::with_capacity(spec.subsets.len());
    for (i, subset) in spec.subsets.into_iter().enumerate() {
        let field = format!("spec.subsets[{i}]");
        if subset.name.is_empty() {
            report.error(&format!("{field}.name"), "it is missing: give the subset a name");
        } else if !names.insert(subset.name.clone()) {
            let message = format!("the name `{}` stands twice: give each subset one of its own", subset.name);
            report.error(&format!("{field}.name"), message);
        }
        let policy = subset.traffic_policy.read(&format!("{field}.trafficPolicy"), report);
        subsets.push(Subset { name: subset.name.into(), labels: subset.labels, policy });
    }
    report.unless_broken(DestinationRule {
        name: at.name.as_str().into(),
        created: metadata.creation_timestamp,
        host: spec.host.into(),
        visible,
        policy,
        subsets,
        namespace,
    })
}

impl SpecPolicy {
    fn read(self, field: &str, report: &mut Report) -> Policy {
        for (name, value) in [("tunnel", &self.tunnel), ("proxyProtocol", &self.proxy_protocol)] {
            if value.is_some() {
                report.error(&format!("{field}.{name}"), "it is not honoured: remove it, or the rule is left out");
            }
        }
        let parts =
            Parts::read(self.load_balancer, self.connection_pool, self.outlier_detection, self.tls, field, report);
        let mut ports: Vec<(u16, Parts)> = Vec::new();
        for (i, of_port) in self.port_level_settings.into_iter().enumerate() {
            let field = format!("{field}.portLevelSettings[{i}]");
            let SpecOfPort { port, load_balancer, connection_pool, outlier_detection, tls } = of_port;
            let number = port.map(|p| p.number).unwrap_or_default();
            if number == 0 {
                report.error(&format!("{field}.port.number"), "it is missing or 0: use 1 to 65535");
            } else if ports.iter().any(|(known, _)| *known == number) {
                let message = format!("port {number} stands twice: write its settings in one place");
                report.error(&format!("{field}.port.number"), message);
            }
            let parts = Parts::read(load_balancer, connection_pool, outlier_detection, tls, &field, report);
            ports.push((number, parts));
        }
        if self.retry_budget.is_some() {
            report.warning(&format!("{field}.retryBudget"), NOT_YET);
        }
        let retry_budget = self.retry_budget.and_then(|b| b.read(&format!("{field}.retryBudget"), report));
        Policy { parts, retry_budget, ports }
    }
}

impl SpecBudget {
    fn read(self, field: &str, report: &mut Report) -> Option<RetryBudget> {
        if self.budget_interval.is_some() {
            let message = "the budget is of the requests in progress, whatever the interval: remove it";
            report.warning(&format!("{field}.budgetInterval"), message);
        }
        let percent = self.percent.unwrap_or(20.0);
        if !(0.0..=100.0).contains(&percent) {
            report.error(&format!("{field}.percent"), format!("`{percent}` is no percentage: use 0 to 100"));
            return None;
        }
        let millipercent = (percent * 1000.0).round() as u32;
        Some(RetryBudget { millipercent, least: self.min_retry_concurrency.unwrap_or(3) })
    }
}

impl SpecTls {
    /// Why it cannot be done, where that is so.
    fn read(self, field: &str, report: &mut Report) -> Option<Arc<str>> {
        let closed = match self.mode.as_str() {
            "ISTIO_MUTUAL" => None,
            "DISABLE" | "" => {
                if self.mode == "DISABLE" {
                    let message = "pods of the mesh are called by mutual TLS whatever it says: remove it, or take them \
                                   out of the mesh";
                    report.warning(&format!("{field}.mode"), message);
                }
                None
            }
            "SIMPLE" | "MUTUAL" => {
                let message = format!(
                    "TLS of mode {} is not begun by the mesh yet, so that connections are refused rather than sent in the \
                     clear: let the application begin it",
                    self.mode
                );
                report.warning(&format!("{field}.mode"), message);
                Some(format!("its DestinationRule wants TLS of mode {}, which is not honoured yet", self.mode).into())
            }
            other => {
                let message = format!("`{other}` is no mode: use ISTIO_MUTUAL, SIMPLE, MUTUAL or DISABLE");
                report.error(&format!("{field}.mode"), message);
                None
            }
        };
        if closed.is_none() && !self.subject_alt_names.is_empty() {
            let message = "a pod of the mesh must show its own identity, whatever stands here: remove it";
            report.warning(&format!("{field}.subjectAltNames"), message);
        }
        if closed.is_none() && !self.sni.is_empty() {
            report.warning(&format!("{field}.sni"), "mutual TLS of the mesh has no SNI: remove it");
        }
        closed
    }
}

impl Parts {
    fn read(
        balancer: Option<SpecBalancer>,
        pool: Option<SpecPool>,
        outlier: Option<SpecOutlier>,
        tls: Option<SpecTls>,
        field: &str,
        report: &mut Report,
    ) -> Self {
        let given = [
            ("loadBalancer", balancer.is_some()),
            ("connectionPool", pool.is_some()),
            ("outlierDetection", outlier.is_some()),
        ];
        for (name, _) in given.iter().filter(|(_, is_given)| *is_given) {
            report.warning(&format!("{field}.{name}"), NOT_YET);
        }
        Self {
            balance: balancer.map(|b| b.read(&format!("{field}.loadBalancer"), report)),
            pool: pool.map(|p| p.read(&format!("{field}.connectionPool"), report)),
            outlier: outlier.map(|o| o.read(&format!("{field}.outlierDetection"), report)),
            tls: tls.map(|t| t.read(&format!("{field}.tls"), report)),
        }
    }

    /// These, and of `less` what these do not say.
    fn over(&self, less: &Self) -> Self {
        Self {
            balance: self.balance.clone().or_else(|| less.balance.clone()),
            pool: self.pool.clone().or_else(|| less.pool.clone()),
            outlier: self.outlier.clone().or_else(|| less.outlier.clone()),
            tls: self.tls.clone().or_else(|| less.tls.clone()),
        }
    }
}

impl Policy {
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// What holds for a port. Settings of a port stand alone: of the general ones nothing is taken over.
    pub fn of_port(&self, port: u16) -> TrafficPolicy {
        self.made(self.parts_of(port).unwrap_or(&self.parts).clone(), self.retry_budget)
    }

    /// What holds for a port of a subset, of whose rule `self` is the general policy.
    pub fn of_subset(&self, subset: &Self, port: u16) -> TrafficPolicy {
        let budget = subset.retry_budget.or(self.retry_budget);
        let general = self.parts_of(port).unwrap_or(&self.parts);
        match subset.parts_of(port) {
            Some(own) => self.made(own.clone(), budget),
            None => self.made(subset.parts.over(general), budget),
        }
    }

    fn parts_of(&self, port: u16) -> Option<&Parts> {
        self.ports.iter().find(|(number, _)| *number == port).map(|(_, parts)| parts)
    }

    fn made(&self, parts: Parts, retry_budget: Option<RetryBudget>) -> TrafficPolicy {
        let Balancer { balance, locality, slow_start } = parts.balance.unwrap_or_default();
        let (tcp, http) = parts.pool.unwrap_or_default();
        // As in Istio: near endpoints come first as soon as those that fail are looked for.
        let locality = locality.or_else(|| parts.outlier.as_ref().map(|_| LocalityPolicy::Failover(Vec::new())));
        TrafficPolicy {
            balance,
            locality,
            slow_start,
            outlier: parts.outlier,
            tcp,
            http,
            retry_budget,
            closed: parts.tls.flatten(),
        }
    }
}
