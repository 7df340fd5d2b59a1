use std::fs;

use rcgen::{CertificateParams, IsCa, KeyPair};

use super::super::bundle::certificate_pem;
use super::super::issuer::{CA_KEY, ROOT_CERT, ROOT_KEY};
use super::super::testing::{
    AnyRoot, Pair, certificate_options, domain, eventually, handshake, id, open_ca, pass, uri,
};
use super::super::{Certificates, csr};
use super::*;

const SECOND: Duration = Duration::from_secs(1);

fn signed_for(ca: &Ca) -> Vec<CertificateDer<'static>> {
    let (_, pem) = csr::request(&id("web")).unwrap();
    ca.sign_workload(&VerifiedCsr::from_pem(&pem).unwrap().key, &id("web"), None).unwrap()
}

#[test]
fn a_restart_keeps_the_root_and_the_intermediate() {
    let dir = tempfile::tempdir().unwrap();
    let first = open_ca(dir.path());
    let (root, intermediate) = (first.bundle(), signed_for(&first)[1].clone());
    drop(first);
    let second = open_ca(dir.path());
    assert_eq!((second.bundle(), signed_for(&second)[1].clone()), (root, intermediate));
}

#[test]
fn one_state_directory_has_one_ca() {
    let dir = tempfile::tempdir().unwrap();
    let _first = open_ca(dir.path());
    assert!(matches!(Ca::open(CaOptions::new(dir.path(), domain())), Err(CaError::Locked(_))));
}

#[test]
fn a_first_start_that_was_cut_off_is_gone_on_with() {
    let dir = tempfile::tempdir().unwrap();
    let root = open_ca(dir.path()).bundle();
    fs::remove_file(dir.path().join(STATE)).unwrap();
    assert_eq!(open_ca(dir.path()).bundle(), root);
}

#[test]
fn a_lost_or_broken_state_is_not_replaced_by_a_new_root() {
    let dir = tempfile::tempdir().unwrap();
    open_ca(dir.path()).rotate_root().unwrap();
    let whole = fs::read_to_string(dir.path().join(STATE)).unwrap();
    let future = whole.replace("\"version\": 1", "\"version\": 2");
    for text in ["", "{}", &whole[..whole.len() / 2], &future] {
        fs::write(dir.path().join(STATE), text).unwrap();
        let error = Ca::open(CaOptions::new(dir.path(), domain())).err().unwrap();
        assert!(matches!(error, CaError::State { .. }) && error.to_string().contains(STATE), "{error}");
    }
    fs::remove_file(dir.path().join(STATE)).unwrap();
    assert!(matches!(Ca::open(CaOptions::new(dir.path(), domain())), Err(CaError::State { .. })));
    fs::write(dir.path().join(STATE), whole).unwrap();
    assert_eq!(open_ca(dir.path()).bundle().roots().len(), 2);
}

#[test]
fn a_lifetime_is_bounded_both_ways() {
    let dir = tempfile::tempdir().unwrap();
    let short = CaOptions { lifetime: SECOND, ..CaOptions::new(dir.path(), domain()) };
    assert!(matches!(Ca::open(short), Err(CaError::Lifetime(_))));

    let ca = open_ca(dir.path());
    let (_, pem) = csr::request(&id("web")).unwrap();
    let request = VerifiedCsr::from_pem(&pem).unwrap();
    let life = |asked| {
        let chain = ca.sign_workload(&request.key, &id("web"), Some(asked)).unwrap();
        let (_, leaf) = x509_parser::parse_x509_certificate(&chain[0]).unwrap();
        leaf.validity().not_after.timestamp() - leaf.validity().not_before.timestamp()
    };
    assert_eq!(life(DEFAULT_LIFETIME * 100), 24 * 3600 + 300);
    assert_eq!(life(SECOND), 11);
}

