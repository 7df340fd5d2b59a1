//! Somebody else's eBPF at the agent's cgroup. Case 39 of the list that sidecarless meshes have been caught at.

use std::net::SocketAddr;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use mesh_tests::traffic::{echo, echo_in};
use mesh_tests::{Agent, Attachment, Cgroup, FOREIGN_NAME, Mesh, MeshMode, Pod, attach_foreign, peer_binary};

/// A port that the foreign program refuses: what it does must go on too.
const REFUSED: u16 = 7777;

/// Dropped in this order: the agent lets go of the cgroup before the cgroup goes.
struct Stage {
    agent: Option<Agent>,
    cgroup: Cgroup,
    client: Arc<Pod>,
    server: Arc<Pod>,
    mesh: Mesh,
}

impl Stage {
    fn new() -> Self {
        let mesh = Mesh::new().node("n1");
        mesh.manifests().label("shared", MeshMode::Enabled);
        let (client, server) = (mesh.pod("n1", "shared/client"), mesh.pod("n1", "shared/server"));
        let cgroup = Cgroup::new(&mesh, "shared");
        Self { agent: None, cgroup, client, server, mesh }
    }

    fn attach(&self, attachment: Attachment) -> std::io::Result<()> {
        attach_foreign(self.cgroup.path(), attachment, REFUSED)
    }

    /// An agent whose programs are at our cgroup, and which is in it: the kernel must know its connections.
    fn spawn(&self) -> Agent {
        self.mesh.spawn_agent("n1", &["--embedded-ca", "--cgroup", &self.cgroup.path().display().to_string()])
    }

    fn start(&mut self) {
        let mut agent = self.spawn();
        agent.wait_ready();
        agent.wait_enrolled(&self.client, true);
        agent.wait_enrolled(&self.server, true);
        self.agent = Some(agent);
    }

    /// A call of the client's, as a process of the cgroup.
    fn call(&self, port: u16) -> Result<(), String> {
        let to = SocketAddr::new(self.server.v4(), port).to_string();
        let sh: Command = self.client.command("sh");
        let mut call = self.cgroup.within(sh, &peer_binary().display().to_string(), &["call", &to]);
        let output = call.output().expect("the peer runs");
        output.status.success().then_some(()).ok_or_else(|| String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// A call that the agent must have carried.
    #[track_caller]
    fn is_carried(&self) {
        let agent = self.agent.as_ref().expect("the agent runs");
        let redirected = || agent.metric("nodemesh_kernel_events_total", &[("event", "redirected")]);
        let before = redirected();
        self.call(echo_in(&self.server)).expect("the client's call is answered");
        assert!(redirected() > before, "the call has passed the agent by");
    }
}

#[test]
fn case_39_a_foreign_program_before_ours() {
    let mut stage = Stage::new();
    echo(stage.server.listen_on(&format!("[::]:{REFUSED}")));
    stage.attach(Attachment::Multi).unwrap();
    let refused = || stage.call(REFUSED).expect_err("the foreign program refuses this port");
    assert!(refused().contains("not permitted"), "{}", refused());
    stage.start();
    stage.is_carried();
    let refused = stage.call(REFUSED).expect_err("the foreign program goes on to refuse this port");
    assert!(refused.contains("not permitted"), "{refused}");
}

#[test]
fn case_39_a_foreign_program_after_ours() {
    let mut stage = Stage::new();
    stage.start();
    stage.is_carried();
    stage.attach(Attachment::Multi).unwrap();
    stage.is_carried();
    // Nobody can take the cgroup from under us.
    let exclusive = stage.attach(Attachment::Exclusive).expect_err("the kernel keeps what is shared");
    assert_eq!(exclusive.kind(), std::io::ErrorKind::PermissionDenied);
    stage.is_carried();
    // Nor does a restart change anything.
    let agent = stage.agent.as_mut().unwrap();
    agent.kill();
    stage.call(echo_in(&stage.server)).expect_err("closed without an agent, beside a foreign program too");
    stage.agent.as_mut().unwrap().restart();
    stage.is_carried();
}

#[test]
fn case_39_an_exclusive_program_is_named_and_the_agent_does_not_start() {
    const UNAVAILABLE: i32 = 69;
    let stage = Stage::new();
    stage.attach(Attachment::Exclusive).unwrap();
    let mut agent = stage.spawn();
    let status = agent.process().wait(Duration::from_secs(30));
    let log = agent.log();
    assert_eq!(status.code(), Some(UNAVAILABLE), "{log}");
    let cgroup = stage.cgroup.path().display().to_string();
    let told: Vec<&str> = log.lines().filter(|line| line.contains(FOREIGN_NAME)).collect();
    let [sentence] = told[..] else { panic!("one sentence tells it, not {}: {log}", told.len()) };
    assert!(sentence.contains(&cgroup) && sentence.contains("BPF_F_ALLOW_MULTI"), "{sentence}");
    assert!(!log.contains("panicked"), "{log}");
    // Nothing is half in the mesh.
    stage.call(echo_in(&stage.server)).expect("pods talk as if no agent had been there");
}
