//! Pods join and leave the mesh while they run.

mod legacy;
mod netns;
mod pods;
mod routes;
pub mod sockets;

pub use netns::{Netns, NetnsError};
pub use pods::{EnrolledPod, Enrollment, Inputs, PodEvent, PodStatus, Settled};
pub use routes::{RoutesError, restore_all};
