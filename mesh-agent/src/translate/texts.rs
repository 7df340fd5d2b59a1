//! What many objects have alike is kept once: names of namespaces, nodes and service accounts, places, and what all pods
//! of one Deployment share.

use std::collections::HashSet;
use std::hash::Hash;
use std::sync::Arc;

use crate::model::{Locality, Names, SpiffeId};

/// Namespace and name; the first is empty for objects without one.
pub type Name = (Arc<str>, Arc<str>);

/// What the pods of one Deployment have in common.
#[derive(Debug, PartialEq, Eq, Hash)]
pub(super) struct Kin {
    pub identity: SpiffeId,
    pub names: Arc<Names>,
    /// Empty for the usual one.
    pub runtime_class: Arc<str>,
}

#[derive(Debug, Default)]
pub(super) struct Texts {
    texts: Pool<str>,
    places: Pool<Locality>,
    kin: Pool<Kin>,
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
        match self.kin.all.get(&kin) {
            Some(known) => known.clone(),
            None => {
                let kin = Arc::new(kin);
                self.kin.insert(kin.clone());
                kin
            }
        }
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
