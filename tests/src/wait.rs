//! Waiting for a condition, never for a time.

use std::thread;
use std::time::{Duration, Instant};

/// Polls until `condition` holds; panics naming `what` when `deadline` has passed. Returns how long it took.
#[track_caller]
pub fn eventually(deadline: Duration, what: &str, mut condition: impl FnMut() -> bool) -> Duration {
    let start = Instant::now();
    loop {
        if condition() {
            return start.elapsed();
        }
        assert!(start.elapsed() < deadline, "waited {deadline:?} in vain: {what}");
        thread::sleep(Duration::from_millis(10));
    }
}

/// Checks that `condition` holds during all of `span`; panics naming `what` as soon as it does not.
#[track_caller]
pub fn throughout(span: Duration, what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while start.elapsed() < span {
        assert!(condition(), "after {:?} no longer true: {what}", start.elapsed());
        thread::sleep(Duration::from_millis(20));
    }
}
