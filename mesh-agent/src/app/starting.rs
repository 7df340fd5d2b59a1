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
use crate::handover::{self, Named};
use crate::lifecycle::{KeptFile, Pen, PrivateSocket, Readiness};
use crate::model::Unjudged;
use crate::pod_status::show_pods;

/// What concerns pods that start.
#[derive(Default)]
pub(super) struct Starting {
    pub tasks: Vec<AbortHandle>,
    /// The CNI plugin's, for the next agent.
    pub socket: Option<(Named, KeptFile)>,
}

/// Starts the CNI plugin's server and its installation, and shows pods' states in Kubernetes; each until it is aborted,
/// since another agent does it. `handed` is the plugin's socket as the agent before has left it.
pub(super) async fn serve_starting_pods(
    config: &Node,
    sources: &Sources,
    places: Arc<Places>,
    statuses: watch::Receiver<Arc<Vec<PodStatus>>>,
    readiness: &Readiness,
    handed: Option<PrivateSocket>,
    pen: &Pen,
) -> anyhow::Result<Starting> {
    let mut tasks = Vec::new();
    let members = config.state_dir.join(cni::MEMBERS_FILE);
    let unjudged = match config.cni {
        Some(_) => cni::take_unjudged(&members),
        None => Vec::new(),
    };
    for Unjudged { namespace, name, uid } in &unjudged {
        tracing::warn!(
            uid,
            "pod {namespace}/{name} started without being judged: no agent answered, and {} could not be read",
            members.display()
        );
    }
    let server = match &config.source {
        Source::Directory(_) => None,
        Source::Kubernetes(kubernetes) => Some(ApiServer::connect(kubernetes.kubeconfig.as_deref(), None).await?),
    };
    if let Some(server) = server.clone() {
        let (node, node_pods) = (config.node_name.clone(), sources.node_pods.clone());
        tasks.push(tokio::spawn(show_pods(server, node, node_pods, statuses.clone(), unjudged)).abort_handle());
    }
    let Some(Cni { conf_dir, bin_dir, socket }) = config.cni.clone() else {
        return Ok(Starting { tasks, socket: None });
    };
    // Where there is no API server the source knows all that there is.
    let ask = move |kind: Kind, namespace: String, name: String| {
        let server = server.clone();
        Box::pin(async move {
            match server {
                Some(server) => server.get(&kind, &namespace, &name).await,
                None => Ok(None),
            }
        }) as _
    };
    let ask_for_pod = Box::new({
        let ask = ask.clone();
        move |namespace, name| ask(Kind::POD, namespace, name)
    });
    let ask_for_namespace = Box::new(move |name| ask(Kind::NAMESPACE, String::new(), name));
    let (node_pods, hints) = (sources.node_pods.clone(), sources.hints.clone());
    // The plugin reads the file and asks at the socket: it is installed when both are there. A disk that is full keeps the agent
    // from neither: pods that run are served.
    let (written, is_written) = oneshot::channel();
    let keeping = cni::keep_members(members.clone(), pen.clone(), node_pods.clone(), move || {
        let _ = written.send(());
    });
    tasks.push(tokio::spawn(keeping).abort_handle());
    let desk = CniServer::bind(
        &socket,
        handed,
        cni::Inputs { node_pods, statuses, places, hints, ask_for_pod, ask_for_namespace },
    )?;
    let (fd, file) = desk.to_hand_over().context("cannot keep the CNI plugin's socket")?;
    let to_next = ((handover::CNI, socket.to_string_lossy().into_owned(), fd), file);
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
    Ok(Starting { tasks, socket: Some(to_next) })
}
