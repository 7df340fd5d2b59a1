//! One at a time: who installs, upgrades or removes the mesh holds the Lease `nodemesh-meshctl` meanwhile. Two at once would undo
//! each other's half, and neither could say what became of it.
//!
//! Times are the API server's, which all who ask have in common. One that has died is waited for no longer than its Lease lasts.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use super::{Access, check};
use crate::api_server::{ApiError, ApiServer, Kind, ServerClock};
use crate::cli::exit::Failure;
use crate::cli::meshctl::layout::age;
use crate::lifecycle::Signals;
use crate::telemetry::clock::{Rfc3339, parse_rfc3339};

const LEASE: &str = "nodemesh-meshctl";
/// On the Lease: what its holder does.
const COMMAND: &str = "nodemesh.io/command";
/// How long one that has died keeps others away.
const LASTS: Duration = Duration::from_secs(120);
const RENEW: Duration = Duration::from_secs(30);

/// The right to change the installation.
pub(super) struct Turn {
    server: ApiServer,
    namespace: String,
    clock: Option<ServerClock>,
    lease: Value,
}

impl Turn {
    /// Fails where somebody else has it, with who that is. The mesh's namespace must be there.
    pub(super) async fn take(server: &ApiServer, access: &Access, command: &str) -> anyhow::Result<Self> {
        let namespace = access.namespace.as_str();
        let clock = server.clock().await?;
        let now = now(clock);
        let there = server.get(&Kind::LEASE, namespace, LEASE).await?;
        if let Some(why) = there.as_ref().and_then(|lease| held(lease, now)) {
            return Err(Failure::unavailable(why).into());
        }
        let new = taken(there.as_ref(), &holder(), command, now);
        let made = match there {
            None => server.create(&Kind::LEASE, namespace, &new).await,
            Some(_) => server.replace(&Kind::LEASE, namespace, LEASE, &new).await,
        };
        match made {
            Ok(lease) => Ok(Self { server: server.clone(), namespace: namespace.to_owned(), clock, lease }),
            // Another was faster.
            Err(ApiError::Conflict { .. }) => {
                let there = server.get(&Kind::LEASE, namespace, LEASE).await?.unwrap_or_default();
                let why =
                    held(&there, now).unwrap_or_else(|| "another meshctl has just begun; run this again".to_owned());
                Err(Failure::unavailable(why).into())
            }
            Err(ApiError::NotFound { .. }) => Err(Failure::usage(format!(
                "there is no namespace {namespace}; make it, or let meshctl do so with --set namespace.create=true"
            ))
            .into()),
            Err(e) => Err(e.into()),
        }
    }

    /// Does the work, and gives the turn back however it ends.
    pub(super) async fn during(mut self, work: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
        let mut signals = Signals::new()?;
        let result = tokio::select! {
            result = work => result,
            lost = self.hold() => Err(lost.into()),
            stop = signals.recv() => {
                // The work was dropped in the middle, perhaps while a pod of its looked at a node.
                check::forget(&self.server, &self.namespace).await?;
                Err(Failure::unavailable(format!(
                    "stopped by {}; what was done stays, and what the cluster has begun goes on: run this again to end it",
                    stop.name()
                ))
                .into())
            }
        };
        let given_back = self.server.delete(&Kind::LEASE, &self.namespace, LEASE).await;
        match (result, given_back) {
            (Ok(()), Err(e)) => Err(e.into()),
            (result, _) => result,
        }
    }

    /// Renews it; returns when another has it.
    async fn hold(&mut self) -> Failure {
        loop {
            tokio::time::sleep(RENEW).await;
            let mut new = self.lease.clone();
            new["spec"]["renewTime"] = Rfc3339(now(self.clock)).to_string().into();
            match self.server.replace(&Kind::LEASE, &self.namespace, LEASE, &new).await {
                Ok(lease) => self.lease = lease,
                Err(ApiError::Conflict { .. }) => {
                    let there = self.server.get(&Kind::LEASE, &self.namespace, LEASE).await;
                    match there {
                        // A label, for instance.
                        Ok(Some(there)) if holder_of(&there) == holder_of(&self.lease) => self.lease = there,
                        Ok(Some(there)) => {
                            return Failure::unavailable(format!(
                                "{} has taken over, since nothing was heard of this one; it was stopped",
                                holder_of(&there)
                            ));
                        }
                        _ => {}
                    }
                }
                // The namespace goes at the end of an uninstallation; an API server that is away is the work's to tell.
                Err(_) => {}
            }
        }
    }
}

