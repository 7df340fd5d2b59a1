//! Pods become workloads: who is in the mesh, at which address, under which identity and rules.
//!
//! What becomes of a pod depends on itself, on its Namespace and Node, on policies, and on who else claims what only one can have:
//! of those who claim a thing the newest has it. So a change touches the pod and those who claim the same.

use std::cmp::{Ordering, Reverse};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::Hash;
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;

use super::kubernetes::MODE;
use super::mesh::{Changes, Classes, Surroundings};
use super::pod::Pod;
use super::texts::{ByName, Name};
use super::{Settings, problem};
use crate::model::{Few, NodePod, Problem, Severity, Standing, Transport, Workload};

/// The newest comes first and takes what it claims: an address that was given again belongs to the pod that got it.
#[derive(Debug, Clone)]
struct ByAge(Arc<Pod>);

impl ByAge {
    fn age(&self) -> impl Ord {
        let pod = &*self.0;
        (pod.terminating, Reverse(pod.created.bytes()), &*pod.namespace, &*pod.name)
    }
}

impl Ord for ByAge {
    fn cmp(&self, other: &Self) -> Ordering {
        self.age().cmp(&other.age())
    }
}

impl PartialOrd for ByAge {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for ByAge {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for ByAge {}

/// Who claims what only one can have.
struct Claims<K>(HashMap<K, Few<ByAge>>);

impl<K> Default for Claims<K> {
    fn default() -> Self {
        Self(HashMap::new())
    }
}

impl<K: Hash + Eq> Claims<K> {
    /// Both tell `others` who else claims it: what becomes of them may change.
    fn add(&mut self, key: K, pod: &Arc<Pod>, others: &mut BTreeSet<Name>) {
        let few = self.0.remove(&key);
        others.extend(few.iter().flat_map(Few::as_slice).map(|p| p.0.key()));
        self.0.insert(key, Few::with(few, ByAge(pod.clone())));
    }

    fn take(&mut self, key: K, pod: &Arc<Pod>, others: &mut BTreeSet<Name>) {
        if let Some(few) = Few::without(self.0.remove(&key), &ByAge(pod.clone())) {
            others.extend(few.as_slice().iter().map(|p| p.0.key()));
            self.0.insert(key, few);
        }
    }

    /// The one who has it, where that is not `pod`.
    fn other(&self, key: &K, pod: &Pod) -> Option<&Pod> {
        let owner = &*self.0.get(key)?.first().0;
        (!std::ptr::eq(owner, pod)).then_some(owner)
    }
}

/// Who has the things that only one can have.
#[derive(Default)]
struct Owners {
    addresses: Claims<IpAddr>,
    uids: Claims<Arc<str>>,
    netns: Claims<Arc<Path>>,
}

impl Owners {
    /// Both tell `others` who else claims something of it.
    fn add(&mut self, pod: &Arc<Pod>, others: &mut BTreeSet<Name>) {
        for ip in &*pod.addresses {
            self.addresses.add(*ip, pod, others);
        }
        self.uids.add(pod.uid.clone(), pod, others);
        if let Some(path) = pod.netns() {
            self.netns.add(path.clone(), pod, others);
        }
    }

