//! Where a connection goes: services, their endpoints, pods that come and go, destinations outside.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread;
use std::time::{Duration, Instant};

use mesh_tests::ring::{Case, Mode, World, meshed_only, run};
use mesh_tests::traffic::{PATIENCE, Refusal, SetOnDrop, call, echo, echo_in, pair, ping, port, pour, refusal};
use mesh_tests::{Mesh, MeshMode, Pod, PodSpec, eventually};

struct Services {
    world: World,
    client: Arc<Pod>,
    outsider: Arc<Pod>,
    servers: Vec<Arc<Pod>>,
}

/// Each server pod has on this port a server that says the pod's name. Ports of a pod are its own: nobody else's here.
const NAME: u16 = 8000;

fn build() -> Services {
    let mesh = Mesh::new().node("n1").node("n2");
    mesh.manifests().label("svc", MeshMode::Enabled);
    mesh.manifests().label("outside", MeshMode::Unset);
    let client = mesh.pod("n1", "svc/client");
    let outsider = mesh.pod("n2", "outside/pod");
    let servers = vec![mesh.pod("n1", "svc/s1"), mesh.pod("n2", "svc/s2"), mesh.pod("n2", "svc/s3")];
    for server in &servers {
        say_name(server);
    }
    let world = World::start(mesh, Mode::of_this_run(), &[]);
    world.wait_enrolled(&[&client, &servers[0], &servers[1], &servers[2]]);
    Services { world, client, outsider, servers }
}

const CASES: &[Case<Services>] = &[
    ("a_cluster_ip_leads_to_an_endpoint", a_cluster_ip_leads_to_an_endpoint),
    ("endpoints_share_the_load", endpoints_share_the_load),
    ("endpoints_that_are_not_ready_get_nothing", endpoints_that_are_not_ready_get_nothing),
    ("an_endpoint_that_takes_no_connection_is_left_behind", an_endpoint_that_takes_no_connection_is_left_behind),
    ("a_service_without_endpoints_is_refused", a_service_without_endpoints_is_refused),
    ("a_port_the_service_has_not_is_refused", a_port_the_service_has_not_is_refused),
    ("outsiders_and_members_talk_when_permissive", outsiders_and_members_talk_when_permissive),
    ("destinations_outside_pass_or_are_refused", destinations_outside_pass_or_are_refused),
    ("a_reused_pod_address_is_the_new_pod", a_reused_pod_address_is_the_new_pod),
    ("a_bulk_stream_does_not_block_a_small_one", a_bulk_stream_does_not_block_a_small_one),
    ("a_stalled_stream_does_not_block_others", a_stalled_stream_does_not_block_others),
];

fn main() -> ExitCode {
    run(build, |s| &s.world, meshed_only(CASES))
}

fn say_name(pod: &Pod) {
    let listener = pod.listen_on(&format!("[::]:{NAME}"));
    let name = pod.name().to_owned();
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let _ = stream.write_all(name.as_bytes());
        }
    });
}

/// The name of the pod that answers.
fn who(client: &Pod, to: SocketAddr) -> Option<String> {
    let mut stream = client.connect(to).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(5))).ok()?;
    let mut name = String::new();
    stream.read_to_string(&mut name).ok()?;
    (!name.is_empty()).then_some(name)
}

fn census(s: &Services, to: SocketAddr, calls: usize) -> HashMap<String, usize> {
    let mut counts = HashMap::new();
    for _ in 0..calls {
        *counts.entry(who(&s.client, to).expect("an endpoint answers")).or_default() += 1;
    }
    counts
}

fn a_cluster_ip_leads_to_an_endpoint(s: &Services) {
    for server in &s.servers {
        let ips = s.world.mesh().manifests().service(&format!("svc/only-{}", server.name()), &[(80, NAME)], &[server]);
        for ip in [ips.v4, ips.v6] {
            eventually(PATIENCE, "the service is known", || {
                who(&s.client, (ip, 80).into()).as_deref() == Some(server.name())
            });
        }
        // The client sees the address it asked for.
        let stream = s.client.connect((ips.v4, 80).into()).unwrap();
        assert_eq!(stream.peer_addr().unwrap(), (ips.v4, 80).into());
    }
}

fn endpoints_share_the_load(s: &Services) {
    let all: Vec<&Pod> = s.servers.iter().map(|pod| &**pod).collect();
    let ips = s.world.mesh().manifests().service("svc/all", &[(80, NAME)], &all);
    let to = SocketAddr::new(ips.v4, 80);
    eventually(PATIENCE, "the service is known", || who(&s.client, to).is_some());
    let counts = census(s, to, 90);
    assert!(s.servers.iter().all(|pod| counts.get(pod.name()).is_some_and(|count| *count >= 15)), "{counts:?}");
}