#[test]
fn a_leaf_has_the_shape_that_istio_expects() {
    let dir = tempfile::tempdir().unwrap();
    let chain = signed_for(&open_ca(dir.path()));
    assert_eq!(chain.len(), 2, "leaf and intermediate, no root");
    let (_, leaf) = x509_parser::parse_x509_certificate(&chain[0]).unwrap();
    let san = leaf.subject_alternative_name().unwrap().unwrap();
    assert!(san.critical, "without a subject the name is critical");
    assert_eq!(san.value.general_names, [x509_parser::extensions::GeneralName::URI(&id("web").to_string())]);
    let usage = leaf.extended_key_usage().unwrap().unwrap().value;
    assert!(usage.client_auth && usage.server_auth && !usage.any);
    assert!(!leaf.is_ca());
}

/// A whole CA of the user's, as files.
fn brought() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    SigningCa::create(dir.path(), &domain(), SystemTime::now()).unwrap();
    dir
}

fn open_brought(dir: &Path, now: Clock) -> Result<Arc<Ca>, CaError> {
    let state = tempfile::tempdir().unwrap();
    let brought = Some(dir.to_owned());
    Ca::open(CaOptions { brought, clock: now, ..CaOptions::new(state.path(), domain()) })
}

#[test]
fn a_ca_that_the_user_brings_signs_and_is_not_changed() {
    let dir = brought();
    fs::remove_file(dir.path().join(ROOT_KEY)).unwrap();
    let before: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    let ca = open_brought(dir.path(), Clock::system()).unwrap();
    assert_eq!(signed_for(&ca).len(), 2);
    assert!(matches!(ca.rotate_root(), Err(CaError::Brought)));
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), before.len());
}

#[test]
fn a_root_that_signs_by_itself_may_be_brought() {
    let dir = tempfile::tempdir().unwrap();
    let root = AnyRoot::new();
    for name in [CA_CERT, CERT_CHAIN, ROOT_CERT] {
        fs::write(dir.path().join(name), root.0.pem()).unwrap();
    }
    fs::write(dir.path().join(CA_KEY), root.0.key().serialize_pem()).unwrap();
    let ca = open_brought(dir.path(), Clock::system()).unwrap();
    assert_eq!(signed_for(&ca).len(), 1, "the leaf alone: peers have the root");
}

/// Each way in which files can be wrong, the file that is named, and a word of the reason.
#[test]
fn broken_pem_files_are_refused_with_the_file_and_the_reason() {
    type Break = fn(&Path);
    let other_key = |dir: &Path| fs::write(dir.join(CA_KEY), KeyPair::generate().unwrap().serialize_pem()).unwrap();
    let table: [(Break, &str, &str); 13] = [
        (|dir| fs::remove_file(dir.join(CA_CERT)).unwrap(), CA_CERT, "can't read"),
        (|dir| fs::remove_file(dir.join(CA_KEY)).unwrap(), CA_KEY, "can't read"),
        (|dir| fs::remove_file(dir.join(ROOT_CERT)).unwrap(), ROOT_CERT, "can't read"),
        (|dir| fs::write(dir.join(CA_CERT), "").unwrap(), CA_CERT, "holds no certificate"),
        (|dir| fs::write(dir.join(CA_KEY), "no key").unwrap(), CA_KEY, "no private key"),
        (|dir| fs::write(dir.join(ROOT_CERT), certificate_pem(b"junk")).unwrap(), ROOT_CERT, "no X.509 certificate"),
        (|dir| fs::write(dir.join(CERT_CHAIN), "-----BEGIN CERTIFICATE-----\n%\n").unwrap(), CERT_CHAIN, "not PEM"),
        (other_key, CA_KEY, "does not belong"),
        (|dir| fs::write(dir.join(CA_CERT), vec![b'a'; 2 << 20]).unwrap(), CA_CERT, "larger than"),
        (|dir| fs::write(dir.join(CERT_CHAIN), AnyRoot::new().0.pem()).unwrap(), CERT_CHAIN, "must begin with"),
        (|dir| fs::write(dir.join(ROOT_CERT), AnyRoot::new().0.pem()).unwrap(), ROOT_CERT, "no root in it has signed"),
        (chain_with_a_stranger, CERT_CHAIN, "is not signed by"),
        (leaf_as_ca, CA_CERT, "may not sign"),
    ];
    for (index, (break_it, file, word)) in table.into_iter().enumerate() {
        let dir = brought();
        break_it(dir.path());
        let error = open_brought(dir.path(), Clock::system()).err().unwrap_or_else(|| panic!("case {index} was taken"));
        let text = error.to_string();
        assert!(text.contains(file) && text.contains(word), "case {index} ({file}, {word}): {text}");
        assert!(!text.contains('\n'), "{text}");
    }
    // The root in place of a root, but a leaf.
    let dir = brought();
    leaf_as_ca(dir.path());
    fs::copy(dir.path().join(CA_CERT), dir.path().join(ROOT_CERT)).unwrap();
    assert!(open_brought(dir.path(), Clock::system()).err().unwrap().to_string().contains("no CA certificate"));
}

