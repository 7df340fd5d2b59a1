//! Chance: which of several shares a request falls in.

use crate::model::http::{Backend, Fraction};

/// One of the backends, by weight; `None` where all weights are zero. `draw` gives a number below the one it is given, each
/// as likely as the others.
pub fn pick(backends: &[Backend], draw: impl FnOnce(u64) -> u64) -> Option<&Backend> {
    if let [one] = backends {
        return (one.weight > 0).then_some(one);
    }
    let all: u64 = backends.iter().map(|b| u64::from(b.weight)).sum();
    if all == 0 {
        return None;
    }
    let mut drawn = draw(all);
    backends.iter().find(|b| {
        let weight = u64::from(b.weight);
        let found = drawn < weight;
        drawn = drawn.wrapping_sub(weight);
        found
    })
}

/// Whether this request is among the share.
pub fn falls_in(share: Fraction, draw: impl FnOnce(u64) -> u64) -> bool {
    share == Fraction::ALL || share.millionths() > 0 && draw(1_000_000) < u64::from(share.millionths())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::http::{HeaderEdits, Target};

    fn backends(weights: &[u32]) -> Vec<Backend> {
        let backend = |(i, weight): (usize, &u32)| Backend {
            weight: *weight,
            target: Target::Broken { reason: i.to_string().into() },
            request: HeaderEdits::default(),
            response: HeaderEdits::default(),
        };
        weights.iter().enumerate().map(backend).collect()
    }

    /// Every number that can be drawn is drawn once: the shares are exact, in steps of a percent.
    #[test]
    fn each_backend_gets_its_weight() {
        for first in 0..=100 {
            let weights = [first, 100 - first];
            let backends = backends(&weights);
            let mut got = [0; 2];
            for drawn in 0..100 {
                let picked = pick(&backends, |below| {
                    assert_eq!(below, 100);
                    drawn
                });
                got[backends.iter().position(|b| std::ptr::eq(b, picked.unwrap())).unwrap()] += 1;
            }
            assert_eq!(got, weights);
        }
    }

    #[test]
    fn weights_may_be_as_large_as_they_can_be_written() {
        let backends = backends(&[u32::MAX, 0, u32::MAX]);
        let at = |drawn| backends.iter().position(|b| std::ptr::eq(b, pick(&backends, |_| drawn).unwrap()));
        let max = u64::from(u32::MAX);
        assert_eq!((at(0), at(max - 1), at(max), at(2 * max - 1)), (Some(0), Some(0), Some(2), Some(2)));
    }

    #[test]
    fn no_weight_is_no_backend() {
        for weights in [&[][..], &[0], &[0, 0]] {
            assert!(pick(&backends(weights), |_| 0).is_none(), "{weights:?}");
        }
    }

    #[test]
    fn a_share_is_what_it_says() {
        let share = Fraction::percent(0.5).unwrap();
        let hits = (0..1_000_000).filter(|drawn| falls_in(share, |_| *drawn)).count();
        assert_eq!(hits, 5_000);
        assert!(falls_in(Fraction::ALL, |_| unreachable!()) && !falls_in(Fraction::new(0, 9).unwrap(), |_| 0));
    }
}
