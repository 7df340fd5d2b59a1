//! The certificates of this node's workloads: one task per identity asks the CA, renews, and tries again.
//! In: `ensure` and `release` from enrolment, the CA's roots. Out: `get`, without a lock, for every connection.

use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use arc_swap::{ArcSwap, ArcSwapOption};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::sign::CertifiedKey;
use tokio::runtime::Handle;
use tokio::sync::{Notify, Semaphore, watch};
use tokio::task::AbortHandle;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::bundle::{Bundle, short};
use super::rotation::{self, Clock, Standing};
use super::{Ca, CaClient, CertificateInfo, Trust, WorkloadTls, csr, tls};
use crate::model::{SpiffeId, TrustDomain};

/// A node with a thousand identities starts with this many requests at a time.
const REQUESTS_AT_A_TIME: usize = 32;

pub(super) type SignFuture<'a> =
    Pin<Box<dyn Future<Output = Result<Vec<CertificateDer<'static>>, String>> + Send + 'a>>;

/// Whoever signs: the CA in this process, or the controller's.
pub(super) trait Authority: Send + Sync + 'static {
    /// The chain for the key of `csr`, leaf first, without the root. `Err` is a sentence.
    fn sign<'a>(&'a self, identity: &'a SpiffeId, csr: &'a str, lifetime: Duration) -> SignFuture<'a>;
    /// The roots to trust; none before the first contact. What `sign` answers with chains to the roots of that moment.
    fn roots(&self) -> watch::Receiver<Option<Bundle>>;
}

#[derive(Debug, Clone)]
pub struct CertificateOptions {
    /// The mesh's own trust domain, then those whose workloads are let in as well.
    pub trust_domains: Vec<TrustDomain>,
    /// What is asked for; the CA may give less.
    pub lifetime: Duration,
    pub clock: Clock,
}

/// The certificates of this node's workloads. Cheap to clone, `Send + Sync`.
#[derive(Clone)]
pub struct Certificates {
    inner: Arc<Inner>,
}

struct Inner {
    ready: ArcSwap<HashMap<SpiffeId, Arc<WorkloadTls>>>,
    wanted: Mutex<HashMap<SpiffeId, Entry>>,
    authority: Arc<dyn Authority>,
    trust: ArcSwapOption<Trust>,
    trust_domains: Arc<[TrustDomain]>,
    /// In milliseconds.
    lifetime: AtomicU64,
    clock: Clock,
    requests: Semaphore,
    runtime: Handle,
}

struct Entry {
    leaf: Option<Leaf>,
    failures: u32,
    last_try: SystemTime,
    next_try: SystemTime,
    /// `next_try` has been moved.
    moved: Arc<Notify>,
    progress: watch::Sender<Progress>,
    task: Option<AbortHandle>,
}

/// What `ensure` waits for.
#[derive(Debug, Clone, Default)]
struct Progress {
    attempts: u64,
    problem: Option<Problem>,
}

/// Why the last try failed, and what follows from it. Kept apart, since only a new reason is worth a line in the log.
#[derive(Debug, Clone)]
struct Problem {
    reason: String,
    outlook: String,
}

impl Problem {
    fn sentence(&self) -> String {
        format!("{}; {}", self.reason, self.outlook)
    }
}

struct Leaf {
    certified: Arc<CertifiedKey>,
    serial: String,
    not_before: SystemTime,
    not_after: SystemTime,
    renew_at: SystemTime,
}

fn millis(time: Duration) -> u64 {
    time.as_millis().try_into().unwrap_or(u64::MAX)
}

impl Certificates {
    /// With the CA in this process; runs it too. Must be called on the runtime that shall do the renewing.
    pub fn embedded(ca: Arc<Ca>, options: CertificateOptions) -> Self {
        tokio::spawn(ca.clone().run());
        Self::new(ca, options)
    }

