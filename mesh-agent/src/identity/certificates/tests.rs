use std::sync::atomic::{AtomicUsize, Ordering};

use super::super::CaOptions;
use super::super::csr::VerifiedCsr;
use super::super::testing::{AnyRoot, certificate_options, domain, handshake, id, open_ca};
use super::*;

const HOUR: Duration = Duration::from_secs(3600);

#[tokio::test]
async fn workloads_of_an_embedded_ca_meet() {
    let dir = tempfile::tempdir().unwrap();
    let certificates = Certificates::embedded(open_ca(dir.path()), certificate_options(Clock::system()));
    certificates.ensure(&id("web")).await.unwrap();
    certificates.ensure(&id("db")).await.unwrap();
    let (web, db) = (certificates.get(&id("web")).unwrap(), certificates.get(&id("db")).unwrap());
    let mut pair = handshake(web.client.clone(), db.server.clone()).await.unwrap();
    pair.ping().await.unwrap();
    assert_eq!(pair.client.get_ref().1.alpn_protocol(), Some(tls::ALPN_NODEMESH));
    let pair = handshake(web.client_h2.clone(), db.server.clone()).await.unwrap();
    assert_eq!(pair.client.get_ref().1.alpn_protocol(), Some(tls::ALPN_H2));
    let states: Vec<String> = certificates.list().into_iter().map(|info| info.state).collect();
    assert_eq!(states, ["ready", "ready"]);
}

/// What the CA of a test does when it is asked.
#[derive(Clone)]
enum Mood {
    Signs,
    Away,
    /// Never answers.
    Silent,
    SignsFor(SpiffeId),
    SignsAnotherKey,
    IsForeign(Arc<Ca>),
}

struct MoodyCa {
    ca: Arc<Ca>,
    mood: Mutex<Mood>,
    asked: AtomicUsize,
    roots: watch::Sender<Option<Bundle>>,
    _dir: tempfile::TempDir,
}

impl MoodyCa {
    fn new(clock: Clock) -> Arc<Self> {
        let dir = tempfile::tempdir().unwrap();
        let ca = Ca::open(CaOptions { clock, ..CaOptions::new(dir.path(), domain()) }).unwrap();
        let roots = watch::Sender::new(Some(ca.bundle()));
        Arc::new(Self { ca, mood: Mutex::new(Mood::Signs), asked: AtomicUsize::new(0), roots, _dir: dir })
    }

    fn set(&self, mood: Mood) {
        *self.mood.lock().unwrap() = mood;
    }

    fn asked(&self) -> usize {
        self.asked.load(Ordering::Relaxed)
    }
}

impl Authority for MoodyCa {
    fn sign<'a>(&'a self, identity: &'a SpiffeId, csr: &'a str, lifetime: Duration) -> SignFuture<'a> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        let mood = self.mood.lock().unwrap().clone();
        Box::pin(async move {
            let other = csr::request(identity).unwrap().1;
            let (ca, identity, csr) = match &mood {
                Mood::Away => return Err("no controller answers".to_owned()),
                Mood::Silent => std::future::pending().await,
                Mood::Signs => (&self.ca, identity, csr),
                Mood::SignsFor(other) => (&self.ca, other, csr),
                Mood::SignsAnotherKey => (&self.ca, identity, other.as_str()),
                Mood::IsForeign(ca) => (ca, identity, csr),
            };
            let key = VerifiedCsr::from_pem(csr).unwrap().key;
            ca.sign_workload(&key, identity, Some(lifetime)).map_err(|e| e.to_string())
        })
    }

    fn roots(&self) -> watch::Receiver<Option<Bundle>> {
        self.roots.subscribe()
    }
}

fn moody() -> (Arc<MoodyCa>, Certificates) {
    let clock = Clock::tokio();
    let ca = MoodyCa::new(clock);
    (ca.clone(), Certificates::new(ca, certificate_options(clock)))
}

fn info(certificates: &Certificates) -> CertificateInfo {
    let mut list = certificates.list();
    assert_eq!(list.len(), 1);
    list.remove(0)
}

#[tokio::test(start_paused = true)]
async fn a_certificate_is_renewed_at_half_its_life() {
    let (ca, certificates) = moody();
    certificates.ensure(&id("web")).await.unwrap();
    let first = info(&certificates);
    tokio::time::sleep(HOUR * 12 * 89 / 100).await;
    assert_eq!((info(&certificates), ca.asked()), (first.clone(), 1));
    tokio::time::sleep(HOUR * 12 * 22 / 100).await;
    let second = info(&certificates);
    assert_ne!(second.serial, first.serial);
    assert_eq!((second.state.as_str(), ca.asked()), ("ready", 2));
    assert!(certificates.get(&id("web")).unwrap().not_after > Clock::tokio().now() + HOUR * 23);
}

#[tokio::test(start_paused = true)]
async fn the_renewals_of_many_identities_are_spread() {
    let (ca, certificates) = moody();
    for n in 0..50 {
        certificates.ensure(&id(&format!("web-{n}"))).await.unwrap();
    }
    let mut by_quarter = Vec::new();
    tokio::time::sleep(HOUR * 12 * 9 / 10).await;
    for _ in 0..4 {
        let before = ca.asked();
        tokio::time::sleep(HOUR * 12 * 2 / 10 / 4).await;
        by_quarter.push(ca.asked() - before);
    }
    assert!(by_quarter.iter().all(|n| *n > 0), "{by_quarter:?}");
}

