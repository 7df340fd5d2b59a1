//! Agents asked through the API server: `meshctl` in each agent's own pod, by `exec`. No port is opened for it.

use std::time::Duration;

use k8s_openapi::api::core::v1;
use kube::api::{Api, AttachParams};
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::io::AsyncReadExt;

use super::Access;
use super::check::not_installed;
use super::objects::{AGENT, name};
use super::ready::{node_of, pods};
use crate::api_server::{ApiError, ApiServer};
use crate::cli::exit::Failure;

/// Longer than meshctl waits for its agent, so that its sentence is the one that is seen.
const TIMEOUT: Duration = Duration::from_secs(20);

/// One agent's pod, or a controller's.
#[derive(Clone)]
pub(in crate::cli::meshctl) struct Pod {
    server: ApiServer,
    namespace: String,
    name: String,
    container: String,
    pub(in crate::cli::meshctl) node: String,
}

impl Pod {
    pub(super) fn of(server: &ApiServer, pod: &Value) -> Self {
        Self {
            server: server.clone(),
            namespace: super::objects::namespace(pod).to_owned(),
            name: name(pod).to_owned(),
            container: pod["spec"]["containers"][0]["name"].as_str().unwrap_or_default().to_owned(),
            node: node_of(pod).to_owned(),
        }
    }

    fn refused(&self, error: kube::Error) -> Failure {
        match self.server.error("exec", error) {
            // Agents are asked in their pods: no port is opened for it.
            ApiError::Forbidden { .. } => {
                let Self { namespace, container, .. } = self;
                Failure::no_permission(format!(
                    "you may not ask the {container}s, which is done by exec in their pods; ask for the right to create \
                     pods/exec in namespace {namespace}"
                ))
            }
            other => self.failed(&other.to_string()),
        }
    }

    fn failed(&self, why: &str) -> Failure {
        let Self { namespace, name, node, container, .. } = self;
        Failure::unavailable(format!("cannot ask the {container} of node {node} ({namespace}/{name}): {why}"))
    }
}

/// The agents of all nodes, or of one.
pub(in crate::cli::meshctl) async fn agents(access: &Access, node: Option<&str>) -> anyhow::Result<Vec<Pod>> {
    let server = access.connect().await?;
    let all = pods(&server, &access.namespace, AGENT).await?;
    if all.is_empty() {
        return Err(not_installed(&access.namespace).into());
    }
    let running = all.iter().filter(|pod| pod["status"]["phase"] == "Running");
    let mut found: Vec<Pod> =
        running.map(|pod| Pod::of(&server, pod)).filter(|pod| node.is_none_or(|node| pod.node == node)).collect();
    if found.is_empty() {
        return Err(match node {
            Some(node) => Failure::unavailable(format!("no agent runs on node {node}; see `kubectl get nodes`")),
            None => not_installed(&access.namespace),
        }
        .into());
    }
    found.sort_by(|a, b| a.node.cmp(&b.node));
    Ok(found)
}

/// What the agent's own meshctl says as JSON.
pub(in crate::cli::meshctl) async fn ask<T: DeserializeOwned>(pod: &Pod, words: &[&str]) -> Result<T, Failure> {
    let command = ["/usr/bin/meshctl", "-o", "json"].iter().chain(words);
    ask_program(pod, command.map(|&word| word.to_owned()).collect()).await
}

/// What a program in the agent's container says as JSON.
pub(super) async fn ask_program<T: DeserializeOwned>(pod: &Pod, command: Vec<String>) -> Result<T, Failure> {
    let out = run(pod, command).await?;
    serde_json::from_slice(&out)
        .map_err(|e| pod.failed(&format!("its answer cannot be read ({e}); use the meshctl of its version")))
}

/// What a program in the pod's container says.
pub(super) async fn run(pod: &Pod, command: Vec<String>) -> Result<Vec<u8>, Failure> {
    let (out, err, ended) = match tokio::time::timeout(TIMEOUT, exec(pod, command)).await {
        Ok(result) => result?,
        Err(_) => {
            let seconds = TIMEOUT.as_secs();
            return Err(pod.failed(&format!("no answer within {seconds} s; is its node reachable?")));
        }
    };
    if !ended {
        let said = err.lines().last().unwrap_or("it said nothing");
        let said = ["meshctl: ", "mesh-agent: "].iter().find_map(|name| said.strip_prefix(name)).unwrap_or(said);
        return Err(pod.failed(said));
    }
    Ok(out)
}

/// Standard output, standard error, and whether it ended well.
async fn exec(pod: &Pod, command: Vec<String>) -> Result<(Vec<u8>, String, bool), Failure> {
    let api: Api<v1::Pod> = Api::namespaced(pod.server.client(), &pod.namespace);
    let parameters = AttachParams::default().container(pod.container.as_str()).stdin(false).stdout(true).stderr(true);
    let mut process = api.exec(&pod.name, command, &parameters).await.map_err(|e| pod.refused(e))?;
    let (mut stdout, mut stderr) = (process.stdout(), process.stderr());
    let status = process.take_status();
    let (mut out, mut err) = (Vec::new(), String::new());
    let read = async {
        let out = async {
            match &mut stdout {
                Some(stdout) => stdout.read_to_end(&mut out).await.map(drop),
                None => Ok(()),
            }
        };
        let err = async {
            match &mut stderr {
                Some(stderr) => stderr.read_to_string(&mut err).await.map(drop),
                None => Ok(()),
            }
        };
        tokio::try_join!(out, err)
    };
    read.await.map_err(|e| pod.failed(&e.to_string()))?;
    let ended = match status {
        Some(status) => status.await.is_some_and(|status| status.status.as_deref() == Some("Success")),
        None => false,
    };
    Ok((out, err, ended))
}
