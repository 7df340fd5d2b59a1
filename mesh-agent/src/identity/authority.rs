//! The CA: which roots are trusted, which one signs, and the change from one to the next, persisted.
//! In: a state directory, the user's PEM files, or a Secret that somebody else keeps. Out: signed chains, and the trust bundle as it changes.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use rcgen::PublicKeyData;
use rustls::pki_types::CertificateDer;
use tokio::sync::{Notify, watch};

use super::certificates::{Authority, SignFuture};
use super::csr::{CsrError, VerifiedCsr};
use super::issuer::{CA_CERT, CERT_CHAIN, INTERMEDIATE_LIFE, IssuerError, ROOT_CERT, ROOT_LIFE, SigningCa};
use super::material::Material;
use super::root_rotation::{Pace, Phases};
use super::{Bundle, BundleError, Clock, Document};
use crate::lifecycle::files::{self, FileError};
use crate::model::{SpiffeId, TrustDomain};

/// A shorter life would be spent on renewing.
pub const MIN_LIFETIME: Duration = Duration::from_secs(10);
pub const DEFAULT_LIFETIME: Duration = Duration::from_secs(24 * 3600);

const STATE: &str = "state.json";
const LOCK: &str = "lock";

#[derive(Debug, Clone)]
pub struct CaOptions {
    /// Where the root, the intermediate and the phase of a root's change are kept.
    pub state_dir: PathBuf,
    /// The user's own CA: a directory with ca-cert.pem, ca-key.pem, cert-chain.pem and root-cert.pem.
    pub brought: Option<PathBuf>,
    pub trust_domain: TrustDomain,
    /// The longest life of a leaf, and what is given where nothing is asked for.
    pub lifetime: Duration,
    /// The shortest time for which a new root is trusted before it signs; several times the nodes' interval of asking.
    pub announce: Duration,
    /// How long an old root stays trusted after the switch; a leaf's life, where not set.
    pub retire: Option<Duration>,
    pub clock: Clock,
}

impl CaOptions {
    pub fn new(state_dir: impl Into<PathBuf>, trust_domain: TrustDomain) -> Self {
        Self {
            state_dir: state_dir.into(),
            brought: None,
            trust_domain,
            lifetime: DEFAULT_LIFETIME,
            announce: Duration::from_secs(600),
            retire: None,
            clock: Clock::system(),
        }
    }

