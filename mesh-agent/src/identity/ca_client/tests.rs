use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::Path;
use std::time::SystemTime;

use tokio::io::AsyncWriteExt;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::super::join_token::REVOKED;
use super::super::testing::{certificate_options, domain, eventually, handshake, id, open_ca, pass};
use super::super::{Ca, CaOptions, CaServerOptions, Certificates, Clock, JoinTokens, RunsOn, bind, serve};
use super::*;

/// A controller on loopback; `node-a` runs `web`, `node-b` runs `db`.
struct Controller {
    ca: Arc<Ca>,
    tokens: Arc<JoinTokens>,
    address: SocketAddr,
    stop: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

impl Controller {
    async fn start(dir: &Path) -> Self {
        Self::start_with(open_ca(dir), dir, "127.0.0.1:0".parse().unwrap()).await
    }

    async fn start_with(ca: Arc<Ca>, dir: &Path, address: SocketAddr) -> Self {
        let listener = bind(address).await.unwrap();
        let address = listener.local_addr().unwrap();
        let tokens = Arc::new(JoinTokens::open(dir).unwrap());
        let pods = HashMap::from([("node-a", id("web")), ("node-b", id("db"))]);
        let runs_on: RunsOn =
            Arc::new(move |node, identity| Box::pin(std::future::ready(pods.get(node) == Some(identity))));
        let options = CaServerOptions {
            listener,
            names: vec!["istiod.istio-system.svc".to_owned(), "127.0.0.1".to_owned()],
            ca: ca.clone(),
            tokens: Some(tokens.clone()),
            accounts: None,
            runs_on,
            poll: Duration::from_secs(1),
        };
        let (stop, stopped) = oneshot::channel();
        let task = tokio::spawn(async move { serve(options, async { drop(stopped.await) }).await.unwrap() });
        Self { ca, tokens, address, stop, task }
    }

    fn token(&self, node: &str) -> String {
        let soon = SystemTime::now() + Duration::from_secs(600);
        self.tokens.issue(node, self.ca.bundle().fingerprints(), soon).unwrap()
    }

