//! From start to end of the process: when it is ready, what tells it to stop, and how files are written that the next
//! process reads.

pub mod files;
mod readiness;
mod signal;
mod socket;

pub use readiness::{BlockReady, Readiness};
pub use signal::{Signals, Stop};
pub use socket::PrivateSocket;
