//! HTTP by the rules of an HTTPRoute: real clients, a server on each node, and what is seen of it.

use std::convert::Infallible;
use std::net::{SocketAddr, TcpListener};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use http_body_util::{Either, Full};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use mesh_tests::ring::{Case, Mode, World, meshed_only, run};
use mesh_tests::traffic::{PATIENCE, Pattern, call, echo};
use mesh_tests::{ClusterIps, Mesh, MeshMode, Pod, eventually};
use serde_json::Value;

/// Ports of the services `web`, `near` and `far`: HTTP/1, HTTP/2, and one without rules.
const ONE: u16 = 80;
const TWO: u16 = 81;
const BYTES: u16 = 82;
const PORTS: [(u16, u16); 3] = [(ONE, 8080), (TWO, 8081), (BYTES, 8082)];

struct Http {
    world: World,
    client: Arc<Pod>,
    /// On the client's node, and on the other one.
    near: Arc<Pod>,
    far: Arc<Pod>,
    web: ClusterIps,
    /// Requests to `/slow` that servers are working on.
    slow: Arc<AtomicUsize>,
}

fn build() -> Http {
    let mesh = Mesh::new().node("n1").node("n2");
    mesh.manifests().label("web", MeshMode::Enabled);
    let client = mesh.pod("n1", "web/client");
    let (near, far) = (mesh.pod("n1", "web/near"), mesh.pod("n2", "web/far"));
    let slow = Arc::new(AtomicUsize::new(0));
    for pod in [&near, &far] {
        serve(pod, &slow);
        mesh.manifests().service(&format!("web/{}", pod.name()), &PORTS, &[pod]);
    }
    let web = mesh.manifests().service("web/web", &PORTS, &[&near, &far]);
    let rules = |port: u16| {
        let to = |name: &str, path: &str| {
            format!(
                "  - matches:\n    - path: {{type: PathPrefix, value: {path}}}\n    backendRefs:\n    - {{name: {name}, port: {port}}}\n"
            )
        };
        format!(
            "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata:\n  name: web-{port}\n  namespace: web\n\
             spec:\n  parentRefs:\n  - {{group: \"\", kind: Service, name: web, port: {port}}}\n  rules:\n{}{}\
             \x20 - matches:\n    - path: {{type: PathPrefix, value: /any}}\n    backendRefs:\n\
             \x20   - {{name: near, port: {port}, weight: 50}}\n    - {{name: far, port: {port}, weight: 50}}\n",
            to("near", "/near"),
            to("far", "/far"),
        )
    };
    mesh.manifests().apply("route-one", &rules(ONE));
    mesh.manifests().apply("route-two", &rules(TWO));
    let world = World::start(mesh, Mode::of_this_run(), &["--access-log", "json"]);
    world.wait_enrolled(&[&client, &near, &far]);
    let http = Http { world, client, near, far, web, slow };
    eventually(PATIENCE, "the routes hold", || get(&http, ONE, "/none", &[]).0 == 404);
    http
}

const CASES: &[Case<Http>] = &[
    ("a_path_leads_to_its_backend", a_path_leads_to_its_backend),
    ("http2_goes_the_same_way", http2_goes_the_same_way),
    ("requests_are_shared_by_weight", requests_are_shared_by_weight),
    ("a_port_without_rules_carries_bytes", a_port_without_rules_carries_bytes),
    ("bodies_stream_both_ways_at_once", bodies_stream_both_ways_at_once),
    ("the_servers_policy_is_kept", the_servers_policy_is_kept),
    ("a_client_that_leaves_is_not_worked_for", a_client_that_leaves_is_not_worked_for),
    ("requests_are_on_record", requests_are_on_record),
];

fn main() -> ExitCode {
    run(build, |h| &h.world, meshed_only(CASES))
}

/// HTTP/1 and HTTP/2 servers that say their pod's name and the address that they see; and one for bytes.
fn serve(pod: &Pod, slow: &Arc<AtomicUsize>) {
    for (_, port) in PORTS {
        let listener = pod.listen_on(&format!("[::]:{port}"));
        if port == 8082 {
            echo(listener);
            continue;
        }
        let (name, slow) = (pod.name().to_owned(), slow.clone());
        thread::spawn(move || answer(listener, &name, port == 8081, &slow));
    }
}

