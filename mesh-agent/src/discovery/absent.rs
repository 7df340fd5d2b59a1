//! How long to wait before a kind is asked for again that the API server does not have. In: what is heard of the kind.
//!
//! The Gateway API's definitions are the user's own, and most clusters may never have them. A thousand agents that ask for
//! three kinds each few seconds would be a load without an end; what is installed later is heard of within half a minute.

use std::time::Duration;

use crate::api_server::{ApiError, Change, Kind};

/// A definition that was there may be away for a moment, while an API server starts.
const FIRST: Duration = Duration::from_secs(1);
const LAST: Duration = Duration::from_secs(30);

#[derive(Debug, Default)]
pub(super) struct Absent {
    failures: u32,
}

impl Absent {
    /// `None` while the watch is to go on by itself. Policies are asked for as often as ever: a mesh must not be without
    /// them for half a minute.
    pub fn after(&mut self, kind: &Kind, change: &Change) -> Option<Duration> {
        match change {
            Change::Complete => self.failures = 0,
            Change::Failed(ApiError::NotFound { .. }) if kind.group != Kind::AUTHORIZATION_POLICY.group => {
                let wait = FIRST.saturating_mul(1 << self.failures.min(10)).min(LAST);
                self.failures = self.failures.saturating_add(1);
                return Some(wait);
            }
            _ => {}
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kind_that_stays_away_is_asked_for_less_and_less_and_one_that_was_there_soon() {
        let missing = || Change::Failed(ApiError::NotFound { what: "watch".into(), why: "no such kind".into() });
        let mut absent = Absent::default();
        let route = Kind::HTTP_ROUTE;
        let mut waits = || (0..7).map(|_| absent.after(&route, &missing()).unwrap().as_secs()).collect::<Vec<_>>();
        assert_eq!(waits(), [1, 2, 4, 8, 16, 30, 30]);
        assert_eq!(absent.after(&route, &Change::Begin), None, "a watch says so before it has asked");
        assert_eq!(absent.after(&route, &missing()), Some(LAST));
        assert_eq!(absent.after(&route, &Change::Complete), None);
        assert_eq!(absent.after(&route, &missing()), Some(FIRST));
        assert_eq!(Absent::default().after(&Kind::AUTHORIZATION_POLICY, &missing()), None);
    }
}
