//! Pods join and leave the mesh while they run.

mod netns;
mod pods;

pub use netns::{Netns, NetnsError};
pub use pods::{EnrolledPod, Enrollment, PodEvent, PodStatus};
