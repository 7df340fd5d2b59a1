use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::*;
use crate::admin::tests::served_state;
use crate::admin::views::{EndpointView, KernelCounter, PolicyView, PortView, ServiceView, WorkloadView};
use crate::admin::{AdminSocket, serve_admin};
use crate::cli::exit::{Exit, code, sentence};
use crate::identity::CertificateInfo;
use crate::model::{ObjectRef, Problem, Severity};
use crate::proxy::connections::ConnectionInfo;

const NARROW: Screen = Screen { width: 80, wide: false, colour: false };
const WIDE: Screen = Screen { width: 80, wide: true, colour: false };
const COLOUR: Screen = Screen { width: 80, wide: false, colour: true };

fn one<T>(value: T) -> Vec<Answer<T>> {
    vec![Answer { node: String::new(), value }]
}

#[track_caller]
fn shows(text: &str, expected: &str) {
    assert_eq!(text, expected, "\n{text}");
    for line in text.lines() {
        assert!(line.chars().count() <= 80, "too long: {line}");
    }
}

fn workload(name: &str, node: &str, state: &str) -> WorkloadView {
    WorkloadView {
        namespace: "shop".to_owned(),
        name: name.to_owned(),
        uid: format!("uid-{name}"),
        addresses: vec!["10.0.1.2".parse().unwrap(), "fd00::2".parse().unwrap()],
        node: node.to_owned(),
        local: state != "remote",
        identity: format!("spiffe://cluster.local/ns/shop/sa/{name}"),
        workload: name.to_owned(),
        transport: "hbone".to_owned(),
        state: state.to_owned(),
        problem: None,
        legacy_connections: 0,
        mtls: "PERMISSIVE".to_owned(),
        policies: vec!["shop/a".to_owned(), "shop/b".to_owned()],
        region: String::new(),
        zone: "z1".to_owned(),
    }
}

#[test]
fn workloads_in_eighty_columns_with_the_reasons_below() {
    let mut refused = workload("cart-7d9f4b6c5-abcde-with-a-long-name", "a", "refused");
    refused.problem = Some(
        "it shares the node's network namespace, which cannot be redirected; take hostNetwork out of its spec"
            .to_owned(),
    );
    let mut web = workload("web-1", "a", "enrolled");
    web.mtls = "STRICT, 8080=PERMISSIVE".to_owned();
    web.legacy_connections = 1;
    shows(
        &lists::workloads(&one(vec![refused, workload("db-0", "b", "remote"), web]), NARROW),
        "\
NAMESPACE  NAME                  ADDRESS      ON  STATE     MTLS
shop       …de-with-a-long-name  10.0.1.2 +1  a   refused   PERMISSIVE
shop       db-0                  10.0.1.2 +1  b   remote    PERMISSIVE
shop       web-1                 10.0.1.2 +1  a   enrolled  STRICT, 8080=PERMIS…

shop/cart-7d9f4b6c5-abcde-with-a-long-name is not enrolled: it shares the node's
  network namespace, which cannot be redirected; take hostNetwork out of its
  spec
shop/web-1 has 1 connection older than its enrolment, outside the mesh
",
    );
}

#[test]
fn wide_tables_cut_nothing() {
    let text = lists::workloads(&one(vec![workload("web-1", "a", "enrolled")]), WIDE);
    let lines: Vec<_> = text.lines().collect();
    assert_eq!(
        lines[0].split_whitespace().collect::<Vec<_>>().join(" "),
        "NAMESPACE NAME ADDRESS ON STATE MTLS POLICIES IDENTITY WORKLOAD ZONE UID"
    );
    assert_eq!(
        lines[1].split_whitespace().collect::<Vec<_>>(),
        [
            "shop",
            "web-1",
            "10.0.1.2,fd00::2",
            "a",
            "enrolled",
            "PERMISSIVE",
            "shop/a,shop/b",
            "spiffe://cluster.local/ns/shop/sa/web-1",
            "web-1",
            "z1",
            "uid-web-1"
        ]
    );
}

