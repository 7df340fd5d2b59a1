//! Pods become workloads: who is in the mesh, at which address, under which identity and policies.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;

use super::kubernetes::{Node, Pod, RuntimeClass};
use super::policies::{MtlsPolicies, Policies};
use super::services::Draft;
use super::{In, Objects, Settings, problem};
use crate::model::{Locality, NodePod, NodePods, Problem, Severity, SpiffeId, Standing, Transport, Workload};

/// Where each node is.
pub(super) type Places<'a> = HashMap<&'a str, &'a Locality>;

/// A pod that is part of the model, with what is left to it after conflicts with others.
pub(super) struct Member<'a> {
    pub pod: &'a Pod,
    pub addresses: Vec<IpAddr>,
    uid: String,
    netns: Option<PathBuf>,
    mode: Membership,
}

/// Whether a pod is in the mesh, and whether a manifest says so.
#[derive(Clone, Copy)]
struct Membership {
    enrolled: bool,
    said: bool,
}

pub(super) fn places<'a>(nodes: &[In<'a, Node>]) -> Places<'a> {
    nodes.iter().map(|n| (n.is.name.as_str(), &n.is.locality)).collect()
}

/// The pods that are reached at an address of their own, the others take no part; and what is to be said of those of this
/// node.
pub(super) fn members<'a>(
    settings: &Settings,
    all: &Objects<'a>,
    problems: &mut Vec<Problem>,
) -> (Vec<Member<'a>>, NodePods) {
    let istio = settings.istio_labels;
    let namespaces: HashMap<&str, _> = all.namespaces.iter().map(|n| (n.is.name.as_str(), n.is.mode)).collect();
    let enabled_namespaces = namespaces
        .iter()
        .filter(|(_, mode)| mode.enabled(istio) == Some(true))
        .map(|(name, _)| Arc::from(*name))
        .collect();
    let mut node_pods = NodePods { enabled_namespaces, pods: BTreeMap::new() };
    let mut present: Vec<(&In<'a, Pod>, Membership)> = Vec::new();
    for pod in all.pods.iter().filter(|p| !p.is.ended) {
        let own = pod.is.mode;
        let namespace = namespaces.get(pod.is.namespace.as_str()).copied();
        let enabled = own.enabled(istio).or_else(|| namespace.map(|mode| mode.enabled(istio).unwrap_or(false)));
        // What the pod says itself needs no namespace; what is not clear is not said.
        let clear =
            own.is_clear(istio) && (own.enabled(istio).is_some() || namespace.is_some_and(|m| m.is_clear(istio)));
        let mut mode = Membership { enrolled: enabled.unwrap_or(false), said: enabled.is_some() && clear };
        let refusal = refusal(pod.is, &all.runtime_classes).filter(|_| mode.enrolled);
        if let Some((field, message)) = &refusal {
            problems.push(problem(Severity::Warning, pod.at, field, message.as_str()));
            // Others reach it as a pod outside of the mesh.
            mode = Membership { enrolled: false, said: true };
        }
        if settings.node.as_deref().is_some_and(|node| *node == *pod.is.node) {
            let standing = match refusal {
                Some((_, message)) => Standing::Refused(message),
                None if mode.enrolled => Standing::Enabled,
                None if mode.said => Standing::Outside,
                None => Standing::Unclear,
            };
            let shown = pod.is.shown.clone();
            let (namespace, name) = (pod.is.namespace.as_str().into(), pod.is.name.as_str().into());
            let known = NodePod { namespace, name, standing, shown };
            node_pods.pods.insert(uid(pod.is).into(), known);
        }
        // In the host's network it has the node's address: what it sends cannot be told from the node's.
        if !pod.is.host_network && !pod.is.addresses.is_empty() {
            present.push((pod, mode));
        }
    }
    // The newest comes first and takes what it claims: an address that was given again belongs to the pod that got it.
    present.sort_by(|(a, _), (b, _)| {
        let age = |p: &'a Pod| (p.terminating, std::cmp::Reverse(p.created.as_deref()), &p.namespace, &p.name);
        age(a.is).cmp(&age(b.is))
    });
    let mut claims = Claims::default();
    let mut members: Vec<Member<'a>> = Vec::new();
    for (pod, mode) in present {
        let member = claims.member(pod, mode, problems);
        if mode.enrolled {
            check_standalone(settings, pod, problems);
        }
        if !member.addresses.is_empty() {
            members.push(member);
        }
    }
    members.sort_by_key(|m| (&m.pod.namespace, &m.pod.name));
    (members, node_pods)
}

/// Why a pod cannot be in the mesh: the field, and one sentence.
fn refusal(pod: &Pod, classes: &[In<'_, RuntimeClass>]) -> Option<(&'static str, String)> {
    if pod.host_network {
        let message = "a pod in the host's network cannot be in the mesh and stays out of it: \
                       remove hostNetwork, or label the pod nodemesh.io/mode: disabled";
        return Some(("spec.hostNetwork", message.to_owned()));
    }
    let class = &pod.runtime_class;
    // A class that is not known is judged by its name, which usually is that of its handler.
    let handler = classes.iter().find(|c| c.is.name == *class).map_or(class, |c| &c.is.handler);
    let lower = handler.to_lowercase();
    let sandbox = match () {
        () if lower.contains("runsc") || lower.contains("gvisor") => "gVisor",
        () if lower.starts_with("kata") => "Kata Containers",
        () => return None,
    };
    let message = format!(
        "a pod that {sandbox} runs (runtime class {class}) cannot be in the mesh and stays out of it, for its connections \
         are not made in the node's kernel: remove runtimeClassName, or label the pod nodemesh.io/mode: disabled"
    );
    Some(("spec.runtimeClassName", message))
}

/// By what the pod is known, where no other has the same.
fn uid(pod: &Pod) -> String {
    if pod.uid.is_empty() { format!("{}/{}", pod.namespace, pod.name) } else { pod.uid.clone() }
}

/// What only one pod can have, and who has it.
#[derive(Default)]
struct Claims<'a> {
    addresses: HashMap<IpAddr, &'a Pod>,
    uids: HashMap<String, &'a Pod>,
    netns: HashMap<&'a PathBuf, &'a Pod>,
}

impl<'a> Claims<'a> {
    fn member(&mut self, pod: &In<'a, Pod>, mode: Membership, problems: &mut Vec<Problem>) -> Member<'a> {
        let name = |p: &Pod| format!("{}/{}", p.namespace, p.name);
        let mut report = |field: &str, message: String| {
            problems.push(problem(Severity::Warning, pod.at, field, message));
        };
        let mut addresses = Vec::new();
        for &ip in &pod.is.addresses {
            let owner = *self.addresses.entry(ip).or_insert(pod.is);
            if std::ptr::eq(owner, pod.is) {
                addresses.push(ip);
            } else {
                let owner = name(owner);
                report(
                    "status.podIP",
                    format!("Pod {owner} has the address {ip} too and counts as the newer one: remove one of the two"),
                );
            }
        }
        let own_name = name(pod.is);
        let mut uid = uid(pod.is);
        let owner = *self.uids.entry(uid.clone()).or_insert(pod.is);
        if !std::ptr::eq(owner, pod.is) {
            let owner = name(owner);
            report(
                "metadata.uid",
                format!("Pod {owner} has the same uid, so this pod goes by its name: give each its own"),
            );
            uid = own_name;
        }
        let netns = pod.is.netns.as_ref().filter(|path| {
            let owner = *self.netns.entry(path).or_insert(pod.is);
            if !std::ptr::eq(owner, pod.is) {
                let message = format!(
                    "Pod {} has the network namespace {} too, so this pod gets none: give each its own",
                    name(owner),
                    path.display()
                );
                report("metadata.annotations[nodemesh.io/netns]", message);
            }
            std::ptr::eq(owner, pod.is)
        });
        Member { pod: pod.is, addresses, uid, netns: netns.cloned(), mode }
    }
}

/// In standalone mode nobody but the manifest says where a pod's network is.
fn check_standalone(settings: &Settings, pod: &In<'_, Pod>, problems: &mut Vec<Problem>) {
    let Some(node) = &settings.standalone_node else { return };
    if pod.is.node.is_empty() {
        let message = format!("the pod is on no node, so no agent serves it: write spec.nodeName, such as {node}");
        problems.push(problem(Severity::Warning, pod.at, "spec.nodeName", message));
    } else if *pod.is.node == **node && pod.is.netns.is_none() {
        let message = "the pod is in the mesh and on this node, but has no annotation nodemesh.io/netns, so nothing \
                       reaches it: write the path of its network namespace, such as /run/netns/web";
        problems.push(problem(Severity::Warning, pod.at, "metadata.annotations[nodemesh.io/netns]", message));
    }
}

pub(super) fn build(
    settings: &Settings,
    all: &Objects<'_>,
    members: &[Member<'_>],
    services: &[Draft<'_>],
    places: &Places<'_>,
    problems: &mut Vec<Problem>,
) -> Vec<Arc<Workload>> {
    let behind = |namespace: &str, name: &str| -> BTreeSet<IpAddr> {
        let service = services.iter().find(|s| s.is_named(namespace, name));
        service.map(|s| s.backends().collect()).unwrap_or_default()
    };
    let policies = Policies::new(&all.authorization_policies, &settings.root_namespace, behind);
    let mtls = MtlsPolicies::new(&all.peer_authentications, &settings.root_namespace, problems);
    let mut texts = Texts::default();
    let mut workloads = Vec::with_capacity(members.len());
    for member in members {
        let pod = member.pod;
        let identity = SpiffeId::new(&settings.trust_domain, &pod.namespace, &pod.service_account)
            .expect("the names were checked when the pod was parsed");
        let names = Names::of(pod);
        workloads.push(Arc::new(Workload {
            uid: member.uid.as_str().into(),
            name: pod.name.as_str().into(),
            namespace: texts.get(&pod.namespace),
            identity,
            addresses: member.addresses.clone(),
            node: texts.get(&pod.node),
            locality: places.get(pod.node.as_str()).copied().cloned().unwrap_or_default(),
            transport: if member.mode.enrolled { Transport::Hbone } else { Transport::Plain },
            mode_is_said: member.mode.said,
            // Elsewhere the annotation is any pod owner's to write, and could name another's.
            netns: settings.standalone_node.as_ref().and(member.netns.clone()),
            policies: policies.of(pod, &member.addresses),
            mtls: mtls.of(pod),
            workload_name: texts.get(&pod.workload_name),
            app: texts.get(names.app),
            version: texts.get(names.version),
            canonical_name: texts.get(names.canonical_name),
            canonical_revision: texts.get(names.canonical_revision),
            cluster: settings.cluster.clone(),
        }));
    }
    problems.extend(mtls.into_conflicts());
    workloads
}

/// Names for metrics, from labels as Istio derives them.
struct Names<'a> {
    app: &'a str,
    version: &'a str,
    canonical_name: &'a str,
    canonical_revision: &'a str,
}

impl<'a> Names<'a> {
    fn of(pod: &'a Pod) -> Self {
        let first =
            |keys: &[&str]| keys.iter().find_map(|k| pod.labels.get(*k)).map(String::as_str).filter(|v| !v.is_empty());
        const REVISION: &str = "service.istio.io/canonical-revision";
        Self {
            app: first(&["app", "app.kubernetes.io/name"]).unwrap_or("unknown"),
            version: first(&["version", "app.kubernetes.io/version"]).unwrap_or("unknown"),
            canonical_name: first(&["service.istio.io/canonical-name", "app.kubernetes.io/name", "app"])
                .unwrap_or(&pod.workload_name),
            canonical_revision: first(&[REVISION, "app.kubernetes.io/version", "version"]).unwrap_or("latest"),
        }
    }
}

/// Names that many pods have are kept once.
#[derive(Default)]
struct Texts(BTreeMap<String, Arc<str>>);

impl Texts {
    fn get(&mut self, text: &str) -> Arc<str> {
        if let Some(known) = self.0.get(text) {
            return known.clone();
        }
        let new: Arc<str> = text.into();
        self.0.insert(text.into(), new.clone());
        new
    }
}
