//! Mostly one, seldom more: who claims an address, or names an endpoint. A hundred thousand such lists must be small.

/// One or more things in order, each once. The first is the one that counts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Few<T> {
    One(T),
    /// At least two.
    More(Box<[T]>),
}

impl<T: Ord> Few<T> {
    pub fn first(&self) -> &T {
        &self.as_slice()[0]
    }

    pub fn as_slice(&self) -> &[T] {
        match self {
            Self::One(one) => std::slice::from_ref(one),
            Self::More(all) => all,
        }
    }

    /// With `item`, which takes the place of its equal.
    pub fn with(few: Option<Self>, item: T) -> Self {
        let mut all = match few {
            None => return Self::One(item),
            Some(Self::One(one)) => vec![one],
            Some(Self::More(all)) => all.into_vec(),
        };
        match all.binary_search(&item) {
            Ok(at) => all[at] = item,
            Err(at) => all.insert(at, item),
        }
        Self::of(all).expect("one was put in")
    }

    /// Without the equal of `item`; `None` where nothing is left.
    pub fn without(few: Option<Self>, item: &T) -> Option<Self> {
        let mut all = match few? {
            Self::One(one) => return (one != *item).then_some(Self::One(one)),
            Self::More(all) => all.into_vec(),
        };
        all.retain(|other| other != item);
        Self::of(all)
    }

    fn of(mut all: Vec<T>) -> Option<Self> {
        match all.len() {
            0 => None,
            1 => all.pop().map(Self::One),
            _ => Some(Self::More(all.into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_counts_however_they_came() {
        let few = Few::with(Some(Few::with(Some(Few::One(2)), 3)), 1);
        assert_eq!(few.as_slice(), [1, 2, 3]);
        let few = Few::without(Some(few), &1);
        assert_eq!(few.as_ref().map(Few::first), Some(&2));
        assert_eq!(Few::without(Few::without(few, &2), &3), None);
        assert_eq!(size_of::<Few<std::sync::Arc<u8>>>(), 16);
    }
}
