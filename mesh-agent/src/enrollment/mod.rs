//! Pods join and leave the mesh while they run.

mod find;
mod legacy;
mod netns;
mod pods;
mod routes;
pub mod sockets;

pub use find::{FindError, Places, Processes};
pub use netns::{Netns, NetnsError, NetnsId, see_host_proc};
pub use pods::{EnrolledPod, Enrollment, Inputs, PodEvent, PodStatus, Settled};
pub use routes::{RoutesError, restore_all};
