use super::super::testing::{certificate_options, handshake, id, open_ca};
use super::*;

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
    let states: Vec<String> = certificates.list().into_iter().map(|info| info.state).collect();
    assert_eq!(states, ["ready", "ready"]);
}