fn endpoints_that_are_not_ready_get_nothing(s: &Services) {
    let manifests = s.world.mesh().manifests();
    let [s1, s2] = [&*s.servers[0], &*s.servers[1]];
    let ips = manifests.service("svc/half", &[(80, NAME)], &[s1, s2]);
    let to = SocketAddr::new(ips.v4, 80);
    eventually(PATIENCE, "both endpoints are used", || census_or_nothing(s, to) == 2);
    manifests.endpoints("svc", "half", &[(80, NAME)], [(s1, false), (s2, true)].into_iter());
    eventually(PATIENCE, "one endpoint is used", || census_or_nothing(s, to) == 1);
    assert_eq!(census(s, to, 20).keys().collect::<Vec<_>>(), [s2.name()]);
}

/// How many pods answer.
fn census_or_nothing(s: &Services, to: SocketAddr) -> usize {
    let names: Vec<String> = (0..12).filter_map(|_| who(&s.client, to)).collect();
    names.iter().collect::<std::collections::HashSet<_>>().len()
}

/// Also for a client that speaks first, whose first bytes have gone along.
fn an_endpoint_that_takes_no_connection_is_left_behind(s: &Services) {
    const PORT: u16 = 8001;
    let [well, sick] = [&*s.servers[1], &*s.servers[2]];
    let listener = well.listen_on(&format!("[::]:{PORT}"));
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            thread::spawn(move || {
                let mut stream = stream;
                let mut asked = [0; 4];
                let _ = stream.read_exact(&mut asked).and_then(|()| stream.write_all(&asked));
            });
        }
    });
    let full = sick.listen_on(&format!("[::]:{PORT}"));
    rustix::net::listen(&full, 0).unwrap();
    let at = SocketAddr::new(sick.v4(), PORT);
    let fill = || sick.run(|| TcpStream::connect_timeout(&at, Duration::from_millis(300)).ok());
    let _queue: Vec<TcpStream> = std::iter::from_fn(fill).take(100).collect();
    let ips = s.world.mesh().manifests().service("svc/one-sick", &[(80, PORT)], &[well, sick]);
    let to = SocketAddr::new(ips.v4, 80);
    let ask = || {
        let mut stream = s.client.connect(to)?;
        stream.set_read_timeout(Some(Duration::from_secs(30)))?;
        stream.write_all(b"ping")?;
        let mut answer = [0; 4];
        stream.read_exact(&mut answer).map(|()| answer)
    };
    eventually(PATIENCE, "the service is known", || ask().is_ok());
    // Endpoints are asked in turn: some of these meet the sick one first.
    for call in 0..4 {
        assert_eq!(ask().unwrap_or_else(|e| panic!("call {call}: {e}")), *b"ping");
    }
    let log = s.world.agent("n2").log();
    let refused =
        log.lines().filter(|line| line.contains("connection failed") && line.contains(&at.to_string())).count();
    assert!(refused > 0, "no call met the sick endpoint: {log}");
}

fn a_service_without_endpoints_is_refused(s: &Services) {
    let ips = s.world.mesh().manifests().service("svc/empty", &[(80, NAME)], &[]);
    // Known or not yet known, it is never served; known, it is refused promptly and by the mesh, not by a timeout.
    eventually(PATIENCE, "a prompt refusal", || {
        refusal(&s.client, (ips.v4, 80).into()).is_some_and(Refusal::is_prompt)
    });
}

fn a_port_the_service_has_not_is_refused(s: &Services) {
    let ips = s.world.mesh().manifests().service("svc/one-port", &[(80, NAME)], &[&s.servers[0]]);
    eventually(PATIENCE, "the service is known", || who(&s.client, (ips.v4, 80).into()).is_some());
    let refused = refusal(&s.client, (ips.v4, 81).into());
    assert!(refused.is_some_and(Refusal::is_prompt), "{refused:?}");
}

fn outsiders_and_members_talk_when_permissive(s: &Services) {
    for server in &s.servers {
        for ip in [server.v4(), server.v6()] {
            let name = who(&s.outsider, (ip, NAME).into());
            assert_eq!(name.as_deref(), Some(server.name()), "an outsider calls {ip}");
        }
    }
    let listener = s.outsider.listen();
    let to = SocketAddr::new(s.outsider.v4(), port(&listener));
    let near = s.client.connect(to).unwrap();
    let (far, from) = mesh_tests::traffic::accept(&listener);
    assert_eq!(from.ip().to_canonical(), s.client.v4(), "an outsider sees a member's own address");
    (&near).write_all(b"x").unwrap();
    (&far).read_exact(&mut [0]).unwrap();
}

