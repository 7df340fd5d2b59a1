//! Reading and writing of tokio sockets with as few system calls as there can be.
#![expect(unsafe_code, reason = "waiting for a listener that is borrowed")]

use std::future::poll_fn;
use std::io::{self, IoSlice, IoSliceMut};
use std::net::TcpListener;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use rustix::net::{RecvFlags, SendFlags};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::TcpStream;

/// A listener whose connections can be waited for, without giving it to tokio (which would register each accepted
/// socket with this worker, though another may serve it).
pub fn watch(listener: &TcpListener) -> io::Result<AsyncFd<BorrowedFd<'_>>> {
    // SAFETY: the borrow keeps the descriptor open, and the same, for as long as the AsyncFd lives.
    unsafe { AsyncFd::register_with_interest(listener.as_fd(), Interest::READABLE) }.map_err(Into::into)
}

/// Waits until a read may give something. One reader a socket.
pub async fn readable(socket: &TcpStream) -> io::Result<()> {
    poll_fn(|cx| socket.poll_read_ready(cx)).await
}

/// Waits until a write may take something. One writer a socket.
pub async fn writable(socket: &TcpStream) -> io::Result<()> {
    poll_fn(|cx| socket.poll_write_ready(cx)).await
}

/// Reads what is there, without waiting. `Ok(None)`: nothing yet; `Ok(Some(0))`: the peer has ended its side.
///
/// A short read tells that the socket is empty, so that the next `readable` waits at once: the usual second `read` that
/// only gives EAGAIN is saved. (An end of stream is kept apart by epoll and not lost.)
pub fn try_read(socket: &TcpStream, into: &mut [IoSliceMut<'_>]) -> io::Result<Option<usize>> {
    let room: usize = into.iter().map(|b| b.len()).sum();
    // One buffer goes by the shorter way, past the file system's layer and the copy of a vector.
    if let [one] = into {
        return partial(socket, Interest::READABLE, room, || {
            rustix::net::recv(socket, &mut **one, RecvFlags::empty()).map(|(n, _)| n)
        });
    }
    partial(socket, Interest::READABLE, room, || rustix::io::readv(socket, into))
}

/// Writes what the socket takes, without waiting. `Ok(None)`: nothing now.
pub fn try_write(socket: &TcpStream, from: &[IoSlice<'_>]) -> io::Result<Option<usize>> {
    let size: usize = from.iter().map(|b| b.len()).sum();
    if let [one] = from {
        return partial(socket, Interest::WRITABLE, size, || rustix::net::send(socket, one, SendFlags::NOSIGNAL));
    }
    partial(socket, Interest::WRITABLE, size, || rustix::io::writev(socket, from))
}

fn partial(
    socket: &TcpStream,
    interest: Interest,
    whole: usize,
    mut call: impl FnMut() -> rustix::io::Result<usize>,
) -> io::Result<Option<usize>> {
    let mut done = None;
    let result = socket.try_io(interest, || {
        loop {
            match call() {
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(e.into()),
                Ok(n) => {
                    done = Some(n);
                    // Said to tokio only, to clear its readiness: the bytes have moved.
                    return if n != 0 && n < whole { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(()) };
                }
            }
        }
    });
    match (done, result) {
        (Some(n), _) => Ok(Some(n)),
        (None, Err(e)) if e.kind() == io::ErrorKind::WouldBlock => Ok(None),
        (None, Err(e)) => Err(e),
        (None, Ok(())) => Ok(None),
    }
}

/// Writes all of `bytes`.
pub async fn write_all(socket: &TcpStream, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match try_write(socket, &[IoSlice::new(bytes)])? {
            Some(n) => bytes = &bytes[n..],
            None => writable(socket).await?,
        }
    }
    Ok(())
}

/// Writes all of `parts`, in order, in as few calls as the socket allows.
pub async fn write_all_vectored(socket: &TcpStream, mut parts: &mut [IoSlice<'_>]) -> io::Result<()> {
    IoSlice::advance_slices(&mut parts, 0);
    while !parts.is_empty() {
        match try_write(socket, parts)? {
            Some(n) => IoSlice::advance_slices(&mut parts, n),
            None => writable(socket).await?,
        }
    }
    Ok(())
}

/// Ends our side of a connection; the peer reads an end of stream after the bytes that were written.
pub fn finish(socket: &TcpStream) -> io::Result<()> {
    match rustix::net::shutdown(socket, rustix::net::Shutdown::Write) {
        // The peer has gone altogether: it will see that from what it tries next.
        Err(rustix::io::Errno::NOTCONN) | Ok(()) => Ok(()),
        Err(e) => Err(e.into()),
    }
}

/// From now on an end that nobody meant (the agent is killed, a task is dropped) resets the connection: an orderly one
/// would pass a cut-off stream for a whole one.
pub fn arm(socket: &TcpStream) {
    let _ = rustix::net::sockopt::set_socket_linger(socket, Some(Duration::ZERO));
}

/// The connection has ended in order: what was written last is still sent.
pub fn disarm(socket: &TcpStream) {
    let _ = rustix::net::sockopt::set_socket_linger(socket, None);
}

/// Ends a connection with a reset, as a broken one ends; an orderly end would tell the peer that all bytes arrived.
pub fn reset(socket: TcpStream) {
    let _ = rustix::net::sockopt::set_socket_linger(&socket, Some(Duration::ZERO));
    drop(socket);
}