    /// Ends it whole: the port is free and the state directory unlocked.
    async fn stop(self) {
        self.stop.send(()).unwrap();
        self.task.await.unwrap();
        let ca = Arc::downgrade(&self.ca);
        drop(self.ca);
        eventually("the CA is dropped", || ca.upgrade().is_none()).await;
    }
}

fn options(addresses: &[SocketAddr], token: &str, node: &str, dir: &Path) -> CaClientOptions {
    CaClientOptions {
        addresses: addresses.iter().map(ToString::to_string).collect(),
        credential: Credential::Join { token: token.to_owned(), node: node.to_owned() },
        state_dir: dir.to_owned(),
        deadline: Duration::from_secs(10),
    }
}

/// A node with a state directory of its own.
struct Node {
    certificates: Certificates,
    dir: tempfile::TempDir,
}

fn node(addresses: &[SocketAddr], token: &str, name: &str) -> Node {
    let dir = tempfile::tempdir().unwrap();
    let client = CaClient::new(options(addresses, token, name, dir.path())).unwrap();
    Node { certificates: Certificates::remote(client, certificate_options(Clock::system())), dir }
}

#[tokio::test]
async fn two_nodes_join_with_an_address_and_a_token_and_their_workloads_meet() {
    let dir = tempfile::tempdir().unwrap();
    let controller = Controller::start(dir.path()).await;
    let a = node(&[controller.address], &controller.token("node-a"), "node-a");
    let b = node(&[controller.address], &controller.token("node-b"), "node-b");
    a.certificates.ensure(&id("web")).await.unwrap();
    b.certificates.ensure(&id("db")).await.unwrap();
    let (web, db) = (a.certificates.get(&id("web")).unwrap(), b.certificates.get(&id("db")).unwrap());
    handshake(web.client.clone(), db.server.clone()).await.unwrap().ping().await.unwrap();
    handshake(db.client.clone(), web.server.clone()).await.unwrap().ping().await.unwrap();
}

#[tokio::test]
async fn an_identity_of_another_node_is_not_signed() {
    let dir = tempfile::tempdir().unwrap();
    let controller = Controller::start(dir.path()).await;
    let a = node(&[controller.address], &controller.token("node-a"), "node-a");
    let problem = a.certificates.ensure(&id("db")).await.unwrap_err();
    assert!(problem.contains("no pod with `spiffe://cluster.local/ns/shop/sa/db` runs on node `node-a`"), "{problem}");
    assert!(a.certificates.get(&id("db")).is_none());
}

#[tokio::test]
async fn each_bad_token_is_refused_with_its_reason() {
    let (dir, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let controller = Controller::start(dir.path()).await;
    let root = controller.ca.bundle().fingerprints().to_vec();
    let soon = SystemTime::now() + Duration::from_secs(600);
    let past = SystemTime::now() - Duration::from_secs(1);
    let expired = controller.tokens.issue("node-a", &root, past).unwrap();
    let foreign = JoinTokens::open(elsewhere.path()).unwrap().issue("node-a", &root, soon).unwrap();
    let revoked = controller.token("node-a");
    std::fs::write(dir.path().join(REVOKED), Claims::read(&revoked).unwrap().id).unwrap();
    // The root of another mesh: the controller is not believed, and the token is not shown to it.
    let other_root = controller.tokens.issue("node-a", &["0".repeat(64)], soon).unwrap();
    let table = [
        (expired, "has expired at"),
        (foreign, "was not made by this controller"),
        (revoked, "has been revoked"),
        (other_root, "ends in no root that is trusted here"),
    ];
    for (token, word) in table {
        let a = node(&[controller.address], &token, "node-a");
        let problem = a.certificates.ensure(&id("web")).await.unwrap_err();
        assert!(problem.contains(word), "{word}: {problem}");
    }
}

#[tokio::test]
async fn clocks_that_differ_are_named() {
    let hour = Duration::from_secs(3600);
    // The controller's clock is ahead: its own certificate begins in what is the future here.
    let (dir, ahead) = (tempfile::tempdir().unwrap(), Clock::tokio());
    pass(hour).await;
    let ca = Ca::open(CaOptions { clock: ahead, ..CaOptions::new(dir.path(), domain()) }).unwrap();
    let controller = Controller::start_with(ca, dir.path(), "127.0.0.1:0".parse().unwrap()).await;
    let a = node(&[controller.address], &controller.token("node-a"), "node-a");
    let problem = a.certificates.ensure(&id("web")).await.unwrap_err();
    assert!(problem.contains("the certificate is valid from 2"), "{problem}");
    assert!(problem.contains("Z: compare the clocks"), "{problem}");

    // The node's is: what the controller signs has ended here already.
    let (dir, node_dir, ahead) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), Clock::tokio());
    let controller = Controller::start(dir.path()).await;
    pass(hour * 25).await;
    let token = controller.token("node-a");
    let client = CaClient::new(options(&[controller.address], &token, "node-a", node_dir.path())).unwrap();
    let problem = Certificates::remote(client, certificate_options(ahead)).ensure(&id("web")).await.unwrap_err();
    assert!(problem.contains("the certificate has expired at 2"), "{problem}");
    assert!(problem.contains("compare the clocks"), "{problem}");
}