    fn take(&mut self, pod: &Arc<Pod>, others: &mut BTreeSet<Name>) {
        for ip in &*pod.addresses {
            self.addresses.take(*ip, pod, others);
        }
        self.uids.take(pod.uid.clone(), pod, others);
        if let Some(path) = pod.netns() {
            self.netns.take(path.clone(), pod, others);
        }
    }
}

/// All pods, and the workloads that were made of them.
#[derive(Default)]
pub(super) struct Pods {
    all: ByName<Member>,
    /// Those with `own`.
    own: BTreeSet<Name>,
    owners: Owners,
    /// Those of which something else may become. Before anything was made it is empty, and all are meant.
    due: BTreeSet<Name>,
    made: bool,
    /// Workloads of pods that are gone since `make`.
    gone: BTreeMap<Name, Arc<Workload>>,
    /// Addresses behind which other labels may be since `make`.
    relabelled: Vec<IpAddr>,
    problems: BTreeMap<Name, Vec<Problem>>,
}

struct Member {
    pod: Arc<Pod>,
    workload: Option<Arc<Workload>>,
}

impl Pods {
    pub fn set(&mut self, key: Name, pod: Option<Pod>, settings: &Settings) {
        let before = self.all.get(&key).map(|m| m.pod.clone());
        if before.as_deref() == pod.as_ref() {
            return;
        }
        let pod = match &before {
            Some(before) => pod.map(|pod| pod.share(before)),
            None => pod,
        };
        if self.made {
            let all = [before.as_deref(), pod.as_ref()].into_iter().flatten();
            self.relabelled.extend(all.flat_map(|pod| pod.addresses.iter().copied()));
        }
        if let Some(before) = before.filter(|p| p.takes_part(settings)) {
            self.owners.take(&before, &mut self.due);
        }
        match pod.map(Arc::new) {
            Some(pod) => {
                if pod.takes_part(settings) {
                    self.owners.add(&pod, &mut self.due);
                }
                match pod.own {
                    Some(_) => self.own.insert(key.clone()),
                    None => self.own.remove(&key),
                };
                // One that was gone for a moment has changed, and not come.
                let workload = self.all.remove(&key).and_then(|m| m.workload).or_else(|| self.gone.remove(&key));
                self.all.insert(key.clone(), Member { pod, workload });
            }
            None => {
                self.own.remove(&key);
                let workload = self.all.remove(&key).and_then(|m| m.workload);
                self.gone.extend(workload.map(|w| (key.clone(), w)));
            }
        }
        if self.made {
            self.due.insert(key);
        }
    }

    pub fn has(&self, name: &Name) -> bool {
        self.all.get(name).is_some()
    }

    pub fn names(&self) -> impl Iterator<Item = Name> {
        self.all.iter().map(|(name, _)| name)
    }

    pub fn due_in_namespace(&mut self, namespace: &Arc<str>) {
        if !self.made {
            return;
        }
        self.due.extend(self.all.of_namespace(namespace).map(|(name, _)| (namespace.clone(), name.clone())));
    }

    pub fn due_on_node(&mut self, node: &str) {
        if !self.made {
            return;
        }
        self.due.extend(self.all.iter().filter(|(_, m)| *m.pod.node == *node).map(|(name, _)| name));
    }

    pub fn due_of_class(&mut self, class: &str) {
        if !self.made {
            return;
        }
        let of_class = self.all.iter().filter(|(_, m)| *m.pod.kin.runtime_class == *class);
        self.due.extend(of_class.map(|(name, _)| name));
    }

    pub fn all_due(&mut self) {
        if !self.made {
            return;
        }
        self.due.extend(self.all.iter().map(|(name, _)| name));
    }

    /// A policy has changed.
    pub fn due_to_judge(&mut self) {
        if !self.made {
            return;
        }
        self.due.extend(self.own.iter().cloned());
    }

    /// Tells the addresses behind which other labels may be since it was asked last.
    pub fn take_relabelled(&mut self) -> Vec<IpAddr> {
        std::mem::take(&mut self.relabelled)
    }

    /// The pod that has an address.
    pub fn at(&self, address: IpAddr) -> Option<&Pod> {
        self.owners.addresses.0.get(&address).map(|few| &*few.first().0)
    }

    pub fn any_due(&self) -> bool {
        !self.made || !self.due.is_empty()
    }

    /// Makes those that are due.
    pub fn make(&mut self, around: &Surroundings<'_>, changes: &mut Changes) {
        let Self { all, own: _, owners, due, made, gone: _, relabelled: _, problems } = self;
        let mut make = |name: Name, member: Option<&mut Member>| {
            changes.problems |= problems.remove(&name).is_some();
            let Some(member) = member else { return };
            let mut found = Vec::new();
            let new = owners.workload(&member.pod, around, &mut found);
            if !found.is_empty() {
                problems.insert(name, found);
                changes.problems = true;
            }
            if member.workload.as_deref() != new.as_ref() {
                let new = new.map(Arc::new);
                changes.old_workloads.extend(std::mem::replace(&mut member.workload, new.clone()));
                changes.new_workloads.extend(new);
            }
        };
        if std::mem::replace(made, true) {
            for name in std::mem::take(due) {
                let member = all.get_mut(&name);
                make(name, member);
            }
        } else {
            due.clear();
            all.iter_mut().for_each(|(name, member)| make(name, Some(member)));
        }
        changes.old_workloads.extend(std::mem::take(&mut self.gone).into_values());
    }

