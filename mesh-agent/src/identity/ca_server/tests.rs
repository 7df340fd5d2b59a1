use std::future::ready;
use std::path::Path;
use std::time::SystemTime;

use rcgen::KeyPair;

use super::super::csr;
use super::super::rpc::{Struct, Value};
use super::super::testing::{id, open_ca};
use super::*;

fn signer(dir: &Path) -> Signer {
    let tokens = Some(Arc::new(JoinTokens::open(dir).unwrap()));
    let runs_on: RunsOn = Arc::new(|node, identity| Box::pin(ready(node == "node-a" && *identity == id("web"))));
    Signer {
        ca: open_ca(dir),
        tokens,
        accounts: None,
        runs_on,
        poll: Duration::from_secs(60),
        limits: Mutex::default(),
    }
}

fn request(csr: String, named: Option<Value>) -> CertificateRequest {
    let fields = named.map(|value| (rpc::IMPERSONATED_IDENTITY.to_owned(), value)).into_iter().collect();
    CertificateRequest { csr, validity_duration: 0, metadata: Some(Struct { fields }) }
}

fn text(value: impl ToString) -> Option<Value> {
    Some(Value { string: Some(value.to_string()) })
}

/// A request without a name of its own, as Istio's clients may send it.
fn nameless() -> String {
    let key = KeyPair::generate().unwrap();
    rcgen::CertificateParams::default().serialize_request(&key).unwrap().pem().unwrap()
}

#[tokio::test]
async fn an_identity_may_be_named_in_the_request_or_in_the_metadata_or_both() {
    let dir = tempfile::tempdir().unwrap();
    let signer = signer(dir.path());
    let (_, named) = csr::request(&id("web")).unwrap();
    for good in [request(nameless(), text(id("web"))), request(named.clone(), None), request(named, text(id("web")))] {
        let chain = signer.create_certificate("node-a", good).await.unwrap().cert_chain;
        assert_eq!(chain.len(), 3, "leaf, intermediate, roots");
        assert_eq!(*chain.last().unwrap(), signer.ca.bundle().pem());
    }
}

#[tokio::test]
async fn each_wrong_request_is_refused_with_its_reason() {
    let dir = tempfile::tempdir().unwrap();
    let signer = signer(dir.path());
    let (_, web) = csr::request(&id("web")).unwrap();
    let (_, db) = csr::request(&id("db")).unwrap();
    let foreign = "spiffe://elsewhere.example/ns/shop/sa/web";
    use tonic::Code::{InvalidArgument, PermissionDenied};
    let table = [
        ("node-b", request(web.clone(), None), PermissionDenied, "runs on node `node-b`"),
        ("node-a", request(db.clone(), None), PermissionDenied, "no pod with"),
        ("node-a", request(db, text(id("web"))), InvalidArgument, "must agree"),
        ("node-a", request(nameless(), None), InvalidArgument, "no identity is asked for"),
        ("node-a", request(nameless(), Some(Value { string: None })), InvalidArgument, "ImpersonatedIdentity"),
        ("node-a", request(web, text("web")), InvalidArgument, "ImpersonatedIdentity"),
        ("node-a", request(nameless(), text(foreign)), PermissionDenied, "this CA signs for `cluster.local`"),
        ("node-a", request("junk".to_owned(), text(id("web"))), InvalidArgument, "can't be read"),
        ("node-a", request("x".repeat(20_000), text(id("web"))), InvalidArgument, "20000 bytes"),
    ];
    for (node, request, code, word) in table {
        let status = signer.create_certificate(node, request).await.unwrap_err();
        assert_eq!(status.code(), code, "{}", status.message());
        assert!(status.message().contains(word), "{}", status.message());
    }
}

