//! Pods that start: the CNI plugin `mesh-cni` makes them wait until the agent has taken them in.
//!
//! The container runtime calls the plugin as the last of its chain, with the pod's network made and before any container
//! of it runs. The plugin (`plugin`, a process of some milliseconds, without a runtime and without credentials) asks the
//! agent over a Unix socket (`protocol`); the agent (`server`) answers when certificate, listeners and programs are in
//! place. Where no agent answers, the plugin judges by what the agent wrote down last (`members`). `install` puts plugin
//! and entry into the node's folders, `conflist` edits the text of the entry's file.

mod conflist;
mod freshness;
mod install;
mod json;
mod look;
mod members;
pub mod plugin;
mod protocol;
mod server;
mod spec;
mod unjudged;

pub use freshness::AskForNamespace;
pub use install::{InstallError, Installer, Layout, uninstall};
pub use look::{CniFacts, Configuration, look};
pub use members::keep_members;
pub use server::{CniServer, Inputs};
pub use unjudged::take_unjudged;

/// The plugin's name: of its file, and of the type of its entry.
pub const PLUGIN: &str = "mesh-cni";
/// The file in the agent's state directory that says who is in the mesh.
pub const MEMBERS_FILE: &str = "cni-members.json";
