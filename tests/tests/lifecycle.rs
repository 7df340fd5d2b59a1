//! Pods and agents come, go and die: what stays open, what stays shut, what is left behind.

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::num::NonZero;
use std::os::unix::fs::MetadataExt;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use mesh_tests::ring::{Case, Mode, World, meshed_only, run};
use mesh_tests::traffic::{PATIENCE, Refusal, SetOnDrop, call, echo_in, pair, ping, refusal};
use mesh_tests::{Mesh, MeshMode, Pod, eventually, throughout};

struct Lifecycle {
    world: World,
    client: Arc<Pod>,
    near: Arc<Pod>,
    far: Arc<Pod>,
    outsider: Arc<Pod>,
}

fn build() -> Lifecycle {
    let mesh = Mesh::new().node("n1").node("n2");
    mesh.manifests().label("life", MeshMode::Enabled);
    let client = mesh.pod("n1", "life/client");
    let near = mesh.pod("n1", "life/near");
    let far = mesh.pod("n2", "life/far");
    let outsider = mesh.pod("n2", "outside/stranger");
    // A map of this size is soon full; it serves all other cases well, for entries live for microseconds.
    let world = World::start(mesh, Mode::of_this_run(), &["--orig-dst-entries", &ENTRIES.to_string()]);
    world.wait_enrolled(&[&client, &near, &far]);
    Lifecycle { world, client, near, far, outsider }
}

/// Room in the kernel's map of original destinations.
const ENTRIES: usize = 256;

const CASES: &[Case<Lifecycle>] = &[
    ("case_30_kill_9_fails_closed_and_a_restart_brings_all_back", case_30_kill_9),
    ("case_36_a_pod_deleted_in_mid_transfer_leaves_nothing", case_36_pod_deleted_in_mid_transfer),
    ("case_37_a_full_map_denies_and_counts", case_37_a_full_map_denies_and_counts),
    ("case_44_older_connections_go_on_and_pods_leave_live", case_44_enrol_and_unenrol_live),
    ("case_44_a_label_off_and_on_again", case_44_a_label_off_and_on_again),
    ("a_label_that_flutters_fails_no_call", a_label_that_flutters_fails_no_call),
    ("a_namespace_that_cannot_be_read_opens_nothing", a_namespace_that_cannot_be_read_opens_nothing),
    ("an_agent_that_ends_in_mid_transfer_resets", an_agent_that_ends_in_mid_transfer_resets),
    ("a_pod_label_goes_before_its_namespaces", a_pod_label_goes_before_its_namespaces),
    ("a_pod_whose_lo_is_down_is_told_what_to_do", a_pod_whose_lo_is_down_is_told_what_to_do),
    ("sigterm_drains", sigterm_drains),
    ("a_running_agent_is_neither_doubled_nor_cleaned_away", a_running_agent_is_neither_doubled_nor_cleaned_away),
    ("cleanup_leaves_nothing", cleanup_leaves_nothing),
];

fn main() -> ExitCode {
    run(build, |l| &l.world, meshed_only(CASES))
}

#[track_caller]
fn refused_promptly(client: &Pod, to: SocketAddr, what: &str) {
    let refused = refusal(client, to);
    assert!(refused.is_some_and(Refusal::is_prompt), "{what}: {refused:?}");
}

