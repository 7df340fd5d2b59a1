//! Nodemesh under test: a controller, and an agent on each of the two nodes.

use anyhow::{Context, Result, ensure};
use mesh_tests::{Agent, Controller, Mesh, MeshMode, Pod};

/// What runs. Agents end before the controller.
#[derive(Debug)]
pub struct Ours {
    agents: Vec<Agent>,
    controller: Controller,
}

/// Takes the namespace `bench` into the mesh, STRICT, with one rule that lets the clients in; and waits until all of
/// `pods` are taken in.
pub fn start(mesh: &Mesh, pods: &[&Pod]) -> Result<Ours> {
    let manifests = mesh.manifests();
    manifests.label("bench", MeshMode::Enabled);
    manifests.apply(
        "strict",
        "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata:\n  name: default\n  namespace: bench\n\
         spec:\n  mtls:\n    mode: STRICT\n",
    );
    manifests.apply(
        "clients",
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata:\n  name: clients\n  namespace: bench\n\
         spec:\n  action: ALLOW\n  selector:\n    matchLabels:\n      app: server\n  rules:\n  - from:\n    - source:\n\
         \x20       principals: [\"cluster.local/ns/bench/sa/client*\"]\n",
    );
    let controller = mesh.start_controller(&[]);
    let agents: Vec<Agent> = mesh.nodes().iter().map(|node| mesh.start_agent(node.name(), &[])).collect();
    for pod in pods {
        let agent = agents.iter().find(|agent| agent.node().name() == pod.node()).context("each node has an agent")?;
        agent.wait_enrolled(pod, true);
    }
    Ok(Ours { agents, controller })
}

impl Ours {
    pub fn agent_pids(&mut self) -> Vec<u32> {
        self.agents.iter_mut().map(|agent| agent.process().id()).collect()
    }

    pub fn controller_pid(&mut self) -> u32 {
        self.controller.process().id()
    }

    /// Connections with mutual TLS that the server's agent has let in.
    pub fn mutual_tls(&self) -> Result<f64> {
        let agent = self.agents.last().context("there are two agents")?;
        let labels = [("reporter", "destination"), ("connection_security_policy", "mutual_tls")];
        let opened = agent.metric("istio_tcp_connections_opened_total", &labels);
        ensure!(opened.is_finite(), "the agent's metric istio_tcp_connections_opened_total is no number");
        Ok(opened)
    }
}
