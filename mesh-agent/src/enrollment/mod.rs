//! Pods join and leave the mesh while they run.

mod find;
mod handed;
mod leaving;
mod legacy;
mod netns;
mod pods;
mod routes;
pub mod sockets;

pub use find::{FindError, Places, Processes};
pub use handed::{Handed, Order};
pub use legacy::Tuple;
pub use netns::{Netns, NetnsError, NetnsId, see_host_proc};
pub use pods::{EnrolledPod, Enrollment, Inputs, Listeners, PodEvent, PodStatus, Settled};
pub use routes::{RoutesError, restore_all};
