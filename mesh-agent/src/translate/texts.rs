//! What many objects have alike is kept once: names of namespaces, nodes and service accounts, places, and what all pods
//! of one Deployment share.

use std::collections::{BTreeMap, HashSet};
use std::hash::Hash;
use std::sync::Arc;

use crate::model::{Labels, Locality, Names, SpiffeId};

/// Namespace and name; the first is empty for objects without one.
pub type Name = (Arc<str>, Arc<str>);

/// A map by namespace and name, in that order. The namespace is kept once.
#[derive(Debug)]
pub(super) struct ByName<T>(BTreeMap<Arc<str>, BTreeMap<Arc<str>, T>>);

impl<T> Default for ByName<T> {
    fn default() -> Self {
        Self(BTreeMap::new())
    }
}

impl<T> ByName<T> {
    pub fn get(&self, (namespace, name): &Name) -> Option<&T> {
        self.0.get(namespace)?.get(name)
    }

    pub fn get_mut(&mut self, (namespace, name): &Name) -> Option<&mut T> {
        self.0.get_mut(namespace)?.get_mut(name)
    }

    pub fn insert(&mut self, (namespace, name): Name, value: T) {
        self.0.entry(namespace).or_default().insert(name, value);
    }

    pub fn remove(&mut self, (namespace, name): &Name) -> Option<T> {
        let of_namespace = self.0.get_mut(namespace)?;
        let removed = of_namespace.remove(name);
        if of_namespace.is_empty() {
            self.0.remove(namespace);
        }
        removed
    }

    pub fn of_namespace(&self, namespace: &str) -> impl Iterator<Item = (&Arc<str>, &T)> {
        self.0.get(namespace).into_iter().flatten()
    }

    pub fn iter(&self) -> impl Iterator<Item = (Name, &T)> {
        self.0.iter().flat_map(|(ns, all)| all.iter().map(|(name, value)| ((ns.clone(), name.clone()), value)))
    }

    pub fn iter_mut(&mut self) -> impl Iterator<Item = (Name, &mut T)> {
        self.0.iter_mut().flat_map(|(ns, all)| all.iter_mut().map(|(name, value)| ((ns.clone(), name.clone()), value)))
    }

    pub fn values(&self) -> impl Iterator<Item = &T> {
        self.0.values().flat_map(BTreeMap::values)
    }
}

/// What the pods of one Deployment have in common.
#[derive(Debug, PartialEq, Eq, Hash)]
pub(super) struct Kin {
    pub identity: SpiffeId,
    pub names: Arc<Names>,
    /// Empty for the usual one.
    pub runtime_class: Arc<str>,
    /// But for those that a StatefulSet makes of the pod's name: see `has_ordinal`.
    pub labels: Labels,
    /// Whether the pod has the labels `POD_NAME` and `POD_INDEX` too, which its name tells.
    pub has_ordinal: bool,
}

pub(super) const POD_NAME: &str = "statefulset.kubernetes.io/pod-name";
pub(super) const POD_INDEX: &str = "apps.kubernetes.io/pod-index";

/// What an EndpointSlice says of where an endpoint is.
#[derive(Debug, PartialEq, Eq, Hash)]
pub(super) struct Spot {
    pub zone: Option<Arc<str>>,
    pub node: Option<Arc<str>>,
}

#[derive(Debug, Default)]
pub(super) struct Texts {
    texts: Pool<str>,
    places: Pool<Locality>,
    kin: Pool<Kin>,
    spots: Pool<Spot>,
}

impl Texts {
    pub fn text(&mut self, text: &str) -> Arc<str> {
        self.texts.get(text, || text.into())
    }

    pub fn name(&mut self, namespace: &str, name: &str) -> Name {
        (self.text(namespace), name.into())
    }

    pub fn place(&mut self, place: &Locality) -> Arc<Locality> {
        self.places.get(place, || Arc::new(place.clone()))
    }

    pub fn kin(&mut self, kin: Kin) -> Arc<Kin> {
        self.kin.get_owned(kin)
    }

    pub fn labels(&mut self, labels: &BTreeMap<String, String>) -> Labels {
        labels.iter().map(|(key, value)| (self.text(key), self.text(value))).collect()
    }

    pub fn spot(&mut self, spot: Spot) -> Arc<Spot> {
        self.spots.get_owned(spot)
    }
}

#[derive(Debug)]
struct Pool<T: ?Sized> {
    all: HashSet<Arc<T>>,
    /// When it has grown to this many, those that nobody has any more are let go.
    limit: usize,
}

const LEAST: usize = 1024;

impl<T: ?Sized> Default for Pool<T> {
    fn default() -> Self {
        Self { all: HashSet::new(), limit: LEAST }
    }
}

impl<T: Hash + Eq + ?Sized> Pool<T> {
    fn get(&mut self, value: &T, make: impl FnOnce() -> Arc<T>) -> Arc<T> {
        if let Some(known) = self.all.get(value) {
            return known.clone();
        }
        let new = make();
        self.insert(new.clone());
        new
    }

    fn insert(&mut self, new: Arc<T>) {
        if self.all.len() >= self.limit {
            self.all.retain(|one| Arc::strong_count(one) > 1);
            self.limit = LEAST.max(2 * self.all.len());
        }
        self.all.insert(new);
    }
}

impl<T: Hash + Eq> Pool<T> {
    fn get_owned(&mut self, value: T) -> Arc<T> {
        if let Some(known) = self.all.get(&value) {
            return known.clone();
        }
        let new = Arc::new(value);
        self.insert(new.clone());
        new
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_text_is_kept_once_and_let_go_when_nobody_has_it() {
        let mut texts = Texts::default();
        let kept = texts.text("shop");
        assert!(Arc::ptr_eq(&kept, &texts.text("shop")));
        for i in 0..10 * LEAST {
            texts.text(&format!("gone-{i}"));
        }
        assert!(texts.texts.all.len() <= LEAST + 1, "{}", texts.texts.all.len());
        assert!(Arc::ptr_eq(&kept, &texts.text("shop")));
    }
}
