//! How to get there: sockets in a pod's netns, TLS records, the two tunnels (ours and HBONE), their pool, plain copying.
//!
//! Between two agents of Nodemesh the ALPN `nodemesh/1` picks the *session* tunnel: TLS sessions that each carry one
//! connection at a time and are used again after its end (no second flow control, nothing shared between a bulk and a
//! small stream). HBONE (`h2`) is the common language with Istio's ztunnel, and what carries the surplus when a pod has
//! more connections to one destination than sessions are allowed.

pub mod buffers;
pub mod connect;
pub mod copy;
pub mod frame;
pub mod handshake;
pub mod hbone;
pub mod io;
pub mod pool;
pub mod record;
pub mod session;
pub mod stream;
#[cfg(test)]
mod tests;
pub mod upstream;

pub use mesh_common::HBONE_PORT;

pub use crate::identity::{ALPN_H2 as ALPN_HBONE, ALPN_NODEMESH as ALPN_SESSION};
