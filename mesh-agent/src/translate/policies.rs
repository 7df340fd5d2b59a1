//! Which policies hold for a workload, and which mTLS mode: scopes, precedence, conflicts.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use super::istio::{AuthorizationPolicy, Closing, PeerAuthentication, Scope};
use super::kubernetes::Pod;
use super::report::selects;
use super::{In, problem};
use crate::model::{MtlsMode, MtlsModes, Problem, Severity, WorkloadPolicies};

/// All AuthorizationPolicies, ready to be asked for each pod.
pub(super) struct Policies<'a> {
    root: Vec<&'a AuthorizationPolicy>,
    of_namespace: BTreeMap<&'a str, Vec<&'a AuthorizationPolicy>>,
    /// Addresses behind the services that policies name as targets, by (namespace, service).
    behind: BTreeMap<(&'a str, &'a str), BTreeSet<IpAddr>>,
    /// Pods with the same policies share one list: ten thousand pods of a namespace cost one. The key is the addresses
    /// of the shared policies.
    lists: RefCell<HashMap<Vec<*const crate::model::AuthorizationPolicy>, Arc<WorkloadPolicies>>>,
}

impl<'a> Policies<'a> {
    pub fn new(
        all: &'a [In<'a, AuthorizationPolicy>],
        root_namespace: &str,
        behind: impl Fn(&str, &str) -> BTreeSet<IpAddr>,
    ) -> Self {
        let mut policies = Self {
            root: Vec::new(),
            of_namespace: BTreeMap::new(),
            behind: BTreeMap::new(),
            lists: RefCell::default(),
        };
        for policy in all.iter().map(|p| p.is) {
            let namespace = &*policy.policy.namespace;
            if let Scope::Services(names) = &policy.scope {
                for name in names {
                    policies.behind.entry((namespace, name)).or_insert_with(|| behind(namespace, name));
                }
            }
            // A target is a service of the policy's own namespace, also in the root namespace.
            match &policy.scope {
                Scope::All | Scope::Selected(_) if namespace == root_namespace => policies.root.push(policy),
                _ => policies.of_namespace.entry(namespace).or_default().push(policy),
            }
        }
        policies
    }

    /// Those that hold for `pod`: of the root namespace, then of its own, then those that select it.
    pub fn of(&self, pod: &Pod, addresses: &[IpAddr]) -> Arc<WorkloadPolicies> {
        let own = self.of_namespace.get(pod.namespace.as_str()).map(Vec::as_slice).unwrap_or_default();
        let all = |policy: &&&AuthorizationPolicy| matches!(policy.scope, Scope::All);
        let some = |policy: &&&AuthorizationPolicy| match &policy.scope {
            Scope::All => false,
            Scope::Selected(labels) => selects(labels, &pod.labels),
            Scope::Services(names) => names.iter().any(|name| {
                let behind = self.behind.get(&(&*policy.policy.namespace, name.as_str()));
                behind.is_some_and(|b| addresses.iter().any(|a| b.contains(a)))
            }),
        };
        let root = self.root.iter().filter(|p| all(p) || some(p));
        let found: Vec<_> =
            root.chain(own.iter().filter(all)).chain(own.iter().filter(some)).map(|p| p.policy.clone()).collect();
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
    selecting: BTreeMap<&'a str, Vec<&'a In<'a, PeerAuthentication>>>,
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
                (Some(_), Closing::No) => {
                    result.selecting.entry(&p.is.namespace).or_default().push(p);
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
        let candidates = self.selecting.get(pod.namespace.as_str()).map(Vec::as_slice).unwrap_or_default();
        let selected = |p: &&&In<'_, PeerAuthentication>| {
            p.is.selector.as_ref().is_some_and(|labels| selects(labels, &pod.labels))
        };
        let mut own = candidates.iter().filter(selected);
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
