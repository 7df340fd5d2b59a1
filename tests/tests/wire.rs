//! What passes between the nodes. In plain mode each case proves that its capture would see what it looks for.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use mesh_tests::ring::{Case, Mode, World, run};
use mesh_tests::traffic::{echo_in, pair, pair_at, ping};
use mesh_tests::{Mesh, MeshMode, Pod, Recording};
use socket2::Domain;

struct Wire {
    world: World,
    client: Arc<Pod>,
    near: Arc<Pod>,
    far: Arc<Pod>,
}

fn build() -> Wire {
    let mode = Mode::of_this_run();
    let mesh = Mesh::new().node("n1").node("n2");
    if mode.is_meshed() {
        mesh.manifests().label("wire", MeshMode::Enabled);
    }
    let client = mesh.pod("n1", "wire/client");
    let near = mesh.pod("n1", "wire/near");
    let far = mesh.pod("n2", "wire/far");
    let world = World::start(mesh, mode, &[]);
    world.wait_enrolled(&[&client, &near, &far]);
    Wire { world, client, near, far }
}

const CASES: &[Case<Wire>] = &[
    ("payload_is_encrypted_v4", |w| payload_is_encrypted(w, w.far.v4())),
    ("payload_is_encrypted_v6", |w| payload_is_encrypted(w, w.far.v6())),
    ("only_hbone_passes_between_pods", only_hbone_passes_between_pods),
    ("the_handshake_is_tls_1_3_with_a_post_quantum_key_exchange", the_handshake_is_tls_1_3),
    ("one_node_keeps_its_traffic_to_itself", one_node_keeps_its_traffic_to_itself),
    ("case_34_forged_marks_do_not_bypass", case_34_forged_marks_do_not_bypass),
    ("case_35_source_address_on_the_wire", case_35_source_address_on_the_wire),
];

fn main() -> ExitCode {
    run(build, |w| &w.world, CASES)
}

const HBONE: u16 = 15008;
const HANDSHAKE: u8 = 22;
const APPLICATION_DATA: u8 = 23;

/// Checks that the secret passed in TLS, or, in plain mode, that the capture has it.
#[track_caller]
fn expect_secret(w: &Wire, recording: &Recording, secret: &[u8]) {
    if w.world.mode.is_meshed() {
        assert!(!recording.contains(secret), "the payload passed in the clear");
        assert!(recording.tls_records(APPLICATION_DATA) > 0, "no TLS record passed");
    } else {
        assert!(recording.contains(secret), "without a mesh the payload passes in the clear");
        assert_eq!(recording.tls_records(APPLICATION_DATA), 0);
    }
}

fn payload_is_encrypted(w: &Wire, to: IpAddr) {
    let capture = w.world.mesh().capture("n1");
    let (near, far) = pair_at(&w.client, &w.far, to);
    (&near).write_all(b"the client's secret").unwrap();
    (&far).read_exact(&mut [0; 19]).unwrap();
    (&far).write_all(b"the server's secret").unwrap();
    (&near).read_exact(&mut [0; 19]).unwrap();
    let recording = capture.stop();
    expect_secret(w, &recording, b"the client's secret");
    expect_secret(w, &recording, b"the server's secret");
}

fn only_hbone_passes_between_pods(w: &Wire) {
    let capture = w.world.mesh().capture("n1");
    let (near, far) = pair(&w.client, &w.far);
    (&near).write_all(&[b'x'; 100_000]).unwrap();
    (&far).read_exact(&mut [0; 100_000]).unwrap();
    let recording = capture.stop();
    let of_pods = |ip: IpAddr| [w.client.v4(), w.client.v6(), w.far.v4(), w.far.v6()].contains(&ip);
    let between = recording.segments.iter().filter(|s| of_pods(s.source.0) && of_pods(s.destination.0));
    let (hbone, other): (Vec<_>, Vec<_>) = between.partition(|s| s.source.1 == HBONE || s.destination.1 == HBONE);
    if w.world.mode.is_meshed() {
        assert!(
            !hbone.is_empty() && other.is_empty(),
            "{} segments beside HBONE, e.g. {:?}",
            other.len(),
            other.first()
        );
    } else {
        assert!(hbone.is_empty() && !other.is_empty());
    }
}

fn the_handshake_is_tls_1_3(w: &Wire) {
    // A fresh server, so that no tunnel to it is there yet.
    let server = w.world.mesh().pod("n2", "wire/fresh");
    w.world.wait_enrolled(&[&server]);
    let capture = w.world.mesh().capture("n1");
    let (near, far) = pair(&w.client, &server);
    (&near).write_all(b"x").unwrap();
    (&far).read_exact(&mut [0]).unwrap();
    let recording = capture.stop();
    let handshakes = recording.tls_records(HANDSHAKE);
    if w.world.mode.is_meshed() {
        assert!(handshakes >= 2, "{handshakes} handshake records");
        // The server hello's extensions: supported_versions = 1.3, key_share = X25519MLKEM768 (1120 bytes).
        assert!(recording.contains(&[0x00, 0x2b, 0x00, 0x02, 0x03, 0x04]), "not TLS 1.3");
        assert!(recording.contains(&[0x00, 0x33, 0x04, 0x64, 0x11, 0xec, 0x04, 0x60]), "not X25519MLKEM768");
        assert!(!recording.contains(b"spiffe://"), "certificates are encrypted in TLS 1.3");
    } else {
        assert_eq!(handshakes, 0);
    }
    drop((near, far));
    w.world.mesh().delete(server);
}

fn one_node_keeps_its_traffic_to_itself(w: &Wire) {
    let capture = w.world.mesh().capture("n1");
    let (near, far) = pair(&w.client, &w.near);
    (&near).write_all(b"among neighbours").unwrap();
    (&far).read_exact(&mut [0; 16]).unwrap();
    let recording = capture.stop();
    assert!(!recording.contains(b"among neighbours"));
    let neighbour = recording.segments.iter().find(|s| [w.near.v4(), w.near.v6()].contains(&s.destination.0));
    assert!(neighbour.is_none(), "{neighbour:?} left the node");
}

fn case_34_forged_marks_do_not_bypass(w: &Wire) {
    let to = SocketAddr::new(w.far.v4(), echo_in(&w.far));
    for mark in [0x539u32, 0x111, 1337, 0xffff_ffff] {
        let capture = w.world.mesh().capture("n1");
        let socket = w.client.socket(Domain::IPV4);
        socket.set_mark(mark).expect("root may set a mark");
        socket.connect_timeout(&to.into(), Duration::from_secs(5)).unwrap();
        let stream = TcpStream::from(socket);
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        ping(&stream, b"with a forged mark").unwrap();
        expect_secret(w, &capture.stop(), b"with a forged mark");
    }
}

fn case_35_source_address_on_the_wire(w: &Wire) {
    // NetworkPolicies of others look at it: the tunnel comes from the client's address, not from the node's.
    let server = w.world.mesh().pod("n2", "wire/looked-at");
    w.world.wait_enrolled(&[&server]);
    let capture = w.world.mesh().capture("n1");
    let (near, far) = pair(&w.client, &server);
    (&near).write_all(b"x").unwrap();
    (&far).read_exact(&mut [0]).unwrap();
    let recording = capture.stop();
    let mut to_server = recording.segments.iter().filter(|s| s.destination.0 == server.v4()).peekable();
    assert!(to_server.peek().is_some());
    assert!(to_server.all(|s| s.source.0 == w.client.v4()));
    drop((near, far));
    w.world.mesh().delete(server);
}
