//! A map of which a changed copy shares with the old one all that did not change: what readers hold stays as it is, and a
//! change of one entry among a hundred thousand costs a few microseconds.

use std::borrow::Borrow;
use std::collections::HashMap;
use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hash};
use std::sync::Arc;

/// With a hundred thousand entries a change copies four hundred, and a copy of the map counts up this many times.
const SHARDS: usize = 256;

#[derive(Debug, Clone)]
pub struct SharedMap<K, V> {
    shards: Box<[Arc<HashMap<K, V>>]>,
    hasher: RandomState,
    len: usize,
}

impl<K, V> Default for SharedMap<K, V> {
    fn default() -> Self {
        let hasher = RandomState::new();
        let empty = Arc::new(HashMap::with_hasher(hasher.clone()));
        Self { shards: vec![empty; SHARDS].into(), hasher, len: 0 }
    }
}

impl<K: Hash + Eq + Clone, V: Clone> SharedMap<K, V> {
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub fn get<Q: Hash + Eq + ?Sized>(&self, key: &Q) -> Option<&V>
    where
        K: Borrow<Q>,
    {
        self.shards[self.shard(key)].get(key)
    }

    pub fn insert(&mut self, key: K, value: V) {
        self.change(key, |_| Some(value));
    }

    pub fn remove<Q: Hash + Eq + ?Sized>(&mut self, key: &Q)
    where
        K: Borrow<Q>,
    {
        let shard = self.shard(key);
        // Asked first: a shard that has no such entry is not copied.
        if self.shards[shard].contains_key(key) {
            Arc::make_mut(&mut self.shards[shard]).remove(key);
            self.len -= 1;
        }
    }

    /// Puts what `change` makes of the value in its place; `None` is no value.
    pub fn change(&mut self, key: K, change: impl FnOnce(Option<V>) -> Option<V>) {
        let shard = self.shard(&key);
        let map = Arc::make_mut(&mut self.shards[shard]);
        let before = map.remove(&key);
        self.len -= usize::from(before.is_some());
        if let Some(value) = change(before) {
            map.insert(key, value);
            self.len += 1;
        }
    }

    /// In no order.
    pub fn values(&self) -> impl Iterator<Item = &V> {
        self.shards.iter().flat_map(|shard| shard.values())
    }

    /// In no order.
    pub fn iter(&self) -> impl Iterator<Item = (&K, &V)> {
        self.shards.iter().flat_map(|shard| shard.iter())
    }

    fn shard<Q: Hash + ?Sized>(&self, key: &Q) -> usize {
        // The low bits and the topmost are what the maps inside go by.
        (self.hasher.hash_one(key) >> 40) as usize % SHARDS
    }
}

impl<K: Hash + Eq + Clone, V: Clone> FromIterator<(K, V)> for SharedMap<K, V> {
    /// Of two with one key the later counts.
    fn from_iter<I: IntoIterator<Item = (K, V)>>(entries: I) -> Self {
        let mut map = Self::default();
        entries.into_iter().for_each(|(key, value)| map.insert(key, value));
        map
    }
}

impl<K: Hash + Eq + Clone, V: Clone + PartialEq> PartialEq for SharedMap<K, V> {
    fn eq(&self, other: &Self) -> bool {
        self.len == other.len && self.iter().all(|(key, value)| other.get(key) == Some(value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_changed_copy_leaves_the_old_one_as_it_was_and_shares_the_rest() {
        let old: SharedMap<u32, u32> = (0..10_000).map(|n| (n, n)).collect();
        let mut new = old.clone();
        new.insert(7, 70);
        new.remove(&8);
        new.remove(&10_000);
        assert_eq!((old.get(&7), old.get(&8), old.len()), (Some(&7), Some(&8), 10_000));
        assert_eq!((new.get(&7), new.get(&8), new.len()), (Some(&70), None, 9_999));
        assert_eq!(new.values().count(), 9_999);
        let shared = old.shards.iter().zip(&new.shards).filter(|(a, b)| Arc::ptr_eq(a, b)).count();
        assert!(shared >= SHARDS - 2, "{shared}");
        assert!(old != new);
        new.insert(7, 7);
        new.insert(8, 8);
        assert!(old == new);
    }
}
