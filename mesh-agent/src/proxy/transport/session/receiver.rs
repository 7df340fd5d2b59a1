//! What comes in over a session: frames, found and opened where the socket has put them.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::io::IoSliceMut;
use std::task::{Context, Poll, ready};

use tokio::net::TcpStream;

use super::SessionError;
use crate::proxy::transport::buffers::Buffer;
use crate::proxy::transport::frame::Kind;
use crate::proxy::transport::io as sock;
use crate::proxy::transport::record::{HEADER, Opened, Opener};

/// The receiving half: records come in, frames go out.
pub(super) struct Receiver {
    pub(super) opener: Opener,
    /// Records that came with the handshake, opened.
    pub(super) early: VecDeque<Vec<u8>>,
    /// Sealed bytes lie in `buffer[start..end]`; no buffer is held while there are none.
    pub(super) buffer: Option<Buffer>,
    pub(super) start: usize,
    pub(super) end: usize,
    /// The peer wants to open nothing more over this session.
    pub(super) leaving: bool,
}

/// A frame in the receiver's buffer.
pub(super) enum Frame {
    At { kind: Kind, start: usize, end: usize },
    Early { kind: Kind, payload: Vec<u8> },
}

impl Receiver {
    pub(super) fn is_empty(&self) -> bool {
        self.early.is_empty() && self.start == self.end
    }

    /// The next frame, waiting for it; `None` when the peer has closed the session between two connections.
    pub(super) async fn frame(&mut self, tcp: &TcpStream) -> Result<Option<(Kind, Vec<u8>)>, SessionError> {
        loop {
            match self.next()? {
                Some(Frame::Early { kind, payload }) => return Ok(Some((kind, payload))),
                Some(Frame::At { kind, start, end }) => {
                    let buffer = self.buffer.as_deref().expect("the frame lies in the buffer");
                    // DATA is only dropped by those who wait for frames here.
                    let payload = if kind == Kind::Data { Vec::new() } else { buffer[start..end].to_vec() };
                    return Ok(Some((kind, payload)));
                }
                None => match self.fill(tcp).await {
                    Ok(true) => {}
                    Ok(false) => return Ok(None),
                    Err(e) => return Err(e),
                },
            }
        }
    }

    /// The next whole frame that is in the buffer and belongs to a connection.
    pub(super) fn next(&mut self) -> Result<Option<Frame>, SessionError> {
        loop {
            match self.any()? {
                Some(Frame::At { kind: Kind::GoAway, .. } | Frame::Early { kind: Kind::GoAway, .. }) => {
                    self.leaving = true;
                }
                other => return Ok(other),
            }
        }
    }

    fn any(&mut self) -> Result<Option<Frame>, SessionError> {
        if let Some(mut record) = self.early.pop_front() {
            let kind = record.first().copied().and_then(Kind::from_byte).ok_or(SessionError::Protocol)?;
            record.remove(0);
            return Ok(Some(Frame::Early { kind, payload: record }));
        }
        while let Some(buffer) = self.buffer.as_deref_mut() {
            let sealed = &mut buffer[self.start..self.end];
            let Some(len) = Opener::record_len(sealed)?.filter(|len| *len <= sealed.len()) else { break };
            let opened = self.opener.open(&mut sealed[..len])?;
            let at = self.start + HEADER;
            self.start += len;
            match opened {
                Opened::Control => {}
                Opened::Closed => return Err(SessionError::Closed),
                Opened::Data(0) => return Err(SessionError::Protocol),
                Opened::Data(n) => {
                    let kind = Kind::from_byte(buffer[at]).ok_or(SessionError::Protocol)?;
                    return Ok(Some(Frame::At { kind, start: at + 1, end: at + n }));
                }
            }
        }
        Ok(None)
    }

    /// Reads more, once all whole frames are taken. `false`: the peer has closed. Holds no buffer while it waits for the
    /// first byte of a record.
    pub(super) async fn fill(&mut self, tcp: &TcpStream) -> Result<bool, SessionError> {
        poll_fn(|cx| self.poll_fill(tcp, cx)).await
    }

    pub(super) fn poll_fill(&mut self, tcp: &TcpStream, cx: &mut Context<'_>) -> Poll<Result<bool, SessionError>> {
        if self.start == self.end {
            self.buffer = None;
            (self.start, self.end) = (0, 0);
        }
        loop {
            ready!(tcp.poll_read_ready(cx))?;
            let buffer = self.buffer.get_or_insert_with(Buffer::take);
            if self.start > 0 {
                buffer.copy_within(self.start..self.end, 0);
                (self.start, self.end) = (0, self.end - self.start);
            }
            match sock::try_read(tcp, &mut [IoSliceMut::new(&mut buffer[self.end..])])?.count() {
                Some(0) => return Poll::Ready(Ok(false)),
                Some(n) => {
                    self.end += n;
                    return Poll::Ready(Ok(true));
                }
                None if self.end == 0 => self.buffer = None,
                None => {}
            }
        }
    }
}