fn chain_with_a_stranger(dir: &Path) {
    let chain = fs::read_to_string(dir.join(CERT_CHAIN)).unwrap() + &AnyRoot::new().0.pem();
    fs::write(dir.join(CERT_CHAIN), chain).unwrap();
}

fn leaf_as_ca(dir: &Path) {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::ExplicitNoCa;
    fs::write(dir.join(CA_KEY), key.serialize_pem()).unwrap();
    let leaf = params.self_signed(&key).unwrap().pem();
    for name in [CA_CERT, CERT_CHAIN] {
        fs::write(dir.join(name), &leaf).unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn an_expired_ca_that_the_user_brings_is_refused() {
    let (dir, clock) = (brought(), Clock::tokio());
    tokio::time::advance(INTERMEDIATE_LIFE + SECOND).await;
    let error = open_brought(dir.path(), clock).err().unwrap().to_string();
    assert!(error.contains("has expired at") && error.contains(CA_CERT), "{error}");
}

/// A root and an intermediate under it, each as `change` wants it.
fn two_tiers(change: impl Fn(&mut CertificateParams, &str)) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let params = |name: &str| {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        change(&mut params, name);
        params
    };
    let root = rcgen::CertifiedIssuer::self_signed(params("root"), KeyPair::generate().unwrap()).unwrap();
    let key = KeyPair::generate().unwrap();
    let intermediate = params("intermediate").signed_by(&key, &root).unwrap().pem();
    fs::write(dir.path().join(CA_KEY), key.serialize_pem()).unwrap();
    fs::write(dir.path().join(CA_CERT), &intermediate).unwrap();
    fs::write(dir.path().join(CERT_CHAIN), &intermediate).unwrap();
    fs::write(dir.path().join(ROOT_CERT), root.pem()).unwrap();
    dir
}

#[test]
fn a_ca_whose_leaves_a_peer_would_refuse_is_refused() {
    open_brought(two_tiers(|_, _| {}).path(), Clock::system()).unwrap();

    let narrow = two_tiers(|params, name| {
        if name == "root" {
            params.is_ca = IsCa::Ca(rcgen::BasicConstraints::Constrained(0));
        }
    });
    let error = open_brought(narrow.path(), Clock::system()).err().unwrap();
    assert!(error.to_string().contains("allows 0 CA certificates below it"), "{error}");

    let servers_only = two_tiers(|params, name| {
        if name == "intermediate" {
            params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ServerAuth];
        }
    });
    let error = open_brought(servers_only.path(), Clock::system()).err().unwrap();
    assert!(matches!(error, CaError::Issuer(IssuerError::Unusable { .. })), "{error}");
}