    /// With a CA elsewhere; keeps its roots fresh too. Must be called on the runtime that shall do the renewing.
    pub fn remote(client: Arc<CaClient>, options: CertificateOptions) -> Self {
        tokio::spawn(client.clone().follow_bundle());
        Self::new(client, options)
    }

    /// What is asked for from the next request on.
    pub fn set_lifetime(&self, lifetime: Duration) {
        self.inner.lifetime.store(millis(lifetime), Ordering::Relaxed);
    }

    pub(super) fn new(authority: Arc<dyn Authority>, options: CertificateOptions) -> Self {
        let inner = Arc::new(Inner {
            ready: ArcSwap::default(),
            wanted: Mutex::default(),
            authority,
            trust: ArcSwapOption::empty(),
            trust_domains: options.trust_domains.into(),
            lifetime: AtomicU64::new(millis(options.lifetime)),
            clock: options.clock,
            requests: Semaphore::new(REQUESTS_AT_A_TIME),
            runtime: Handle::current(),
        });
        // Subscribed before anything is published, so that no change falls between.
        inner.runtime.spawn(follow_roots(inner.clone(), inner.authority.roots()));
        Self { inner }
    }

    /// The present certificate of `identity`, if there is one that has not expired. Takes no lock.
    pub fn get(&self, identity: &SpiffeId) -> Option<Arc<WorkloadTls>> {
        let ready = self.inner.ready.load();
        let tls = ready.get(identity)?;
        (self.inner.clock.now() < tls.not_after).then(|| tls.clone())
    }

    /// Asks for a certificate and waits until it is there. `Err` is a sentence: what failed, when it is tried again
    /// (in the background, for as long as the identity is wanted).
    pub async fn ensure(&self, identity: &SpiffeId) -> Result<(), String> {
        let mut progress = self.want(identity);
        let before = progress.borrow().attempts;
        loop {
            if self.get(identity).is_some() {
                return Ok(());
            }
            let now = progress.borrow_and_update().clone();
            if now.attempts > before {
                let expired = || format!("the certificate of `{identity}` has expired on its way; compare the clocks");
                // Without when the next try is: that is another each time, and the reason the same.
                return Err(now.problem.map_or_else(expired, |problem| problem.reason));
            }
            let changed = progress.changed().await;
            changed.map_err(|_| format!("`{identity}` was released while its certificate was awaited"))?;
        }
    }

    /// The last pod with this identity has left: its key is dropped.
    pub fn release(&self, identity: &SpiffeId) {
        let mut wanted = self.inner.wanted();
        if let Some(task) = wanted.remove(identity).and_then(|entry| entry.task) {
            task.abort();
        }
        self.inner.ready.rcu(|ready| {
            let mut ready = HashMap::clone(ready);
            ready.remove(identity);
            ready
        });
    }

    /// All identities that are wanted here, in the order of their names.
    pub fn list(&self) -> Vec<CertificateInfo> {
        let (now, trust) = (self.inner.clock.now(), self.inner.trust());
        let roots: Vec<String> =
            trust.iter().flat_map(|t| t.bundle.fingerprints()).map(|full| short(full).to_owned()).collect();
        let wanted = self.inner.wanted();
        let mut list: Vec<CertificateInfo> = wanted
            .iter()
            .map(|(identity, entry)| {
                let leaf = entry.leaf.as_ref();
                let text = |pick: fn(&Leaf) -> String| leaf.map(pick).unwrap_or_default();
                CertificateInfo {
                    identity: identity.to_string(),
                    state: Standing::at(now, leaf.map(|l| (l.renew_at, l.not_after))).as_str().to_owned(),
                    serial: text(|l| l.serial.clone()),
                    not_before: text(|l| super::rfc3339(l.not_before)),
                    not_after: text(|l| super::rfc3339(l.not_after)),
                    roots: roots.clone(),
                    problem: entry.progress.borrow().problem.as_ref().map(Problem::sentence),
                }
            })
            .collect();
        list.sort_by(|a, b| a.identity.cmp(&b.identity));
        list
    }

