use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::time::Instant;

use arc_swap::ArcSwap;
use bytes::Bytes;
use http_body_util::{BodyExt, Empty};
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::watch;

use super::*;
use crate::enrollment::PodStatus;
use crate::identity::CertificateInfo;
use crate::lifecycle::{Liveness, Readiness};
use crate::model::{
    Action, AuthorizationPolicy, Endpoint, MtlsMode, MtlsModes, ObjectRef, Problem, Rule, Rules, ServicePort, Severity,
    Snapshot,
};
use crate::proxy::connections::ConnectionInfo;
use crate::telemetry::fixtures::{service, snapshot, workload};
use crate::telemetry::logging::LogLevel;
use crate::telemetry::{Metrics, NodeFacts};

/// Two pods on node `a`, one of which is refused; one on `b`; a policy, a service with one of two endpoints ready.
fn mesh() -> Snapshot {
    let policy = Arc::new(AuthorizationPolicy {
        name: "only-web".into(),
        namespace: "shop".into(),
        action: Action::Allow,
        dry_run: false,
        rules: vec![Rule::default()],
    });
    let web = workload("shop", "web", "10.0.1.2");
    let mut cart = Arc::unwrap_or_clone(workload("shop", "cart", "10.0.2.3"));
    let mtls = MtlsModes { default: MtlsMode::Strict, ports: [(8080, MtlsMode::Permissive)].into() };
    cart.rules = Some(Arc::new(Rules { mtls, policies: vec![policy] }));
    let cart = Arc::new(cart);
    let mut far = Arc::unwrap_or_clone(workload("shop", "far", "10.1.0.1"));
    far.node = "b".into();
    far.rules = None;
    let mut service = Arc::unwrap_or_clone(service("shop", "cart"));
    let endpoint = |address: &str, ready| Endpoint {
        address: address.parse().unwrap(),
        ready,
        serving: ready,
        locality: Arc::default(),
        node: None,
    };
    service.ports.push(ServicePort {
        port: 80,
        name: "http".into(),
        app_protocol: None,
        endpoints: vec![endpoint("10.0.2.3:8080", true), endpoint("10.0.2.4:8080", false)],
    });
    snapshot(vec![web, cart, Arc::new(far)], vec![Arc::new(service)])
}

fn pod(name: &str, problem: Option<&str>) -> PodStatus {
    PodStatus {
        netns: None,
        uid: format!("shop/{name}-1"),
        namespace: "shop".to_owned(),
        name: format!("{name}-1"),
        addresses: Vec::new(),
        enrolled: problem.is_none(),
        problem: problem.map(str::to_owned),
        legacy_connections: 2,
    }
}

fn state(readiness: Readiness) -> AdminState {
    let object = ObjectRef { file: "a.yaml:3".into(), kind: "Pod".into(), namespace: "shop".into(), name: "x".into() };
    let problem =
        Problem { severity: Severity::Error, object: Arc::new(object), field: String::new(), message: "no".into() };
    let (layer, log) = LogLevel::new("info").unwrap();
    // The level is that of a living subscriber; this one lives as long as the test.
    Box::leak(Box::new(layer));
    AdminState {
        node: "a".to_owned(),
        pod: None,
        started: Instant::now(),
        certificate_authority: "embedded".to_owned(),
        snapshot: Arc::new(ArcSwap::from_pointee(mesh())),
        problems: watch::channel(Arc::new(vec![problem])).1,
        certificates: Box::new(|| {
            vec![CertificateInfo {
                identity: "spiffe://cluster.local/ns/shop/sa/web".to_owned(),
                state: "ready".to_owned(),
                serial: "0a".to_owned(),
                not_before: "2026-08-22T10:00:00Z".to_owned(),
                not_after: "2026-08-23T10:00:00Z".to_owned(),
                roots: vec!["f00".to_owned()],
                problem: None,
            }]
        }),
        pods: Box::new(|| vec![pod("web", None), pod("cart", Some("its netns is gone; start the pod again"))]),
        connections: Box::new(|| {
            Box::pin(async {
                vec![ConnectionInfo {
                    direction: "outbound".to_owned(),
                    pod: "shop/web-1".to_owned(),
                    source: "10.0.1.2:1".to_owned(),
                    destination: "10.0.2.3:8080".to_owned(),
                    service: None,
                    peer_identity: None,
                    transport: "hbone".to_owned(),
                    bytes_sent: 1,
                    bytes_received: 2,
                    age_seconds: 3,
                }]
            })
        }),
        kernel: Box::new(|| vec![("redirected", "v4", 9)]),
        readiness,
        log,
    }
}

