use super::super::testing::{AnyRoot, domain, id};
use super::super::{Ca, CaOptions, Clock, VerifiedCsr, csr};
use super::*;

const NAME: &str = "Secret nodemesh-system/nodemesh-ca";
const LIFE: Duration = Duration::from_secs(24 * 3600);
const ANNOUNCE: Duration = Duration::from_secs(120);

fn start() -> SystemTime {
    SystemTime::now()
}

fn next(document: &Document, rotate: bool, now: SystemTime) -> Option<Document> {
    document.next(&domain(), LIFE, ANNOUNCE, rotate, now).unwrap().map(|next| next.document)
}

fn open(document: &Document, now: SystemTime) -> Result<(Phases, Generations), CaError> {
    document.open(&domain(), now)
}

fn root_of(document: &Document) -> Vec<u8> {
    let (phases, generations) = open(document, start()).unwrap();
    generations[&phases.active].roots[0].to_vec()
}

fn with(document: &Document, changes: &[(&str, Option<&str>)]) -> Document {
    let mut keys = document.keys().clone();
    for (key, text) in changes {
        match text {
            Some(text) => drop(keys.insert((*key).to_owned(), (*text).to_owned())),
            None => drop(keys.remove(*key)),
        }
    }
    Document::new(NAME, keys)
}

#[test]
fn the_first_ca_is_whole_and_nothing_is_due_for_it() {
    let first = Document::first(NAME, &domain(), start()).unwrap();
    for key in ["ca-cert.pem", "ca-key.pem", "cert-chain.pem", "root-cert.pem", "root-key.pem", STATE] {
        assert!(first.keys().contains_key(key), "{key}");
    }
    open(&first, start()).unwrap();
    assert!(!first.is_brought());
    assert!(next(&first, false, start()).is_none());
}

#[test]
fn a_change_of_the_root_waits_for_a_certificates_life_in_each_phase() {
    let first = Document::first(NAME, &domain(), start()).unwrap();
    let announced = next(&with(&first, &[("other", Some("kept"))]), true, start()).unwrap();
    let (phases, generations) = open(&announced, start()).unwrap();
    assert_eq!((phases.active, generations.len()), (1, 2));
    assert_eq!(root_of(&announced), root_of(&first), "the old one signs");
    assert!(matches!(announced.next(&domain(), LIFE, ANNOUNCE, true, start()), Err(CaError::UnderWay(2))));

    let second = Duration::from_secs(1);
    assert!(next(&announced, false, start() + LIFE - 10 * second).is_none());
    let switched = next(&announced, false, start() + LIFE + second).unwrap();
    assert_eq!(open(&switched, start()).unwrap().1.len(), 2);
    assert_ne!(root_of(&switched), root_of(&first), "the new one signs");

    assert!(next(&switched, false, start() + 2 * LIFE - 10 * second).is_none());
    let done = next(&switched, false, start() + 2 * LIFE + 10 * second).unwrap();
    assert_eq!(open(&done, start()).unwrap().1.len(), 1);
    assert_eq!(root_of(&done), root_of(&switched));
    assert!(!done.keys().keys().any(|key| key.starts_with("ca-1.")), "{done:?}");
    assert_eq!(done.keys()["other"], "kept");
}

#[test]
fn the_intermediate_is_renewed_also_when_it_has_expired_meanwhile() {
    let first = Document::first(NAME, &domain(), start()).unwrap();
    for now in [start() + INTERMEDIATE_LIFE / 3 * 2, start() + INTERMEDIATE_LIFE * 2] {
        let renewed = next(&first, false, now).unwrap();
        let (phases, generations) = open(&renewed, now).unwrap();
        assert_eq!((phases.active, generations.len()), (2, 1));
        assert_eq!(renewed.keys()[ROOT_CERT], first.keys()[ROOT_CERT]);
        assert_ne!(renewed.keys()[CA_CERT], first.keys()[CA_CERT]);
    }
}

