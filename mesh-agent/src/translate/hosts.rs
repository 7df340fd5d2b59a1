//! The hosts that Istio's objects name, and the services that are meant by them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::texts::Name;

/// What a host means, whether or not there is such a service.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Host {
    Service(Name),
    /// None of the cluster's names.
    Foreign(Arc<str>),
    /// All that end with this, which begins with a dot or is empty: written with `*`.
    Below(Arc<str>),
}

impl Host {
    /// As written in an object of `namespace`: without a dot it is a Service there.
    pub fn read(text: &str, namespace: &Arc<str>, domain: &str) -> Self {
        if let Some(suffix) = text.strip_prefix('*') {
            return Self::Below(suffix.into());
        }
        if !text.contains('.') && !text.contains(':') {
            return Self::Service((namespace.clone(), text.into()));
        }
        let cluster = text.strip_suffix(domain).and_then(|rest| rest.strip_suffix(".svc."));
        match cluster.and_then(|rest| rest.split_once('.')).filter(|(_, ns)| !ns.contains('.')) {
            Some((name, ns)) => Self::Service((ns.into(), name.into())),
            None => Self::Foreign(text.into()),
        }
    }

    /// The exact host of a service.
    pub fn of(service: &Name) -> Self {
        match service.1.contains('.') {
            true => Self::Foreign(service.1.clone()),
            false => Self::Service(service.clone()),
        }
    }

    pub fn holds_for(&self, service: &Name, domain: &str) -> bool {
        match self {
            Self::Below(suffix) => hostname(service, domain).ends_with(&**suffix),
            exact => *exact == Self::of(service),
        }
    }

    /// The greater, the more special: an exact one before all with `*`, of these the longest.
    pub fn rank(&self) -> usize {
        match self {
            Self::Below(suffix) => suffix.len(),
            Self::Service(_) | Self::Foreign(_) => usize::MAX,
        }
    }
}

/// The full name of a service. A foreign one is its own.
pub(super) fn hostname((namespace, name): &Name, domain: &str) -> String {
    match name.contains('.') {
        true => name.to_string(),
        false => format!("{name}.{namespace}.svc.{domain}"),
    }
}

/// Which objects speak of which hosts.
#[derive(Debug, Default)]
pub(super) struct ByHost {
    exact: BTreeMap<Host, BTreeSet<Name>>,
    below: BTreeMap<Host, BTreeSet<Name>>,
}

impl ByHost {
    pub fn insert(&mut self, host: &Host, object: &Name) {
        self.of(host).entry(host.clone()).or_default().insert(object.clone());
    }

    pub fn remove(&mut self, host: &Host, object: &Name) {
        let map = self.of(host);
        if let Some(objects) = map.get_mut(host) {
            objects.remove(object);
            if objects.is_empty() {
                map.remove(host);
            }
        }
    }

    /// Those that speak of a service, each with the host by which it does. An object may come twice.
    pub fn of_service<'a>(
        &'a self,
        service: &'a Name,
        domain: &'a str,
    ) -> impl Iterator<Item = (&'a Host, &'a Name)> + 'a {
        let exact = self.exact.get_key_value(&Host::of(service));
        let below = self.below.iter().filter(move |(host, _)| host.holds_for(service, domain));
        exact.into_iter().chain(below).flat_map(|(host, objects)| objects.iter().map(move |object| (host, object)))
    }

    pub fn of_host(&self, host: &Host) -> impl Iterator<Item = &Name> {
        let map = if let Host::Below(_) = host { &self.below } else { &self.exact };
        map.get(host).into_iter().flatten()
    }

    fn of(&mut self, host: &Host) -> &mut BTreeMap<Host, BTreeSet<Name>> {
        match host {
            Host::Below(_) => &mut self.below,
            Host::Service(_) | Host::Foreign(_) => &mut self.exact,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(namespace: &str, name: &str) -> Name {
        (namespace.into(), name.into())
    }

    #[test]
    fn a_host_without_a_dot_is_of_its_own_namespace() {
        let read = |text| Host::read(text, &"shop".into(), "cluster.local");
        assert_eq!(read("reviews"), Host::Service(service("shop", "reviews")));
        assert_eq!(read("reviews.prod.svc.cluster.local"), Host::Service(service("prod", "reviews")));
        for foreign in ["reviews.prod", "reviews.prod.svc", "example.com", "a.b.prod.svc.cluster.local"] {
            assert_eq!(read(foreign), Host::Foreign(foreign.into()));
        }
        assert_eq!(read("*.example.com"), Host::Below(".example.com".into()));
        assert_eq!(read("*"), Host::Below("".into()));
    }

    #[test]
    fn the_more_special_host_ranks_higher_and_holds_for_less() {
        let (shop, prod) = (service("shop", "reviews"), service("prod", "reviews"));
        let read = |text| Host::read(text, &"shop".into(), "cluster.local");
        let all =
            [read("*"), read("*.local"), read("*.prod.svc.cluster.local"), read("reviews.prod.svc.cluster.local")];
        assert!(all.windows(2).all(|w| w[0].rank() < w[1].rank()));
        assert!(all.iter().all(|host| host.holds_for(&prod, "cluster.local")));
        assert_eq!(all.iter().filter(|host| host.holds_for(&shop, "cluster.local")).count(), 2);
        assert!(Host::of(&service("shop", "example.com")) == read("example.com"));
    }
}