    fn pace(&self) -> Pace {
        Pace { announce: self.announce, give_up: self.lifetime, retire: self.retire.unwrap_or(self.lifetime) }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum CaError {
    #[error(transparent)]
    Issuer(#[from] IssuerError),
    #[error(transparent)]
    File(#[from] FileError),
    #[error("a certificate's lifetime of {} s is too short; set at least {} s", .0.as_secs(), MIN_LIFETIME.as_secs())]
    Lifetime(Duration),
    #[error("{}: another process runs this CA; stop it, or give each its own state directory", .0.display())]
    Locked(PathBuf),
    #[error("no controller runs on {}; start it, let its nodes report for two minutes, and ask again", .0.display())]
    NoController(PathBuf),
    #[error("{}: it can't be read ({problem}); restore it from a backup, or remove the directory to begin with a new root", path.display())]
    State { path: PathBuf, problem: String },
    #[error(
        "{place}: it can't be read ({problem}); restore it from a backup, or delete the Secret to begin with a new root"
    )]
    SecretState { place: String, problem: String },
    #[error(
        "{0}: root-key.pem does not belong to root-cert.pem; if you have brought a CA of your own, remove its keys state.json and root-key.pem"
    )]
    LaidOver(String),
    #[error("the roots of the CA can't be used together: {0}")]
    Bundle(#[from] BundleError),
    #[error(
        "the root was brought by you, so it is changed by you: add the new root to root-cert.pem, restart, and swap the key when all nodes have it"
    )]
    Brought,
    #[error("a change of the root is under way (generation {0}); wait until it is done")]
    UnderWay(u64),
    #[error(transparent)]
    Request(#[from] CsrError),
    #[error("can't sign: {0}")]
    Sign(#[from] rcgen::Error),
    #[error("the CA's certificate in {0} has expired; bring a new one or look why it was not renewed")]
    Expired(String),
}

/// The CA. One per mesh; inside the controller, or inside the only node.
pub struct Ca {
    options: CaOptions,
    inner: Mutex<Inner>,
    roots: watch::Sender<Option<Bundle>>,
    /// The phases have changed: `run` looks again.
    changed: Notify,
    running: AtomicBool,
    keeper: Keeper,
    /// The longest life of a leaf from now on, in milliseconds.
    lifetime: AtomicU64,
}

/// Who writes what has to survive.
enum Keeper {
    /// This CA, which holds the directory's lock for as long as it lives.
    Directory { _lock: File },
    /// Whoever calls `take`: `Document` says what is to be written.
    Secret,
}

struct Inner {
    phases: Phases,
    generations: BTreeMap<u64, Arc<SigningCa>>,
    /// When each node was heard from last.
    nodes: BTreeMap<String, SystemTime>,
}

impl Ca {
    /// Opens the CA, or makes one where there is none. Everything is checked before anything is signed.
    pub fn open(options: CaOptions) -> Result<Arc<Self>, CaError> {
        if options.lifetime < MIN_LIFETIME {
            return Err(CaError::Lifetime(options.lifetime));
        }
        let now = options.clock.now();
        files::create_private_dir(&options.state_dir)?;
        let lock = lock(&options.state_dir.join(LOCK))?;
        let (phases, generations) = match &options.brought {
            Some(dir) => {
                let ca = SigningCa::load(dir, &options.trust_domain, now)?;
                (Phases::first(), BTreeMap::from([(1, Arc::new(ca))]))
            }
            None => open_own(&options, now)?,
        };
        let inner = Inner { phases, generations, nodes: BTreeMap::new() };
        let roots = watch::Sender::new(Some(bundle(&inner)?));
        let (changed, running) = (Notify::new(), AtomicBool::new(false));
        let keeper = Keeper::Directory { _lock: lock };
        let lifetime = AtomicU64::new(millis(options.lifetime));
        let ca = Self { options, inner: Mutex::new(inner), roots, changed, running, keeper, lifetime };
        ca.advance()?;
        Ok(Arc::new(ca))
    }

    /// The CA of a Secret. It writes nothing: its renewals are those of `Document::next`.
    pub fn of_secret(document: &Document, options: CaOptions) -> Result<Arc<Self>, CaError> {
        let (phases, generations) = document.open(&options.trust_domain, options.clock.now())?;
        let inner = Inner { phases, generations, nodes: BTreeMap::new() };
        let roots = watch::Sender::new(Some(bundle(&inner)?));
        let (changed, running) = (Notify::new(), AtomicBool::new(false));
        let (keeper, lifetime) = (Keeper::Secret, AtomicU64::new(millis(options.lifetime)));
        Ok(Arc::new(Self { options, inner: Mutex::new(inner), roots, changed, running, keeper, lifetime }))
    }

    /// Goes over to what the Secret holds now. What is broken changes nothing.
    pub fn take(&self, document: &Document) -> Result<(), CaError> {
        let (phases, generations) = document.open(&self.options.trust_domain, self.options.clock.now())?;
        let next = Inner { phases, generations, nodes: BTreeMap::new() };
        let bundle = bundle(&next)?;
        let signing = super::bundle::sha256_hex(&next.signing().roots[0]);
        if !self.bundle().contains(&signing) {
            tracing::warn!(
                root = %signing,
                "the CA signs with a root that was not announced: until nodes have asked for the roots, they refuse its \
                 certificates; add a root to root-cert.pem first, and swap the key later"
            );
        }
        *self.inner() = next;
        self.publish(bundle);
        Ok(())
    }

    /// Whether another process runs the CA of this state directory. Makes none where there is none.
    pub fn is_running(state_dir: &Path) -> Result<bool, CaError> {
        let path = state_dir.join(LOCK);
        match path.exists().then(|| lock(&path)) {
            None | Some(Ok(_)) => Ok(false),
            Some(Err(CaError::Locked(_))) => Ok(true),
            Some(Err(error)) => Err(error),
        }
    }

    pub fn trust_domain(&self) -> &TrustDomain {
        &self.options.trust_domain
    }

    pub fn clock(&self) -> Clock {
        self.options.clock
    }

    /// The roots that are trusted now, the one that signs first.
    pub fn bundle(&self) -> Bundle {
        self.roots.borrow().clone().expect("a CA always has a root: it is set when opened and never taken away")
    }

    /// The same as it changes.
    pub fn trusted(&self) -> watch::Receiver<Option<Bundle>> {
        self.roots.subscribe()
    }

    /// The chain for a workload, leaf first, without the root. The caller has decided that it may have it.
    pub fn sign_workload(
        &self,
        key: &impl PublicKeyData,
        identity: &SpiffeId,
        lifetime: Option<Duration>,
    ) -> Result<Vec<CertificateDer<'static>>, CaError> {
        let (ca, now) = self.active()?;
        let longest = self.lifetime();
        let lifetime = lifetime.unwrap_or(longest).clamp(MIN_LIFETIME, longest);
        Ok(ca.sign_workload(key, identity, lifetime, now)?)
    }

    /// The chain for the controller's own port, leaf first, without the root, and when it expires.
    pub fn sign_server(
        &self,
        key: &impl PublicKeyData,
        names: &[String],
    ) -> Result<(Vec<CertificateDer<'static>>, SystemTime), CaError> {
        let (ca, now) = self.active()?;
        let lifetime = self.lifetime();
        let not_after = (now + lifetime).min(ca.not_after());
        Ok((ca.sign_server(key, names, lifetime, now)?, not_after))
    }

    /// The longest life of what is signed from now on. Whoever writes the Secret keeps an old root for as long as it takes.
    pub fn set_lifetime(&self, lifetime: Duration) {
        self.lifetime.store(millis(lifetime.max(MIN_LIFETIME)), Ordering::Relaxed);
    }

    fn lifetime(&self) -> Duration {
        Duration::from_millis(self.lifetime.load(Ordering::Relaxed))
    }

    fn active(&self) -> Result<(Arc<SigningCa>, SystemTime), CaError> {
        let (inner, now) = (self.inner(), self.options.clock.now());
        let ca = inner.signing().clone();
        if ca.not_after() <= now { Err(CaError::Expired(ca.material.place(CA_CERT))) } else { Ok((ca, now)) }
    }

    /// Begins the change to a new root, and answers with its fingerprint. Nothing that is connected notices.
    pub fn rotate_root(&self) -> Result<String, CaError> {
        if self.options.brought.is_some() || matches!(self.keeper, Keeper::Secret) {
            return Err(CaError::Brought);
        }
        let mut inner = self.inner();
        if let Some(next) = &inner.phases.announced {
            return Err(CaError::UnderWay(next.generation));
        }
        self.announce_root(&mut inner)
    }

    fn announce_root(&self, inner: &mut Inner) -> Result<String, CaError> {
        let now = self.options.clock.now();
        let number = inner.phases.next_number();
        let dir = generation_dir(&self.options.state_dir, number);
        SigningCa::create(&dir, &self.options.trust_domain, now)?;
        let ca = SigningCa::load(&dir, &self.options.trust_domain, now)?;
        let fingerprint = super::bundle::sha256_hex(&ca.roots[0]);
        let heard = |at: &SystemTime| now.duration_since(*at).unwrap_or_default() < self.options.lifetime;
        let nodes: BTreeSet<String> = inner.nodes.iter().filter(|(_, at)| heard(at)).map(|(n, _)| n.clone()).collect();
        let mut phases = inner.phases.clone();
        phases.announce(number, nodes, now);
        inner.generations.insert(number, Arc::new(ca));
        self.adopt(inner, phases)?;
        tracing::info!(root = %fingerprint, "a new root is announced; it signs when all nodes trust it");
        Ok(fingerprint)
    }

    /// `node` trusts the roots with these fingerprints.
    pub fn heard_from(&self, node: &str, trusted: &[String]) -> Result<(), CaError> {
        let now = self.options.clock.now();
        let mut inner = self.inner();
        inner.nodes.insert(node.to_owned(), now);
        // Another controller may be the one that others ask: nobody's word counts there, only time.
        if matches!(self.keeper, Keeper::Secret) {
            return Ok(());
        }
        let Some(next) = &inner.phases.announced else { return Ok(()) };
        let root = super::bundle::sha256_hex(&inner.generations[&next.generation].roots[0]);
        let mut phases = inner.phases.clone();
        if phases.heard_from(node, trusted.contains(&root)) {
            self.adopt(&mut inner, phases)?;
        }
        Ok(())
    }

    /// `node` has got a certificate. One that never says what it trusts, such as Istio's ztunnel, is waited for as long as
    /// a certificate lives: by then each of its certificates has come with both roots.
    pub fn has_signed_for(&self, node: &str) {
        let now = self.options.clock.now();
        self.inner().nodes.insert(node.to_owned(), now);
    }

    /// The nodes that have asked for anything since the start, in the order of their names.
    pub fn nodes(&self) -> Vec<String> {
        self.inner().nodes.keys().cloned().collect()
    }

    /// Does what is due: the phases of a root's change, a new intermediate when a third of its life is left, a new root when
    /// a tenth is. What the user has brought is only watched.
    pub fn advance(&self) -> Result<(), CaError> {
        if matches!(self.keeper, Keeper::Secret) {
            return Ok(());
        }
        let now = self.options.clock.now();
        let mut inner = self.inner();
        if self.options.brought.is_some() {
            let (ca, month) = (inner.signing(), Duration::from_secs(30 * 86_400));
            if now + month >= ca.not_after() {
                let at = super::rfc3339(ca.not_after());
                tracing::warn!(dir = %ca.material.home(), "the CA that you have brought expires at {at}; bring a new one");
            }
            return Ok(());
        }
        let mut phases = inner.phases.clone();
        if phases.advance(now, self.options.pace()) {
            tracing::info!(signing = phases.active, trusted = ?phases.trusted(), "the change of the root goes on");
            self.adopt(&mut inner, phases)?;
        }
        let old = inner.signing().clone();
        if now + INTERMEDIATE_LIFE / 3 >= old.chain_not_after {
            let mut phases = inner.phases.clone();
            let number = phases.next_number();
            let dir = generation_dir(&self.options.state_dir, number);
            SigningCa::create_under(&dir, &old.material, &self.options.trust_domain, now)?;
            let ca = SigningCa::load(&dir, &self.options.trust_domain, now)?;
            // The root is the same, so nobody has to learn anything first.
            phases.active = number;
            inner.generations.insert(number, Arc::new(ca));
            self.adopt(&mut inner, phases)?;
            tracing::info!("the intermediate has been renewed");
        }
        if inner.phases.announced.is_none() && now + ROOT_LIFE / 10 >= inner.signing().root_not_after {
            self.announce_root(&mut inner)?;
        }
        Ok(())
    }

    /// Runs `advance` whenever it is due. A second call beside the first comes back at once.
    pub async fn run(self: Arc<Self>) {
        if self.running.swap(true, Ordering::AcqRel) {
            return;
        }
        let _running = Running(&self.running);
        loop {
            if let Err(problem) = self.advance() {
                tracing::error!(%problem, "the CA can't go on with its own renewal; it is tried again in an hour");
            }
            let hour = self.options.clock.now() + Duration::from_secs(3600);
            let due = self.inner().phases.due(self.options.pace()).map_or(hour, |due| due.min(hour));
            // Not before a second has passed: a failure of `advance` leaves its step due.
            let due = due.max(self.options.clock.now() + Duration::from_secs(1));
            tokio::select! {
                () = self.options.clock.sleep_until(due) => {}
                () = self.changed.notified() => {}
            }
        }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Persists `phases`, then acts on them: what is not on the disk has not happened.
    fn adopt(&self, inner: &mut Inner, phases: Phases) -> Result<(), CaError> {
        write_phases(&self.options.state_dir, &phases)?;
        inner.phases = phases;
        let trusted = inner.phases.trusted();
        let dropped: Vec<u64> = inner.generations.keys().copied().filter(|number| !trusted.contains(number)).collect();
        for number in dropped {
            inner.generations.remove(&number);
            remove_generation(&self.options.state_dir, number);
        }
        self.publish(bundle(inner)?);
        self.changed.notify_one();
        Ok(())
    }

    fn publish(&self, bundle: Bundle) {
        self.roots.send_if_modified(|known| {
            let news = known.as_ref() != Some(&bundle);
            // The order may have changed even where the set has not.
            *known = Some(bundle);
            news
        });
    }
}

/// Takes the mark away also where `run` is dropped in the middle.
struct Running<'a>(&'a AtomicBool);

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