    pub fn workloads(&self) -> impl Iterator<Item = &Arc<Workload>> {
        self.all.values().filter_map(|m| m.workload.as_ref())
    }

    /// The pods of this node, with or without an address, but for those that have ended.
    pub fn of_node(&self, around: &Surroundings<'_>) -> BTreeMap<Arc<str>, NodePod> {
        let Some(node) = &around.settings.node else { return BTreeMap::new() };
        let of_node = self.own.iter().filter_map(|name| self.all.get(name)).map(|m| &m.pod);
        let told = |pod: &Arc<Pod>| {
            let standing = match Membership::of(pod, around) {
                Membership { refused: Some((_, message)), .. } => Standing::Refused(message),
                Membership { enrolled: true, .. } => Standing::Enabled,
                Membership { said: true, .. } => Standing::Outside,
                Membership { .. } => Standing::Unclear,
            };
            let own = pod.own.as_ref();
            let label = own.filter(|_| pod.mode.is_wrong()).and_then(|own| own.labels.get(MODE));
            let wrong_label = label.map(|value| {
                format!(
                    "its label {MODE}: `{value}` is no mode, so the pod follows its namespace: use enabled or disabled"
                )
            });
            let known = NodePod {
                namespace: pod.namespace.clone(),
                name: pod.name.clone(),
                standing,
                shown: own.and_then(|own| own.shown.clone()),
                wrong_label,
                static_uid: own.and_then(|own| own.static_uid.clone()),
            };
            (pod.uid.clone(), known)
        };
        of_node.filter(|pod| pod.node == *node && !pod.ended).map(told).collect()
    }

    pub fn problems(&self) -> impl Iterator<Item = &Problem> {
        self.problems.values().flatten()
    }

    /// The pods of a namespace that take part, with the addresses that are theirs.
    pub fn addressed<'a>(
        &'a self,
        namespace: &'a str,
        settings: &'a Settings,
    ) -> impl Iterator<Item = (&'a Pod, Vec<IpAddr>)> {
        let pods = self.all.of_namespace(namespace).map(|(_, m)| &*m.pod);
        pods.filter(|p| p.takes_part(settings)).map(|p| (p, self.owners.addresses_of(p)))
    }
}

impl Owners {
    fn addresses_of(&self, pod: &Pod) -> Vec<IpAddr> {
        pod.addresses.iter().copied().filter(|ip| self.addresses.other(ip, pod).is_none()).collect()
    }

