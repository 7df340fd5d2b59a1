//! Which policies hold for a workload, and which mTLS mode: scopes, precedence, conflicts.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use super::istio::{AuthorizationPolicy, Closing, PeerAuthentication, Scope};
use super::mesh::Sites;
use super::problem;
use super::report::{Labels, selects};
use super::texts::Name;
use crate::model::{self, MtlsMode, MtlsModes, Problem, Rules, Severity};

/// Things with a selector, found by a pod's labels without asking each: a namespace may have a policy for every pod.
struct BySelector<T> {
    /// Under the first label that each selector asks for.
    by_label: HashMap<(String, String), Vec<Selecting<T>>>,
    count: usize,
}

struct Selecting<T> {
    /// When it came.
    order: usize,
    selector: Labels,
    item: T,
}

impl<T> Default for BySelector<T> {
    fn default() -> Self {
        Self { by_label: HashMap::new(), count: 0 }
    }
}

impl<T> BySelector<T> {
    fn insert(&mut self, selector: &Labels, item: T) {
        let (key, value) = selector.iter().next().expect("a selector without labels is none");
        let selecting = Selecting { order: self.count, selector: selector.clone(), item };
        self.by_label.entry((key.clone(), value.clone())).or_default().push(selecting);
        self.count += 1;
    }

    /// Those that select `labels`, in the order in which they came.
    fn of(&self, labels: &Labels) -> Vec<&T> {
        if self.count == 0 {
            return Vec::new();
        }
        let asked = labels.iter().filter_map(|(k, v)| self.by_label.get(&(k.clone(), v.clone()))).flatten();
        let mut found: Vec<_> = asked.filter(|s| selects(&s.selector, labels)).collect();
        found.sort_by_key(|s| s.order);
        found.into_iter().map(|s| &s.item).collect()
    }
}

type Made = HashMap<(MtlsModes, Vec<usize>), Arc<Rules>>;

/// All policies in force, ready to be asked for each pod.
#[derive(Default)]
pub(super) struct Policies {
    authorization: BTreeMap<Name, AuthorizationPolicy>,
    peer: BTreeMap<Name, Arc<PeerAuthentication>>,
    /// Whether one of them is not what it was when they were made ready.
    changed: bool,
    ready: Ready,
}

#[derive(Default)]
struct Ready {
    root: Group,
    of_namespace: BTreeMap<Arc<str>, Group>,
    mtls: Mtls,
    problems: Vec<Problem>,
    /// Pods with the same rules share them: ten thousand pods of a namespace cost one list. The key is the mode and the
    /// addresses of the shared policies.
    rules: RefCell<Made>,
}

/// The policies of one namespace.
#[derive(Default)]
struct Group {
    all: Vec<Arc<model::AuthorizationPolicy>>,
    selecting: BySelector<Arc<model::AuthorizationPolicy>>,
    /// With the addresses of the pods behind the services that they name.
    targeting: Vec<(BTreeSet<IpAddr>, Arc<model::AuthorizationPolicy>)>,
}

impl Group {
    fn of(&self, labels: &Labels, addresses: &[IpAddr]) -> impl Iterator<Item = &Arc<model::AuthorizationPolicy>> {
        let targeting = self.targeting.iter().filter(|(behind, _)| addresses.iter().any(|a| behind.contains(a)));
        let targeting = targeting.map(|(_, policy)| policy);
        self.all.iter().chain(self.selecting.of(labels)).chain(targeting)
    }
}

/// All PeerAuthentications.
#[derive(Default)]
struct Mtls {
    mesh: Option<Arc<PeerAuthentication>>,
    of_namespace: BTreeMap<String, Arc<PeerAuthentication>>,
    /// By namespace, oldest first.
    selecting: BTreeMap<String, BySelector<Arc<PeerAuthentication>>>,
    closing: Vec<Arc<PeerAuthentication>>,
}

impl Policies {
    pub fn set_authorization(&mut self, name: Name, policy: Option<AuthorizationPolicy>) {
        self.changed |= set(&mut self.authorization, name, policy);
    }

    pub fn set_peer(&mut self, name: Name, policy: Option<PeerAuthentication>) {
        self.changed |= set(&mut self.peer, name, policy.map(Arc::new));
    }

    /// They are to be made ready again.
    pub fn touch(&mut self) {
        self.changed = true;
    }

    pub fn have_changed(&self) -> bool {
        self.changed
    }

    pub fn has_authorization(&self, name: &Name) -> bool {
        self.authorization.contains_key(name)
    }

    pub fn has_peer(&self, name: &Name) -> bool {
        self.peer.contains_key(name)
    }

    pub fn authorization_names(&self) -> impl Iterator<Item = &Name> {
        self.authorization.keys()
    }

    pub fn peer_names(&self) -> impl Iterator<Item = &Name> {
        self.peer.keys()
    }

    /// Whether a policy holds for the pods behind this service.
    pub fn target(&self, (namespace, name): &Name) -> bool {
        self.authorization.values().any(|p| match &p.scope {
            Scope::Services(names) => p.policy.namespace == *namespace && names.iter().any(|n| **n == **name),
            Scope::All | Scope::Selected(_) => false,
        })
    }

