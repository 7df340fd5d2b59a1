//! A cluster for as long as something needs it: up with its images, and down when it is dropped.

use std::path::{Path, PathBuf};

use anyhow::Result;

use super::layout::{CONTROL, Cluster};
use super::{build, down, load, up};
use crate::run::root;
use crate::{build as programs, image};

/// The mesh under two names, so that one can be upgraded to the other; and what speaks in its pods.
pub const IMAGE: &str = "nodemesh.invalid/nodemesh:test";
pub const NEXT_IMAGE: &str = "nodemesh.invalid/nodemesh:next";
pub const PEER_IMAGE: &str = "nodemesh.invalid/peer:test";
pub const AGNHOST_IMAGE: &str = "nodemesh.invalid/agnhost:test";

/// A running cluster. Dropped, it is ended.
pub struct Stage {
    cluster: Cluster,
    kept: bool,
}

impl Stage {
    /// For the tests: all images.
    pub fn for_tests() -> Result<Self> {
        let agnhost = build::ensure_agnhost()?;
        let stage = Self::with("test", &[IMAGE, NEXT_IMAGE])?;
        load::program(&stage.cluster, AGNHOST_IMAGE, &agnhost)?;
        Ok(stage)
    }

    /// For the demo: the mesh, and what speaks in its pods.
    pub fn for_demo() -> Result<Self> {
        Self::with("demo", &[IMAGE])
    }

    /// Brings up the cluster `name`, or what is missing of it, and loads images of the mesh onto its nodes.
    fn with(name: &str, images: &[&str]) -> Result<Self> {
        let folder = root().join("target/image");
        let mut archives = Vec::new();
        for image in images {
            let archive = folder.join(format!("{}.tar", tag(image)));
            image::build(image, &archive)?;
            archives.push(archive);
        }
        let peer = programs::static_peer()?;
        let stage = Self { cluster: Cluster::new(name)?, kept: false };
        up::run(&stage.cluster, false)?;
        for archive in &archives {
            load::archive(&stage.cluster, archive)?;
        }
        load::program(&stage.cluster, PEER_IMAGE, &peer)?;
        Ok(stage)
    }

    /// Where the harness finds everything.
    pub fn folder(&self) -> &Path {
        self.cluster.folder()
    }

    pub fn kubeconfig(&self) -> PathBuf {
        self.cluster.kubeconfig()
    }

    /// A folder with a `kubectl` for it.
    pub fn bin(&self) -> PathBuf {
        self.cluster.bin()
    }

    /// What stands before a command that is to see the API server.
    pub fn enter(&self) -> String {
        format!("nsenter --net={}", self.cluster.netns_path(CONTROL).display())
    }

    /// Leaves it running.
    pub fn keep(mut self) {
        self.kept = true;
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        if let Err(e) = down::run(&self.cluster) {
            eprintln!("error: {e:#}; `cargo xtask cluster --name {} down` tries again", self.cluster.name());
        }
    }
}

fn tag(image: &str) -> &str {
    image.rsplit(':').next().unwrap_or(image)
}
