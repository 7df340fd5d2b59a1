//! One of the controllers leads: it alone writes. In: the Lease `nodemesh-controller`. Out: work that runs for as long as
//! this process holds the Lease, and is dropped in the middle when it does not.
//!
//! As client-go does it: a Lease is over when it has not *changed* for its duration, by this machine's own monotonic clock,
//! so that clocks may differ. The holder gives up earlier than others take over.

use std::convert::Infallible;
use std::time::{Duration, SystemTime};

use serde_json::{Value, json};
use tokio::time::Instant;

use super::Said;
use crate::api_server::{ApiError, ApiServer, Kind};
use crate::telemetry::clock::Rfc3339;

pub const LEASE: &str = "nodemesh-controller";
/// How long a Lease that is not renewed keeps the others away.
const DURATION: Duration = Duration::from_secs(15);
const RENEW: Duration = Duration::from_secs(5);
/// Without a renewal for so long the holder stops; the others wait 5 s longer.
const RENEW_LIMIT: Duration = Duration::from_secs(10);
/// How often the others look.
const LOOK: Duration = Duration::from_secs(2);

pub struct Election {
    server: ApiServer,
    namespace: String,
    /// Who we are in the Lease; no other process has the same.
    me: String,
    observed: Option<Observed>,
}

/// A version of the Lease and when it was seen first.
struct Observed {
    version: String,
    since: Instant,
}

/// What to do about a Lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Create,
    /// It is ours, free, or over.
    Take,
    Wait,
}

impl Election {
    pub fn new(server: ApiServer, namespace: &str, me: &str) -> Self {
        Self { server, namespace: namespace.to_owned(), me: me.to_owned(), observed: None }
    }

    /// Runs `work` whenever this process leads, until `stop`; then gives the Lease back.
    pub async fn run<W: Future<Output = Infallible>>(mut self, work: impl Fn() -> W, stop: impl Future<Output = ()>) {
        tokio::pin!(stop);
        loop {
            let version = tokio::select! {
                version = self.acquire() => version,
                () = &mut stop => return,
            };
            tracing::info!(holder = self.me, "this controller leads");
            let mut held = version;
            tokio::select! {
                never = work() => match never {},
                () = self.hold(&mut held) => {
                    tracing::warn!("this controller no longer leads: its Lease could not be renewed in time, or was taken");
                }
                () = &mut stop => return self.release(held).await,
            }
        }
    }

    /// The Lease as it is when it has become ours.
    async fn acquire(&mut self) -> Value {
        let mut said = Said::default();
        loop {
            match self.try_to_acquire().await {
                Ok(Some(lease)) => return lease,
                Ok(None) => said.clear(),
                // Another was faster.
                Err(ApiError::Conflict { .. }) => {}
                Err(e) => said.warn(&format!("cannot ask for the lead: {e}; it is tried again every 2 s")),
            }
            tokio::time::sleep(LOOK.mul_f64(rand::random_range(0.8..1.2))).await;
        }
    }

    async fn try_to_acquire(&mut self) -> Result<Option<Value>, ApiError> {
        let lease = self.server.get(&Kind::LEASE, &self.namespace, LEASE).await?;
        let now = Instant::now();
        match step(lease.as_ref(), &self.me, &mut self.observed, now) {
            Step::Wait => Ok(None),
            Step::Create => {
                let new = taken(None, &self.me, SystemTime::now());
                self.server.create(&Kind::LEASE, &self.namespace, &new).await.map(Some)
            }
            Step::Take => {
                let new = taken(lease.as_ref(), &self.me, SystemTime::now());
                self.server.replace(&Kind::LEASE, &self.namespace, LEASE, &new).await.map(Some)
            }
        }
    }

    /// Returns when the Lease is no longer ours.
    async fn hold(&self, lease: &mut Value) {
        let mut renewed = Instant::now();
        let mut wait = RENEW;
        loop {
            tokio::time::sleep_until((Instant::now() + wait).min(renewed + RENEW_LIMIT)).await;
            // The time of the question counts, not that of the answer.
            let asked = Instant::now();
            let limit = renewed + RENEW_LIMIT;
            if asked >= limit {
                return;
            }
            let new = taken(Some(lease), &self.me, SystemTime::now());
            let renewal = self.server.replace(&Kind::LEASE, &self.namespace, LEASE, &new);
            match tokio::time::timeout_at(limit, renewal).await {
                Ok(Ok(now)) => (*lease, renewed, wait) = (now, asked, RENEW),
                Ok(Err(ApiError::Conflict { .. } | ApiError::NotFound { .. })) => match self.is_still_ours(limit).await
                {
                    Some(now) => (*lease, wait) = (now, Duration::from_millis(100)),
                    None => return,
                },
                Ok(Err(e)) => {
                    tracing::warn!("the Lease cannot be renewed: {e}; it is tried again");
                    wait = LOOK / 2;
                }
                Err(_) => return,
            }
        }
    }

    /// Somebody has changed it (a label, for instance), or another has taken it.
    async fn is_still_ours(&self, limit: Instant) -> Option<Value> {
        let asked = self.server.get(&Kind::LEASE, &self.namespace, LEASE);
        let lease = tokio::time::timeout_at(limit, asked).await.ok()?.ok()??;
        (holder(&lease) == self.me).then_some(lease)
    }

