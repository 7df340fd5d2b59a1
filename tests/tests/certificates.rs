//! Identities: who gets a certificate, that it is renewed under open connections, what happens while the CA is away.

use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_tests::ring::{Case, Mode, World, meshed_only, run};
use mesh_tests::traffic::{PATIENCE, call, echo_in, ping};
use mesh_tests::{Mesh, MeshMode, Pod, Process, agent_binary, eventually, throughout};
use serde_json::Value;

struct Certificates {
    world: World,
    client: Arc<Pod>,
    server: Arc<Pod>,
}

/// The shortest life that the settings allow. The CA may give a minute in its place: renewed every half minute then.
const LIFETIME: &str = "10s";
const RENEWAL: Duration = Duration::from_secs(50);

fn build() -> Certificates {
    let mesh = Mesh::new().node("n1").node("n2");
    mesh.manifests().label("certs", MeshMode::Enabled);
    let client = mesh.pod("n1", "certs/client");
    let server = mesh.pod("n2", "certs/server");
    let world = World::start(mesh, Mode::of_this_run(), &["--cert-lifetime", LIFETIME]);
    world.wait_enrolled(&[&client, &server]);
    Certificates { world, client, server }
}

const CASES: &[Case<Certificates>] = &[
    ("each_pod_has_the_certificate_of_its_service_account", each_pod_has_its_certificate),
    ("renewal_drops_no_connection", renewal_drops_no_connection),
    ("a_new_root_drops_no_connection", a_new_root_drops_no_connection),
    ("an_agent_outlives_its_ca", an_agent_outlives_its_ca),
    ("a_token_of_another_node_is_refused", a_token_of_another_node_is_refused),
    ("a_forged_token_is_refused", a_forged_token_is_refused),
    ("one_node_may_be_its_own_ca", one_node_may_be_its_own_ca),
    ("settings_that_make_no_sense_end_the_agent", settings_that_make_no_sense_end_the_agent),
];

fn main() -> ExitCode {
    run(build, |c| &c.world, meshed_only(CASES))
}

/// A field of the certificate that a node has for a pod.
fn field(c: &Certificates, node: &str, pod: &Pod, name: &str) -> Value {
    let all = c.world.agent(node).meshctl_json(&["certificates"]);
    let mut found = all.as_array().cloned().unwrap_or_default().into_iter();
    let certificate = found.find(|certificate| certificate["identity"] == pod.spiffe_id().as_str());
    certificate.map(|certificate| certificate[name].clone()).unwrap_or_default()
}

fn serial(c: &Certificates, node: &str, pod: &Pod) -> Value {
    field(c, node, pod, "serial")
}

fn each_pod_has_its_certificate(c: &Certificates) {
    for (node, pod, other) in [("n1", &c.client, &c.server), ("n2", &c.server, &c.client)] {
        eventually(Duration::from_secs(5), "the certificate is there", || serial(c, node, pod).is_string());
        assert!(serial(c, node, other).is_null(), "{node} has the certificate of a pod that is not its own");
    }
}

fn renewal_drops_no_connection(c: &Certificates) {
    let stream = c.client.connect((c.server.v4(), echo_in(&c.server)).into()).unwrap();
    let (client, server) = (serial(c, "n1", &c.client), serial(c, "n2", &c.server));
    let renewed = || serial(c, "n1", &c.client) != client && serial(c, "n2", &c.server) != server;
    let start = Instant::now();
    while !renewed() {
        ping(&stream, b"through the renewal").expect("the connection lives");
        let all = || ["n1", "n2"].map(|node| c.world.agent(node).meshctl_json(&["certificates"]).to_string());
        assert!(start.elapsed() < RENEWAL, "{client} and {server} not renewed in {RENEWAL:?}: {:#?}", all());
        std::thread::sleep(Duration::from_millis(50));
    }
    throughout(Duration::from_secs(5), "the connection lives", || ping(&stream, b"and beyond").is_ok());
}

fn a_new_root_drops_no_connection(c: &Certificates) {
    let to: SocketAddr = (c.server.v4(), echo_in(&c.server)).into();
    let stream = c.client.connect(to).unwrap();
    ping(&stream, b"before").unwrap();
    let roots = || field(c, "n1", &c.client, "roots");
    let before = roots();
    c.world.mesh().rotate_root().success();
    eventually(Duration::from_secs(30), "the client's node trusts the new root too", || {
        ping(&stream, b"through the change").expect("the connection lives");
        call(&c.client, to).expect("new connections too");
        roots() != before
    });
    throughout(Duration::from_secs(6), "all goes on with the new one", || {
        ping(&stream, b"after").is_ok() && call(&c.client, to).is_ok()
    });
}