    /// Makes sure that a task cares for `identity`; one that waits after a failure tries again soon.
    fn want(&self, identity: &SpiffeId) -> watch::Receiver<Progress> {
        let now = self.inner.clock.now();
        let mut wanted = self.inner.wanted();
        if let Some(entry) = wanted.get_mut(identity) {
            if entry.failures > 0 {
                entry.next_try = entry.next_try.min(entry.last_try + rotation::BACKOFF_MIN);
                entry.moved.notify_one();
            }
            return entry.progress.subscribe();
        }
        let (progress, receiver) = watch::channel(Progress::default());
        let moved = Arc::new(Notify::new());
        // The lock is held: the task's first look at the entry comes after the insertion.
        let task = self.inner.runtime.spawn(keep(self.inner.clone(), identity.clone(), moved.clone()));
        let entry = Entry {
            leaf: None,
            failures: 0,
            last_try: now,
            next_try: now,
            moved,
            progress,
            task: Some(task.abort_handle()),
        };
        wanted.insert(identity.clone(), entry);
        receiver
    }
}

/// Renews the certificate of one identity until it is released.
async fn keep(inner: Arc<Inner>, identity: SpiffeId, moved: Arc<Notify>) {
    loop {
        let Some(due) = inner.wanted().get(&identity).map(|entry| entry.next_try) else { return };
        tokio::select! {
            () = inner.clock.sleep_until(due) => {}
            () = moved.notified() => continue,
        }
        let outcome = inner.obtain(&identity).await;
        inner.settle(&identity, outcome);
    }
}

/// Gives every identity new configurations when the roots change. Connections that exist are not touched.
async fn follow_roots(inner: Arc<Inner>, mut roots: watch::Receiver<Option<Bundle>>) {
    while roots.changed().await.is_ok() {
        let now = inner.clock.now();
        let mut wanted = inner.wanted();
        let Some(trust) = inner.trust() else { continue };
        tracing::info!(roots = ?trust.bundle, "the trusted roots have changed");
        for (identity, entry) in wanted.iter_mut() {
            // What has failed may have failed for want of these roots.
            if entry.failures > 0 {
                entry.next_try = now;
                entry.moved.notify_one();
            }
            let Some(leaf) = &entry.leaf else { continue };
            // A leaf of a root that was dropped before its time: peers refuse it, so a new one is due now.
            if trust.verify(&leaf.certified.cert, now).is_err() {
                entry.next_try = now;
                entry.moved.notify_one();
            }
            if let Err(problem) = inner.publish(identity, leaf, &trust) {
                tracing::error!(%identity, %problem, "can't build the TLS configuration for the new roots");
            }
        }
    }
}

impl Inner {
    fn wanted(&self) -> MutexGuard<'_, HashMap<SpiffeId, Entry>> {
        // A panic under the lock leaves whole entries: each is changed by single assignments.
        self.wanted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is trusted at this moment, built at most once per change of the roots.
    fn trust(&self) -> Option<Arc<Trust>> {
        let bundle = self.authority.roots().borrow().clone()?;
        let known = self.trust.load_full();
        if let Some(known) = known.filter(|known| known.bundle == bundle) {
            return Some(known);
        }
        match Trust::new(bundle, self.trust_domains.clone()) {
            Ok(trust) => {
                let trust = Arc::new(trust);
                self.trust.store(Some(trust.clone()));
                Some(trust)
            }
            Err(problem) => {
                tracing::error!(%problem, "the CA's roots can't be used; the last good ones stay in force");
                self.trust.load_full()
            }
        }
    }