fn case_30_kill_9(l: &Lifecycle) {
    let (far, near) = (SocketAddr::new(l.far.v4(), echo_in(&l.far)), SocketAddr::new(l.near.v4(), echo_in(&l.near)));
    let (done, served) = (AtomicBool::new(false), AtomicUsize::new(0));
    let capture = l.world.mesh().capture("n1");
    thread::scope(|s| {
        let _stop = SetOnDrop(&done);
        // Load: most of these calls succeed before and after, none in between; `call` says "are you there?".
        for _ in 0..2 {
            s.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    served.fetch_add(usize::from(call(&l.client, far).is_ok()), Ordering::Relaxed);
                }
            });
        }
        eventually(PATIENCE, "the load runs", || served.load(Ordering::Relaxed) > 100);

        // The client's agent: nothing goes out. (A call in flight may have been answered already.)
        l.world.agent("n1").kill();
        for to in [far, near, SocketAddr::new(l.far.v6(), far.port())] {
            refused_promptly(&l.client, to, "out, without an agent");
        }
        refused_promptly(&l.near, far, "out, without an agent");
        // Nothing comes in either, not even from a pod that no mesh redirects.
        refused_promptly(&l.outsider, near, "in, without an agent");
        let took = l.world.agent("n1").restart();
        assert!(took < Duration::from_secs(2), "ready only {took:?} after its start");
        call(&l.client, far).expect("the restarted agent serves the pods that it finds");
        call(&l.outsider, near).expect("and lets in what may come in");

        // The server's agent.
        l.world.agent("n2").kill();
        refused_promptly(&l.client, far, "to a node without an agent");
        refused_promptly(&l.near, far, "to a node without an agent");
        refused_promptly(&l.outsider, far, "in, without an agent");
        let took = l.world.agent("n2").restart();
        assert!(took < Duration::from_secs(2), "ready only {took:?} after its start");
        // The client's agent has to find that its tunnels are dead.
        eventually(Duration::from_secs(2), "calls are served again", || call(&l.client, far).is_ok());

        let before = served.load(Ordering::Relaxed);
        eventually(PATIENCE, "the load goes on", || served.load(Ordering::Relaxed) > before + 100);
    });
    // The outsider speaks plaintext, as it may; the client and its neighbour never.
    let mut recording = capture.stop();
    let outsider = [l.outsider.v4(), l.outsider.v6()];
    recording.segments.retain(|s| !outsider.contains(&s.source.0) && !outsider.contains(&s.destination.0));
    assert!(!recording.contains(b"are you there?"), "plaintext passed when an agent was dead");
}

fn case_36_pod_deleted_in_mid_transfer(l: &Lifecycle) {
    for node in ["n1", "n2"] {
        let pod = l.world.mesh().pod(node, "life/short-lived");
        l.world.wait_enrolled(&[&pod]);
        let netns = fs::metadata(pod.netns().path()).unwrap().ino();
        let link = format!("pod{}", pod.v4().to_string().rsplit('.').next().unwrap());
        let (near, far) = pair(&pod, &l.far);
        near.set_nonblocking(true).unwrap();
        while (&near).write(&[0; 65536]).is_ok() {}
        (&far).read_exact(&mut [0; 100_000]).unwrap();
        // The manifest, the sockets of the application, and the runtime's name for the namespace go; in this order.
        l.world.mesh().manifests().delete("pod", pod.namespace(), pod.name());
        drop(near);
        drop(pod);
        drop(far);
        let agent_holds = || {
            let pid = l.world.agent(node).process().id();
            let fds = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
            let mut targets = fds.filter_map(|fd| fs::read_link(fd.path()).ok());
            targets.any(|target| target.to_string_lossy() == format!("net:[{netns}]"))
        };
        eventually(PATIENCE, "the agent lets go of the namespace", || !agent_holds());
        let netns = l.world.mesh().get_node(node).netns();
        eventually(PATIENCE, "the pod's link is gone with its namespace", || {
            !netns.command("ip").args(["link", "show", &link]).output().unwrap().status.success()
        });
    }
}

fn case_37_a_full_map_denies_and_counts(l: &Lifecycle) {
    const TRIED: usize = 2 * ENTRIES;
    // The kernel counts a map's entries on each CPU, and tells the sum in batches of 32: a map may hold that much more.
    let room = ENTRIES + 32 * thread::available_parallelism().map_or(1, NonZero::get);
    let far = SocketAddr::new(l.far.v4(), echo_in(&l.far));
    let full =
        || l.world.agent("n1").metric("nodemesh_kernel_events_total", &[("event", "map_full"), ("reason", "orig_dst")]);
    let before = full();
    let capture = l.world.mesh().capture("n1");
    // An agent that does not accept takes no entry out. The kernel completes the handshakes in its place.
    l.world.agent("n1").freeze();
    let streams: Vec<TcpStream> =
        (0..TRIED).map(|_| l.client.connect(far).expect("the agent's listener has room")).collect();
    l.world.agent("n1").thaw();
    // Where no entry found room, nobody knows where the connection was meant to go: it is reset, never guessed.
    let answers: Vec<_> = streams.iter().map(|stream| ping(stream, b"where to?").map_err(|e| e.kind())).collect();
    let served = answers.iter().filter(|answer| answer.is_ok()).count();
    assert!(served > 0 && served <= room, "{served} of {TRIED} were served with room for {room}");
    for refused in answers.into_iter().filter_map(Result::err) {
        assert!(Refusal::Afterwards(Some(refused)).is_prompt(), "{refused:?}");
    }
    assert!(!capture.stop().contains(b"where to?"));
    let counted = full() - before;
    assert!(counted >= (TRIED - served) as f64, "{counted} were counted, {served} served");
    drop(streams);
    eventually(PATIENCE, "all is well again", || call(&l.client, far).is_ok());
}