fn answer(listener: TcpListener, name: &str, two: bool, slow: &Arc<AtomicUsize>) {
    struct Working(Arc<AtomicUsize>);
    impl Drop for Working {
        fn drop(&mut self) {
            self.0.fetch_sub(1, Ordering::SeqCst);
        }
    }
    listener.set_nonblocking(true).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let listener = tokio::net::TcpListener::from_std(listener).unwrap();
        while let Ok((tcp, from)) = listener.accept().await {
            let (name, slow) = (name.to_owned(), slow.clone());
            let service = service_fn(move |request: Request<hyper::body::Incoming>| {
                let text = format!("{name} {} {:?}\n", from.ip().to_canonical(), request.version());
                let slow = slow.clone();
                async move {
                    if request.uri().path().ends_with("/echo") {
                        return Ok::<_, Infallible>(Response::new(Either::Right(request.into_body())));
                    }
                    if request.uri().path().ends_with("/slow") {
                        slow.fetch_add(1, Ordering::SeqCst);
                        let _working = Working(slow);
                        std::future::pending::<()>().await;
                    }
                    Ok(Response::new(Either::Left(Full::new(bytes::Bytes::from(text)))))
                }
            });
            tokio::spawn(async move {
                let io = TokioIo::new(tcp);
                match two {
                    true => drop(
                        hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                            .serve_connection(io, service)
                            .await,
                    ),
                    false => drop(hyper::server::conn::http1::Builder::new().serve_connection(io, service).await),
                }
            });
        }
    });
}

/// curl in the client's pod: (status, body); 0 where there was no answer.
fn get(h: &Http, port: u16, path: &str, flags: &[&str]) -> (u16, String) {
    curl(h, SocketAddr::new(h.web.v4, port), path, flags)
}

fn curl(h: &Http, to: SocketAddr, path: &str, flags: &[&str]) -> (u16, String) {
    let url = format!("http://{to}{path}");
    let fixed = ["--silent", "--max-time", "20", "--write-out", "%{http_code}", &url];
    let output = h.client.command("curl").args(flags).args(fixed).output().expect("curl is installed");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let (body, status) = text.split_at(text.len().saturating_sub(3));
    (status.parse().unwrap_or(0), body.to_owned())
}

fn a_path_leads_to_its_backend(h: &Http) {
    for (v, web) in [(h.client.v4(), h.web.v4), (h.client.v6(), h.web.v6)] {
        let to = SocketAddr::new(web, ONE);
        for pod in [&h.near, &h.far] {
            let (status, body) = curl(h, to, &format!("/{}", pod.name()), &[]);
            // The application sees the client's own address.
            assert_eq!((status, body), (200, format!("{} {v} HTTP/1.1\n", pod.name())));
        }
        assert_eq!(curl(h, to, "/none", &[]).0, 404);
    }
}

fn http2_goes_the_same_way(h: &Http) {
    for pod in [&h.near, &h.far] {
        let (status, body) = get(h, TWO, &format!("/{}", pod.name()), &["--http2-prior-knowledge"]);
        assert_eq!((status, body), (200, format!("{} {} HTTP/2.0\n", pod.name(), h.client.v4())));
    }
    assert_eq!(get(h, TWO, "/none", &["--http2-prior-knowledge"]).0, 404);
}

fn requests_are_shared_by_weight(h: &Http) {
    // One connection of the client, many requests.
    let url = format!("http://{}/any?[1-100]", SocketAddr::new(h.web.v4, ONE));
    let output = h.client.output("curl", &["--silent", "--fail", "--max-time", "60", &url]).success();
    let near = output.lines().filter(|line| line.starts_with("near ")).count();
    assert_eq!(output.lines().count(), 100);
    // Six standard deviations away from the half is no chance.
    assert!((20..=80).contains(&near), "{near}");
}

fn a_port_without_rules_carries_bytes(h: &Http) {
    call(&h.client, SocketAddr::new(h.web.v4, BYTES)).unwrap();
}