impl Inner {
    fn signing(&self) -> &Arc<SigningCa> {
        self.generations.get(&self.phases.active).expect("the active generation is loaded before it becomes active")
    }
}

impl Authority for Ca {
    fn sign<'a>(&'a self, identity: &'a SpiffeId, csr: &'a str, lifetime: Duration) -> SignFuture<'a> {
        Box::pin(async move {
            let request = VerifiedCsr::from_pem(csr).map_err(|e| e.to_string())?;
            self.sign_workload(&request.key, identity, Some(lifetime)).map_err(|e| e.to_string())
        })
    }

    fn roots(&self) -> watch::Receiver<Option<Bundle>> {
        self.roots.subscribe()
    }
}

fn millis(time: Duration) -> u64 {
    time.as_millis().try_into().unwrap_or(u64::MAX)
}

fn bundle(inner: &Inner) -> Result<Bundle, BundleError> {
    let trusted = inner.phases.trusted();
    Bundle::new(
        trusted.iter().filter_map(|number| inner.generations.get(number)).flat_map(|ca| ca.roots.iter().cloned()),
    )
}

fn generation_dir(state_dir: &Path, number: u64) -> PathBuf {
    state_dir.join(format!("ca-{number}"))
}

fn remove_generation(state_dir: &Path, number: u64) {
    let dir = generation_dir(state_dir, number);
    if let Err(problem) = fs::remove_dir_all(&dir) {
        tracing::warn!(dir = %dir.display(), %problem, "an old generation of the CA can't be removed; remove it by hand");
    }
}