#[test]
fn of_two_nodes_the_one_it_runs_on_speaks_for_a_pod() {
    let answers = vec![
        Answer {
            node: "a".to_owned(),
            value: vec![workload("web-1", "a", "enrolled"), workload("db-0", "b", "remote")],
        },
        Answer {
            node: "b".to_owned(),
            value: vec![workload("web-1", "a", "remote"), workload("db-0", "b", "enrolled")],
        },
    ];
    shows(
        &lists::workloads(&answers, NARROW),
        "\
NODE  NAMESPACE  NAME   ADDRESS      ON  STATE     MTLS
b     shop       db-0   10.0.1.2 +1  b   enrolled  PERMISSIVE
a     shop       web-1  10.0.1.2 +1  a   enrolled  PERMISSIVE
",
    );
}

#[test]
fn services() {
    let endpoint = |ready| EndpointView { address: "10.0.2.3:80".to_owned(), ready, workload: None };
    let port = |port, endpoints| PortView { port, name: String::new(), endpoints };
    let service = |name: &str, addresses: &[&str], ports| ServiceView {
        namespace: "shop".to_owned(),
        name: name.to_owned(),
        hostname: format!("{name}.shop.svc.cluster.local"),
        addresses: addresses.iter().map(|a| a.parse().unwrap()).collect(),
        ports,
        algorithm: "round-robin".to_owned(),
        scope: "anywhere".to_owned(),
    };
    let all = vec![
        service("cart", &["10.96.0.10"], vec![port(80, vec![endpoint(true), endpoint(false)]), port(443, vec![])]),
        service("db", &[], vec![port(5432, vec![endpoint(true)])]),
        service("empty", &["10.96.0.11", "fd00::11"], vec![port(80, vec![])]),
    ];
    shows(
        &lists::services(&one(all.clone()), NARROW),
        "\
NAMESPACE  NAME   ADDRESS        PORTS   ENDPOINTS
shop       cart   10.96.0.10     80,443  1/2 ready
shop       db     headless       5432    1/1 ready
shop       empty  10.96.0.11 +1  80      none
",
    );
    let wide = lists::services(&one(all), WIDE);
    assert!(wide.contains("1/2 ready: 10.0.2.3:80,10.0.2.3:80 (not ready)"), "{wide}");
}

#[test]
fn policies_say_whom_they_hold_for() {
    let policy = |name: &str, action: &str, dry_run, workloads: &[&str]| PolicyView {
        namespace: "shop".to_owned(),
        name: name.to_owned(),
        action: action.to_owned(),
        dry_run,
        rules: vec![serde_json::Value::Null],
        workloads: workloads.iter().map(|w| (*w).to_owned()).collect(),
    };
    let many: Vec<String> = (0..20).map(|n| format!("shop/cart-{n}")).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    shows(
        &lists::policies(
            &one(vec![policy("only-web", "ALLOW", false, &many), policy("try", "DENY", true, &["shop/a"])]),
            NARROW,
        ),
        "\
NAMESPACE  NAME      ACTION          RULES  HOLDS FOR
shop       only-web  ALLOW           1      shop/cart-0 +19
shop       try       DENY (dry run)  1      shop/a
",
    );
}

fn certificate(account: &str, state: &str, not_after: &str, problem: Option<&str>) -> CertificateInfo {
    CertificateInfo {
        identity: format!("spiffe://cluster.local/ns/shop/sa/{account}"),
        state: state.to_owned(),
        serial: "0a1b2c3d4e5f60718293a4b5c6d7e8f9".to_owned(),
        not_before: "2026-08-22T10:00:00Z".to_owned(),
        not_after: not_after.to_owned(),
        roots: vec!["f00d".to_owned()],
        problem: problem.map(str::to_owned),
    }
}

#[test]
fn certificates_say_how_long_they_last() {
    let all = vec![
        certificate("web", "ready", "2026-08-22T21:30:05Z", None),
        certificate("old", "expired", "2026-08-22T09:00:00Z", Some("no controller answers; next try in 30s")),
    ];
    shows(
        &lists::certificates_at(&one(all), NARROW, 1_787_394_000),
        "\
IDENTITY                               STATE    ENDS IN
spiffe://cluster.local/ns/shop/sa/web  ready    11h10m
spiffe://cluster.local/ns/shop/sa/old  expired  over

spiffe://cluster.local/ns/shop/sa/old: no controller answers; next try in 30s
",
    );
}

