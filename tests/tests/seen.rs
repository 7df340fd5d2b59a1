//! What an operator sees: metrics, the access log, meshctl.

use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use mesh_tests::ring::{Case, Mode, World, meshed_only, run};
use mesh_tests::traffic::{PATIENCE, call, echo_in, ping, refusal};
use mesh_tests::{Mesh, MeshMode, Pod, eventually};
use serde_json::Value;

struct Seen {
    world: World,
    client: Arc<Pod>,
    server: Arc<Pod>,
}

fn build() -> Seen {
    let mesh = Mesh::new().node("n1").node("n2");
    mesh.manifests().label("seen", MeshMode::Enabled);
    let client = mesh.pod("n1", "seen/client");
    let server = mesh.pod("n2", "seen/server");
    let world = World::start(mesh, Mode::of_this_run(), &["--access-log", "json"]);
    world.wait_enrolled(&[&client, &server]);
    Seen { world, client, server }
}

const CASES: &[Case<Seen>] = &[
    ("metrics_count_a_connection_on_both_sides", metrics_count_a_connection_on_both_sides),
    ("the_access_log_has_a_line_for_each_side", the_access_log_has_a_line_for_each_side),
    ("a_denied_connection_is_seen", a_denied_connection_is_seen),
    ("meshctl_shows_everything", meshctl_shows_everything),
    ("a_broken_manifest_is_one_problem", a_broken_manifest_is_one_problem),
    ("the_log_level_changes_at_run_time", the_log_level_changes_at_run_time),
];

fn main() -> ExitCode {
    run(build, |s| &s.world, meshed_only(CASES))
}

/// The labels by which both agents name the connections of this file.
fn labels<'a>(reporter: &'a str, s: &'a Seen, ids: &'a (String, String)) -> Vec<(&'a str, &'a str)> {
    vec![
        ("reporter", reporter),
        ("source_workload", s.client.name()),
        ("source_workload_namespace", "seen"),
        ("source_principal", &ids.0),
        ("destination_workload", s.server.name()),
        ("destination_workload_namespace", "seen"),
        ("destination_principal", &ids.1),
        ("request_protocol", "tcp"),
        // As in Istio, only the server's side says how bytes came.
        ("connection_security_policy", if reporter == "source" { "unknown" } else { "mutual_tls" }),
    ]
}

fn metrics_count_a_connection_on_both_sides(s: &Seen) {
    let ids = (s.client.spiffe_id(), s.server.spiffe_id());
    let to = SocketAddr::new(s.server.v4(), echo_in(&s.server));
    for (node, reporter) in [("n1", "source"), ("n2", "destination")] {
        let labels = labels(reporter, s, &ids);
        let read = |name: &str| s.world.agent(node).metric(name, &labels);
        let names = [
            "istio_tcp_connections_opened_total",
            "istio_tcp_connections_closed_total",
            "istio_tcp_sent_bytes_total",
            "istio_tcp_received_bytes_total",
        ];
        let before = names.map(read);
        let stream = s.client.connect(to).unwrap();
        ping(&stream, &[b'x'; 1000]).unwrap();
        drop(stream);
        let grown = || {
            let after = names.map(read);
            [0, 1, 2, 3].map(|n| after[n] - before[n])
        };
        let start = Instant::now();
        while grown() != [1.0, 1.0, 1000.0, 1000.0] {
            let all = s.world.agent(node).metrics();
            let tcp: String =
                all.lines().filter(|line| line.starts_with("istio_tcp_")).flat_map(|line| [line, "\n"]).collect();
            assert!(start.elapsed() < PATIENCE, "{node} counts {:?} of {names:?} for {labels:?}:\n{tcp}", grown());
            thread::sleep(Duration::from_millis(10));
        }
    }
    let kernel = s.world.agent("n1").metric("nodemesh_kernel_events_total", &[("event", "redirected")]);
    assert!(kernel >= 2.0, "the kernel has redirected {kernel} connections");
}

/// The access-log lines of an agent that name this destination.
fn lines(s: &Seen, node: &str, to: &str) -> Vec<Value> {
    let log = s.world.agent(node).log();
    let parsed = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    parsed.filter(|line| line["scope"] == "access" && line.to_string().contains(to)).collect()
}