#[tokio::test(start_paused = true)]
async fn while_the_ca_is_away_the_present_certificate_stays_in_use_until_it_expires() {
    let (ca, certificates) = moody();
    certificates.ensure(&id("web")).await.unwrap();
    let first = info(&certificates).serial;
    ca.set(Mood::Away);
    tokio::time::sleep(HOUR * 14).await;
    let away = info(&certificates);
    assert_eq!((away.state.as_str(), &away.serial), ("renewing", &first));
    let problem = away.problem.unwrap();
    for part in ["no controller answers", "stays in use until", "next try at"] {
        assert!(problem.contains(part), "{problem}");
    }
    assert!(certificates.get(&id("web")).is_some());

    // Between half a minute and a minute apart.
    let before = ca.asked();
    tokio::time::sleep(HOUR).await;
    let tries = ca.asked() - before;
    assert!((59..=121).contains(&tries), "{tries} tries in an hour");

    tokio::time::sleep(HOUR * 10).await;
    let expired = info(&certificates);
    assert_eq!(expired.state, "expired");
    assert!(expired.problem.unwrap().contains("has expired at"));
    assert!(certificates.get(&id("web")).is_none(), "an expired certificate is not handed out");

    ca.set(Mood::Signs);
    tokio::time::sleep(rotation::BACKOFF_MAX).await;
    let back = info(&certificates);
    assert_eq!((back.state.as_str(), &back.problem), ("ready", &None));
    assert!(certificates.get(&id("web")).is_some());
}

#[tokio::test(start_paused = true)]
async fn a_first_certificate_that_fails_is_told_and_tried_again() {
    let (ca, certificates) = moody();
    ca.set(Mood::Away);
    let problem = certificates.ensure(&id("web")).await.unwrap_err();
    assert!(problem.contains("no controller answers"), "{problem}");
    // Whoever asks again and again is told the same, not another time each.
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(certificates.ensure(&id("web")).await.unwrap_err(), problem);
    assert_eq!(info(&certificates).state, "waiting");
    tokio::time::sleep(HOUR).await;

    // Deep in the back-off, a new wish is tried within a second or so.
    let asked = tokio::time::Instant::now();
    certificates.ensure(&id("web")).await.unwrap_err();
    assert!(asked.elapsed() <= Duration::from_millis(1100), "{:?}", asked.elapsed());
    ca.set(Mood::Signs);
    certificates.ensure(&id("web")).await.unwrap();
    assert_eq!(info(&certificates).problem, None);
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_is_not_what_was_asked_for_is_not_used() {
    let foreign = tempfile::tempdir().unwrap();
    let table = [
        (Mood::SignsFor(id("admin")), "sa/admin"),
        (Mood::SignsAnotherKey, "another key"),
        (Mood::IsForeign(open_ca(foreign.path())), "no root that is trusted"),
    ];
    for (mood, word) in table {
        let (ca, certificates) = moody();
        ca.set(mood);
        let problem = certificates.ensure(&id("web")).await.unwrap_err();
        assert!(problem.contains(word), "{problem}");
        assert!(certificates.get(&id("web")).is_none());
    }
}

#[tokio::test(start_paused = true)]
async fn a_released_identity_is_forgotten_also_in_the_middle_of_a_request() {
    let (ca, certificates) = moody();
    certificates.ensure(&id("web")).await.unwrap();
    certificates.release(&id("web"));
    assert!(certificates.get(&id("web")).is_none() && certificates.list().is_empty());
    let before = ca.asked();
    tokio::time::sleep(HOUR * 48).await;
    assert_eq!(ca.asked(), before, "nobody renews it");

    ca.set(Mood::Silent);
    let waiting = tokio::spawn({
        let certificates = certificates.clone();
        async move { certificates.ensure(&id("web")).await }
    });
    tokio::time::sleep(HOUR).await;
    certificates.release(&id("web"));
    let problem = waiting.await.unwrap().unwrap_err();
    assert!(problem.contains("released"), "{problem}");
}

#[tokio::test(start_paused = true)]
async fn an_identity_that_is_wanted_twice_is_asked_for_once() {
    let (ca, certificates) = moody();
    let (web, again) = (id("web"), id("web"));
    let both = tokio::join!(certificates.ensure(&web), certificates.ensure(&again));
    assert_eq!((both, ca.asked()), ((Ok(()), Ok(())), 1));
}

#[tokio::test(start_paused = true)]
async fn new_roots_reach_every_identity_without_a_new_leaf() {
    let (ca, certificates) = moody();
    for account in ["web", "db"] {
        certificates.ensure(&id(account)).await.unwrap();
    }
    let before = certificates.get(&id("web")).unwrap();
    let both = [ca.ca.bundle().roots(), AnyRoot::new().bundle().roots()].concat();
    ca.roots.send_replace(Some(Bundle::new(both).unwrap()));
    tokio::time::sleep(Duration::from_millis(1)).await;
    assert!(!Arc::ptr_eq(&certificates.get(&id("web")).unwrap(), &before));
    assert_eq!(certificates.list().iter().map(|info| info.roots.len()).collect::<Vec<_>>(), [2, 2]);
    assert_eq!(ca.asked(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_leaf_of_a_root_that_is_no_longer_trusted_is_replaced_at_once() {
    let (ca, certificates) = moody();
    certificates.ensure(&id("web")).await.unwrap();
    let (first, dir) = (info(&certificates).serial, tempfile::tempdir().unwrap());
    let next = Ca::open(CaOptions { clock: ca.ca.clock(), ..CaOptions::new(dir.path(), domain()) }).unwrap();
    ca.set(Mood::IsForeign(next.clone()));
    ca.roots.send_replace(Some(next.bundle()));
    tokio::time::sleep(Duration::from_millis(1)).await;
    let now = info(&certificates);
    assert_ne!(now.serial, first);
    assert_eq!(now.problem, None);
}