#[tokio::test]
async fn wrong_settings_are_refused_before_anything_is_sent() {
    let dir = tempfile::tempdir().unwrap();
    let tokens = JoinTokens::open(dir.path()).unwrap();
    let token = tokens.issue("node-a", &[], SystemTime::now() + Duration::from_secs(600)).unwrap();
    let refused = |options: CaClientOptions| CaClient::new(options).err().unwrap().to_string();
    let good = options(&["127.0.0.1:1".parse().unwrap()], &token, "node-a", dir.path());

    let text = refused(options(&["127.0.0.1:1".parse().unwrap()], &token, "node-b", dir.path()));
    assert!(text.contains("is for node `node-a`, and this is node `node-b`"), "{text}");
    let text = refused(options(&["127.0.0.1:1".parse().unwrap()], "junk", "node-a", dir.path()));
    assert!(text.contains("no token of this version"), "{text}");
    assert!(refused(CaClientOptions { addresses: vec![], ..good.clone() }).contains("no address"));
    for address in ["controller", ":1", "a:b", "a:99999", "a b:1"] {
        let text = refused(CaClientOptions { addresses: vec![address.to_owned()], ..good.clone() });
        assert!(text.contains(address) && text.contains("host:port"), "{text}");
    }
    std::fs::write(dir.path().join(ROOTS), "{").unwrap();
    assert!(refused(good).contains(ROOTS));
}

#[tokio::test]
async fn a_workload_can_not_pose_as_the_controller() {
    let dir = tempfile::tempdir().unwrap();
    let ca = open_ca(dir.path());
    let certificates = Certificates::embedded(ca.clone(), certificate_options(Clock::system()));
    certificates.ensure(&id("web")).await.unwrap();
    // The thief answers with a genuine chain of the mesh, and the root after it.
    let (key, request) = super::super::csr::request(&id("web")).unwrap();
    let request = super::super::csr::VerifiedCsr::from_pem(&request).unwrap();
    let mut chain = ca.sign_workload(&request.key, &id("web"), None).unwrap();
    chain.extend(ca.bundle().roots().iter().cloned());
    let certified = super::super::testing::certified(chain, &key);
    let mut server = rustls::ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&version::TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(rustls::sign::SingleCertAndKey::from(certified)));
    server.alpn_protocols = vec![b"h2".to_vec()];
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let thief = tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        tokio_rustls::TlsAcceptor::from(Arc::new(server)).accept(stream).await.err().map(|e| e.to_string())
    });
    let root = ca.bundle().fingerprints().to_vec();
    let token = JoinTokens::open(dir.path()).unwrap();
    let token = token.issue("node-a", &root, SystemTime::now() + Duration::from_secs(60)).unwrap();
    let node_dir = tempfile::tempdir().unwrap();
    let client = CaClient::new(options(&[address], &token, "node-a", node_dir.path())).unwrap();
    let failure = client.ask_bundle().await.err().unwrap();
    assert!(failure.text.contains("not valid for name"), "{}", failure.text);
    assert!(thief.await.unwrap().is_some(), "the handshake is broken off before the token is sent");
}

#[tokio::test]
async fn the_next_address_is_asked_where_one_does_not_answer() {
    let dir = tempfile::tempdir().unwrap();
    let controller = Controller::start(dir.path()).await;
    // Bound and closed again: nobody listens there.
    let dead = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let a = node(&[dead, controller.address], &controller.token("node-a"), "node-a");
    a.certificates.ensure(&id("web")).await.unwrap();

    let lost = node(&[dead], &controller.token("node-a"), "node-a");
    let problem = lost.certificates.ensure(&id("web")).await.unwrap_err();
    assert!(problem.contains("no controller answers") && problem.contains("refused"), "{problem}");
}

#[tokio::test]
async fn a_controller_that_accepts_and_says_nothing_is_given_up_by_the_deadline() {
    let dir = tempfile::tempdir().unwrap();
    let controller = Controller::start(dir.path()).await;
    let mute = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mute_address = mute.local_addr().unwrap();
    let held = tokio::spawn(async move {
        let mut open = Vec::new();
        while let Ok((stream, _)) = mute.accept().await {
            open.push(stream);
        }
    });
    let mut options = options(&[mute_address, controller.address], &controller.token("node-a"), "node-a", dir.path());
    options.deadline = Duration::from_millis(200);
    let client = CaClient::new(options).unwrap();
    assert!(client.ask_bundle().await.is_ok_and(|(news, _)| news));
    held.abort();
}