#[test]
fn what_the_user_brings_is_taken_in_both_forms_and_never_changed() {
    let made = Document::first(NAME, &domain(), start()).unwrap();
    let istio = with(&made, &[(STATE, None), (ROOT_KEY, None)]);
    let root = AnyRoot::new();
    let (pem, key) = (root.0.pem(), root.0.key().serialize_pem());
    let keys = [("tls.crt", pem.as_str()), ("tls.key", &key), ("ca.crt", &pem)];
    let cert_manager = Document::new(NAME, keys.map(|(k, v)| (k.to_owned(), v.to_owned())).into());
    for brought in [istio, cert_manager] {
        assert!(brought.is_brought());
        open(&brought, start()).unwrap();
        assert!(next(&brought, false, start() + ROOT_LIFE).is_none());
        assert!(matches!(brought.next(&domain(), LIFE, ANNOUNCE, true, start()), Err(CaError::Brought)));
    }
}

#[test]
fn each_broken_secret_is_refused_with_the_key_and_the_reason() {
    let made = Document::first(NAME, &domain(), start()).unwrap();
    let brought = with(&made, &[(STATE, None), (ROOT_KEY, None)]);
    let (foreign, root) = (AnyRoot::new().0.pem(), AnyRoot::new());
    let pem = root.0.pem();
    let cert_manager = |key: &str, ca: Option<&str>| {
        let keys = [("tls.crt", Some(pem.as_str())), ("tls.key", Some(key)), ("ca.crt", ca)];
        Document::new(NAME, keys.iter().filter_map(|(k, v)| Some(((*k).to_owned(), (*v)?.to_owned()))).collect())
    };
    let good_key = root.0.key().serialize_pem();
    let table = [
        (with(&brought, &[(CA_KEY, None)]), "key ca-key.pem is not there"),
        (with(&brought, &[(CA_KEY, Some("junk"))]), "key ca-key.pem: it holds no private key"),
        (with(&brought, &[(CA_KEY, Some(&good_key))]), "key ca-key.pem: the key does not belong"),
        (with(&brought, &[(ROOT_CERT, Some(&foreign))]), "key root-cert.pem: no root in it has signed"),
        (cert_manager(&good_key, None), "key ca.crt is not there"),
        (cert_manager("", Some(&pem)), "key tls.key: it holds no private key"),
        (with(&made, &[(STATE, Some("{"))]), "key state.json: it can't be read"),
        (with(&made, &[(ROOT_KEY, Some(&good_key))]), "remove its keys state.json and root-key.pem"),
        (Document::new(NAME, [("x".to_owned(), String::new())].into()), "key ca-cert.pem is not there"),
    ];
    for (document, words) in table {
        let error = open(&document, start()).err().unwrap_or_else(|| panic!("taken: {words}")).to_string();
        assert!(error.contains(words) && error.starts_with(NAME) && !error.contains('\n'), "{words}: {error}");
    }
    let late = open(&brought, start() + INTERMEDIATE_LIFE).err().unwrap().to_string();
    assert!(late.starts_with(NAME) && late.contains("has expired at"), "{late}");
    let early = open(&brought, start() - Duration::from_secs(3600)).err().unwrap().to_string();
    assert!(early.contains("check this machine's clock"), "{early}");
}

#[test]
fn a_running_ca_takes_a_changed_secret_and_keeps_the_former_when_it_is_broken() {
    let first = Document::first(NAME, &domain(), start()).unwrap();
    let options = CaOptions { clock: Clock::system(), ..CaOptions::new("/nonexistent", domain()) };
    let ca = Ca::of_secret(&first, options).unwrap();
    let roots = ca.bundle();
    assert!(ca.take(&with(&first, &[(CA_KEY, Some("junk"))])).is_err());
    assert_eq!(ca.bundle(), roots);
    let (_, pem) = csr::request(&id("web")).unwrap();
    let key = VerifiedCsr::from_pem(&pem).unwrap().key;
    ca.sign_workload(&key, &id("web"), None).unwrap();

    let announced = next(&first, true, start()).unwrap();
    ca.take(&announced).unwrap();
    assert_eq!(ca.bundle().roots().len(), 2);
    assert_eq!(ca.bundle().roots()[0], roots.roots()[0]);
}
