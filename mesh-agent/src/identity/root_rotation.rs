//! The phases in which one root follows another. Pure: the time comes in as a value; `authority` persists the result.
//!
//! announced: both roots are trusted, the old one signs, until every node has said that it trusts both;
//! switched:  both are trusted, the new one signs, until the last leaf of the old one has expired;
//! done:      the old root is dropped.

use std::collections::BTreeSet;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

const VERSION: u32 = 1;

/// Which generations of the CA there are; each is a directory with a root and an intermediate.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Phases {
    version: u32,
    pub active: u64,
    pub announced: Option<Announced>,
    pub retired: Vec<Retired>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Announced {
    pub generation: u64,
    /// Seconds since 1970.
    pub at: u64,
    /// Nodes that have not yet said that they trust it.
    pub waiting_for: BTreeSet<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Retired {
    pub generation: u64,
    /// Seconds since 1970; its leaves have expired by then.
    pub drop_at: u64,
}

/// How long the phases last.
#[derive(Debug, Clone, Copy)]
pub struct Pace {
    /// The shortest time between the announcement and the switch; longer than the nodes' interval of asking.
    pub announce: Duration,
    /// A node that was silent for so long has no certificate left; it learns the new root when it comes back.
    pub give_up: Duration,
    /// From the switch until the old root goes: a leaf's life.
    pub retire: Duration,
}

impl Phases {
    pub fn first() -> Self {
        Self { version: VERSION, active: 1, announced: None, retired: Vec::new() }
    }

    pub fn is_known_version(&self) -> bool {
        self.version == VERSION
    }

    /// Trusted generations, the one that signs first.
    pub fn trusted(&self) -> Vec<u64> {
        let announced = self.announced.iter().map(|next| next.generation);
        std::iter::once(self.active).chain(announced).chain(self.retired.iter().map(|old| old.generation)).collect()
    }

    pub fn next_number(&self) -> u64 {
        self.trusted().into_iter().max().unwrap_or(0) + 1
    }

    pub fn announce(&mut self, generation: u64, nodes: BTreeSet<String>, now: SystemTime) {
        self.announced = Some(Announced { generation, at: seconds(now), waiting_for: nodes });
    }

    /// A node has said whether it trusts the announced root. Answers whether that is news.
    pub fn heard_from(&mut self, node: &str, trusts: bool) -> bool {
        let Some(next) = &mut self.announced else { return false };
        if trusts { next.waiting_for.remove(node) } else { next.waiting_for.insert(node.to_owned()) }
    }

    /// Moves on as far as the time allows. Answers whether anything has changed.
    pub fn advance(&mut self, now: SystemTime, pace: Pace) -> bool {
        let before = self.clone();
        let ripe = |next: &Announced| now >= switch_at(next, pace);
        if let Some(next) = self.announced.take_if(|next| ripe(next)) {
            self.retired.push(Retired { generation: self.active, drop_at: seconds(now + pace.retire) });
            self.active = next.generation;
        }
        self.retired.retain(|old| seconds(now) < old.drop_at);
        *self != before
    }

    /// When `advance` has something to do next, as far as time decides it.
    pub fn due(&self, pace: Pace) -> Option<SystemTime> {
        let switch = self.announced.iter().map(|next| switch_at(next, pace));
        switch.chain(self.retired.iter().map(|old| at(old.drop_at))).min()
    }
}

fn switch_at(next: &Announced, pace: Pace) -> SystemTime {
    let wait = if next.waiting_for.is_empty() { pace.announce } else { pace.give_up.max(pace.announce) };
    at(next.at) + wait
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs()
}

fn at(seconds: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PACE: Pace =
        Pace { announce: Duration::from_secs(10), give_up: Duration::from_secs(100), retire: Duration::from_secs(100) };

    fn announced(nodes: &[&str]) -> Phases {
        let mut phases = Phases::first();
        phases.announce(2, nodes.iter().map(|node| (*node).to_owned()).collect(), at(1000));
        phases
    }

    #[test]
    fn the_new_root_signs_after_the_wait_and_the_old_one_goes_after_a_leafs_life() {
        let mut phases = announced(&[]);
        assert!(!phases.advance(at(1009), PACE));
        assert_eq!((phases.active, phases.trusted()), (1, vec![1, 2]));
        assert!(phases.advance(at(1010), PACE));
        assert_eq!((phases.active, phases.trusted()), (2, vec![2, 1]));
        assert!(!phases.advance(at(1109), PACE));
        assert!(phases.advance(at(1110), PACE));
        assert_eq!(phases.trusted(), [2]);
        assert_eq!(phases.due(PACE), None);
    }

    #[test]
    fn a_node_that_does_not_trust_the_new_root_holds_up_the_switch() {
        let mut phases = announced(&["a", "b"]);
        assert!(phases.heard_from("a", true));
        assert!(!phases.advance(at(1050), PACE));
        assert!(phases.heard_from("b", true));
        assert!(phases.advance(at(1050), PACE));
        assert_eq!(phases.active, 2);
    }

    #[test]
    fn a_node_that_shows_up_after_the_announcement_is_waited_for_too() {
        let mut phases = announced(&[]);
        assert!(phases.heard_from("late", false));
        assert!(!phases.heard_from("late", false));
        assert!(!phases.advance(at(1050), PACE));
        assert!(phases.heard_from("late", true));
        assert!(phases.advance(at(1050), PACE));
    }

    #[test]
    fn a_silent_node_holds_up_the_switch_only_while_it_can_have_a_certificate() {
        let mut phases = announced(&["gone"]);
        assert_eq!(phases.due(PACE), Some(at(1100)));
        assert!(!phases.advance(at(1099), PACE));
        assert!(phases.advance(at(1100), PACE));
    }

    #[test]
    fn the_phases_survive_a_restart() {
        let phases = announced(&["a"]);
        let text = serde_json::to_string(&phases).unwrap();
        assert_eq!(serde_json::from_str::<Phases>(&text).unwrap(), phases);
    }
}