#[tokio::test(start_paused = true)]
async fn the_intermediate_is_renewed_under_the_same_root() {
    let dir = tempfile::tempdir().unwrap();
    let clock = Clock::tokio();
    let ca = Ca::open(CaOptions { clock, ..CaOptions::new(dir.path(), domain()) }).unwrap();
    let (root, intermediate) = (ca.bundle(), signed_for(&ca)[1].clone());
    tokio::time::advance(INTERMEDIATE_LIFE / 3 * 2 + SECOND).await;
    ca.advance().unwrap();
    assert_eq!(ca.bundle(), root);
    assert_ne!(signed_for(&ca)[1], intermediate);
    assert!(!generation_dir(dir.path(), 1).exists() && generation_dir(dir.path(), 2).exists());
}

#[tokio::test(start_paused = true)]
async fn an_intermediate_that_expired_while_nothing_ran_is_renewed_at_the_start() {
    let dir = tempfile::tempdir().unwrap();
    let options = CaOptions { clock: Clock::tokio(), ..CaOptions::new(dir.path(), domain()) };
    let root = Ca::open(options.clone()).unwrap().bundle();
    tokio::time::advance(INTERMEDIATE_LIFE + SECOND).await;
    for _ in 0..2 {
        let ca = Ca::open(options.clone()).unwrap();
        assert_eq!((ca.bundle(), signed_for(&ca).len()), (root.clone(), 2));
        assert!(!generation_dir(dir.path(), 1).exists() && generation_dir(dir.path(), 2).exists());
    }
}

#[tokio::test(start_paused = true)]
async fn the_root_is_replaced_before_it_expires() {
    let dir = tempfile::tempdir().unwrap();
    let clock = Clock::tokio();
    let ca = Ca::open(CaOptions { clock, ..CaOptions::new(dir.path(), domain()) }).unwrap();
    let old = ca.bundle().fingerprints()[0].clone();
    // Several intermediates on the way, as a CA that runs all the time would have them.
    for _ in 0..6 {
        tokio::time::advance(ROOT_LIFE * 9 / 10 / 6 + SECOND).await;
        ca.advance().unwrap();
    }
    assert_eq!((ca.bundle().fingerprints().len(), &ca.bundle().fingerprints()[0]), (2, &old));
    tokio::time::advance(DEFAULT_LIFETIME).await;
    ca.advance().unwrap();
    tokio::time::advance(DEFAULT_LIFETIME).await;
    ca.advance().unwrap();
    assert!(ca.bundle().fingerprints().len() == 1 && !ca.bundle().contains(&old));
}

#[test]
fn a_token_pins_all_roots_also_beside_a_controller_that_runs() {
    let dir = tempfile::tempdir().unwrap();
    let options = CaOptions::new(dir.path(), domain());
    let first = trusted_roots(&options).unwrap();
    let ca = Ca::open(options.clone()).unwrap();
    assert_eq!(ca.bundle(), first);
    ca.rotate_root().unwrap();
    assert_eq!(trusted_roots(&options).unwrap(), ca.bundle());

    let brought = brought();
    let of_the_user = CaOptions { brought: Some(brought.path().to_owned()), ..options };
    assert_ne!(trusted_roots(&of_the_user).unwrap(), first);
}

fn rotation_options(dir: &Path) -> CaOptions {
    let retire = Some(20 * SECOND);
    CaOptions { announce: 10 * SECOND, retire, clock: Clock::tokio(), ..CaOptions::new(dir, domain()) }
}

