//! Which policies hold for a workload, and which mTLS mode: scopes, precedence, conflicts.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use super::istio::{AuthorizationPolicy, Closing, PeerAuthentication, Scope};
use super::kubernetes::Pod;
use super::report::{Labels, selects};
use super::{In, problem};
use crate::model::{self, MtlsMode, MtlsModes, Problem, Severity, WorkloadPolicies};

/// Things with a selector, found by a pod's labels without asking each: a namespace may have a policy for every pod.
struct BySelector<'a, T> {
    /// Under the first label that each selector asks for.
    by_label: HashMap<(&'a str, &'a str), Vec<Selecting<'a, T>>>,
    count: usize,
}

struct Selecting<'a, T> {
    /// When it came.
    order: usize,
    selector: &'a Labels,
    item: T,
}

impl<T> Default for BySelector<'_, T> {
    fn default() -> Self {
        Self { by_label: HashMap::new(), count: 0 }
    }
}

impl<'a, T: Copy> BySelector<'a, T> {
    fn insert(&mut self, selector: &'a Labels, item: T) {
        let (key, value) = selector.iter().next().expect("a selector without labels is none");
        self.by_label.entry((key, value)).or_default().push(Selecting { order: self.count, selector, item });
        self.count += 1;
    }

    /// Those that select `labels`, in the order in which they came.
    fn of(&self, labels: &Labels) -> Vec<T> {
        let asked = labels.iter().filter_map(|(k, v)| self.by_label.get(&(k.as_str(), v.as_str()))).flatten();
        let mut found: Vec<_> = asked.filter(|s| selects(s.selector, labels)).collect();
        found.sort_by_key(|s| s.order);
        found.into_iter().map(|s| s.item).collect()
    }
}

/// All AuthorizationPolicies, ready to be asked for each pod.
pub(super) struct Policies<'a> {
    root: Group<'a>,
    of_namespace: BTreeMap<&'a str, Group<'a>>,
    /// Pods with the same policies share one list: ten thousand pods of a namespace cost one. The key is the addresses
    /// of the shared policies.
    lists: RefCell<HashMap<Vec<*const model::AuthorizationPolicy>, Arc<WorkloadPolicies>>>,
}

/// The policies of one namespace.
#[derive(Default)]
struct Group<'a> {
    all: Vec<&'a Arc<model::AuthorizationPolicy>>,
    selecting: BySelector<'a, &'a Arc<model::AuthorizationPolicy>>,
    /// With the addresses of the pods behind the services that they name.
    targeting: Vec<(BTreeSet<IpAddr>, &'a Arc<model::AuthorizationPolicy>)>,
}

impl<'a> Group<'a> {
    fn of(&self, pod: &Pod, addresses: &[IpAddr]) -> impl Iterator<Item = &'a Arc<model::AuthorizationPolicy>> {
        let targeting = self.targeting.iter().filter(|(behind, _)| addresses.iter().any(|a| behind.contains(a)));
        let targeting = targeting.map(|(_, policy)| *policy);
        self.all.iter().copied().chain(self.selecting.of(&pod.labels)).chain(targeting)
    }
}

impl<'a> Policies<'a> {
    /// `behind` gives the addresses behind a service, by namespace and name.
    pub fn new(
        all: &'a [In<'a, AuthorizationPolicy>],
        root_namespace: &str,
        behind: impl Fn(&str, &str) -> BTreeSet<IpAddr>,
    ) -> Self {
        let mut policies = Self { root: Group::default(), of_namespace: BTreeMap::new(), lists: RefCell::default() };
        for AuthorizationPolicy { policy, scope } in all.iter().map(|p| p.is) {
            let own = policies.of_namespace.entry(&policy.namespace).or_default();
            let wide = if *policy.namespace == *root_namespace { &mut policies.root } else { &mut *own };
            match scope {
                Scope::All => wide.all.push(policy),
                Scope::Selected(labels) => wide.selecting.insert(labels, policy),
                // A target is a service of the policy's own namespace, also in the root namespace.
                Scope::Services(names) => {
                    let addresses = names.iter().flat_map(|name| behind(&policy.namespace, name)).collect();
                    own.targeting.push((addresses, policy));
                }
            }
        }
        policies
    }

    /// Those that hold for `pod`: of the root namespace, then of its own, each time the narrower ones last.
    pub fn of(&self, pod: &Pod, addresses: &[IpAddr]) -> Arc<WorkloadPolicies> {
        let own = self.of_namespace.get(pod.namespace.as_str()).into_iter().flat_map(|g| g.of(pod, addresses));
        let found: Vec<_> = self.root.of(pod, addresses).chain(own).cloned().collect();
        let key = found.iter().map(Arc::as_ptr).collect();
        let mut lists = self.lists.borrow_mut();
        lists.entry(key).or_insert_with(|| Arc::new(WorkloadPolicies { policies: found })).clone()
    }
}

