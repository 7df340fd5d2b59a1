//! Whether a request is tried again, and after which pause.

use std::time::Duration;

use http::{HeaderMap, StatusCode};

use super::matching::header;
use crate::model::http::RetryOn;

/// How a try has ended.
#[derive(Debug, Clone, Copy)]
pub enum Tried<'a> {
    /// There is no connection, so nobody has got anything.
    NotConnected,
    /// The connection ended without an answer. `begun`: some of the request was on its way.
    Reset {
        begun: bool,
    },
    /// The server says that it has not looked at it (REFUSED_STREAM, GOAWAY).
    Refused,
    /// It took longer than a try may.
    TimedOut,
    Answer {
        status: StatusCode,
        headers: &'a HeaderMap,
    },
}

pub fn is_worth_another(on: &RetryOn, tried: Tried<'_>) -> bool {
    match tried {
        Tried::NotConnected => on.connect_failure || on.reset || on.server_error || on.gateway_error,
        Tried::Reset { begun } => on.reset || on.server_error || !begun && on.reset_before_request,
        Tried::Refused => on.refused_stream || on.reset || on.server_error || on.reset_before_request,
        Tried::TimedOut => on.reset || on.server_error || on.gateway_error || on.statuses.contains(&504),
        Tried::Answer { status, headers } => {
            let code = status.as_u16();
            on.server_error && (500..600).contains(&code)
                || on.gateway_error && (502..=504).contains(&code)
                || on.retriable_4xx && code == 409
                || on.statuses.contains(&code)
                || grpc_status(headers).is_some_and(|status| on.grpc.contains(&status))
                || on.headers.iter().any(|(name, wanted)| header(&name.0, wanted, headers))
        }
    }
}

/// In the head: an answer with a body has it in its trailers, when it is too late.
fn grpc_status(headers: &HeaderMap) -> Option<u16> {
    headers.get("grpc-status")?.to_str().ok()?.parse().ok()
}

/// The pause before the `nth` retry, from 1: drawn from nothing up to (2^n - 1) times `base`, no more than ten times `base`.
/// `draw` is from 0 to 1. As Envoy's, so that many clients do not come back at once.
pub fn pause(base: Duration, nth: u32, draw: f64) -> Duration {
    let times = 2_u32.saturating_pow(nth).saturating_sub(1).min(10);
    (base * times).mul_f64(draw)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::http::{Name, ValueMatch};

    fn answer(status: u16, headers: &HeaderMap) -> Tried<'_> {
        Tried::Answer { status: StatusCode::from_u16(status).unwrap(), headers }
    }

    #[test]
    fn each_condition_covers_what_its_name_says() {
        let on = RetryOn::default;
        let none = HeaderMap::new();
        let begun = Tried::Reset { begun: true };
        let early = Tried::Reset { begun: false };
        for (on, yes, no) in [
            (
                on(),
                vec![],
                vec![Tried::NotConnected, early, begun, Tried::Refused, Tried::TimedOut, answer(503, &none)],
            ),
            (
                RetryOn { connect_failure: true, ..on() },
                vec![Tried::NotConnected],
                vec![early, begun, Tried::Refused, Tried::TimedOut, answer(503, &none)],
            ),
            (
                RetryOn { reset_before_request: true, ..on() },
                vec![early, Tried::Refused],
                vec![begun, Tried::TimedOut, answer(503, &none)],
            ),
            (RetryOn { refused_stream: true, ..on() }, vec![Tried::Refused], vec![early, begun, Tried::TimedOut]),
            (
                RetryOn { reset: true, ..on() },
                vec![Tried::NotConnected, early, begun, Tried::Refused, Tried::TimedOut],
                vec![answer(503, &none)],
            ),
            (
                RetryOn { server_error: true, ..on() },
                vec![Tried::NotConnected, begun, Tried::TimedOut, answer(500, &none), answer(599, &none)],
                vec![answer(499, &none), answer(200, &none)],
            ),
            (
                RetryOn { gateway_error: true, ..on() },
                vec![answer(502, &none), answer(503, &none), answer(504, &none), Tried::TimedOut],
                vec![answer(500, &none), answer(501, &none), answer(505, &none), begun],
            ),
            (RetryOn { retriable_4xx: true, ..on() }, vec![answer(409, &none)], vec![answer(404, &none)]),
            (
                RetryOn { statuses: vec![404, 504], ..on() },
                vec![answer(404, &none), Tried::TimedOut],
                vec![answer(405, &none), begun],
            ),
        ] {
            for tried in yes {
                assert!(is_worth_another(&on, tried), "{on:?} {tried:?}");
            }
            for tried in no {
                assert!(!is_worth_another(&on, tried), "{on:?} {tried:?}");
            }
        }
    }

    #[test]
    fn an_answers_head_may_ask_for_it() {
        let headers =
            |name: &'static str, value: &str| HeaderMap::from_iter([(name.parse().unwrap(), value.parse().unwrap())]);
        let grpc = RetryOn { grpc: vec![14], ..RetryOn::default() };
        assert!(is_worth_another(&grpc, answer(200, &headers("grpc-status", "14"))));
        assert!(!is_worth_another(&grpc, answer(200, &headers("grpc-status", "5"))));
        assert!(!is_worth_another(&grpc, answer(200, &headers("grpc-status", "x"))));
        let named = vec![(Name::new("x-again").unwrap(), ValueMatch::Present)];
        let on = RetryOn { headers: named, ..RetryOn::default() };
        assert!(is_worth_another(&on, answer(200, &headers("x-again", ""))));
        assert!(!is_worth_another(&on, answer(200, &headers("x-other", ""))));
    }

    #[test]
    fn pauses_double_up_to_ten_times_and_are_spread() {
        let base = Duration::from_millis(25);
        let longest: Vec<_> = (1..=6).map(|nth| pause(base, nth, 1.0).as_millis()).collect();
        assert_eq!(longest, [25, 75, 175, 250, 250, 250]);
        assert_eq!(pause(base, 3, 0.0), Duration::ZERO);
        assert_eq!(pause(base, u32::MAX, 0.5), base * 5);
    }
}