#[tokio::test]
async fn a_stranger_is_turned_away_by_the_header() {
    let dir = tempfile::tempdir().unwrap();
    let signer = signer(dir.path());
    let soon = SystemTime::now() + Duration::from_secs(60);
    let token = signer.tokens.as_ref().unwrap().issue("node-a", &[], soon).unwrap();
    let ask = async |value: &str| {
        let mut headers = http::HeaderMap::new();
        headers.insert("authorization", value.parse().unwrap());
        signer.authenticate(&headers, None).await
    };
    assert_eq!(ask(&format!("Bearer {token}")).await.unwrap(), "node-a");
    let none = signer.authenticate(&http::HeaderMap::new(), None).await;
    assert_eq!(none.unwrap_err().code(), tonic::Code::Unauthenticated);
    for value in ["", "Bearer", "Bearer ", &format!("Basic {token}"), &format!("Bearer {token}x")] {
        assert_eq!(ask(value).await.unwrap_err().code(), tonic::Code::Unauthenticated, "{value}");
    }
}

#[tokio::test]
async fn tokens_of_both_kinds_are_told_apart_and_each_refusal_has_its_code() {
    let dir = tempfile::tempdir().unwrap();
    let accounts: Accounts = Arc::new(|token, _| {
        Box::pin(ready(match token.as_str() {
            "good" => Ok("node-b".to_owned()),
            "often" => Err(Refusal::TooOften("later".to_owned())),
            "away" => Err(Refusal::Unavailable("the API is away".to_owned())),
            other => Err(Refusal::Denied(format!("`{other}` is not good"))),
        }))
    });
    let both = Signer { accounts: Some(accounts.clone()), ..signer(dir.path()) };
    let join = both.tokens.as_ref().unwrap().issue("node-a", &[], SystemTime::now() + Duration::from_secs(60)).unwrap();
    let ask = async |signer: &Signer, token: &str| {
        let mut headers = http::HeaderMap::new();
        headers.insert("authorization", format!("Bearer {token}").parse().unwrap());
        signer.authenticate(&headers, None).await.map_err(|status| status.code())
    };
    use tonic::Code::{ResourceExhausted, Unauthenticated, Unavailable};
    assert_eq!(ask(&both, "good").await.unwrap(), "node-b");
    assert_eq!(ask(&both, &join).await.unwrap(), "node-a");
    for (token, code) in [("bad", Unauthenticated), ("often", ResourceExhausted), ("away", Unavailable)] {
        assert_eq!(ask(&both, token).await.unwrap_err(), code, "{token}");
    }
    // Where no join tokens are made, one is a token like any other.
    let only = Signer { tokens: None, ..both };
    assert_eq!(ask(&only, &join).await.unwrap_err(), Unauthenticated);
    assert_eq!(ask(&only, "good").await.unwrap(), "node-b");
}

#[test]
fn a_node_that_asks_too_often_is_slowed_down() {
    let start = Instant::now();
    let mut bucket = Bucket::full(start);
    let at = |ms: u64| start + Duration::from_millis(ms);
    assert_eq!((0..3000).filter(|_| bucket.take(at(0))).count(), NODE_BURST as usize);
    assert!(!bucket.take(at(10)));
    assert!(bucket.take(at(31)));
    assert!(!bucket.take(at(32)));
    assert_eq!((0..9000).filter(|_| bucket.take(at(3_600_000))).count(), NODE_BURST as usize, "never more than full");
}

#[tokio::test]
async fn a_port_in_use_is_named() {
    let taken = bind("127.0.0.1:0".parse().unwrap()).await.unwrap().local_addr().unwrap();
    let held = bind(taken).await.unwrap();
    let error = bind(held.local_addr().unwrap()).await.unwrap_err().to_string();
    assert!(error.contains(&taken.to_string()), "{error}");
}

#[test]
fn one_address_can_not_take_all_places() {
    let (room, peers) = (Arc::new(Semaphore::new(1000)), Peers::default());
    let take = |last| peers.take(IpAddr::from([10, 0, 0, last]), room.clone().try_acquire_owned().unwrap());
    let mut held: Vec<Place> = (0..400).filter_map(|_| take(1)).collect();
    assert_eq!(held.len(), MAX_CONNECTIONS_PER_ADDRESS);
    assert!(take(2).is_some());
    held.pop();
    assert!(take(1).is_some());
    drop(held);
    assert!(peers.0.lock().unwrap().is_empty());
    assert_eq!(room.available_permits(), 1000);
}