fn write_phases(state_dir: &Path, phases: &Phases) -> Result<(), FileError> {
    let text = serde_json::to_vec_pretty(phases).expect("phases are plain data");
    files::write_private(&state_dir.join(STATE), &text)
}

fn lock(path: &Path) -> Result<File, CaError> {
    let failed = |source| FileError::Write { path: path.to_owned(), source };
    let file = File::options().create(true).append(true).open(path).map_err(failed)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(fs::TryLockError::WouldBlock) => Err(CaError::Locked(path.to_owned())),
        Err(fs::TryLockError::Error(source)) => Err(failed(source).into()),
    }
}

/// The roots that a join token pins. Takes no lock, so that tokens can be made beside a controller that runs; makes the CA
/// where there is none yet.
pub fn trusted_roots(options: &CaOptions) -> Result<Bundle, CaError> {
    if let Some(dir) = &options.brought {
        return Ok(Bundle::new(SigningCa::load(dir, &options.trust_domain, options.clock.now())?.roots)?);
    }
    let path = options.state_dir.join(STATE);
    let phases: Phases = match files::read(&path) {
        Ok(text) => serde_json::from_str(&text).map_err(|e| CaError::State { path, problem: e.to_string() })?,
        Err(e) if e.is_missing() => return Ok(Ca::open(options.clone())?.bundle()),
        Err(e) => return Err(e.into()),
    };
    let pems = phases
        .trusted()
        .into_iter()
        .map(|number| files::read(&generation_dir(&options.state_dir, number).join(ROOT_CERT)));
    Ok(Bundle::from_pem(&pems.collect::<Result<String, _>>()?)?)
}