#[tokio::test(start_paused = true)]
async fn a_change_of_the_root_goes_on_after_a_restart_in_each_phase() {
    let dir = tempfile::tempdir().unwrap();
    let options = rotation_options(dir.path());
    let ca = Ca::open(options.clone()).unwrap();
    let old = ca.bundle().fingerprints()[0].clone();
    ca.heard_from("node-a", std::slice::from_ref(&old)).unwrap();
    let new = ca.rotate_root().unwrap();
    assert!(matches!(ca.rotate_root(), Err(CaError::UnderWay(2))));
    assert_eq!(ca.bundle().fingerprints(), [old.clone(), new.clone()]);
    drop(ca);

    let ca = Ca::open(options.clone()).unwrap();
    assert_eq!(ca.bundle().fingerprints(), [old.clone(), new.clone()]);
    tokio::time::advance(11 * SECOND).await;
    ca.advance().unwrap();
    assert_eq!(ca.bundle().fingerprints()[0], old, "node-a does not trust the new root yet");
    ca.heard_from("node-a", &[old.clone(), new.clone()]).unwrap();
    ca.advance().unwrap();
    assert_eq!(ca.bundle().fingerprints(), [new.clone(), old.clone()]);
    drop(ca);

    let ca = Ca::open(options.clone()).unwrap();
    assert_eq!(ca.bundle().fingerprints(), [new.clone(), old]);
    drop(ca);
    tokio::time::advance(21 * SECOND).await;
    let ca = Ca::open(options).unwrap();
    assert_eq!(ca.bundle().fingerprints(), [new], "the old root fell due while nothing ran");
}

#[tokio::test(start_paused = true)]
async fn a_node_that_never_says_what_it_trusts_is_waited_for_until_its_certificates_are_new() {
    let dir = tempfile::tempdir().unwrap();
    let options = rotation_options(dir.path());
    let ca = Ca::open(options.clone()).unwrap();
    let old = ca.bundle().fingerprints()[0].clone();
    ca.has_signed_for("ztunnel");
    let new = ca.rotate_root().unwrap();
    tokio::time::advance(options.lifetime - SECOND).await;
    ca.advance().unwrap();
    assert_eq!(ca.bundle().fingerprints(), [old.clone(), new.clone()], "a certificate of before is still in use");
    tokio::time::advance(2 * SECOND).await;
    ca.advance().unwrap();
    assert_eq!(ca.bundle().fingerprints(), [new, old]);
}

async fn meet(certificates: &Certificates) -> Pair {
    let tls = certificates.get(&id("web")).unwrap();
    handshake(tls.client.clone(), tls.server.clone()).await.unwrap()
}

#[tokio::test]
async fn a_change_of_the_root_drops_no_connection() {
    let dir = tempfile::tempdir().unwrap();
    let options = rotation_options(dir.path());
    let clock = options.clock;
    let ca = Ca::open(options).unwrap();
    let certificates = Certificates::embedded(ca.clone(), certificate_options(clock));
    certificates.ensure(&id("web")).await.unwrap();
    let serial = |c: &Certificates| c.list()[0].serial.clone();
    let (first, trusted) = (serial(&certificates), |c: &Certificates| c.list()[0].roots.clone());
    let mut before = meet(&certificates).await;
    let old_config = certificates.get(&id("web")).unwrap();

    ca.rotate_root().unwrap();
    eventually("both roots are trusted", || {
        trusted(&certificates).len() == 2 && !Arc::ptr_eq(&certificates.get(&id("web")).unwrap(), &old_config)
    })
    .await;
    let mut announced = meet(&certificates).await;

    pass(11 * SECOND).await;
    eventually("the new root signs", || ca.inner().phases.active == 2).await;
    certificates.ensure(&id("db")).await.unwrap();
    let (web, db) = (certificates.get(&id("web")).unwrap(), certificates.get(&id("db")).unwrap());
    let mut mixed = handshake(web.client.clone(), db.server.clone()).await.expect("a leaf of each root");
    let mut other_way = handshake(db.client.clone(), web.server.clone()).await.expect("a leaf of each root");

    pass(21 * SECOND).await;
    eventually("the old root is gone and its leaf was replaced", || {
        let list = certificates.list();
        list.iter().all(|info| info.roots.len() == 1) && list[1].serial != first && ca.bundle().roots().len() == 1
    })
    .await;
    let mut after = meet(&certificates).await;
    for pair in [&mut before, &mut announced, &mut mixed, &mut other_way, &mut after] {
        pair.ping().await.unwrap();
    }

    // What was signed by the old root is let in no more.
    let (server, _) =
        handshake(web.client.clone(), certificates.get(&id("web")).unwrap().server.clone()).await.err().unwrap();
    assert!(server.contains("UnknownIssuer"), "{server}");
}