async fn exchange(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    method: Method,
    page: &str,
) -> (StatusCode, String) {
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
    let driver = tokio::spawn(connection);
    let request = Request::builder().method(method).uri(page).header("host", "x").body(Empty::<Bytes>::new()).unwrap();
    let response = sender.send_request(request).await.unwrap();
    let status = response.status();
    let body = response.into_body().collect().await.unwrap().to_bytes();
    drop(sender);
    driver.await.unwrap().unwrap();
    (status, String::from_utf8(body.to_vec()).unwrap())
}

struct Served {
    path: std::path::PathBuf,
    _directory: tempfile::TempDir,
    task: tokio::task::JoinHandle<std::io::Result<()>>,
}

impl Served {
    fn new(state: AdminState) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("run/admin.sock");
        let socket = AdminSocket::bind(&path).unwrap();
        Self { path, _directory: directory, task: tokio::spawn(serve_admin(socket, Arc::new(state))) }
    }

    async fn ask(&self, method: Method, page: &str) -> (StatusCode, String) {
        exchange(tokio::net::UnixStream::connect(&self.path).await.unwrap(), method, page).await
    }

    async fn json(&self, page: &str) -> Value {
        let (status, body) = self.ask(Method::GET, page).await;
        assert_eq!(status, StatusCode::OK, "{body}");
        serde_json::from_str(&body).unwrap()
    }
}

pub(crate) fn served_state() -> AdminState {
    state(Readiness::default())
}

#[tokio::test]
async fn every_page_over_a_real_socket() {
    let served = Served::new(state(Readiness::default()));

    let workloads: Vec<views::WorkloadView> = serde_json::from_value(served.json("/workloads").await).unwrap();
    let seen: Vec<_> = workloads.iter().map(|w| (&*w.name, &*w.state, &*w.mtls, w.legacy_connections)).collect();
    assert_eq!(
        seen,
        [
            ("cart-1", "refused", "STRICT, 8080=PERMISSIVE", 2),
            ("far-1", "remote", "", 0),
            ("web-1", "enrolled", "PERMISSIVE", 2)
        ]
    );
    assert_eq!(workloads[0].problem.as_deref(), Some("its netns is gone; start the pod again"));
    assert_eq!(workloads[0].policies, ["shop/only-web"]);

    assert_eq!(
        served.json("/services").await,
        json!([{
            "namespace": "shop", "name": "cart", "hostname": "cart.shop.svc.cluster.local",
            "addresses": ["10.96.0.10"], "algorithm": "round-robin", "scope": "anywhere",
            "ports": [{"port": 80, "name": "http", "endpoints": [
                {"address": "10.0.2.3:8080", "ready": true, "workload": "shop/cart-1"},
                {"address": "10.0.2.4:8080", "ready": false, "workload": null},
            ]}],
        }])
    );
    let policies: Vec<views::PolicyView> = serde_json::from_value(served.json("/policies").await).unwrap();
    assert_eq!(policies.len(), 1);
    assert_eq!((&*policies[0].action, policies[0].rules.len()), ("ALLOW", 1));
    assert_eq!(policies[0].workloads, ["shop/cart-1"]);

    assert_eq!(served.json("/certificates").await[0]["serial"], "0a");
    assert_eq!(served.json("/connections").await[0]["bytes_received"], 2);
    assert_eq!(served.json("/problems").await[0]["message"], "no");
    let dump = served.json("/config_dump").await;
    assert_eq!(dump["snapshot_generation"], 7);
    assert_eq!(dump["workloads"][1]["identity"], "spiffe://cluster.local/ns/shop/sa/far");

    let status: views::StatusView = serde_json::from_value(served.json("/status").await).unwrap();
    assert!(status.ready && status.waiting_for.is_empty());
    assert_eq!((status.enrolled_pods, status.refused_pods, status.legacy_connections), (1, 1, 4));
    assert_eq!((status.errors, status.warnings, status.open_connections), (1, 0, 1));
    assert_eq!((status.certificates, status.certificates_missing), (1, 0));
    assert_eq!((&*status.kernel[0].event, status.kernel[0].count), ("redirected", 9));
}