#[tokio::test]
async fn a_node_runs_on_while_the_controller_is_away_and_finds_it_again() {
    let dir = tempfile::tempdir().unwrap();
    let controller = Controller::start(dir.path()).await;
    let address = controller.address;
    let a = node(&[address], &controller.token("node-a"), "node-a");
    a.certificates.ensure(&id("web")).await.unwrap();
    controller.stop().await;

    let tls = a.certificates.get(&id("web")).unwrap();
    handshake(tls.client.clone(), tls.server.clone()).await.unwrap().ping().await.unwrap();
    a.certificates.release(&id("web"));
    let problem = a.certificates.ensure(&id("web")).await.unwrap_err();
    assert!(problem.contains("no controller answers"), "{problem}");

    let controller = Controller::start_with(open_ca(dir.path()), dir.path(), address).await;
    while a.certificates.ensure(&id("web")).await.is_err() {}
    assert_eq!(a.certificates.list()[0].problem, None);
    controller.stop().await;
}

#[tokio::test]
async fn a_new_root_signs_when_every_node_trusts_it_and_a_restart_still_knows_the_controller() {
    let dir = tempfile::tempdir().unwrap();
    let announce = Duration::ZERO;
    let retire = Some(Duration::from_secs(2));
    let ca = Ca::open(CaOptions { announce, retire, ..CaOptions::new(dir.path(), domain()) }).unwrap();
    let controller = Controller::start_with(ca.clone(), dir.path(), "127.0.0.1:0".parse().unwrap()).await;
    let token = controller.token("node-a");
    let a = node(&[controller.address], &token, "node-a");
    let b = node(&[controller.address], &controller.token("node-b"), "node-b");
    a.certificates.ensure(&id("web")).await.unwrap();
    b.certificates.ensure(&id("db")).await.unwrap();
    let old = ca.bundle().fingerprints()[0].clone();
    // Both have asked for the roots, so the CA knows that there are two nodes to wait for.
    eventually("both nodes are known", || ca.nodes().len() == 2).await;

    let (web, db) = (a.certificates.get(&id("web")).unwrap(), b.certificates.get(&id("db")).unwrap());
    let mut before = handshake(web.client.clone(), db.server.clone()).await.unwrap();
    let new = ca.rotate_root().unwrap();
    let trusts = |node: &Node| node.certificates.list()[0].roots.iter().any(|root| new.starts_with(root.as_str()));
    let mut switched_early = false;
    eventually("the new root signs", || {
        let switched = ca.bundle().fingerprints()[0] == new;
        switched_early |= switched && !(trusts(&a) && trusts(&b));
        // At each moment the two nodes' present certificates go together, whichever root has signed them.
        switched
    })
    .await;
    assert!(!switched_early, "a node did not trust the root that signs");
    eventually("the old root is gone from both nodes", || {
        let gone = |node: &Node| !node.certificates.list()[0].roots.iter().any(|root| old.starts_with(root.as_str()));
        gone(&a) && gone(&b) && !ca.bundle().contains(&old)
    })
    .await;
    eventually("both leaves are of the new root", || {
        a.certificates.list()[0].state == "ready" && b.certificates.list()[0].state == "ready"
    })
    .await;
    before.ping().await.unwrap();

    // The token still names the old root, which is gone; what was learnt is kept.
    let again = CaClient::new(options(&[controller.address], &token, "node-a", a.dir.path())).unwrap();
    again.ask_bundle().await.map_err(|failure| failure.text).unwrap();
    drop(again);
    let fresh = tempfile::tempdir().unwrap();
    let fresh = CaClient::new(options(&[controller.address], &token, "node-a", fresh.path())).unwrap();
    assert!(fresh.ask_bundle().await.is_err(), "a node that learnt nothing needs a new token");
}

