//! One agent of the node takes the place of another, and no connection notices. Comes in: the agent that is there, or a new
//! one that is ready. Goes out: the pods with their listeners, the agent's own sockets and its lock, in the new agent; what is
//! open stays with the old one until it ends.
//!
//! The new agent prepares everything it can, and only then asks (`take`). The old one (`give`) lets nobody join or leave,
//! hands descriptors over and goes on serving until it hears that all has arrived; where it does not, nothing has changed. Then
//! it accepts no more. What waits in the listeners' queues meanwhile, the new one accepts: nobody ever closes them.

mod give;
mod own;
mod stand_by;
mod take;
mod wire;

use std::path::{Path, PathBuf};
use std::time::Duration;

pub use give::{Given, Giver, Successor, serve};
pub use own::{Named, Own, OwnError};
pub use stand_by::{Turn, TurnError};
pub use take::{Predecessor, TakeError, Taken, find};
pub use wire::PROTOCOL;

/// For an answer that only needs the other process to run.
const ANSWER: Duration = Duration::from_secs(10);

/// The names under which sockets are handed over.
const LOCK: &str = "lock";
const METRICS: &str = "metrics";
const READINESS: &str = "readiness";
const ADMIN: &str = "admin";
/// The CNI plugin's, where the agent has one.
pub const CNI: &str = "cni";

/// Beside the admin socket.
pub fn socket_path(admin_socket: &Path) -> PathBuf {
    admin_socket.with_file_name(match admin_socket.file_stem().and_then(|stem| stem.to_str()) {
        // Agents of several nodes on one machine have sockets in one folder.
        Some(stem) if stem != "admin" => format!("{stem}-handover.sock"),
        _ => "handover.sock".to_owned(),
    })
}