#[test]
fn connections_of_both_directions() {
    let connection = |direction: &str, service: Option<&str>, transport: &str, sent| ConnectionInfo {
        direction: direction.to_owned(),
        pod: "shop/web-1".to_owned(),
        source: "10.0.1.2:40000".to_owned(),
        destination: "10.0.2.3:8080".to_owned(),
        service: service.map(str::to_owned),
        peer_identity: (transport != "plain").then(|| "spiffe://cluster.local/ns/shop/sa/cart".to_owned()),
        transport: transport.to_owned(),
        bytes_sent: sent,
        bytes_received: 3 * 1024 * 1024,
        age_seconds: 3_725,
    };
    let all = vec![
        connection("outbound", Some("cart.shop.svc.cluster.local"), "hbone", 512),
        connection("outbound", None, "plain", 1536),
        connection("inbound", None, "hbone", 0),
        connection("inbound", None, "hbone", 0),
        connection("inbound", None, "plain", 0),
    ];
    shows(
        &lists::connections(&one(all), NARROW),
        "\
POD             PEER                         BY     SENT     RECEIVED  AGE
shop/web-1  ->  cart.shop.svc.cluster.local  hbone  512 B    3.0 MiB   1h2m
shop/web-1  ->  10.0.2.3:8080                plain  1.5 KiB  3.0 MiB   1h2m
shop/web-1  <-  ns/shop/sa/cart              hbone  0 B      3.0 MiB   1h2m
shop/web-1  <-  ns/shop/sa/cart              hbone  0 B      3.0 MiB   1h2m
shop/web-1  <-  10.0.1.2:40000               plain  0 B      3.0 MiB   1h2m
",
    );
}

#[test]
fn problems_wrap_and_are_told_once() {
    let problem = |severity, field: &str, message: &str| Problem {
        severity,
        object: Arc::new(ObjectRef {
            file: "shop.yaml:12".to_owned(),
            kind: "AuthorizationPolicy".to_owned(),
            namespace: "shop".to_owned(),
            name: "only-web".to_owned(),
        }),
        field: field.to_owned(),
        message: message.to_owned(),
    };
    let bad = problem(
        Severity::Error,
        "spec.rules[0].from[0].source.ipBlocks[0]",
        "`10.0.0.0/33` is no IP address or CIDR block, such as 10.0.0.0/8; the rule is closed until it is mended",
    );
    let small = problem(Severity::Warning, "", "it selects no workload");
    let answers = vec![
        Answer { node: "a".to_owned(), value: vec![bad.clone(), small] },
        Answer { node: "b".to_owned(), value: vec![bad] },
    ];
    shows(
        &lists::problems(&answers, NARROW),
        "\
error    shop.yaml:12: AuthorizationPolicy shop/only-web
         spec.rules[0].from[0].source.ipBlocks[0]: `10.0.0.0/33` is no IP
         address or CIDR block, such as 10.0.0.0/8; the rule is closed until it
         is mended
warning  shop.yaml:12: AuthorizationPolicy shop/only-web (on a)
         it selects no workload
",
    );
}

fn status() -> StatusView {
    StatusView {
        node: "a".to_owned(),
        pod: None,
        version: "0.1.0".to_owned(),
        uptime_seconds: 90_061,
        ready: true,
        waiting_for: Vec::new(),
        trust_domain: "cluster.local".to_owned(),
        outbound_policy: "ALLOW_ANY".to_owned(),
        certificate_authority: "embedded".to_owned(),
        snapshot_generation: 4,
        workloads: 5,
        services: 2,
        enrolled_pods: 3,
        refused_pods: 0,
        legacy_connections: 0,
        open_connections: 12,
        certificates: 3,
        certificates_missing: 0,
        errors: 0,
        warnings: 0,
        log: "info".to_owned(),
        kernel: vec![
            KernelCounter { event: "redirected".to_owned(), reason: "v4".to_owned(), count: 120 },
            KernelCounter { event: "denied".to_owned(), reason: "map_full".to_owned(), count: 0 },
        ],
    }
}

