//! Composition root.

use std::time::Duration;

use crate::config;

pub fn run_node(_config: config::Node) -> anyhow::Result<()> {
    unimplemented!("the lead's")
}

pub fn run_controller(_config: config::Controller) -> anyhow::Result<()> {
    unimplemented!("the lead's")
}

/// `mesh-agent controller token`: a join token for the node `node`.
pub fn join_token(_config: config::Controller, _node: &str, _ttl: Duration) -> anyhow::Result<String> {
    unimplemented!("the lead's")
}

/// `mesh-agent controller rotate-root`: what was done, a sentence.
pub fn rotate_root(_config: config::Controller) -> anyhow::Result<String> {
    unimplemented!("the lead's")
}
