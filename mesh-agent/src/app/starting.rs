//! Puts together what concerns pods that start, and what Kubernetes shows of pods.

use std::sync::Arc;

use anyhow::Context;
use tokio::sync::{oneshot, watch};
use tokio::task::AbortHandle;

use crate::api_server::{ApiServer, Kind};
use crate::cni::{self, CniServer, Installer, Layout};
use crate::config::{Cni, Node, Source};
use crate::discovery::Sources;
use crate::enrollment::{Places, PodStatus};
use crate::lifecycle::Readiness;
use crate::pod_status::show_pods;

/// Starts the CNI plugin's server and its installation, and shows pods' states in Kubernetes; each until it is aborted,
/// since another agent does it.
pub(super) async fn serve_starting_pods(
    config: &Node,
    sources: &Sources,
    places: Arc<Places>,
    statuses: watch::Receiver<Arc<Vec<PodStatus>>>,
    readiness: &Readiness,
) -> anyhow::Result<Vec<AbortHandle>> {
    let mut tasks = Vec::new();
    let server = match &config.source {
        Source::Directory(_) => None,
        Source::Kubernetes(kubernetes) => Some(ApiServer::connect(kubernetes.kubeconfig.as_deref(), None).await?),
    };
    if let Some(server) = server.clone() {
        let (node, node_pods) = (config.node_name.clone(), sources.node_pods.clone());
        tasks.push(tokio::spawn(show_pods(server, node, node_pods, statuses.clone())).abort_handle());
    }
    let Some(Cni { conf_dir, bin_dir, socket }) = config.cni.clone() else { return Ok(tasks) };
    let ask_for_pod = Box::new(move |namespace: String, name: String| {
        let server = server.clone();
        Box::pin(async move {
            match server {
                Some(server) => server.get(&Kind::POD, &namespace, &name).await,
                None => Ok(None),
            }
        }) as _
    });
    let (node_pods, hints) = (sources.node_pods.clone(), sources.hints.clone());
    // The plugin reads the file and asks at the socket: it is installed when both are there. A disk that is full keeps the agent
    // from neither: pods that run are served.
    let members = config.state_dir.join(cni::MEMBERS_FILE);
    let (written, is_written) = oneshot::channel();
    let keeping = cni::keep_members(members.clone(), node_pods.clone(), move || {
        let _ = written.send(());
    });
    tasks.push(tokio::spawn(keeping).abort_handle());
    let desk = CniServer::bind(&socket, cni::Inputs { node_pods, statuses, places, hints, ask_for_pod })?;
    tasks.push(tokio::spawn(desk.run()).abort_handle());
    let plugin = std::env::current_exe().context("cannot find the agent's own binary")?.with_file_name(cni::PLUGIN);
    // Until then, pods that start do not wait: the node must not count as ready.
    let installing = readiness.block("the CNI plugin");
    let layout = Layout { conf_dir, bin_dir, plugin, socket, members };
    let install = async move {
        if is_written.await.is_ok() {
            Installer::new(layout).run(move || drop(installing)).await;
        }
    };
    tasks.push(tokio::spawn(install).abort_handle());
    Ok(tasks)
}