fn case_44_enrol_and_unenrol_live(l: &Lifecycle) {
    let mesh = l.world.mesh();
    mesh.manifests().label("later", MeshMode::Unset);
    let client = mesh.pod("n1", "later/client");
    let server = mesh.pod("n2", "later/server");
    let to = SocketAddr::new(server.v4(), echo_in(&server));
    let old = client.connect(to).unwrap();
    ping(&old, b"before enrolment").unwrap();

    mesh.manifests().label("later", MeshMode::Enabled);
    l.world.wait_enrolled(&[&client, &server]);
    let capture = mesh.capture("n1");
    ping(&old, b"the old connection goes on").unwrap();
    call(&client, to).unwrap();
    let new = client.connect(to).unwrap();
    ping(&new, b"the new one is protected").unwrap();
    let recording = capture.stop();
    assert!(recording.contains(b"the old connection goes on"));
    assert!(!recording.contains(b"the new one is protected"));
    let counted = |node: &str| l.world.agent(node).meshctl_json(&["workloads"]).to_string();
    assert!(counted("n1").contains("\"legacy_connections\":1"), "the old connection is counted: {}", counted("n1"));

    mesh.manifests().label("later", MeshMode::Unset);
    l.world.agent("n1").wait_enrolled(&client, false);
    l.world.agent("n2").wait_enrolled(&server, false);
    let capture = mesh.capture("n1");
    ping(&old, b"the oldest still goes on").unwrap();
    ping(&new, b"so does the protected one").unwrap();
    let plain = client.connect(to).unwrap();
    ping(&plain, b"plain again").unwrap();
    let recording = capture.stop();
    assert!(recording.contains(b"plain again") && !recording.contains(b"so does the protected one"));
    mesh.delete(client);
    mesh.delete(server);
}

fn case_44_a_label_off_and_on_again(l: &Lifecycle) {
    let mesh = l.world.mesh();
    mesh.manifests().label("on-off", MeshMode::Enabled);
    let (client, server) = (mesh.pod("n1", "on-off/client"), mesh.pod("n2", "on-off/server"));
    l.world.wait_enrolled(&[&client, &server]);
    let to = SocketAddr::new(server.v4(), echo_in(&server));
    let kept = client.connect(to).unwrap();
    let mut plain = None;
    for (round, mode) in [MeshMode::Enabled, MeshMode::Unset, MeshMode::Enabled].into_iter().enumerate() {
        let meshed = mode == MeshMode::Enabled;
        mesh.manifests().label("on-off", mode);
        for pod in [&client, &server] {
            l.world.agent(pod.node()).wait_enrolled(pod, meshed);
        }
        let capture = mesh.capture("n1");
        let new = client.connect(to).unwrap();
        ping(&new, format!("new in round {round}").as_bytes()).unwrap();
        ping(&kept, format!("kept in round {round}").as_bytes()).expect("the connection of the mesh lives on");
        if let Some(plain) = &plain {
            ping(plain, b"plain lives on").expect("the connection that was made without the mesh lives on");
        }
        let recording = capture.stop();
        assert_eq!(recording.contains(format!("new in round {round}").as_bytes()), !meshed, "round {round}");
        assert!(!recording.contains(format!("kept in round {round}").as_bytes()), "round {round}");
        assert_eq!(recording.contains(b"plain lives on"), plain.is_some());
        if !meshed {
            plain = Some(new);
        }
    }
    drop((kept, plain));
    mesh.delete(client);
    mesh.delete(server);
}