    /// So that another need not wait until it is over.
    async fn release(&self, lease: Value) {
        let mut free = taken(Some(&lease), "", SystemTime::now());
        free["spec"]["leaseDurationSeconds"] = 1.into();
        let released = self.server.replace(&Kind::LEASE, &self.namespace, LEASE, &free);
        match tokio::time::timeout(Duration::from_secs(2), released).await {
            Ok(Ok(_)) => tracing::info!("the lead is given back"),
            Ok(Err(e)) => tracing::warn!("the lead cannot be given back: {e}; another takes it in 15 s"),
            Err(_) => tracing::warn!("the lead cannot be given back in time; another takes it in 15 s"),
        }
    }
}

fn step(lease: Option<&Value>, me: &str, observed: &mut Option<Observed>, now: Instant) -> Step {
    let Some(lease) = lease else { return Step::Create };
    let version = lease.pointer("/metadata/resourceVersion").and_then(Value::as_str).unwrap_or_default();
    let since = match observed {
        Some(known) if known.version == version => known.since,
        _ => {
            *observed = Some(Observed { version: version.to_owned(), since: now });
            now
        }
    };
    let holder = holder(lease);
    let seconds = lease.pointer("/spec/leaseDurationSeconds").and_then(Value::as_u64).unwrap_or(0);
    // A Lease of nonsense must not keep everybody away for ever.
    let lasts = Duration::from_secs(seconds.clamp(1, 3600));
    if holder.is_empty() || holder == me || now.duration_since(since) >= lasts { Step::Take } else { Step::Wait }
}

fn holder(lease: &Value) -> &str {
    lease.pointer("/spec/holderIdentity").and_then(Value::as_str).unwrap_or_default()
}

/// The Lease in the hands of `me`, renewed at `now`.
fn taken(lease: Option<&Value>, me: &str, now: SystemTime) -> Value {
    let time = Rfc3339(now).to_string();
    let mut new = lease.cloned().unwrap_or_else(|| {
        json!({
            "apiVersion": Kind::LEASE.api_version(),
            "kind": Kind::LEASE.kind,
            "metadata": {"name": LEASE, "labels": {"app.kubernetes.io/managed-by": "nodemesh"}},
            "spec": {"leaseTransitions": 0},
        })
    });
    let changes_hands = lease.is_some_and(|lease| holder(lease) != me);
    let spec = &mut new["spec"];
    if lease.is_none() || changes_hands {
        spec["acquireTime"] = time.clone().into();
    }
    if changes_hands && !me.is_empty() {
        spec["leaseTransitions"] = (spec["leaseTransitions"].as_u64().unwrap_or(0) + 1).into();
    }
    spec["holderIdentity"] = me.into();
    spec["leaseDurationSeconds"] = DURATION.as_secs().into();
    spec["renewTime"] = time.into();
    new
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lease(holder: &str, version: &str) -> Value {
        let mut lease = taken(None, holder, SystemTime::now());
        lease["metadata"]["resourceVersion"] = version.into();
        lease
    }

    #[test]
    fn another_ones_lease_is_over_when_it_has_not_changed_for_its_duration() {
        let start = Instant::now();
        let mut observed = None;
        let mut at = |seconds, version| {
            step(Some(&lease("other", version)), "me", &mut observed, start + Duration::from_secs(seconds))
        };
        // However old its renewTime is: what counts is how long it has been seen unchanged.
        assert_eq!(at(0, "1"), Step::Wait);
        assert_eq!(at(14, "1"), Step::Wait);
        assert_eq!(at(14, "2"), Step::Wait);
        assert_eq!(at(28, "2"), Step::Wait);
        assert_eq!(at(29, "2"), Step::Take);
    }

    #[test]
    fn a_lease_that_is_free_or_ours_is_taken_at_once_and_one_that_is_missing_made() {
        let now = Instant::now();
        assert_eq!(step(None, "me", &mut None, now), Step::Create);
        assert_eq!(step(Some(&lease("", "1")), "me", &mut None, now), Step::Take);
        assert_eq!(step(Some(&lease("me", "1")), "me", &mut None, now), Step::Take);
        let mut endless = lease("other", "1");
        endless["spec"]["leaseDurationSeconds"] = u64::MAX.into();
        let mut observed = None;
        assert_eq!(step(Some(&endless), "me", &mut observed, now), Step::Wait);
        assert_eq!(step(Some(&endless), "me", &mut observed, now + Duration::from_secs(3600)), Step::Take);
    }

    #[test]
    fn transitions_are_counted_and_other_fields_kept() {
        let mut first = lease("other", "7");
        first["metadata"]["labels"]["mine"] = "kept".into();
        let mine = taken(Some(&first), "me", SystemTime::now());
        assert_eq!((&mine["spec"]["leaseTransitions"], holder(&mine)), (&json!(1), "me"));
        assert_eq!(
            (&mine["metadata"]["labels"]["mine"], &mine["metadata"]["resourceVersion"]),
            (&json!("kept"), &json!("7"))
        );
        let renewed = taken(Some(&mine), "me", SystemTime::now() + Duration::from_secs(5));
        assert_eq!(renewed["spec"]["acquireTime"], mine["spec"]["acquireTime"]);
        assert_ne!(renewed["spec"]["renewTime"], mine["spec"]["renewTime"]);
        assert_eq!(renewed["spec"]["leaseTransitions"], 1);
        let free = taken(Some(&renewed), "", SystemTime::now());
        assert_eq!((&free["spec"]["leaseTransitions"], holder(&free)), (&json!(1), ""));
    }
}
