//! What goes wrong on purpose.

use std::time::Duration;

use super::falls_in;
use crate::model::http::{Abort, Fault};

/// What this request gets: first the delay, then the abort.
pub fn drawn(fault: &Fault, mut draw: impl FnMut(u64) -> u64) -> (Option<Duration>, Option<Abort>) {
    let delay = fault.delay.filter(|(share, _)| falls_in(*share, &mut draw)).map(|(_, delay)| delay);
    let abort = fault.abort.filter(|(share, _)| falls_in(*share, &mut draw)).map(|(_, abort)| abort);
    (delay, abort)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::http::Fraction;

    #[test]
    fn each_is_drawn_on_its_own() {
        let half = Fraction::new(1, 2).unwrap();
        let delay = Duration::from_secs(3);
        let fault = Fault { delay: Some((half, delay)), abort: Some((half, Abort::Status(503))) };
        for (draws, expected) in [
            ([0, 0], (Some(delay), Some(Abort::Status(503)))),
            ([499_999, 500_000], (Some(delay), None)),
            ([500_000, 0], (None, Some(Abort::Status(503)))),
            ([999_999, 999_999], (None, None)),
        ] {
            let mut draws = draws.into_iter();
            assert_eq!(drawn(&fault, |_| draws.next().unwrap()), expected);
        }
    }
}