/// Far more than all buffers on the way hold: what came back makes room for what goes.
fn bodies_stream_both_ways_at_once(h: &Http) {
    let sent = h.world.mesh().dir().join("sent");
    let bytes = Pattern::bytes(7, 50_000_000);
    std::fs::write(&sent, &bytes).unwrap();
    let data = format!("@{}", sent.display());
    for (path, port, version) in [
        ("/near/echo", ONE, "--http1.1"),
        ("/far/echo", ONE, "--http1.1"),
        ("/near/echo", TWO, "--http2-prior-knowledge"),
        ("/far/echo", TWO, "--http2-prior-knowledge"),
    ] {
        for framed in ["content-type: x", "transfer-encoding: chunked"] {
            if port == TWO && framed.starts_with("transfer") {
                continue;
            }
            let url = format!("http://{}{path}", SocketAddr::new(h.web.v4, port));
            let flags = ["--silent", "--fail", "--max-time", "60", version, "-H", framed, "--data-binary", &data, &url];
            let output = h.client.command("curl").args(flags).output().unwrap();
            assert!(output.status.success(), "{path} {version} {framed}: {}", output.status);
            assert!(output.stdout == bytes, "{path} {version} {framed}: {} bytes came back", output.stdout.len());
        }
    }
}

fn the_servers_policy_is_kept(h: &Http) {
    let policy = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata:\n  name: closed\n  namespace: web\nspec:\n\
                  \x20 action: DENY\n  rules:\n  - to:\n    - operation:\n        ports: [\"8080\"]\n";
    for path in ["/near", "/far"] {
        // Connections to both are kept now.
        assert_eq!(get(h, ONE, path, &[]).0, 200);
    }
    h.world.mesh().manifests().apply("closed", policy);
    for path in ["/near", "/far"] {
        eventually(PATIENCE, "it is refused", || get(h, ONE, path, &[]).0 == 403);
    }
    h.world.mesh().manifests().remove("closed");
    for path in ["/near", "/far"] {
        eventually(PATIENCE, "it is allowed again", || get(h, ONE, path, &[]).0 == 200);
    }
}

fn a_client_that_leaves_is_not_worked_for(h: &Http) {
    for (path, port, flags) in [("/near/slow", ONE, &[][..]), ("/far/slow", TWO, &["--http2-prior-knowledge"][..])] {
        let url = format!("http://{}{path}", SocketAddr::new(h.web.v4, port));
        let mut command = h.client.command("curl");
        command.args(flags).args(["--silent", "--max-time", "600", &url]);
        let client = h.client.start_command(command);
        eventually(PATIENCE, "the server works", || h.slow.load(Ordering::SeqCst) == 1);
        drop(client);
        eventually(PATIENCE, "the server is told", || h.slow.load(Ordering::SeqCst) == 0);
    }
}

fn requests_are_on_record(h: &Http) {
    let labels = [
        ("reporter", "source"),
        ("source_workload", "client"),
        ("destination_workload", "far"),
        ("destination_service_name", "far"),
        ("request_protocol", "http"),
        ("response_code", "200"),
        ("response_flags", "-"),
    ];
    let count = || h.world.agent("n1").metric("istio_requests_total", &labels);
    let before = count();
    let path = "/far/on-record?x=\"1\"";
    assert_eq!(get(h, ONE, &path.replace('"', "%22"), &["--header", "X-Request-Id: of-this-case"]).0, 200);
    eventually(PATIENCE, "it is counted", || count() >= before + 1.0);
    let line = || {
        let log = h.world.agent("n1").log();
        let lines = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        lines.into_iter().find(|line| line["request_id"] == "of-this-case")
    };
    eventually(PATIENCE, "it has its line", || line().is_some());
    let line = line().unwrap();
    for (field, expected) in [
        ("message", "request complete"),
        ("method", "GET"),
        ("path", "/far/on-record?x=%221%22"),
        ("protocol", "HTTP/1.1"),
        ("dst.workload", "far"),
        ("response_flags", "-"),
    ] {
        assert_eq!(line[field], expected, "{field} of {line}");
    }
    assert_eq!(line["src.identity"], h.client.spiffe_id().as_str());
    assert_eq!(line["dst.identity"], h.far.spiffe_id().as_str());
    assert!(line["route"].as_str().is_some_and(|route| route.contains("web/web-80")), "{line}");
}
