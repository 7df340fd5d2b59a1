//! Reading and writing of tokio sockets with as few system calls as there can be.
#![expect(unsafe_code, reason = "waiting for a listener that is borrowed")]

use std::future::poll_fn;
use std::io::{self, IoSlice, IoSliceMut};
use std::net::TcpListener;
use std::os::fd::{AsFd, BorrowedFd};
use std::pin::pin;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags};
use tokio::io::unix::AsyncFd;
use tokio::io::{Interest, Ready};
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

/// What a read gave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Read {
    /// Nothing yet.
    Nothing,
    Bytes(usize),
    /// So many bytes, and the peer's orderly end right behind them: no further read is needed to see it.
    Last(usize),
    /// The peer has ended its side.
    End,
}

impl Read {
    /// For those who meet the end at the next read: `None`: nothing yet; `Some(0)`: the end.
    pub fn count(self) -> Option<usize> {
        match self {
            Self::Nothing => None,
            Self::Bytes(n) | Self::Last(n) => Some(n),
            Self::End => Some(0),
        }
    }
}

/// Reads what is there, without waiting.
///
/// A short read tells that the socket is empty, so that the next `readable` waits at once: the usual second `read` that
/// only gives EAGAIN is saved. (An end of stream is kept apart by epoll and not lost.)
pub fn try_read(socket: &TcpStream, into: &mut [IoSliceMut<'_>]) -> io::Result<Read> {
    let room: usize = into.iter().map(|b| b.len()).sum();
    let mut done = Read::Nothing;
    let result = socket.try_io(Interest::READABLE, || {
        let n = retry(|| match &mut *into {
            // One buffer goes by the shorter way, past the file system's layer and the copy of a vector.
            [one] => rustix::net::recv(socket, &mut **one, RecvFlags::empty()).map(|(n, _)| n),
            several => rustix::io::readv(socket, several),
        })?;
        done = if n == 0 { Read::End } else { Read::Bytes(n) };
        // Said to tokio only, to clear its readiness: the bytes have moved.
        if n != 0 && n < room { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(()) }
    });
    match (done, result) {
        // Nothing comes after an end. Asked for what is left, since urgent data make a read short too; they are counted
        // here for they lie in line (SO_OOBINLINE).
        (Read::Bytes(n), Err(_))
            if has_ended(socket) && rustix::io::ioctl_fionread(socket).is_ok_and(|left| left == 0) =>
        {
            Ok(Read::Last(n))
        }
        (Read::Nothing, Err(e)) if e.kind() != io::ErrorKind::WouldBlock => Err(e),
        _ => Ok(done),
    }
}

/// Reads what is there and leaves it there; 0 where nothing is, or nothing that could be read.
pub fn peek(socket: &TcpStream, into: &mut [u8]) -> usize {
    rustix::net::recv(socket, into, RecvFlags::PEEK).map_or(0, |(n, _)| n)
}

/// Whether the connection has ended or broken, at least from the peer's side, as far as epoll has told.
pub fn is_closed(socket: &TcpStream) -> bool {
    matches!(readiness(socket), Poll::Ready(Ok(r)) if r.is_read_closed() || r.is_error())
}

/// Whether the peer has ended its side in order, as far as epoll has told. False after a reset.
pub fn has_ended(socket: &TcpStream) -> bool {
    matches!(readiness(socket), Poll::Ready(Ok(r)) if r.is_read_closed() && !r.is_write_closed() && !r.is_error())
}

fn readiness(socket: &TcpStream) -> Poll<io::Result<Ready>> {
    let all = Interest::READABLE | Interest::WRITABLE | Interest::ERROR;
    pin!(socket.ready(all)).poll(&mut Context::from_waker(Waker::noop()))
}

/// Writes what the socket takes, without waiting. `Ok(None)`: nothing now. `more`: hold back a last, part-filled segment,
/// since bytes or the end follow at once.
///
/// Tried without asking tokio, which knows nothing yet of a socket that has just been connected.
pub fn try_write(socket: &TcpStream, from: &[IoSlice<'_>], more: bool) -> io::Result<Option<usize>> {
    let size: usize = from.iter().map(|b| b.len()).sum();
    let flags = if more { SendFlags::NOSIGNAL | SendFlags::MORE } else { SendFlags::NOSIGNAL };
    let sent = retry(|| match from {
        [one] => rustix::net::send(socket, one, flags),
        several => rustix::net::sendmsg(socket, several, &mut SendAncillaryBuffer::default(), flags),
    });
    let done = match sent {
        Ok(n) => Some(n),
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => None,
        Err(e) => return Err(e),
    };
    if done.is_none_or(|n| n < size) {
        // Full: tokio is told, so that `writable` waits for room.
        let _ = socket.try_io(Interest::WRITABLE, || Err::<(), _>(io::ErrorKind::WouldBlock.into()));
    }
    Ok(done)
}

fn retry(mut call: impl FnMut() -> rustix::io::Result<usize>) -> io::Result<usize> {
    loop {
        match call() {
            Err(rustix::io::Errno::INTR) => {}
            done => return done.map_err(Into::into),
        }
    }
}

/// Writes all of `bytes`.
pub async fn write_all(socket: &TcpStream, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match try_write(socket, &[IoSlice::new(bytes)], false)? {
            Some(n) => bytes = &bytes[n..],
            None => writable(socket).await?,
        }
    }
    Ok(())
}

/// Writes all of `parts`, in order, in as few calls as the socket allows; `more` as for `try_write`.
pub async fn write_all_vectored(socket: &TcpStream, mut parts: &mut [IoSlice<'_>], more: bool) -> io::Result<()> {
    IoSlice::advance_slices(&mut parts, 0);
    while !parts.is_empty() {
        match try_write(socket, parts, more)? {
            Some(n) => IoSlice::advance_slices(&mut parts, n),
            None => writable(socket).await?,
        }
    }
    Ok(())
}

/// How many bytes go into a segment; 0 where the kernel does not say.
pub fn mss(socket: &TcpStream) -> usize {
    socket2::SockRef::from(socket).tcp_mss().map_or(0, |mss| mss as usize)
}

/// Ends our side of a connection; the peer reads an end of stream after the bytes that were written.
pub fn finish(socket: &TcpStream) -> io::Result<()> {
    match rustix::net::shutdown(socket, rustix::net::Shutdown::Write) {
        // The peer has gone altogether: it will see that from what it tries next.
        Err(rustix::io::Errno::NOTCONN) | Ok(()) => Ok(()),
        Err(e) => Err(e.into()),
    }
}

/// Bytes that one direction of one connection moves before all others get their turn. A stream is limited only by the
/// buffers of its sockets, and would keep a small request of another connection waiting for as long as they last.
const TURN: usize = 128 * 1024;

/// Counts towards the end of a turn.
#[derive(Debug, Default)]
pub struct Turn(usize);

impl Turn {
    /// After so many bytes more: yields where the turn is over.
    pub async fn took(&mut self, bytes: usize) {
        self.count(bytes);
        if self.is_over() {
            tokio::task::yield_now().await;
        }
    }

    /// For those who poll: after so many bytes more.
    pub fn count(&mut self, bytes: usize) {
        self.0 += bytes;
    }

    /// Whether it is the others' turn; the next one begins.
    pub fn is_over(&mut self) -> bool {
        let over = self.0 >= TURN;
        if over {
            self.0 = 0;
        }
        over
    }
}

/// The connection has ended in order: what was written last is still sent. Until then an end that nobody meant (the agent
/// is killed, a task is dropped) resets it, see `enrollment::sockets::prepare`.
pub fn disarm(socket: &TcpStream) {
    let _ = rustix::net::sockopt::set_socket_linger(socket, None);
}

/// Ends a connection with a reset, as a broken one ends; an orderly end would tell the peer that all bytes arrived.
pub fn reset(socket: TcpStream) {
    let _ = rustix::net::sockopt::set_socket_linger(&socket, Some(Duration::ZERO));
    drop(socket);
}