#[tokio::test]
async fn the_log_level_is_the_only_thing_that_can_be_changed() {
    let served = Served::new(state(Readiness::default()));
    assert_eq!(served.json("/logging").await, json!({"level": "info"}));
    let (status, body) = served.ask(Method::PUT, "/logging?level=warn,mesh_agent=debug").await;
    assert_eq!((status, &*body), (StatusCode::OK, "{\"level\":\"warn,mesh_agent=debug\"}\n"));
    assert_eq!(served.json("/logging").await, json!({"level": "warn,mesh_agent=debug"}));

    let (status, body) = served.ask(Method::PUT, "/logging?level=loud").await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    assert_eq!(body, "`loud` is no log filter; write error, warn, info, debug, trace, off or target=level,...\n");
    let (status, body) = served.ask(Method::PUT, "/logging").await;
    assert_eq!((status, &*body), (StatusCode::BAD_REQUEST, "which level? ask for /logging?level=debug\n"));
    assert_eq!(served.json("/logging").await, json!({"level": "warn,mesh_agent=debug"}));

    for page in ["/workloads", "/status", "/config_dump"] {
        assert_eq!(
            served.ask(Method::POST, page).await,
            (StatusCode::METHOD_NOT_ALLOWED, "only GET here\n".to_owned())
        );
    }
    assert_eq!(served.ask(Method::GET, "/quit").await.0, StatusCode::NOT_FOUND);
}

#[tokio::test(start_paused = true)]
async fn workers_that_hang_do_not_hang_the_other_pages() {
    let mut state = state(Readiness::default());
    state.connections = Box::new(|| Box::pin(std::future::pending()));
    let served = Served::new(state);
    assert_eq!(
        served.ask(Method::GET, "/connections").await,
        (StatusCode::SERVICE_UNAVAILABLE, "the workers did not list their connections within 2s\n".to_owned())
    );
    assert_eq!(served.json("/status").await["open_connections"], 0);
}

#[tokio::test]
async fn the_socket_is_roots_only_and_goes_with_the_agent() {
    let served = Served::new(state(Readiness::default()));
    let mode = |path: &std::path::Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o7777;
    assert_eq!((mode(&served.path), mode(served.path.parent().unwrap())), (0o600, 0o700));
    assert_eq!(std::fs::read_dir(served.path.parent().unwrap()).unwrap().count(), 1, "no draft is left");
    served.task.abort();
    let Served { path, _directory, task } = served;
    assert!(task.await.unwrap_err().is_cancelled());
    assert!(!path.exists());
}

#[test]
fn a_socket_of_a_killed_agent_is_taken_over_and_one_that_answers_is_not() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("admin.sock");
    // Killed: nobody removed the file.
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists() && UnixStream::connect(&path).is_err());

    let first = AdminSocket::bind(&path).unwrap();
    let error = AdminSocket::bind(&path).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("another agent answers on {}; stop it, or choose another socket with --admin-socket", path.display())
    );
    // A successor that has put its own socket there keeps it when the first goes.
    std::fs::remove_file(&path).unwrap();
    let second = AdminSocket::bind(&path).unwrap();
    drop(first);
    assert!(UnixStream::connect(&path).is_ok());
    drop(second);
    assert!(!path.exists());

    std::fs::write(&path, "precious").unwrap();
    let error = AdminSocket::bind(&path).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!(
            "cannot make the admin socket {}: there is a file that is no socket; choose another with --admin-socket",
            path.display()
        )
    );
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
}