#[test]
fn the_status_of_a_healthy_agent() {
    shows(
        &status::render(&status(), NARROW),
        "\
Node           a (Nodemesh 0.1.0, up 1d1h)
State          ready
Pods           3 enrolled
Connections    12 open
Certificates   3, signed by the CA in this agent
Configuration  generation 4: 5 workloads, 2 services
Problems       none
Mesh           trust domain cluster.local, outside destinations ALLOW_ANY
Log            info
Kernel         redirected v4: 120
",
    );
}

#[test]
fn the_status_of_a_sick_agent_says_where_to_look() {
    let status = StatusView {
        ready: false,
        waiting_for: vec!["the first snapshot".to_owned(), "certificates".to_owned()],
        refused_pods: 1,
        legacy_connections: 4,
        certificates_missing: 2,
        errors: 1,
        warnings: 2,
        kernel: Vec::new(),
        ..status()
    };
    shows(
        &status::render(&status, NARROW),
        "\
Node           a (Nodemesh 0.1.0, up 1d1h)
State          not ready: waiting for the first snapshot, certificates
Pods           3 enrolled, 1 refused (see `meshctl workloads`)
Connections    12 open, 4 older than enrolment and outside the mesh
Certificates   3, 2 missing (see `meshctl certificates`), signed by the CA in
               this agent
Configuration  generation 4: 5 workloads, 2 services
Problems       1 error, 2 warnings (see `meshctl problems`)
Mesh           trust domain cluster.local, outside destinations ALLOW_ANY
Log            info
Kernel         nothing counted yet
",
    );
}

#[test]
fn nothing_to_show_is_a_sentence() {
    for (text, expected) in [
        (lists::workloads(&one(vec![]), NARROW), "no workloads: no Pod with an address in the configuration\n"),
        (lists::services(&one(vec![]), NARROW), "no services in the configuration\n"),
        (
            lists::policies(&one(vec![]), NARROW),
            "no authorization policy holds for any workload: all may connect to all\n",
        ),
        (lists::certificates(&one(vec![]), NARROW), "no certificates: no pod of this node is in the mesh\n"),
        (lists::connections(&one(vec![]), NARROW), "no open connections\n"),
        (lists::problems(&one(vec![]), NARROW), "no problems\n"),
    ] {
        shows(&text, expected);
    }
}

#[test]
fn colours_stand_around_the_word_only() {
    let text = lists::workloads(&one(vec![workload("web-1", "a", "enrolled")]), COLOUR);
    let word = text.lines().nth(1).unwrap();
    assert!(word.contains("\u{1b}[38;5;10menrolled\u{1b}[39m"), "{word:?}");
    assert!(!lists::workloads(&one(vec![workload("web-1", "a", "enrolled")]), NARROW).contains('\u{1b}'));
}

#[test]
fn words_wrap_between_words_and_long_ones_stay_whole() {
    assert_eq!(wrap("aaa bbb ccc", 7, 2), "aaa bbb\n  ccc");
    assert_eq!(wrap("/a/very/long/path b", 8, 0), "/a/very/long/path\nb");
    assert_eq!(wrap("", 8, 0), "");
}

#[test]
fn sizes_and_ages_read_well() {
    assert_eq!(
        [0, 1023, 1024, 1 << 20, u64::MAX].map(layout::bytes).join(" | "),
        "0 B | 1023 B | 1.0 KiB | 1.0 MiB | 16777216.0 TiB"
    );
    assert_eq!([0, 59, 60, 3661, 86_400, 90_061].map(layout::age).join(" "), "0s 59s 1m 1h1m 1d 1d1h");
}

