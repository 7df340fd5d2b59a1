//! What meshctl does to and in a Kubernetes cluster. A kubeconfig comes in, or the pod's own account; it is asked and
//! changed through the API server alone.

mod apply;
mod check;
mod diff;
mod handover;
mod install;
mod manifest;
mod namespaces;
mod objects;
mod ready;
pub(super) mod remote;
mod turn;
mod uninstall;
mod upgrade;
mod version;

use std::io::Write;
use std::path::PathBuf;

pub(super) use check::Check;
pub(super) use install::Install;
pub(super) use manifest::Compared;
pub(super) use uninstall::Uninstall;

use super::args::Output;
use super::chart::Given;
use super::layout::Screen;
use crate::api_server::{ApiError, ApiServer};

/// Which cluster, and where the mesh is in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Access {
    pub(super) kubeconfig: Option<PathBuf>,
    pub(super) context: Option<String>,
    /// The mesh's own.
    pub(super) namespace: String,
}

impl Access {
    pub(super) async fn connect(&self) -> Result<ApiServer, ApiError> {
        ApiServer::connect(self.kubeconfig.as_deref(), self.context.as_deref()).await
    }

    /// Whether there is anything that says where a cluster is.
    pub(super) fn is_known(&self, variable: impl Fn(&str) -> Option<String>) -> bool {
        let home = || Some(PathBuf::from(variable("HOME")?).join(".kube/config"));
        self.kubeconfig.is_some()
            || self.context.is_some()
            || variable("KUBECONFIG").is_some_and(|path| !path.is_empty())
            || variable("KUBERNETES_SERVICE_HOST").is_some()
            || home().is_some_and(|path| path.is_file())
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Task {
    Install(Install),
    Upgrade(Install),
    Uninstall(Uninstall),
    Generate(Given),
    Diff(Compared),
    ProfileList,
    ProfileDump(Given),
    ProfileDiff(String, String),
    Check(Check),
    Version {
        client: bool,
    },
    NamespaceList,
    /// Names, and whether they are to be in the mesh.
    NamespaceSwitch(Vec<String>, bool),
}

pub(super) async fn perform(
    task: &Task,
    access: &Access,
    output: Output,
    screen: Screen,
    out: &mut impl Write,
) -> anyhow::Result<()> {
    match task {
        Task::Install(wish) => install::install(access, wish, out).await,
        Task::Upgrade(wish) => upgrade::upgrade(access, wish, out).await,
        Task::Uninstall(wish) => uninstall::uninstall(access, wish, out).await,
        Task::Generate(given) => manifest::generate(access, given, output, out),
        Task::Diff(Compared::Files(old, new)) => manifest::diff_files(old, new, out),
        Task::Diff(Compared::Cluster(given)) => manifest::diff_cluster(access, given, out).await,
        Task::ProfileList => manifest::profile_list(screen, out),
        Task::ProfileDump(given) => manifest::profile_dump(given, output, out),
        Task::ProfileDiff(old, new) => manifest::profile_diff(old, new, out),
        Task::Check(wish) => check::check(access, wish, output, out).await,
        Task::Version { client } => version::version(access, *client, output, screen, out).await,
        Task::NamespaceList => namespaces::list(access, output, screen, out).await,
        Task::NamespaceSwitch(names, enable) => namespaces::switch(access, names, *enable, out).await,
    }
}
