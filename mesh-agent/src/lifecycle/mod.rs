//! From start to end of the process: when it is ready, whether it still moves, what tells it to stop, and how files are
//! written that the next process reads.

pub mod files;
mod liveness;
mod pen;
mod private_socket;
mod readiness;
mod signal;

pub use liveness::{Liveness, Pulse};
pub use pen::Pen;
pub use private_socket::{KeptFile, PrivateSocket};
pub use readiness::{BlockReady, Readiness};
pub use signal::{Signals, Stop};