/// Runs `meshctl` with these words and gives what it prints.
async fn meshctl(sockets: &[&Path], words: &[&str]) -> anyhow::Result<String> {
    let mut args = vec![OsString::from("meshctl")];
    args.extend(words.iter().map(OsString::from));
    for socket in sockets {
        args.extend([OsString::from("--socket"), OsString::from(socket)]);
    }
    let machine = Machine { hostname: "a".to_owned(), cores: 1 };
    match args::parse(args, |_| None, &machine)? {
        Ok(wish) => {
            let mut out = Vec::new();
            let screen = Screen { wide: wish.output == Output::Wide, ..NARROW };
            let result = perform(wish, screen, &mut out).await;
            let text = String::from_utf8(out).unwrap();
            result.map(|()| text.clone()).map_err(|e| e.context(text))
        }
        Err(text) => Ok(text),
    }
}

/// Two agents, `a` and `b`, on real sockets.
struct Agents {
    _directory: tempfile::TempDir,
    a: PathBuf,
    b: PathBuf,
}

impl Agents {
    fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let [a, b] = ["a", "b"].map(|node| {
            let path = directory.path().join(node);
            let mut state = served_state();
            state.node = node.to_owned();
            tokio::spawn(serve_admin(AdminSocket::bind(&path).unwrap(), Arc::new(state)));
            path
        });
        Self { _directory: directory, a, b }
    }
}

#[tokio::test]
async fn every_command_works_against_a_real_agent() {
    let agents = Agents::start();
    for (command, part) in [
        ("workloads", "web-1"),
        ("services", "10.96.0.10"),
        ("policies", "only-web"),
        ("certificates", "spiffe://cluster.local/ns/shop/sa/web"),
        ("connections", "shop/web-1"),
        ("problems", "a.yaml:3: Pod shop/x"),
        ("status", "redirected v4: 9"),
        ("config-dump", "\"snapshot_generation\": 7"),
        ("log", "log level is info\n"),
    ] {
        let text = meshctl(&[&agents.a], &[command]).await.unwrap();
        assert!(text.contains(part), "{command}: {text}");
        let json = meshctl(&[&agents.a], &[command, "-o", "json"]).await.unwrap();
        serde_json::from_str::<serde_json::Value>(&json).unwrap();
        let both = meshctl(&[&agents.a, &agents.b], &[command, "-o", "json"]).await.unwrap();
        let both: serde_json::Value = serde_json::from_str(&both).unwrap();
        assert_eq!(both.as_object().unwrap().keys().collect::<Vec<_>>(), ["a", "b"], "{command}");
    }
    assert_eq!(
        meshctl(&[&agents.a], &["workloads", "-n", "other"]).await.unwrap(),
        "no workloads: no Pod with an address in the configuration\n"
    );
}

#[tokio::test]
async fn the_log_level_is_set_on_all_agents_and_a_bad_one_on_none() {
    let agents = Agents::start();
    let both = [agents.a.as_path(), agents.b.as_path()];
    assert_eq!(
        meshctl(&both, &["log", "warn,mesh_agent=debug"]).await.unwrap(),
        "log level of node a is now warn,mesh_agent=debug\nlog level of node b is now warn,mesh_agent=debug\n"
    );
    let error = meshctl(&both, &["log", "loud"]).await.unwrap_err();
    assert_eq!(
        (sentence(&error).as_str(), code(&error)),
        ("`loud` is no log filter; write error, warn, info, debug, trace, off or target=level,...", Exit::Usage)
    );
    assert_eq!(
        meshctl(&both, &["log"]).await.unwrap(),
        "log level of node a is warn,mesh_agent=debug\nlog level of node b is warn,mesh_agent=debug\n"
    );
}

#[tokio::test]
async fn an_agent_that_is_not_there_is_one_sentence_and_69() {
    let directory = tempfile::tempdir().unwrap();
    let none = directory.path().join("none");
    let gone = directory.path().join("gone");
    drop(std::os::unix::net::UnixListener::bind(&gone).unwrap());
    for (socket, expected) in [
        (&none, "no agent on {}; start one with `mesh-agent node`, or name its socket with --socket"),
        (&gone, "the agent on {} is gone; start it again with `mesh-agent node`, or name another with --socket"),
    ] {
        let error = meshctl(&[socket], &["status"]).await.unwrap_err();
        assert_eq!(error.root_cause().to_string(), expected.replace("{}", &socket.display().to_string()));
        assert_eq!(code(&error), Exit::Unavailable);
    }
    // Of several, those that are there are shown all the same.
    let agents = Agents::start();
    let error = meshctl(&[&none, &agents.a], &["policies"]).await.unwrap_err();
    assert!(error.to_string().contains("only-web"), "{error}");
    assert_eq!(code(&error), Exit::Unavailable);
}

