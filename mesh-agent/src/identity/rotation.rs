//! When to renew and when to try again. Pure: the time and the random numbers (each in 0.0..1.0) come in as values.

use std::time::{Duration, SystemTime};

/// First and last wait between two tries while the CA does not answer.
pub const BACKOFF_MIN: Duration = Duration::from_secs(1);
pub const BACKOFF_MAX: Duration = Duration::from_secs(60);

/// Half of what was left of the life when the certificate came in, ten percent earlier or later, so that the identities
/// of a node, and the nodes of a mesh, do not all ask in the same second. The issuer's back-dating for skewed clocks
/// does not count as life.
pub fn renew_at(obtained: SystemTime, not_after: SystemTime, random: f64) -> SystemTime {
    let life = not_after.duration_since(obtained).unwrap_or_default();
    obtained + life.mul_f64(0.5 * (0.9 + 0.2 * random.clamp(0.0, 1.0)))
}

/// How long to wait after `failures` tries (at least one) in a row: doubled each time, up to a minute, half of it random.
pub fn backoff(failures: u32, random: f64) -> Duration {
    let doubled = BACKOFF_MIN.saturating_mul(1 << failures.min(16)).min(BACKOFF_MAX);
    doubled.mul_f64(0.5 + 0.5 * random.clamp(0.0, 1.0)).max(BACKOFF_MIN)
}

/// As `backoff`, and sooner where little of the present certificate's life is `left`: a short-lived one would else expire
/// while the CA is long back.
pub fn retry_after(failures: u32, left: Option<Duration>, random: f64) -> Duration {
    let wait = backoff(failures, random);
    left.map_or(wait, |left| wait.min(left / 4)).max(BACKOFF_MIN)
}

/// Where a certificate stands at `now`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// None has been issued yet.
    Waiting,
    Ready,
    /// In use, and due to be replaced.
    Renewing,
    Expired,
}

impl Standing {
    /// `certificate` is (renew at, not after).
    pub fn at(now: SystemTime, certificate: Option<(SystemTime, SystemTime)>) -> Self {
        match certificate {
            None => Self::Waiting,
            Some((_, not_after)) if now >= not_after => Self::Expired,
            Some((renew_at, _)) if now >= renew_at => Self::Renewing,
            Some(_) => Self::Ready,
        }
    }

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Ready => "ready",
            Self::Renewing => "renewing",
            Self::Expired => "expired",
        }
    }
}

/// The wall clock, or one that follows tokio's, which tests pause and advance.
#[derive(Debug, Clone, Copy)]
pub struct Clock(Option<(SystemTime, tokio::time::Instant)>);

impl Clock {
    pub fn system() -> Self {
        Self(None)
    }

    /// Starts at the present wall time and runs as tokio's clock does.
    pub fn tokio() -> Self {
        Self(Some((SystemTime::now(), tokio::time::Instant::now())))
    }

    pub fn now(&self) -> SystemTime {
        match self.0 {
            None => SystemTime::now(),
            Some((base, start)) => base + start.elapsed(),
        }
    }

    /// Waits until this clock shows `due`. Sleeps in pieces, since the monotonic clock stands still while the machine is
    /// suspended and the wall clock may be set.
    pub async fn sleep_until(self, due: SystemTime) {
        while let Ok(left) = due.duration_since(self.now()) {
            if left.is_zero() {
                return;
            }
            tokio::time::sleep(left.min(Duration::from_secs(60))).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: Duration = Duration::from_secs(86_400);

    #[test]
    fn a_certificate_is_renewed_at_half_its_life_give_or_take_ten_percent() {
        let obtained = SystemTime::UNIX_EPOCH + DAY * 20_000;
        let after = |random| renew_at(obtained, obtained + DAY, random).duration_since(obtained).unwrap();
        assert_eq!(after(0.5).as_secs(), 12 * 3600);
        assert_eq!(after(0.0).as_secs(), 12 * 3600 * 9 / 10);
        assert_eq!(after(1.0).as_secs(), 12 * 3600 * 11 / 10);
    }

    #[test]
    fn a_certificate_that_came_expired_is_due_at_once() {
        let obtained = SystemTime::UNIX_EPOCH + DAY;
        assert_eq!(renew_at(obtained, SystemTime::UNIX_EPOCH, 0.9), obtained);
    }

    #[test]
    fn the_waits_double_from_one_second_to_one_minute_and_are_spread() {
        let longest: Vec<u64> = (1..9).map(|n| backoff(n, 1.0).as_secs()).collect();
        assert_eq!(longest, [2, 4, 8, 16, 32, 60, 60, 60]);
        let shortest: Vec<u64> = (1..9).map(|n| backoff(n, 0.0).as_secs()).collect();
        assert_eq!(shortest, [1, 2, 4, 8, 16, 30, 30, 30]);
        assert_eq!(backoff(u32::MAX, 1.0), BACKOFF_MAX);
    }

    #[test]
    fn a_certificate_with_little_life_left_is_tried_for_more_often() {
        let left = |secs| Some(Duration::from_secs(secs));
        assert_eq!(retry_after(9, left(40_000), 1.0), BACKOFF_MAX);
        assert_eq!(retry_after(9, left(40), 1.0), Duration::from_secs(10));
        assert_eq!(retry_after(9, left(2), 1.0), BACKOFF_MIN);
        assert_eq!(retry_after(9, None, 1.0), BACKOFF_MAX);
    }

    #[test]
    fn the_standing_follows_the_clock() {
        let at = |secs| SystemTime::UNIX_EPOCH + Duration::from_secs(secs);
        let certificate = Some((at(50), at(100)));
        assert_eq!(Standing::at(at(0), None), Standing::Waiting);
        assert_eq!(Standing::at(at(49), certificate), Standing::Ready);
        assert_eq!(Standing::at(at(50), certificate), Standing::Renewing);
        assert_eq!(Standing::at(at(100), certificate), Standing::Expired);
    }
}