fn now(clock: Option<ServerClock>) -> SystemTime {
    clock.map_or_else(SystemTime::now, |clock| clock.earliest(Instant::now()))
}

/// Who this is, for people to ask.
fn holder() -> String {
    let user = std::env::var("USER").or_else(|_| std::env::var("LOGNAME")).unwrap_or_else(|_| "somebody".to_owned());
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    format!("{user}@{host} (PID {})", std::process::id())
}

fn holder_of(lease: &Value) -> &str {
    lease["spec"]["holderIdentity"].as_str().unwrap_or_default()
}

fn seconds(time: SystemTime) -> i64 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs().try_into().unwrap_or(i64::MAX)
}

/// Why it can't be had now. A Lease of nonsense keeps nobody away.
fn held(lease: &Value, now: SystemTime) -> Option<String> {
    let spec = &lease["spec"];
    let renewed = parse_rfc3339(spec["renewTime"].as_str()?)?;
    let lasts = spec["leaseDurationSeconds"].as_i64()?.clamp(1, 3600);
    let rest = u64::try_from(renewed + lasts - seconds(now)).ok().filter(|rest| *rest > 0)?;
    let since = parse_rfc3339(spec["acquireTime"].as_str().unwrap_or_default()).unwrap_or(renewed);
    let since = u64::try_from(seconds(now) - since).unwrap_or_default();
    let command = lease["metadata"]["annotations"][COMMAND].as_str().unwrap_or("meshctl");
    let holder = Some(holder_of(lease)).filter(|holder| !holder.is_empty())?;
    Some(format!(
        "nothing was changed: {holder} runs `{command}` on this mesh, for {} now; wait for it, or, if it has died, run \
         this again in {}",
        age(since),
        age(rest)
    ))
}

fn taken(lease: Option<&Value>, me: &str, command: &str, now: SystemTime) -> Value {
    let time = Rfc3339(now).to_string();
    let mut new = lease.cloned().unwrap_or_else(|| {
        json!({
            "apiVersion": Kind::LEASE.api_version(),
            "kind": Kind::LEASE.kind,
            "metadata": {"name": LEASE, "labels": {"app.kubernetes.io/managed-by": "meshctl"}},
        })
    });
    new["metadata"]["annotations"][COMMAND] = command.into();
    new["spec"] = json!({
        "holderIdentity": me, "leaseDurationSeconds": LASTS.as_secs(), "acquireTime": time, "renewTime": time,
    });
    new
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(1_000_000 + seconds)
    }

    #[test]
    fn who_runs_is_told_until_the_lease_is_over() {
        let mut lease = taken(None, "jo@pc (PID 7)", "meshctl upgrade", at(0));
        let why = held(&lease, at(60)).unwrap();
        assert!(why.contains("jo@pc (PID 7) runs `meshctl upgrade` on this mesh, for 1m now"), "{why}");
        assert!(why.contains("again in 1m"), "{why}");
        assert_eq!(held(&lease, at(120)), None, "it has died");
        lease["spec"]["renewTime"] = Rfc3339(at(90)).to_string().into();
        assert!(held(&lease, at(120)).is_some_and(|why| why.contains("for 2m now")), "it was renewed");
    }

    #[test]
    fn a_lease_of_nonsense_keeps_nobody_away() {
        for spec in [
            json!({}),
            json!({"holderIdentity": "", "renewTime": "1970-01-12T13:46:40Z", "leaseDurationSeconds": 60}),
            json!({"holderIdentity": "x", "renewTime": "soon", "leaseDurationSeconds": 60}),
            json!({"holderIdentity": "x", "renewTime": "1970-01-12T13:46:40Z"}),
        ] {
            assert_eq!(held(&json!({"spec": spec}), at(1)), None, "{spec}");
        }
    }

    #[test]
    fn a_lease_that_is_over_is_taken_with_its_version() {
        let old = json!({"metadata": {"name": LEASE, "resourceVersion": "5"}, "spec": {"holderIdentity": "a"}});
        let new = taken(Some(&old), "b", "meshctl install", at(0));
        assert_eq!((holder_of(&new), &new["metadata"]["resourceVersion"]), ("b", &json!("5")));
    }
}