#[tokio::test]
async fn a_socket_of_something_else_is_said_to_be_one() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("other");
    let listener = tokio::net::UnixListener::bind(&path).unwrap();
    tokio::spawn(async move {
        use tokio::io::AsyncWriteExt;
        let (mut stream, _) = listener.accept().await.unwrap();
        stream.write_all(b"+OK redis\r\n").await.unwrap();
    });
    let error = meshctl(&[&path], &["status"]).await.unwrap_err();
    assert!(error.root_cause().to_string().starts_with(&format!("the agent on {} broke off", path.display())));
    assert_eq!(code(&error), Exit::Unavailable);
}

#[tokio::test]
async fn wrong_usage() {
    for (words, expected) in [
        (&["pods"][..], "unknown command `pods`; see `meshctl --help`"),
        (&["status", "-o", "yaml"], "--output: `yaml` is none of table, wide, json"),
        (&["status", "-n", "x"], "unknown flag `-n`; see `meshctl --help`"),
        (
            &["uninstall", "--node-name", "A"],
            "--node-name: `A` is no name; use lower-case letters, digits, `-` and `.`, beginning and ending with the former",
        ),
        (
            &["uninstall", "--socket", "/a", "--socket", "/b"],
            "uninstall takes one node's agent away; give one --socket",
        ),
    ] {
        let error = meshctl(&[], words).await.unwrap_err();
        assert_eq!((sentence(&error).as_str(), code(&error)), (expected, Exit::Usage));
    }
}

#[tokio::test]
async fn uninstall_does_not_touch_a_node_whose_agent_runs() {
    let agents = Agents::start();
    let error = meshctl(&[&agents.a], &["uninstall"]).await.unwrap_err();
    assert_eq!(
        error.root_cause().to_string(),
        format!("an agent still answers on {}; stop it before its programs are removed", agents.a.display())
    );
    assert_eq!(code(&error), Exit::Unavailable);
}

#[tokio::test]
async fn analyze_needs_no_agent_and_its_exit_code_tells() {
    let directory = tempfile::tempdir().unwrap();
    let dir = directory.path().display().to_string();
    let namespace = "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop}\n";
    std::fs::write(directory.path().join("a.yaml"), namespace).unwrap();
    assert_eq!(meshctl(&[], &["analyze", "-d", &dir]).await.unwrap(), "no problems\n\n0 workloads, 0 services\n");

    let policy = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n\
                  metadata: {name: bad, namespace: shop}\nspec: {action: MAYBE}\n";
    std::fs::write(directory.path().join("b.yaml"), policy).unwrap();
    let error = meshctl(&[], &["analyze", "-d", &dir]).await.unwrap_err();
    assert_eq!(error.root_cause().to_string(), format!("1 error in {dir}; an agent would not take all of it"));
    assert_eq!(code(&error), Exit::Data);
    let shown = error.to_string();
    assert!(shown.contains("AuthorizationPolicy shop/bad") && shown.contains("spec.action"), "{shown}");

    let json = meshctl(&[], &["analyze", "-d", &dir, "-o", "json"]).await.unwrap_err().to_string();
    let json: Vec<Problem> = serde_json::from_str(&json).unwrap();
    assert_eq!(json.len(), 1);
    let error = meshctl(&[], &["analyze", "-d", "/nowhere"]).await.unwrap_err();
    assert_eq!(
        (sentence(&error).as_str(), code(&error)),
        ("--config-dir: cannot use /nowhere: no such file or directory; name a directory that is there", Exit::Usage)
    );
}

