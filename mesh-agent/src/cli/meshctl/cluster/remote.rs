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
use crate::api_server::ApiServer;
use crate::cli::exit::Failure;

/// Longer than meshctl waits for its agent, so that its sentence is the one that is seen.
const TIMEOUT: Duration = Duration::from_secs(20);
const CONTAINER: &str = "agent";

/// One agent's pod.
#[derive(Clone)]
pub(in crate::cli::meshctl) struct Pod {
    server: ApiServer,
    namespace: String,
    name: String,
    pub(in crate::cli::meshctl) node: String,
}

impl Pod {
    pub(super) fn of(server: &ApiServer, pod: &Value) -> Self {
        Self {
            server: server.clone(),
            namespace: super::objects::namespace(pod).to_owned(),
            name: name(pod).to_owned(),
            node: node_of(pod).to_owned(),
        }
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
    let Pod { namespace, name, node, .. } = pod;
    let failed =
        |why: String| Failure::unavailable(format!("cannot ask the agent of node {node} ({namespace}/{name}): {why}"));
    let (out, err, ended) = match tokio::time::timeout(TIMEOUT, exec(pod, words)).await {
        Ok(result) => result.map_err(failed)?,
        Err(_) => return Err(failed(format!("no answer within {} s; is its node reachable?", TIMEOUT.as_secs()))),
    };
    if !ended {
        let said = err.lines().last().unwrap_or("it said nothing");
        return Err(failed(said.strip_prefix("meshctl: ").unwrap_or(said).to_owned()));
    }
    serde_json::from_slice(&out)
        .map_err(|e| failed(format!("its answer cannot be read ({e}); use the meshctl of its version")))
}

/// Standard output, standard error, and whether it ended well.
async fn exec(pod: &Pod, words: &[&str]) -> Result<(Vec<u8>, String, bool), String> {
    let api: Api<v1::Pod> = Api::namespaced(pod.server.client(), &pod.namespace);
    let command = ["/usr/bin/meshctl", "-o", "json"].iter().chain(words).map(|&word| word.to_owned());
    let command: Vec<String> = command.collect();
    let parameters = AttachParams::default().container(CONTAINER).stdin(false).stdout(true).stderr(true);
    let mut process = api.exec(&pod.name, command, &parameters).await.map_err(|e| e.to_string())?;
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
    read.await.map_err(|e| e.to_string())?;
    let ended = match status {
        Some(status) => status.await.is_some_and(|status| status.status.as_deref() == Some("Success")),
        None => false,
    };
    Ok((out, err, ended))
}