    fn workload(&self, pod: &Pod, around: &Surroundings<'_>, problems: &mut Vec<Problem>) -> Option<Workload> {
        let settings = around.settings;
        if pod.ended {
            return None;
        }
        let mode = Membership::of(pod, around);
        let name = |p: &Pod| format!("{}/{}", p.namespace, p.name);
        let mut report = |field: &str, message: String| {
            let at = around.sites.of("Pod", &pod.namespace, &pod.name);
            problems.push(problem(Severity::Warning, &at, field, message));
        };
        if let Some((field, message)) = mode.refused {
            report(field, message);
        }
        if !pod.takes_part(settings) {
            return None;
        }
        for ip in &*pod.addresses {
            if let Some(owner) = self.addresses.other(ip, pod).map(name) {
                report(
                    "status.podIP",
                    format!("Pod {owner} has the address {ip} too and counts as the newer one: remove one of the two"),
                );
            }
        }
        let mut uid = pod.uid.clone();
        if let Some(owner) = self.uids.other(&uid, pod).map(name) {
            report(
                "metadata.uid",
                format!("Pod {owner} has the same uid, so this pod goes by its name: give each its own"),
            );
            uid = name(pod).into();
        }
        let netns = pod.netns().filter(|path| {
            let owner = self.netns.other(path, pod).map(name);
            if let Some(owner) = &owner {
                let message = format!(
                    "Pod {owner} has the network namespace {} too, so this pod gets none: give each its own",
                    path.display()
                );
                report("metadata.annotations[nodemesh.io/netns]", message);
            }
            owner.is_none()
        });
        if mode.enrolled
            && let Some((field, message)) = check_standalone(settings, pod)
        {
            report(field, message);
        }
        let own = self.addresses_of(pod);
        if own.is_empty() && !pod.addresses.is_empty() {
            return None;
        }
        let addresses = if own.len() == pod.addresses.len() { pod.addresses.clone() } else { own.into() };
        let judged = pod.own.as_ref().filter(|_| settings.judges(&pod.node));
        let rules = judged.map(|own| {
            let (policies, root) = (around.policies, &settings.root_namespace);
            policies.of(&pod.namespace, &own.labels, &addresses, root, around.sites, problems)
        });
        Some(Workload {
            uid,
            name: pod.name.clone(),
            namespace: pod.namespace.clone(),
            identity: pod.kin.identity.clone(),
            addresses,
            node: pod.node.clone(),
            locality: around.nodes.place(&pod.node),
            transport: if mode.enrolled { Transport::Hbone } else { Transport::Plain },
            mode_is_said: mode.said,
            // Elsewhere the annotation is any pod owner's to write, and could name another's.
            netns: settings.standalone_node.as_ref().and(netns).cloned(),
            rules,
            labels: judged.map(|own| own.told.clone()),
            names: pod.kin.names.clone(),
            cluster: settings.cluster.clone(),
        })
    }
}

/// Whether a pod is in the mesh, and whether a manifest says so.
struct Membership {
    enrolled: bool,
    said: bool,
    /// It should be and cannot: the field, and one sentence.
    refused: Option<(&'static str, String)>,
}

impl Membership {
    fn of(pod: &Pod, around: &Surroundings<'_>) -> Self {
        let istio = around.settings.istio_labels;
        let own = pod.mode;
        let namespace = around.namespaces.get(&pod.namespace).copied();
        let enabled = own.enabled(istio).or_else(|| namespace.map(|mode| mode.enabled(istio).unwrap_or(false)));
        // What the pod says itself needs no namespace; what is not clear is not said.
        let clear =
            own.is_clear(istio) && (own.enabled(istio).is_some() || namespace.is_some_and(|m| m.is_clear(istio)));
        let (enrolled, said) = (enabled.unwrap_or(false), enabled.is_some() && clear);
        match refusal(pod, around.classes).filter(|_| enrolled) {
            None => Self { enrolled, said, refused: None },
            // Others reach it as a pod outside of the mesh.
            refused => Self { enrolled: false, said: true, refused },
        }
    }
}

/// Why a pod cannot be in the mesh: the field, and one sentence.
fn refusal(pod: &Pod, classes: &Classes) -> Option<(&'static str, String)> {
    if pod.host_network {
        // It has the node's address and no network of its own: what it sends cannot be told from the node's.
        let message = "a pod in the host's network cannot be in the mesh and stays out of it: \
                       remove hostNetwork, or label the pod nodemesh.io/mode: disabled";
        return Some(("spec.hostNetwork", message.to_owned()));
    }
    let class = &pod.kin.runtime_class;
    if class.is_empty() {
        return None;
    }
    // A class that is not known is judged by its name, which usually is that of its handler.
    let lower = classes.get(class).unwrap_or(class).to_lowercase();
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

/// In standalone mode nobody but the manifest says where a pod's network is.
fn check_standalone(settings: &Settings, pod: &Pod) -> Option<(&'static str, String)> {
    let node = settings.standalone_node.as_ref()?;
    if pod.node.is_empty() {
        let message = format!("the pod is on no node, so no agent serves it: write spec.nodeName, such as {node}");
        return Some(("spec.nodeName", message));
    }
    let message = "the pod is in the mesh and on this node, but has no annotation nodemesh.io/netns, so nothing \
                   reaches it: write the path of its network namespace, such as /run/netns/web";
    let missing = pod.node == *node && pod.netns().is_none();
    missing.then(|| ("metadata.annotations[nodemesh.io/netns]", message.into()))
}