pub(super) type Generations = BTreeMap<u64, Arc<SigningCa>>;

/// Reads the CA of the state directory, or makes the first one.
fn open_own(options: &CaOptions, now: SystemTime) -> Result<(Phases, Generations), CaError> {
    let path = options.state_dir.join(STATE);
    let broken = |problem: String| CaError::State { path: path.clone(), problem };
    let mut phases = match files::read(&path) {
        Ok(text) => serde_json::from_str::<Phases>(&text).map_err(|e| broken(e.to_string()))?,
        Err(e) if e.is_missing() => {
            let first = generation_dir(&options.state_dir, 1);
            if generation_dir(&options.state_dir, 2).exists() {
                return Err(broken("it is missing, though there are generations of a CA beside it".to_owned()));
            }
            // Whole, but without the state: the first start was cut off just before its end.
            if !first.join(CERT_CHAIN).exists() {
                SigningCa::create(&first, &options.trust_domain, now)?;
            }
            SigningCa::load(&first, &options.trust_domain, now)?;
            write_phases(&options.state_dir, &Phases::first())?;
            Phases::first()
        }
        Err(e) => return Err(e.into()),
    };
    if !phases.is_known_version() {
        return Err(broken("it was written by another version of the agent".to_owned()));
    }
    // First, since what fell due while nothing ran may have expired meanwhile and would not load.
    let before = phases.trusted();
    if phases.advance(now, options.pace()) {
        write_phases(&options.state_dir, &phases)?;
    }
    let load = |number| SigningCa::load(&generation_dir(&options.state_dir, number), &options.trust_domain, now);
    let mut generations = BTreeMap::new();
    for number in phases.trusted() {
        let (number, ca) = match load(number) {
            // Nothing ran for so long that the intermediate has expired; the root can sign another.
            Err(IssuerError::Expired { path, .. }) if number == phases.active && path.ends_with(CA_CERT) => {
                let (old, next) = (generation_dir(&options.state_dir, number), phases.next_number());
                SigningCa::create_under(
                    &generation_dir(&options.state_dir, next),
                    &Material::Directory(old),
                    &options.trust_domain,
                    now,
                )?;
                let ca = load(next)?;
                phases.active = next;
                write_phases(&options.state_dir, &phases)?;
                (next, ca)
            }
            loaded => (number, loaded?),
        };
        generations.insert(number, Arc::new(ca));
    }
    for dropped in before.iter().filter(|number| !generations.contains_key(number)) {
        remove_generation(&options.state_dir, *dropped);
    }
    Ok((phases, generations))
}

#[cfg(test)]
mod tests;