/// All PeerAuthentications, ready to be asked for each pod.
pub(super) struct MtlsPolicies<'a> {
    mesh: Option<&'a PeerAuthentication>,
    of_namespace: BTreeMap<&'a str, &'a PeerAuthentication>,
    /// By namespace, oldest first.
    selecting: BTreeMap<&'a str, BySelector<'a, &'a In<'a, PeerAuthentication>>>,
    closing: Vec<&'a PeerAuthentication>,
    root_namespace: &'a str,
    conflicts: RefCell<BTreeSet<Problem>>,
}

impl<'a> MtlsPolicies<'a> {
    pub fn new(all: &'a [In<'a, PeerAuthentication>], root_namespace: &'a str, problems: &mut Vec<Problem>) -> Self {
        let mut sorted: Vec<_> = all.iter().collect();
        // One without a time of creation counts as new: its age is not known.
        sorted.sort_by_key(|p| (p.is.created.is_none(), p.is.created.as_deref(), &p.is.namespace, &p.is.name));
        let mut result = Self {
            mesh: None,
            of_namespace: BTreeMap::new(),
            selecting: BTreeMap::new(),
            closing: Vec::new(),
            root_namespace,
            conflicts: RefCell::default(),
        };
        for p in sorted {
            let first = match (&p.is.selector, p.is.closing) {
                (_, Closing::Strict) => {
                    result.closing.push(p.is);
                    continue;
                }
                (Some(labels), Closing::No) => {
                    result.selecting.entry(&p.is.namespace).or_default().insert(labels, p);
                    continue;
                }
                (None, Closing::No) if p.is.namespace == root_namespace => *result.mesh.get_or_insert(p.is),
                (None, Closing::No) => *result.of_namespace.entry(&p.is.namespace).or_insert(p.is),
            };
            if !std::ptr::eq(first, p.is) {
                problems.push(lost(p, first));
            }
        }
        result
    }

    pub fn of(&self, pod: &Pod) -> MtlsModes {
        let closed = self.closing.iter().any(|p| match &p.selector {
            Some(labels) => p.namespace == pod.namespace && selects(labels, &pod.labels),
            None => p.namespace == pod.namespace || p.namespace == self.root_namespace,
        });
        if closed {
            return MtlsModes { default: MtlsMode::Strict, ports: BTreeMap::new() };
        }
        let selecting = self.selecting.get(pod.namespace.as_str());
        let mut own = selecting.map(|s| s.of(&pod.labels)).unwrap_or_default().into_iter();
        let first = own.next().map(|p| p.is);
        if let Some(first) = first {
            self.conflicts.borrow_mut().extend(own.map(|p| lost(p, first)));
        }
        let of_namespace = self.of_namespace.get(pod.namespace.as_str()).copied();
        let narrow_to_wide = [first, of_namespace, self.mesh];
        let default = narrow_to_wide.iter().flatten().find_map(|p| p.mode).unwrap_or_default();
        MtlsModes { default, ports: first.map(|p| p.ports.clone()).unwrap_or_default() }
    }

    /// What was found while pods were asked for.
    pub fn into_conflicts(self) -> impl Iterator<Item = Problem> {
        self.conflicts.into_inner().into_iter()
    }
}

fn lost(loser: &In<'_, PeerAuthentication>, winner: &PeerAuthentication) -> Problem {
    let message = format!(
        "PeerAuthentication {}/{} is older and holds for the same pods, so it counts: remove one of the two",
        winner.namespace, winner.name
    );
    problem(Severity::Warning, loser.at, "spec.selector", message)
}