#[test]
fn requests_are_taken_apart() {
    let (_, pem) = csr::request(&id("web")).unwrap();
    assert_eq!(VerifiedCsr::from_pem(&pem).unwrap().identity, Some(id("web")));

    let with = |key: &KeyPair, uris: &[&str]| {
        let mut params = CertificateParams::default();
        params.subject_alt_names = uris.iter().map(uri).collect();
        params.serialize_request(key).unwrap().pem().unwrap()
    };
    let key = KeyPair::generate().unwrap();
    assert_eq!(VerifiedCsr::from_pem(&with(&key, &[])).unwrap().identity, None);
    let two = with(&key, &["spiffe://cluster.local/ns/a/sa/b", "spiffe://cluster.local/ns/a/sa/c"]);
    assert_eq!(VerifiedCsr::from_pem(&two).unwrap_err(), CsrError::ManyUris(2));
    assert!(matches!(VerifiedCsr::from_pem(&with(&key, &["https://a"])).unwrap_err(), CsrError::Shape(_)));
    let rsa = KeyPair::generate_rsa_for(&rcgen::PKCS_RSA_SHA256, rcgen::RsaKeySize::_2048).unwrap();
    assert!(matches!(VerifiedCsr::from_pem(&with(&rsa, &[])).unwrap_err(), CsrError::KeyType(_)));
    let ed = KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap();
    assert!(matches!(VerifiedCsr::from_pem(&with(&ed, &[])).unwrap_err(), CsrError::KeyType(_)));
    assert!(matches!(VerifiedCsr::from_pem("junk").unwrap_err(), CsrError::Parse(_)));
    assert!(matches!(VerifiedCsr::from_pem(&"x".repeat(20_000)).unwrap_err(), CsrError::TooLarge(20_000)));
}

#[test]
fn a_request_whose_signature_is_of_another_key_is_refused() {
    use rustls::pki_types::CertificateSigningRequestDer;
    use rustls::pki_types::pem::PemObject;
    let (_, pem) = csr::request(&id("web")).unwrap();
    let mut der = CertificateSigningRequestDer::from_pem_slice(pem.as_bytes()).unwrap().to_vec();
    // The identity is in the signed part: `web` becomes `wex`.
    let at = der.windows(3).position(|bytes| bytes == b"web").unwrap();
    der[at + 2] = b'x';
    let pem = certificate_pem(&der).replace("CERTIFICATE", "CERTIFICATE REQUEST");
    assert_eq!(VerifiedCsr::from_pem(&pem).unwrap_err(), CsrError::Signature);
}

proptest::proptest! {
    #[test]
    fn changed_requests_do_no_harm(noise: Vec<u8>, at: proptest::sample::Index, byte: u8) {
        use proptest::prelude::*;
        use rustls::pki_types::CertificateSigningRequestDer;
        use rustls::pki_types::pem::PemObject;
        let pem = |der: &[u8]| certificate_pem(der).replace("CERTIFICATE", "CERTIFICATE REQUEST");
        prop_assert!(VerifiedCsr::from_pem(&pem(&noise)).is_err());
        static GOOD: std::sync::LazyLock<Vec<u8>> = std::sync::LazyLock::new(|| {
            let (_, pem) = csr::request(&id("web")).unwrap();
            CertificateSigningRequestDer::from_pem_slice(pem.as_bytes()).unwrap().to_vec()
        });
        let mut der = GOOD.clone();
        let at = at.index(der.len());
        der[at] = byte;
        // What still passes is what was signed.
        if let Ok(request) = VerifiedCsr::from_pem(&pem(&der)) {
            prop_assert_eq!(request.identity, Some(id("web")));
        }
    }
}
