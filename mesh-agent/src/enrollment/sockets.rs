//! Options of the agent's sockets inside pods, for listeners (`netns`) and connections (`proxy::transport`) alike.
#![expect(unsafe_code, reason = "setsockopt for options that socket2 does not know")]

use std::io;
use std::os::fd::AsRawFd;
use std::time::Duration;

use socket2::Socket;

/// Marks the agent's packets to the application when they bear a client's address: the pod's `ip rule` for this mark
/// brings the answers back. Istio's value. It routes only; no decision trusts it.
pub const SPOOF_MARK: u32 = 0x111;

/// Bytes that a socket takes beyond those under way. More would only wait here, out of the sender's sight, when the reader
/// is slow; what is under way the receiver's window bounds.
const UNSENT: libc::c_int = 256 * 1024;
/// The receive buffer of connections inside a pod, where the way is short and a larger one only hides a slow reader.
const LOCAL_RECEIVE: usize = 512 * 1024;

/// That of a tunnel; the kernel doubles it and gives about half to the window. Bounds what a session may have learnt from a
/// connection before: autotuning only ever grows, up to 32 MiB on some machines. 1 ms away it still allows 8 Gbit/s.
const TUNNEL_RECEIVE: libc::c_int = 1024 * 1024;

/// What a socket of the agent is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Use {
    /// Between the agent and the application, inside a pod.
    Local,
    /// Between two agents.
    Tunnel,
    /// Plaintext from or to somewhere else: as the kernel has it.
    Plain,
}

/// Sets what all sockets of the agent inside pods have in common; accepted sockets inherit it from their listener.
pub fn prepare(socket: &Socket, what_for: Use) -> io::Result<()> {
    // Small answers must not wait for more.
    socket.set_tcp_nodelay(true)?;
    // What is sent out of band keeps its place among the bytes; the application behind us gets it so.
    socket.set_out_of_band_inline(true)?;
    if what_for != Use::Tunnel {
        // An end that nobody meant (the agent is killed, a task is dropped) resets the connection: an orderly one would
        // pass a cut-off stream for a whole one.
        socket.set_linger(Some(Duration::ZERO))?;
    }
    // A slow reader must stop its sender soon: the mesh must not hold megabytes of a connection.
    match what_for {
        Use::Local => socket.set_recv_buffer_size(LOCAL_RECEIVE)?,
        // The force is needed to pass net.core.rmem_max.
        Use::Tunnel => set_option(socket, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, TUNNEL_RECEIVE)?,
        Use::Plain => {}
    }
    set_option(socket, libc::IPPROTO_TCP, libc::TCP_NOTSENT_LOWAT, UNSENT)
}

/// Sets an option that socket2 does not know.
pub fn set_option(socket: &Socket, level: libc::c_int, option: libc::c_int, value: libc::c_int) -> io::Result<()> {
    // SAFETY: the descriptor is open, and the option's value is an int that outlives the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            (&raw const value).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