/// An echo server outside all pods: in the control namespace.
fn outside_server(mesh: &Mesh) -> SocketAddr {
    let address = mesh.control_v4();
    let listener = mesh.control().run(|| std::net::TcpListener::bind((address, 0))).unwrap();
    // Pods are reached through their nodes.
    mesh.control().ip(&["route replace 10.244.1.0/24 via 192.168.77.1"]);
    let to = listener.local_addr().unwrap();
    echo(listener);
    to
}

fn destinations_outside_pass_or_are_refused(s: &Services) {
    let to = outside_server(s.world.mesh());
    call(&s.client, to).expect("ALLOW_ANY lets a destination outside the mesh pass");

    let mesh = Mesh::new().node("n1");
    mesh.manifests().label("svc", MeshMode::Enabled);
    let (client, server) = (mesh.pod("n1", "svc/client"), mesh.pod("n1", "svc/server"));
    let to = outside_server(&mesh);
    let world = World::start(mesh, Mode::Meshed, &["--outbound-policy", "REGISTRY_ONLY"]);
    world.wait_enrolled(&[&client, &server]);
    let refused = refusal(&client, to);
    assert!(refused.is_some_and(Refusal::is_prompt), "{refused:?}");
    call(&client, (server.v4(), echo_in(&server)).into()).expect("what the registry has is reached");
}

fn a_reused_pod_address_is_the_new_pod(s: &Services) {
    let mesh = s.world.mesh();
    let old = mesh.pod("n2", "svc/old");
    say_name(&old);
    s.world.wait_enrolled(&[&old]);
    let to = SocketAddr::new(old.v4(), NAME);
    // A tunnel to the old pod is in the pool from here on.
    assert_eq!(who(&s.client, to).as_deref(), Some("old"));
    let spec = PodSpec::new("n2", "svc/new").reusing(&old);
    mesh.delete(old);
    let new = mesh.add(spec);
    say_name(&new);
    s.world.wait_enrolled(&[&new]);
    eventually(Duration::from_secs(5), "the new pod answers", || who(&s.client, to).as_deref() == Some("new"));
    for _ in 0..20 {
        assert_eq!(who(&s.client, to).as_deref(), Some("new"));
    }
    let listener = new.listen();
    let near = s.client.connect((new.v4(), port(&listener)).into()).unwrap();
    let (far, _) = mesh_tests::traffic::accept(&listener);
    (&near).write_all(b"x").unwrap();
    (&far).read_exact(&mut [0]).unwrap();
    let shown = s.world.agent("n1").meshctl_json(&["connections"]).to_string();
    assert!(shown.contains("/ns/svc/sa/new"), "the new pod's identity was proved: {shown}");
    mesh.delete(new);
}

/// 200 pings beside something else: the slowest but two.
fn slow_ping(stream: &TcpStream) -> Duration {
    let mut times: Vec<Duration> = (0..200)
        .map(|_| {
            let start = Instant::now();
            ping(stream, b"small").unwrap();
            start.elapsed()
        })
        .collect();
    times.sort();
    times[197]
}

fn a_bulk_stream_does_not_block_a_small_one(s: &Services) {
    let server = &s.servers[1];
    let small = s.client.connect((server.v4(), echo_in(server)).into()).unwrap();
    ping(&small, b"warm").unwrap();
    let (near, far) = pair(&s.client, server);
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let stop = SetOnDrop(&done);
        scope.spawn(|| pour(&near, &done));
        scope.spawn(|| while (&far).read(&mut [0; 65536]).is_ok_and(|n| n > 0) {});
        let worst = slow_ping(&small);
        drop(stop);
        near.shutdown(std::net::Shutdown::Both).unwrap();
        // Two busy cores and four threads: far above what a stream of its own costs, far below a window's wait.
        assert!(worst < Duration::from_millis(500), "a ping took {worst:?}");
    });
}

fn a_stalled_stream_does_not_block_others(s: &Services) {
    let server = &s.servers[1];
    // A reader that never reads: all windows of its stream are full.
    let (near, _far) = pair(&s.client, server);
    near.set_nonblocking(true).unwrap();
    let quiet = || {
        while (&near).write(&[0; 65536]).is_ok() {}
        true
    };
    mesh_tests::throughout(Duration::from_millis(500), "it fills", quiet);
    let small = s.client.connect((server.v4(), echo_in(server)).into()).unwrap();
    let worst = slow_ping(&small);
    assert!(worst < Duration::from_millis(50), "a ping took {worst:?} beside a stalled stream");
}