/// The two nodes hear of a label at different moments: what one of them still does as before must not fail at the other.
fn a_label_that_flutters_fails_no_call(l: &Lifecycle) {
    const TIMES: usize = 20;
    let mesh = l.world.mesh();
    mesh.manifests().label("flutter", MeshMode::Enabled);
    let (client, server) = (mesh.pod("n1", "flutter/client"), mesh.pod("n2", "flutter/server"));
    l.world.wait_enrolled(&[&client, &server]);
    let to = SocketAddr::new(server.v4(), echo_in(&server));
    let (done, calls) = (AtomicBool::new(false), AtomicUsize::new(0));
    let failed = Mutex::new(Vec::new());
    thread::scope(|s| {
        let _stop = SetOnDrop(&done);
        for _ in 0..2 {
            s.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    match call(&client, to) {
                        Ok(_) => drop(calls.fetch_add(1, Ordering::Relaxed)),
                        Err(e) => failed.lock().unwrap().push(e.to_string()),
                    }
                    // A bounded load: some hundred calls a second.
                    thread::sleep(Duration::from_millis(5));
                }
            });
        }
        for time in 0..TIMES {
            mesh.manifests().label("flutter", if time % 2 == 0 { MeshMode::Unset } else { MeshMode::Enabled });
            let so_far = calls.load(Ordering::Relaxed);
            // Half a second, whatever the machine does: that is what the label's owner does, not what is waited for.
            thread::sleep(Duration::from_millis(500));
            eventually(PATIENCE, "the load goes on", || calls.load(Ordering::Relaxed) > so_far);
        }
    });
    let (calls, failed) = (calls.into_inner(), failed.into_inner().unwrap());
    println!("{calls} calls went well and {} failed while the label changed {TIMES} times", failed.len());
    assert!(failed.is_empty(), "of {calls} calls {} failed: {:?}", failed.len(), &failed[..failed.len().min(5)]);
    mesh.delete(client);
    mesh.delete(server);
}

/// Agents that start while a namespace's manifest is broken, or gone: they must not take that for "not in the mesh".
fn a_namespace_that_cannot_be_read_opens_nothing(l: &Lifecycle) {
    const FILE: &str = "namespace-fenced";
    const TEXT: &[u8] = b"never in plaintext";
    let mesh = l.world.mesh();
    let strict = "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata:\n  name: strict\n  namespace: fenced\n\
                  spec:\n  mtls: {mode: STRICT}\n";
    mesh.manifests().apply("fenced-strict", strict);
    mesh.manifests().label("fenced", MeshMode::Enabled);
    let (client, server) = (mesh.pod("n1", "fenced/client"), mesh.pod("n2", "fenced/server"));
    l.world.wait_enrolled(&[&client, &server]);
    let to = SocketAddr::new(server.v4(), echo_in(&server));
    let broken: [Option<&str>; 3] = [
        Some("apiVersion: v1\nkind: Namespace\nmetadata: [not, a, map\n"),
        Some("apiVersion: v1\nkind: Namespace\nmetadata:\n  name: fenced\n  labels: {nodemesh.io/mode: perhaps}\n"),
        None,
    ];
    for text in broken {
        call(&client, to).unwrap();
        eventually(PATIENCE, "STRICT is in force", || call(&l.outsider, to).is_err());
        for node in ["n1", "n2"] {
            l.world.agent(node).kill();
        }
        match text {
            Some(text) => mesh.manifests().apply(FILE, text),
            None => mesh.manifests().remove(FILE),
        }
        let capture = mesh.capture("n1");
        for node in ["n1", "n2"] {
            l.world.agent(node).restart();
        }
        // Served over mutual TLS or refused, both are right.
        throughout(Duration::from_secs(2), "the outsider is kept out", || {
            if let Ok(stream) = client.connect(to) {
                let _ = ping(&stream, TEXT);
            }
            call(&l.outsider, to).is_err()
        });
        assert!(!capture.stop().contains(TEXT), "plaintext passed with the manifest {text:?}");

        mesh.manifests().label("fenced", MeshMode::Enabled);
        l.world.wait_enrolled(&[&client, &server]);
        let capture = mesh.capture("n1");
        eventually(PATIENCE, "all is served again", || {
            client.connect(to).is_ok_and(|stream| ping(&stream, TEXT).is_ok())
        });
        assert!(!capture.stop().contains(TEXT), "plaintext passed with the manifest mended");
    }
    mesh.manifests().remove("fenced-strict");
    mesh.delete(client);
    mesh.delete(server);
}

