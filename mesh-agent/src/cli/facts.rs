//! `mesh-agent node --facts`: how this node is, as JSON on one line, for `meshctl check` and `upgrade` to judge. It is run in an
//! agent's pod, with the agent's own arguments, or in a pod made like one.

use std::io::Write;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::cni::{self, CniFacts};
use crate::config::Cleanup;
use crate::handover;
use crate::redirect::{self, KernelFacts, Options};

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Facts {
    pub(super) node: String,
    /// Of the program that tells it.
    pub(super) version: String,
    pub(super) handover: Handover,
    /// By the node's clock, in milliseconds since 1970.
    pub(super) now: u64,
    pub(super) kernel: KernelFacts,
    /// `None`: the plugin is switched off.
    pub(super) cni: Option<CniFacts>,
}

/// Agents can hand over to one another where all of it is the same.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Handover {
    pub(super) protocol: u32,
    pub(super) schema: u32,
}

impl Handover {
    pub(super) const OURS: Self = Self { protocol: handover::PROTOCOL, schema: redirect::SCHEMA };
}

pub(super) fn tell(config: &Cleanup, out: &mut impl Write) -> anyhow::Result<()> {
    let Cleanup { node_name, bpffs, cgroup, cni, admin_socket: _, state_dir: _, logging: _ } = config;
    let options = Options { bpffs: bpffs.clone(), cgroup: cgroup.clone(), ..Options::new(node_name) };
    let facts = Facts {
        node: node_name.clone(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        handover: Handover::OURS,
        kernel: redirect::look(&options),
        cni: cni.as_ref().map(|cni| cni::look(&cni.conf_dir, &cni.bin_dir)),
        // Last: whoever asks compares it with the time at which the answer came.
        now: SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default()
            .as_millis()
            .try_into()
            .unwrap_or(u64::MAX),
    };
    Ok(writeln!(out, "{}", serde_json::to_string(&facts)?)?)
}
