//! What is done beside the routing of a request: copies, faults, other origins, time, second tries.

use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;

use super::{Name, Target, Value, ValueMatch};

/// A share of all requests, in millionths.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct Fraction(u32);

/// A copy of a request whose answer nobody waits for. Never slows or fails the request itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Mirror {
    pub target: Target,
    pub share: Fraction,
}

/// What goes wrong on purpose. The delay comes first; each is drawn on its own.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct Fault {
    pub delay: Option<(Fraction, Duration)>,
    pub abort: Option<(Fraction, Abort)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Abort {
    Status(u16),
    /// With HTTP status 200 and no body, as gRPC has it.
    Grpc(u16),
}

/// Cross-Origin Resource Sharing, as the Fetch standard has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Cors {
    pub origins: Vec<ValueMatch>,
    /// The values of the headers that answer a preflight; `None` leaves the header away. With `credentials` a browser takes
    /// `*` for a name: the answer then repeats what the preflight asks for, and leaves the header away where it asks nothing.
    pub methods: Option<Value>,
    pub headers: Option<Value>,
    pub max_age: Option<Value>,
    pub expose: Option<Value>,
    pub credentials: bool,
    pub unmatched: Preflight,
}

/// What becomes of a preflight from an origin that is not allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Preflight {
    /// The server answers it.
    #[default]
    Forward,
    /// It is answered here, without a word of permission.
    Answer,
}

/// Absent means no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Timeouts {
    /// From the end of the request's head to the end of the response, second tries included: then 504.
    pub request: Option<Duration>,
    /// One try, from its begin to the end of the response.
    pub backend: Option<Duration>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Retry {
    /// Tries after the first.
    pub attempts: u32,
    pub on: RetryOn,
    /// For each try, the first among them. The stricter of it and `Timeouts::backend` counts.
    pub per_try: Option<Duration>,
    /// The longest pause before the first retry; it doubles each time, up to ten times of it. The pause is drawn between
    /// `least` and that.
    pub backoff: Duration,
    /// No pause is shorter. The Gateway API's; Istio has none.
    pub least: Duration,
    /// Whether an endpoint that was tried may be tried again while there are others.
    pub previous_hosts: bool,
}

/// After what a request is tried again: one of them is enough.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct RetryOn {
    /// No connection could be made.
    pub connect_failure: bool,
    /// The connection ended without an answer, or the try took too long.
    pub reset: bool,
    /// The connection ended before the request had been sent.
    pub reset_before_request: bool,
    /// HTTP/2's REFUSED_STREAM: the server says that it has not looked at it.
    pub refused_stream: bool,
    /// All of 500 to 599, and an answer that did not come.
    pub server_error: bool,
    /// 502, 503, 504.
    pub gateway_error: bool,
    /// 409.
    pub retriable_4xx: bool,
    pub statuses: Vec<u16>,
    /// gRPC's codes, where the answer has them in its head.
    pub grpc: Vec<u16>,
    /// An answer that has this header.
    pub headers: Vec<(Name, ValueMatch)>,
}

/// Requests of one client go to one endpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Persistence {
    pub kind: PersistenceKind,
    /// Of the cookie or header.
    pub name: Arc<str>,
    /// It holds for no longer than this.
    pub absolute: Option<Duration>,
    /// It ends where nothing was asked for so long.
    pub idle: Option<Duration>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum PersistenceKind {
    /// Until the browser forgets it.
    SessionCookie,
    /// For as long as `absolute`.
    PermanentCookie,
    Header,
}

impl Fraction {
    pub const ALL: Self = Self(1_000_000);

    /// `None` where it is no share: `part` greater than `of`, or `of` nothing.
    pub fn new(part: u32, of: u32) -> Option<Self> {
        (of > 0 && part <= of).then(|| Self((u64::from(part) * 1_000_000 / u64::from(of)) as u32))
    }

    /// `None` for what is not between 0 and 100.
    pub fn percent(percent: f64) -> Option<Self> {
        (0.0..=100.0).contains(&percent).then_some(Self((percent * 10_000.0).round() as u32))
    }

    pub fn millionths(self) -> u32 {
        self.0
    }
}