/// A cut-off body must not look like a whole one, whoever sends it.
fn an_agent_that_ends_in_mid_transfer_resets(l: &Lifecycle) {
    let end = |mut stream: &TcpStream| stream.read_to_end(&mut Vec::new()).map_err(|e| e.kind());
    for (node, kill) in [("n1", true), ("n2", true), ("n1", false), ("n2", false)] {
        // Across nodes, and on the node of the agent that ends.
        let neighbour = if node == "n1" { &l.near } else { &l.far };
        let local = if node == "n1" { l.client.clone() } else { l.world.mesh().pod("n2", "life/beside") };
        l.world.wait_enrolled(&[&local]);
        let pairs = [pair(&l.client, &l.far), pair(&local, neighbour)];
        for (near, far) in &pairs {
            for (mut from, mut to) in [(near, far), (far, near)] {
                from.write_all(&[7; 100_000]).unwrap();
                to.read_exact(&mut [0; 50_000]).unwrap();
            }
        }
        let mut agent = l.world.agent(node);
        if kill {
            agent.kill();
        } else {
            // Nobody ends what is open: the time for draining runs out.
            agent.process().signal(rustix::process::Signal::TERM);
            assert!(agent.process().wait(Duration::from_secs(30)).success());
        }
        for (at, (near, far)) in pairs.iter().enumerate() {
            for (side, stream) in [("client", near), ("server", far)] {
                let what = format!("{side} of pair {at}, agent of {node} ended, killed: {kill}");
                assert_eq!(end(stream), Err(std::io::ErrorKind::ConnectionReset), "{what}");
            }
        }
        agent.restart();
        drop(agent);
        if node == "n2" {
            l.world.mesh().delete(local);
        }
        let far = SocketAddr::new(l.far.v4(), echo_in(&l.far));
        eventually(PATIENCE, "calls are served again", || call(&l.client, far).is_ok());
    }
}

fn a_pod_label_goes_before_its_namespaces(l: &Lifecycle) {
    let mesh = l.world.mesh();
    let out = mesh.add(mesh_tests::PodSpec::new("n1", "life/opted-out").label("nodemesh.io/mode", "disabled"));
    let joined = mesh.add(mesh_tests::PodSpec::new("n1", "outside/opted-in").label("nodemesh.io/mode", "enabled"));
    l.world.wait_enrolled(&[&joined]);
    throughout(Duration::from_millis(300), "it stays out", || !l.world.agent("n1").is_enrolled(&out));
    mesh.delete(out);
    mesh.delete(joined);
}

fn a_pod_whose_lo_is_down_is_told_what_to_do(l: &Lifecycle) {
    let pod = l.world.mesh().pod("n1", "outside/bare");
    pod.output("ip", &["link", "set", "lo", "down"]).success();
    l.world.mesh().manifests().pod_with(&pod, true, &[("nodemesh.io/mode", "enabled")]);
    let told = || {
        let workloads = l.world.agent("n1").meshctl_json(&["workloads"]).to_string();
        workloads.contains("its `lo` is down; bring it up: ")
    };
    eventually(PATIENCE, "the error says what to do", told);
    pod.output("ip", &["link", "set", "lo", "up"]).success();
    l.world.wait_enrolled(&[&pod]);
    l.world.mesh().delete(pod);
}

