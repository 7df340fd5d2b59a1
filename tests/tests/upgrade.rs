//! An agent takes the place of another: no connection is cut and none is refused, whatever is under way.

use std::fs::{self, Permissions};
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use mesh_tests::ring::{Case, Mode, World, meshed_only, run};
use mesh_tests::traffic::{PATIENCE, SetOnDrop, accept, call, echo_in, expect_pattern, ping, port, send_pattern};
use mesh_tests::{Mesh, MeshMode, Pod, Process, eventually};
use serde_json::{Value, json};

struct Upgrade {
    world: World,
    client: Arc<Pod>,
    near: Arc<Pod>,
    far: Arc<Pod>,
    /// Has so many connections open that some share HBONE tunnels.
    crowd: Arc<Pod>,
    far_crowd: Arc<Pod>,
    outsider: Arc<Pod>,
}

/// Longer than any case takes: what is cut was not cut because the time for draining was over.
const DRAIN: &str = "90s";
/// More than a pair of pods has sessions.
const CROWD: usize = 130;

fn build() -> Upgrade {
    let mesh = Mesh::new().node("n1").node("n2");
    mesh.manifests().label("up", MeshMode::Enabled);
    let client = mesh.pod("n1", "up/client");
    let near = mesh.pod("n1", "up/near");
    let far = mesh.pod("n2", "up/far");
    let crowd = mesh.pod("n1", "up/crowd");
    let far_crowd = mesh.pod("n2", "up/far-crowd");
    let outsider = mesh.pod("n2", "outside/stranger");
    let world = World::start(mesh, Mode::of_this_run(), &["--workers", "2", "--drain-timeout", DRAIN]);
    world.wait_enrolled(&[&client, &near, &far, &crowd, &far_crowd]);
    Upgrade { world, client, near, far, crowd, far_crowd, outsider }
}

const CASES: &[Case<Upgrade>] = &[
    ("three_upgrades_under_load_fail_no_call_and_cut_no_connection", three_upgrades_under_load),
    ("an_agent_that_dies_before_it_has_taken_over_changes_nothing", an_agent_that_dies_changes_nothing),
    ("a_policy_that_changes_cuts_what_drains", a_policy_that_changes_cuts_what_drains),
    ("a_pod_that_goes_while_its_agent_drains_is_let_go", a_pod_that_goes_while_its_agent_drains),
    ("the_next_agent_restarts_while_the_one_before_drains", the_next_agent_restarts),
    ("in_kubernetes_the_one_before_stands_by", the_one_before_stands_by),
    ("only_root_takes_over_and_only_who_is_fit", only_root_takes_over),
    ("a_foreign_schema_is_refused_and_makes_room", a_foreign_schema_makes_room),
];

fn main() -> ExitCode {
    run(build, |u| &u.world, meshed_only(CASES))
}

/// What went wrong, a line each; and how much went right.
#[derive(Default)]
struct Toll {
    failed: Mutex<Vec<String>>,
    calls: AtomicUsize,
    chats: AtomicUsize,
    bytes: AtomicU64,
    slowest: AtomicU64,
}

impl Toll {
    fn fail(&self, what: &str, why: &dyn std::fmt::Display) {
        self.failed.lock().unwrap().push(format!("{what}: {why}"));
    }

    /// Calls one after the other.
    fn call(&self, what: &str, from: &Pod, to: SocketAddr, done: &AtomicBool) {
        while !done.load(Ordering::Relaxed) {
            let start = Instant::now();
            match call(from, to) {
                Ok(()) => _ = self.calls.fetch_add(1, Ordering::Relaxed),
                Err(e) => self.fail(&format!("a call {what}"), &e),
            }
            self.slowest.fetch_max(start.elapsed().as_millis() as u64, Ordering::Relaxed);
        }
    }

