//! Which version of an object is known, where it may be heard of in two ways: by the watch, and by a request for it alone
//! that was ahead of the watch. What the watch then still says of older versions must not undo it.
//!
//! Versions of one kind are numbers that grow, as every API server has them and Kubernetes 1.35 has it in writing; where
//! they are not, the watch alone counts.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::translate::Name;

/// No request is on its way for so long that it could bring back what was deleted before.
const REMEMBERED: Duration = Duration::from_secs(60);

#[derive(Debug, Default)]
pub(super) struct Versions(HashMap<Name, Known>);

#[derive(Debug)]
struct Known {
    version: u64,
    gone: Option<Instant>,
}

impl Versions {
    pub fn of(object: &Value) -> Option<u64> {
        object.pointer("/metadata/resourceVersion")?.as_str()?.parse().ok()
    }

    /// Whether what was asked for is news, which then counts.
    pub fn is_newer(&mut self, name: &Name, version: Option<u64>) -> bool {
        let Some(version) = version else { return false };
        if self.0.get(name).is_some_and(|known| known.version >= version) {
            return false;
        }
        self.0.insert(name.clone(), Known { version, gone: None });
        true
    }

    /// Whether what the watch says is not older than what is known; then it counts.
    pub fn follows(&mut self, name: &Name, version: Option<u64>) -> bool {
        self.take(name, version, None)
    }

    /// Whether what the watch says is the end of what is known, and not of an older one of its name.
    pub fn ends(&mut self, name: &Name, version: Option<u64>) -> bool {
        self.0.retain(|_, known| known.gone.is_none_or(|gone| gone.elapsed() < REMEMBERED));
        self.take(name, version, Some(Instant::now()))
    }

    pub fn forget(&mut self, name: &Name) {
        self.0.remove(name);
    }

    fn take(&mut self, name: &Name, version: Option<u64>, gone: Option<Instant>) -> bool {
        let Some(version) = version else {
            self.forget(name);
            return true;
        };
        if self.0.get(name).is_some_and(|known| known.version > version) {
            return false;
        }
        self.0.insert(name.clone(), Known { version, gone });
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_older_counts_no_more() {
        let (mut versions, name) = (Versions::default(), ("".into(), "shop".into()));
        assert!(versions.follows(&name, Some(5)));
        assert!(!versions.is_newer(&name, Some(5)), "the watch has said it");
        assert!(!versions.is_newer(&name, Some(4)));
        assert!(versions.is_newer(&name, Some(9)));
        assert!(!versions.follows(&name, Some(7)), "the watch is behind");
        assert!(!versions.ends(&name, Some(8)), "an older one of this name");
        assert!(versions.follows(&name, Some(9)));
        assert!(versions.ends(&name, Some(11)));
        assert!(!versions.is_newer(&name, Some(10)), "a late answer brings nothing back");
        assert!(versions.is_newer(&name, Some(12)));
    }

    #[test]
    fn without_numbers_the_watch_alone_counts() {
        let (mut versions, name) = (Versions::default(), ("".into(), "shop".into()));
        assert!(!versions.is_newer(&name, None));
        assert!(versions.is_newer(&name, Some(9)));
        assert!(versions.follows(&name, None));
        assert!(versions.ends(&name, None));
    }
}
