//! Does the process still move? Each of its event loops has a pulse that it keeps up by itself, once a second and for no
//! other cost; whoever asks compares the last beats with the clock, without a lock.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use arc_swap::ArcSwap;
use tokio::time::Instant;

/// Between two beats.
const BEAT: Duration = Duration::from_secs(1);
/// A loop that has not moved for this long hangs: the longest step of any takes a fraction of it, also on a node that is
/// short of time.
const LONGEST: Duration = Duration::from_secs(30);
/// The last beat of a loop that has ended: it is not missed.
const ENDED: u64 = u64::MAX;

/// The pulses of the process. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Liveness {
    since: Instant,
    beats: Arc<ArcSwap<Vec<Arc<Beat>>>>,
}

#[derive(Debug)]
struct Beat {
    name: String,
    /// The last one, in milliseconds after `since`.
    last: AtomicU64,
}

/// One event loop's; its end is that of the loop.
#[derive(Debug)]
pub struct Pulse {
    since: Instant,
    beat: Arc<Beat>,
}

impl Default for Liveness {
    fn default() -> Self {
        Self { since: Instant::now(), beats: Arc::default() }
    }
}

impl Liveness {
    /// `name` is that of the threads which share the loop.
    pub fn pulse(&self, name: impl Into<String>) -> Pulse {
        let beat = Arc::new(Beat { name: name.into(), last: AtomicU64::default() });
        let pulse = Pulse { since: self.since, beat: beat.clone() };
        pulse.beat();
        self.beats.rcu(|beats| {
            let standing = beats.iter().filter(|beat| beat.last.load(Ordering::Relaxed) != ENDED);
            standing.chain([&beat]).cloned().collect::<Vec<_>>()
        });
        pulse
    }

    /// Who moves.
    pub fn moving(&self) -> Vec<String> {
        self.look(|silence| silence < LONGEST, |name, _| name.to_owned())
    }

    /// Who does not, and for how long.
    pub fn stuck(&self) -> Vec<String> {
        self.look(|silence| silence >= LONGEST, |name, silence| format!("{name} for {} s", silence.as_secs()))
    }

    fn look(&self, wanted: impl Fn(Duration) -> bool, text: impl Fn(&str, Duration) -> String) -> Vec<String> {
        let now = self.since.elapsed();
        let beats = self.beats.load();
        let standing = beats.iter().filter_map(|beat| match beat.last.load(Ordering::Relaxed) {
            ENDED => None,
            last => Some((&beat.name, now.saturating_sub(Duration::from_millis(last)))),
        });
        standing.filter(|(_, silence)| wanted(*silence)).map(|(name, silence)| text(name, silence)).collect()
    }
}

impl Pulse {
    /// Beats for as long as it is polled, which is to be on the loop that it is of.
    pub async fn keep(self) {
        let mut tick = tokio::time::interval(BEAT);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tick.tick().await;
            self.beat();
        }
    }

    fn beat(&self) {
        let now = u64::try_from(self.since.elapsed().as_millis()).unwrap_or_default();
        self.beat.last.store(now, Ordering::Relaxed);
    }
}

impl Drop for Pulse {
    fn drop(&mut self) {
        self.beat.last.store(ENDED, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_loop_that_moves_no_more_is_named_and_one_that_has_ended_is_not_missed() {
        let liveness = Liveness::default();
        let moving = tokio::spawn(liveness.pulse("control").keep());
        let hanging = liveness.pulse("worker-0");
        tokio::time::sleep(LONGEST - BEAT).await;
        assert_eq!(liveness.moving(), ["control", "worker-0"]);
        assert!(liveness.stuck().is_empty());
        tokio::time::sleep(BEAT * 2).await;
        assert_eq!(liveness.moving(), ["control"]);
        assert_eq!(liveness.stuck(), ["worker-0 for 31 s"]);
        hanging.beat();
        assert!(liveness.stuck().is_empty(), "it has come to itself");
        drop(hanging);
        moving.abort();
        let _ = moving.await;
        tokio::time::sleep(LONGEST * 2).await;
        assert!(liveness.stuck().is_empty() && liveness.moving().is_empty());
    }
}
