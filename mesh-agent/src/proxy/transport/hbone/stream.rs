//! A stream of HBONE as a byte stream, for HTTP.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes, BytesMut};
use h2::{Reason, RecvStream, SendStream};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::Place;
use crate::proxy::transport::buffers;

/// A connection that stands; dropped, it is broken off.
pub struct HboneStream {
    send: SendStream<Bytes>,
    receive: RecvStream,
    /// Received and not yet read.
    left: Bytes,
    /// Where bytes to send are gathered: h2 wants to own them.
    buffer: BytesMut,
    we_ended: bool,
    peer_ended: bool,
    _place: Place,
}

impl HboneStream {
    pub fn new(send: SendStream<Bytes>, receive: RecvStream, place: Place) -> Self {
        let (left, buffer) = (Bytes::new(), BytesMut::new());
        Self { send, receive, left, buffer, we_ended: false, peer_ended: false, _place: place }
    }
}

impl Drop for HboneStream {
    fn drop(&mut self) {
        if !(self.we_ended && self.peer_ended) {
            // As RFC 9113 (8.5) has it for a connection that broke behind a CONNECT.
            self.send.send_reset(Reason::CONNECT_ERROR);
        }
    }
}

impl AsyncRead for HboneStream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        while this.left.is_empty() {
            match ready!(this.receive.poll_data(cx)) {
                Some(data) => this.left = data.map_err(broken)?,
                None => {
                    this.peer_ended = true;
                    return Poll::Ready(Ok(()));
                }
            }
        }
        let n = this.left.len().min(into.remaining());
        into.put_slice(&this.left[..n]);
        this.left.advance(n);
        // Given back only now: what nobody reads, the peer must not send.
        this.receive.flow_control().release_capacity(n).map_err(broken)?;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for HboneStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, from: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(from)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        from: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let wanted = from.iter().map(|part| part.len()).sum::<usize>().min(buffers::SIZE);
        if wanted == 0 {
            return Poll::Ready(Ok(0));
        }
        this.send.reserve_capacity(wanted);
        // A reset must be seen even while the window is closed.
        if let Poll::Ready(reason) = this.send.poll_reset(cx) {
            reason.map_err(broken)?;
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        // `poll_capacity` tells of growth only, not of what is there already.
        let room = match this.send.capacity() {
            0 => match ready!(this.send.poll_capacity(cx)) {
                Some(room) => room.map_err(broken)?,
                None => return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into())),
            },
            room => room,
        };
        let mut rest = wanted.min(room);
        let taken = rest;
        this.buffer.reserve(taken);
        for part in from {
            let n = part.len().min(rest);
            this.buffer.extend_from_slice(&part[..n]);
            rest -= n;
        }
        this.send.send_data(this.buffer.split().freeze(), false).map_err(broken)?;
        Poll::Ready(Ok(taken))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if !this.we_ended {
            this.we_ended = true;
            this.send.send_data(Bytes::new(), true).map_err(broken)?;
        }
        Poll::Ready(Ok(()))
    }
}

fn broken(e: h2::Error) -> io::Error {
    match e.is_reset() {
        true => io::ErrorKind::ConnectionReset.into(),
        false => io::Error::other(e),
    }
}
