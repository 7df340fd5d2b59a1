//! The harness itself: what the other files build on.

use std::io::{Read, Write};
use std::time::Duration;

use mesh_tests::{Mesh, PodSpec, eventually};

/// A client sends `text` to a server of another pod.
fn say(mesh: &Mesh, text: &[u8], v6: bool) {
    let (client, server) = (mesh.pod("n1", "a/client"), mesh.pod("n2", "a/server"));
    let listener = server.listen();
    let to = if v6 { server.v6() } else { server.v4() };
    let mut stream = client.connect((to, listener.local_addr().unwrap().port()).into()).unwrap();
    let (mut peer, _) = listener.accept().unwrap();
    stream.write_all(text).unwrap();
    drop(stream);
    let mut got = Vec::new();
    peer.read_to_end(&mut got).unwrap();
    assert_eq!(got, text);
}

#[test]
fn pods_of_two_nodes_talk_and_the_link_shows_it() {
    for v6 in [false, true] {
        let mesh = Mesh::new().node("n1").node("n2");
        let capture = mesh.capture("n1");
        say(&mesh, b"plain as day", v6);
        let recording = capture.stop();
        assert!(recording.contains(b"plain as day"), "the capture has {} segments", recording.segments.len());
        assert!(!recording.contains(b"never said"));
    }
}

#[test]
fn programs_run_in_their_pod() {
    let mesh = Mesh::new().node("n1");
    let pod = mesh.pod("n1", "a/client");
    let shown = pod.output("ip", &["-o", "address", "show", "eth0"]).success();
    assert!(shown.contains(&pod.v4().to_string()), "{shown}");
    let mut process = pod.start("socat", &["-d", "-d", "TCP-LISTEN:7,fork", "EXEC:cat"]);
    process.wait_for("listening on", Duration::from_secs(5));
    let answer = pod.output("sh", &["-c", "echo ping | socat - TCP:127.0.0.1:7"]).success();
    assert_eq!(answer, "ping\n");
    assert!(process.is_running());
}

#[test]
fn nothing_is_left_of_a_mesh_that_a_panic_ended() {
    let mesh = Mesh::new().node("n1");
    let pod = mesh.pod("n1", "a/client");
    let bpffs = mesh.bpffs("n1");
    let left = [pod.netns().path(), mesh.get_node("n1").netns().path(), mesh.dir().to_owned(), bpffs];
    assert!(left.iter().all(|path| path.exists()));
    let ended = std::thread::spawn(move || {
        let _both = (pod, mesh);
        panic!("as a failing test does");
    });
    assert!(ended.join().is_err());
    for path in left {
        assert!(!path.exists(), "{} is still there", path.display());
    }
}

#[test]
fn a_deleted_pods_address_is_free_at_once() {
    let mesh = Mesh::new().node("n1").node("n2");
    let client = mesh.pod("n1", "a/client");
    let gone = mesh.pod("n2", "a/old");
    // So that the node has its hardware address in mind.
    let listener = gone.listen();
    client.connect((gone.v4(), listener.local_addr().unwrap().port()).into()).unwrap();
    drop(listener);
    let spec = PodSpec::new("n2", "a/new").reusing(&gone);
    let address = gone.v4();
    mesh.delete(gone);
    let new = mesh.add(spec);
    assert_eq!(new.v4(), address);
    let listener = new.listen();
    client.connect((address, listener.local_addr().unwrap().port()).into()).unwrap();
}

/// Whether a process is there and not a zombie that waits for its new parent.
fn is_alive(pid: &str) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(") ").next().is_some_and(|rest| !rest.is_empty() && !rest.starts_with('Z'))
}

#[test]
fn a_process_takes_along_what_it_has_started() {
    let mesh = Mesh::new().node("n1");
    let pod = mesh.pod("n1", "a/master");
    // Killed with its worker, and having ended itself and left the worker behind.
    for (end, kills) in [("wait", true), ("exit 0", false)] {
        let mut master = pod.start("sh", &["-c", &format!("sleep 600 & echo worker $! started; {end}")]);
        master.wait_for("started", Duration::from_secs(5));
        let worker = master.log().split_whitespace().nth(1).unwrap().to_owned();
        if kills {
            assert!(is_alive(&worker), "the worker runs");
            drop(master);
        } else {
            assert!(master.wait(Duration::from_secs(5)).success());
        }
        eventually(Duration::from_secs(5), "the worker is gone", || !is_alive(&worker));
    }
}
