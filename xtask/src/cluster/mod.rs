//! `cargo xtask cluster`: a real Kubernetes of two nodes on this machine, in network namespaces of its own.
//!
//! In comes a machine with root and Go; out comes a kube-apiserver with two kubelets, until `down`. No module here keeps
//! state: what runs is read from the machine each time, so that a command may be cut short at any point.

mod build;
mod certificates;
mod cgroups;
mod command;
mod components;
mod dns;
mod down;
mod layout;
mod load;
mod network;
mod process;
pub mod scale;
pub mod stage;
mod status;
mod up;

use std::fs::{self, File};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::PathBuf;

use anyhow::{Context as _, Result, bail};
use clap::Subcommand;
use rustix::fs::{FlockOperation, flock};

pub use self::build::ensure_helm;
pub use self::command::output;
use self::layout::Cluster;
use crate::run::is_root;

/// Name of the cluster where none is given.
const DEFAULT: &str = "dev";

#[derive(clap::Args)]
pub struct Arguments {
    #[command(subcommand)]
    action: Action,
    /// Which cluster, where there are several
    #[arg(long, global = true, default_value = DEFAULT)]
    name: String,
}

#[derive(Subcommand)]
enum Action {
    /// Build the programs that a cluster runs, once; kept outside the tree, in $NODEMESH_CACHE or the user's cache folder
    Build,
    /// Start the cluster, or what is missing of it; says how to use it
    Up {
        /// Leave what has started when a step fails, to look into it; `down` removes it
        #[arg(long)]
        keep: bool,
    },
    /// Show each program, whether it runs and whether it is ready
    Status,
    /// Bring a static program as an image onto every node, for pods with `imagePullPolicy: Never`
    Load {
        /// For example nodemesh.invalid/web:1
        #[arg(required_unless_present = "archive", requires = "program")]
        image: Option<String>,
        program: Option<PathBuf>,
        /// An OCI archive that is an image already, such as `cargo xtask image` makes
        #[arg(long, value_name = "FILE", conflicts_with = "image")]
        archive: Option<PathBuf>,
    },
    /// End the cluster and remove all that it has made
    Down,
}

pub fn run(arguments: &Arguments) -> Result<()> {
    let cluster = Cluster::new(&arguments.name)?;
    match &arguments.action {
        Action::Build => {
            command::watch_interrupt()?;
            build::ensure()?;
            build::ensure_agnhost().map(drop)
        }
        Action::Up { keep } => {
            need_root("up")?;
            up::run(&cluster, *keep)
        }
        Action::Status => {
            need_root("status")?;
            status::run(&cluster)
        }
        Action::Load { image, program, archive } => {
            need_root("load")?;
            match (archive, image, program) {
                (Some(archive), ..) => load::archive(&cluster, archive),
                (None, Some(image), Some(program)) => load::program(&cluster, image, program),
                (None, ..) => bail!("name an image and a program, or an archive with --archive"),
            }
        }
        Action::Down => {
            need_root("down")?;
            down::run(&cluster)
        }
    }
}

fn need_root(action: &str) -> Result<()> {
    if !is_root() {
        bail!("a cluster lives in network namespaces: run `sudo -E cargo xtask cluster {action}`");
    }
    Ok(())
}

/// Makes the cluster's folder, which holds keys, and keeps other commands away from it while the answer lives.
fn lock(cluster: &Cluster) -> Result<File> {
    let folder = cluster.folder();
    let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(folder);
    made.with_context(|| format!("cannot make {}", folder.display()))?;
    let file = File::open(folder).with_context(|| format!("cannot open {}", folder.display()))?;
    let owner = file.metadata().with_context(|| format!("cannot look at {}", folder.display()))?;
    if owner.uid() != 0 || owner.mode() & 0o077 != 0 {
        bail!("{} was not made by this command: remove it, or set TMPDIR to a folder of your own", folder.display());
    }
    if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
        bail!("another command is at work on cluster {}: wait until it has ended", cluster.name());
    }
    Ok(file)
}