fn an_agent_outlives_its_ca(c: &Certificates) {
    let to: SocketAddr = (c.server.v4(), echo_in(&c.server)).into();
    // Right after a renewal, so that its certificate is good for seconds yet.
    let old = serial(c, "n1", &c.client);
    eventually(RENEWAL, "a fresh certificate", || serial(c, "n1", &c.client) != old);
    c.world.controller().kill();
    call(&c.client, to).expect("the present certificate serves");
    let said = || !field(c, "n1", &c.client, "problem").is_null();
    eventually(RENEWAL, "it says that it cannot renew", said);
    call(&c.client, to).expect("the present certificate still serves");
    c.world.controller().restart();
    eventually(RENEWAL, "it is renewed when the CA is back", || {
        !said() && serial(c, "n1", &c.client) != old && call(&c.client, to).is_ok()
    });
}

#[track_caller]
fn is_refused(flags: &[&str], word: &str) {
    let mesh = Mesh::new().node("n1");
    mesh.manifests().label("certs", MeshMode::Enabled);
    let pod = mesh.pod("n1", "certs/client");
    let controller = mesh.start_controller(&[]);
    let mut agent = mesh.spawn_agent("n1", flags);
    let told = |log: &str| log.contains(word);
    eventually(PATIENCE, "the agent says what is wrong", || told(&agent.log()) || told(&controller.log()));
    // It may have ended, or not have come to its admin socket yet.
    eventually(PATIENCE, "the agent has ended or answers", || {
        !agent.process().is_running() || agent.meshctl(&["status"]).code == Some(0)
    });
    if agent.process().is_running() {
        assert!(!agent.is_enrolled(&pod), "a pod is in the mesh without a certificate");
    }
    drop((agent, controller));
}

fn a_token_of_another_node_is_refused(c: &Certificates) {
    let token = c.world.mesh().join_token("n2").display().to_string();
    is_refused(&["--join-token-file", &token], "n2");
}

fn a_forged_token_is_refused(c: &Certificates) {
    let forged = c.world.mesh().dir().join("forged-token");
    std::fs::write(&forged, "bm90IGEgdG9rZW4K.bm90IGEgdG9rZW4K\n").unwrap();
    is_refused(&["--join-token-file", &forged.display().to_string()], "token");
}

fn one_node_may_be_its_own_ca(_: &Certificates) {
    let mesh = Mesh::new().node("n1");
    mesh.manifests().label("certs", MeshMode::Enabled);
    let (client, server) = (mesh.pod("n1", "certs/client"), mesh.pod("n1", "certs/server"));
    let agent = mesh.start_agent("n1", &["--embedded-ca"]);
    agent.wait_enrolled(&client, true);
    agent.wait_enrolled(&server, true);
    call(&client, (server.v4(), echo_in(&server)).into()).unwrap();
    drop(agent);
}

fn settings_that_make_no_sense_end_the_agent(c: &Certificates) {
    let dir = c.world.mesh().dir().display().to_string();
    for (flags, word) in [
        (vec!["--no-such-flag"], "--no-such-flag"),
        (vec!["--embedded-ca", "--outbound-policy", "PERHAPS"], "--outbound-policy"),
        (vec!["--embedded-ca", "--config-dir", "/no/such/folder"], "/no/such/folder"),
        (vec!["--ca-address", "127.0.0.1:1"], "--join-token-file"),
    ] {
        // Where no agent is whose ports could be in the way.
        let mut command = c.world.mesh().control().command(&agent_binary().display().to_string());
        command.args(["node", "--node-name", "n1", "--state-dir", &format!("{dir}/x"), "--admin-socket"]);
        command.arg(format!("{dir}/x.sock"));
        if !flags.contains(&"--config-dir") {
            command.args(["--config-dir", &format!("{dir}/manifests")]);
        }
        command.args(&flags);
        let log = c.world.mesh().logs().join("senseless.log");
        let _ = std::fs::remove_file(&log);
        let mut process = Process::start(&format!("agent with {flags:?}"), command, &log);
        let status = process.wait(Duration::from_secs(5));
        let said = process.log();
        assert!(!status.success() && said.contains(word), "{flags:?}: {status} {said}");
        assert!(!said.contains("panicked"), "{flags:?}: {said}");
    }
}