    /// `behind` gives the addresses behind a service, by namespace and name.
    pub fn make_ready(&mut self, root_namespace: &str, sites: &Sites, behind: impl Fn(&str, &str) -> BTreeSet<IpAddr>) {
        let mut ready = Ready::default();
        for AuthorizationPolicy { policy, scope } in self.authorization.values() {
            let group = match *policy.namespace == *root_namespace && !matches!(scope, Scope::Services(_)) {
                true => &mut ready.root,
                // A target is a service of the policy's own namespace, also in the root namespace.
                false => ready.of_namespace.entry(policy.namespace.clone()).or_default(),
            };
            match scope {
                Scope::All => group.all.push(policy.clone()),
                Scope::Selected(labels) => group.selecting.insert(labels, policy.clone()),
                Scope::Services(names) => {
                    let addresses = names.iter().flat_map(|name| behind(&policy.namespace, name)).collect();
                    group.targeting.push((addresses, policy.clone()));
                }
            }
        }
        let mut sorted: Vec<_> = self.peer.values().collect();
        // One without a time of creation counts as new: its age is not known.
        sorted.sort_by_key(|p| (p.created.is_none(), p.created.as_deref(), &p.namespace, &p.name));
        let Ready { mtls, problems, .. } = &mut ready;
        for p in sorted {
            let first = match (&p.selector, p.closing) {
                (_, Closing::Strict) => {
                    mtls.closing.push(p.clone());
                    continue;
                }
                (Some(labels), Closing::No) => {
                    mtls.selecting.entry(p.namespace.clone()).or_default().insert(labels, p.clone());
                    continue;
                }
                (None, Closing::No) if p.namespace == root_namespace => mtls.mesh.get_or_insert_with(|| p.clone()),
                (None, Closing::No) => mtls.of_namespace.entry(p.namespace.clone()).or_insert_with(|| p.clone()),
            };
            if !Arc::ptr_eq(first, p) {
                problems.push(lost(p, first, sites));
            }
        }
        (self.ready, self.changed) = (ready, false);
    }

    /// What was found when they were made ready.
    pub fn problems(&self) -> &[Problem] {
        &self.ready.problems
    }

    /// What holds for a pod: policies of the root namespace, then of its own, each time the narrower ones last.
    pub fn of(
        &self,
        namespace: &str,
        labels: &Labels,
        addresses: &[IpAddr],
        root_namespace: &str,
        sites: &Sites,
        problems: &mut Vec<Problem>,
    ) -> Arc<Rules> {
        let ready = &self.ready;
        let mtls = ready.mtls.of(namespace, labels, root_namespace, sites, problems);
        let own = ready.of_namespace.get(namespace).into_iter().flat_map(|g| g.of(labels, addresses));
        let found: Vec<_> = ready.root.of(labels, addresses).chain(own).cloned().collect();
        let key = (mtls, found.iter().map(|p| Arc::as_ptr(p).addr()).collect());
        let mut known = ready.rules.borrow_mut();
        if let Some(rules) = known.get(&key) {
            return rules.clone();
        }
        let rules = Arc::new(Rules { mtls: key.0.clone(), policies: found });
        known.insert(key, rules.clone());
        rules
    }
}

/// Says whether anything is different now.
fn set<T: PartialEq>(all: &mut BTreeMap<Name, T>, name: Name, new: Option<T>) -> bool {
    if all.get(&name) == new.as_ref() {
        return false;
    }
    match new {
        Some(new) => all.insert(name, new),
        None => all.remove(&name),
    };
    true
}

impl Mtls {
    fn of(
        &self,
        namespace: &str,
        labels: &Labels,
        root_namespace: &str,
        sites: &Sites,
        problems: &mut Vec<Problem>,
    ) -> MtlsModes {
        let closed = self.closing.iter().any(|p| match &p.selector {
            Some(selector) => p.namespace == namespace && selects(selector, labels),
            None => p.namespace == namespace || p.namespace == root_namespace,
        });
        if closed {
            return MtlsModes { default: MtlsMode::Strict, ports: BTreeMap::new() };
        }
        let selecting = self.selecting.get(namespace);
        let mut own = selecting.map(|s| s.of(labels)).unwrap_or_default().into_iter();
        let first = own.next();
        if let Some(first) = first {
            problems.extend(own.map(|p| lost(p, first, sites)));
        }
        let narrow_to_wide = [first, self.of_namespace.get(namespace), self.mesh.as_ref()];
        let default = narrow_to_wide.iter().flatten().find_map(|p| p.mode).unwrap_or_default();
        MtlsModes { default, ports: first.map(|p| p.ports.clone()).unwrap_or_default() }
    }
}

fn lost(loser: &PeerAuthentication, winner: &PeerAuthentication, sites: &Sites) -> Problem {
    let message = format!(
        "PeerAuthentication {}/{} is older and holds for the same pods, so it counts: remove one of the two",
        winner.namespace, winner.name
    );
    let at = sites.of("PeerAuthentication", &loser.namespace, &loser.name);
    problem(Severity::Warning, &at, "spec.selector", message)
}
