//! The API server's clock: the one by which the machines of a cluster can be compared. In: the `Date` of an answer, which has
//! whole seconds. Out: between which times it was there when something happened here.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Read once; from then on this machine's monotonic clock counts.
#[derive(Debug, Clone, Copy)]
pub struct ServerClock {
    second: SystemTime,
    /// Between these it was that second there.
    asked: Instant,
    answered: Instant,
}

impl ServerClock {
    /// `None` where `date` is none as HTTP has them.
    pub(super) fn new(date: &str, asked: Instant, answered: Instant) -> Option<Self> {
        Some(Self { second: parse(date)?, asked, answered })
    }

    /// It was not earlier than this.
    pub fn earliest(&self, at: Instant) -> SystemTime {
        self.second + at.saturating_duration_since(self.answered)
    }

    /// It was not later than this.
    pub fn latest(&self, at: Instant) -> SystemTime {
        self.second + Duration::from_secs(1) + at.saturating_duration_since(self.asked)
    }
}

/// `Sun, 06 Nov 1994 08:49:37 GMT` (RFC 9110, 5.6.7); the two older forms are not spoken by any API server.
fn parse(text: &str) -> Option<SystemTime> {
    const MONTHS: [&str; 12] = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let words: Vec<&str> = text.split(' ').collect();
    let [_, day, month, year, time, "GMT"] = words[..] else { return None };
    let month = MONTHS.iter().position(|name| *name == month)? + 1;
    let seconds = crate::telemetry::clock::parse_rfc3339(&format!("{year}-{month}-{day}T{time}Z"))?;
    Some(UNIX_EPOCH + Duration::from_secs(seconds.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_date_of_http_is_read() {
        let read = |text: &str| parse(text).map(|time| time.duration_since(UNIX_EPOCH).unwrap().as_secs());
        assert_eq!(read("Sun, 06 Nov 1994 08:49:37 GMT"), Some(784_111_777));
        for wrong in
            ["", "Sun, 06 Nov 1994 08:49:37 CET", "Sunday, 06-Nov-94 08:49:37 GMT", "Sun, 06 Foo 1994 08:49:37 GMT"]
        {
            assert_eq!(read(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn what_is_not_known_of_the_time_lies_between_two() {
        let asked = Instant::now();
        let (answered, later) = (asked + Duration::from_millis(200), asked + Duration::from_secs(10));
        let clock = ServerClock::new("Sun, 06 Nov 1994 08:49:37 GMT", asked, answered).unwrap();
        let second = UNIX_EPOCH + Duration::from_secs(784_111_777);
        assert_eq!(clock.earliest(later), second + Duration::from_millis(9800));
        assert_eq!(clock.latest(later), second + Duration::from_secs(11));
    }
}