fn sigterm_drains(l: &Lifecycle) {
    let far = SocketAddr::new(l.far.v4(), echo_in(&l.far));
    let stream = l.client.connect(far).unwrap();
    ping(&stream, b"before").unwrap();
    let mut agent = l.world.agent("n1");
    agent.process().signal(rustix::process::Signal::TERM);
    // What is open may finish within the drain time...
    for _ in 0..5 {
        ping(&stream, b"while it drains").expect("an open connection may go on while the agent drains");
    }
    drop(stream);
    // ... and when it has, the agent ends by itself.
    agent.stop();
    assert!(!agent.log().contains("cannot accept"), "listeners that it shut down itself are no fault");
    refused_promptly(&l.client, far, "a stopped agent is as closed as a dead one");
    agent.restart();
    drop(agent);
    call(&l.client, far).unwrap();
}

fn a_running_agent_is_neither_doubled_nor_cleaned_away(l: &Lifecycle) {
    const UNAVAILABLE: i32 = 69;
    let mesh = l.world.mesh();
    let elsewhere = mesh.dir().join("nobody.sock");
    let cleaned = mesh.cleanup_by("n1", &elsewhere);
    assert_eq!(cleaned.code, Some(UNAVAILABLE), "{}", cleaned.stderr);
    assert!(cleaned.stderr.contains("an agent for node n1 is running already"), "{}", cleaned.stderr);
    // With ports and files of its own: what it would share is in the kernel.
    let binary = mesh_tests::agent_binary().display().to_string();
    let mut double = l.world.agent("n1").node().netns().command(&binary);
    double.args(["node", "--node-name", "n1", "--embedded-ca", "--metrics-address", "127.0.0.1:0"]);
    double.args(["--readiness-address", "127.0.0.1:0", "--admin-socket"]).arg(&elsewhere);
    double.arg("--state-dir").arg(mesh.dir().join("state-double")).arg("--bpffs").arg(mesh.bpffs("n1"));
    let double = double.arg("--config-dir").arg(mesh.manifests().folder()).output().unwrap();
    let said = String::from_utf8_lossy(&[double.stdout, double.stderr].concat()).into_owned();
    assert_eq!(double.status.code(), Some(UNAVAILABLE), "{said}");
    assert!(said.contains("an agent for node n1 is running already"), "{said}");
    let far = SocketAddr::new(l.far.v4(), echo_in(&l.far));
    call(&l.client, far).unwrap();
    assert!(l.world.agent("n1").is_enrolled(&l.client), "still in the mesh");
}

fn cleanup_leaves_nothing(l: &Lifecycle) {
    let far = SocketAddr::new(l.far.v4(), echo_in(&l.far));
    for node in ["n1", "n2"] {
        l.world.agent(node).stop();
        let said = l.world.mesh().cleanup(node).success();
        assert!(!said.is_empty(), "it says what it removed");
        let mut pins = files_below(&l.world.mesh().bpffs(node));
        // Every bpffs has these two, made by the kernel.
        pins.retain(|pin| !pin.ends_with("/progs.debug") && !pin.ends_with("/maps.debug"));
        assert!(pins.is_empty(), "pins are left: {pins:?}");
        let again = l.world.mesh().cleanup(node);
        assert_eq!(again.code, Some(0), "a second clean-up finds nothing and is no error: {}", again.stderr);
    }
    // No program steers or refuses: pods talk as if there never had been a mesh.
    call(&l.client, far).expect("plain again");
    let refused = refusal(&l.client, SocketAddr::new(l.far.v4(), 1));
    assert_eq!(refused, Some(Refusal::AtConnect(std::io::ErrorKind::ConnectionRefused)));
    for pod in [&l.client, &l.near, &l.far] {
        let rules =
            pod.output("ip", &["rule", "show"]).success() + &pod.output("ip", &["-6", "rule", "show"]).success();
        assert!(!rules.contains("fwmark"), "rules are left in {}: {rules}", pod.name());
        let routes = pod.output("ip", &["route", "show", "table", "100"]);
        assert!(routes.stdout.is_empty(), "routes are left in {}: {}", pod.name(), routes.stdout);
    }
    // Back for whoever comes next.
    for node in ["n1", "n2"] {
        l.world.agent(node).restart();
    }
    l.world.wait_enrolled(&[&l.client, &l.near, &l.far]);
    call(&l.client, far).unwrap();
}

fn files_below(folder: &std::path::Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            found.extend(files_below(&entry.path()));
        } else {
            found.push(entry.path().display().to_string());
        }
    }
    found
}