#[tokio::test]
async fn a_request_that_is_too_large_is_refused() {
    let (dir, node_dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let controller = Controller::start(dir.path()).await;
    let client =
        CaClient::new(options(&[controller.address], &controller.token("node-a"), "node-a", node_dir.path())).unwrap();
    let csr = "x".repeat(rpc::MAX_REQUEST_BYTES);
    let request = CertificateRequest { csr, validity_duration: 0, metadata: None };
    let failure = client.call::<_, CertificateResponse>(rpc::CREATE_CERTIFICATE, request).await.err().unwrap();
    assert_eq!(failure.code, Code::OutOfRange, "{}", failure.text);
    let failure = client.call::<_, CertificateResponse>("/other.Service/Method", BundleRequest::default()).await;
    assert_eq!(failure.err().unwrap().code, Code::Unimplemented);
}

#[tokio::test]
async fn an_istio_client_dials_by_name_and_root_file() {
    let (dir, node_dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let controller = Controller::start(dir.path()).await;
    let (token_file, root_file) = (node_dir.path().join("istio-token"), node_dir.path().join("root-cert.pem"));
    std::fs::write(&token_file, controller.token("node-a") + "\n").unwrap();
    std::fs::write(&root_file, controller.ca.bundle().pem()).unwrap();
    let client = CaClient::new(CaClientOptions {
        addresses: vec![controller.address.to_string()],
        credential: Credential::Istio { token_file, root_file },
        state_dir: node_dir.path().to_owned(),
        deadline: Duration::from_secs(10),
    });
    let certificates = Certificates::remote(client.unwrap(), certificate_options(Clock::system()));
    certificates.ensure(&id("web")).await.unwrap();
}

#[tokio::test]
async fn a_root_that_its_owner_has_replaced_is_taken_without_a_restart() {
    let (dir, other, node_dir) =
        (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let controller = Controller::start(dir.path()).await;
    let address = controller.address;
    let token_file = node_dir.path().join("token");
    std::fs::write(&token_file, controller.token("node-a")).unwrap();
    let client = CaClient::new(CaClientOptions {
        addresses: vec![address.to_string()],
        credential: Credential::ServiceAccount {
            token_file: token_file.clone(),
            roots_pem: controller.ca.bundle().pem(),
        },
        state_dir: node_dir.path().to_owned(),
        deadline: Duration::from_secs(10),
    })
    .unwrap();
    let certificates = Certificates::remote(client.clone(), certificate_options(Clock::system()));
    certificates.ensure(&id("web")).await.unwrap();
    let serial = || certificates.list()[0].serial.clone();
    let before = serial();
    controller.stop().await;
    // Another CA altogether, with nothing of the old one.
    let controller = Controller::start_with(open_ca(other.path()), other.path(), address).await;
    std::fs::write(&token_file, controller.token("node-a")).unwrap();
    let untrusted = client.ask_bundle().await.err().unwrap().text;
    assert!(untrusted.contains("ends in no root that is trusted here"), "{untrusted}");
    client.trust("no certificate").unwrap_err();
    assert!(client.trust(&controller.ca.bundle().pem()).unwrap());
    assert!(!client.trust(&controller.ca.bundle().pem()).unwrap());
    // Far sooner than it would be renewed, or tried again.
    eventually("a certificate of the new root", || serial() != before && certificates.list()[0].problem.is_none())
        .await;
    controller.stop().await;
}

#[tokio::test]
async fn bytes_that_are_no_tls_do_no_harm() {
    let dir = tempfile::tempdir().unwrap();
    let controller = Controller::start(dir.path()).await;
    for bytes in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0; 64], b""] {
        let mut stream = TcpStream::connect(controller.address).await.unwrap();
        stream.write_all(bytes).await.unwrap();
        drop(stream);
    }
    let a = node(&[controller.address], &controller.token("node-a"), "node-a");
    a.certificates.ensure(&id("web")).await.unwrap();
}