#[tokio::test]
async fn metrics_over_tcp_on_both_paths() {
    let metrics = Metrics::new();
    let admin = state(Readiness::default());
    metrics.watch_node(move || admin.node_facts());
    let listener = bind("127.0.0.1:0".parse().unwrap(), "metrics", "--metrics-address").unwrap();
    let address = listener.local_addr().unwrap();
    let task = tokio::spawn(serve_metrics(listener, metrics));
    let ask = async |method, page| exchange(tokio::net::TcpStream::connect(address).await.unwrap(), method, page).await;
    for page in ["/metrics", "/stats/prometheus"] {
        let (status, body) = ask(Method::GET, page).await;
        assert_eq!(status, StatusCode::OK);
        for line in [
            "nodemesh_enrolled_pods 1",
            "nodemesh_refused_pods 1",
            "nodemesh_legacy_connections 4",
            "nodemesh_problems{severity=\"error\"} 1",
            "nodemesh_certificate_expiry_timestamp_seconds{identity=\"spiffe://cluster.local/ns/shop/sa/web\"} 1787479200",
            "nodemesh_kernel_events_total{event=\"redirected\",reason=\"v4\"} 9",
            "nodemesh_snapshot_generation 7",
        ] {
            assert!(body.lines().any(|l| l == line), "{line} is not in\n{body}");
        }
    }
    assert_eq!(ask(Method::POST, "/metrics").await.0, StatusCode::METHOD_NOT_ALLOWED);
    assert_eq!(
        ask(Method::GET, "/").await,
        (StatusCode::NOT_FOUND, "no page /; there are /metrics, /stats/prometheus\n".to_owned())
    );
    task.abort();
}

#[tokio::test]
async fn readiness_says_what_is_waited_for() {
    let readiness = Readiness::default();
    let block = readiness.block("the first snapshot");
    let listener = bind("127.0.0.1:0".parse().unwrap(), "readiness", "--readiness-address").unwrap();
    let address = listener.local_addr().unwrap();
    let task = tokio::spawn(serve_health(listener, readiness, Liveness::default()));
    let ask =
        async || exchange(tokio::net::TcpStream::connect(address).await.unwrap(), Method::GET, "/healthz/ready").await;
    assert_eq!(
        ask().await,
        (StatusCode::SERVICE_UNAVAILABLE, "not ready: waiting for the first snapshot\n".to_owned())
    );
    drop(block);
    assert_eq!(ask().await, (StatusCode::OK, "ready\n".to_owned()));
    task.abort();
}

#[tokio::test]
async fn liveness_says_who_moves_and_who_does_not() {
    let liveness = Liveness::default();
    let (_control, worker) = (tokio::spawn(liveness.pulse("control").keep()), liveness.pulse("worker-0"));
    let listener = bind("127.0.0.1:0".parse().unwrap(), "readiness", "--readiness-address").unwrap();
    let address = listener.local_addr().unwrap();
    let readiness = Readiness::default();
    let _starting = readiness.block("the first snapshot");
    let task = tokio::spawn(serve_health(listener, readiness, liveness));
    let ask =
        async || exchange(tokio::net::TcpStream::connect(address).await.unwrap(), Method::GET, "/healthz/live").await;
    assert_eq!(ask().await, (StatusCode::OK, "live: control, worker-0\n".to_owned()), "also before it is ready");
    tokio::time::pause();
    tokio::time::advance(std::time::Duration::from_secs(31)).await;
    // The control loop beats again before anybody is answered.
    tokio::task::yield_now().await;
    tokio::time::resume();
    let (status, text) = ask().await;
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
    assert!(text.starts_with("not live: no step of worker-0 for 3") && !text.contains("control"), "{text}");
    drop(worker);
    assert_eq!(ask().await, (StatusCode::OK, "live: control\n".to_owned()));
    task.abort();
}

#[test]
fn a_taken_port_is_one_sentence() {
    let first = bind("127.0.0.1:0".parse().unwrap(), "metrics", "--metrics-address").unwrap();
    let address = first.local_addr().unwrap();
    let error = bind(address, "metrics", "--metrics-address").unwrap_err();
    assert_eq!(
        error.to_string(),
        format!(
            "cannot listen on {address} for metrics: another process has it; choose another with --metrics-address"
        )
    );
}

#[test]
fn facts_leave_out_certificates_that_have_no_end_yet() {
    let mut state = state(Readiness::default());
    state.certificates = Box::new(|| {
        vec![CertificateInfo {
            identity: "spiffe://cluster.local/ns/a/sa/b".to_owned(),
            state: "waiting".to_owned(),
            serial: String::new(),
            not_before: String::new(),
            not_after: String::new(),
            roots: Vec::new(),
            problem: None,
        }]
    });
    assert_eq!(state.node_facts(), NodeFacts { certificates: Vec::new(), ..state.node_facts() });
    assert!(state.node_facts().certificates.is_empty());
}