fn the_access_log_has_a_line_for_each_side(s: &Seen) {
    let to = SocketAddr::new(s.server.v4(), echo_in(&s.server));
    call(&s.client, to).unwrap();
    for (node, direction) in [("n1", "outbound"), ("n2", "inbound")] {
        eventually(PATIENCE, "the line is there", || lines(s, node, &to.to_string()).len() == 1);
        let line = &lines(s, node, &to.to_string())[0];
        assert_eq!(line["direction"], direction);
        assert_eq!(line["src.workload"], "client");
        assert_eq!(line["src.identity"], s.client.spiffe_id().as_str());
        assert_eq!(line["dst.workload"], "server");
        assert_eq!(line["dst.identity"], s.server.spiffe_id().as_str());
        assert_eq!((&line["bytes_sent"], &line["bytes_recv"]), (&14.into(), &14.into()), "{line}");
        assert!(line.get("error").is_none(), "{line}");
    }
}

fn a_denied_connection_is_seen(s: &Seen) {
    let port = echo_in(&s.server);
    let policy = format!(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata:\n  name: closed\n  namespace: seen\nspec:\n\
         \x20 action: DENY\n  rules:\n  - to:\n    - operation:\n        ports: [\"{port}\"]\n"
    );
    s.world.mesh().manifests().apply("closed", &policy);
    let to = SocketAddr::new(s.server.v4(), port);
    eventually(PATIENCE, "the policy is in force", || refusal(&s.client, to).is_some());
    let seen = || lines(s, "n2", &to.to_string()).iter().any(|line| line.to_string().contains("seen/closed"));
    eventually(PATIENCE, "the server's node names the policy", seen);
    let count = || s.world.agent("n2").metric("istio_tcp_connections_failed_total", &[("response_flags", "DENY")]);
    eventually(PATIENCE, "it is counted", || count() >= 1.0);
    s.world.mesh().manifests().remove("closed");
    eventually(PATIENCE, "it is open again", || call(&s.client, to).is_ok());
}

fn meshctl_shows_everything(s: &Seen) {
    let ips = s.world.mesh().manifests().service("seen/server", &[(80, 8080)], &[&s.server]);
    let stream = s.client.connect((s.server.v4(), echo_in(&s.server)).into()).unwrap();
    ping(&stream, b"open").unwrap();
    let expected = [
        ("workloads", "client".to_owned()),
        ("services", ips.v4.to_string()),
        ("policies", String::new()),
        ("certificates", s.client.spiffe_id()),
        ("connections", s.server.v4().to_string()),
        ("status", "n1".to_owned()),
    ];
    for (page, text) in expected {
        let agent = s.world.agent("n1");
        // Both forms, and JSON that parses.
        eventually(PATIENCE, &format!("{page} has {text}"), || {
            agent.meshctl(&[page]).success().contains(&text) && agent.meshctl_json(&[page]).to_string().contains(&text)
        });
    }
    assert_eq!(s.world.agent("n1").meshctl(&["nonsense"]).code, Some(64), "a wrong command is a usage error");
}

fn a_broken_manifest_is_one_problem(s: &Seen) {
    s.world.mesh().manifests().apply(
        "broken",
        "apiVersion: v1\nkind: Service\nmetadata: {name: broken, namespace: seen}\nspec: {ports: many}\n",
    );
    let problems = || s.world.agent("n1").meshctl_json(&["problems"]).to_string();
    eventually(PATIENCE, "it is told", || problems().contains("broken") && problems().contains("ports"));
    call(&s.client, (s.server.v4(), echo_in(&s.server)).into()).expect("all else is as it was");
    s.world.mesh().manifests().remove("broken");
    eventually(PATIENCE, "it is gone when the file is", || !problems().contains("broken"));
}

fn the_log_level_changes_at_run_time(s: &Seen) {
    let agent = s.world.agent("n1");
    agent.meshctl(&["log", "debug"]).success();
    assert!(agent.meshctl(&["log"]).success().contains("debug"));
    agent.meshctl(&["log", "info"]).success();
    assert_ne!(agent.meshctl(&["log", "loudly=please=now"]).code, Some(0));
}