    /// Says a word on each of these in turn; what is cut is left out from then on.
    fn chat(&self, what: &str, mut streams: Vec<TcpStream>, done: &AtomicBool) {
        while !done.load(Ordering::Relaxed) {
            streams.retain(|stream| match ping(stream, b"still there?") {
                Ok(()) => self.chats.fetch_add(1, Ordering::Relaxed) < usize::MAX,
                Err(e) => {
                    self.fail(&format!("a chat {what}"), &e);
                    false
                }
            });
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Transfers of some megabytes, one after the other, each compared byte by byte.
    fn pour(&self, what: &str, from: &Pod, to: &Pod, done: &AtomicBool) {
        const LENGTH: usize = 16 * 1024 * 1024;
        let listener = to.listen();
        let address = SocketAddr::new(to.v4(), port(&listener));
        for seed in 1.. {
            if done.load(Ordering::Relaxed) {
                return;
            }
            let sender = match from.connect(address) {
                Ok(stream) => stream,
                Err(e) => return self.fail(&format!("a transfer {what}"), &e),
            };
            let (receiver, _) = accept(&listener);
            let sent = thread::scope(|s| {
                let sending = s.spawn(|| send_pattern(&sender, seed, LENGTH));
                let received = s.spawn(|| expect_pattern(&receiver, seed, LENGTH)).join();
                let sent = sending.join().expect("sending does not panic");
                received.map_err(|_| io::Error::other("bytes are missing")).and(sent)
            });
            match sent {
                Ok(()) => _ = self.bytes.fetch_add(LENGTH as u64, Ordering::Relaxed),
                Err(e) => return self.fail(&format!("a transfer {what}"), &e),
            }
        }
    }
}

fn three_upgrades_under_load(u: &Upgrade) {
    let Upgrade { world, client, near, far, crowd, far_crowd, outsider } = u;
    let echoes: Vec<(&str, &Pod, SocketAddr)> = vec![
        ("out", client, SocketAddr::new(far.v4(), echo_in(far))),
        ("out, by IPv6", client, SocketAddr::new(far.v6(), echo_in(far))),
        ("in", far, SocketAddr::new(near.v4(), echo_in(near))),
        ("on the node", client, SocketAddr::new(near.v4(), echo_in(near))),
        ("in, in plaintext", outsider, SocketAddr::new(near.v4(), echo_in(near))),
        ("out, over HBONE", crowd, SocketAddr::new(far_crowd.v4(), echo_in(far_crowd))),
        ("in, over HBONE", far_crowd, SocketAddr::new(crowd.v4(), echo_in(crowd))),
    ];
    let (toll, done) = (Toll::default(), AtomicBool::new(false));
    let mut old: Vec<Process> = Vec::new();
    thread::scope(|s| {
        let _stop = SetOnDrop(&done);
        let (toll, done) = (&toll, &done);
        for &(what, from, to) in &echoes {
            let many = if what.contains("HBONE") { CROWD } else { 4 };
            let streams = (0..many).map(|_| from.connect(to).expect("a chat begins")).collect();
            s.spawn(move || toll.chat(what, streams, done));
        }
        let tunnels = || world.agent("n1").meshctl_json(&["connections"]).to_string();
        eventually(PATIENCE, "some chats are over HBONE", || tunnels().contains("\"hbone\""));
        for &(what, from, to) in &echoes {
            s.spawn(move || toll.call(what, from, to, done));
        }
        for (what, from, to) in [("out", client, far), ("in", far, near), ("on the node", client, near)] {
            s.spawn(move || toll.pour(what, from, to, done));
        }
        let moved = |before: usize| {
            eventually(PATIENCE, "the load runs", || toll.calls.load(Ordering::Relaxed) > before + 200);
        };
        moved(0);
        // With the same programs in the kernel, with others, and with the first ones again.
        for flags in [&[][..], &["--kernel-log"], &[]] {
            let before = toll.calls.load(Ordering::Relaxed);
            old.push(world.agent("n1").upgrade(flags));
            moved(before);
        }
        // The server's node too, and back to back.
        for _ in 0..2 {
            let before = toll.calls.load(Ordering::Relaxed);
            old.push(world.agent("n2").upgrade(&[]));
            moved(before);
        }
    });
    let Toll { failed, calls, chats, bytes, slowest } = toll;
    println!(
        "5 upgrades: {} calls, the slowest took {} ms; {} words in {} chats; {} MB transferred",
        calls.into_inner(),
        slowest.into_inner(),
        chats.into_inner(),
        2 * CROWD + 5 * 4,
        bytes.into_inner() / 1_000_000,
    );
    let failed = failed.into_inner().unwrap();
    assert!(failed.is_empty(), "{} failed, such as {:#?}", failed.len(), &failed[..failed.len().min(20)]);
    // All are closed: the agents that drained have nothing left to wait for.
    for mut process in old {
        assert!(process.wait(Duration::from_secs(30)).success());
        let log = process.log();
        assert!(log.contains("handed over to agent PID") && !log.contains("they are cut"), "{log}");
    }
    let log = world.agent("n1").log();
    assert!(log.contains("took over 3 pods from agent PID"), "{log}");
}

/// The socket on which an agent hands its place over.
fn socket(u: &Upgrade) -> PathBuf {
    let admin = u.world.agent("n1").admin_socket().to_owned();
    let stem = admin.file_stem().unwrap().to_str().unwrap().to_owned();
    admin.with_file_name(format!("{stem}-handover.sock"))
}

fn say(mut stream: &UnixStream, word: &Value) {
    let text = word.to_string();
    stream.write_all(&u32::try_from(text.len()).unwrap().to_be_bytes()).unwrap();
    stream.write_all(text.as_bytes()).unwrap();
}

/// The next word; descriptors that come along are dropped by the kernel.
fn hear(mut stream: &UnixStream) -> io::Result<Value> {
    let mut length = [0; 4];
    stream.read_exact(&mut length)?;
    let mut text = vec![0; u32::from_be_bytes(length) as usize];
    stream.read_exact(&mut text)?;
    serde_json::from_slice(&text).map_err(io::Error::other)
}

fn hello(schema: u32, node: &str) -> Value {
    json!({"word": "hello", "protocol": 1, "schema": schema, "node": node, "version": "0.0.0-test", "pid": 1})
}

fn an_agent_that_dies_changes_nothing(u: &Upgrade) {
    let far = SocketAddr::new(u.far.v4(), echo_in(&u.far));
    let kept = u.client.connect(far).unwrap();
    let calls = |when: &str| {
        ping(&kept, b"kept").unwrap_or_else(|e| panic!("{when}: {e}"));
        for _ in 0..20 {
            call(&u.client, far).unwrap_or_else(|e| panic!("{when}: {e}"));
        }
    };
    // One that has received all, and then is no more.
    let stream = UnixStream::connect(socket(u)).unwrap();
    say(&stream, &hello(1, "n1"));
    assert_eq!(hear(&stream).unwrap()["word"], "welcome");
    say(&stream, &json!({"word": "give"}));
    let words: Vec<Value> = std::iter::from_fn(|| hear(&stream).ok().filter(|word| word["word"] != "all")).collect();
    assert_eq!(words.iter().filter(|word| word["word"] == "pod").count(), 3, "{words:?}");
    calls("while it is undecided");
    drop(stream);
    calls("after its death");
    // Who comes and goes is taken in and let go as ever.
    let late = u.world.mesh().pod("n1", "up/late");
    u.world.wait_enrolled(&[&late]);
    call(&late, far).unwrap();
    u.world.mesh().delete(late);

    // A real one, with other programs, killed while it prepares: without a controller it gets no certificates.
    u.world.controller().kill();
    let mut agent = u.world.agent("n1");
    let old = agent.take_over(&["--kernel-log"]);
    agent.process().wait_for("no certificate yet to take over with", PATIENCE);
    calls("while a real one prepares");
    agent.kill();
    agent.put_back(old);
    drop(agent);
    let gone = "has gone; this one goes on";
    eventually(PATIENCE, "the agent has noticed", || u.world.agent("n1").log().matches(gone).count() > 0);
    calls("after the death of a real one");
    u.world.controller().restart();
    // And the next one that comes succeeds.
    let mut old = u.world.agent("n1").upgrade(&[]);
    calls("after an upgrade");
    drop(kept);
    assert!(old.wait(Duration::from_secs(30)).success());
}

fn a_policy_that_changes_cuts_what_drains(u: &Upgrade) {
    let far = SocketAddr::new(u.near.v4(), echo_in(&u.near));
    let from_node = u.client.connect(far).unwrap();
    let from_afar = u.far.connect(far).unwrap();
    for stream in [&from_node, &from_afar] {
        ping(stream, b"before").unwrap();
    }
    let mut old = u.world.agent("n1").upgrade(&[]);
    for stream in [&from_node, &from_afar] {
        ping(stream, b"while the old agent drains").unwrap();
    }
    let deny = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata:\n  name: no-far\n  namespace: up\n\
                spec:\n  action: DENY\n  selector: {matchLabels: {app: near}}\n  rules:\n  - from:\n    - source:\n        \
                principals: [cluster.local/ns/up/sa/far]\n";
    u.world.mesh().manifests().apply("no-far", deny);
    eventually(PATIENCE, "what is forbidden is cut", || ping(&from_afar, b"forbidden").is_err());
    ping(&from_node, b"allowed").expect("what is allowed goes on");
    assert!(old.log().contains("connections cut that a policy no longer allows"), "by the agent that drains");
    u.world.mesh().manifests().remove("no-far");
    drop(from_node);
    assert!(old.wait(Duration::from_secs(30)).success());
    eventually(PATIENCE, "all is served again", || call(&u.far, far).is_ok());
}

fn a_pod_that_goes_while_its_agent_drains(u: &Upgrade) {
    let pod = u.world.mesh().pod("n1", "up/short-lived");
    u.world.wait_enrolled(&[&pod]);
    let stream = pod.connect(SocketAddr::new(u.far.v4(), echo_in(&u.far))).unwrap();
    ping(&stream, b"before").unwrap();
    let mut old = u.world.agent("n1").upgrade(&[]);
    ping(&stream, b"while the old agent drains").unwrap();
    // Its end of the connection lives on, as that of a process that does not notice: only the namespace is gone.
    u.world.mesh().delete(pod);
    assert!(old.wait(Duration::from_secs(30)).success(), "nothing holds the old agent");
    drop(stream);
}

/// As after a crash in the middle of an upgrade: nobody holds what the next one needs.
fn the_next_agent_restarts(u: &Upgrade) {
    let far = SocketAddr::new(u.far.v4(), echo_in(&u.far));
    let kept = u.client.connect(far).unwrap();
    ping(&kept, b"before").unwrap();
    let mut agent = u.world.agent("n1");
    let mut old = agent.upgrade(&[]);
    agent.kill();
    agent.restart();
    drop(agent);
    call(&u.client, far).expect("the restarted agent serves");
    call(&u.far, SocketAddr::new(u.near.v4(), echo_in(&u.near))).expect("in both directions");
    ping(&kept, b"and the first one still drains").unwrap();
    // A sign to stop cuts nothing: it drains already.
    old.signal(rustix::process::Signal::TERM);
    for _ in 0..5 {
        ping(&kept, b"after SIGTERM").unwrap();
    }
    drop(kept);
    assert!(old.wait(Duration::from_secs(30)).success());
}

/// Kubelet starts anew what ends: it would take the place back. And it is of use where the next one dies.
fn the_one_before_stands_by(u: &Upgrade) {
    let far = SocketAddr::new(u.far.v4(), echo_in(&u.far));
    let mut agent = u.world.agent("n1");
    agent.be_in_pod(Some("pod-a"));
    assert!(agent.upgrade(&[]).wait(Duration::from_secs(30)).success(), "outside Kubernetes it ends");
    agent.be_in_pod(Some("pod-b"));
    let mut a = agent.upgrade(&[]);
    a.wait_for("this one stands by", Duration::from_secs(30));
    call(&u.client, far).unwrap();
    // Its container is started anew, though nobody asked it to end.
    agent.be_in_pod(Some("pod-a"));
    let b = agent.take_over(&[]);
    agent.process().wait_for("this one stands by", PATIENCE);
    a.kill();
    call(&u.client, far).unwrap();
    let a = std::mem::replace(agent.process(), b);
    agent.kill();
    agent.put_back(a);
    agent.process().wait_for("this one serves again", PATIENCE);
    agent.wait_ready();
    call(&u.client, far).unwrap();

    agent.be_in_pod(None);
    let mut a = agent.upgrade(&[]);
    assert!(a.stop().success(), "whether it drains or stands by");
    let folder = agent.admin_socket().parent().unwrap().to_owned();
    let notes = fs::read_dir(folder).unwrap().flatten().map(|entry| entry.file_name());
    let notes: Vec<_> = notes.filter(|name| name.to_string_lossy().starts_with("handed-over")).collect();
    assert!(notes.is_empty(), "{notes:?} are left");
    call(&u.client, far).unwrap();
}

fn only_root_takes_over(u: &Upgrade) {
    const NOBODY: u32 = 65534;
    let path = socket(u);
    let as_nobody = || {
        thread::scope(|s| {
            let connect = s.spawn(|| {
                let nobody = rustix::fs::Uid::from_raw(NOBODY);
                rustix::thread::set_thread_res_uid(nobody, nobody, nobody).unwrap();
                UnixStream::connect(&path)
            });
            connect.join().unwrap()
        })
    };
    assert_eq!(as_nobody().unwrap_err().kind(), io::ErrorKind::PermissionDenied);
    // Though the file were open to all, the agent looks who asks.
    fs::set_permissions(u.world.mesh().dir(), Permissions::from_mode(0o711)).unwrap();
    fs::set_permissions(&path, Permissions::from_mode(0o666)).unwrap();
    let stranger = as_nobody();
    fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
    fs::set_permissions(u.world.mesh().dir(), Permissions::from_mode(0o700)).unwrap();
    assert!(hear(&stranger.unwrap()).is_err(), "it hears nothing");
    let refused = "a process that is not root's asked to take over";
    eventually(PATIENCE, "the agent says so", || u.world.agent("n1").log().contains(refused));

    let other_node = UnixStream::connect(&path).unwrap();
    say(&other_node, &hello(1, "n2"));
    let answer = hear(&other_node).unwrap();
    assert_eq!((&answer["word"], &answer["restart"]), (&json!("refused"), &json!(false)), "{answer}");
    assert!(answer["reason"].as_str().unwrap().contains("this is the agent of node n1, not of n2"), "{answer}");
    let far = SocketAddr::new(u.far.v4(), echo_in(&u.far));
    call(&u.client, far).unwrap();
}

fn a_foreign_schema_makes_room(u: &Upgrade) {
    let stream = UnixStream::connect(socket(u)).unwrap();
    say(&stream, &hello(9999, "n1"));
    let answer = hear(&stream).unwrap();
    assert_eq!((&answer["word"], &answer["restart"]), (&json!("refused"), &json!(true)), "{answer}");
    assert!(answer["reason"].as_str().unwrap().contains("schema 9999"), "{answer}");
    // It must not be handed anything; but it may ask for room.
    say(&stream, &json!({"word": "give"}));
    assert!(hear(&stream).is_err());
    let stream = UnixStream::connect(socket(u)).unwrap();
    say(&stream, &hello(9999, "n1"));
    hear(&stream).unwrap();
    say(&stream, &json!({"word": "leave"}));
    let mut agent = u.world.agent("n1");
    assert!(agent.process().wait(Duration::from_secs(30)).success(), "it stops as on SIGTERM");
    agent.restart();
    drop(agent);
    let far = SocketAddr::new(u.far.v4(), echo_in(&u.far));
    eventually(PATIENCE, "calls are served again", || call(&u.client, far).is_ok());
}
