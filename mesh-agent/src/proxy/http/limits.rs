//! How much of a peer's HTTP is taken.

/// Bytes of a head, as Envoy's default; a longer one is answered with 431.
pub const HEAD: usize = 60 * 1024;
/// Lines of a head, as Envoy's default.
pub const HEADERS: usize = 100;
/// What HTTP/1 holds of a connection, a head or a part of a body.
pub const BUFFER: usize = 64 * 1024;
/// Requests that a client may have open over one connection of HTTP/2.
pub const STREAMS: u32 = 256;
/// What a stream may have under way, and all of a connection: a slow reader must not make the agent hold more.
pub const STREAM_WINDOW: u32 = 256 * 1024;
pub const CONNECTION_WINDOW: u32 = 4 * 1024 * 1024;