    /// A new key, a request, the CA's answer, checked as a peer would check it.
    async fn obtain(&self, identity: &SpiffeId) -> Result<Leaf, String> {
        let _turn = self.requests.acquire().await.map_err(|e| e.to_string())?;
        let lifetime = Duration::from_millis(self.lifetime.load(Ordering::Relaxed));
        let (key, csr) = csr::request(identity).map_err(|e| format!("can't make a key: {e}"))?;
        let chain = self.authority.sign(identity, &csr, lifetime).await?;
        let now = self.clock.now();
        let trust = self.trust().ok_or("the CA has signed but named no root; look at the controller's version")?;
        let signed_for = trust.verify(&chain, now).map_err(|e| {
            format!("the CA's answer is of no use: {}; look at the controller's clock and roots", tls::describe(&e))
        })?;
        if signed_for != *identity {
            return Err(format!("the CA has signed `{signed_for}` in answer to `{identity}`; it is not used"));
        }
        let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let key = tls::provider().key_provider.load_private_key(key).map_err(|e| e.to_string())?;
        let (serial, not_before, not_after) = {
            let (_, leaf) = X509Certificate::from_der(&chain[0]).map_err(|e| e.to_string())?;
            let validity = leaf.validity();
            (
                leaf.raw_serial_as_string(),
                super::system_time(&validity.not_before),
                super::system_time(&validity.not_after),
            )
        };
        let certified = CertifiedKey::new(chain, key);
        certified
            .keys_match()
            .map_err(|_| "the CA has signed another key than the one sent; it is not used".to_owned())?;
        let renew_at = rotation::renew_at(now, not_after, rand::random());
        Ok(Leaf { certified: Arc::new(certified), serial, not_before, not_after, renew_at })
    }

    /// Takes a certificate into use, or notes why there is none and when the next try is.
    fn settle(&self, identity: &SpiffeId, outcome: Result<Leaf, String>) {
        let now = self.clock.now();
        let mut wanted = self.wanted();
        // Released while the CA worked: the key goes no further.
        let Some(entry) = wanted.get_mut(identity) else { return };
        let outcome = outcome.and_then(|leaf| {
            let trust = self.trust().ok_or("the CA's roots are gone; look at the controller")?;
            self.publish(identity, &leaf, &trust).map_err(|e| e.to_string())?;
            Ok(leaf)
        });
        entry.last_try = now;
        let problem = match outcome {
            Ok(leaf) => {
                if entry.failures > 0 {
                    tracing::info!(%identity, "the certificate has been renewed after {} failures", entry.failures);
                }
                entry.failures = 0;
                entry.next_try = leaf.renew_at;
                entry.leaf = Some(leaf);
                None
            }
            Err(reason) => {
                entry.failures = entry.failures.saturating_add(1);
                let left = entry.leaf.as_ref().and_then(|leaf| leaf.not_after.duration_since(now).ok());
                let wait = rotation::retry_after(entry.failures, left, rand::random());
                entry.next_try = now + wait;
                let in_use = match &entry.leaf {
                    Some(leaf) if now < leaf.not_after => {
                        format!("the present one stays in use until {}", super::rfc3339(leaf.not_after))
                    }
                    Some(leaf) => format!("the last one has expired at {}", super::rfc3339(leaf.not_after)),
                    None => "there is none yet, so its connections are refused".to_owned(),
                };
                if entry.progress.borrow().problem.as_ref().is_none_or(|last| last.reason != reason) {
                    tracing::warn!(%identity, "no new certificate: {reason}; {in_use}");
                }
                let next = super::rfc3339(entry.next_try);
                Some(Problem { reason, outlook: format!("{in_use}; next try at {next}") })
            }
        };
        entry.progress.send_modify(|progress| {
            progress.attempts += 1;
            progress.problem = problem;
        });
    }

    /// Called with `wanted` locked, so that the newest leaf and the newest roots win.
    fn publish(&self, identity: &SpiffeId, leaf: &Leaf, trust: &Trust) -> Result<(), rustls::Error> {
        let tls = Arc::new(tls::workload_tls(identity, &leaf.certified, trust, leaf.not_after)?);
        self.ready.rcu(|ready| {
            let mut ready = HashMap::clone(ready);
            ready.insert(identity.clone(), tls.clone());
            ready
        });
        Ok(())
    }
}

#[cfg(test)]
mod tests;