#[tokio::test]
async fn help_fits_eighty_columns() {
    for words in [&["--help"][..], &["workloads", "--help"], &["uninstall", "--help"], &["analyze", "--help"]] {
        let help = meshctl(&[], words).await.unwrap();
        assert!(help.contains("Usage: meshctl"), "{help}");
        for line in help.lines() {
            assert!(line.chars().count() <= 80, "{line}");
        }
    }
}

#[test]
fn ready_is_only_the_agent_of_the_asking_pod() {
    let answer = |pod: Option<&str>, ready: bool| {
        let waiting_for = if ready { vec![] } else { vec!["the pods of this node".to_owned()] };
        StatusView { pod: pod.map(str::to_owned), ready, waiting_for, ..status() }
    };
    let why = |status: &StatusView, pod| is_ready(status, pod).map_err(|failure| failure.message);
    assert_eq!(why(&answer(Some("new"), true), Some("new")), Ok(()));
    assert_eq!(why(&answer(Some("old"), true), Some("new")), Err("the agent of pod old still serves this node".into()));
    assert_eq!(why(&answer(Some("new"), false), Some("new")), Err("the agent waits for the pods of this node".into()));
    assert_eq!(why(&answer(None, true), None), Ok(()), "outside of Kubernetes");
}

fn parsed(words: &[&str]) -> Wish {
    let machine = Machine { hostname: "host".to_owned(), cores: 1 };
    let args = std::iter::once("meshctl").chain(words.iter().copied()).map(OsString::from);
    args::parse(args, |_| None, &machine).unwrap().expect("no help was asked for")
}

#[test]
fn a_cluster_is_asked_where_it_is_meant() {
    let place = |words: &[&str]| parsed(words).place;
    assert_eq!(place(&["status"]), Place::WhereItIs);
    assert_eq!(place(&["status", "--socket", "/x"]), Place::Here);
    assert_eq!(place(&["--kubernetes", "status"]), Place::Cluster);
    assert_eq!(place(&["status", "--node", "n1"]), Place::Cluster, "only a cluster has other nodes");
}

#[test]
fn a_namespace_is_the_meshs_or_a_filter() {
    let pages = parsed(&["workloads", "-n", "shop", "--mesh-namespace", "mesh"]);
    assert_eq!((pages.namespace.as_deref(), pages.access.namespace.as_str()), (Some("shop"), "mesh"));
    assert_eq!(parsed(&["install", "-n", "mesh"]).access.namespace, "mesh");
    assert_eq!(parsed(&["manifest", "generate", "-n", "mesh"]).access.namespace, "mesh");
    assert_eq!(parsed(&["check"]).access.namespace, "nodemesh-system");
}

/// What takes a mesh out of a whole cluster has to be said.
#[test]
fn uninstall_is_of_this_node_unless_it_says_otherwise() {
    assert!(matches!(parsed(&["uninstall"]).task, Task::Uninstall(_)));
    let Task::Cluster(cluster::Task::Uninstall(wish)) = parsed(&["uninstall", "--kubernetes", "--timeout", "90s"]).task
    else {
        panic!("it is of a cluster");
    };
    assert_eq!((wish.timeout.as_secs(), wish.force, wish.purge), (90, false, false));
}

#[test]
fn what_is_installed_is_given_in_helms_words() {
    let words = ["install", "--profile", "demo", "-f", "a", "-f", "b", "--set", "x=1,y=2", "--set", "z=3", "--dry-run"];
    let Task::Cluster(cluster::Task::Install(wish)) = parsed(&words).task else { panic!("it is an installation") };
    assert_eq!(wish.given.profile.as_deref(), Some("demo"));
    assert_eq!(wish.given.files, [PathBuf::from("a"), PathBuf::from("b")]);
    assert_eq!(wish.given.set, ["x=1,y=2", "z=3"]);
    assert!(wish.dry_run);
    let Task::Cluster(cluster::Task::ProfileDump(given)) = parsed(&["profile", "dump", "minimal"]).task else {
        panic!("it is a profile")
    };
    assert_eq!(given.profile.as_deref(), Some("minimal"));
}
