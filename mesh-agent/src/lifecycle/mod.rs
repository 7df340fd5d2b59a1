//! From start to end of the process: when it is ready, what tells it to stop.

mod readiness;
mod signal;

pub use readiness::{BlockReady, Readiness};
pub use signal::{Signals, Stop};
